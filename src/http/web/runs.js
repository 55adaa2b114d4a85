// The list of runs, newest first. Its newest page is asked for again every few seconds while somebody looks.

import * as format from "./format.js";

const PAGE = 50;
const REFRESH_MS = 3_000;

export class RunList {
  #box;
  #on;
  #runs = new Map();
  #items = new Map();
  #next = null;
  #pages = 0;
  #selected;
  #loaded = false;
  #filter = document.getElementById("filter");
  #more = document.getElementById("more");
  #note = document.getElementById("list-note");

  /** `onChange` is called when the list becomes empty or is so no more, `onUpdate` with every run that was learned of. */
  constructor(box, { onChange, onUpdate }) {
    this.#box = box;
    this.#on = { onChange, onUpdate };
    this.#more.addEventListener("click", () => this.#loadMore());
    this.#filter.addEventListener("change", () => {
      this.#runs.clear();
      this.#pages = 0;
      this.refresh();
    });
    setInterval(() => !document.hidden && this.refresh(), REFRESH_MS);
    setInterval(() => this.#tick(), 1_000);
    document.addEventListener("visibilitychange", () => !document.hidden && this.refresh());
  }

  /** Whether no run has been recorded at all. */
  get isEmpty() {
    return this.#loaded && this.#runs.size === 0 && !this.#filter.value;
  }

  select(id) {
    this.#selected = id;
    for (const [key, item] of this.#items) item.link.setAttribute("aria-current", key === id ? "true" : "false");
  }

  async refresh() {
    const page = await this.#fetch();
    if (!page) return;
    const wasEmpty = this.isEmpty;
    if (this.#pages <= 1) {
      // The whole list: what is not in it any more goes.
      this.#runs = new Map();
      this.#next = page.next;
      this.#pages = 1;
    }
    const newest = new Map(page.runs.map((run) => [run.job_run_id, run]));
    this.#runs = new Map([...newest, ...[...this.#runs].filter(([id]) => !newest.has(id))]);
    this.#show(page.runs);
    if (wasEmpty !== this.isEmpty) this.#on.onChange();
  }

  async #loadMore() {
    const page = await this.#fetch(this.#next);
    if (!page) return;
    this.#pages += 1;
    this.#next = page.next;
    for (const run of page.runs) this.#runs.set(run.job_run_id, run);
    this.#show(page.runs);
  }

  async #fetch(cursor) {
    const query = new URLSearchParams({ limit: PAGE });
    const state = this.#filter.value;
    if (state) query.set("state", state);
    if (cursor) query.set("cursor", cursor);
    const answer = await fetch(`/api/job_runs?${query}`, { cache: "no-store" }).catch(() => null);
    if (state !== this.#filter.value) return null;
    if (answer?.ok) {
      const page = await answer.json();
      this.#loaded = true;
      this.#say("");
      return page;
    }
    const problem = await answer?.json().catch(() => null);
    this.#say(problem?.detail ?? "The service does not answer; this list may be old.");
    return null;
  }

  #say(text) {
    this.#note.textContent = text;
    this.#note.hidden = !text;
  }

  #show(learned) {
    for (const run of learned) this.#on.onUpdate(run);
    const items = [...this.#runs.values()].map((run) => this.#item(run));
    // Elements that are in their place stay untouched, so a focus or a selection in the list survives.
    items.forEach((item, index) => {
      if (this.#box.children[index] !== item) this.#box.insertBefore(item, this.#box.children[index] ?? null);
    });
    while (this.#box.children.length > items.length) this.#box.lastElementChild.remove();
    for (const id of this.#items.keys()) if (!this.#runs.has(id)) this.#items.delete(id);
    this.#more.hidden = !this.#next;
    if (!items.length && this.#filter.value) this.#say(`No run is ${this.#filter.value}.`);
    this.select(this.#selected);
  }

  #item(run) {
    const id = run.job_run_id;
    let item = this.#items.get(id);
    if (!item) {
      item = build(id);
      this.#items.set(id, item);
    }
    const { badge, command, partitions, started, took } = item;
    put(badge, run.state);
    badge.className = `badge ${run.state}`;
    badge.title = format.ending(run);
    put(command, run.command.length ? format.command(run.command) : id);
    command.title = command.textContent;
    put(partitions, run.building_partitions.join(", "));
    put(started, format.time(run.started_at));
    put(took, format.runDuration(run));
    return item.element;
  }

  #tick() {
    for (const run of this.#runs.values()) {
      if (run.state === "running") put(this.#items.get(run.job_run_id).took, format.runDuration(run));
    }
  }
}

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function build(id) {
  const make = (tag, name) => Object.assign(document.createElement(tag), { className: name });
  const element = document.createElement("li");
  const link = make("a", "item");
  link.href = `#/run/${encodeURIComponent(id)}`;
  const parts = { badge: make("span", "badge"), command: make("span", "command"), id: make("span", "id") };
  const more = { partitions: make("span", "partitions"), started: make("span", "started"), took: make("span", "took") };
  parts.id.textContent = id;
  link.append(parts.command, parts.badge, more.partitions, parts.id, more.started, more.took);
  element.append(link);
  return { element, link, ...parts, ...more };
}
