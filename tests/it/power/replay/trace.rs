//! What a process asked of the system, as `strace` wrote it down.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// How `strace` is to write it: paths and bytes whole, and in hexadecimal digits.
pub(super) const OPTIONS: [&str; 8] = [
    "-b",
    "execve",
    "-y",
    "-xx",
    "-s",
    "10000000",
    "-e",
    "trace=mkdir,openat,write,pwrite64,ftruncate,fsync,fdatasync,rename,renameat2,unlink,rmdir",
];

/// A call that changes what is on the disk, or has it written there. Paths are below the log folder, and files are told
/// apart by the number that the process has them open under.
#[derive(Clone)]
pub(super) enum Call {
    MakeFolder(PathBuf),
    Open { path: PathBuf, file: u32, create: bool, append: bool, empty: bool },
    Write { file: u32, bytes: Vec<u8> },
    Resize { file: u32, length: usize },
    Sync { file: u32 },
    Rename { from: PathBuf, to: PathBuf },
    Remove(PathBuf),
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeFolder(path) => write!(f, "mkdir {}", path.display()),
            Self::Open { path, file, .. } => write!(f, "open {} as {file}", path.display()),
            Self::Write { file, bytes } => write!(f, "write {} bytes to {file}", bytes.len()),
            Self::Resize { file, length } => write!(f, "cut {file} to {length}"),
            Self::Sync { file } => write!(f, "sync {file}"),
            Self::Rename { from, to } => write!(f, "rename {} to {}", from.display(), to.display()),
            Self::Remove(path) => write!(f, "remove {}", path.display()),
        }
    }
}

/// The calls about what is below a folder that succeeded, in the order in which they were done.
pub(super) fn read(trace: &str, root: &Path) -> Vec<Call> {
    let mut unfinished = HashMap::new();
    let mut calls = Vec::new();
    for line in trace.lines() {
        let (thread, call) = line.split_once(' ').unwrap();
        let call = call.trim_start();
        let whole = if let Some(begun) = call.strip_suffix("<unfinished ...>") {
            unfinished.insert(thread, begun);
            continue;
        } else if let Some(rest) = call.strip_prefix("<... ") {
            let (_, rest) = rest.split_once("resumed>").unwrap();
            unfinished.remove(thread).map(|begun| format!("{begun}{rest}"))
        } else {
            Some(call.to_owned())
        };
        calls.extend(whole.and_then(|call| parse(&call, root)));
    }
    calls
}

fn parse(call: &str, root: &Path) -> Option<Call> {
    let (name, rest) = call.split_once('(')?;
    let (arguments, result) = rest.rsplit_once(" = ")?;
    let result: u32 = leading_number(result)?;
    let texts: Vec<_> = arguments.split('"').skip(1).step_by(2).map(bytes).collect();
    let path = |text: &Vec<u8>| {
        let path = PathBuf::from(String::from_utf8(text.clone()).unwrap());
        path.strip_prefix(root).ok().map(Path::to_owned)
    };
    // The first argument is an open file, and where it is is said behind it.
    let file = || {
        let (number, behind) = arguments.split_once('<')?;
        path(&bytes(behind.split_once('>')?.0))?;
        number.parse().ok()
    };
    Some(match name {
        "mkdir" => Call::MakeFolder(path(&texts[0])?),
        "openat" => Call::Open {
            path: path(&texts[0])?,
            file: result,
            create: arguments.contains("O_CREAT"),
            append: arguments.contains("O_APPEND"),
            empty: arguments.contains("O_TRUNC"),
        },
        "write" => {
            let file = file()?;
            Call::Write { file, bytes: texts[0][..result as usize].to_vec() }
        }
        "ftruncate" => {
            let length = arguments.rsplit_once(", ")?.1.trim_end_matches(')').parse().ok()?;
            Call::Resize { file: file()?, length }
        }
        "fsync" | "fdatasync" => Call::Sync { file: file()? },
        "rename" | "renameat2" => Call::Rename { from: path(&texts[0])?, to: path(&texts[1])? },
        "unlink" | "rmdir" => Call::Remove(path(&texts[0])?),
        other => {
            assert!(file().is_none(), "{other} is not replayed");
            return None;
        }
    })
}

fn leading_number(text: &str) -> Option<u32> {
    text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Bytes that are written as `\x41\x0a`.
fn bytes(text: &str) -> Vec<u8> {
    text.split("\\x").skip(1).map(|digits| u8::from_str_radix(digits, 16).unwrap()).collect()
}
