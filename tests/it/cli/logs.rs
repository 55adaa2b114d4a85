//! `databuild logs` of what is there.

use databuild_logs::{Exit, LogLine, Outcome, Stream};

use super::{Setup, exited, numbers};
use crate::support::cli::{head, on_terminal};

#[tokio::test(flavor = "multi_thread")]
async fn standard_output_is_shown_unless_another_stream_is_asked_for() {
    let setup = Setup::new().await;
    setup.out("r", "out 1\n");
    setup.err("r", "err 1\n");
    setup.out("r", "out 2\n");
    setup.finish("r", exited(0));
    let shown = |args: &[&str]| setup.databuild.run(&[&["logs", "r"], args].concat()).code(0);
    assert_eq!(shown(&[]).text(), "out 1\nout 2\n");
    assert_eq!(shown(&["--stdout"]).text(), "out 1\nout 2\n");
    assert_eq!(shown(&["--stderr"]).text(), "err 1\n");
    assert_eq!(shown(&["--all"]).text(), "out 1\nerr 1\nout 2\n");
    assert_eq!(shown(&["--all"]).stderr, "", "nothing is said of a run that is not followed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_and_a_beginning_choose_lines() {
    let setup = Setup::new().await;
    setup.finished("r", numbers(10));
    for (args, expected) in [
        (&["-n", "3"][..], "8\n9\n10\n"),
        (&["--tail", "0"], ""),
        (&["-n", "all", "--since-line", "8"], "9\n10\n"),
        (&["--since-line", "2", "-n", "3"], "3\n4\n5\n"),
        (&["--since-line", "99"], ""),
        (&["-o", "raw", "-n", "2"], "9\n10\n"),
        (&["-o", "raw", "--since-line", "2", "-n", "3"], "3\n4\n5\n"),
        (&["-o", "raw", "--since-line", "9"], "10\n"),
    ] {
        let done = setup.databuild.run(&[&["logs", "r"], args].concat()).code(0);
        assert_eq!(done.text(), expected, "{args:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn timestamps_stand_before_the_line_and_streams_where_there_are_two() {
    let setup = Setup::new().await;
    setup.out("r", "a\n");
    setup.err("r", "b\n");
    setup.finish("r", exited(0));
    let is_time = |text: &str| text.parse::<databuild_logs::UnixMicros>().is_ok();
    let one = setup.databuild.run(&["logs", "r", "-t"]).code(0);
    let (time, rest) = one.text().split_once(' ').unwrap();
    assert!(is_time(time) && rest == "a\n", "{one:?}");
    let all = setup.databuild.run(&["logs", "r", "--timestamps", "--all"]).code(0);
    let lines: Vec<_> = all.text().lines().map(|line| line.splitn(3, ' ').collect::<Vec<_>>()).collect();
    assert!(lines.iter().all(|line| is_time(line[0])), "{lines:?}");
    assert_eq!([&lines[0][1..], &lines[1][1..]], [["stdout", "a"], ["stderr", "b"]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn json_is_one_object_a_line_and_loses_nothing() {
    let setup = Setup::new().await;
    setup.out("r", b"plain \"quoted\"\n\xff\x00\n");
    setup.err("r", b"e\n");
    setup.out("r", b"no end");
    setup.finish("r", exited(0));
    let done = setup.databuild.run(&["logs", "r", "--all", "-o", "json"]).code(0);
    let lines: Vec<LogLine> = done.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let text: Vec<_> =
        lines.iter().map(|line| (line.s, line.n.0, line.m.as_deref(), line.b.as_deref())).collect();
    assert_eq!(
        text,
        [
            (Stream::Stdout, 1, Some("plain \"quoted\""), None),
            (Stream::Stdout, 2, None, Some("/wA=")),
            (Stream::Stderr, 1, Some("e"), None),
            (Stream::Stdout, 3, Some("no end"), None),
        ]
    );
    assert!(lines[3].open && !lines[2].open);
    assert!(lines.iter().all(|line| line.t.is_some()));
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_is_the_bytes_whatever_they_are() {
    let setup = Setup::new().await;
    let long = "x".repeat(3 * 1024 * 1024);
    let log = [b"a\r\n\xff\xfe\x00\n\n", long.as_bytes(), b"\nno end"].concat();
    setup.finished("r", &log);
    for args in [&[][..], &["-f"], &["--all"], &["-f", "--all"]] {
        let done = setup.databuild.run(&[&["logs", "r", "-o", "raw"], args].concat()).code(0);
        assert!(done.stdout == log, "{args:?}: {} bytes of {}", done.stdout.len(), log.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_too_long_for_text_is_cut_and_says_so() {
    let setup = Setup::new().await;
    setup.finished("r", ["x".repeat(2_000_000), "\nnext\n".to_owned()].concat());
    let done =
        setup.databuild.run(&["logs", "r"]).code(0).says("line 1 of stdout is cut: 1048576 of 2000000 bytes");
    assert!(done.text().ends_with("x\nnext\n") && done.stdout.len() == 1_048_576 + 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_go_by_their_id_a_beginning_of_it_or_latest() {
    let setup = Setup::new().await;
    setup.finished("alpha", "alpha\n");
    setup.finished("alpha-2", "alpha-2\n");
    setup.finished("beta", "beta\n");
    for (name, expected) in
        [("alpha", "alpha\n"), ("alpha-", "alpha-2\n"), ("b", "beta\n"), ("latest", "beta\n")]
    {
        assert_eq!(setup.databuild.run(&["logs", name]).code(0).text(), expected, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_code_is_the_runs_when_that_is_asked_for() {
    let setup = Setup::new().await;
    for (id, outcome, code) in [
        ("good", exited(0), 0),
        ("bad", exited(7), 7),
        ("killed", Outcome::Exited(Exit::Signal(9)), 137),
        ("cancelled", Outcome::Cancelled(Exit::Signal(15)), 143),
        ("lost", Outcome::Lost, 1),
    ] {
        setup.out(id, "x\n");
        setup.finish(id, outcome);
        setup.databuild.run(&["logs", id]).code(0);
        setup.databuild.run(&["logs", id, "--exit-status"]).code(code);
        setup.databuild.run(&["logs", id, "--exit-status", "-o", "raw"]).code(code);
        setup.databuild.run(&["logs", id, "--exit-status", "-f"]).code(code);
    }
    setup.out("running", "x\n");
    setup.databuild.run(&["logs", "running", "--exit-status"]).code(1).says("run running goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn colour_is_for_those_who_want_it() {
    let setup = Setup::new().await;
    setup.err("r", "e\n");
    setup.finish("r", exited(0));
    let shown = |args: &[&str]| setup.databuild.run(&[&["logs", "r", "--all"], args].concat()).code(0);
    assert_eq!(shown(&["--color", "always"]).text(), "\x1b[31me\x1b[0m\n");
    assert_eq!(shown(&["--color", "never"]).text(), "e\n");
    assert_eq!(shown(&[]).text(), "e\n", "a pipe is no terminal");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_has_enough_ends_it_quietly() {
    let setup = Setup::new().await;
    setup.finished("r", numbers(1_000_000));
    let mut child = setup.databuild.command(&["logs", "r"]).spawn().unwrap();
    assert_eq!(head(child.stdout.take().unwrap()), "1\n");
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_cannot_drive_the_terminal_that_it_is_shown_on() {
    let setup = Setup::new().await;
    setup.finished("r", "\x1b[2J\x1b]0;title\x07 10%\r20%\r\n\x1b[1mbold\x1b[m\n");
    let shown = |args: &[&str]| on_terminal(setup.databuild.command(&[&["logs", "r"], args].concat()), 80);
    assert_eq!(shown(&[]), "^[[2J^[]0;title^G 10%^M20%\n\x1b[1mbold\x1b[m\x1b[0m\n");
    assert_eq!(shown(&["--color", "never"]), "^[[2J^[]0;title^G 10%^M20%\nbold\n");
    let mut without_colour = setup.databuild.command(&["logs", "r", "--since-line", "1"]);
    without_colour.env("NO_COLOR", "1");
    assert_eq!(on_terminal(without_colour, 80), "bold\n");
    assert_eq!(shown(&["-o", "json", "-n", "1"]).matches('\x1b').count(), 0);
}
