//! Whatever moment a run's compression is cut at, the run reads the same, and the next try finishes it.

use std::process::Stdio;
use std::time::Duration;

use super::*;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

/// A folder as it was before its run was compressed, and after.
async fn before_and_after() -> (tempfile::TempDir, PathBuf, PathBuf, Vec<Seen>) {
    let folder = tempfile::tempdir().unwrap();
    let (plain, done) = (folder.path().join("plain"), folder.path().join("done"));
    let store = open(&plain);
    write_run(&store, "x");
    let seen = read(&store, "x", ReadOptions { times: true, ..ReadOptions::new(View::All) }).await;
    store.close().unwrap();
    copy(&plain, &done);
    let store = open(&done);
    store.compress(&id("x")).unwrap();
    store.close().unwrap();
    (folder, plain, done, seen)
}

#[tokio::test]
async fn every_step_leaves_a_run_that_reads_the_same() {
    let (folder, plain, done, seen) = before_and_after().await;
    let whole = |part: &str| fs::read(of_run(&done, "x", &format!("{part}.zst"))).unwrap();
    type Step<'a> = (&'a str, Box<dyn Fn(&Path) + 'a>);
    let steps: [Step<'_>; 7] = [
        ("a file is begun", Box::new(|at| fs::write(of_run(at, "x", ".stdout.log.zst.new"), b"").unwrap())),
        (
            "half of it is written",
            Box::new(|at| {
                let bytes = whole("stdout.log");
                fs::write(of_run(at, "x", ".stdout.log.zst.new"), &bytes[..bytes.len() / 2]).unwrap();
            }),
        ),
        (
            "it is written and has no name",
            Box::new(|at| {
                fs::write(of_run(at, "x", ".stdout.log.zst.new"), whole("stdout.log")).unwrap();
            }),
        ),
        (
            "it has its name",
            Box::new(|at| {
                fs::write(of_run(at, "x", "stdout.log.zst"), whole("stdout.log")).unwrap();
            }),
        ),
        (
            "all have their names",
            Box::new(|at| {
                PARTS.iter().for_each(|part| {
                    fs::write(of_run(at, "x", &format!("{part}.zst")), whole(part)).unwrap()
                });
            }),
        ),
        (
            "a plain file is gone",
            Box::new(|at| {
                PARTS.iter().for_each(|part| {
                    fs::write(of_run(at, "x", &format!("{part}.zst")), whole(part)).unwrap()
                });
                fs::remove_file(of_run(at, "x", "stdout.log")).unwrap();
            }),
        ),
        (
            "all are gone, and the index does not know",
            Box::new(|at| {
                PARTS.iter().for_each(|part| {
                    fs::write(of_run(at, "x", &format!("{part}.zst")), whole(part)).unwrap();
                    fs::remove_file(of_run(at, "x", part)).unwrap();
                });
            }),
        ),
    ];
    for (number, (step, make)) in steps.iter().enumerate() {
        let at = folder.path().join(number.to_string());
        copy(&plain, &at);
        make(&at);
        let all = || ReadOptions { times: true, ..ReadOptions::new(View::All) };
        assert!(read(&open_folder(&at), "x", all()).await == seen, "{step}: as a folder");
        let mended = folder.path().join(format!("mended-{number}"));
        copy(&at, &mended);
        let found = check_index(&mended, CheckOptions { deep: true, repair: true }, |_| ()).unwrap();
        assert!(!found.findings.is_empty() && found.is_clean(), "{step}: {found:?}");
        is_clean(&mended);
        assert!(read(&open_folder(&mended), "x", all()).await == seen, "{step}: mended");

        let options =
            FileStoreOptions { compress_after: Some(Duration::ZERO), ..FileStoreOptions::default() };
        let store = FileLogStore::open(&at, options).unwrap();
        assert!(read(&store, "x", all()).await == seen, "{step}: by its store");
        let now = ["journal.zst", "metadata.json", "stderr.log.zst", "stdout.log.zst"];
        wait_until("the next service finishes it", || names(&at, "x") == now);
        assert!(read(&store, "x", all()).await == seen, "{step}: finished");
        store.close().unwrap();
        rebuild_index(&at, |_| ()).unwrap();
        is_clean(&at);
    }
}

#[test]
fn killed_at_any_moment_nothing_is_lost() {
    let databuild = Databuild::new();
    let folder = databuild.home.path().join("logs");
    databuild.run(&["run", "-q", "--id", "x", "--", "sh", "-c", "seq 300000; seq 1000 >&2"]).code(0);
    let expected: String = (1..=300_000).map(|n| format!("{n}\n")).collect();
    for round in 0..30 {
        let mut child = databuild.command(&["runs", "compress", "x", "--log-dir", folder.to_str().unwrap()]);
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(round * 4));
        child.kill().unwrap();
        child.wait().unwrap();
        let text = open_folder(&folder)
            .read_bytes(&id("x"), Stream::Stdout, ByteOffset(0), usize::MAX >> 1)
            .unwrap();
        assert!(text == expected, "round {round}");
        if of_run(&folder, "x", "journal").exists() {
            continue;
        }
        // It was done by then: from the beginning again.
        let plain =
            [("stdout.log", text.clone()), ("journal", journal(&folder)), ("stderr.log", stderr(&folder))];
        for (part, bytes) in plain {
            fs::write(of_run(&folder, "x", part), bytes).unwrap();
            let _ = fs::remove_file(of_run(&folder, "x", &format!("{part}.zst")));
        }
    }
    databuild.run(&["runs", "compress", "x", "--log-dir", folder.to_str().unwrap()]).code(0);
    databuild.run(&["index", "rebuild"]).code(0);
    is_clean(&folder);
}

fn journal(folder: &Path) -> Bytes {
    let done = Command::new("zstdcat").arg(of_run(folder, "x", "journal.zst")).output().unwrap();
    assert!(done.status.success());
    done.stdout.into()
}

fn stderr(folder: &Path) -> Bytes {
    open_folder(folder).read_bytes(&id("x"), Stream::Stderr, ByteOffset(0), usize::MAX >> 1).unwrap()
}
