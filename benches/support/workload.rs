//! Workload L: what jobs print, made up from a line's number alone.
//!
//! 10 M lines are 1.04 GB. Compiler lines, test results, lines with a time, stack traces, downloads and indented
//! pointers into a source stand in a mix that is the same each time; one line in 25 holds `warning:`, and exactly
//! one of the 10 M holds [`NEEDLE`]. Fewer lines are the beginning of more.

use std::io::{self, Write};

/// The lines of the whole workload.
pub(crate) const ALL_LINES: u64 = 10_000_000;

/// What stands in one line only.
pub(crate) const NEEDLE: &str = "needle-7f3a91c2";

/// The line with the needle in it, numbered from 1.
pub(crate) const NEEDLE_LINE: u64 = 6_180_340;

const SEED: u64 = 0x6a09_e667_f3bc_c908;

/// Numbers that look like chance but are always the same for the same line.
struct Dice(u64);

impl Dice {
    /// A number below `bound`.
    fn roll(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // The upper half is as good as the whole, and the product stays within 64 bits.
        ((mixed >> 32) * bound) >> 32
    }

    fn one_of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[usize::try_from(self.roll(words.len() as u64)).unwrap_or_default()]
    }
}

const PARTS: [&str; 8] =
    ["planner", "catalog", "scheduler", "storage", "wire", "executor", "partition_map", "retention"];
const DEEDS: [&str; 8] = [
    "keeps_the_order_of_rows_after_a_restart",
    "refuses_an_empty_partition",
    "ends_when_its_input_ends",
    "merges_neighbours_of_the_same_day",
    "reads_what_an_older_version_wrote",
    "survives_a_full_disk",
    "counts_every_row_once",
    "waits_for_the_slowest_reader_and_for_no_other",
];

/// A line that is being put together.
struct Pen<'a>(&'a mut Vec<u8>);

impl Pen<'_> {
    fn text(&mut self, text: &str) -> &mut Self {
        self.0.extend_from_slice(text.as_bytes());
        self
    }

    /// A number with at least `width` digits.
    fn number(&mut self, mut number: u64, width: usize) -> &mut Self {
        let mut digits = [b'0'; 20];
        let mut first = digits.len();
        while number > 0 || digits.len() - first < width {
            first -= 1;
            digits[first] = b'0' + u8::try_from(number % 10).unwrap_or_default();
            number /= 10;
        }
        self.0.extend_from_slice(&digits[first..]);
        self
    }
}

/// Adds line `number`, counted from 1, with its `\n`.
pub(crate) fn line(number: u64, out: &mut Vec<u8>) {
    let mut dice = Dice(SEED ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93));
    let mut pen = Pen(out);
    if number == NEEDLE_LINE {
        pen.text("error: checksum of block ").number(dice.roll(100_000), 5).text(" differs: ").text(NEEDLE);
    } else if number % 25 == 13 {
        warning(&mut pen, &mut dice);
    } else {
        match dice.roll(100) {
            0..33 => compiling(&mut pen, &mut dice),
            33..53 => test(&mut pen, &mut dice),
            53..78 => event(&mut pen, &mut dice, number),
            78..86 => frame(&mut pen, &mut dice),
            86..92 => download(&mut pen, &mut dice),
            _ => pointer(&mut pen, &mut dice),
        }
    }
    pen.text("\n");
}

fn warning(pen: &mut Pen<'_>, dice: &mut Dice) {
    pen.text("warning: unused variable `value_").number(dice.roll(1_000), 3).text("` in crates/");
    pen.text(dice.one_of(&PARTS)).text("/src/module_").number(dice.roll(5_000), 4).text("/resolve.src:");
    pen.number(dice.roll(2_000), 1).text(":").number(dice.roll(100), 1);
}

fn compiling(pen: &mut Pen<'_>, dice: &mut Dice) {
    pen.text("   Compiling ").text(dice.one_of(&PARTS)).text("_").number(dice.roll(5_000), 4).text(" v0.");
    pen.number(dice.roll(60), 1).text(".").number(dice.roll(20), 1).text(" (/workspace/build/crates/");
    pen.text(dice.one_of(&PARTS)).text("/generated) [optimised, ").number(dice.roll(32), 1);
    pen.text(" units, ").number(dice.roll(90_000), 1).text(" ms]");
}

fn test(pen: &mut Pen<'_>, dice: &mut Dice) {
    pen.text("test ").text(dice.one_of(&PARTS)).text("::").text(dice.one_of(&PARTS)).text("::tests::case_");
    pen.number(dice.roll(1_000_000), 6).text("_").text(dice.one_of(&DEEDS));
    pen.text(if dice.roll(200) == 0 { " ... FAILED" } else { " ... ok" });
}

fn event(pen: &mut Pen<'_>, dice: &mut Dice, number: u64) {
    let micros = number * 350 + dice.roll(300);
    let seconds = micros / 1_000_000;
    pen.text("2026-03-14T").number(seconds / 3_600 % 24, 2).text(":").number(seconds / 60 % 60, 2);
    pen.text(":").number(seconds % 60, 2).text(".").number(micros % 1_000_000, 6).text("Z  INFO worker-");
    pen.number(dice.roll(32), 2).text(" ").text(dice.one_of(&PARTS)).text(": data/alpha/2026-03-");
    pen.number(1 + dice.roll(28), 2).text("/part-").number(dice.roll(100_000), 5).text(" made, ");
    pen.number(dice.roll(10_000_000), 1).text(" rows, ").number(dice.roll(60_000), 1).text(" ms");
}

fn frame(pen: &mut Pen<'_>, dice: &mut Dice) {
    pen.text("        at build.graph.")
        .text(dice.one_of(&PARTS))
        .text(".Resolver.")
        .text(dice.one_of(&DEEDS));
    pen.text("(resolver.src:").number(dice.roll(3_000), 1).text(") ~[").text(dice.one_of(&PARTS)).text("-");
    pen.number(dice.roll(9), 1).text(".").number(dice.roll(40), 1).text(".pkg]");
}

fn download(pen: &mut Pen<'_>, dice: &mut Dice) {
    pen.text(" Downloading https://packages.example/").text(dice.one_of(&PARTS)).text("/blobs/");
    pen.number(dice.roll(u64::from(u32::MAX)), 10).text(".tar.zst  ").number(dice.roll(900), 3).text(".");
    pen.number(dice.roll(10), 1).text(" MB of 900.0 MB  ").number(dice.roll(120), 1).text(" MB/s");
}

fn pointer(pen: &mut Pen<'_>, dice: &mut Dice) {
    let line = dice.roll(3_000);
    match dice.roll(3) {
        0 => {
            pen.text("  --> crates/").text(dice.one_of(&PARTS)).text("/src/resolve.src:").number(line, 1);
        }
        1 => {
            pen.number(line, 4).text(" |         let rows = ").text(dice.one_of(&PARTS)).text("::");
            pen.text(dice.one_of(&DEEDS)).text("(&mut partition, Options::default())?;");
        }
        _ => {
            pen.text("     |                    ^^^^^^^^^^^^^^^^^^^^^^^^^ expected a partition of `");
            pen.text(dice.one_of(&PARTS)).text("`, found one of `").text(dice.one_of(&PARTS)).text("`");
        }
    }
}

/// Gives the first `lines` lines in pieces of `bytes` bytes, which end within a line as what comes out of a pipe
/// does.
pub(crate) fn batches(lines: u64, bytes: usize, mut take: impl FnMut(&[u8])) {
    let mut text = Vec::with_capacity(bytes + 512);
    for number in 1..=lines {
        line(number, &mut text);
        if text.len() >= bytes {
            take(&text[..bytes]);
            text.drain(..bytes);
        }
    }
    if !text.is_empty() {
        take(&text);
    }
}

/// The first `lines` lines.
pub(crate) fn text(lines: u64) -> Vec<u8> {
    let mut text = Vec::new();
    for number in 1..=lines {
        line(number, &mut text);
    }
    text
}

/// Writes the first `lines` lines.
pub(crate) fn write(lines: u64, out: &mut impl Write) -> io::Result<()> {
    let mut result = Ok(());
    batches(lines, 1 << 20, |batch| {
        if result.is_ok() {
            result = out.write_all(batch);
        }
    });
    result
}
