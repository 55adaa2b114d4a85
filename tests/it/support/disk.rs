//! A disk that is small enough to be filled. Needs root, to mount.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A file system in memory that has so much room.
pub(crate) struct SmallDisk {
    pub(crate) at: PathBuf,
}

impl SmallDisk {
    /// Over a folder that is there.
    pub(crate) fn at(at: PathBuf, mib: u64) -> Self {
        let options = std::ffi::CString::new(format!("size={mib}m")).unwrap();
        mount("tmpfs", &at, "tmpfs", MountFlags::empty(), options.as_c_str())
            .expect("a tmpfs can be mounted, which takes root");
        Self { at }
    }

    /// Takes all room that is left.
    pub(crate) fn fill(&self) {
        let mut ballast = File::options().append(true).create(true).open(self.ballast()).unwrap();
        let mut size = 64 * 1024;
        while size > 0 {
            match ballast.write(&vec![b'x'; size]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => size /= 2,
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub(crate) fn free(&self) -> u64 {
        let found = rustix::fs::statvfs(&self.at).unwrap();
        found.f_bavail * found.f_frsize
    }

    pub(crate) fn make_room(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }

    fn ballast(&self) -> PathBuf {
        self.at.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = unmount(&self.at, UnmountFlags::DETACH);
    }
}
