//! Amounts for people.

/// `1.234 s`, `2 min 3 s`, `1 h 2 min`.
pub(crate) fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..60 => format!("{s}.{:03} s", ms % 1000),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s / 60 % 60),
    }
}

/// `17 B`, `3.4 kB`, `12 MB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if count < 1000 {
        return format!("{count} B");
    }
    // Tenths of the unit, rounded down: 999,999 B are 999 kB, not 1000.
    let mut tenths = count / 100;
    let mut unit = 0;
    while tenths >= 10_000 {
        tenths /= 1000;
        unit += 1;
    }
    match tenths {
        0..100 => format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit]),
        _ => format!("{} {}", tenths / 10, UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_the_unit_that_fits() {
        assert_eq!([0, 999, 59_999].map(duration), ["0.000 s", "0.999 s", "59.999 s"]);
        assert_eq!([60_000, 3_599_999, 3_720_000].map(duration), ["1 min 0 s", "59 min 59 s", "1 h 2 min"]);
        assert_eq!([0, 999, 1000, 3456, 999_999].map(bytes), ["0 B", "999 B", "1.0 kB", "3.4 kB", "999 kB"]);
        assert_eq!([1_000_000, 12_000_000_000].map(bytes), ["1.0 MB", "12 GB"]);
        assert_eq!(bytes(u64::MAX), "18 EB");
    }
}
