//! The journal of a run that has no end: whoever ends it cuts the journal and writes to it.

use databuild_logs::{CheckOptions, Durability, check_index};

use super::*;
use crate::power::make_old;
use crate::support::disk::SmallDisk;
use crate::support::end_of_start;

/// The bits to flip of a journal: all that stand for numbers, and one of each byte of the text at the beginning.
fn places(journal: &[u8]) -> Vec<(usize, usize)> {
    let text = 32..end_of_start(journal).unwrap();
    assert!(journal.len() > text.end + 50, "five marks follow");
    let bits = (0..journal.len()).flat_map(|at| (0..8).map(move |bit| (at, bit)));
    bits.filter(|&(at, bit)| !text.contains(&at) || bit == at % 8).collect()
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
    let write = |name: &str| {
        let mut writer = store.start(RunSpec::new(id(name)).command(["make"])).unwrap();
        let mut append = |stream, text: &str| {
            // So long that what passed takes two bytes of the journal, unless the machine is busy.
            std::thread::sleep(Duration::from_micros(200));
            writer.append(stream, text.as_bytes()).unwrap();
            writer.flush().unwrap();
        };
        for n in 1..=4 {
            let stream = if n % 2 == 0 { Stream::Stderr } else { Stream::Stdout };
            append(stream, &format!("{stream} {n}\n"));
        }
        append(Stream::Stdout, "no end");
        let folder = damaged.join("job_runs").join(name);
        copy_folder(&written.join("job_runs").join(name), &folder);
        drop(writer);
        let journal = fs::read(folder.join("journal")).unwrap();
        (folder, journal)
    };
    let shortest = (0..10).map(|n| {
        let (folder, journal) = write(&format!("s{n:05}"));
        fs::remove_dir_all(folder).unwrap();
        journal
    });
    let shortest = shortest.min_by_key(Vec::len).unwrap();
    let mut places = places(&shortest).into_iter().peekable();
    let mut cases = Vec::new();
    for number in 0.. {
        let Some(&(at, bit)) = places.peek() else { break };
        assert!(number < 20_000, "hardly a journal is as long as {} bytes", shortest.len());
        let name = format!("r{number:05}");
        let (folder, mut journal) = write(&name);
        if journal.len() != shortest.len() {
            fs::remove_dir_all(folder).unwrap();
            continue;
        }
        places.next();
        journal[at] ^= 1 << bit;
        fs::write(folder.join("journal"), journal).unwrap();
        make_old(&folder);
        cases.push((name, format!("bit {bit} of byte {at} flipped")));
    }
    let (_, last) = cases.last().unwrap();
    assert_eq!(*last, format!("bit 7 of byte {} flipped", shortest.len() - 1));
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
