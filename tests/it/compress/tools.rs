//! Tools of others open what we compress.

use super::*;

#[test]
fn zstdcat_and_lnav_show_a_compressed_log() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut writer = store.start(RunSpec::new(id("x"))).unwrap();
    let text: String = (0..40_000)
        .map(|line| format!("2026-01-31T10:42:{:02}Z INFO step {line} of the build\n", line / 1000))
        .collect();
    writer.append(Stream::Stdout, text.as_bytes()).unwrap();
    writer.finish(success()).unwrap();
    store.compress(&id("x")).unwrap();
    store.close().unwrap();
    let path = of_run(folder.path(), "x", "stdout.log.zst");
    for tool in [&["zstdcat"][..], &["lnav", "-n"]] {
        let done = Command::new(tool[0])
            .args(&tool[1..])
            .arg(&path)
            .env("HOME", folder.path())
            .output()
            .unwrap_or_else(|error| panic!("starting {tool:?}: {error}"));
        assert!(done.status.success(), "{tool:?}: {}", String::from_utf8_lossy(&done.stderr));
        assert!(done.stdout == text.as_bytes(), "{tool:?} shows the log");
    }
}
