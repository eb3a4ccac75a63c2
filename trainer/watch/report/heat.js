// Loads of experts: layers x experts at one time, and experts x time of one layer.

const OCTAVES = 2; // loads from a quarter to four times an even share have a colour of their own
const COLD = [49, 104, 190], HOT = [208, 78, 40];

function mixed(from, to, share) {
  return `rgb(${from.map((c, i) => Math.round(c + (to[i] - c) * share)).join(" ")})`;
}

function loadColor(load, even, none) {
  if (load === 0) return none;
  const at = Math.max(-1, Math.min(1, Math.log2(load) / OCTAVES));
  return mixed(even, at < 0 ? COLD : HOT, Math.abs(at));
}

const parts = (hex) => {
  const text = hex.length === 4 ? hex.replace(/[0-9a-f]/gi, "$&$&") : hex;
  return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
};

class Heat {
  constructor(figure, runs) {
    this.figure = figure;
    this.runs = runs.filter((run) => run.heat);
    this.run = this.runs[0];
    this.maps = ["time", "layers"].map((name) => this.map(name));
    this.ramp = element("canvas");
    const none = element("span", { textContent: "none at all: " }), dot = element("i");
    dot.style.cssText = "display:inline-block;width:10px;height:10px;background:var(--none);vertical-align:-1px";
    none.append(dot);
    figure.append(
      element("figcaption", {}, element("b", { textContent: "Load of experts" }),
        element("span", { className: "unit", textContent: "tokens over an even share" }),
        element("span", { className: "ramp end" }, "¼", this.ramp, "4 ×", none)),
      (this.controls = element("div", { className: "controls" })),
      element("div", { className: "maps" }, ...this.maps.map((m) => m.part)));
    this.control();
  }

  map(name) {
    const canvas = element("canvas"), title = element("h4"), read = element("div", { className: "read" });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Load of experts: ${name}`);
    const part = element("div", {}, title, canvas, read);
    part.style.position = "relative";
    const map = { name, canvas, title, part, read };
    canvas.onpointerdown = canvas.onpointermove = (e) => this.show(map, e);
    canvas.onpointerleave = canvas.onpointercancel = () => { read.style.display = "none"; };
    return map;
  }

  control() {
    const { load } = this.run.heat;
    this.time = load.length - 1;
    this.layer = 0;
    const range = (label, key, most) => {
      const input = element("input", { type: "range", min: 0, max: most, value: this[key], step: 1 });
      input.oninput = () => { this[key] = Number(input.value); this.draw(); };
      return element("label", {}, label, input);
    };
    const chosen = element("select", { ariaLabel: "Run" });
    this.runs.forEach((run, i) => chosen.append(element("option", { value: i, textContent: run.name })));
    chosen.value = this.runs.indexOf(this.run);
    chosen.onchange = () => { this.run = this.runs[chosen.value]; this.control(); this.draw(); };
    this.controls.replaceChildren(...(this.runs.length > 1 ? [chosen] : []),
      ...(load[0].length > 1 ? [range("layer", "layer", load[0].length - 1)] : []),
      ...(load.length > 1 ? [range("time", "time", load.length - 1)] : []));
  }

  // Rows from top to bottom, and what a cell is called.
  grid(name) {
    const { load, spans } = this.run.heat, count = (n) => n.toLocaleString("en");
    const when = ([a, b]) => (a === b ? `step ${count(a)}` : `steps ${count(a)} to ${count(b)}`);
    if (name === "layers") {
      return {
        rows: load[this.time], title: `layers × experts, ${when(spans[this.time])}`, x: "expert", y: "layer",
        first: 0, last: load[0][0].length - 1, say: (r, c) => `layer ${r}, expert ${c}`,
      };
    }
    const experts = load[0][0].map((_, e) => load.map((slice) => slice[this.layer][e]));
    return {
      rows: experts, title: `experts × time, layer ${this.layer}`, x: "step", y: "expert",
      first: spans[0][0], last: spans[spans.length - 1][1], say: (r, c) => `expert ${r}, ${when(spans[c])}`,
    };
  }

  draw() {
    let cells = 0;
    for (const map of this.maps) cells += this.paint(map);
    const { g, width, height } = context(this.ramp), even = parts(theme("even"));
    for (let x = 0; x < width; x++) {
      g.fillStyle = loadColor(2 ** ((2 * x / (width - 1) - 1) * OCTAVES), even, "");
      g.fillRect(x, 0, 1.5, height);
    }
    this.figure.dataset.drawn = cells;
  }

  paint(map) {
    const grid = (map.grid = this.grid(map.name));
    map.canvas.style.height = `${Math.min(Math.max(6 * grid.rows.length + 42, 236), 520)}px`;
    const { g, width, height } = context(map.canvas);
    const box = (map.box = { left: 44, top: 4, width: width - 52, height: height - 38 });
    const rows = grid.rows.length, columns = grid.rows[0].length, w = box.width / columns, h = box.height / rows;
    const even = parts(theme("even")), none = theme("none"), gap = Math.min(w, h) > 6 ? 1 : 0;
    map.title.textContent = grid.title;
    grid.rows.forEach((row, r) => row.forEach((load, c) => {
      g.fillStyle = loadColor(load, even, none);
      const x = box.left + c * w, y = box.top + r * h;
      g.fillRect(x, y, w - gap + (gap ? 0 : 0.4), h - gap + (gap ? 0 : 0.4));
    }));
    g.fillStyle = theme("muted");
    g.textAlign = "right"; g.textBaseline = "middle";
    const every = Math.ceil(rows / Math.max(1, Math.floor(box.height / 16)));
    for (let r = 0; r < rows; r += every) g.fillText(r, box.left - 6, box.top + (r + 0.5) * h);
    g.textBaseline = "top";
    const { ticks } = linearTicks(grid.first, grid.last, Math.min(6, columns));
    for (const t of ticks) {
      if (!Number.isInteger(t)) continue;
      const share = grid.x === "step" ? this.reached(t) / columns : (t + 0.5) / columns;
      g.textAlign = share > 0.97 ? "right" : "center";
      g.fillText(short(t), box.left + share * box.width, box.top + box.height + 5);
    }
    g.textAlign = "center"; g.textBaseline = "alphabetic";
    g.fillText(grid.x, box.left + box.width / 2, height - 3);
    g.save(); g.translate(10, box.top + box.height / 2); g.rotate(-Math.PI / 2); g.fillText(grid.y, 0, 0); g.restore();
    return rows * columns;
  }

  // How many stretches, and which part of one, lie before a step.
  reached(step) {
    const { spans } = this.run.heat, next = spans.findIndex(([, last]) => last >= step);
    const c = next < 0 ? spans.length - 1 : next, [first, last] = spans[c];
    return c + Math.min(Math.max((step - first) / (last - first + 1), 0), 1);
  }

  show(map, e) {
    const { grid, box } = map, rows = grid.rows.length, columns = grid.rows[0].length;
    const c = Math.floor(((e.offsetX - box.left) / box.width) * columns), r = Math.floor(((e.offsetY - box.top) / box.height) * rows);
    const inside = c >= 0 && r >= 0 && c < columns && r < rows;
    map.read.style.display = inside ? "block" : "none";
    if (!inside) return;
    map.read.replaceChildren(element("div", { className: "at", textContent: grid.say(r, c) }),
      element("div", {}, element("span", { className: "v", textContent: `${short(grid.rows[r][c])} × an even share` })));
    place(map.read, map.part, e.offsetX, map.canvas.offsetTop);
  }
}
