//! The lines of a log on standard output: as text, as JSON, or as they are.

use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use databuild_logs::{Batch, Line, LineNumber, Stream, UnixMicros};
use serde::Serialize;

/// What is gathered before it is written, unless nothing more is to come at once.
const BUFFER_BYTES: usize = 64 * 1024;

/// How lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people.
    Text(Style),
    /// An object a line, as in [`LogLine`](databuild_logs::LogLine).
    Json,
    /// The bytes.
    Raw,
}

/// How text is dressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Style {
    /// Tell when each line arrived.
    pub(crate) timestamps: bool,
    /// Tell of which stream each line is, beside its time.
    pub(crate) stream_names: bool,
    /// Colour the lines of stderr.
    pub(crate) color_stderr: bool,
    /// Keep a log from driving the terminal.
    pub(crate) terminal: Terminal,
}

/// What is known of where text goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Terminal {
    /// To a file or a pipe: bytes stay as they are.
    #[default]
    None,
    /// To a terminal: only colours get through.
    Colors,
    /// To a terminal that shows no colours.
    Plain,
}

impl Terminal {
    /// What standard output is.
    pub(crate) fn of_stdout(color: bool) -> Self {
        match (io::stdout().is_terminal(), color) {
            (false, _) => Self::None,
            (true, true) => Self::Colors,
            (true, false) => Self::Plain,
        }
    }
}

/// Writes lines to standard output.
pub(crate) struct Printer<W: Write = StdoutLock<'static>> {
    out: BufWriter<W>,
    format: Format,
}

impl Printer {
    pub(crate) fn to_stdout(format: Format) -> Self {
        Self::new(io::stdout().lock(), format)
    }
}

impl<W: Write> Printer<W> {
    fn new(out: W, format: Format) -> Self {
        Self { out: BufWriter::with_capacity(BUFFER_BYTES, out), format }
    }

    /// Writes the lines of a batch.
    pub(crate) fn lines(&mut self, batch: &Batch) -> io::Result<()> {
        match self.format {
            Format::Raw => self.out.write_all(&batch.bytes),
            Format::Text(style) if style.is_plain(batch.stream) => {
                self.out.write_all(&batch.bytes)?;
                if batch.bytes.last() == Some(&b'\n') { Ok(()) } else { self.out.write_all(b"\n") }
            }
            Format::Text(style) => batch.lines().try_for_each(|line| style.line(&mut self.out, batch, &line)),
            Format::Json => json_lines(&mut self.out, batch),
        }
    }

    /// Writes bytes as they are.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    pub(crate) fn is_raw(&self) -> bool {
        self.format == Format::Raw
    }

    /// Hands over everything written so far.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Style {
    /// Whether the bytes of a stream are written as they are.
    fn is_plain(&self, stream: Stream) -> bool {
        !self.timestamps && self.terminal == Terminal::None && !self.colors(stream)
    }

    fn colors(&self, stream: Stream) -> bool {
        self.color_stderr && stream == Stream::Stderr
    }

    fn line(&self, out: &mut impl Write, batch: &Batch, line: &Line<'_>) -> io::Result<()> {
        if self.timestamps {
            match line.time {
                Some(time) => write!(out, "{time} ")?,
                None => write!(out, "{:<27} ", "-")?,
            }
            if self.stream_names {
                write!(out, "{} ", batch.stream)?;
            }
        }
        let colored = self.colors(batch.stream);
        if colored {
            out.write_all(RED)?;
        }
        let left_open = match self.terminal {
            Terminal::None => {
                out.write_all(line.text)?;
                false
            }
            terminal => neutral(out, line.text, terminal == Terminal::Colors)?,
        };
        if colored || left_open {
            out.write_all(RESET)?;
        }
        out.write_all(b"\n")
    }
}

const RED: &[u8] = b"\x1b[31m";
const RESET: &[u8] = b"\x1b[0m";

/// Writes a line so that it cannot drive a terminal: control characters are shown as `^X`, what is not UTF-8 as
/// U+FFFD. Tabs stay, and with `colors` the sequences that only colour. Tells whether there was one of these.
fn neutral(out: &mut impl Write, line: &[u8], colors: bool) -> io::Result<bool> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut colored = false;
    for chunk in line.utf8_chunks() {
        let mut rest = chunk.valid();
        while let Some(at) = rest.find(|c: char| c.is_control() && c != '\t') {
            let (text, control) = rest.split_at(at);
            out.write_all(text.as_bytes())?;
            rest = match color_sequence(control) {
                Some(length) => {
                    if colors {
                        out.write_all(&control.as_bytes()[..length])?;
                        colored = true;
                    }
                    &control[length..]
                }
                None => {
                    let mut characters = control.chars();
                    if let Some(c) = characters.next() {
                        out.write_all(caret(c).as_bytes())?;
                    }
                    characters.as_str()
                }
            };
        }
        out.write_all(rest.as_bytes())?;
        if !chunk.invalid().is_empty() {
            out.write_all("\u{FFFD}".as_bytes())?;
        }
    }
    Ok(colored)
}

/// The length of the sequence that a text begins with, if it is one that only colours: `ESC [ … m`.
fn color_sequence(text: &str) -> Option<usize> {
    let parameters = text.strip_prefix("\x1b[")?;
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';' && c != ':')?;
    parameters[end..].starts_with('m').then_some("\x1b[".len() + end + 1)
}

/// A control character as it is shown: `^[` for escape; those above U+0080 by their number.
fn caret(c: char) -> String {
    match u8::try_from(c) {
        Ok(0x7f) => "^?".to_owned(),
        Ok(code @ 0..0x20) => format!("^{}", char::from(code + 0x40)),
        _ => format!("<U+{:04X}>", u32::from(c)),
    }
}

/// A text without anything that a terminal would obey.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { caret(c) } else { c.to_string() }).collect()
}

/// [`LogLine`](databuild_logs::LogLine), borrowed.
#[derive(Serialize)]
struct LineJson<'a> {
    n: LineNumber,
    #[serde(skip_serializing_if = "Option::is_none")]
    t: Option<UnixMicros>,
    s: Stream,
    #[serde(skip_serializing_if = "Option::is_none")]
    m: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    b: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cut: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    open: bool,
}

fn json_lines(out: &mut impl Write, batch: &Batch) -> io::Result<()> {
    let unterminated = batch.cut.is_none() && batch.bytes.last() != Some(&b'\n');
    let last = batch.last_position();
    for line in batch.lines() {
        let (m, b) = match std::str::from_utf8(line.text) {
            Ok(text) => (Some(text), None),
            Err(_) => (None, Some(STANDARD.encode(line.text))),
        };
        let cut = line.cut.map(|cut| cut.full_bytes);
        let open = unterminated && line.position == last;
        let json = LineJson { n: line.number, t: line.time, s: batch.stream, m, b, cut, open };
        serde_json::to_writer(&mut *out, &json)?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use databuild_logs::{CutLine, LineTime, LogLine};

    fn batch(text: &[u8]) -> Batch {
        let newlines = text.iter().filter(|&&b| b == b'\n').count() as u64;
        Batch {
            stream: Stream::Stderr,
            first_line: LineNumber(7),
            first_position: LineNumber(70),
            lines: newlines + u64::from(!text.ends_with(b"\n")),
            bytes: text.to_vec().into(),
            times: vec![LineTime { from: LineNumber(7), time: UnixMicros(1_790_000_000_123_456) }],
            cut: None,
        }
    }

    fn printed(format: Format, batch: &Batch) -> Vec<u8> {
        let mut printer = Printer::new(Vec::new(), format);
        printer.lines(batch).unwrap();
        printer.out.into_inner().unwrap()
    }

    fn shown(text: &[u8], colors: bool) -> String {
        let mut out = Vec::new();
        neutral(&mut out, text, colors).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn plain_text_is_the_bytes_and_ends_every_line() {
        let plain = Format::Text(Style::default());
        assert_eq!(printed(plain, &batch(b"a\xff\x1b[2J\r\nb")), b"a\xff\x1b[2J\r\nb\n");
        assert_eq!(printed(Format::Raw, &batch(b"a\n\xffb")), b"a\n\xffb");
    }

    #[test]
    fn times_streams_and_colours_stand_before_the_line() {
        let style = Style { timestamps: true, stream_names: true, color_stderr: true, ..Style::default() };
        let text = String::from_utf8(printed(Format::Text(style), &batch(b"a\n"))).unwrap();
        assert_eq!(text, "2026-09-21T14:13:20.123456Z stderr \x1b[31ma\x1b[0m\n");
        let unknown = Batch { times: Vec::new(), ..batch(b"a\n") };
        let style = Style { timestamps: true, ..Style::default() };
        let text = String::from_utf8(printed(Format::Text(style), &unknown)).unwrap();
        assert_eq!(text, format!("-{}a\n", " ".repeat(27)));
    }

    #[test]
    fn a_log_cannot_drive_the_terminal() {
        assert_eq!(shown(b"\x1b[2J\x1b]0;title\x07\x08\x7f\x00", true), "^[[2J^[]0;title^G^H^?^@");
        assert_eq!(shown("\u{9b}2J".as_bytes(), true), "<U+009B>2J");
        assert_eq!(shown(b"10%\r20%\r", true), "10%^M20%");
        assert_eq!(shown(b"\x9b\xff", true), "\u{FFFD}\u{FFFD}");
        assert_eq!(shown("tab\tand é".as_bytes(), true), "tab\tand é");
        assert_eq!(shown(b"\x1b[", true), "^[[");
        assert_eq!(shown(b"\x1b[31", true), "^[[31");
    }

    #[test]
    fn colours_get_through_only_where_they_are_wanted_and_end_with_the_line() {
        assert_eq!(shown(b"\x1b[1;31mred\x1b[m", true), "\x1b[1;31mred\x1b[m");
        assert_eq!(shown(b"\x1b[1;31mred\x1b[m", false), "red");
        let style = Style { terminal: Terminal::Colors, ..Style::default() };
        assert_eq!(printed(Format::Text(style), &batch(b"\x1b[31mred\nx\n")), b"\x1b[31mred\x1b[0m\nx\n");
    }

    #[test]
    fn json_is_a_log_line_each() {
        let mut batch = batch(b"a\n\xff\nend");
        let text = String::from_utf8(printed(Format::Json, &batch)).unwrap();
        let lines: Vec<LogLine> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((lines[0].n.0, lines[0].m.as_deref(), lines[0].open), (7, Some("a"), false));
        assert_eq!((lines[1].n.0, lines[1].b.as_deref(), lines[1].s), (8, Some("/w=="), Stream::Stderr));
        assert_eq!((lines[2].n.0, lines[2].m.as_deref(), lines[2].open), (9, Some("end"), true));
        assert_eq!(lines[0].t, Some(UnixMicros(1_790_000_000_123_456)));
        batch = Batch { bytes: "begin".into(), lines: 1, cut: Some(CutLine { full_bytes: 99 }), ..batch };
        let line: LogLine = serde_json::from_slice(&printed(Format::Json, &batch)).unwrap();
        assert_eq!((line.cut, line.open), (Some(99), false));
    }
}
