//! Whether a log folder is still where it was opened.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::Layout;
use super::disk::{FileId, file_at, file_id};
use super::run_folder::is_absent;

/// Where a log folder was when it was opened, and the folder of runs in it: either can be moved away, or have another
/// file system mounted over it.
#[derive(Debug)]
pub(crate) struct Home {
    /// What of it was there, and which folders those were.
    folders: Vec<(PathBuf, FileId)>,
    /// What was found when it was last looked at, to be told once.
    told: Mutex<Option<String>>,
}

impl Home {
    /// The log folder that is at a path now.
    pub(crate) fn of(root: &Path) -> Self {
        let layout = Layout::new(root);
        let folders = [layout.root(), layout.job_runs()].map(Path::to_owned);
        let found = folders.into_iter().filter_map(|path| Some((file_at(&path)?, path)));
        let folders = found.map(|(identity, path)| (path, identity)).collect();
        Self { folders, told: Mutex::new(None) }
    }

    /// Why nothing at its path says anything of its runs, if it is not there any more. It is told to the log when that
    /// changes.
    pub(crate) fn away(&self) -> Option<String> {
        let found = self.folders.iter().find_map(|(path, was)| why_not_at(path, *was));
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if *told != found {
            let path = self.folders.first().map(|(path, _)| path.display().to_string());
            match &found {
                Some(why) => tracing::warn!(path, "{why}; its runs wait until it is back"),
                None => tracing::info!(path, "the log folder is back"),
            }
            told.clone_from(&found);
        }
        found
    }
}

fn why_not_at(path: &Path, was: FileId) -> Option<String> {
    let shown = path.display();
    match fs::metadata(path) {
        Ok(found) if file_id(&found) == was => None,
        Ok(_) => Some(format!(
            "the log folder was moved or removed, and {shown} is another folder now; the one that was there \
             has to come back, or the service has to be started again to serve the other"
        )),
        Err(error) if is_absent(&error) => {
            Some(format!("the log folder was moved or removed; {shown} has to come back"))
        }
        Err(error) => Some(format!("the log folder can't be looked at: {shown}: {error}")),
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
