// Elements, numbers and tokens as readers see them. Text of the model becomes text nodes, never markup.

/** A new element with properties and children; a string is a text node. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** A new element of SVG with attributes, and a text. */
export function svg(name, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

const SIGNS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\u0003": "␃" };
const NAMES = { " ": "space", "\n": "line break", "\t": "tab", "\u0003": "end of text", "": "nothing" };

/** A token with its blanks as signs: ␣the. */
export const visible = (text) => text.replace(/[ \n\t\u0003]/g, (blank) => SIGNS[blank]) || "(nothing)";

/** A token for a screen reader, which says nothing at a blank. */
export const spoken = (text) => NAMES[text] ?? text.replaceAll("\n", " line break ");

/** A probability, from its logarithm. */
export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share > 99.9 && share < 99.99) return "99.9 %";
  return share < 0.1 ? "< 0.1 %" : `${share.toFixed(1)} %`;
}

export const number = (value) => value.toLocaleString("en");

/** A row of a label, a bar and a number. `name` is button or div, `share` between 0 and 1. */
export function bar(name, label, share, figure) {
  const part = element("i", { ariaHidden: "true" });
  part.style.setProperty("--share", share);
  return element(name, { className: "bar" }, element("b", {}, label), part, element("span", {}, figure));
}

/** Let the labels of these rows in `list` be as wide as the longest one, up to a limit. */
export function labelWidth(list, rows) {
  const longest = Math.max(0, ...rows.map((row) => [...row.firstChild.textContent].length));
  list.style.setProperty("--label", `${Math.min(longest + 2.5, 13) * 0.55}rem`);
}
