//! What has been said of a file already: things that are looked at every second are not told of every second.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Of how many things it is known that they were said.
const KEPT: usize = 1024;

/// Whether this is to be said of a file: it was not, or long ago.
pub(crate) fn is_news(path: &Path, what: &str) -> bool {
    static TOLD: Mutex<VecDeque<(PathBuf, String)>> = Mutex::new(VecDeque::new());
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if told.iter().any(|(of, said)| of == path && said == what) {
        return false;
    }
    if told.len() == KEPT {
        told.pop_front();
    }
    told.push_back((path.to_owned(), what.to_owned()));
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thing_is_news_once_and_again_when_much_else_was_said() {
        let path = Path::new("/somewhere/that/no/other/test/names");
        assert!(is_news(path, "it is torn"));
        assert!(!is_news(path, "it is torn"));
        assert!(is_news(path, "it is a link"));
        for number in 0..KEPT {
            assert!(is_news(path, &number.to_string()));
        }
        assert!(is_news(path, "it is torn"));
    }
}
