"use strict";
// Numbers, ticks and colours, and small parts of the page.

const COLORS = [
  "#4269d0", "#e4572e", "#3ca951", "#a463f2", "#d99a0b", "#2fa4a0", "#ff8ab7", "#9c6b4e", "#7ba7f0", "#8b929c",
];
const colorOf = (i) => COLORS[i] ?? `hsl(${(i * 137.5) % 360} 55% 52%)`;
const DASHES = [[], [5, 4], [2, 3], [8, 3, 2, 3]];

const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const UNITS = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];

// `1.05M`, `350`, `0.0312`, `2.1e-7`: so many significant digits.
function short(value, digits = 4) {
  const size = Math.abs(value);
  for (const [unit, letter] of UNITS) {
    if (Number(size.toPrecision(digits)) >= unit) return Number((value / unit).toPrecision(digits)) + letter;
  }
  return String(Number(value.toPrecision(digits)));
}

// About `count` round numbers from lo to hi.
function linearTicks(lo, hi, count) {
  const raw = (hi - lo) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw)), f = raw / power;
  const step = power * (f < 1.5 ? 1 : f < 3.5 ? 2 : f < 7.5 ? 5 : 10), ticks = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) ticks.push(i * step);
  return { ticks, step };
}

// Powers of ten, with 2 and 5 of each where few of them are in sight; null where even those are not enough.
function logTicks(lo, hi, count) {
  const from = Math.floor(Math.log10(lo)), to = Math.ceil(Math.log10(hi));
  for (const marks of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]]) {
    const every = marks.length > 1 ? 1 : Math.max(1, Math.round((to - from) / count)), ticks = [];
    for (let e = from; e <= to; e += every) {
      for (const m of marks) if (m * 10 ** e >= lo * 0.9999 && m * 10 ** e <= hi * 1.0001) ticks.push(m * 10 ** e);
    }
    if (ticks.length >= 3) return ticks;
  }
  return null;
}

// How all ticks of one axis are written: the same unit and the same number of decimals.
function tickWriter(ticks, step) {
  const most = Math.max(...ticks.map(Math.abs), 0);
  if (most === 0) return () => "0";
  if (most < 1e-3) {
    const power = Math.floor(Math.log10(most)), decimals = places(step / 10 ** power);
    return (v) => (v === 0 ? "0" : (v / 10 ** power).toFixed(decimals) + "e" + power);
  }
  const [unit, letter] = UNITS.find(([u]) => most >= u) ?? [1, ""];
  const decimals = places(step / unit);
  return (v) => (v === 0 ? "0" : (v / unit).toFixed(decimals) + letter);
}
const places = (step) => Math.min(6, Math.max(0, Math.ceil(-Math.log10(step) - 1e-9)));

const TIMES = [[86400, "d", 3], [3600, "h", 3], [60, "min", 3], [1, "s", 0]];
// The unit in which so many seconds are a readable number.
const timeUnit = (seconds) => TIMES.find(([size, , least]) => seconds >= least * size);

const AXES = {
  tokens: { title: () => "tokens", scale: () => 1, say: (v) => `${short(v)} tokens` },
  step: { title: () => "step", scale: () => 1, say: (v) => `step ${Math.round(v).toLocaleString("en")}` },
  seconds: {
    title: (hi) => `training time, ${timeUnit(hi)[1]}`,
    scale: (hi) => timeUnit(hi)[0],
    say: (v) => { const [size, name] = timeUnit(v); return `${short(v / size, 3)} ${name}`; },
  },
};

// Where steps lie on an axis of a run: the run's table of step, tokens and seconds, and evenly between its lines.
function positions(axis, kind, steps) {
  if (kind === "step") return Float64Array.from(steps);
  const at = axis.step, to = axis[kind], last = at.length - 1;
  const out = new Float64Array(steps.length);
  for (let i = 0, k = 0; i < steps.length; i++) {
    while (k < last - 1 && at[k + 1] <= steps[i]) k++;
    const span = at[k + 1] - at[k];
    out[i] = last === 0 ? 0 : to[k] + ((steps[i] - at[k]) / span) * (to[k + 1] - to[k]);
  }
  return out;
}

// Index of the value of a rising array that is nearest to x.
function nearest(array, x) {
  let lo = 0, hi = array.length - 1;
  while (hi - lo > 1) {
    const middle = (lo + hi) >> 1;
    if (array[middle] < x) lo = middle; else hi = middle;
  }
  return Math.abs(array[lo] - x) <= Math.abs(array[hi] - x) ? lo : hi;
}

// An exponential mean over a share of the points, without a bias towards its start.
function smooth(values, share) {
  const keep = 1 - 2 / (Math.max(2, values.length * share) + 1), out = new Float64Array(values.length);
  for (let i = 0, sum = 0, weight = 0; i < values.length; i++) {
    sum = keep * sum + (1 - keep) * values[i];
    weight = keep * weight + (1 - keep);
    out[i] = sum / weight;
  }
  return out;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// A canvas context in CSS pixels, cleared.
function context(canvas) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.font = "11.5px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif";
  return { g, width, height };
}

// Puts a read-out beside the cursor, inside of its figure.
function place(read, figure, x, top) {
  const room = figure.clientWidth, width = read.offsetWidth;
  const left = x + 24 + width < room ? x + 24 : x - width - 4;
  read.style.left = `${Math.min(Math.max(left, 6), Math.max(room - width - 6, 6))}px`;
  read.style.top = `${top + 6}px`;
}

// A legend's entry, which hides and shows what it names.
function keyButton(text, color, dash, toggle) {
  const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg"), line = document.createElementNS(ns, "path");
  for (const [k, v] of Object.entries({ width: 18, height: 8, "aria-hidden": true })) svg.setAttribute(k, v);
  for (const [k, v] of Object.entries({ d: "M0 4H18", stroke: color, "stroke-width": 2.4, "stroke-dasharray": dash.join(" ") })) line.setAttribute(k, v);
  svg.append(line);
  const button = element("button", { className: "key" }, svg, text);
  button.setAttribute("aria-pressed", true);
  button.onclick = () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    toggle(shown);
  };
  return button;
}
