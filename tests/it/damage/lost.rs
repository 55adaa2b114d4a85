//! The journal of a run that has no end: whoever ends it cuts the journal and writes to it.

use databuild_logs::{CheckOptions, Durability, check_index};

use super::*;
use crate::power::make_old;
use crate::support::disk::SmallDisk;

/// Where the journal's first record is over, all that follows are numbers.
fn end_of_start(journal: &[u8]) -> usize {
    let last = journal.iter().rposition(|&byte| byte == b'}').unwrap();
    last + 1
}

/// Each bit that stands for a number is flipped, and one of each byte of the text at the beginning. No line is wrong then,
/// none is missing, and what is in the folders afterwards agrees.
#[tokio::test]
async fn a_lost_run_whose_journal_has_any_bit_flipped_is_ended_with_all_its_lines() {
    let home = tempfile::tempdir().unwrap();
    let _in_memory = SmallDisk::at(home.path().to_owned(), 512);
    let options = FileStoreOptions { durability: Durability::None, min_free_bytes: 0, ..Default::default() };
    let [written, damaged] = ["written", "damaged"].map(|name| home.path().join(name));
    let store = FileLogStore::open_folder(&written, options.clone()).unwrap();
    let mut cases = Vec::new();
    for number in 0.. {
        let name = format!("r{number:05}");
        let mut writer = store.start(RunSpec::new(id(&name)).command(["make"])).unwrap();
        for n in 1..=4 {
            let stream = if n % 2 == 0 { Stream::Stderr } else { Stream::Stdout };
            writer.append(stream, format!("{stream} {n}\n").as_bytes()).unwrap();
            writer.flush().unwrap();
        }
        writer.append(Stream::Stdout, b"no end").unwrap();
        writer.flush().unwrap();
        std::mem::forget(writer);
        let folder = damaged.join("job_runs").join(&name);
        copy_folder(&written.join("job_runs").join(&name), &folder);
        let mut journal = fs::read(folder.join("journal")).unwrap();
        let text = 32..end_of_start(&journal);
        let mut bits = (0..journal.len())
            .flat_map(|at| (0..8).map(move |bit| (at, bit)))
            .filter(|&(at, bit)| !text.contains(&at) || bit == at % 8);
        let Some((at, bit)) = bits.nth(number) else {
            fs::remove_dir_all(folder).unwrap();
            break;
        };
        journal[at] ^= 1 << bit;
        fs::write(folder.join("journal"), journal).unwrap();
        make_old(&folder);
        cases.push((name, format!("bit {bit} of byte {at} flipped")));
    }
    assert!(cases.len() > 600, "{}", cases.len());
    let store = FileLogStore::open(&damaged, options).unwrap();
    for (name, what) in &cases {
        for view in VIEWS {
            let (seen, end) = read(&store, name, followed(view)).await;
            for stream in Stream::BOTH {
                let expected: &[&str] = match stream {
                    _ if view != View::All && view != View::One(stream) => &[],
                    Stream::Stdout => &["stdout 1", "stdout 3", "no end"],
                    Stream::Stderr => &["stderr 2", "stderr 4"],
                };
                let of_stream: Vec<_> = seen.iter().filter(|line| line.stream == stream).collect();
                let numbers: Vec<_> = of_stream.iter().map(|line| line.number).collect();
                assert_eq!(
                    numbers,
                    (1..=expected.len() as u64).collect::<Vec<_>>(),
                    "{name}: {what}, {view}"
                );
                let got: Vec<_> =
                    of_stream.iter().map(|line| line.text.as_deref().unwrap_or("(gap)")).collect();
                assert_eq!(got, expected, "{name}: {what}, {view}");
            }
            let ReadEnd::Complete(run) = end else { panic!("{end:?} of {name}: {what}") };
            assert_eq!(run.state.kind(), StateKind::Lost, "{name}: {what}");
        }
    }
    store.close().unwrap();
    drop(store);
    let report = check_index(&damaged, CheckOptions { deep: true, repair: false }, |_| {}).unwrap();
    // A journal without a sound beginning stays what it is.
    let unexplained: Vec<_> = report
        .findings
        .iter()
        .filter(|finding| !finding.detail.contains("the journal has no sound beginning"))
        .collect();
    assert!(unexplained.is_empty(), "{unexplained:#?}");
}
