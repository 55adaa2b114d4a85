//! `databuild serve`.

use std::io::Write;

use rustix::process::Signal;

use crate::support::cli::{Databuild, NOBODY, until};

#[test]
fn it_says_where_it_listens_and_ends_well_when_it_is_told_to() {
    for signal in [Signal::TERM, Signal::INT] {
        let databuild = Databuild::new();
        let (service, url) = databuild.serve();
        assert!(
            service.stderr().contains(&format!("logs in {}", databuild.home.path().join("logs").display()))
        );
        Databuild::asking(&url).run(&["runs"]).code(0).says("no runs");
        service.signal(signal);
        service.done().code(0);
        Databuild::asking(&url).with("DATABUILD_LOG_DIR", "/nonexistent").run(&["runs"]).code(5);
    }
}

#[test]
fn an_address_in_use_is_named_with_what_to_do() {
    let first = Databuild::new();
    let (_service, url) = first.serve();
    let address = url.strip_prefix("http://").unwrap();
    let done = Databuild::new().run(&["serve", "--listen", address]).code(1);
    done.says(&format!("cannot listen on {address}: ")).says("hint: ").says("--listen");
}

#[test]
fn an_address_that_others_reach_needs_a_token() {
    let databuild = Databuild::new();
    let done = databuild.run(&["serve", "--listen", "0.0.0.0:0"]).code(2);
    done.says("--listen is 0.0.0.0:0, which other machines can reach").says("DATABUILD_LOG_TOKEN");
    let done = Databuild::new().with("DATABUILD_LOG_LISTEN", "[::]:0").run(&["serve"]).code(2);
    done.says("DATABUILD_LOG_LISTEN is [::]:0");
}

#[test]
fn the_token_is_what_clients_have_to_give() {
    let databuild = Databuild::new().with("DATABUILD_LOG_TOKEN", "secret");
    let (service, url) = databuild.serve();
    Databuild::asking(&url).run(&["runs"]).code(1).says("refuses the token");
    Databuild::asking(&url).with("DATABUILD_LOG_TOKEN", "secret").run(&["runs"]).code(0);
    assert!(!service.stderr().contains("secret"));
}

/// The system has a limit on how many processes may be told of files, and others can use it up.
#[test]
fn without_inotify_it_serves_and_looks_now_and_then() {
    let databuild = Databuild::new();
    databuild.run(&["run", "--quiet", "--id", "before", "--", "echo", "one"]).code(0);
    let options = ["-D", "-e", "trace=inotify_init1", "-e", "inject=inotify_init1:error=EMFILE"];
    let trace = databuild.home.path().join("trace");
    let service = databuild.start_traced(&trace, &options, &["serve", "--listen", "127.0.0.1:0"]);
    let url = service.address().unwrap_or_else(|| panic!("it does not serve: {}", service.stderr()));
    service.wait_for("can't be watched");
    let asking = Databuild::asking(url);
    assert_eq!(asking.run(&["logs", "before"]).code(0).text(), "one\n");
    let (job, mut input) = databuild.start_with_input(&["run", "--quiet", "--id", "live", "--", "cat"]);
    writeln!(input, "two").unwrap();
    until(|| databuild.home.path().join("logs/job_runs/live").exists(), || "it does not run".to_owned());
    let mut follower = asking.start(&["logs", "-f", "live"]);
    assert_eq!(follower.line(), "two");
    writeln!(input, "three").unwrap();
    assert_eq!(follower.line(), "three");
    drop(input);
    job.done().code(0);
    follower.done().code(0);
    service.signal(Signal::TERM);
    service.done();
}

#[test]
fn help_names_the_verbs_and_the_variables() {
    let databuild = Databuild::asking(NOBODY);
    let help = databuild.run(&["--help"]).code(0);
    for word in ["serve", "logs", "runs", "DATABUILD_LOG_DIR", "DATABUILD_LOG_SERVER", "--color"] {
        assert!(help.text().contains(word), "{word}");
    }
    // Lines are broken where the terminal ends.
    let words = help.text().split_whitespace().collect::<Vec<_>>().join(" ");
    for code in
        ["4 `databuild index check` could not look", "`databuild run --help` says what 125 to 127 mean"]
    {
        assert!(words.contains(code), "{words}");
    }
    assert!(databuild.run(&["serve", "--help"]).code(0).text().contains("DATABUILD_LOG_LISTEN"));
    databuild.run(&[]).code(2);
}
