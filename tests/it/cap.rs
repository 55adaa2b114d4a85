//! The most that one run may keep: its head and its tail stay, and between them is one honest hole.

#[cfg(feature = "compression")]
mod compressed;
mod crash;
mod follow;
mod reading;
mod taken;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use databuild_logs::{
    Batch, CheckOptions, Durability, Exit, FileLogStore, FileStoreOptions, Gap, GapReason, JobMetadata,
    JobRunId, LineNumber, LogStore, Outcome, ReadEnd, ReadEvent, ReadOptions, RunEnd, RunSpec, RunWriter,
    Stream, View, check_index, dump_index, rebuild_index,
};
use futures_util::StreamExt;
use serde_json::Value;

const OUT: Stream = Stream::Stdout;
const ERR: Stream = Stream::Stderr;

fn id(text: &str) -> JobRunId {
    text.parse().unwrap()
}

fn success() -> RunEnd {
    RunEnd::now(Outcome::Exited(Exit::Code(0)))
}

/// How a store is opened that keeps so many bytes of a run.
fn capped(max_run_bytes: u64) -> FileStoreOptions {
    let durability = Durability::None;
    FileStoreOptions { max_run_bytes, durability, min_free_bytes: 0, ..FileStoreOptions::default() }
}

/// What a job prints as this line of a stream: 20 to 110 bytes.
fn line(stream: Stream, number: u64) -> String {
    let width = usize::try_from(number * 37 % 90).unwrap();
    format!("{stream} line {number:08}{:width$}", "")
}

/// Prints lines and counts them.
struct Job {
    writer: Box<dyn RunWriter>,
    printed: [u64; 2],
    bytes: [u64; 2],
}

impl Job {
    fn start(store: &FileLogStore, run: &str) -> Self {
        Self { writer: store.start(RunSpec::new(id(run))).unwrap(), printed: [0; 2], bytes: [0; 2] }
    }

    /// Prints so many lines in one go.
    fn print(&mut self, stream: Stream, lines: u64) {
        let index = usize::from(stream == ERR);
        let mut text = String::new();
        for _ in 0..lines {
            self.printed[index] += 1;
            text += &line(stream, self.printed[index]);
            text.push('\n');
        }
        self.bytes[index] += text.len() as u64;
        self.writer.append(stream, text.as_bytes()).unwrap();
    }

    /// Prints until both streams hold so many bytes.
    fn print_bytes(&mut self, stream: Stream, bytes: u64) {
        let until = self.bytes.iter().sum::<u64>() + bytes;
        while self.bytes.iter().sum::<u64>() < until {
            self.print(stream, 40);
        }
    }

    fn finish(self) -> JobMetadata {
        self.writer.finish(success()).unwrap()
    }
}

/// What a reader was given: lines are looked at as they come, and positions have no seam.
#[derive(Debug, Default)]
struct Shown {
    /// The last line of each stream, given or missing.
    at: [Option<u64>; 2],
    position: u64,
    lines: u64,
    gaps: Vec<Gap>,
    /// Of each gap, whether a line stands between it and the one before.
    apart: Vec<bool>,
    lines_since: u64,
    /// Lines of holes that were told and that the position does not count yet.
    told: u64,
    first: Option<(Stream, u64)>,
    end: Option<JobMetadata>,
}

impl Shown {
    fn after(position: u64) -> Self {
        Self { position, ..Self::default() }
    }

    fn batch(&mut self, batch: &Batch) {
        assert_eq!(batch.first_position.0, self.position + 1, "a seam in the positions");
        assert_eq!(self.told, 0, "what is missing before a line is counted before it");
        for shown in batch.lines() {
            let at = &mut self.at[usize::from(batch.stream == ERR)];
            if let Some(before) = *at {
                assert_eq!(
                    shown.number.0,
                    before + 1,
                    "a line of {} is missing or comes twice",
                    batch.stream
                );
            }
            *at = Some(shown.number.0);
            self.first.get_or_insert((batch.stream, shown.number.0));
            let text = String::from_utf8_lossy(shown.text);
            let expected = line(batch.stream, shown.number.0);
            let is: String = text.chars().take(120).collect();
            // The last line of a job that was killed has no end.
            let is_torn = shown.position == batch.last_position() && !batch.bytes.ends_with(b"\n");
            let is_sound = text == expected || is_torn && expected.starts_with(&*text);
            assert!(is_sound, "line {} of {} is {is:?}", shown.number, batch.stream);
        }
        self.position += batch.lines;
        self.lines += batch.lines;
        self.lines_since += batch.lines;
    }

    fn gap(&mut self, gap: Gap, next: LineNumber) {
        assert!(matches!(gap.reason, GapReason::RunSizeCap | GapReason::Corrupt), "{gap:?}");
        let at = &mut self.at[usize::from(gap.stream == ERR)];
        if let Some(before) = *at {
            assert_eq!(gap.after.0, before, "a hole is where its lines are missing");
        }
        *at = Some(gap.after.0 + gap.lines);
        // Between the holes of both streams there is no place: the last of them has the position behind both.
        self.told += gap.lines;
        assert!((self.position..=self.position + self.told).contains(&next.0), "{gap:?} at {next:?}");
        if next.0 > self.position {
            self.told = 0;
        }
        self.position = next.0;
        self.gaps.push(gap);
        self.apart.push(self.lines_since > 0);
        self.lines_since = 0;
    }

    fn event(&mut self, event: ReadEvent) {
        match event {
            ReadEvent::Lines(batch) => self.batch(&batch),
            ReadEvent::Gap { gap, next } => self.gap(gap, next),
            ReadEvent::End(ReadEnd::Complete(run)) => self.end = Some(*run),
            ReadEvent::End(ReadEnd::Running { next }) => assert_eq!(next.0, self.position),
            ReadEvent::End(end) => panic!("{end:?}"),
        }
    }

    fn lost(&self, stream: Stream) -> (u64, u64) {
        let of_stream = || self.gaps.iter().filter(|gap| gap.stream == stream);
        (of_stream().map(|gap| gap.bytes).sum(), of_stream().map(|gap| gap.lines).sum())
    }
}

async fn read(store: &dyn LogStore, run: &str, options: ReadOptions) -> Shown {
    let start = store.position(&id(run), options.view, options.start).unwrap();
    let mut shown = Shown::after(start.0);
    let mut events = store.read(&id(run), options).unwrap();
    while let Some(event) = events.next().await {
        shown.event(event.unwrap());
    }
    shown
}

/// Reads all of a finished run in every way there is and compares that with its `metadata.json`.
async fn check_run(store: &dyn LogStore, run: &str, printed: [u64; 2]) {
    check_run_with(store, run, printed, [GapReason::RunSizeCap; 2]).await;
}

/// The same of a run whose holes have these reasons, by stream.
async fn check_run_with(store: &dyn LogStore, run: &str, printed: [u64; 2], reasons: [GapReason; 2]) {
    let known = store.run(&id(run)).unwrap();
    for (stream, printed) in [(OUT, printed[0]), (ERR, printed[1])] {
        for times in [false, true] {
            let options = ReadOptions { times, ..ReadOptions::new(View::One(stream)) };
            let shown = read(store, run, options).await;
            let totals = known.totals(stream);
            assert_eq!((shown.position, totals.lines), (printed, printed), "{stream}");
            assert_eq!(shown.lost(stream), (totals.dropped_bytes, totals.dropped_lines), "{stream}");
            assert!(shown.gaps.len() <= 1, "one hole: {:?}", shown.gaps);
            assert_eq!(shown.lines, printed - totals.dropped_lines);
            assert_eq!(shown.at[usize::from(stream == ERR)].unwrap_or(0), printed, "{stream} ends as it did");
            assert_eq!(shown.end.as_ref(), Some(&known));
        }
    }
    let shown = read(store, run, ReadOptions::new(View::All)).await;
    let wrong = shown.gaps.iter().find(|gap| gap.reason != reasons[usize::from(gap.stream == ERR)]);
    assert_eq!(wrong, None);
    assert_eq!(shown.position, printed.iter().sum::<u64>());
    for stream in Stream::BOTH {
        let totals = known.totals(stream);
        assert_eq!(shown.lost(stream), (totals.dropped_bytes, totals.dropped_lines), "{stream} of both");
    }
    // Where no line lies between two holes, they are of both streams.
    let pairs = shown.gaps.windows(2).zip(&shown.apart[1.min(shown.apart.len())..]);
    for (pair, apart) in pairs {
        assert!(*apart || pair[0].stream != pair[1].stream, "{pair:?}");
    }
}

/// Bytes on disk of both logs.
fn blocks(folder: &Path, run: &str) -> u64 {
    let log = |name: &str| {
        fs::metadata(folder.join("job_runs").join(run).join(name)).map_or(0, |file| file.blocks() * 512)
    };
    log("stdout.log") + log("stderr.log")
}

fn dump(folder: &Path) -> Vec<Value> {
    let mut rows = Vec::new();
    dump_index(folder, |row| {
        rows.push(row);
        Ok(())
    })
    .unwrap();
    rows
}

/// Checks a folder that nobody has open: there is nothing to find, and an index made anew is the one that was.
fn check_folder(folder: &Path) {
    let deep = CheckOptions { deep: true, repair: false };
    let report = check_index(folder, deep, |_| ()).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    let before = dump(folder);
    rebuild_index(folder, |_| ()).unwrap();
    assert_eq!(dump(folder), before);
}
