//! The bytes of a log, whole and in parts.

use databuild_logs::{FileLogStore, FileStoreOptions, LogStore, Stream};

use super::{exited, finished, id, numbered, running};
use crate::support::http::Server;

const RAW: &str = "/api/job_runs/r/logs/stdout/raw";

#[tokio::test]
async fn a_log_comes_back_byte_for_byte() {
    let printed: Vec<u8> =
        (0..3_000_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let server = Server::start(finished(&printed[..1_500_001])).await;
    let answer = server.get(RAW).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body == printed[..1_500_001], "the bytes differ");
    assert_eq!(answer.header("content-length"), Some("1500001"));
    assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(answer.header("content-disposition"), Some("attachment; filename=\"r.stdout.log\""));
    assert_eq!(answer.header("accept-ranges"), Some("bytes"));
    assert_eq!(server.get("/api/job_runs/r/logs/stderr/raw").await.body, b"");
}

#[tokio::test]
async fn parts_are_given_by_range() {
    let server = Server::start(finished(b"0123456789")).await;
    for (range, status, body, content_range) in [
        ("bytes=2-4", 206, "234", Some("bytes 2-4/10")),
        ("bytes=7-", 206, "789", Some("bytes 7-9/10")),
        ("bytes=-2", 206, "89", Some("bytes 8-9/10")),
        ("bytes=0-99", 206, "0123456789", Some("bytes 0-9/10")),
        ("bytes=0-1,4-5", 200, "0123456789", None),
        ("rows=1-2", 200, "0123456789", None),
    ] {
        let answer = server.get_with(RAW, &[("Range", range)]).await;
        assert_eq!((answer.status, answer.text()), (status, body), "{range}");
        assert_eq!(answer.header("content-range"), content_range, "{range}");
    }
    let answer = server.get_with(RAW, &[("Range", "bytes=10-")]).await;
    answer.problem(416);
    assert_eq!(answer.header("content-range"), Some("bytes */10"));
}

#[tokio::test]
async fn windows_of_lines_are_bytes_too() {
    let server = Server::start(finished(&numbered(10))).await;
    for (query, body) in [
        ("?since=8", "9\n10\n"),
        ("?lines=2", "9\n10\n"),
        ("?since=2&lines=2", "3\n4\n"),
        ("?lines=0", ""),
        ("?since=99", ""),
        ("?since=9&lines=99", "10\n"),
        ("?lines=99", "1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n"),
    ] {
        assert_eq!(server.get(&format!("{RAW}{query}")).await.text(), body, "{query}");
    }
    let part = server.get_with(&format!("{RAW}?since=2&lines=2"), &[("Range", "bytes=2-")]).await;
    assert_eq!((part.text(), part.header("content-range")), ("4\n", Some("bytes 2-3/4")));
}

#[tokio::test]
async fn once_a_run_is_over_its_bytes_have_a_name() {
    let store = running(b"0123456789");
    let server = Server::start(store.clone()).await;
    let answer = server.get(RAW).await;
    assert_eq!(
        (answer.text(), answer.header("etag")),
        ("0123456789", None),
        "what is there, and it may grow"
    );
    let part = server.get_with(RAW, &[("Range", "bytes=4-"), ("If-Range", "\"x\"")]).await;
    assert_eq!(part.status, 200, "nothing is known to be the same");

    store.append(&id("r"), Stream::Stdout, b"!\n").unwrap();
    store.finish(&id("r"), exited(0)).unwrap();
    let tag = server.get(RAW).await.header("etag").unwrap().to_owned();
    assert!(tag.starts_with('"'), "a strong one: {tag}");
    for (headers, status) in [
        (&[("If-None-Match", tag.as_str())][..], 304),
        (&[("If-None-Match", "\"other\"")], 200),
        (&[("Range", "bytes=4-"), ("If-Range", &tag)], 206),
        (&[("Range", "bytes=4-"), ("If-Range", "\"other\"")], 200),
        (&[("Range", "bytes=4-"), ("If-Range", "Wed, 21 Oct 2026 07:28:00 GMT")], 200),
    ] {
        assert_eq!(server.get_with(RAW, headers).await.status, status, "{headers:?}");
    }
    let window = server.get(&format!("{RAW}?since=1")).await;
    assert_ne!(window.header("etag"), Some(tag.as_str()), "other bytes, another name");
}

/// The head has to be sent before the whole of a log was read.
#[tokio::test]
async fn a_log_that_became_shorter_is_cut_off_there_and_a_problem_from_there_on() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileLogStore::open_folder(folder.path(), FileStoreOptions::default()).unwrap();
    store.append(&id("r"), Stream::Stdout, b"0123456789").unwrap();
    store.finish(&id("r"), exited(0)).unwrap();
    let log = folder.path().join("job_runs/r/stdout.log");
    std::fs::File::options().write(true).open(log).unwrap().set_len(6).unwrap();
    let server = Server::start(store).await;
    let mut whole = server.open(RAW, &[]).await;
    assert_eq!(whole.answer.header("content-length"), Some("10"));
    assert_eq!(whole.piece().await.unwrap(), b"012345");
    assert!(whole.try_piece().await.is_err(), "cut off, not ended");
    let problem = server.get_with(RAW, &[("Range", "bytes=6-")]).await.problem(500);
    assert_eq!(problem.kind, "corrupt");
    assert!(
        problem.detail.ends_with("the log ends at byte 6, and 4 bytes behind it are missing"),
        "{problem:?}"
    );
    assert_eq!(server.get_with(RAW, &[("Range", "bytes=2-5")]).await.text(), "2345");
}
