//! Showing what an index holds, in an order that does not depend on run numbers: two indexes of the same folders
//! give the same rows.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::LogError;
use crate::index::codec::RunRecord;
use crate::index::progress::{GapAt, Progress};
use crate::index::{Index, RunNumber};
use crate::journal::Cut;
use crate::layout::{Layout, StoreLock};
use crate::line::Stream;

/// Gives every row of a log folder's index to `give`, as a JSON object with the name of its table in `table`; in
/// place of run numbers there are run ids. Tables come one after the other, and rows in the order of their ids.
///
/// # Errors
///
/// [`LogError::InUse`] if a service has the index, [`LogError::Index`] if it can't be read, and whatever `give`
/// returns.
pub fn dump_index(
    folder: impl AsRef<Path>,
    mut give: impl FnMut(Value) -> Result<(), LogError>,
) -> Result<(), LogError> {
    let layout = Layout::new(folder.as_ref());
    let _lock = StoreLock::take(&layout.index())?;
    let Some(index) = Index::open_as_it_is(layout.index())? else {
        let detail = "there is none; `databuild index rebuild` makes one".to_owned();
        return Err(LogError::Index { path: layout.index(), detail });
    };
    let mut runs: Vec<(String, RunNumber)> = Vec::new();
    index.ids(|id, number| {
        runs.push((id.to_owned(), number));
        true
    })?;
    for (id, number) in &runs {
        let record = index.record(*number)?;
        give(record.map_or(Value::Null, |record| run_row(id, &record)))?;
    }
    for (id, number) in &runs {
        if let Some(record) = index.record(*number)?
            && index.standing(*number, &record)?.live
        {
            give(json!({"table": "live", "run": id}))?;
        }
    }
    for (id, number) in &runs {
        let mut rows = Vec::new();
        index.checkpoints(*number, |at| {
            rows.push(json!({"table": "checkpoints", "run": id, "stream": at.stream, "line": at.line,
                "offset": at.offset, "time": at.time}));
        })?;
        rows.into_iter().try_for_each(&mut give)?;
    }
    for (id, number) in &runs {
        let mut rows = Vec::new();
        index.places(*number, |place| rows.push(place_row(id, &place)))?;
        rows.into_iter().try_for_each(&mut give)?;
    }
    let ids: HashMap<RunNumber, &str> = runs.iter().map(|(id, number)| (*number, id.as_str())).collect();
    let name = |number: RunNumber| match ids.get(&number) {
        Some(id) => json!(id),
        None => json!({"number": number}),
    };
    let mut rows = Vec::new();
    index.evictable(|ended, number, bytes| {
        let row = json!({"table": "evictable", "ended": ended, "run": name(number), "bytes": bytes});
        rows.push((ended, name(number).to_string(), row));
    })?;
    rows.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    rows.into_iter().try_for_each(|(_, _, row)| give(row))?;
    let mut rows = Vec::new();
    index.pinned(|number, bytes| {
        rows.push((
            name(number).to_string(),
            json!({"table": "pinned", "run": name(number), "bytes": bytes}),
        ));
    })?;
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    rows.into_iter().try_for_each(|(_, row)| give(row))?;
    give(json!({"table": "totals", "finished_bytes": index.totals()?.finished_bytes}))?;
    let mut rows = Vec::new();
    index.partitions(|partition, number| {
        let row = json!({"table": "partitions", "partition": partition, "run": name(number)});
        rows.push((partition.to_owned(), name(number).to_string(), row));
    })?;
    rows.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
    rows.into_iter().try_for_each(|(_, _, row)| give(row))?;
    for stone in index.tombstones()? {
        give(json!({"table": "tombstones", "run": stone.id, "tombstone": stone}))?;
    }
    index.close()
}

fn run_row(id: &str, record: &RunRecord) -> Value {
    let gap = |at: &GapAt| json!({"gap": at.gap, "offset": at.offset});
    let cut = |cut: Cut| {
        json!({"stream": cut.stream, "after": cut.begin.lines, "lines": cut.lines(),
        "offset": cut.begin.offset, "bytes": cut.bytes()})
    };
    json!({
        "table": "runs", "run": id, "record": record.run, "gaps": record.gaps.iter().map(gap).collect::<Vec<_>>(),
        "cuts": record.cuts.iter().map(cut).collect::<Vec<_>>(),
        "has_journal": record.has_journal, "disk_bytes": record.disk_bytes, "compressed": record.compressed,
    })
}

fn place_row(id: &str, place: &Progress) -> Value {
    let streams = Stream::BOTH.map(|stream| {
        let at = place.of(stream);
        json!({"bytes": at.bytes, "lines": at.lines, "line_start": at.line_start,
            "dropped_bytes": at.dropped_bytes, "dropped_lines": at.dropped_lines})
    });
    json!({"table": "times", "run": id, "time": place.time, "journal": place.journal, "streams": streams})
}
