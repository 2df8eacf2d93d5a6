// The text that is shown: the prompt, and pieces of what the model wrote, each with its tokens' probabilities.
//
// A piece is one token, or several that make one character. All pieces are one stop of the Tab key; the arrow keys move
// between them, Enter goes on to the alternatives, and Escape comes back.

import { bar, element, labelWidth, percent, spoken, visible } from "./words.js";

const STEPS = [0.5, 0.25, 0.1, 0.01]; // a probability below the first is coloured, below the last most strongly

export class Text {
  /** `choose(number, token)` is called where a reader wants another token in place of piece `number`. */
  constructor(output, panel, choose) {
    this.output = output;
    this.panel = panel;
    this.choose = choose;
    this.list = panel.querySelector("ol");
    this.title = panel.querySelector(".title");
    this.note = panel.querySelector(".hint");
    this.end = null; // the token that ends a text, which is no text itself
    this.clear("");
    this.#listen();
  }

  clear(given) {
    this.pieces = [];
    this.waiting = { text: "", tokens: [] }; // what came and makes no whole piece yet
    this.given = given;
    this.output.replaceChildren(element("span", { className: "given", role: "none" }, given));
    this.hide();
  }

  /** All that is shown: what a model goes on from. */
  get whole() {
    return this.given + this.written;
  }

  get written() {
    return this.pieces.map((piece) => piece.text).join("") + this.waiting.text;
  }

  get tokenCount() {
    return this.pieces.reduce((sum, piece) => sum + piece.tokens.length, this.waiting.tokens.length);
  }

  /** Keep the first `n` pieces. */
  cut(n) {
    this.hide();
    this.waiting = { text: "", tokens: [] };
    for (const piece of this.pieces.splice(n)) piece.span.remove();
  }

  /** What one event brings: text, and the tokens it is made of, as OpenAI's completions have them. */
  push(text, logprobs) {
    this.waiting.text += text;
    (logprobs?.tokens ?? []).forEach((token, i) => {
      const top = Object.entries(logprobs.top_logprobs?.[i] ?? {});
      top.sort((a, b) => b[1] - a[1]);
      this.waiting.tokens.push({ text: token, logprob: logprobs.token_logprobs?.[i] ?? null, top });
    });
    this.#settle();
  }

  /** No more is coming. */
  finish() {
    if (this.waiting.text) this.#add(this.waiting.text, this.waiting.tokens);
    this.waiting = { text: "", tokens: [] };
  }

  /** Make pieces of what waits: a token whose text begins what has come is one. */
  #settle() {
    const { waiting } = this;
    while (waiting.tokens.length && waiting.text) {
      const [token] = waiting.tokens;
      if (token.text && waiting.text.startsWith(token.text)) {
        waiting.text = waiting.text.slice(token.text.length);
        this.#add(token.text, [waiting.tokens.shift()]);
      } else {
        // A part of a character: the text of all its parts comes with the last one.
        this.#add(waiting.text, waiting.tokens);
        this.waiting = { text: "", tokens: [] };
        return;
      }
    }
    if (!waiting.tokens.length && waiting.text) {
      this.#add(waiting.text, []); // from a server that gives no probabilities
      waiting.text = "";
    }
  }

  #add(text, tokens) {
    const span = element("span", { role: "option", tabIndex: this.pieces.length ? -1 : 0 }, text);
    const known = tokens.length && tokens.every((token) => token.logprob !== null);
    const logprob = known ? tokens.reduce((sum, token) => sum + token.logprob, 0) : null;
    const step = known ? STEPS.filter((limit) => Math.exp(logprob) < limit).length + 1 : 0;
    span.className = `token p${step}${text.startsWith("\n") ? " breaks" : ""}`;
    span.ariaLabel = spoken(text) + (known ? `, ${percent(logprob)}` : "");
    span.ariaSelected = "false";
    this.pieces.push({ text, tokens, logprob, span });
    this.output.append(span);
  }

  // ---- the alternatives of a piece ----

  show(i, isPinned = false) {
    const piece = this.pieces[i];
    this.pieces[this.shown]?.span.classList.remove("shown");
    this.shown = i;
    this.isPinned = isPinned || (this.isPinned && this.shown === i);
    piece.span.classList.add("shown");
    this.#fill(piece, i);
    this.panel.hidden = false;
    this.#place(piece.span);
  }

  hide() {
    clearTimeout(this.hiding);
    this.pieces?.[this.shown]?.span.classList.remove("shown");
    this.shown = null;
    this.isPinned = false;
    this.panel.hidden = true;
  }

  #fill(piece, i) {
    this.title.replaceChildren(element("code", {}, visible(piece.text)));
    this.title.append(piece.logprob === null ? "probability unknown" : `probability ${percent(piece.logprob)}`);
    this.title.append(element("span", {}, `${i + 1} of ${this.pieces.length}`));
    const rows = piece.tokens.flatMap((token) => this.#rows(token, i, piece.tokens.length === 1));
    labelWidth(this.list, rows);
    this.list.replaceChildren(...rows.map((row) => element("li", {}, row)));
    const canChoose = rows.some((row) => row.localName === "button");
    this.note.textContent = canChoose
      ? "Choose another to go on from there. These are the model’s own probabilities, before the settings."
      : "These are the model’s own probabilities, before the settings.";
  }

  #rows(token, i, isAlone) {
    const all = token.top.some(([text]) => text === token.text) ? token.top : [...token.top, [token.text, token.logprob]];
    return all.map(([text, logprob]) => {
      const isDrawn = text === token.text;
      const isPart = text.startsWith("bytes:") || text.includes("\ufffd"); // of a character
      const isText = text !== "" && text !== this.end && !isPart;
      const row = bar(isDrawn || !isAlone || !isText ? "div" : "button", visible(text), Math.exp(logprob), percent(logprob));
      row.classList.toggle("drawn", isDrawn);
      if (row.localName === "button") {
        row.type = "button";
        row.ariaLabel = `${spoken(text)}, ${percent(logprob)}: go on with it`;
        row.addEventListener("click", () => this.choose(i, { text, logprob, top: all }));
      }
      return row;
    });
  }

  /** Below the piece, or above it where the window ends. A narrow screen has it at its bottom, by the style sheet. */
  #place(span) {
    const frame = this.output.parentElement.getBoundingClientRect();
    const [first] = span.getClientRects();
    const at = first ?? span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.panel;
    const left = Math.min(Math.max(at.left - frame.left - 16, 0), frame.width - width);
    const fits = at.bottom + height + 12 < window.innerHeight || at.top < height + 12;
    this.panel.style.left = `${left}px`;
    this.panel.style.top = `${fits ? at.bottom - frame.top + 6 : at.top - frame.top - height - 6}px`;
  }

  // ---- pointer and keys ----

  #listen() {
    const { output, panel } = this;
    const numberOf = (target) => this.pieces.findIndex((piece) => piece.span === target.closest?.(".token"));
    const hideSoon = () => {
      if (this.isPinned || output.contains(document.activeElement)) return;
      clearTimeout(this.hiding);
      this.hiding = setTimeout(() => this.hide(), 200); // time to move the pointer onto the panel
    };
    output.addEventListener("pointerover", (event) => {
      const i = numberOf(event.target);
      if (i < 0 || this.isPinned) return;
      clearTimeout(this.hiding);
      this.show(i);
    });
    output.addEventListener("pointerleave", hideSoon);
    panel.querySelector(".close").addEventListener("click", () => this.escape());
    panel.addEventListener("pointerenter", () => clearTimeout(this.hiding));
    panel.addEventListener("pointerleave", hideSoon);
    output.addEventListener("focusin", (event) => {
      const i = numberOf(event.target);
      if (i >= 0) this.#enter(i);
    });
    output.addEventListener("click", (event) => {
      const i = numberOf(event.target);
      if (i < 0) return;
      this.pieces[i].span.focus({ preventScroll: true });
      this.show(i, true);
    });
    output.addEventListener("keydown", (event) => this.#key(event, numberOf(event.target)));
    document.addEventListener("pointerdown", (event) => {
      if (!output.contains(event.target) && !panel.contains(event.target)) this.hide();
    });
    for (const part of [output, panel]) {
      part.addEventListener("focusout", (event) => {
        const next = event.relatedTarget;
        if (next && !output.contains(next) && !panel.contains(next)) this.hide();
      });
    }
  }

  #enter(i) {
    for (const piece of this.pieces) if (piece.span.tabIndex === 0) piece.span.tabIndex = -1;
    this.output.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    this.pieces[i].span.tabIndex = 0;
    this.pieces[i].span.ariaSelected = "true";
    clearTimeout(this.hiding);
    this.isPinned = false;
    this.show(i);
  }

  #key(event, i) {
    if (i < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const last = this.pieces.length - 1;
    const to = {
      ArrowRight: () => Math.min(i + 1, last),
      ArrowLeft: () => Math.max(i - 1, 0),
      ArrowDown: () => this.#inLine(i, 1),
      ArrowUp: () => this.#inLine(i, -1),
      Home: () => 0,
      End: () => last,
    }[event.key];
    if (to) this.pieces[to()].span.focus();
    else if (event.key === "Enter" || event.key === " ") {
      if (this.panel.hidden) this.show(i);
      this.list.querySelector("button")?.focus();
    } else return;
    event.preventDefault();
  }

  /** The number of the piece above (-1) or below (1) piece `i`. */
  #inLine(i, direction) {
    const box = (k) => this.pieces[k].span.getBoundingClientRect();
    const start = box(i);
    let line = null;
    let best = i;
    for (let k = i + direction; k >= 0 && k < this.pieces.length; k += direction) {
      const at = box(k);
      if (line === null && Math.abs(at.bottom - start.bottom) < 2) continue;
      line ??= at.bottom;
      if (Math.abs(at.bottom - line) > 2) break;
      if (best === i || Math.abs(at.left - start.left) < Math.abs(box(best).left - start.left)) best = k;
    }
    return best;
  }

  /** Escape: from the alternatives back to their piece, or away with them. Returns whether there were any. */
  escape() {
    if (this.panel.hidden) return false;
    const { span } = this.pieces[this.shown];
    const wasInside = this.panel.contains(document.activeElement);
    if (wasInside) span.focus();
    this.hide();
    return true;
  }
}
