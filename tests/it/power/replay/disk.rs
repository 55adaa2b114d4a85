//! A disk that keeps what was synced. Of what was not, a power cut may leave any part.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use super::trace::Call;
use crate::crash::Random;
use crate::power::make_old;

type Inode = usize;

/// What is on the disk, what is only in memory, and what a process has open.
#[derive(Clone)]
pub(super) struct Disk {
    nodes: Vec<Node>,
    open: HashMap<u32, Open>,
}

#[derive(Clone, Copy)]
struct Open {
    node: Inode,
    /// Where the next write goes; `None`: to the end.
    at: Option<usize>,
}

#[derive(Clone)]
enum Node {
    File(File),
    Folder(Folder),
}

#[derive(Clone, Default)]
struct File {
    synced: Vec<u8>,
    now: Vec<u8>,
    since: Vec<Change>,
}

/// What changed in a file since it was synced, and how long it was then.
#[derive(Clone)]
struct Change {
    at: usize,
    bytes: Vec<u8>,
    length: usize,
}

type Names = BTreeMap<String, Inode>;

#[derive(Clone, Default)]
struct Folder {
    synced: Names,
    now: Names,
    /// The names after each change since it was synced: a file system writes those down in their order.
    since: Vec<Names>,
}

/// The log folder, with its folder of runs: both were there long before.
impl Default for Disk {
    fn default() -> Self {
        let names = Names::from([("job_runs".to_owned(), 1)]);
        let root = Folder { synced: names.clone(), now: names, since: Vec::new() };
        Self { nodes: vec![Node::Folder(root), Node::Folder(Folder::default())], open: HashMap::new() }
    }
}

impl Disk {
    pub(super) fn apply(&mut self, call: &Call) {
        match call {
            Call::MakeFolder(path) => {
                if self.find(path).is_none() {
                    let node = self.add(Node::Folder(Folder::default()));
                    self.name(path, Some(node));
                }
            }
            Call::Open { path, file, create, append, empty } => {
                let node = self.find(path).or_else(|| {
                    create.then(|| {
                        let node = self.add(Node::File(File::default()));
                        self.name(path, Some(node));
                        node
                    })
                });
                let Some(node) = node else { return };
                self.open.insert(*file, Open { node, at: (!append).then_some(0) });
                if *empty {
                    self.file(*file).change(0, &[], 0);
                }
            }
            Call::Write { file, bytes } => {
                let length = self.file(*file).now.len();
                let open = self.open.get_mut(file).unwrap();
                let at = open.at.unwrap_or(length);
                open.at = open.at.map(|at| at + bytes.len());
                self.file(*file).change(at, bytes, length.max(at + bytes.len()));
            }
            Call::Resize { file, length } => self.file(*file).change(0, &[], *length),
            Call::Sync { file } => {
                let node = self.open[file].node;
                // A file that is synced can be found.
                let is_file = matches!(self.nodes[node], Node::File(_));
                let holds = |folder: &Folder| folder.now.values().any(|&held| held == node);
                for (other, entry) in self.nodes.iter_mut().enumerate() {
                    match entry {
                        Node::File(file) if other == node => file.sync(),
                        Node::Folder(folder) if other == node || holds(folder) && is_file => folder.sync(),
                        _ => {}
                    }
                }
            }
            Call::Rename { from, to } => {
                let node = self.find(from).unwrap();
                let parent = self.find(from.parent().unwrap());
                assert_eq!(parent, self.find(to.parent().unwrap()), "within a folder");
                let folder = self.folder(parent.unwrap());
                folder.now.remove(file_name(from));
                folder.now.insert(file_name(to).to_owned(), node);
                folder.since.push(folder.now.clone());
            }
            Call::Remove(path) => self.name(path, None),
        }
    }

    fn add(&mut self, node: Node) -> Inode {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn find(&self, path: &Path) -> Option<Inode> {
        path.iter().try_fold(0, |node, name| match &self.nodes[node] {
            Node::Folder(folder) => folder.now.get(name.to_str()?).copied(),
            Node::File(_) => None,
        })
    }

    /// The same by what was synced alone.
    fn find_synced(&self, path: &str) -> Option<Inode> {
        path.split('/').try_fold(0, |node, name| match &self.nodes[node] {
            Node::Folder(folder) => folder.synced.get(name).copied(),
            Node::File(_) => None,
        })
    }

    fn folder(&mut self, node: Inode) -> &mut Folder {
        match &mut self.nodes[node] {
            Node::Folder(folder) => folder,
            Node::File(_) => panic!("not a folder"),
        }
    }

    fn file(&mut self, number: u32) -> &mut File {
        match &mut self.nodes[self.open[&number].node] {
            Node::File(file) => file,
            Node::Folder(_) => panic!("not a file"),
        }
    }

    fn name(&mut self, path: &Path, node: Option<Inode>) {
        let parent = self.find(path.parent().unwrap()).unwrap();
        let folder = self.folder(parent);
        match node {
            Some(node) => folder.now.insert(file_name(path).to_owned(), node),
            None => folder.now.remove(file_name(path)),
        };
        folder.since.push(folder.now.clone());
    }

    /// Whether a file was synced, and every folder that leads to it.
    pub(super) fn has_synced(&self, path: &str) -> bool {
        let node = self.find_synced(path).map(|node| &self.nodes[node]);
        matches!(node, Some(Node::File(file)) if file.since.is_empty())
    }

    /// What was synced of a file that is there now.
    pub(super) fn synced(&self, path: &str) -> Vec<u8> {
        match self.find_synced(path).map(|node| &self.nodes[node]) {
            Some(Node::File(file)) => file.synced.clone(),
            _ => Vec::new(),
        }
    }

    /// What is there when the power comes back.
    pub(super) fn after_a_power_cut(&self, random: &mut Random) -> Image {
        let mut image = Image::default();
        let sector = [512, 4096][random.below(2) as usize];
        let mut disk = Cow::Borrowed(self);
        if random.below(4) > 0 {
            // A file system writes names down every few seconds.
            disk.to_mut().nodes.iter_mut().for_each(|node| {
                if let Node::Folder(folder) = node {
                    folder.sync();
                }
            });
        }
        // Of so many changes, how many are there: now and then none at all, or all everywhere, or almost all.
        let how = random.below(7);
        let mut kept = |changes: u64| match (how, random.below(16)) {
            (0, _) | (2 | 3, 0) | (4.., 0..4) => 0,
            (1..=3, _) | (4.., 4..8) => changes,
            _ => random.below(changes + 1),
        };
        disk.gather(0, PathBuf::new(), &mut image, &mut kept, sector);
        image
    }

    fn gather(
        &self,
        node: Inode,
        path: PathBuf,
        image: &mut Image,
        kept: &mut dyn FnMut(u64) -> u64,
        sector: usize,
    ) {
        match &self.nodes[node] {
            Node::File(file) => {
                image.files.insert(path, file.left(kept, sector));
            }
            Node::Folder(folder) => {
                let names = match kept(folder.since.len() as u64) as usize {
                    0 => &folder.synced,
                    changes => &folder.since[changes - 1],
                };
                for (name, &node) in names {
                    self.gather(node, path.join(name), image, kept, sector);
                }
                image.folders.push(path);
            }
        }
    }
}

impl Folder {
    fn sync(&mut self) {
        self.synced.clone_from(&self.now);
        self.since.clear();
    }
}

impl File {
    fn sync(&mut self) {
        self.synced.clone_from(&self.now);
        self.since.clear();
    }

    fn change(&mut self, at: usize, bytes: &[u8], length: usize) {
        self.now.resize(length, 0);
        self.now[at..at + bytes.len()].copy_from_slice(bytes);
        self.since.push(Change { at, bytes: bytes.to_vec(), length });
    }

    /// As long as it was after one of the changes. Each sector is as it was after one of those that touch it, whichever
    /// sectors beside it are: what was never written of it are zeros.
    fn left(&self, kept: &mut dyn FnMut(u64) -> u64, sector: usize) -> Vec<u8> {
        let length = match kept(self.since.len() as u64) as usize {
            0 => self.synced.len(),
            changes => self.since[changes - 1].length,
        };
        let mut left = self.synced.clone();
        left.resize(length, 0);
        for begin in (0..length).step_by(sector) {
            let sector = begin..(begin + sector).min(length);
            let touching: Vec<_> = self
                .since
                .iter()
                .filter(|change| change.at < sector.end && change.at + change.bytes.len() > sector.start)
                .collect();
            for change in &touching[..kept(touching.len() as u64) as usize] {
                for (at, &byte) in (change.at..).zip(&change.bytes) {
                    if sector.contains(&at) {
                        left[at] = byte;
                    }
                }
            }
        }
        left
    }
}

fn file_name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

/// What a power cut leaves: folders, and files with what is in them.
#[derive(Debug, Default)]
pub(super) struct Image {
    folders: Vec<PathBuf>,
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Image {
    pub(super) fn has(&self, path: &str) -> bool {
        self.files.contains_key(Path::new(path))
            || self.folders.iter().any(|folder| folder == Path::new(path))
    }

    /// Writes it to a folder in which there is a run with an empty journal, as if long ago.
    pub(super) fn write(&self, root: &Path) {
        self.folders.iter().for_each(|folder| fs::create_dir_all(root.join(folder)).unwrap());
        for (path, bytes) in &self.files {
            fs::write(root.join(path), bytes).unwrap();
        }
        if !self.has("job_runs/r") {
            fs::remove_dir_all(root.join("job_runs/r")).unwrap();
        } else if !self.has("job_runs/r/journal") {
            fs::remove_file(root.join("job_runs/r/journal")).unwrap();
        }
        let runs = self.folders.iter().filter(|folder| folder.iter().count() == 2);
        runs.for_each(|folder| make_old(&root.join(folder)));
    }
}
