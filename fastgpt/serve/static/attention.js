// The attention map of one head: a row for each token that attends, a column for each that is attended to.

import { json } from "./api.js";
import { bar, element, labelWidth, svg } from "./words.js";

const SIZES = [16, 32, 64]; // how many tokens a map can show
const MOST = 6; // how many tokens the list has

export class Attention {
  constructor(root, model, failed) {
    this.find = (id) => root.querySelector(`#${id}`);
    this.failed = failed;
    this.text = "";
    const count = (n) => Array.from({ length: n }, (_, i) => i + 1);
    this.#fillSelect("layer", count(model.n_layer ?? 0));
    this.#fillSelect("head", count(model.n_head ?? 0));
    this.#fillSelect("last", SIZES);
    this.find("last").value = matchMedia("(max-width: 44rem)").matches ? 16 : 32;
    if (!model.has_attention) this.say(`A model of kind ${model.kind} has no attention.`);
    else this.#listen();
  }

  say(words) {
    this.find("attention-why").textContent = words;
    this.find("attention-why").hidden = false;
    this.find("attention-panel").hidden = true;
  }

  #fillSelect(id, values, names = values) {
    this.find(id).replaceChildren(...values.map((value, i) => element("option", { value }, String(names[i]))));
  }

  /** Ask the server for the map of `text` and show it. The latest question wins. */
  async load(text = this.text) {
    this.text = text;
    this.asking?.abort();
    this.asking = new AbortController();
    const body = { text, layer: Number(this.find("layer").value), head: Number(this.find("head").value) };
    try {
      this.map = await json("page/attention", body, this.asking.signal);
    } catch (error) {
      if (error.name !== "AbortError") {
        this.say(error.message);
        this.failed(error);
      }
      return;
    }
    this.find("attention-why").hidden = true;
    this.find("attention-panel").hidden = false;
    this.draw();
  }

  /** Draw the last tokens of the map. */
  draw() {
    const n = Math.min(Number(this.find("last").value), this.map.labels.length);
    const skipped = this.map.labels.length - n;
    this.labels = this.map.labels.slice(skipped);
    this.weights = this.map.weights.slice(skipped).map((row) => row.slice(skipped));
    this.numbers = this.labels.map((_, i) => this.map.first + skipped + i); // in the context, counted from 1
    const sameSize = this.row !== undefined && this.row < n;
    this.row = sameSize ? this.row : n - 1;
    this.#fillSelect("query", this.labels.map((_, i) => i), this.labels.map((_, i) => this.#named(i)));
    this.#paint();
    this.at(this.row, this.#strongest(this.row));
    const { layer, head } = this.map;
    this.find("map").ariaLabel = `Attention map of layer ${layer}, head ${head}: arrow keys choose a row and a column`;
  }

  #named = (i) => `${this.labels[i]} (${this.numbers[i]})`;

  #strongest(row) {
    const shares = this.weights[row];
    return shares.indexOf(Math.max(...shares));
  }

  #paint() {
    const n = this.labels.length;
    const width = Math.max(this.find("map").clientWidth, 240);
    const longest = Math.max(...this.labels.map((label) => [...label].length));
    const letter = 7.3; // the width of one at 12 px
    const gutter = 6 + letter * Math.min(longest, 9);
    const cell = Math.min((width - gutter) / n, 30);
    const size = n * cell;
    const isUpright = longest === 1;
    const picture = svg("svg", { viewBox: `0 0 ${gutter + size} ${gutter + size}`, "aria-hidden": "true", focusable: "false" });
    picture.setAttribute("width", gutter + size);
    const font = Math.min(12, Math.max(9, cell - 1));
    const every = Math.ceil(font / cell);
    this.rowNames = [];
    this.columnNames = [];
    for (let i = 0; i < n; i++) {
      const name = [...this.labels[i]].length > 9 ? `${[...this.labels[i]].slice(0, 8).join("")}…` : this.labels[i];
      const middle = gutter + (i + 0.5) * cell;
      const isNamed = i % every === 0;
      const row = svg("text", { x: gutter - 5, y: middle, "text-anchor": "end", "dominant-baseline": "central", "font-size": font }, name);
      const place = isUpright
        ? { x: middle, y: gutter - 5, "text-anchor": "middle" }
        : { transform: `translate(${middle} ${gutter - 5}) rotate(-90)`, "dominant-baseline": "central" };
      const column = svg("text", { ...place, "font-size": font }, name);
      row.dataset.named = column.dataset.named = isNamed;
      this.rowNames.push(row);
      this.columnNames.push(column);
      const seen = this.map.is_causal ? i + 1 : n;
      picture.append(svg("rect", { class: "seen", x: gutter, y: gutter + i * cell, width: seen * cell, height: cell }));
      for (let j = 0; j < seen; j++) {
        const share = this.weights[i][j];
        if (share < 0.0005) continue;
        const gap = cell > 6 ? 0.5 : 0;
        const square = { x: gutter + j * cell + gap, y: gutter + i * cell + gap, width: cell - 2 * gap, height: cell - 2 * gap };
        picture.append(svg("rect", { class: "cell", ...square, "fill-opacity": Math.sqrt(share).toFixed(3) }));
      }
    }
    this.crosses = [svg("rect", { class: "cross" }), svg("rect", { class: "cross" })];
    picture.append(...this.rowNames, ...this.columnNames, ...this.crosses);
    this.geometry = { gutter, cell, n };
    this.find("map").replaceChildren(picture);
  }

  /** Point at a row and a column. */
  at(row, column) {
    const { gutter, cell, n } = this.geometry;
    const [across, one] = this.crosses;
    const set = (rect, x, y, w) => Object.entries({ x, y, width: w, height: cell }).forEach(([k, v]) => rect.setAttribute(k, v));
    set(across, gutter, gutter + row * cell, (this.map.is_causal ? row + 1 : n) * cell);
    set(one, gutter + column * cell, gutter + row * cell, cell);
    for (const [names, at] of [[this.rowNames, row], [this.columnNames, column]]) {
      names.forEach((name, i) => {
        name.classList.toggle("at", i === at);
        // The name that is pointed at makes room for itself.
        name.setAttribute("visibility", i === at || (name.dataset.named === "true" && Math.abs(i - at) * cell > 10) ? "visible" : "hidden");
      });
    }
    [this.pointedRow, this.pointedColumn] = [row, column];
    const share = this.weights[row][column].toFixed(2);
    this.find("map-readout").replaceChildren(
      element("code", {}, this.labels[row]), ` (${this.numbers[row]}) attends `, element("strong", {}, share), " to ",
      element("code", {}, this.labels[column]), ` (${this.numbers[column]})`,
    );
    this.find("query").value = row;
    this.#listMost(row);
  }

  #listMost(row) {
    const order = this.weights[row].map((share, j) => [share, j]).sort((a, b) => b[0] - a[0]);
    const most = order.slice(0, MOST).filter(([share]) => share >= 0.005);
    this.find("most-title").replaceChildren(element("code", {}, this.#named(row)), " attends most to");
    const rows = most.map(([share, j]) => bar("div", this.#named(j), share, share.toFixed(2)));
    labelWidth(this.find("most"), rows);
    this.find("most").replaceChildren(...rows.map((row) => element("li", {}, row)));
    const total = this.weights[row].reduce((sum, share) => sum + share, 0);
    const rest = Math.max(1 - total, 0);
    this.find("map-rest").textContent = rest < 0.005 ? "" : `${rest.toFixed(2)} goes to earlier tokens, which are not shown.`;
  }

  #listen() {
    for (const id of ["layer", "head"]) this.find(id).addEventListener("change", () => this.load());
    this.find("last").addEventListener("change", () => this.draw());
    this.find("query").addEventListener("change", () => {
      this.row = Number(this.find("query").value);
      this.at(this.row, this.#strongest(this.row));
    });
    const map = this.find("map");
    const pointed = (event) => {
      const { gutter, cell, n } = this.geometry;
      const box = map.firstChild.getBoundingClientRect();
      const scale = (gutter + n * cell) / box.width;
      const of = (distance) => Math.floor((distance * scale - gutter) / cell);
      const [row, column] = [of(event.clientY - box.top), of(event.clientX - box.left)];
      const isThere = row >= 0 && row < n && column >= 0 && column < n && (!this.map.is_causal || column <= row);
      return isThere ? [row, column] : null;
    };
    map.addEventListener("pointermove", (event) => {
      const at = pointed(event);
      if (at && (at[0] !== this.pointedRow || at[1] !== this.pointedColumn)) this.at(...at);
    });
    map.addEventListener("click", (event) => {
      const at = pointed(event);
      if (!at) return;
      [this.row] = at;
      this.at(...at);
    });
    map.addEventListener("pointerleave", () => {
      if (this.pointedRow !== this.row) this.at(this.row, this.#strongest(this.row));
    });
    map.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      const n = this.labels.length;
      this.row = Math.min(Math.max(this.pointedRow + move[0], 0), n - 1);
      const last = this.map.is_causal ? this.row : n - 1;
      this.at(this.row, Math.min(Math.max(this.pointedColumn + move[1], 0), last));
    });
    new ResizeObserver(() => {
      if (this.map && !this.find("attention-panel").hidden && map.clientWidth !== this.drawnWidth) {
        this.drawnWidth = map.clientWidth;
        const at = [this.pointedRow, this.pointedColumn];
        this.#paint();
        this.at(...at);
      }
    }).observe(map);
  }
}
