// A line's text as nodes: SGR colours become spans with classes, every other escape sequence is left out, and what is
// left is text and nothing but text. Colours end with their line.

// CSI (its parameters and final byte captured), OSC up to BEL or ST, and two-byte escapes.
const ESCAPE = /\x1b(?:\[([0-?]*)[ -/]*([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])/g;
const CONTROL = /[\0-\x08\x0a-\x1f\x7f]/g;

const visible = (text) =>
  text.replace(CONTROL, (c) => (c === "\x7f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0))));

const ON = { 1: "bold", 2: "dim", 3: "italic", 4: "underline", 7: "inverse", 9: "strike" };
const OFF = { 22: ["bold", "dim"], 23: ["italic"], 24: ["underline"], 27: ["inverse"], 29: ["strike"] };

function apply(style, parameters) {
  const codes = parameters.split(/[;:]/).map((code) => Number(code || 0));
  for (let i = 0; i < codes.length; i += 1) {
    const code = codes[i];
    if (code === 0) {
      style.flags.clear();
      style.fg = style.bg = null;
    } else if (ON[code]) style.flags.add(ON[code]);
    else if (OFF[code]) OFF[code].forEach((flag) => style.flags.delete(flag));
    else if (code === 39) style.fg = null;
    else if (code === 49) style.bg = null;
    else if (code >= 30 && code <= 37) style.fg = code - 30;
    else if (code >= 90 && code <= 97) style.fg = code - 82;
    else if (code >= 40 && code <= 47) style.bg = code - 40;
    else if (code >= 100 && code <= 107) style.bg = code - 92;
    else if (code === 38 || code === 48) {
      // 38;5;n is one of 256 colours, of which the first 16 have names here; 38;2;r;g;b is any colour.
      const colour = codes[i + 1] === 5 && codes[i + 2] < 16 ? codes[i + 2] : null;
      style[code === 38 ? "fg" : "bg"] = colour;
      i += codes[i + 1] === 5 ? 2 : 4;
    }
  }
}

function classes(style) {
  const names = [...style.flags];
  if (style.fg !== null) names.push(`fg${style.fg}`);
  if (style.bg !== null) names.push(`bg${style.bg}`);
  return names.join(" ");
}

/** Puts a line's text into an element. */
export function render(element, text) {
  if (!text.includes("\x1b")) {
    element.textContent = visible(text);
    return;
  }
  const style = { flags: new Set(), fg: null, bg: null };
  let from = 0;
  const put = (piece) => {
    if (!piece) return;
    const names = classes(style);
    const node = names ? document.createElement("span") : document.createTextNode("");
    if (names) node.className = names;
    node.textContent = visible(piece);
    element.append(node);
  };
  for (const match of text.matchAll(ESCAPE)) {
    put(text.slice(from, match.index));
    from = match.index + match[0].length;
    if (match[2] === "m") apply(style, match[1]);
  }
  put(text.slice(from));
}
