//! Whether a log folder is still where it was opened.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

use super::Layout;
use super::disk::{FileId, file_at};

/// Where a log folder was when it was opened, and the folder of runs in it: either can be moved away, or have another
/// file system mounted over it.
#[derive(Debug)]
pub(crate) struct Home {
    /// What of it was there, and which folders those were.
    folders: Vec<(PathBuf, FileId)>,
    /// What was found when it was last looked at, to be told once.
    told: AtomicU8,
}

/// How a folder is not at its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    /// Nothing is there.
    Gone = 1,
    /// Another one is.
    Replaced,
}

impl Home {
    /// The log folder that is at a path now.
    pub(crate) fn of(root: &Path) -> Self {
        let layout = Layout::new(root);
        let folders = [layout.root(), layout.job_runs()].map(Path::to_owned);
        let found = folders.into_iter().filter_map(|path| Some((file_at(&path)?, path)));
        let folders = found.map(|(identity, path)| (path, identity)).collect();
        Self { folders, told: AtomicU8::new(0) }
    }

    /// Why nothing at its path says anything of its runs, if it is not there any more. It is told to the log when that
    /// changes.
    pub(crate) fn away(&self) -> Option<String> {
        let missing = self.folders.iter().find_map(|(path, was)| match file_at(path) {
            Some(is) if is == *was => None,
            Some(_) => Some((path, Missing::Replaced)),
            None => Some((path, Missing::Gone)),
        });
        let found = missing.map_or(0, |(_, missing)| missing as u8);
        if self.told.swap(found, Ordering::AcqRel) != found {
            match missing {
                Some((path, Missing::Gone)) => {
                    tracing::warn!(path = %path.display(), "the log folder was moved or removed; its runs wait until it is back");
                }
                Some((path, Missing::Replaced)) => {
                    tracing::warn!(path = %path.display(), "another folder is where the log folder was; whoever is to serve it has to be started again");
                }
                None => {
                    let path = self.folders.first().map(|(path, _)| path.display().to_string());
                    tracing::info!(path, "the log folder is back");
                }
            }
        }
        missing.map(|(path, missing)| {
            let path = path.display();
            match missing {
                Missing::Gone => format!("the log folder was moved or removed; {path} has to come back"),
                Missing::Replaced => format!(
                    "the log folder was moved or removed, and {path} is another folder now; the one that was there \
                     has to come back, or the service has to be started again to serve the other"
                ),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_log_folder_is_away_while_it_or_its_folder_of_runs_is_not_at_its_path() {
        let above = tempfile::tempdir().unwrap();
        let [root, aside] = ["logs", "aside"].map(|name| above.path().join(name));
        let job_runs = root.join("job_runs");
        fs::create_dir_all(&job_runs).unwrap();
        let home = Home::of(&root);
        assert_eq!(home.away(), None);
        for folder in [&root, &job_runs] {
            fs::rename(folder, &aside).unwrap();
            assert!(home.away().unwrap().contains("has to come back"));
            fs::create_dir_all(&job_runs).unwrap();
            assert!(home.away().unwrap().contains("started again"));
            fs::remove_dir_all(folder).unwrap();
            fs::rename(&aside, folder).unwrap();
            assert_eq!(home.away(), None);
        }
    }

    #[test]
    fn what_was_not_there_is_not_missed() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::of(root.path());
        fs::create_dir(root.path().join("job_runs")).unwrap();
        assert_eq!(home.away(), None);
    }
}
