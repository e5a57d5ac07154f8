// A token as the page shows it, and the tip that says what else was likely in its place.

const LEVELS = [0.5, 0.2, 0.05, 0.01]; // probabilities; below each, a token is more of a surprise

const tip = document.getElementById("alternatives");
const answers = document.getElementById("runs");

const shown = new WeakMap(); // element of a token -> the event's data
let explained = null; // the element that the tip is about

/** An element of a token, which is an event's data; index: its place in the answer. */
export function tokenElement(token, index) {
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

export function hideTip() {
  tip.hidden = true;
}

for (const kind of ["pointerover", "focusin"]) {
  answers.addEventListener(kind, ({ target }) => (shown.has(target) ? explain(target) : hideTip()));
}
for (const kind of ["pointerleave", "focusout"]) answers.addEventListener(kind, hideTip);
addEventListener("scroll", () => (explained === document.activeElement && !tip.hidden ? placeTip() : hideTip()), { capture: true, passive: true });

const MOVES = {
  ArrowRight: (tokens, at) => tokens[at + 1],
  ArrowLeft: (tokens, at) => tokens[at - 1],
  Home: (tokens) => tokens[0],
  End: (tokens) => tokens.at(-1),
};

answers.addEventListener("keydown", (event) => {
  const output = event.target.closest(".output");
  if (!output || !(event.key in MOVES) || event.ctrlKey || event.altKey || event.metaKey) return;
  const tokens = [...output.querySelectorAll(".token")];
  const next = MOVES[event.key](tokens, tokens.indexOf(event.target));
  event.preventDefault();
  next?.focus();
});
