//! The page in a real Chromium.

use std::sync::Arc;

use databuild_logs::{
    Gap, GapReason, LineNumber, LogStore, MemoryLogStore, ReadEvent, RunSpec, ServerOptions, Stream,
};

use crate::http::{exited, id};
use crate::support::address::HeldAddress;
use crate::support::browser::Browser;
use crate::support::http::Server;
use crate::support::stores::{Reopened, Scripted, batch};

const TEXTS: &str = "[...document.querySelectorAll('#log .text')].map((line) => line.textContent)";
const STATUS: &str = "document.getElementById('status-text').textContent";
const LIST: &str = "[...document.querySelectorAll('#runs .command')].map((command) => command.innerText)";

async fn page(server: &Server, place: &str) -> Browser {
    let browser = Browser::start().await;
    browser.goto(&format!("http://{}/{place}", server.address)).await;
    browser
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_is_chosen_followed_and_seen_to_its_end() {
    let store = MemoryLogStore::new();
    let server = Server::start(store.clone()).await;
    let browser = page(&server, "").await;
    browser.until::<bool>("!document.getElementById('empty').hidden", |shown| *shown).await;
    let how: String = browser.eval("document.querySelector('#empty pre').innerText").await;
    assert_eq!(how, "databuild run -- make test");

    let older = store.start(RunSpec::new(id("older")).command(["sh", "-c", "exit 1"])).unwrap();
    older.finish(exited(1)).unwrap();
    let mut spec = RunSpec::new(id("live")).command(["make", "all"]);
    spec.building_partitions = vec!["data/alpha".to_owned()];
    let mut writer = store.start(spec).unwrap();
    writer.append(Stream::Stdout, b"before\n").unwrap();
    let listed = browser.until::<Vec<String>>(LIST, |list| list.len() == 2).await;
    assert_eq!(listed, ["make all", "sh -c 'exit 1'"], "newest first");
    let badges: Vec<String> = browser
        .eval("[...document.querySelectorAll('#runs .badge')].map((badge) => badge.textContent)")
        .await;
    assert_eq!(badges, ["running", "failed"]);

    browser.click("#runs a[href='#/run/live']").await;
    browser.until::<Vec<String>>(TEXTS, |lines| lines == &["before"]).await;
    browser.until::<String>(STATUS, |status| status == "Following").await;
    let hostile = "<script>window.hacked = true</script><img src=x onerror='window.hacked = true'>&amp;";
    writer.append(Stream::Stderr, format!("{hostile}\n\x1b[1;31mred\x1b[0m plain\n").as_bytes()).unwrap();
    let lines = browser.until::<Vec<String>>(TEXTS, |lines| lines.len() == 3).await;
    assert_eq!(lines, ["before", hostile, "red plain"]);
    let red: String = browser.eval("document.querySelector('#log .bold.fg1').textContent").await;
    assert_eq!(red, "red");
    let harm: (bool, u32) = browser
        .eval("[window.hacked === true, document.querySelectorAll('#log script, #log img').length]")
        .await;
    assert_eq!(harm, (false, 0));

    writer.finish(exited(3)).unwrap();
    browser.until::<String>(STATUS, |status| status.contains("failed, exit code 3")).await;
    let facts = "document.getElementById('facts').innerText";
    browser
        .until::<String>(facts, |facts| facts.contains("exit code 3") && facts.contains("data/alpha"))
        .await;

    browser.click("[role=tab][data-view=stderr]").await;
    browser.until::<Vec<String>>(TEXTS, |lines| lines == &[hostile, "red plain"]).await;
    let place: String = browser.eval("location.hash").await;
    assert_eq!(place, "#/run/live/stderr");
    browser.quit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_the_service_loses_and_repeats_no_line() {
    let store = Arc::new(Reopened::new());
    let print = |range: std::ops::RangeInclusive<u32>| {
        for n in range {
            store.append(&id("r"), Stream::Stdout, format!("line {n}\n").as_bytes()).unwrap();
        }
    };
    print(1..=50);
    let held = HeldAddress::any();
    let server = Server::start_at(held.address, store.clone(), ServerOptions::default()).await;
    let browser = page(&server, "#/run/r/stdout").await;
    browser.until::<Vec<String>>(TEXTS, |lines| lines.len() == 50).await;

    server.stop().await.unwrap();
    browser.until::<String>(STATUS, |status| status.contains("Reconnecting")).await;
    print(51..=80);
    let server = Server::start_at(held.address, store.clone(), ServerOptions::default()).await;
    browser.until::<Vec<String>>(TEXTS, |lines| lines.len() >= 80).await;
    browser.until::<String>(STATUS, |status| status == "Following").await;
    print(81..=100);
    store.finish(&id("r"), exited(0)).unwrap();
    browser.until::<String>(STATUS, |status| status.contains("exit code 0")).await;
    let lines = browser.until::<Vec<String>>(TEXTS, |lines| lines.len() >= 100).await;
    assert_eq!(lines, (1..=100).map(|n| format!("line {n}")).collect::<Vec<_>>());
    drop(server);
    browser.quit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_log_is_shown_to_a_bound_and_from_where_a_link_points() {
    let store = MemoryLogStore::new();
    let text: String = (1..=45_000).map(|n| format!("line {n}\n")).collect();
    store.append(&id("r"), Stream::Stdout, text.as_bytes()).unwrap();
    let server = Server::start(store.clone()).await;
    let browser = page(&server, "#/run/r/stdout").await;
    let edges = "((lines) => [lines[0]?.textContent, lines.at(-1)?.textContent, lines.length])([...document.querySelectorAll('#log .text')])";
    type Edges = (Option<String>, Option<String>, u32);
    let ends_with = |text: &'static str| move |edges: &Edges| edges.1.as_deref() == Some(text);
    let shown = browser.until::<Edges>(edges, ends_with("line 45000")).await;
    assert_eq!((shown.0.as_deref(), shown.2), (Some("line 25001"), 20_000));
    let before: String = browser.eval("document.querySelector('#log .before').textContent").await;
    assert_eq!(before, "25,000 lines before this are in stdout.log");

    let more: String = (45_001..=60_000).map(|n| format!("line {n}\n")).collect();
    store.append(&id("r"), Stream::Stdout, more.as_bytes()).unwrap();
    let shown = browser.until::<Edges>(edges, ends_with("line 60000")).await;
    assert!(shown.2 <= 20_000, "{} lines are kept", shown.2);
    let gap =
        "((log) => log.scrollHeight - log.scrollTop - log.clientHeight)(document.getElementById('log'))";
    browser.until::<f64>(gap, |gap| *gap < 8.0).await;

    // Who scrolls up stays there, and finds the way back.
    browser.eval::<()>("(document.getElementById('log').scrollTop -= 2000, undefined)").await;
    browser.until::<bool>("!document.getElementById('to-end').hidden", |shown| *shown).await;
    store.append(&id("r"), Stream::Stdout, b"later\n").unwrap();
    browser.until::<Edges>(edges, ends_with("later")).await;
    assert!(browser.eval::<f64>(gap).await > 1000.0);
    browser.click("#to-end").await;
    browser.until::<f64>(gap, |gap| *gap < 8.0).await;

    browser.eval::<()>("(location.hash = '#/run/r/stdout/L7000', undefined)").await;
    let marked = "document.querySelector('#log .marked')?.textContent ?? ''";
    browser.until::<String>(marked, |line| line == "line 7000").await;
    let visible = "((line, log) => line.top >= log.top && line.bottom <= log.bottom)(\
        document.querySelector('#log .marked').getBoundingClientRect(), document.getElementById('log').getBoundingClientRect())";
    browser.until::<bool>(visible, |visible| *visible).await;
    browser.until::<String>(STATUS, |status| status.contains("Go to the end")).await;
    browser.quit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holes_and_errors_are_said() {
    let gap = Gap {
        stream: Stream::Stdout,
        after: LineNumber(1),
        lines: 5,
        bytes: 60,
        reason: GapReason::DiskFull,
    };
    let tombstone = databuild_logs::Tombstone {
        id: id("r"),
        evicted_at: databuild_logs::UnixMicros::now(),
        reason: "the log folder is over 10 GB".into(),
        lines: 1,
        bytes: 2,
    };
    let store = Scripted::new(move |index| match index {
        0 => Some(Ok(ReadEvent::Lines(batch(1, "first\n")))),
        1 => Some(Ok(ReadEvent::Gap { gap, next: LineNumber(6) })),
        2 => Some(Ok(ReadEvent::Lines(batch(7, &b"a\rb\rc \xff\n"[..])))),
        _ => Some(Ok(ReadEvent::End(databuild_logs::ReadEnd::Evicted(Box::new(tombstone.clone()))))),
    });
    let server = Server::start(store).await;
    let browser = page(&server, "#/run/r/stdout").await;
    browser
        .until::<String>(STATUS, |status| status.contains("evicted") && status.contains("over 10 GB"))
        .await;
    let hole = browser
        .until::<String>("document.querySelector('.hole')?.textContent ?? ''", |s| !s.is_empty())
        .await;
    assert_eq!(hole, "5 lines of stdout (60 bytes) were not kept: the disk was full");
    let numbers: Vec<String> =
        browser.eval("[...document.querySelectorAll('#log .no')].map((no) => no.dataset.no)").await;
    assert_eq!(numbers, ["1", "7"]);

    browser.eval::<()>("(location.hash = '#/run/-bad', undefined)").await;
    browser.until::<String>(STATUS, |status| status.contains("is not a run id")).await;
    browser.quit().await;
}
