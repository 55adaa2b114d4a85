//! The rows that hold where lines begin. A row holds several places of one stream: a place alone would cost more
//! for its key than for itself.

use std::collections::BTreeMap;

use redb::{ReadableTable, Table, WriteTransaction};

use crate::index::codec::{self, Damaged};
use crate::index::failure::{Failure, damaged};
use crate::index::progress::{LineCheckpoint, Progress};
use crate::index::schema::{self, RunNumber};
use crate::line::Stream;

/// The most places in a row. Every row of a stream but the last is full, so that an index which was made anew has the
/// same rows. With 16 a rebuild took a tenth longer.
pub(super) const PLACES_A_ROW: usize = 64;

type Key = (RunNumber, u8, u64);

/// Adds places. Of those that come twice, the later counts: a run that is taken up again finds some of them again.
pub(super) fn put(
    transaction: &WriteTransaction,
    places: &[(RunNumber, LineCheckpoint)],
) -> Result<(), Failure> {
    let key = |(number, at): &(RunNumber, LineCheckpoint)| (*number, at.stream, at.line);
    let mut sorted = Vec::new();
    let places = match places.is_sorted_by(|one, next| key(one) < key(next)) {
        true => places,
        false => {
            sorted.extend_from_slice(places);
            sorted.sort_by_key(key);
            sorted.dedup_by(|later, kept| {
                let is_same = key(later) == key(kept);
                if is_same {
                    *kept = *later;
                }
                is_same
            });
            &sorted
        }
    };
    let mut table = transaction.open_table(schema::CHECKPOINTS)?;
    for places in places.chunk_by(|(one, at), (next, behind)| (one, at.stream) == (next, behind.stream)) {
        put_in_stream(&mut table, places)?;
    }
    Ok(())
}

/// Most often adds to the last row. What is known from there on stays: places can be found again in parts.
fn put_in_stream(
    table: &mut Table<'_, Key, &[u8]>,
    places: &[(RunNumber, LineCheckpoint)],
) -> Result<(), Failure> {
    let Some(&(number, first)) = places.first() else { return Ok(()) };
    let side = first.stream.index() as u8;
    let row = table.range((number, side, 0)..=(number, side, first.line))?.next_back().transpose()?;
    let from = row.map_or(first.line, |(key, _)| key.value().2);
    let range = (number, side, from)..=(number, side, u64::MAX);
    let mut known = Vec::new();
    for row in table.range(range.clone())? {
        let (key, value) = row?;
        known.extend(self::places(key.value(), value.value())?);
    }
    if !known.is_empty() {
        table.retain_in(range, |_, _| false)?;
    }
    let before = known.partition_point(|at| at.line < first.line);
    let mut merged: BTreeMap<_, _> = known.split_off(before).into_iter().map(|at| (at.line, at)).collect();
    let places = places.iter().map(|(_, at)| *at);
    if merged.is_empty() {
        return insert_rows(table, number, known.into_iter().chain(places));
    }
    merged.extend(places.map(|at| (at.line, at)));
    insert_rows(table, number, known.into_iter().chain(merged.into_values()))
}

/// Fills row after row.
fn insert_rows(
    table: &mut Table<'_, Key, &[u8]>,
    number: RunNumber,
    mut places: impl Iterator<Item = LineCheckpoint>,
) -> Result<(), Failure> {
    let mut row = Vec::with_capacity(PLACES_A_ROW);
    loop {
        row.clear();
        row.extend(places.by_ref().take(PLACES_A_ROW));
        if row.is_empty() {
            return Ok(());
        }
        insert(table, number, &row)?;
    }
}

fn insert(
    table: &mut Table<'_, Key, &[u8]>,
    number: RunNumber,
    row: &[LineCheckpoint],
) -> Result<(), Failure> {
    if let Some(first) = row.first() {
        let key = (number, first.stream.index() as u8, first.line);
        table.insert(key, codec::encode_checkpoints(number, row).as_slice())?;
    }
    Ok(())
}

/// Takes out the places of a run behind this one, or all of them.
pub(super) fn forget(
    transaction: &WriteTransaction,
    number: RunNumber,
    place: Option<&Progress>,
) -> Result<(), Failure> {
    let mut table = transaction.open_table(schema::CHECKPOINTS)?;
    let Some(place) = place else {
        table.retain_in((number, 0, 0)..=(number, u8::MAX, u64::MAX), |_, _| false)?;
        return Ok(());
    };
    for stream in Stream::BOTH {
        let (side, lines) = (stream.index() as u8, place.of(stream).lines);
        let behind = (number, side, lines.saturating_add(1))..=(number, side, u64::MAX);
        table.retain_in(behind, |_, _| false)?;
        let Some(mut row) = floor_row(&table, number, stream, lines)? else { continue };
        let before = row.len();
        row.retain(|at| at.line <= lines);
        if row.len() < before {
            insert(&mut table, number, &row)?;
        }
    }
    Ok(())
}

/// The last place of a stream that has at most `line` lines before it, and the one behind if it is in the same row.
pub(super) fn floor(
    table: &impl ReadableTable<Key, &'static [u8]>,
    number: RunNumber,
    stream: Stream,
    line: u64,
) -> Result<Option<(LineCheckpoint, Option<LineCheckpoint>)>, Failure> {
    let row = floor_row(table, number, stream, line)?.unwrap_or_default();
    let behind = row.partition_point(|at| at.line <= line);
    Ok(behind.checked_sub(1).map(|floor| (row[floor], row.get(behind).copied())))
}

fn floor_row(
    table: &impl ReadableTable<Key, &'static [u8]>,
    number: RunNumber,
    stream: Stream,
    line: u64,
) -> Result<Option<Vec<LineCheckpoint>>, Failure> {
    let side = stream.index() as u8;
    let Some(row) = table.range((number, side, 0)..=(number, side, line))?.next_back() else {
        return Ok(None);
    };
    let (key, value) = row?;
    if (key.value().0, key.value().1) != (number, side) || key.value().2 > line {
        return Err(damaged(Damaged));
    }
    Ok(Some(places(key.value(), value.value())?))
}

/// What a row holds; sound, or an error.
pub(super) fn places((number, side, line): Key, value: &[u8]) -> Result<Vec<LineCheckpoint>, Failure> {
    let stream = Stream::from_index(side).ok_or(damaged(Damaged))?;
    codec::decode_checkpoints(number, stream, line, value).map_err(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{Changes, Index};
    use crate::journal::Place;
    use crate::line::UnixMicros;

    fn place(i: u64) -> LineCheckpoint {
        LineCheckpoint {
            stream: Stream::Stderr,
            line: i * 10,
            offset: i * 70_000,
            time: UnixMicros(1_000 + i),
        }
    }

    fn rows(index: &Index) -> Vec<(u64, usize)> {
        let rows = index.read(|transaction| {
            let table = transaction.open_table(schema::CHECKPOINTS)?;
            let mut rows = Vec::new();
            for row in table.range((0, 0, 0)..)? {
                let (key, value) = row?;
                rows.push((key.value().2, places(key.value(), value.value())?.len()));
            }
            Ok(rows)
        });
        rows.unwrap()
    }

    fn held(index: &Index) -> Vec<LineCheckpoint> {
        let mut held = Vec::new();
        index.checkpoints(5, |at| held.push(at)).unwrap();
        held
    }

    #[test]
    fn places_fill_row_after_row_however_they_come() {
        for step in [1, 3, 64, 100] {
            let folder = tempfile::tempdir().unwrap();
            let index = Index::open(folder.path().join("index.redb")).unwrap();
            let all: Vec<_> = (1..=160).map(place).collect();
            for part in all.chunks(step) {
                let lines = part.iter().map(|at| (5, *at)).collect();
                index.commit(&Changes { lines, ..Changes::default() }).unwrap();
            }
            assert_eq!(rows(&index), [(10, 64), (650, 64), (1_290, 32)], "{step} at a time");
            assert_eq!(held(&index), all);
            for line in (0..1_650).step_by(3) {
                let known = |at: &LineCheckpoint| Place { lines: at.line, offset: at.offset };
                let floor = all.iter().rfind(|at| at.line <= line).map(known);
                let found = index.line_floor(5, Stream::Stderr, line).unwrap();
                assert_eq!(found.map(|found| found.place), floor, "line {line}");
                let next = found.and_then(|found| found.next);
                assert!(next.is_none() || next == all.iter().find(|at| at.line > line).map(known));
            }
            // Places that are found again change nothing, also if they come twice.
            let again = all[70..73].iter().chain(&all[68..72]).map(|at| (5, *at)).collect();
            index.commit(&Changes { lines: again, ..Changes::default() }).unwrap();
            assert_eq!((rows(&index).len(), held(&index)), (3, all));
        }
    }

    #[test]
    fn what_is_behind_a_place_is_let_go_of_within_a_row_too() {
        let all: Vec<_> = (1..=160).map(place).collect();
        for kept in [0, 1, 63, 64, 65, 128, 159, 160] {
            let folder = tempfile::tempdir().unwrap();
            let index = Index::open(folder.path().join("index.redb")).unwrap();
            let lines = all.iter().map(|at| (5, *at)).collect();
            index.commit(&Changes { lines, ..Changes::default() }).unwrap();
            let mut progress = Progress::start(UnixMicros(9), 0);
            progress.streams[1].lines = kept * 10 + 5;
            index.forget_places_behind(&[(5, Some(progress))]).unwrap();
            assert_eq!(held(&index), all[..kept as usize]);
            let lines = all[kept as usize..].iter().map(|at| (5, *at)).collect();
            index.commit(&Changes { lines, ..Changes::default() }).unwrap();
            assert_eq!((rows(&index), held(&index)), (vec![(10, 64), (650, 64), (1_290, 32)], all.clone()));
        }
    }
}
