// The playground: asks POST /generate and shows what comes. What a model wrote becomes text nodes,
// never HTML; the page's Content-Security-Policy would refuse it.

const ALTERNATIVES = 5;
const LEVELS = [0.5, 0.2, 0.05, 0.01]; // probabilities; below each, a token is more of a surprise
const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/; // as JSON has it
const SVG = "http://www.w3.org/2000/svg";

const $ = (id) => document.getElementById(id);
const form = $("form");
const promptBox = form.elements.prompt;
const tip = $("alternatives");

let running = null; // the AbortController of what runs
let runs = [];

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
    this.tokens = []; // data of the events
    this.scored = []; // log-probabilities of the prompt's tokens, from the second on
    this.note = ""; // why there are none
    this.element = $("run").content.firstElementChild.cloneNode(true);
    this.element.querySelector("h2").textContent = this.rotation.name;
    this.output = this.element.querySelector(".output");
    const prompt = document.createElement("span");
    prompt.className = "prompt";
    prompt.textContent = promptBox.value;
    this.output.append(prompt);
  }

  say(state) {
    this.element.querySelector(".state").textContent = state;
  }

  figure(name, text) {
    this.element.querySelector(`[data-figure="${name}"]`).textContent = text;
  }

  /** Ask, and show what comes until it ends, one way or the other. */
  async go(signal) {
    this.output.setAttribute("aria-busy", "true");
    this.say("waiting");
    try {
      if (comparing()) await this.score(signal);
      await this.stream(signal);
    } catch (error) {
      this.say(signal.aborted ? `stopped after ${this.tokens.length} tokens` : "");
      if (!signal.aborted) this.fail(error);
    } finally {
      this.output.removeAttribute("aria-busy");
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

  /** Log-probabilities of prompt and answer. */
  logprobs() {
    return [...this.scored, ...this.tokens.map(({ logprob }) => logprob)];
  }

  async stream(signal) {
    const asked = performance.now();
    const response = await ask("generate", this.body, signal);
    for await (const some of events(response)) {
      const tokens = some.filter(({ event }) => event === "token").map(({ data }) => data);
      if (tokens.length) this.add(tokens, asked);
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
    const { scrollHeight, scrollTop, clientHeight } = this.output;
    const following = scrollHeight - scrollTop - clientHeight < 40;
    this.output.append(...tokens.map((token, at) => tokenElement(token, this.tokens.length + at)));
    if (following) this.output.scrollTop = this.output.scrollHeight;
    this.tokens.push(...tokens);
    this.figure("completion", this.tokens.length);
    const seconds = (now - this.firstAt) / 1000;
    if (seconds > 0) this.figure("speed", `${((this.tokens.length - 1) / seconds).toFixed(0)} tokens/s`);
    redraw();
  }

  finish({ finish_reason, usage }) {
    this.figure("prompt", usage.prompt_tokens);
    this.figure("cached", usage.cached_tokens);
    this.figure("completion", usage.completion_tokens);
    const dropped = usage.dropped_tokens ? `; ${usage.dropped_tokens} tokens dropped` : "";
    this.say(`finished: ${finish_reason}${dropped}${this.note}`);
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

function code(text) {
  const element = document.createElement("code");
  element.textContent = text;
  return element;
}

/** The input that the server calls `name`; one of a rotation is the profile's. */
function fieldOf(name, profile) {
  const base = name.split("[")[0];
  const own = form.querySelector(`[data-profile="${profile}"] [name^="${CSS.escape(base)}"]`);
  return base === "rope" || base.startsWith("rope.") ? own : form.elements[base];
}

// --- tokens -------------------------------------------------------------------------------------

const shown = new WeakMap(); // element of a token -> the event's data
let explained = null; // the element that the tip is about

function tokenElement(token, index) {
  const element = document.createElement("span");
  const probability = Math.exp(token.logprob);
  element.className = "token";
  element.tabIndex = -1;
  element.dataset.level = LEVELS.filter((level) => probability < level).length;
  element.dataset.index = index;
  element.classList.toggle("part", token.text === "");
  element.classList.toggle("line", token.text.startsWith("\n"));
  element.textContent = token.text;
  shown.set(element, token);
  return element;
}

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share < 0.01 ? "< 0.01 %" : `${share.toFixed(share < 10 ? 2 : 1)} %`;
};

/** Spaces and line ends of a token made visible. */
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "◦";

/** What else was likely in a token's place, beside it. */
function explain(element) {
  const { token_id, text, logprob, top_logprobs } = shown.get(element);
  const table = document.createElement("table");
  const taken = top_logprobs.find((each) => each.token_id === token_id);
  const rows = taken ? top_logprobs : [{ token_id, token: text, logprob }, ...top_logprobs];
  table.createCaption().textContent = `token ${token_id} at ${Number(element.dataset.index) + 1}`;
  for (const row of rows) {
    const line = table.insertRow();
    const name = document.createElement("th");
    const meter = document.createElement("meter");
    name.scope = "row";
    name.textContent = visible(row.token);
    meter.value = Math.exp(row.logprob);
    line.className = row.token_id === token_id ? "taken" : "";
    line.append(name);
    line.insertCell().textContent = percent(row.logprob);
    line.insertCell().append(meter);
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  explained?.removeAttribute("aria-describedby");
  explained = element;
  explained.setAttribute("aria-describedby", tip.id);
  placeTip();
}

/** Below the token where there is room, else above. */
function placeTip() {
  const [place] = explained.getClientRects();
  const { width, height } = tip.getBoundingClientRect();
  const below = place.bottom + 6;
  const fits = below + height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - width - 8))}px`;
  tip.style.top = `${fits ? below : Math.max(8, place.top - height - 6)}px`;
}

function hideTip() {
  tip.hidden = true;
}

for (const kind of ["pointerover", "focusin"]) {
  $("runs").addEventListener(kind, ({ target }) => (shown.has(target) ? explain(target) : hideTip()));
}
for (const kind of ["pointerleave", "focusout"]) $("runs").addEventListener(kind, hideTip);
addEventListener("scroll", () => (explained === document.activeElement && !tip.hidden ? placeTip() : hideTip()), { capture: true, passive: true });

const MOVES = {
  ArrowRight: (tokens, at) => tokens[at + 1],
  ArrowLeft: (tokens, at) => tokens[at - 1],
  Home: (tokens) => tokens[0],
  End: (tokens) => tokens.at(-1),
};

$("runs").addEventListener("keydown", (event) => {
  const output = event.target.closest(".output");
  if (!output || !(event.key in MOVES) || event.ctrlKey || event.altKey || event.metaKey) return;
  const tokens = [...output.querySelectorAll(".token")];
  const next = MOVES[event.key](tokens, tokens.indexOf(event.target));
  event.preventDefault();
  next?.focus();
});

// --- the plot -----------------------------------------------------------------------------------

/** Perplexity up to each token: exp of the mean negative log-probability of those before it, of all
 *  or of the last `window`. */
function perplexities(logprobs, window) {
  let sum = 0;
  return logprobs.map((logprob, at) => {
    sum -= logprob;
    if (window && at >= window) sum += logprobs[at - window];
    return Math.exp(sum / (window ? Math.min(at + 1, window) : at + 1));
  });
}

/** Round numbers in a range, at most `count` or so. */
function ticks(from, to, count) {
  const raw = (to - from) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(1, [1, 2, 5, 10].find((each) => each * power >= raw) * power);
  const first = Math.ceil(from / step) * step;
  return Array.from({ length: Math.max(0, Math.floor((to - first) / step) + 1) }, (_, at) => first + at * step);
}

/** 1, 2 and 5 times powers of ten in a range. */
function logTicks(from, to) {
  const powers = Array.from({ length: 12 }, (_, at) => 10 ** at);
  return powers.flatMap((power) => [power, 2 * power, 5 * power]).filter((tick) => tick >= from && tick <= to);
}

function draw(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  $("chart").append(element);
}

function plot() {
  const chart = $("chart");
  chart.replaceChildren();
  $("reading").textContent = "";
  const window = Number($("window").value);
  const curves = runs.map((run) => ({ run, values: perplexities(run.logprobs(), window) }));
  const drawn = curves.filter(({ values }) => values.length > 1);
  if (!drawn.length) return;
  const { width, height } = chart.getBoundingClientRect();
  const [left, bottom, top, right] = [52, 24, 8, 10];
  const to = Math.max(...drawn.map(({ values }) => values.length));
  const all = drawn.flatMap(({ values }) => values);
  const low = all.reduce((a, b) => Math.min(a, b)) / 1.15;
  const high = all.reduce((a, b) => Math.max(a, b)) * 1.15;
  const x = (position) => left + ((position - 1) / (to - 1)) * (width - left - right);
  const y = (value) => height - bottom - (Math.log(value / low) / Math.log(high / low)) * (height - top - bottom);
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const tick of logTicks(low, high)) {
    draw("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick) });
    draw("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick);
  }
  for (const tick of ticks(1, to, width / 70)) {
    draw("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, tick);
  }
  const prompt = Math.max(...runs.map((run) => run.scored.length));
  if (prompt) {
    draw("line", { class: "mark", x1: x(prompt), x2: x(prompt), y1: top, y2: height - bottom });
    draw("text", { x: x(prompt) + 4, y: height - bottom - 4 }, "answer");
  }
  for (const { run, values } of drawn) {
    const points = values.map((value, at) => `${x(at + 1).toFixed(1)},${y(value).toFixed(1)}`);
    draw("polyline", { class: run.profile, points: points.join(" ") });
  }
  $("reading").textContent = drawn.map(({ run, values }) => `${run.rotation.name}: ${values.at(-1).toFixed(1)}`).join("  ·  ");
}

let planned = 0;
/** Plot once before the next frame. */
function redraw() {
  if (!comparing()) return;
  cancelAnimationFrame(planned);
  planned = requestAnimationFrame(plot);
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
  $("stop").disabled = !busy;
}

/** Both of two compared answers are drawn with one seed. */
function seedPair() {
  const drawn = crypto.getRandomValues(new Uint32Array(1))[0];
  return comparing() && form.elements.seed.value.trim() === "" ? [["seed", drawn]] : [];
}

async function generate() {
  if (running) return;
  clearFaults();
  hideTip();
  const sampling = filled("#settings fieldset:not(.rotation) [name]");
  const fields = [["prompt", JSON.stringify(promptBox.value)], ...sampling, ...seedPair(), ["logprobs", ALTERNATIVES]];
  runs = (comparing() ? ["a", "b"] : ["a"]).map((profile) => new Run(profile, fields));
  $("runs").replaceChildren(...runs.map((run) => run.element));
  redraw();
  running = new AbortController();
  setBusy(true);
  await Promise.all(runs.map((run) => run.go(running.signal)));
  running = null;
  setBusy(false);
}

function stop() {
  running?.abort();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("stop").addEventListener("click", stop);
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
$("settings").open = matchMedia("(min-width: 701px)").matches;
document.body.classList.toggle("comparing", comparing());
