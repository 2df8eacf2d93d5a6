// The loss curve of the run, from the rows of its metrics.jsonl.

import { element, number, svg } from "./words.js";

const HEIGHT = 230;
const MARGIN = { left: 34, right: 42, top: 26, bottom: 34 };

export class Curve {
  constructor(root, answer) {
    this.find = (id) => root.querySelector(`#${id}`);
    this.series = Object.fromEntries(
      ["train", "val"].map((split) => [split, answer.rows.filter((row) => row.split === split && Number.isFinite(row.loss))]),
    );
    const all = [...this.series.train, ...this.series.val];
    if (all.length < 2) {
      this.find("curve-why").textContent = answer.why ?? "This run has no two losses to draw a curve of.";
      return;
    }
    this.last = Math.max(...all.map((row) => row.step));
    this.first = this.#beginning();
    this.steps = [...new Set(all.map((row) => row.step))].filter((step) => step >= this.first).sort((a, b) => a - b);
    this.find("curve-why").hidden = true;
    this.find("curve-figure").hidden = false;
    this.find("curve-words").textContent = this.#inWords();
    this.#listen();
  }

  /** The step of the first evaluation after step 0: the losses before it are so high that they would flatten the rest. */
  #beginning() {
    const later = this.series.val.filter((row) => row.step > 0);
    return later.length > 2 ? later[0].step : 0;
  }

  #inWords() {
    const rows = this.series.val.length > 1 ? this.series.val : this.series.train;
    const [name, unit] = [rows === this.series.val ? "validation" : "training", "nats per token"];
    const least = rows.reduce((a, b) => (b.loss < a.loss ? b : a));
    const end = rows.at(-1);
    const words = `The ${name} loss fell from ${rows[0].loss.toFixed(2)} at step ${number(rows[0].step)} to `;
    const best = least === end ? "" : `, after ${least.loss.toFixed(3)} at step ${number(least.step)}`;
    const cut = this.first > 0 ? ` The curve begins at step ${number(this.first)}.` : "";
    return end.loss < rows[0].loss
      ? `${words}${end.loss.toFixed(3)} ${unit} at step ${number(end.step)}${best}.${cut}`
      : `The ${name} loss is ${end.loss.toFixed(3)} ${unit} at step ${number(end.step)}${best}.${cut}`;
  }

  draw() {
    const width = Math.max(this.find("curve").clientWidth, 220);
    const shown = Object.fromEntries(
      Object.entries(this.series).map(([split, rows]) => [split, rows.filter((row) => row.step >= this.first)]),
    );
    const losses = Object.values(shown).flat().map((row) => row.loss);
    const [low, high] = [Math.min(...losses), Math.max(...losses)];
    const ticks = nice(low, high, 4);
    const [bottom, top] = [Math.min(low, ticks[0]), Math.max(high, ticks.at(-1))];
    const x = (step) => MARGIN.left + ((step - this.first) / (this.last - this.first || 1)) * (width - MARGIN.left - MARGIN.right);
    const y = (loss) => MARGIN.top + ((top - loss) / (top - bottom || 1)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true", focusable: "false" });
    const [left, right, floor] = [MARGIN.left, width - MARGIN.right, HEIGHT - MARGIN.bottom];
    for (const tick of ticks) {
      picture.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }));
      picture.append(svg("text", { x: left - 6, y: y(tick), "text-anchor": "end", "dominant-baseline": "central" }, tick.toFixed(decimals(ticks))));
    }
    for (const tick of nice(this.first, this.last, width < 420 ? 3 : 5)) {
      if (tick < this.first || tick > this.last) continue;
      picture.append(svg("text", { x: x(tick), y: floor + 15, "text-anchor": "middle" }, short(tick)));
    }
    picture.append(svg("line", { class: "axis", x1: left, x2: right, y1: floor, y2: floor }));
    picture.append(svg("text", { x: (left + right) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, "step"));
    picture.append(svg("text", { x: 0, y: 10 }, "loss, nats per token"));
    const ends = [];
    for (const [split, rows] of Object.entries(shown)) {
      if (!rows.length) continue;
      const path = rows.map((row, i) => `${i ? "L" : "M"}${x(row.step).toFixed(1)} ${y(row.loss).toFixed(1)}`).join("");
      picture.append(svg("path", { class: split, d: path }));
      if (split === "val" && rows.length <= 40) {
        for (const row of rows) picture.append(svg("circle", { class: split, cx: x(row.step), cy: y(row.loss), r: 2.25 }));
      }
      ends.push({ split, at: y(rows.at(-1).loss) });
    }
    ends.sort((a, b) => a.at - b.at);
    if (ends.length === 2 && ends[1].at - ends[0].at < 14) {
      const middle = Math.min((ends[0].at + ends[1].at) / 2, floor - 8);
      [ends[0].at, ends[1].at] = [middle - 7, middle + 7];
    }
    for (const { split, at } of ends) picture.append(svg("text", { class: split, x: right + 6, y: at, "dominant-baseline": "central" }, split));
    this.rule = svg("line", { class: "rule", y1: MARGIN.top, y2: floor, visibility: "hidden" });
    this.dots = ["train", "val"].map((split) => svg("circle", { class: split, r: 3.5, visibility: "hidden" }));
    picture.append(this.rule, ...this.dots);
    this.tooltip = element("div", { className: "tooltip", hidden: true });
    this.scale = { x, y, width };
    this.find("curve").replaceChildren(picture, this.tooltip);
  }

  /** Show the losses at the step with that number in `steps`: of each split the last one that was known then. */
  at(i) {
    this.index = i;
    const step = this.steps[i];
    const { x, y, width } = this.scale;
    const lines = [];
    ["train", "val"].forEach((split, k) => {
      const row = this.series[split].findLast((candidate) => candidate.step <= step && candidate.step >= this.first);
      this.dots[k].setAttribute("visibility", row ? "visible" : "hidden");
      if (!row) return;
      this.dots[k].setAttribute("cx", x(row.step));
      this.dots[k].setAttribute("cy", y(row.loss));
      lines.push(`${split} ${row.loss.toFixed(3)}${row.step === step ? "" : ` (step ${number(row.step)})`}`);
    });
    for (const side of ["x1", "x2"]) this.rule.setAttribute(side, x(step));
    this.rule.setAttribute("visibility", "visible");
    this.tooltip.replaceChildren(element("strong", {}, `step ${number(step)}`), ...lines.map((line) => element("div", {}, line)));
    this.tooltip.hidden = false;
    const isRight = x(step) > width / 2;
    this.tooltip.style.left = isRight ? "auto" : `${x(step) + 10}px`;
    this.tooltip.style.right = isRight ? `${width - x(step) + 10}px` : "auto";
    return `step ${number(step)}: ${lines.join(", ")}`;
  }

  hide() {
    for (const mark of [this.rule, ...this.dots]) mark.setAttribute("visibility", "hidden");
    this.tooltip.hidden = true;
  }

  #listen() {
    const chart = this.find("curve");
    new ResizeObserver(() => {
      if (chart.clientWidth === this.scale?.width) return;
      this.draw();
    }).observe(chart);
    this.draw();
    chart.addEventListener("pointermove", (event) => {
      const at = event.clientX - chart.getBoundingClientRect().left;
      const distances = this.steps.map((step) => Math.abs(this.scale.x(step) - at));
      this.at(distances.indexOf(Math.min(...distances)));
    });
    chart.addEventListener("pointerleave", () => this.hide());
    chart.addEventListener("blur", () => this.hide());
    chart.addEventListener("keydown", (event) => {
      const last = this.steps.length - 1;
      const from = this.index ?? last;
      const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.find("curve-readout").textContent = this.at(Math.min(Math.max(to, 0), last));
    });
  }
}

/** About `n` round numbers between `low` and `high`. */
function nice(low, high, n) {
  const rough = (high - low || 1) / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step + 0); // -0 + 0 is 0
  return ticks;
}

const decimals = (ticks) => (ticks.every((tick) => Math.abs(tick * 10 - Math.round(tick * 10)) < 1e-6) ? 1 : 2);
const short = (step) => (step >= 10000 ? `${number(step / 1000)}k` : number(step));
