// Times, lengths and commands as people read them.

const number = new Intl.NumberFormat("en");
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const date = new Intl.DateTimeFormat(undefined, { year: "numeric", month: "short", day: "numeric" });

export const count = (value) => number.format(value);

export const lines = (value) => `${count(value)} ${value === 1 ? "line" : "lines"}`;

export function bytes(value) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(1)} ${units[unit]}`;
}

export function duration(ms) {
  if (ms < 1000) return `${Math.max(0, Math.round(ms))} ms`;
  const s = Math.floor(ms / 1000);
  if (s < 60) return `${(ms / 1000).toFixed(1)} s`;
  const two = (n) => String(n).padStart(2, "0");
  if (s < 3600) return `${Math.floor(s / 60)}:${two(s % 60)} min`;
  return `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)} h`;
}

/** A time of today by the clock, any other with its date. */
export function time(text) {
  const at = new Date(text);
  const today = date.format(at) === date.format(new Date());
  return today ? clock.format(at) : `${date.format(at)}, ${clock.format(at)}`;
}

/** How long a run took, or has taken so far. */
export function runDuration(run) {
  const ms = run.duration_ms ?? Date.now() - new Date(run.started_at).getTime();
  return duration(ms);
}

/** A command as one could type it. */
export function command(words) {
  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
  return words.map(quoted).join(" ");
}

/** "exit code 3", "signal 9", or nothing while that is not known. */
export function ending(run) {
  if (run.signal != null) return `signal ${run.signal}`;
  if (run.exit_code != null) return `exit code ${run.exit_code}`;
  return "";
}
