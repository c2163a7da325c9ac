"use strict";
// The page of `nvamp inspect`. Only rows near the visible ones are in the document; all text of the file and of the
// tokenizer enters it as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const text = data.text;
const tokens = numbers(data.tokens); // index in data.pieces
const count = tokens.length;
const ends = new Uint32Array(count);
numbers(data.lengths).reduce((end, length, i) => (ends[i] = end + length), 0);

// A loss is the sum of its terms, each times its coefficient, and so are its weights; a slider moves `now`.
const models = data.models.map((model) => {
  const nll = numbers(model.nll); // of scored tokens, as are the others
  const losses = new Map(model.losses.map(({ name, terms }) => [name, {
    name,
    terms: terms.map((term) => ({ ...term, now: term.coefficient, weights: sparse(term.weights, nll.length) })),
  }]));
  const [z, alternatives, alternativeSteps] = [model.z, model.alternatives, model.alternativeSteps].map(numbers);
  return { ...model, nll, z, alternatives, alternativeSteps, losses };
});
const first = count - models[0].nll.length; // the first scored token
const several = models.length > 1; // the first one is then what the others are compared to

const ROW = 23; // pixels, as in the style sheet
const NEAR = 25; // rows kept above and below the visible ones
const HEAVIEST = 20; // rows of the table
const PAPER = 90; // columns of a printed page, and the most tokens that are printed
const PRINTED = 20000;
const SLIDERS = { alpha: ["α", 2, 0.01], beta: ["β", 1, 0.01], gamma: ["γ", 0.05, 0.0005] }; // letter, range, step

let model, nll, z, batch, losses, largest; // of the model that is shown
const state = { view: "nll", loss: null, active: -1, hovered: -1, printing: false };
const rows = { token: [], char: [], from: 0, to: 0, columns: 0 }; // where each row begins, and which are drawn
let values, domain; // of the current view

function numbers({ type, base64 }) {
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return new globalThis[type](bytes.buffer);
}

// Numbers, one of each scored token, most of which may be the same.
function sparse({ all, usual, at, others }, length) {
  if (all) return numbers(all);
  const found = new Float32Array(length).fill(usual);
  const values = numbers(others);
  numbers(at).forEach((i, j) => (found[i] = values[j]));
  return found;
}

const total = (loss, of) => loss.terms.reduce((sum, term) => sum + term.now * of(term), 0);

// The weight of scored token i, relative to that in cross-entropy: w·N.
const weight = (i, loss) => total(loss, (term) => term.weights[i]);

function valuesOf(view) {
  if (view === "nll") return nll;
  if (view === "z") return z;
  if (view === "difference") return Float64Array.from(nll, (ell, i) => ell - models[0].nll[i]);
  const found = new Float64Array(nll.length);
  for (const { now, weights } of losses.get(view).terms) {
    for (let i = 0; i < found.length; i++) found[i] += now * weights[i];
  }
  return found;
}

// Whether a loss weighs more than a few tokens unlike the others.
function varies(loss) {
  const sorted = valuesOf(loss.name).sort();
  return sorted[Math.floor(0.01 * (sorted.length - 1))] < sorted[Math.floor(0.99 * (sorted.length - 1))];
}

const startOf = (i) => (i ? ends[i - 1] : 0);

// Words and numbers

const fixed = (x, digits) => x.toFixed(digits).replace("-", "−");
const exponential = (x) => x.toExponential(3).replaceAll("-", "−");
const signed = (x, digits) => (x < 0 ? "" : "+") + fixed(x, digits);
const many = (x) => x.toLocaleString("en");
// The data end at 65,535 steps, which is e⁻¹⁶.
const probability = (p) => (p < 1.2e-7 ? "< 1.2e−7" : p < 0.001 ? p.toExponential(2).replace("-", "−") : p.toFixed(4));

// Shows characters that are invisible, or change how others look, by their numbers. Newlines, tabs and joiners
// (in emoji and Indic letters) stay.
function visible(s) {
  return s.replace(/(?![\t\n\u200c\u200d])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (c) =>
    c === "\r" ? "⟨\\r⟩" : `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// On one line, with visible spaces.
const inline = (s) => visible(s).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");

const SPOKEN = { " ": "space", "\n": "newline", "\t": "tab", "\r": "carriage return" };

// What a screen reader says for a token without a letter or sign; empty if it has some.
function spoken(i) {
  const { own, shared } = covered(i);
  if (!own) return `part of ${inline(shared)}`;
  if (own.trim()) return "";
  return own.match(/(.)\1*/gsu).map((run) => {
    const name = SPOKEN[run[0]] ?? `U+${run.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    return run.length > 1 ? `${run.length} ${name}s` : name;
  }).join(", ");
}

const pieceOf = (i) => data.pieces[tokens[i]];

// The text that token i covers; if it is part of a character, that character.
function covered(i) {
  let j = i;
  while (j > 0 && startOf(j) === ends[j]) j--;
  return { own: text.slice(startOf(i), ends[i]), shared: text.slice(startOf(j), ends[j]) };
}

function topOf(i) {
  const { alternatives, alternativeSteps } = model;
  const k = alternatives.length / nll.length;
  const at = (i - first) * k;
  return Array.from({ length: k }, (_, j) => ({
    token: alternatives[at + j],
    p: Math.exp(-alternativeSteps[at + j] * data.step),
  }));
}

function describe(i) {
  const name = spoken(i) || inline(pieceOf(i));
  if (i < first) return `${name}: the text begins here, no prediction`;
  const ell = nll[i - first];
  const w = weight(i - first, state.loss) / nll.length;
  return (
    `${name}: probability ${probability(Math.exp(-ell))}, nll ${fixed(ell, 3)}, z ${signed(z[i - first], 2)}, ` +
    `weight ${exponential(w)}; ` + (several ? `nll under ${models.map((m) => `${m.name} ${fixed(m.nll[i - first], 3)}`).join(", ")}; ` : "") +
    `likeliest ${topOf(i).map((t) => `${inline(data.pieces[t.token])} ${probability(t.p)}`).join(", ")}`
  );
}

// Building

function el(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function svg(name, attributes, content = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = content;
  return node;
}

const byId = (id) => document.getElementById(id);

// Colour: lightness in even steps of OKLCH. A one-sided scale is blue; a two-sided one is blue below, orange above.

const dark = matchMedia("(prefers-color-scheme: dark)");

// The luminance of a colour in OKLCH, from 0 to 1, which is what the contrast of letters on it depends on.
function luminance(lightness, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const shown = (x) => Math.min(Math.max(x, 0), 1);
  return 0.2126 * shown(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s) +
    0.7152 * shown(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s) +
    0.0722 * shown(-0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s);
}

function colour(t) {
  const strength = Math.min(Math.abs(t), 1);
  const lightness = dark.matches && !state.printing ? 0.22 + 0.6 * strength : 0.985 - 0.535 * strength;
  const hue = domain.low < 0 && t > 0 ? 50 : 255;
  const chroma = 0.15 * strength ** 0.7;
  return {
    background: `oklch(${lightness} ${chroma} ${hue})`,
    ink: luminance(lightness, chroma, hue) < 0.179 ? "#fff" : "#000", // the one of more contrast, at least 4.58
  };
}

// The range of the scale. Weights have outliers (in NVAMP the largest loss may carry all of gamma), so the scale ends at
// the 99.5% quantile; but not below twice the median, so that equal weights get a middling colour.
function domainOf(view) {
  if (view === "z") return { low: -3, high: 3 };
  const sorted = Float64Array.from(values, Math.abs).sort();
  const quantile = (q) => sorted[Math.floor(q * (sorted.length - 1))];
  const high = Math.max(quantile(0.995), losses.has(view) ? 2 * quantile(0.5) : 0) || 1;
  return { low: view === "difference" || values.some((x) => x < 0) ? -high : 0, high };
}

function drawScale() {
  const { low, high } = domain;
  const unit = { nll: "nats", z: "", difference: "nats" }[state.view] ?? "× 1/N";
  const show = (x) => (x < 0 ? "≤ " : x > 0 ? "≥ " : "") + fixed(x, unit === "× 1/N" ? 2 : 1);
  const stops = Array.from({ length: 17 }, (_, i) => colour((low + ((high - low) * i) / 16) / high).background);
  const bar = el("span", { className: "bar" });
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const alike = losses.has(state.view) && !varies(losses.get(state.view));
  byId("scale").replaceChildren(
    el("span", { className: "number" }, show(low)), bar, el("span", { className: "number" }, `${show(high)} ${unit}`),
    ...(alike ? [el("span", { id: "alike" }, "the same for all tokens, or nearly all")] : []));
}

// Layout: the text in rows of a monospaced font, so that every row's position is known without drawing it.

const WIDE = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\u{1f300}-\u{1faff}\u{20000}-\u{3fffd}]/u;

function widthOf(character, column) {
  if (character === "\t") return 4 - (column % 4);
  if (/[\p{M}\u200c\u200d]/u.test(character)) return 0;
  return WIDE.test(character) ? 2 : visible(character).length;
}

// The width of s if it starts at this column, and how many of its code units fit before the limit.
function measure(s, column, limit) {
  if (/^[ -~]*$/.test(s)) return { width: s.length, fits: Math.max(limit - column, 0) };
  let width = 0;
  let fits = 0;
  for (const character of s) {
    width += widthOf(character, column + width);
    if (column + width <= limit) fits += character.length;
  }
  return { width, fits };
}

function layout(columns) {
  Object.assign(rows, { token: [0], char: [0], columns });
  let t = 0; // the token to place
  let at = 0; // its first character not placed yet
  let column = 0;
  let word = -1; // where the row's last word begins, if not with the row
  const newRow = () => {
    if (t < count) { rows.token.push(t); rows.char.push(at); }
    column = 0;
    word = -1;
  };
  while (t < count) {
    const piece = text.slice(at, ends[t]);
    const newline = piece.indexOf("\n");
    const line = newline < 0 ? piece : piece.slice(0, newline);
    const { width, fits } = startOf(t) === ends[t] ? { width: 1, fits: 1 } : measure(line, column, columns);
    if (column + width > columns && column > 0) {
      if (word >= 0) { t = word; at = startOf(t); }
      newRow();
    } else if (width > columns) {
      at += Math.max(fits, 1);
      newRow();
    } else {
      column += width;
      at += line.length + (newline < 0 ? 0 : 1);
      if (at >= ends[t]) t++;
      if (newline >= 0) newRow();
    }
    if (t < count && column > 0 && at === startOf(t) && /\s/.test(text[at])) word = t;
  }
  byId("canvas").style.height = `${rows.token.length * ROW}px`;
}

// The row where token i begins.
function rowOf(i) {
  let low = 0;
  let high = rows.token.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (rows.token[middle] < i || (rows.token[middle] === i && rows.char[middle] <= startOf(i))) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Drawing

const view = byId("text");

function drawRow(r) {
  const row = el("div", { className: "row" });
  row.setAttribute("role", "none");
  const end = r + 1 < rows.token.length ? rows.char[r + 1] : text.length;
  const last = r + 1 < rows.token.length ? rows.token[r + 1] : count;
  for (let i = rows.token[r]; i < count && (i < last || (i === last && startOf(i) < end)); i++) {
    const from = Math.max(startOf(i), rows.char[r]);
    const piece = text.slice(from, Math.min(ends[i], end));
    const span = el("span", {}, visible(piece.replace("\n", "")));
    if (from === startOf(i)) span.id = `t${i}`;
    span.dataset.i = i;
    span.setAttribute("role", "option");
    if (!piece.trim()) span.dataset.spoken = spoken(i) || inline(piece || pieceOf(i));
    span.classList.toggle("newline", piece.endsWith("\n"));
    span.classList.toggle("part", startOf(i) === ends[i]);
    span.classList.toggle("largest", i === largest);
    span.classList.toggle("unscored", i < first);
    row.append(span);
  }
  return row;
}

function paint() {
  for (const span of byId("rows").querySelectorAll("span")) {
    const i = Number(span.dataset.i);
    if (i >= first) {
      const { background, ink } = colour(values[i - first] / domain.high);
      span.style.backgroundColor = background;
      span.style.color = ink;
    }
    const active = i === state.active;
    span.classList.toggle("active", active);
    span.setAttribute("aria-selected", active);
    const name = active ? describe(i) : span.dataset.spoken;
    if (name) span.setAttribute("aria-label", name);
    else span.removeAttribute("aria-label");
  }
}

function draw(force = false) {
  const top = Math.floor(view.scrollTop / ROW);
  const bottom = Math.ceil((view.scrollTop + view.clientHeight) / ROW);
  if (!force && rows.from <= Math.max(top, 0) && Math.min(bottom, rows.token.length) <= rows.to) return;
  rows.from = Math.max(top - NEAR, 0);
  rows.to = Math.min(bottom + NEAR, rows.token.length);
  const drawn = byId("rows");
  drawn.style.top = `${rows.from * ROW}px`;
  drawn.replaceChildren(...Array.from({ length: rows.to - rows.from }, (_, r) => drawRow(rows.from + r)));
  paint();
}

function fit() {
  if (state.printing) return;
  const probe = byId("probe");
  probe.textContent = "0".repeat(20);
  const style = getComputedStyle(view);
  const width = view.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const columns = Math.max(Math.floor(width / (probe.getBoundingClientRect().width / 20)) - 1, 10); // one for ↵
  if (columns === rows.columns) return draw(true);
  const top = rows.token[Math.floor(view.scrollTop / ROW)] ?? 0;
  layout(columns);
  view.scrollTop = top ? rowOf(top) * ROW : 0;
  draw(true);
}

// The card

function tableOf(lines, className) {
  return el("table", {}, el("tbody", {}, ...lines.map(({ cells, mark }) =>
    el("tr", { className: mark ? "this" : "" }, ...cells.map((cell, j) =>
      el("td", { className: j ? "number" : className }, cell))))));
}

function cardOf(i) {
  const { own, shared } = covered(i);
  const piece = pieceOf(i);
  const title = el("span", { className: "token title" }, inline(piece));
  const place = `token ${many(i + 1)} of ${many(count)}`;
  const note = own === piece ? place : own ? `covers “${inline(own)}”, ${place}` : `part of “${inline(shared)}”, ${place}`;
  const parts = [title, el("small", {}, note)];
  if (i < first) return [...parts, el("p", {}, "The text begins here: nothing predicts this token.")];
  const ell = nll[i - first];
  const facts = { probability: probability(Math.exp(-ell)), nll: `${fixed(ell, 3)} nats`, z: signed(z[i - first], 2) };
  parts.push(el("dl", { className: "number" }, ...Object.entries(facts).flatMap(([name, value]) => [
    el("dt", {}, name), el("dd", {}, value)])));
  if (several) {
    parts.push(el("h3", {}, "nll under each model, and Δ"), tableOf(models.map((other) => {
      const ell = other.nll[i - first];
      return { cells: [other.name, fixed(ell, 3), signed(ell - models[0].nll[i - first], 3)], mark: other === model };
    }), "loss"));
  }
  parts.push(el("h3", {}, "weight w, and w·N"), tableOf(Array.from(losses.values(), (loss) => {
    const w = weight(i - first, loss);
    return { cells: [loss.name, exponential(w / nll.length), fixed(w, 3)], mark: loss.name === state.view };
  }), "loss"));
  parts.push(el("h3", {}, "likeliest here"), tableOf(topOf(i).map(({ token, p }) => {
    return { cells: [inline(data.pieces[token]), probability(p)], mark: token === tokens[i] };
  }), "token"));
  return parts;
}

function showCard() {
  const i = state.hovered >= 0 ? state.hovered : document.activeElement === view ? state.active : -1;
  const card = byId("card");
  const span = i < 0 ? null : byId(`t${i}`) ?? byId("rows").querySelector(`[data-i="${i}"]`);
  const at = span?.getBoundingClientRect();
  const frame = view.getBoundingClientRect();
  card.hidden = !span || at.bottom < frame.top || at.top > frame.bottom;
  mark(i);
  if (card.hidden) return;
  card.replaceChildren(...cardOf(i));
  const below = at.bottom + 8 + card.offsetHeight <= innerHeight;
  card.style.top = `${Math.max(below ? at.bottom + 8 : at.top - 8 - card.offsetHeight, 4)}px`;
  card.style.left = `${Math.max(Math.min(at.left, innerWidth - card.offsetWidth - 8), 4)}px`;
}

function activate(i, centre = false) {
  state.active = Math.min(Math.max(i, 0), count - 1);
  state.hovered = -1;
  const top = rowOf(state.active) * ROW;
  const room = view.clientHeight - 2 * ROW;
  if (centre) view.scrollTop = top - room / 2;
  else if (top < view.scrollTop) view.scrollTop = top;
  else if (top > view.scrollTop + room) view.scrollTop = top - room;
  draw();
  paint();
  view.setAttribute("aria-activedescendant", `t${state.active}`);
  showCard();
}

function isVisible(i) {
  const top = rowOf(i) * ROW - view.scrollTop;
  return i >= 0 && top >= 0 && top <= view.clientHeight - ROW;
}

function goTo(i) {
  view.focus({ preventScroll: true });
  view.scrollIntoView({ block: "nearest" });
  activate(i, true);
}

// The token of another row that lies below or above the active one.
function inRow(r) {
  const target = Math.min(Math.max(r, 0), rows.token.length - 1);
  const here = byId(`t${state.active}`)?.getBoundingClientRect().left ?? 0;
  view.scrollTop = Math.min(view.scrollTop, target * ROW);
  view.scrollTop = Math.max(view.scrollTop, (target + 2) * ROW - view.clientHeight);
  draw();
  const spans = [...byId("rows").children[target - rows.from].children];
  const nearest = spans.findLast((span) => span.getBoundingClientRect().left <= here + 1) ?? spans[0];
  return Number(nearest?.dataset.i ?? rows.token[target]);
}

const KEYS = {
  ArrowLeft: () => state.active - 1,
  ArrowRight: () => state.active + 1,
  ArrowUp: () => inRow(rowOf(state.active) - 1),
  ArrowDown: () => inRow(rowOf(state.active) + 1),
  PageUp: () => inRow(rowOf(state.active) - Math.floor(view.clientHeight / ROW) + 1),
  PageDown: () => inRow(rowOf(state.active) + Math.floor(view.clientHeight / ROW) - 1),
  Home: () => 0,
  End: () => count - 1,
};

// The histogram

const PLOT = { left: 12, right: 338, top: 28, bottom: 148 };
const BINS = 60;
const extent = Math.max(...models.map((it) => it.statistics.max)) || 1; // the same for all models
const xOf = (ell) => PLOT.left + ((PLOT.right - PLOT.left) * Math.max(ell, 0)) / extent;

// At most ten round numbers from 0 to the end of the axis, with the digits they need.
function ticks(end) {
  const power = 10 ** Math.floor(Math.log10(end / 9));
  const step = power * [1, 2, 5, 10].find((k) => end / (k * power) <= 9);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return Array.from({ length: Math.floor(end / step + 1e-9) + 1 }, (_, i) => [i * step, i ? fixed(i * step, digits) : "0"]);
}

function drawHistogram() {
  const bins = new Float64Array(BINS);
  for (const ell of nll) bins[Math.min(Math.floor((BINS * Math.max(ell, 0)) / extent), BINS - 1)]++;
  const most = Math.max(...bins);
  const { left, right, top, bottom } = PLOT;
  const parts = [];
  const rule = (x, attributes) => svg("line", { x1: x, x2: x, y1: top - 6, y2: bottom, stroke: "var(--ink)", ...attributes });
  const label = (x, y, content, anchor = "middle") => svg("text", { x, y, "text-anchor": anchor }, content);
  for (const k of [3, 2, 1]) {
    const [from, to] = [xOf(batch.mean - k * batch.std), Math.min(xOf(batch.mean + k * batch.std), right)];
    parts.push(svg("rect", { x: from, width: to - from, y: top - 6, height: bottom - top + 6, fill: "var(--band)", opacity: 0.13 }));
    if (batch.mean + k * batch.std < batch.max && to - xOf(batch.mean + (k - 1) * batch.std) > 24) parts.push(label(to - 2, top + 4, `+${k}σ`, "end"));
  }
  const width = (right - left) / BINS;
  bins.forEach((size, i) => {
    const height = ((bottom - top) * size) / most;
    parts.push(svg("rect", { x: left + i * width, width: width - 0.6, y: bottom - height, height, fill: "var(--bar)" }));
  });
  parts.push(rule(xOf(batch.mean), { "stroke-width": 1.5 }), rule(xOf(batch.max), { "stroke-dasharray": "3 2" }));
  parts.push(label(Math.min(Math.max(xOf(batch.mean), 36), 324), 9, `mean ${fixed(batch.mean, 2)}`));
  parts.push(label(Math.max(xOf(batch.max) + 4, 60), 19, `max ${fixed(batch.max, 2)}`, "end"));
  parts.push(svg("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: "var(--rule)" }));
  for (const [x, name] of ticks(extent)) {
    parts.push(svg("text", { x: xOf(x), y: bottom + 13, "text-anchor": "middle", class: "tick" }, name));
  }
  parts.push(svg("path", { id: "mark", fill: "var(--focus)", visibility: "hidden" }));
  byId("histogram").replaceChildren(...parts);
  byId("histogram").setAttribute("aria-label",
    `Histogram of the nll of ${many(nll.length)} tokens: mean ${fixed(batch.mean, 3)}, sigma ${fixed(batch.std, 3)}, largest ${fixed(batch.max, 3)} nats`);
}

// Marks token i in the histogram.
function mark(i) {
  const shown = i >= first;
  byId("mark").setAttribute("visibility", shown ? "visible" : "hidden");
  if (shown) byId("mark").setAttribute("d", `M${xOf(nll[i - first])} ${PLOT.bottom - 9}l5 9h-10z`);
}

// The table

// The scored tokens with the largest values, largest first; among equal values, the larger nll comes first.
function heaviest(x) {
  const found = [];
  const before = (a, b) => x[a] - x[b] || nll[a] - nll[b];
  for (let i = 0; i < x.length; i++) {
    if (found.length === HEAVIEST && before(i, found[HEAVIEST - 1]) <= 0) continue;
    let at = found.length;
    while (at > 0 && before(i, found[at - 1]) > 0) at--;
    found.splice(at, 0, i);
    found.length = Math.min(found.length, HEAVIEST);
  }
  return found;
}

function drawTable() {
  const title = { nll: "Largest nll", z: "Largest z", difference: `Largest difference to ${models[0].name}` };
  byId("heaviest-title").textContent = title[state.view] ?? "Most weight";
  const order = state.view === "difference" ? values.map(Math.abs) : values;
  byId("heaviest").tBodies[0].replaceChildren(...heaviest(order).map((k) => {
    const i = k + first;
    const { own, shared } = covered(i);
    const button = el("button", { type: "button", title: `Go to token ${many(i + 1)}` }, inline(own || shared));
    const row = el("tr", { onclick: () => goTo(i) }, el("td", {}, button),
      ...[fixed(nll[k], 3), several ? signed(nll[k] - models[0].nll[k], 3) : signed(z[k], 2), fixed(weight(k, state.loss), 3)]
        .map((cell) => el("td", {}, cell)));
    row.dataset.i = i;
    return row;
  }));
}

// Putting it together

function update() {
  values = valuesOf(state.view);
  domain = domainOf(state.view);
  byId("value").textContent = `L = ${fixed(total(state.loss, (term) => term.value), 4)} nats`;
  drawScale();
  drawTable();
  paint();
  showCard();
}

// Show the text under a model.
function use(index) {
  model = models[index];
  ({ nll, z, statistics: batch, losses } = model);
  largest = first + batch.max_index;
  state.loss = losses.get(state.loss?.name) ?? losses.get(model.trained) ?? losses.values().next().value;
  drawHistogram();
}

function show(view) {
  state.view = view;
  state.loss = losses.get(view) ?? state.loss;
  drawSliders();
  update();
}

function buildSwitch() {
  const segments = byId("views").querySelector(".segments");
  const views = ["nll", ...(several ? ["difference"] : []), "z", ...losses.keys()];
  for (const key of views) {
    const input = el("input", { type: "radio", name: "view", value: key, checked: key === state.view });
    if (losses.has(key)) input.ariaLabel = `weight, ${key}`;
    if (key === losses.keys().next().value) segments.append(el("span", { className: "soft" }, "weight:"));
    input.onchange = () => show(key);
    segments.append(el("label", {}, input, key));
  }
}

function buildModels() {
  byId("models").hidden = !several;
  if (!several) return;
  byId("models").querySelector(".segments").append(...models.map((it, index) => {
    const input = el("input", { type: "radio", name: "model", value: index, checked: it === model });
    input.onchange = () => {
      use(index);
      const views = byId("views");
      views.querySelector("[value=difference]").disabled = index === 0; // it would be to itself
      if (index === 0 && state.view === "difference") {
        state.view = "nll";
        views.querySelector("[value=nll]").checked = true;
      }
      draw(true);
      show(state.view);
    };
    return el("label", {}, input, it.name);
  }));
}

// Say what is wrong with a field; an empty message if nothing is.
function tell(field, message) {
  field.setAttribute("aria-invalid", message !== "");
  byId("wrong").textContent = message;
}

// The coefficients of the loss, if it has some.
function drawSliders() {
  byId("loss").textContent = state.loss.name;
  const terms = state.loss.terms.filter((term) => term.name);
  byId("reset").hidden = !terms.length;
  byId("sliders").replaceChildren(...terms.flatMap((term) => {
    const { name, coefficient, now: value } = term;
    const [letter, range, step] = SLIDERS[name];
    const max = Math.max(range, 2 * coefficient);
    const slider = el("input", { type: "range", id: name, min: 0, max, step, value });
    const number = el("input", { type: "number", step: "any", value, ariaLabel: `${name}, as a number` });
    const set = (text, other) => {
      other.value = text;
      for (const { losses } of models) losses.get(state.loss.name).terms.find((it) => it.name === name).now = Number(text);
      tell(number, "");
      update();
    };
    slider.oninput = () => set(slider.value, number);
    number.oninput = () => {
      if (number.value !== "") set(number.value, slider); // a browser gives no value to what is no number
      else tell(number, `${name} is not a number: the page still shows ${term.now}`);
    };
    number.onchange = () => {
      if (number.value === "") number.value = term.now;
      tell(number, "");
    };
    return [el("label", { htmlFor: name }, `${letter} ${name}`), slider, number];
  }));
}

function listen() {
  const tokenAt = (event) => Number(event.target.closest?.("[data-i]")?.dataset.i ?? -1);
  const hover = (i) => { if (i !== state.hovered) { state.hovered = i; showCard(); } };
  view.onmousemove = (event) => hover(tokenAt(event));
  view.onmouseleave = () => hover(-1);
  view.onclick = (event) => { if (tokenAt(event) >= 0) activate(tokenAt(event)); };
  let waiting = false;
  view.onscroll = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); showCard(); });
  };
  view.onfocus = () => activate(isVisible(state.active) ? state.active : rows.token[Math.ceil(view.scrollTop / ROW)]);
  view.onblur = showCard;
  view.onkeydown = (event) => {
    if (event.key === "Escape") byId("card").hidden = true;
    if (!(event.key in KEYS) || event.altKey || event.metaKey) return;
    event.preventDefault();
    activate(KEYS[event.key]());
  };
  new ResizeObserver(() => { fit(); showCard(); }).observe(view);
  dark.onchange = () => { drawScale(); paint(); };
}

// On paper there is no scrolling: the whole text is drawn, up to a number of tokens, in light colours.
function toPaper() {
  state.printing = true;
  byId("card").hidden = true;
  layout(PAPER);
  Object.assign(rows, { from: 0, to: PRINTED < count ? rowOf(PRINTED) : rows.token.length });
  byId("rows").replaceChildren(...Array.from({ length: rows.to }, (_, r) => drawRow(r)));
  const all = rows.to === rows.token.length;
  const what = state.view === "difference" ? `nll minus that under ${models[0].name}` : losses.has(state.view) ? `weight, ${state.view}` : state.view;
  byId("printed").textContent = `Colour: ${what}${several ? `, under ${model.name}` : ""}.` +
    (all ? "" : ` Printed are the first ${many(rows.token[rows.to])} of ${many(count)} tokens.`);
  drawScale();
  paint();
}

function toScreen(top) {
  state.printing = false;
  rows.columns = 0;
  fit();
  view.scrollTop = rowOf(top) * ROW;
  draw(true);
  drawScale();
}

addEventListener("beforeprint", () => {
  const top = rows.token[Math.floor(view.scrollTop / ROW)] ?? 0;
  toPaper();
  addEventListener("afterprint", () => toScreen(top), { once: true });
});

use(several ? 1 : 0);
state.view = several ? "difference" : losses.has(model.trained) ? model.trained : [...losses.values()].find(varies)?.name ?? "nll";
buildModels();
buildSwitch();
values = valuesOf(state.view);
domain = domainOf(state.view);
fit();
show(state.view);
listen();
byId("reset").onclick = () => {
  for (const { losses } of models) {
    for (const term of losses.get(state.loss.name).terms) term.now = term.coefficient;
  }
  byId("wrong").textContent = "";
  show(state.view);
};

// For tests, and for the console.
globalThis.nvamp = {
  models, weight, goTo, state, rows,
  get nll() { return nll; },
  get z() { return z; },
  get losses() { return losses; },
};
