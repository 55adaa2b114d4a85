// The lines on the screen: a bounded number of them, added once a frame, kept at the end unless somebody reads above.

import { render } from "./ansi.js";
import { count } from "./format.js";

/** How many lines are kept. While somebody reads above the end, twice as many. */
export const KEPT = 20_000;

/** Lines are kept in blocks, which the browser lays out only when they are near. */
const BLOCK = 500;
const PER_FRAME = 4_000;

export class Lines {
  #box;
  #toEnd;
  #waiting = [];
  #frame = 0;
  #shown = 0;
  #atEnd = true;
  #top = 0;
  #before = null;
  #marked = null;

  constructor(box, toEnd) {
    this.#box = box;
    this.#toEnd = toEnd;
    box.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    toEnd.addEventListener("click", () => this.jumpToEnd());
  }

  /** Empties the log. `marked` is the number of a line to show, if there is one; `before` makes what stands above the first line. */
  clear({ marked = null, before = null } = {}) {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#waiting = [];
    this.#shown = 0;
    this.#marked = marked;
    this.#before = before;
    this.#box.replaceChildren();
    this.#setAtEnd(marked === null);
  }

  /** Adds a line or a note to what comes with the next frame. */
  add(item) {
    this.#waiting.push(item);
    // A page in the background gets no frames, and must not gather a log in memory meanwhile.
    if (this.#waiting.length > 2 * KEPT) this.#waiting.splice(0, KEPT);
    this.#frame ||= requestAnimationFrame(() => this.#flush());
  }

  jumpToEnd() {
    this.#setAtEnd(true);
    this.#box.scrollTop = this.#box.scrollHeight;
    this.#box.focus({ preventScroll: true });
  }

  #flush() {
    const items = this.#waiting.splice(0, PER_FRAME);
    this.#frame = this.#waiting.length ? requestAnimationFrame(() => this.#flush()) : 0;
    for (const item of items) this.#block().append(item.note === undefined ? line(item) : note(item));
    this.#shown += items.length;
    this.#forget();
    const marked = this.#marked !== null && this.#box.querySelector(`[data-line="${this.#marked}"]`);
    if (marked) {
      this.#marked = null;
      marked.classList.add("marked");
      marked.scrollIntoView({ block: "center" });
    } else if (this.#atEnd) this.#box.scrollTop = this.#box.scrollHeight;
    const last = items.at(-1);
    if (last?.number) this.#box.style.setProperty("--digits", Math.max(4, count(last.number).length));
  }

  #block() {
    let block = this.#box.lastElementChild;
    if (!block?.classList.contains("block") || block.childElementCount >= BLOCK) {
      block = document.createElement("div");
      block.className = "block";
      this.#box.append(block);
    }
    return block;
  }

  #forget() {
    const most = this.#atEnd ? KEPT : 2 * KEPT;
    while (this.#shown > most) {
      const block = this.#box.querySelector(".block");
      this.#shown -= block.childElementCount;
      block.remove();
    }
    const first = this.#box.querySelector(".line");
    const number = Number(first?.dataset.line ?? 1);
    let notice = this.#box.querySelector(".before");
    if (number <= 1 || !this.#before) return;
    if (!notice) {
      notice = document.createElement("p");
      notice.className = "before";
      this.#box.prepend(notice);
    }
    if (notice.dataset.before !== String(number)) {
      notice.dataset.before = number;
      notice.replaceChildren(...this.#before(number));
    }
  }

  #scrolled() {
    // An empty box is at its end, but nobody scrolled there.
    if (!this.#shown || this.#marked !== null) return;
    const { scrollTop, scrollHeight, clientHeight } = this.#box;
    if (scrollHeight - scrollTop - clientHeight < 8) this.#setAtEnd(true);
    else if (scrollTop < this.#top) this.#setAtEnd(false);
    this.#top = scrollTop;
  }

  #setAtEnd(atEnd) {
    this.#atEnd = atEnd;
    this.#toEnd.hidden = atEnd;
  }
}

function line({ number, stream, text, time, cut, href }) {
  const row = document.createElement("div");
  row.className = stream === "stderr" ? "line err" : "line";
  row.dataset.line = number;
  const anchor = document.createElement("a");
  anchor.className = "no";
  anchor.href = href;
  anchor.tabIndex = -1;
  anchor.dataset.no = count(number);
  anchor.setAttribute("aria-label", `Line ${number}`);
  if (time) anchor.title = time;
  const content = document.createElement("span");
  content.className = "text";
  // What a terminal would have overwritten is in the file, and only the last of it here.
  const drawn = text.replace(/\r+$/, "").split("\r");
  render(content, drawn.at(-1));
  if (drawn.length > 1) content.append(mark(`${count(drawn.length - 1)}× redrawn`, "the whole line is in the file"));
  if (cut !== undefined) content.append(mark(`${count(cut)} bytes long`, "only the beginning is shown"));
  row.append(anchor, content);
  return row;
}

function mark(text, title) {
  const span = document.createElement("span");
  span.className = "mark";
  span.dataset.text = text;
  span.title = `${text}; ${title}`;
  return span;
}

function note({ note: text, kind }) {
  const row = document.createElement("p");
  row.className = `hole ${kind}`;
  row.textContent = text;
  return row;
}
