// Perplexity against position, as curves in an SVG element.

const SVG = "http://www.w3.org/2000/svg";

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

/** Appends elements to an SVG element. */
const drawer = (chart) => (name, attributes, text) => {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  chart.append(element);
};

/** Draw curves of {name, logprobs} anew; a name is a class of the style sheet. window: tokens that
 *  the perplexity is over, 0: all so far. marks: {at, text, side}, vertical lines with a text at
 *  their top or bottom. Returns the perplexity at the end of each curve that has one. */
export function plot(chart, curves, window, marks) {
  chart.replaceChildren();
  const drawn = curves
    .map(({ name, logprobs }) => ({ name, values: perplexities(logprobs, window) }))
    .filter(({ values }) => values.length > 1);
  if (!drawn.length) return [];
  const draw = drawer(chart);
  const { width, height } = chart.getBoundingClientRect();
  const [left, bottom, top, right] = [52, 24, 20, 10];
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
  for (const { at, text, side } of marks.filter((mark) => mark.at > 0 && mark.at <= to)) {
    const before = width - right - x(at) < 120; // no room for its text behind it
    draw("line", { class: "mark", x1: x(at), x2: x(at), y1: side === "top" ? 4 : top, y2: height - bottom });
    const place = { x: x(at) + (before ? -5 : 5), y: side === "top" ? top - 6 : height - bottom - 4 };
    draw("text", { ...place, "text-anchor": before ? "end" : "start" }, text);
  }
  for (const { name, values } of drawn) {
    const points = values.map((value, at) => `${x(at + 1).toFixed(1)},${y(value).toFixed(1)}`);
    draw("polyline", { class: name, points: points.join(" ") });
  }
  return drawn.map(({ name, values }) => ({ name, last: values.at(-1) }));
}
