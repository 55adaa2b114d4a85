#!/usr/bin/env python3
"""Compares whole processes, by hand: see README.md beside this file.

    benches/compare.py bulk      `databuild run -q -- cat big.log` and `cat big.log | cat > copy`, by turns
    benches/compare.py disk      what the journal and the index take, for bulk output and for single lines
    benches/compare.py rebuild   `databuild index rebuild` and `wc -l` of the same log, by turns
    benches/compare.py open      opening after kill -9: a store with few finished runs, and one with many, by turns
    benches/compare.py many      many jobs at once, followed while they print: nothing lost, memory of the service
    benches/compare.py evict     the oldest of 100,000 runs: `databuild gc`, and `find` by age with `du` of all
    benches/compare.py ratios    the ratios of the last `cargo bench`
    benches/compare.py all       all of it

Needs Python 3.9, cargo, and 3 GB on the disk that --dir is on. Prints medians.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=["bulk", "disk", "rebuild", "open", "many", "evict", "ratios", "all"])
    parser.add_argument("--dir", default=ROOT / "target", type=Path, help="where to make the files [target/]")
    parser.add_argument("--lines", default=10_000_000, type=int, help="lines of big.log")
    parser.add_argument("--rounds", default=7, type=int, help="of bulk, rebuild and open")
    parser.add_argument("--runs", default=100_000, type=int, help="finished runs of evict and open; the smaller store of open has a hundredth")
    parser.add_argument("--places", default=750, type=int, help="of each run's lines in the index, for the large index of open")
    parser.add_argument("--jobs", default=200, type=int, help="of many")
    parser.add_argument("--followers", default=50, type=int, help="of many")
    parser.add_argument("--rate", default=1_000, type=int, help="lines a second of each job of many")
    parser.add_argument("--burst", default=1, type=int, help="lines that a job of many prints with one write")
    parser.add_argument("--seconds", default=20, type=int, help="for which the jobs of many print")
    options = parser.parse_args()
    print("load average:", " ".join(f"{load:.2f}" for load in os.getloadavg()), "at the start")
    if options.subject in ("ratios", "all"):
        ratios()
    if options.subject == "ratios":
        return
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="compare-") as folder:
        bench = Bench(Path(folder), options)
        for name, subject in SUBJECTS.items():
            if options.subject in (name, "all"):
                subject(bench)
    print("load average:", " ".join(f"{load:.2f}" for load in os.getloadavg()), "at the end")


class Bench:
    """The executables, and a folder to work in."""

    def __init__(self, folder, options):
        self.folder = folder
        self.options = options
        # A bench is built with a `databuild` of the bench profile, in the same place: the one of a release comes last.
        self.workload = executable("workload", "bench", "--no-run", "--bench", "workload")
        self.databuild = executable("databuild", "build", "--release", "--bin", "databuild")

    def big_log(self):
        path = self.folder / "big.log"
        if not path.exists():
            subprocess.run([self.workload, "write", path, str(self.options.lines)], check=True)
            os.sync()
        return path

    def run(self, logs, run_id, *job):
        """The command that records a job."""
        return [self.databuild, "--log-dir", logs, "run", "-q", "--id", run_id, "--", *job]

    def print_lines(self, lines, rate, burst):
        """A job that prints lines of 100 bytes."""
        return [self.workload, "print", str(lines), str(rate), str(burst)]


def executable(name, *cargo):
    """Builds something with cargo, and says where it is."""
    built = subprocess.run(
        ["cargo", *cargo, "--message-format=json-render-diagnostics"],
        cwd=ROOT, check=True, stdout=subprocess.PIPE,
    )
    for message in map(json.loads, built.stdout.splitlines()):
        if message.get("executable") and message["target"]["name"] == name:
            return message["executable"]
    sys.exit(f"cargo built no {name}")


# --- bulk


def bulk(bench):
    """Wall time, CPU and memory of recording big.log, and of copying it through a pipe."""
    log = bench.big_log()
    copied, recorded, ratios, peaks, copying, recording = [], [], [], [], [], []
    for round_number in range(bench.options.rounds):
        copy = bench.folder / "copy"
        os.sync()
        begin = time.monotonic()
        _, usage = watch(subprocess.Popen(["sh", "-c", 'cat "$1" | cat > "$2"', "sh", log, copy]))
        theirs = time.monotonic() - begin
        copying.append(usage.ru_utime + usage.ru_stime)
        copy.unlink()
        logs = bench.folder / "logs"
        os.sync()
        begin = time.monotonic()
        process = subprocess.Popen(bench.run(logs, "big", "cat", log))
        peak, usage = watch(process)
        ours = time.monotonic() - begin
        kept = logs / "job_runs" / "big" / "stdout.log"
        if round_number == 0:
            subprocess.run(["cmp", log, kept], check=True)
        shutil.rmtree(logs)
        copied.append(theirs)
        recorded.append(ours)
        ratios.append(ours / theirs)
        peaks.append(peak)
        recording.append(usage.ru_utime + usage.ru_stime)
    print(f"bulk, {log.stat().st_size / 1e9:.2f} GB, {len(ratios)} rounds:")
    print(f"  cat | cat > copy   {statistics.median(copied):6.2f} s  ({spread(copied)})")
    print(f"  databuild run -q   {statistics.median(recorded):6.2f} s  ({spread(recorded)})")
    print(f"  ratio of a round   {statistics.median(ratios):6.2f}    ({spread(ratios)})")
    print(f"  CPU of all processes: {statistics.median(copying):.2f} s and {statistics.median(recording):.2f} s")
    print(f"  peak RSS           {max(peaks) / 1024:6.1f} MiB")


def watch(process):
    """Waits for a process; gives its peak RSS in KiB, as the system counts it, and what it used."""
    peak = 0
    while True:
        peak = max(peak, peak_rss(process.pid))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                sys.exit(f"{process.args} ended with {process.returncode}")
            return peak, usage
        time.sleep(0.005)


def peak_rss(pid):
    # What wait4 says of the peak begins with what this process had when it forked.
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) if found else 0
    return 0


def spread(numbers):
    return f"{min(numbers):.2f} to {max(numbers):.2f}"


# --- disk


def disk(bench):
    """Bytes of the journal and of the index, by the bytes of the log."""
    logs = bench.folder / "logs"
    jobs = {
        "bulk": ["cat", bench.big_log()],
        "single lines": bench.print_lines(3_000, 400, 1),
    }
    for run_id, (name, job) in enumerate(jobs.items()):
        subprocess.run(bench.run(logs, f"run-{run_id}", *job), check=True)
        run = logs / "job_runs" / f"run-{run_id}"
        log, journal = ((run / file).stat().st_size for file in ("stdout.log", "journal"))
        print(f"disk, {name}: log {log:,} bytes, journal {journal:,}: {journal / log:.4%}")
    with Service(bench, logs) as service:
        service.wait_for_runs(len(jobs))
    all_logs = sum(path.stat().st_size for path in logs.glob("job_runs/*/std*.log"))
    index = (logs / "index.redb").stat().st_size
    print(f"disk, index: {index:,} bytes for {all_logs:,} of logs: {index / all_logs:.4%}")
    shutil.rmtree(logs)


class Service:
    """`databuild serve` in a folder, for as long as it is needed."""

    def __init__(self, bench, logs, variables=None, poll=0.01):
        self.variables = variables
        self.poll = poll
        self.command = [bench.databuild, "--log-dir", logs, "serve", "--listen", "127.0.0.1:0"]
        self.said = bench.folder / "service.txt"

    def __enter__(self):
        with open(self.said, "wb") as said:
            self.process = subprocess.Popen(self.command, stderr=said, env=self.variables)
        while not (found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.said.read_text())):
            if self.process.poll() is not None:
                sys.exit(f"the service did not start: {self.said.read_text()}")
            time.sleep(self.poll)
        self.port = int(found[1])
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def get(self, target, headers=""):
        """Sends a request. An answer of HTTP/1.0 is not cut into chunks."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(f"GET {target} HTTP/1.0\r\nHost: localhost\r\n{headers}\r\n".encode())
        return connection

    def json(self, target):
        with self.get(target) as connection, connection.makefile("rb") as answer:
            return json.loads(answer.read().partition(b"\r\n\r\n")[2])

    def wait_for_runs(self, count):
        """Waits until so many runs are over and in the index."""
        while True:
            runs = self.json(f"/api/job_runs?limit={count}")["runs"]
            if len(runs) == count and all(run["state"] != "running" for run in runs):
                return
            time.sleep(0.1)


# --- rebuild


def rebuild(bench):
    """Making the index anew, from the journal and without one, and counting the lines of the same log."""
    log = bench.big_log()
    logs = bench.folder / "rebuilt"
    subprocess.run(bench.run(logs, "big", "cat", log), check=True)
    kept = logs / "job_runs" / "big"
    for what in ("by the journal", "by counting lines"):
        if what == "by counting lines":
            (kept / "journal").unlink()
        ours, theirs, factors = [], [], []
        for _ in range(bench.options.rounds):
            theirs.append(seconds_of(["wc", "-l", kept / "stdout.log"]))
            ours.append(seconds_of([bench.databuild, "--log-dir", logs, "index", "rebuild"]))
            factors.append(theirs[-1] / ours[-1])
        print(f"rebuild {what}, {log.stat().st_size / 1e9:.2f} GB, {len(ours)} rounds:")
        print(f"  wc -l                   {statistics.median(theirs):6.3f} s  ({spread(theirs)})")
        print(f"  databuild index rebuild {statistics.median(ours):6.3f} s  ({spread(ours)})")
        print(f"  its speed by wc's       {statistics.median(factors):6.2f}    ({spread(factors)})")
    shutil.rmtree(logs)


def seconds_of(command):
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - begin


# --- open


def open_after_kill(bench):
    """From the start of `databuild serve` until it listens, in stores whose service was killed."""
    few = Stored(bench, max(bench.options.runs // 100, 1))
    many = Stored(bench, bench.options.runs)
    by_turns(bench, few, many)
    subprocess.run([bench.workload, "places", many.folder, str(bench.options.places)], check=True)
    by_turns(bench, few, many)


class Stored:
    """A store with finished runs, whose service is killed again and again."""

    def __init__(self, bench, count):
        self.bench, self.count, self.lives = bench, count, 0
        self.folder = bench.folder / f"runs-{count}"
        finished_runs(bench, self.folder, count)

    def open_and_kill(self):
        """Milliseconds until the service listens. A job is recorded before it is killed, so that it has written."""
        begin = time.monotonic()
        with Service(self.bench, self.folder, poll=0.0002) as service:
            took = (time.monotonic() - begin) * 1000
            self.lives += 1
            subprocess.run(self.bench.run(self.folder, f"live-{self.lives}", "true"), check=True)
            service.wait_for_runs(1)
            # Within 50 ms of its end a run is in the index.
            time.sleep(0.2)
            service.process.kill()
        return took

    def index_size(self):
        return (self.folder / "index.redb").stat().st_size / 1e6


def by_turns(bench, *stores):
    # What making the stores left to be written must not be waited for by those that open them.
    os.sync()
    taken = [[] for _ in stores]
    for round_number in range(bench.options.rounds + 1):
        for store, times in zip(stores, taken):
            took = store.open_and_kill()
            # Nobody was killed before the first.
            if round_number:
                times.append(took)
    print(f"open after kill -9, {bench.options.rounds} rounds, milliseconds of the whole process until it listens:")
    for store, times in zip(stores, taken):
        print(f"  {store.count:7,} runs, index of {store.index_size():7.1f} MB  "
              f"{statistics.median(times):6.1f}  ({spread(times)})")
    print(f"  ratio {statistics.median(taken[-1]) / statistics.median(taken[0]):.2f}")


def finished_runs(bench, store, count):
    """A store with so many runs that are over: links to the files of one, since only their number counts."""
    subprocess.run(bench.run(store, "run-0", "seq", "10"), check=True)
    first = store / "job_runs" / "run-0"
    for number in range(1, count):
        run = store / "job_runs" / f"run-{number}"
        if number % 10_000 == 0:
            # A file can't have any number of links.
            first = shutil.copytree(first, run)
            continue
        run.mkdir()
        for file in os.listdir(first):
            os.link(first / file, run / file)
    subprocess.run(
        [bench.databuild, "--log-dir", store, "index", "rebuild"],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )


# --- evict


def evict(bench):
    """How long it takes to know and remove the oldest of many runs, and to know it without an index."""
    logs, runs = bench.folder / "logs", bench.options.runs
    began = 1_700_000_000
    for number in range(runs):
        folder = logs / "job_runs" / f"run-{number:06}"
        folder.mkdir(parents=True)
        (folder / "stdout.log").write_text(f"this is run {number}\n" * 10)
        ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began + number))
        (folder / "metadata.json").write_text(
            json.dumps({"job_run_id": folder.name, "exit_code": 0, "finished_at": ended}))
        os.utime(folder, (began + number, began + number))
    subprocess.run([bench.databuild, "--log-dir", logs, "index", "rebuild"], check=True)
    # What a cron job does: the sum says whether something has to go, the oldest what.
    by_hand = 'du -s "$1" > /dev/null; find "$1" -mindepth 1 -maxdepth 1 -type d -printf "%T@ %p\\n" | sort -n | head -1'
    variables = dict(os.environ, DATABUILD_LOG_TTL_DAYS="0", DATABUILD_LOG_MAX_SIZE_GB="0")
    asked, found = [], []
    with Service(bench, logs, variables) as service:
        service.wait_for_runs(1)
        for left in range(runs - 1, runs - 1 - bench.options.rounds, -1):
            begin = time.monotonic()
            said = subprocess.run(
                [bench.databuild, "--server", f"http://127.0.0.1:{service.port}", "gc", "--max-size", "1",
                 "--keep-last", str(left), "-o", "json"], check=True, stdout=subprocess.PIPE)
            asked.append(time.monotonic() - begin)
            [gone] = json.loads(said.stdout)["evicted"]
            assert gone["id"] == f"run-{runs - 1 - left:06}", gone
            begin = time.monotonic()
            oldest = subprocess.run(["sh", "-c", by_hand, "sh", logs / "job_runs"], check=True, stdout=subprocess.PIPE)
            found.append(time.monotonic() - begin)
            assert oldest.stdout.strip().endswith(b"run-%06d" % (runs - left)), oldest.stdout
    print(f"evict, the oldest of {runs:,} runs, {len(asked)} rounds:")
    print(f"  databuild gc, the whole process   {statistics.median(asked) * 1e3:8.1f} ms  ({spread(asked)} s)")
    print(f"  du and find, nothing is removed   {statistics.median(found) * 1e3:8.1f} ms  ({spread(found)} s)")
    print(f"  ratio of the medians              {statistics.median(found) / statistics.median(asked):8.1f}")
    shutil.rmtree(logs)


# --- many


class Follower(threading.Thread):
    """Follows a run to its end and keeps what came."""

    def __init__(self, service, run_id):
        super().__init__()
        self.connection = service.get(f"/api/job_runs/{run_id}/logs/stdout?follow=true")
        self.pieces = []

    def run(self):
        while piece := self.connection.recv(1 << 18):
            self.pieces.append(piece)

    def check(self, lines):
        """Each line came once, in order, and the end after it; gives the number of events that are wrong."""
        answer = b"".join(self.pieces).partition(b"\r\n\r\n")[2]
        found = re.findall(rb"event: log\nid: (\d+)\ndata: \d+ (\d+) \.*\n\n", answer)
        wrong = sum(int(seen) != number or int(printed) != number
                    for number, (seen, printed) in enumerate(found, 1))
        return wrong + abs(lines - len(found)) + (b"event: complete" not in answer)


def many(bench):
    """Jobs that print at a steady pace beside each other, each a process of its own, and their followers."""
    options = bench.options
    logs = bench.folder / "logs"
    logs.mkdir()
    lines = options.rate * options.seconds
    ids = [f"job-{number}" for number in range(options.jobs)]
    job = bench.print_lines(lines, options.rate, options.burst)
    begin = time.monotonic()
    copies = [subprocess.Popen(["sh", "-c", '"$@" | cat > "$0"', bench.folder / f"{run_id}.copy", *job]) for run_id in ids]
    assert not any(copy.wait() for copy in copies)
    copied = time.monotonic() - begin
    with Service(bench, logs) as service:
        followers = [Follower(service, ids[number % len(ids)]) for number in range(options.followers)]
        for follower in followers:
            follower.start()
        begin = time.monotonic()
        jobs = [subprocess.Popen(bench.run(logs, run_id, *job)) for run_id in ids]
        failed = sum(job.wait() != 0 for job in jobs)
        took = time.monotonic() - begin
        for follower in followers:
            follower.join()
        followed = time.monotonic() - begin
        peak = peak_rss(service.process.pid)
        ticks = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        cpu = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        service.wait_for_runs(len(ids))
        totals = [run["stdout"]["lines"] for run in service.json(f"/api/job_runs?limit={len(ids)}")["runs"]]
    kept = [(logs / "job_runs" / run_id / "stdout.log").read_bytes().count(b"\n") for run_id in ids]
    print(f"many, {len(ids)} jobs of {lines:,} lines, {options.rate:,} a second, {options.burst} a write, "
          f"{len(followers)} followers:")
    print(f"  each job's output through `cat` into a file took {copied:.1f} s ({options.seconds} s if nothing slows it down)")
    print(f"  recorded and followed it took {took:.1f} s, the last follower was done after {followed:.1f} s")
    print(f"  jobs that failed: {failed}; runs with lines missing on disk: {sum(count != lines for count in kept)}, "
          f"in the list: {sum(count != lines for count in totals)}")
    print(f"  lines missing, twice or out of order at followers: {sum(one.check(lines) for one in followers)}")
    print(f"  service: peak RSS {peak / 1024:.1f} MiB, {cpu:.1f} s of CPU")
    shutil.rmtree(logs)


# --- ratios


RATIOS = [
    ("append of 64 KiB, speed of write(2)", "append/64 KiB, write(2)", "append/64 KiB, library"),
    ("append of a line, speed of write(2)", "append/100-byte lines, write(2)", "append/100-byte lines, library"),
    ("since, time at 10^7 lines by that at 10^4", "seek/since/10000000", "seek/since/10000"),
    ("tail, time at 10^7 lines by that at 10^4", "seek/tail/10000000", "seek/tail/10000"),
    ("SSE, lines a second by those of axum's Event", "sse/axum's Event a line", "sse/frames"),
    ("SSE, lines a second by raw bytes", "sse/raw bytes", "sse/frames"),
    ("rebuild by the journal, speed of wc -l", "rebuild/wc -l", "rebuild/1 GB by its journal"),
    ("rebuild by the lines, speed of wc -l", "rebuild/wc -l", "rebuild/1 GB by its lines"),
]


def ratios():
    """What criterion kept of each bench, as medians."""
    medians = {}
    for kept in (ROOT / "target" / "criterion").glob("**/new/benchmark.json"):
        name = json.loads(kept.read_text())["full_id"]
        medians[name] = json.loads((kept.parent / "estimates.json").read_text())["median"]["point_estimate"]
    for name, nanoseconds in sorted(medians.items()):
        print(f"  {name:45} {nanoseconds / 1000:14,.1f} µs")
    for what, above, below in RATIOS:
        if above in medians and below in medians:
            print(f"{what}: {medians[above] / medians[below]:.2f}")


SUBJECTS = {"bulk": bulk, "disk": disk, "rebuild": rebuild, "open": open_after_kill, "many": many, "evict": evict}


if __name__ == "__main__":
    main()
