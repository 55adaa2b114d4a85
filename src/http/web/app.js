// The page: a list of runs beside the log of one. Which one is in location.hash: #/run/<id>/<view>[/L<line>].

import { RunList } from "./runs.js";
import { LogPane } from "./log.js";

const VIEWS = ["all", "stdout", "stderr"];
const byId = (id) => document.getElementById(id);

const pane = new LogPane(byId("run"), { onEnd: () => list.refresh() });
const list = new RunList(byId("runs"), {
  onChange: show,
  onUpdate: (run) => pane.update(run),
});

function place() {
  const [, what, id, view, line] = location.hash.split("/");
  if (what !== "run" || !id) return null;
  const number = /^L\d+$/.test(line ?? "") ? Number(line.slice(1)) : null;
  return { id: decodeURIComponent(id), view: VIEWS.includes(view) ? view : "all", line: number };
}

function show() {
  const at = place();
  document.body.classList.toggle("has-run", at !== null);
  byId("run").hidden = at === null;
  byId("empty").hidden = at !== null || !list.isEmpty;
  byId("choose").hidden = at !== null || list.isEmpty;
  list.select(at?.id);
  if (at) pane.open(at);
  else pane.close();
}

window.addEventListener("hashchange", show);
list.refresh().then(show);
