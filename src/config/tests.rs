//! What the flags and the environment say, and how nonsense in them is refused.

use super::*;

fn environment<const N: usize>(pairs: [(&str, &str); N]) -> Environment {
    Environment { system_folder: "/nonexistent/databuild".into(), ..pairs.into_iter().collect() }
}

#[test]
fn the_flag_beats_the_variable_and_the_variable_the_default() {
    let env = environment([("DATABUILD_LOG_DIR", "/from/env"), ("HOME", "/home/x")]);
    let flag = env.log_dir(Some(Path::new("/from/flag"))).unwrap();
    assert_eq!((flag.value, flag.origin), ("/from/flag".into(), Origin::Flag("--log-dir")));
    let variable = env.log_dir(None).unwrap();
    assert_eq!(
        (variable.value, variable.origin),
        ("/from/env".into(), Origin::Variable("DATABUILD_LOG_DIR"))
    );
    assert!(env.log_dir(Some(Path::new(""))).is_err());
    let env = environment([("DATABUILD_LOG_SERVER", "http://a")]);
    assert_eq!(env.server(Some("http://b")).unwrap().value, "http://b");
    assert_eq!(env.server(None).unwrap().value, "http://a");
    assert_eq!(environment([]).server(None).unwrap().value, "http://127.0.0.1:7780");
}

#[test]
fn without_the_systems_folder_logs_go_to_the_users_state() {
    let dir = |env: Environment| env.log_dir(None).map(|dir| dir.value);
    let both = [("XDG_STATE_HOME", "/state"), ("HOME", "/home/x")];
    assert_eq!(dir(environment(both)).unwrap(), Path::new("/state/databuild"));
    let relative = [("XDG_STATE_HOME", "state"), ("HOME", "/home/x")];
    assert_eq!(dir(environment(relative)).unwrap(), Path::new("/home/x/.local/state/databuild"));
    let empty = [("DATABUILD_LOG_DIR", ""), ("HOME", "/home/x")];
    assert_eq!(dir(environment(empty)).unwrap(), Path::new("/home/x/.local/state/databuild"));
    assert!(matches!(dir(environment([])), Err(ConfigError::NoLogFolder { .. })));
}

#[test]
fn the_systems_folder_is_taken_when_it_can_be_written_or_created() {
    let above = tempfile::tempdir().unwrap();
    let folder = above.path().join("databuild");
    let env = Environment { system_folder: folder.clone(), ..environment([("HOME", "/home/x")]) };
    assert_eq!(env.log_dir(None).unwrap().value, folder);
    assert!(!folder.exists(), "asking creates nothing");
    std::fs::create_dir(&folder).unwrap();
    assert_eq!(env.log_dir(None).unwrap().value, folder);
    std::fs::remove_dir(&folder).unwrap();
    std::fs::write(&folder, "a file").unwrap();
    assert_eq!(env.log_dir(None).unwrap().value, Path::new("/home/x/.local/state/databuild"));
}

#[test]
fn errors_name_the_flag_or_the_variable() {
    let env = environment([("DATABUILD_LOG_LISTEN", "7780")]);
    let error = env.listen(None).unwrap_err().to_string();
    assert!(error.starts_with("DATABUILD_LOG_LISTEN is \"7780\": expected"), "{error}");
    let error = env.listen(Some("nowhere")).unwrap_err().to_string();
    assert!(error.starts_with("--listen is \"nowhere\": expected"), "{error}");
    let error = environment([("DATABUILD_LOG_TOKEN", "top secret")]).token().unwrap_err().to_string();
    assert!(error.contains("DATABUILD_LOG_TOKEN") && !error.contains("secret\""), "{error}");
}

#[test]
fn how_the_disk_is_treated_is_set_by_two_variables() {
    let options = |floor, durability| {
        let pairs = [("DATABUILD_LOG_MIN_FREE_MB", floor), ("DATABUILD_LOG_DURABILITY", durability)];
        environment(pairs).store_options()
    };
    assert_eq!(options("", "").unwrap(), FileStoreOptions::default());
    let set = options("3", "5").unwrap();
    assert_eq!(set.min_free_bytes, 3 * 1024 * 1024);
    assert_eq!(set.durability, Durability::Periodic(Duration::from_secs(5)));
    let off = options("0", "none").unwrap();
    assert_eq!((off.min_free_bytes, off.durability), (0, Durability::None));
    assert_eq!(options("", "on-finish").unwrap().durability, Durability::OnFinish);
    for bad in ["-1", "1.5", "much", "99999999999999999"] {
        let error = options(bad, "").unwrap_err().to_string();
        assert!(error.starts_with("DATABUILD_LOG_MIN_FREE_MB is"), "{error}");
    }
    for bad in ["0", "-1", "0.5", "always"] {
        let error = options("", bad).unwrap_err().to_string();
        assert!(error.starts_with("DATABUILD_LOG_DURABILITY is"), "{error}");
    }
}

#[test]
fn the_most_that_a_run_keeps_takes_fractions_and_nonsense_is_refused_by_name() {
    let name = "DATABUILD_LOG_MAX_RUN_SIZE_MB";
    let most = |given| environment([(name, given)]).store_options().map(|options| options.max_run_bytes);
    let good = [("", 0), ("0", 0), ("100", 100_000_000), ("0.5", 500_000), (".25", 250_000)];
    for (given, bytes) in good {
        assert_eq!(most(given).unwrap(), bytes, "{given:?}");
    }
    for bad in ["-1", "+1", "1e3", "10MB", "nan", "inf", ".", "1.2.3", "99999999999999999999"] {
        let error = most(bad).unwrap_err().to_string();
        assert!(error.starts_with("DATABUILD_LOG_MAX_RUN_SIZE_MB is") && error.contains(" MB"), "{error}");
    }
}

#[test]
#[cfg(feature = "compression")]
fn hours_until_a_run_is_compressed_are_a_number_or_off() {
    let after = |given| {
        let options = environment([("DATABUILD_LOG_COMPRESS_AFTER_HOURS", given)]).store_options();
        options.map(|options| options.compress_after)
    };
    for (given, seconds) in [("24", Some(86_400)), ("0.5", Some(1_800)), ("0", Some(0)), ("off", None)] {
        assert_eq!(after(given).unwrap(), seconds.map(Duration::from_secs), "{given}");
    }
    assert_eq!(after("").unwrap(), None);
    for bad in ["-1", "never", "24h", "NaN", "inf", "1e300", "on"] {
        let error = after(bad).unwrap_err().to_string();
        assert!(error.starts_with("DATABUILD_LOG_COMPRESS_AFTER_HOURS is"), "{error}");
        assert!(error.contains("off, or a number of hours"), "{error}");
    }
}

#[test]
fn what_is_kept_is_set_by_three_variables_and_nonsense_is_refused_by_name() {
    let policy = |days, gb, runs| {
        let names = ["DATABUILD_LOG_TTL_DAYS", "DATABUILD_LOG_MAX_SIZE_GB", "DATABUILD_LOG_KEEP_LAST"];
        environment([(names[0], days), (names[1], gb), (names[2], runs)]).retention()
    };
    assert_eq!(policy("", "", "").unwrap(), RetentionPolicy::OF_SERVICE);
    assert_eq!(policy("0", "0", "0").unwrap(), RetentionPolicy::OFF);
    let some = policy("0.5", "2.25", "30").unwrap();
    assert_eq!(some.max_age, Some(Duration::from_secs(12 * 3600)));
    assert_eq!((some.max_bytes, some.keep_last), (Some(2_250_000_000), 30));
    for bad in ["-1", "+1", "a week", "7d", "1e3", "nan", "inf", ".", "99999999999999999999"] {
        let error = policy(bad, "", "").unwrap_err().to_string();
        assert!(error.starts_with("DATABUILD_LOG_TTL_DAYS is") && error.contains("days"), "{error}");
        let error = policy("", bad, "").unwrap_err().to_string();
        assert!(error.starts_with("DATABUILD_LOG_MAX_SIZE_GB is") && error.contains("GB"), "{error}");
    }
    for bad in ["-1", "+1", "1.5", "all", "99999999999999999999"] {
        let error = policy("", "", bad).unwrap_err().to_string();
        assert!(error.starts_with("DATABUILD_LOG_KEEP_LAST is"), "{error}");
    }
}

#[test]
fn an_address_that_others_reach_needs_a_token() {
    let open = environment([]);
    for safe in ["127.0.0.1:1", "[::1]:1", "localhost:1", "127.8.8.8:0"] {
        assert!(open.listen(Some(safe)).is_ok(), "{safe}");
    }
    for reachable in ["0.0.0.0:1", "[::]:1", "192.0.2.1:1"] {
        assert!(matches!(open.listen(Some(reachable)), Err(ConfigError::TokenNeeded { .. })), "{reachable}");
        assert!(environment([("DATABUILD_LOG_TOKEN", "x")]).listen(Some(reachable)).is_ok(), "{reachable}");
    }
    let error = open.listen(Some("0.0.0.0:99")).unwrap_err().to_string();
    assert!(error.contains("DATABUILD_LOG_TOKEN") && error.contains("127.0.0.1:99"), "{error}");
}
