//! The map of the code holds: a file imports only what stands below it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// From the top down. A file may name what stands in its own row or further down.
const LAYERS: [&[&str]; 13] = [
    &["config"],
    &["http"],
    &["client"],
    &["wire"],
    &["runner"],
    &["store"],
    &["index"],
    &["retention"],
    &["journal"],
    &["logfile", "layout"],
    &["error"],
    &["run"],
    &["line", "meter"],
];

fn rank(module: &str) -> Option<usize> {
    LAYERS.iter().position(|row| row.contains(&module))
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The modules of this crate that a file's code names as `crate::module`, tests within it left out (those in a file of
/// their own are not looked at).
fn imports(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or(text);
    let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut modules = Vec::new();
    for line in code {
        for part in line.split("crate::").skip(1) {
            modules.push(part.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect());
        }
    }
    modules
}

#[test]
fn no_import_points_upward() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut wrong = Vec::new();
    let mut seen = BTreeMap::new();
    for file in files {
        let within = file.strip_prefix(&src).unwrap();
        if within.file_name().is_some_and(|name| name == "fuzz.rs" || name == "tests.rs") {
            continue;
        }
        let module =
            within.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
        if matches!(module, "lib" | "bin") {
            continue;
        }
        let Some(of_file) = rank(module) else {
            wrong.push(format!("{} is on no layer", within.display()));
            continue;
        };
        for import in imports(&fs::read_to_string(&file).unwrap()) {
            *seen.entry(module.to_owned()).or_insert(0) += 1;
            match rank(&import) {
                Some(of_import) if of_import >= of_file => {}
                Some(_) => {
                    wrong.push(format!("{} imports {import}, which stands above it", within.display()))
                }
                None => wrong.push(format!("{} imports {import}, which is on no layer", within.display())),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen.len() >= 8, "the check reads the imports: {seen:?}");
}
