//! Evicting the oldest of many runs: saying which one that is, and removing it, by how many runs the index has. All
//! sizes by turns, so that other work on the machine slows them alike.
//!
//! Only the run that goes next has a folder: a million of them would be eight million files. What planning looks at
//! is the index alone, and `retention::service::planning_lists_no_folder…` counts the system's calls.

mod support;

use std::time::Duration;

use databuild_logs::EvictionBench;
use support::folder;

const SIZES: [u64; 3] = [10_000, 100_000, 1_000_000];
const ROUNDS: usize = 60;

fn main() {
    // Whoever lists or tests benches gets nothing measured.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let folders = SIZES.map(|_| folder());
    let mut benches: Vec<_> = SIZES
        .iter()
        .zip(&folders)
        .map(|(&runs, folder)| EvictionBench::new(folder.path(), runs).expect("the index can be filled"))
        .collect();
    let mut planned = vec![Vec::new(); SIZES.len()];
    let mut evicted = vec![Vec::new(); SIZES.len()];
    for round in 0..ROUNDS + 3 {
        for (at, bench) in benches.iter_mut().enumerate() {
            // Looked at first, so that no size finds its pages in the cache only because it came later.
            let plan = bench.plan().expect("the index can be asked");
            let evict = bench.evict().expect("a run can be evicted");
            if round >= 3 {
                planned[at].push(plan);
                evicted[at].push(evict);
            }
        }
    }
    println!("{ROUNDS} rounds, medians:");
    for (what, times) in [("plan", &planned), ("evict", &evicted)] {
        let medians: Vec<_> = times.iter().map(|times| median(times)).collect();
        for (runs, time) in SIZES.iter().zip(&medians) {
            let ratio = time.as_secs_f64() / medians[0].as_secs_f64();
            println!("  {what:5}  {runs:>9} runs  {time:>10.1?}  {ratio:.2} of that with {}", SIZES[0]);
        }
    }
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times[times.len() / 2]
}
