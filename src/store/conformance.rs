//! What every store has to do, whatever it keeps its runs in and however many stores it wraps.
