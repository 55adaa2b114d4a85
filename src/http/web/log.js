// One run: what it was, how it went, and its log, which is followed with EventSource until it ends.

import * as format from "./format.js";
import { KEPT, Lines } from "./lines.js";

/** Lines shown before one that was linked to. */
const ABOVE = 1_000;
const RETRY_MS = 2_000;

const REASONS = {
  disk_full: "the disk was full",
  run_size_cap: "the run reached the most that one run may keep",
  corrupt: "the file is damaged there",
};

export class LogPane {
  #at = null;
  #source = null;
  #retry = 0;
  #seen = 0;
  #run = null;
  #lines;
  #decoder = new TextDecoder();
  #parts;

  #onEnd;

  /** `onEnd` is called when the run that is followed ends. */
  constructor(root, { onEnd }) {
    this.#onEnd = onEnd;
    this.#parts = Object.fromEntries([...root.querySelectorAll("[id]")].map((part) => [part.id, part]));
    this.#lines = new Lines(this.#parts.log, this.#parts["to-end"]);
    this.#parts.wrap.addEventListener("change", ({ target }) => {
      this.#parts.log.classList.toggle("nowrap", !target.checked);
    });
    this.#parts.tabs.addEventListener("keydown", (event) => this.#moveTab(event));
    setInterval(() => this.#run?.state === "running" && this.#facts(), 1000);
  }

  open(at) {
    if (JSON.stringify(at) === JSON.stringify(this.#at)) return;
    const sameRun = at.id === this.#at?.id;
    this.close();
    this.#at = at;
    this.#seen = 0;
    if (!sameRun) {
      this.#run = null;
      this.#parts.command.textContent = at.id;
      this.#parts.facts.replaceChildren();
    }
    this.#links();
    this.#lines.clear({ marked: at.line, before: (number) => this.#before(number) });
    this.#load();
    if (at.line === null) this.#follow(`follow=true&lines=${KEPT}`);
    else this.#follow(`since=${Math.max(0, at.line - ABOVE)}&lines=${KEPT}`);
  }

  close() {
    clearTimeout(this.#retry);
    this.#source?.close();
    this.#source = null;
    this.#at = null;
  }

  /** Takes what the list has learned of a run. */
  update(run) {
    if (run.job_run_id !== this.#at?.id) return;
    const first = !this.#run?.started_at;
    this.#run = run;
    this.#facts();
    if (first && this.#source?.readyState === EventSource.OPEN) this.#opened();
  }

  #url(rest) {
    return `/api/job_runs/${encodeURIComponent(this.#at.id)}${rest}`;
  }

  #hash(rest) {
    return `#/run/${encodeURIComponent(this.#at.id)}/${rest}`;
  }

  async #load() {
    const at = this.#at;
    const answer = await fetch(this.#url(""), { cache: "no-store" }).catch(() => null);
    if (answer?.ok && at === this.#at) this.update(await answer.json());
  }

  #follow(query) {
    this.#status("connecting", "Connecting…");
    const source = new EventSource(this.#url(`/logs/${this.#at.view}?format=json&${query}`));
    this.#source = source;
    const on = (name, listen) =>
      source.addEventListener(name, (event) => {
        if (source !== this.#source) return;
        const id = Number.parseInt(event.lastEventId, 10);
        if (id >= 0) this.#seen = id;
        listen(event.data === undefined ? undefined : JSON.parse(event.data));
      });
    on("open", () => this.#opened());
    on("log", (line) => this.#log(line));
    on("gap", (gap) => this.#gap(gap));
    on("complete", (completion) => this.#complete(completion));
    on("eof", () => this.#window());
    on("evicted", (tombstone) => this.#end("gone", `This run was evicted ${format.time(tombstone.evicted_at)}: ${tombstone.reason}`));
    on("shutdown", () => this.#status("reconnecting", "The service is going down. Reconnecting when it is back…"));
    // The name is also that of the browser's own event for a connection that failed, which has no data.
    on("error", (problem) => {
      if (problem) this.#status("reconnecting", `${problem.detail}. Trying again…`);
      else if (source.readyState === EventSource.CLOSED) this.#refused();
      else this.#status("reconnecting", "The connection is lost. Reconnecting…");
    });
  }

  #opened() {
    if (this.#at.line !== null) this.#status("live", "Loading…");
    else if (this.#run) this.#status("live", "Following");
    else this.#status("live", "Waiting for the run to start");
  }

  #log(line) {
    // The event's id is the place in this view; `n` counts within the line's own stream.
    const number = this.#seen;
    const text = line.m ?? this.#decoder.decode(Uint8Array.from(atob(line.b), (c) => c.charCodeAt(0)));
    const time = line.t && `${format.time(line.t)} (${line.t})`;
    const href = this.#hash(`${this.#at.view}/L${number}`);
    this.#lines.add({ number, stream: line.s, text, time, cut: line.cut, href });
    if (!this.#run) {
      // A run that was waited for has started.
      this.#run = { state: "running" };
      this.#load();
    }
  }

  #gap(gap) {
    const why = REASONS[gap.reason] ?? gap.reason;
    const note = `${format.lines(gap.lines)} of ${gap.stream} (${format.bytes(gap.bytes)}) were not kept: ${why}`;
    this.#lines.add({ note, kind: "gap" });
  }

  #complete(completion) {
    if (this.#at.line !== null) return this.#window();
    this.#load();
    this.#onEnd();
    const how = [completion.state, format.ending(completion)].filter(Boolean).join(", ");
    const took = completion.duration_ms === null ? "" : ` after ${format.duration(completion.duration_ms)}`;
    const lost = completion.dropped_bytes ? `; ${format.bytes(completion.dropped_bytes)} were not kept` : "";
    const why = completion.state === "lost" ? "; its writer died before the end" : "";
    return this.#end(completion.state, `The run is over: ${how}${took}${why}${lost}`);
  }

  /** The end of a part of the log that was linked to. */
  #window() {
    this.#load();
    this.#end("idle", `A part of the log, up to line ${format.count(this.#seen)}. `);
    this.#parts["status-text"].append(link(this.#hash(this.#at.view), "Go to the end"));
  }

  #end(state, text) {
    this.#source?.close();
    this.#source = null;
    this.#status(state, text);
  }

  /** The browser gives up on an answer that is not a stream and does not say what it was, so it is asked for. */
  async #refused() {
    const at = this.#at;
    const answer = await fetch(this.#url(""), { cache: "no-store" }).catch(() => null);
    if (at !== this.#at) return;
    if (answer && answer.status >= 400 && answer.status < 500) {
      const problem = await answer.json().catch(() => ({ detail: answer.statusText }));
      this.#end("gone", problem.detail);
      return;
    }
    this.#status("reconnecting", "The service does not answer. Trying again…");
    const rest = at.line === null ? "follow=true" : `lines=${KEPT}`;
    const start = this.#seen || Math.max(0, (at.line ?? 0) - ABOVE);
    this.#retry = setTimeout(() => this.#follow(`${rest}&since=${start}`), RETRY_MS);
  }

  #status(state, text) {
    this.#parts.status.dataset.state = state;
    this.#parts["status-text"].textContent = text;
  }

  /** What stands above the first line that is shown. */
  #before(number) {
    const name = this.#at.view;
    const missing = `${format.lines(number - 1)} before this`;
    if (name === "all") return [`${missing} are in stdout.log and stderr.log`];
    const raw = link(this.#url(`/logs/${name}/raw?since=0&lines=${number - 1}`), `${missing} are in ${name}.log`);
    raw.download = "";
    return [raw];
  }

  #links() {
    for (const tab of this.#parts.tabs.children) {
      const chosen = tab.dataset.view === this.#at.view;
      tab.href = this.#hash(tab.dataset.view);
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
    }
    for (const stream of ["stdout", "stderr"]) this.#parts[`raw-${stream}`].href = this.#url(`/logs/${stream}/raw`);
  }

  #moveTab(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const tabs = [...this.#parts.tabs.children];
    const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
    event.preventDefault();
    next.focus();
    next.click();
  }

  #facts() {
    const run = this.#run;
    if (!run.started_at) return;
    this.#parts.command.textContent = run.command.length ? format.command(run.command) : run.job_run_id;
    document.title = `${run.state} · ${this.#parts.command.textContent}`;
    const badge = document.createElement("span");
    badge.className = `badge ${run.state}`;
    badge.textContent = run.state;
    const facts = [
      ["State", badge],
      ["Ended with", format.ending(run)],
      ["Started", format.time(run.started_at)],
      [run.state === "running" ? "Running for" : "Took", format.runDuration(run)],
      ["Partitions", run.building_partitions.join(", ")],
      ["Host", run.host],
      ["Run", run.job_run_id],
    ];
    this.#parts.facts.replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) => fact(name, value)));
    this.#parts["run-note"].textContent = run.note ?? "";
    this.#parts["run-note"].hidden = !run.note;
  }
}

function fact(name, value) {
  const [group, term, detail] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
  group.dataset.fact = name.toLowerCase();
  term.textContent = name;
  detail.append(value);
  group.append(term, detail);
  return group;
}

function link(href, text) {
  const anchor = document.createElement("a");
  anchor.href = href;
  anchor.textContent = text;
  return anchor;
}
