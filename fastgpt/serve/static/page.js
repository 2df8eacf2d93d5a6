// The page of `fastgpt serve`: it wires the form, the text, the attention map and the loss curve together.

import { events, json, rememberToken, ServerError } from "./api.js";
import { Attention } from "./attention.js";
import { Curve } from "./curve.js";
import { Text } from "./text.js";
import { element, number } from "./words.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["temperature", "top_p", "repetition_penalty", "top_k", "max_tokens", "seed", "stop-text"];
const ALTERNATIVES = 5; // as many as OpenAI's completions give

let model = null; // what the server says of it
let ready = null; // a promise: whether it has said so
let attention = null;
let running = null; // the AbortController of the generation that is going on
const text = new Text($("output"), $("alternatives"), goOnWith);

// ---- the model, and what the page knows of its run ----

/** Returns whether the server has said what it serves. */
async function start() {
  try {
    model = await json("page/model");
  } catch (error) {
    show(error);
    return false;
  }
  $("access").hidden = true;
  $("problem").hidden = true;
  const { name, kind, parameters } = model;
  document.title = `${name} – FastGPT`;
  $("model-name").textContent = name;
  $("model-summary").textContent = `${kind} of ${number(parameters)} parameters, on ${model.device}`;
  $("facts").replaceChildren(...model.facts.flatMap(([term, fact]) => [element("dt", {}, term), element("dd", {}, fact)]));
  text.end = model.end;
  $("prompt-hint").textContent = model.prompt_hint;
  if (model.max_tokens) $("max_tokens").max = model.max_tokens;
  attention = new Attention(document, model, askForToken);
  json("page/curve").then((answer) => new Curve(document, answer), (error) => ($("curve-why").textContent = error.message));
  return true;
}

// ---- settings, which are in the address ----

const defaults = Object.fromEntries(SETTINGS.map((id) => [id, $(id).defaultValue]));

function readAddress() {
  const found = new URLSearchParams(location.hash.slice(1));
  $("prompt").value = found.get("prompt") ?? "";
  for (const id of SETTINGS) $(id).value = found.get(id) ?? defaults[id];
  showOutputs();
}

function writeAddress() {
  const kept = new URLSearchParams();
  if ($("prompt").value) kept.set("prompt", $("prompt").value);
  for (const id of SETTINGS) if ($(id).value !== defaults[id]) kept.set(id, $(id).value);
  history.replaceState(null, "", `#${kept}`);
  showOutputs();
}

function showOutputs() {
  for (const output of document.querySelectorAll("#settings output")) {
    output.value = Number($(output.htmlFor.value).value).toFixed(2);
  }
}

/** The body of a request, without the prompt. */
function asked() {
  const optional = (name) => ($(name).value === "" ? {} : { [name]: Number($(name).value) });
  const stop = $("stop-text").value.replaceAll("\\n", "\n");
  return {
    model: model.name,
    max_tokens: Number($("max_tokens").value),
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    repetition_penalty: Number($("repetition_penalty").value),
    ...optional("top_k"),
    seed: $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value),
    ...(stop && { stop }),
    logprobs: ALTERNATIVES,
  };
}

// ---- generation ----

/** The end of `whole` that the model sees: a longer prompt would be refused. No text has more tokens than bytes. */
async function fitting(whole, signal) {
  const isShort = model.context_size === null || new TextEncoder().encode(whole).length <= model.context_size;
  return isShort ? whole : (await json("page/context", { text: whole }, signal)).text;
}

async function generate() {
  if (!(await ready) && !(await (ready = start()))) return;
  stop();
  text.clear($("prompt").value || model.prompt);
  return run();
}

/** Go on with another token in place of piece `i`. */
function goOnWith(i, token) {
  stop();
  text.cut(i);
  text.push(token.text, { tokens: [token.text], token_logprobs: [token.logprob], top_logprobs: [Object.fromEntries(token.top)] });
  $("output").lastChild.focus({ preventScroll: true });
  text.hide();
  return run();
}

/** Continue all the text that is shown. */
async function run() {
  if (!$("settings").reportValidity()) return;
  const body = asked();
  const mine = (running = new AbortController());
  const began = performance.now();
  const before = text.tokenCount;
  let reason = "stopped";
  busy(true);
  $("status").textContent = "Generating";
  $("announcement").textContent = "Generating";
  try {
    body.prompt = await fitting(text.whole, mine.signal);
    for await (const event of events(body, mine.signal)) {
      if (mine.signal.aborted) break;
      const [choice] = event.choices;
      if (!choice) continue; // what counts the tokens
      text.push(choice.text, choice.logprobs);
      reason = choice.finish_reason ?? reason;
      report(text.tokenCount - before, began, body.seed, "");
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      reason = "error";
      show(error);
    }
  }
  if (running !== mine) return; // another one has begun, which has the text now
  running = null;
  text.finish();
  busy(false);
  finished(text.tokenCount - before, began, body.seed, reason);
}

const ENDS = { length: "", stop: "ended by itself or at the stop text", stopped: "stopped", error: "not finished" };

function report(n, began, seed, end) {
  const seconds = (performance.now() - began) / 1000;
  const parts = [`${number(n)} token${n === 1 ? "" : "s"}`, `${seconds.toFixed(1)} s`, `${(n / seconds).toFixed(0)} tokens/s`, `seed ${seed}`];
  $("status").textContent = parts.concat(end || []).join(" · ");
}

function finished(n, began, seed, reason) {
  report(n, began, seed, ENDS[reason]);
  $("keep-seed").hidden = $("seed").value !== "" || n === 0;
  $("keep-seed").onclick = () => {
    $("seed").value = seed;
    $("keep-seed").hidden = true;
    writeAddress();
  };
  $("announcement").textContent = reason === "error" && !n ? "" : `Finished, ${$("status").textContent}. ${text.written}`;
  if (text.whole && model.has_attention && n) attention.load(text.whole);
}

function stop() {
  running?.abort();
}

function busy(isBusy) {
  $("output").ariaBusy = String(isBusy);
  $("stop").disabled = !isBusy;
  $("output-empty").hidden = true;
  const hasText = text.pieces.length > 0;
  $("continue").disabled = isBusy || !hasText;
  $("copy").hidden = isBusy || !hasText;
  if (isBusy) {
    $("keep-seed").hidden = true;
    $("problem").hidden = true;
  }
}

/** Say what went wrong; ask for a token where one is missing. */
function show(error) {
  const isKnown = error instanceof ServerError;
  if (!isKnown) console.error(error);
  $("problem").textContent = isKnown ? error.message : `The page failed: ${error.message}`;
  $("problem").hidden = false;
  askForToken(error);
}

function askForToken(error) {
  if (error.status !== 401) return;
  $("access").hidden = false;
  $("token").focus();
}

// ---- what is pressed ----

// Its link would change the part of the address that has the settings.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("prompt").focus();
});
$("generate").addEventListener("click", generate);
$("stop").addEventListener("click", stop);
$("continue").addEventListener("click", run);
$("copy").addEventListener("click", async () => {
  let said = "Copied";
  try {
    await navigator.clipboard.writeText(text.whole);
  } catch {
    // Browsers have a clipboard only for pages of this machine, and for those that come by TLS.
    getSelection().selectAllChildren($("output"));
    said = "Selected: copy it by the keyboard";
  }
  $("announcement").textContent = $("copy").textContent = said;
  setTimeout(() => ($("copy").textContent = "Copy text"), 2500);
});
$("colour").addEventListener("change", () => $("output").classList.toggle("coloured", $("colour").checked));
$("prompt").addEventListener("input", writeAddress);
$("settings").addEventListener("input", writeAddress);
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("attention-form").addEventListener("submit", (event) => event.preventDefault());
$("access-form").addEventListener("submit", (event) => {
  event.preventDefault();
  rememberToken($("token").value);
  $("token").value = "";
  ready = start();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape" && !text.escape()) stop();
});
window.addEventListener("hashchange", readAddress);

readAddress();
ready = start();
