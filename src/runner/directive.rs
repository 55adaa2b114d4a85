//! Finds the lines by which a job talks to its runner: `DATABUILD_<NAME>_JSON:` and a JSON value.
//!
//! A batch without a directive costs one substring search. Only a line that may be a directive and is split over
//! several reads is carried from one to the next, and no more than [`MAX_LINE_BYTES`] of it.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use memchr::{memchr, memrchr};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::run::{MissingDeps, PartitionRef};
use crate::runner::JobEvent;

/// The longest directive line, in bytes without its `\n`: 1 MiB.
pub(super) const MAX_LINE_BYTES: usize = 1024 * 1024;

const PREFIX: &[u8] = b"DATABUILD_";
const SUFFIX: &[u8] = b"_JSON";
/// The longest name, in bytes.
const MAX_NAME_BYTES: usize = 64;
const MAX_HEAD_BYTES: usize = PREFIX.len() + MAX_NAME_BYTES + SUFFIX.len();
/// The most that is repeated of what a parser complains about, in characters.
const MAX_REASON_CHARS: usize = 200;

static LINE_START: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\nDATABUILD_"));

/// Looks for directives in one stream of a job.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    at: At,
    /// The beginning of a line that may be a directive; empty unless the scanner is [`At::Candidate`].
    carry: Vec<u8>,
}

/// Where the bytes seen so far end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    LineStart,
    /// In a line that is no directive.
    Text,
    /// In a line that may be one.
    Candidate,
}

impl Scanner {
    /// Looks at the next bytes of the stream and hands over each directive with its line's length in bytes.
    pub(super) fn scan(&mut self, batch: &[u8], found: &mut impl FnMut(JobEvent, usize)) {
        let Some(batch) = self.finish_candidate(batch, found) else { return };
        let mut next = match self.at {
            At::LineStart if could_be_directive(batch) || begins_prefix(batch) => Some(0),
            _ => LINE_START.find(batch).map(|newline| newline + 1),
        };
        while let Some(start) = next {
            let rest = &batch[start..];
            let Some(end) = memchr(b'\n', rest) else {
                self.begin_candidate(rest, found);
                return;
            };
            report(&rest[..end], found);
            let newline = start + end;
            next = LINE_START.find(&batch[newline..]).map(|index| newline + index + 1);
        }
        match batch {
            [] => {}
            [.., b'\n'] => self.at = At::LineStart,
            _ => {
                self.at = At::Text;
                // What may be cut inside the prefix itself is shorter than the prefix.
                let tail = &batch[batch.len().saturating_sub(PREFIX.len())..];
                if let Some(newline) = memrchr(b'\n', tail) {
                    self.begin_candidate(&tail[newline + 1..], found);
                }
            }
        }
    }

    /// The stream has ended: its last line may lack the `\n`.
    pub(super) fn end(&mut self, found: &mut impl FnMut(JobEvent, usize)) {
        report(&std::mem::take(&mut self.carry), found);
        self.at = At::LineStart;
    }

    /// Goes on with a line that is carried; gives what of the batch is still to be looked at.
    fn finish_candidate<'a>(
        &mut self,
        batch: &'a [u8],
        found: &mut impl FnMut(JobEvent, usize),
    ) -> Option<&'a [u8]> {
        if self.at != At::Candidate {
            return Some(batch);
        }
        let end = memchr(b'\n', batch);
        let part = &batch[..end.unwrap_or(batch.len())];
        let mut line = std::mem::take(&mut self.carry);
        self.at = At::Text;
        if line.len() + part.len() > MAX_LINE_BYTES {
            report_too_long(&line, found);
            return Some(batch);
        }
        line.extend_from_slice(part);
        match end {
            Some(end) => {
                report(&line, found);
                self.at = At::LineStart;
                Some(&batch[end + 1..])
            }
            None if could_be_directive(&line) => {
                self.carry = line;
                self.at = At::Candidate;
                None
            }
            None => Some(batch),
        }
    }

    fn begin_candidate(&mut self, line: &[u8], found: &mut impl FnMut(JobEvent, usize)) {
        self.at = At::Text;
        if !could_be_directive(line) {
            return;
        }
        if line.len() > MAX_LINE_BYTES {
            report_too_long(line, found);
            return;
        }
        self.carry = line.to_vec();
        self.at = At::Candidate;
    }
}

/// Whether a line that begins so can turn out to be a directive.
fn could_be_directive(line: &[u8]) -> bool {
    let common = line.len().min(PREFIX.len());
    if line[..common] != PREFIX[..common] {
        return false;
    }
    let head = &line[..line.len().min(MAX_HEAD_BYTES + 1)];
    match memchr(b':', head) {
        Some(colon) => name_of(&head[..colon]).is_some(),
        None => head.len() <= MAX_HEAD_BYTES && head[common..].iter().copied().all(is_name_byte),
    }
}

/// Whether the first line of these bytes begins like a directive, whatever follows.
fn begins_prefix(batch: &[u8]) -> bool {
    batch.starts_with(PREFIX)
}

/// The name in `DATABUILD_<NAME>_JSON`.
fn name_of(head: &[u8]) -> Option<&str> {
    let name = head.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    let valid = (1..=MAX_NAME_BYTES).contains(&name.len()) && name.iter().copied().all(is_name_byte);
    valid.then(|| std::str::from_utf8(name).ok()).flatten()
}

const fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_'
}

fn split(line: &[u8]) -> Option<(&str, &[u8])> {
    let colon = memchr(b':', &line[..line.len().min(MAX_HEAD_BYTES + 1)])?;
    Some((name_of(&line[..colon])?, &line[colon + 1..]))
}

fn report(line: &[u8], found: &mut impl FnMut(JobEvent, usize)) {
    if line.len() > MAX_LINE_BYTES {
        report_too_long(line, found);
    } else if let Some((name, json)) = split(line) {
        found(parse(name, json), line.len());
    }
}

fn report_too_long(beginning: &[u8], found: &mut impl FnMut(JobEvent, usize)) {
    if let Some((name, _)) = split(beginning) {
        found(malformed(name, &"the line is longer than 1 MiB"), 0);
    }
}

fn parse(name: &str, json: &[u8]) -> JobEvent {
    let parsed = match name {
        "MISSING_DEPS" => parse_missing_deps(json).map(JobEvent::MissingDeps),
        _ => parse_any(json).map(|json| JobEvent::Directive { name: name.to_owned(), json }),
    };
    parsed.unwrap_or_else(|error| malformed(name, &error))
}

fn malformed(name: &str, reason: &dyn ToString) -> JobEvent {
    let reason = reason.to_string().chars().take(MAX_REASON_CHARS).collect();
    JobEvent::Malformed { name: name.to_owned(), reason }
}

/// Checks the JSON without building it: a value of 1 MiB of text can take many times that in memory.
fn parse_any(json: &[u8]) -> Result<String, serde_json::Error> {
    serde_json::from_slice::<IgnoredAny>(json)?;
    // JSON that was parsed from bytes is checked for UTF-8 only where it is read.
    std::str::from_utf8(json).map(|text| text.trim().to_owned()).map_err(serde::de::Error::custom)
}

/// The wrapped shape and the bare one in one; which of the two it is shows by the fields that are there.
#[derive(Deserialize)]
struct MissingDepsJson {
    version: Option<serde_json::Value>,
    missing_deps: Option<Vec<MissingDeps>>,
    impacted: Option<Vec<PartitionRef>>,
    missing: Option<Vec<PartitionRef>>,
}

fn parse_missing_deps(json: &[u8]) -> Result<Vec<MissingDeps>, serde_json::Error> {
    let error = serde::de::Error::custom::<&str>;
    let json: MissingDepsJson = serde_json::from_slice(json)?;
    if json.version.is_some_and(|version| version != "1" && version != 1) {
        return Err(error("only version \"1\" is known"));
    }
    match (json.missing_deps, json.impacted, json.missing) {
        (Some(deps), None, None) => Ok(deps),
        (None, Some(impacted), Some(missing)) => Ok(vec![MissingDeps { impacted, missing }]),
        (None, None, None) => Err(error("missing_deps is not there")),
        (None, None, Some(_)) => Err(error("impacted is not there")),
        (None, Some(_), None) => Err(error("missing is not there")),
        (Some(_), ..) => Err(error("expected either missing_deps or impacted and missing")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEPS: &str = r#"DATABUILD_MISSING_DEPS_JSON:{"version":"1","missing_deps":[{"impacted":[{"ref":"a"}],"missing":[{"ref":"b"}]}]}"#;

    fn scan<'a>(batches: impl IntoIterator<Item = &'a [u8]>) -> Vec<JobEvent> {
        let mut events = Vec::new();
        let mut scanner = Scanner::default();
        for batch in batches {
            scanner.scan(batch, &mut |event, _| events.push(event));
        }
        scanner.end(&mut |event, _| events.push(event));
        events
    }

    fn a_lacks_b() -> JobEvent {
        let reference = |name: &str| vec![PartitionRef { name: name.to_owned() }];
        JobEvent::MissingDeps(vec![MissingDeps { impacted: reference("a"), missing: reference("b") }])
    }

    fn directive(name: &str, json: &str) -> JobEvent {
        JobEvent::Directive { name: name.to_owned(), json: json.to_owned() }
    }

    #[test]
    fn missing_deps_come_wrapped_or_bare() {
        let bare = r#"DATABUILD_MISSING_DEPS_JSON: {"impacted":["a"],"missing":["b"]}"#;
        let text = format!("{DEPS}\nother\n{bare}\r\n{DEPS}");
        assert_eq!(scan([text.as_bytes()]), [a_lacks_b(), a_lacks_b(), a_lacks_b()]);
    }

    #[test]
    fn other_names_are_handed_on_as_json_text() {
        let text = b"DATABUILD_COST_JSON:{\"eur\": 7}\nDATABUILD_X_2_JSON:[]\n";
        assert_eq!(scan([&text[..]]), [directive("COST", "{\"eur\": 7}"), directive("X_2", "[]")]);
    }

    #[test]
    fn only_a_line_start_and_a_whole_head_make_a_directive() {
        for text in [
            "x DATABUILD_COST_JSON:{}\n",
            " DATABUILD_COST_JSON:{}\n",
            "DATABUILD_cost_JSON:{}\n",
            "DATABUILD_JSON:{}\n",
            "DATABUILD__JSON:{}\n",
            "DATABUILD_COST:{}\n",
            "DATABUILD_COST_JSON {}\n",
            "DATABUILD_COST_JSON",
            "DATABUILD_\n",
            "DATA\nBUILD_COST_JSON:{}\n",
        ] {
            assert_eq!(scan([text.as_bytes()]), [], "{text:?}");
        }
        let long = format!("DATABUILD_{}_JSON:1\n", "X".repeat(MAX_NAME_BYTES + 1));
        assert_eq!(scan([long.as_bytes()]), []);
    }

    #[test]
    fn what_is_malformed_is_reported_with_its_reason() {
        for json in [
            "",
            "{",
            "nonsense",
            "{} {}",
            "[]",
            "{}",
            r#"{"impacted":[]}"#,
            r#"{"version":"2","missing_deps":[]}"#,
            r#"{"missing_deps":[],"missing":[]}"#,
            r#"{"missing_deps":[{"impacted":[{"name":"a"}],"missing":[]}]}"#,
            "\"\u{1}\"",
        ] {
            let events = scan([format!("DATABUILD_MISSING_DEPS_JSON:{json}\n").as_bytes()]);
            assert!(
                matches!(&events[..], [JobEvent::Malformed { name, reason }]
                    if name == "MISSING_DEPS" && !reason.is_empty()),
                "{json:?}: {events:?}"
            );
        }
        let events = scan([&b"DATABUILD_X_JSON:\"\xff\"\n"[..]]);
        assert!(matches!(&events[..], [JobEvent::Malformed { .. }]), "{events:?}");
    }

    #[test]
    fn a_complaint_does_not_repeat_a_long_value() {
        let json = format!("DATABUILD_MISSING_DEPS_JSON:\"{}\"\n", "x".repeat(100_000));
        let events = scan([json.as_bytes()]);
        assert!(
            matches!(&events[..], [JobEvent::Malformed { reason, .. }] if reason.len() <= MAX_REASON_CHARS),
            "{events:?}"
        );
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_a_directive_and_one_byte_more_is_not() {
        let head = "DATABUILD_X_JSON:";
        for (extra, expected) in [(0, true), (1, false)] {
            let value = format!("\"{}\"", "x".repeat(MAX_LINE_BYTES + extra - head.len() - 2));
            let text = format!("{head}{value}\nDATABUILD_Y_JSON:1\n");
            for size in [text.len(), 65_536, 1000] {
                let events = scan(text.as_bytes().chunks(size));
                let first = matches!(&events[0], JobEvent::Directive { json, .. } if *json == value);
                let refused =
                    matches!(&events[0], JobEvent::Malformed { reason, .. } if reason.contains("1 MiB"));
                assert_eq!((first, refused), (expected, !expected), "extra {extra}, size {size}");
                assert_eq!(events[1..], [directive("Y", "1")], "extra {extra}, size {size}");
            }
        }
    }

    #[test]
    fn a_line_that_cannot_be_a_directive_any_more_is_not_carried() {
        let mut scanner = Scanner::default();
        for batch in [&b"\nDATABUILD_"[..], b"COST is 7", b"more", b"x\nDATABUILD_lower"] {
            scanner.scan(batch, &mut |event, _| panic!("{event:?}"));
        }
        assert!(scanner.carry.is_empty());
        scanner.scan(b"\nDATAB", &mut |event, _| panic!("{event:?}"));
        assert_eq!(scanner.carry, b"DATAB");
    }

    /// What the scanner is to find, said slowly.
    fn expected(text: &[u8]) -> Vec<JobEvent> {
        text.split(|&b| b == b'\n')
            .filter_map(|line| split(line).map(|(name, json)| parse(name, json)))
            .collect()
    }

    proptest! {
        #[test]
        fn where_the_reads_are_cut_makes_no_difference(
            parts in prop::collection::vec(prop::sample::select(vec![
                "\n", "\n\n", "D", "DATA", "DATABUILD_", "DATABUILD_X_JSON:", "DATABUILD_X_JSON:1\n",
                "{}", ":", "x", "_JSON:", DEPS, "\r\n", "\0", "DATABUILD_\nDATABUILD_Y_JSON:2",
            ]), 0..20),
            cuts in prop::collection::vec(1usize..40, 1..20),
        ) {
            let text = parts.concat().into_bytes();
            let mut rest = &text[..];
            let mut batches = Vec::new();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (batch, after) = rest.split_at((*cut).min(rest.len()));
                batches.push(batch);
                rest = after;
            }
            prop_assert_eq!(scan(batches), expected(&text));
        }
    }
}
