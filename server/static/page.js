// The playground: asks POST /generate and shows what comes. What a model wrote becomes text nodes,
// never HTML; the page's Content-Security-Policy would refuse it.

import { plot } from "./plot.js";
import { hideTip, tokenElement } from "./tokens.js";

const ALTERNATIVES = 5;
const SHOWN_EVERY = 60; // milliseconds
const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/; // as JSON has it

const $ = (id) => document.getElementById(id);
const form = $("form");
const promptBox = form.elements.prompt;

let running = null; // the AbortController of what runs
let runs = [];
let model = null; // what the server says of it

// --- asking -------------------------------------------------------------------------------------

/** An error as the server gave it: status, code, message, field. */
class Refusal extends Error {
  constructor(status, { code, message, field }) {
    super(message);
    Object.assign(this, { status, code, field });
  }
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

/** A POST, or without a body a GET. Throws Refusal. */
async function ask(path, body, signal) {
  const method = body === undefined ? "GET" : "POST";
  const response = await fetch(path, { method, headers: headers(), body, signal });
  if (response.ok) return response;
  if (response.status === 401) $("key-field").hidden = false;
  const text = await response.text();
  let error;
  try {
    error = JSON.parse(text).error;
  } catch {
    error = { code: "no_json", message: `HTTP ${response.status}: ${text.slice(0, 200)}` };
  }
  throw new Refusal(response.status, error);
}

/** What has been typed, as JSON. A number keeps its digits (a seed may have more than a double
 *  holds), and what is none goes as a text: the server says what is wrong with it. */
function json({ value, inputMode }) {
  const text = value.trim().replace(/^(-?)\./, "$10.");
  return inputMode && NUMBER.test(text) ? text : JSON.stringify(text);
}

const object = (pairs) => `{${pairs.map(([name, value]) => `"${name}":${value}`).join(",")}}`;

/** The fields of an element that were filled in, as [name, JSON]. */
const filled = (selector) =>
  [...form.querySelectorAll(selector)].filter((input) => input.value.trim() !== "").map((input) => [input.name, json(input)]);

/** What the output must obey, as [name, JSON]: a kind, and the text that goes with it. */
function grammar() {
  const text = form.elements.grammar.value;
  switch (form.elements.obey.value) {
    case "json":
      return [["response_format", '{"type":"json_object"}']];
    case "json_schema":
      return [["response_format", `{"type":"json_schema","json_schema":{"schema":${written(text)}}}`]];
    case "regex":
      return [["regex", JSON.stringify(text)]];
    case "choice":
      return [["choice", JSON.stringify(text.split("\n").filter((line) => line !== ""))]];
    default:
      return [];
  }
}

/** Texts that end the output: one as it is, or JSON. */
function stops() {
  const text = form.elements.stop.value;
  return text === "" ? [] : [["stop", text.startsWith("[") ? written(text) : JSON.stringify(text)]];
}

/** JSON as it was written; what is none goes as a text. */
function written(text) {
  try {
    JSON.parse(text);
    return text;
  } catch {
    return JSON.stringify(text);
  }
}

/** A rotation as it is asked for: its JSON (null: the model's own) and its name. */
function rotation(profile) {
  const pairs = filled(`[data-profile="${profile}"] [name]`).map(([name, value]) => [name.slice("rope.".length), value]);
  const values = Object.fromEntries(pairs);
  if (pairs.length === 0) return { json: null, name: "the model’s own rotation" };
  return { json: object(pairs), name: `${JSON.parse(values.type ?? '"?"')}${values.factor ? ` × ${values.factor}` : ""}` };
}

/** Server-sent events as they arrive: a list of {event, data} for each read. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    yield blocks.filter((block) => !block.startsWith(":")).map((block) => {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
      return { event: fields.event, data: JSON.parse(fields.data) };
    });
  }
}

// --- one answer ---------------------------------------------------------------------------------

/** An answer and its place on the page. */
class Run {
  constructor(profile, fields) {
    this.profile = profile;
    this.rotation = rotation(profile);
    this.rope = this.rotation.json ? [["rope", this.rotation.json]] : [];
    this.body = object([...fields, ...this.rope]);
    this.tokens = []; // data of the events, of all choices
    this.unseen = []; // those that are not on the page yet
    this.scored = []; // log-probabilities of the prompt's tokens, from the second on
    this.note = ""; // why there are none
    this.reasons = []; // why each choice ended, where there are several
    this.element = $("run").content.firstElementChild.cloneNode(true);
    this.element.querySelector("h2").textContent = this.rotation.name;
    this.outputs = [this.element.querySelector(".output")];
    const prompt = document.createElement("span");
    prompt.className = "prompt";
    prompt.textContent = promptBox.value;
    this.outputs[0].append(prompt);
  }

  /** Where a choice is shown; the others follow the first, which has the prompt. */
  output(choice) {
    for (let at = this.outputs.length; at <= choice; at++) {
      const next = this.outputs[0].cloneNode(false);
      this.outputs[at - 1].after(next);
      this.outputs.push(next);
    }
    return this.outputs[choice];
  }

  say(state) {
    this.element.querySelector(".state").textContent = state;
  }

  figure(name, text) {
    this.element.querySelector(`[data-figure="${name}"]`).textContent = text;
  }

  /** Ask, and show what comes until it ends, one way or the other. */
  async go(signal) {
    this.outputs[0].setAttribute("aria-busy", "true");
    this.say("waiting");
    try {
      if (comparing()) await this.score(signal);
      await this.stream(signal);
    } catch (error) {
      this.say(signal.aborted ? `stopped after ${this.tokens.length} tokens` : "");
      if (!signal.aborted) this.fail(error);
    } finally {
      this.show();
      for (const output of this.outputs) output.removeAttribute("aria-busy");
    }
  }

  /** What this rotation makes of the prompt itself. One that cannot be scored, as that of a single
   *  token, may be answered all the same. */
  async score(signal) {
    const overflow = form.elements.overflow.value === "shift" ? [["overflow", '"shift"']] : [];
    const body = object([["text", JSON.stringify(promptBox.value)], ...overflow, ...this.rope]);
    try {
      const { scores } = await (await ask("v1/score", body, signal)).json();
      this.scored = scores[0].logprobs.map(({ logprob }) => logprob);
      redraw();
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      this.note = `; the prompt has no score: ${error.message}`;
    }
  }

  /** Log-probabilities of the prompt and of its first answer. */
  logprobs() {
    const first = this.tokens.filter(({ choice }) => !choice);
    return [...this.scored, ...first.map(({ logprob }) => logprob)];
  }

  async stream(signal) {
    const asked = performance.now();
    const response = await ask("generate", this.body, signal);
    for await (const some of events(response)) {
      const tokens = some.filter(({ event }) => event === "token").map(({ data }) => data);
      if (tokens.length) this.add(tokens, asked);
      for (const { event, data } of some) if (event === "finish") this.reasons[data.choice] = data.finish_reason;
      const last = some.at(-1);
      if (last?.event === "done") return this.finish(last.data);
      if (last?.event === "error") throw new Refusal(response.status, last.data);
    }
    throw new Error("the stream broke off before its end");
  }

  add(tokens, asked) {
    const now = performance.now();
    if (this.tokens.length === 0) {
      this.firstAt = now;
      this.say("generating");
      this.figure("first", `${(now - asked).toFixed(0)} ms`);
    }
    this.lastAt = now;
    this.tokens.push(...tokens);
    this.unseen.push(...tokens);
    showSoon();
  }

  /** Show what has come. */
  show() {
    if (this.unseen.length === 0) return;
    for (const [choice, some] of Map.groupBy(this.unseen, (token) => token.choice ?? 0)) this.append(choice, some);
    this.unseen = [];
    this.figure("completion", this.tokens.length);
    const seconds = (this.lastAt - this.firstAt) / 1000;
    if (seconds > 0) this.figure("speed", ((this.tokens.length - 1) / seconds).toFixed(0));
    redraw();
  }

  /** Show tokens of a choice, and follow them where its end was in sight. */
  append(choice, tokens) {
    const output = this.output(choice);
    const { scrollHeight, scrollTop, clientHeight } = output;
    const following = scrollHeight - scrollTop - clientHeight < 40;
    output.append(...tokens.map((token) => tokenElement(token, token.index)));
    if (following) output.scrollTop = output.scrollHeight;
  }

  finish({ finish_reason, usage }) {
    this.figure("prompt", usage.prompt_tokens);
    this.figure("cached", usage.cached_tokens);
    this.figure("completion", usage.completion_tokens);
    const dropped = usage.dropped_tokens ? `; ${usage.dropped_tokens} tokens dropped` : "";
    this.say(`finished: ${finish_reason ?? [...new Set(this.reasons)].join(", ")}${dropped}${this.note}`);
  }

  /** Show an error where it belongs: at the field that it names, else at the answer. */
  fail(error) {
    const field = error.field && fieldOf(error.field, this.profile);
    const fault = document.createElement("span");
    if (error.field) fault.append(code(error.field), " ");
    fault.append(error.message);
    const box = this.element.querySelector(".fault");
    box.replaceChildren(fault);
    box.hidden = false;
    if (error.status === 401) $("key").focus();
    if (!field) return;
    field.setAttribute("aria-invalid", "true");
    if (field.hasAttribute("aria-describedby")) return; // both answers have the same one
    const note = document.createElement("span");
    note.className = "fault";
    note.id = `fault-${this.profile}`;
    note.textContent = error.message;
    field.setAttribute("aria-describedby", note.id);
    field.closest(".field").after(note);
    $("settings").open ||= $("settings").contains(field);
    field.focus();
  }
}

let due = 0;
/** Show what comes of all answers some times a second: each time lays out the whole text anew, maybe on
 *  the server's cores. */
function showSoon() {
  due ||= setTimeout(() => {
    due = 0;
    for (const run of runs) run.show();
  }, SHOWN_EVERY);
}

function code(text) {
  const element = document.createElement("code");
  element.textContent = text;
  return element;
}

/** The input that the server calls `name`; one of a rotation is the profile's. */
function fieldOf(name, profile) {
  const base = name.split("[")[0];
  if (["regex", "choice", "response_format"].includes(base.split(".")[0])) return form.elements[form.elements.grammar.disabled ? "obey" : "grammar"];
  const own = form.querySelector(`[data-profile="${profile}"] [name^="${CSS.escape(base)}"]`);
  return base === "rope" || base.startsWith("rope.") ? own : form.elements[base];
}

// --- the plot -----------------------------------------------------------------------------------

let planned = 0;
/** Plot once before the next frame. */
function redraw() {
  if (!comparing()) return;
  cancelAnimationFrame(planned);
  planned = requestAnimationFrame(() => {
    const curves = runs.map((run) => ({ name: run.profile, logprobs: run.logprobs() }));
    const prompt = Math.max(0, ...runs.map((run) => run.scored.length));
    const marks = [
      { at: prompt, text: "answer", side: "bottom" },
      { at: model?.max_model_len ?? 0, text: "the model's context", side: "top" },
    ];
    const ends = plot($("chart"), curves, Number($("window").value), marks);
    const name = (profile) => runs.find((run) => run.profile === profile).rotation.name;
    $("reading").textContent = ends.map((end) => `${name(end.name)}: ${end.last.toFixed(1)}`).join("  ·  ");
  });
}
new ResizeObserver(redraw).observe($("chart"));
$("window").addEventListener("change", redraw);

// --- the form -----------------------------------------------------------------------------------

const comparing = () => $("compare").checked;

function clearFaults() {
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  for (const note of form.querySelectorAll(".fault")) note.remove();
}

function setBusy(busy) {
  $("generate").disabled = busy;
  $("halt").disabled = !busy;
}

/** Both of two compared answers are drawn with one seed. */
function seedPair() {
  const drawn = crypto.getRandomValues(new Uint32Array(1))[0];
  return comparing() && form.elements.seed.value.trim() === "" ? [["seed", drawn]] : [];
}

async function generate() {
  if (running) return;
  if (model === null) describe();
  clearFaults();
  hideTip();
  const sampling = filled("#settings .plain [name]");
  const fields = [["prompt", JSON.stringify(promptBox.value)], ...sampling, ...stops(), ...grammar(), ...seedPair(), ["logprobs", ALTERNATIVES]];
  runs = (comparing() ? ["a", "b"] : ["a"]).map((profile) => new Run(profile, fields));
  $("runs").replaceChildren(...runs.map((run) => run.element));
  redraw();
  running = new AbortController();
  setBusy(true);
  await Promise.all(runs.map((run) => run.go(running.signal)));
  running = null;
  setBusy(false);
}

const GRAMMARS = {
  json_schema: '{"type": "object", "properties": {"name": {"type": "string"}}}',
  regex: "[A-Z][a-z ]+\\.",
  choice: "yes\nno",
};

/** A kind of grammar brings an example, until something else was typed. */
function chooseGrammar() {
  const box = form.elements.grammar;
  const example = GRAMMARS[form.elements.obey.value];
  if (box.value === "" || Object.values(GRAMMARS).includes(box.value)) box.value = example ?? "";
  box.disabled = example === undefined;
  box.closest(".field").hidden = box.disabled;
}

/** Say what is served, if the server can tell yet. */
async function describe() {
  try {
    [model] = (await (await ask("v1/models")).json()).data;
  } catch {
    return; // it is starting, or wants a key; what is asked of it will say so
  }
  $("model").textContent = model.id;
  $("context").textContent = `context ${model.max_model_len.toLocaleString("en")} tokens`;
  redraw();
}

function stop() {
  running?.abort();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("halt").addEventListener("click", stop);
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") {
    hideTip();
    stop();
  }
});
$("compare").addEventListener("change", () => {
  document.body.classList.toggle("comparing", comparing());
  redraw();
});
form.elements.obey.addEventListener("change", chooseGrammar);
$("settings").open = matchMedia("(min-width: 701px)").matches;
document.body.classList.toggle("comparing", comparing());
chooseGrammar();
describe();
