// One plot of lines.

// What all plots share: hidden runs, the axis that the reader has chosen, zoom by axis, smoothing.
const view = { hidden: new Set(), x: "tokens", zoom: {}, smoothing: 0, redraw: () => {} };

const MARKERS = 60; // up to so many points have dots
const SETTLED = 0.02; // share of the axis after which a loss has left its first values

class Chart {
  constructor(figure, plot, runs) {
    Object.assign(this, { figure, plot, runs, log: plot.log, off: new Set(), cursor: null, drag: null });
    this.canvas = element("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `${plot.title}, ${plot.unit}`);
    this.read = element("div", { className: "read" });
    this.series = [];
    runs.forEach((run, r) => plot.lines.forEach((line, l) => {
      const found = run.series[line.key];
      if (found) this.series.push(this.prepare(run, r, line, l, found));
    }));
    figure.prepend(this.caption(), this.canvas, ...this.keys());
    figure.append(this.read);
    this.listen();
  }

  prepare(run, r, line, l, found) {
    const several = this.runs.length > 1, isPoints = line.key.startsWith("val_");
    return {
      run, r, l, found, isPoints, dots: isPoints && (!several || this.plot.lines.length === 1),
      name: several ? run.name : line.label,
      color: colorOf(several ? r : l), dash: several ? DASHES[l % DASHES.length] : [], cache: {},
    };
  }

  caption() {
    const log = element("button", { className: "small end", textContent: "log", title: "Logarithmic axis" });
    log.setAttribute("aria-pressed", this.log);
    log.onclick = () => { this.log = !this.log; log.setAttribute("aria-pressed", this.log); this.draw(); };
    const { title, unit } = this.plot;
    return element("figcaption", {}, element("b", { textContent: title }),
      element("span", { className: "unit", textContent: unit }), log);
  }

  keys() {
    const { lines } = this.plot;
    return lines.length > 1 ? [element("div", { className: "keys" }, ...lines.map((line, l) => this.key(line, l)))] : [];
  }

  key(line, l) {
    const several = this.runs.length > 1;
    return keyButton(line.label, several ? theme("muted") : colorOf(l), several ? DASHES[l % DASHES.length] : [],
      (shown) => { if (shown) this.off.delete(l); else this.off.add(l); this.draw(); });
  }

  get kind() { return this.plot.x ?? view.x; }

  get visible() { return this.series.filter((s) => !view.hidden.has(s.r) && !this.off.has(s.l)); }

  // Faint and strong points of a series on the present axis.
  points(s) {
    const key = `${this.kind} ${view.smoothing}`;
    if (s.cache[key]) return s.cache[key];
    const at = (steps) => positions(s.run.axis, this.kind, steps), { found } = s;
    const raw = { x: at(found.step), y: found.value };
    let strong = found.mean ? { x: at(found.mean_step), y: found.mean } : raw;
    if (view.smoothing && this.plot.noisy && !s.isPoints) strong = { x: strong.x, y: smooth(strong.y, view.smoothing) };
    return (s.cache[key] = { raw, strong, hasFaint: strong.y !== raw.y });
  }

  expectations() {
    return this.plot.expected ? this.runs.flatMap((run, r) =>
      run.expected && !view.hidden.has(r) ? [{ run, r, loss: run.expected.loss }] : []) : [];
  }

  // Limits of both axes.
  domain() {
    const zoom = view.zoom[this.kind];
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const s of this.visible) {
      const { raw } = this.points(s);
      x0 = Math.min(x0, raw.x[0]); x1 = Math.max(x1, raw.x[raw.x.length - 1]);
    }
    if (x0 < 0.5 * x1) x0 = 0;
    if (zoom) [x0, x1] = zoom;
    const from = this.plot.settled && !zoom && !this.log ? x0 + SETTLED * (x1 - x0) : x0;
    const take = (y) => { if (!this.log || y > 0) { y0 = Math.min(y0, y); y1 = Math.max(y1, y); } };
    for (const s of this.visible) {
      const { raw } = this.points(s);
      for (let i = 0; i < raw.y.length; i++) if (raw.x[i] >= from && raw.x[i] <= x1) take(raw.y[i]);
    }
    if (y0 > y1) [y0, y1] = this.log ? [0.1, 1] : [0, 1];
    for (const { loss } of this.expectations()) take(loss);
    if (!(x1 > x0)) [x0, x1] = [x0 - 0.5, x0 + 0.5];
    if (this.log) {
      const pad = (y1 / y0) ** 0.05;
      return y1 > y0 ? { x0, x1, y0: y0 / pad, y1: y1 * pad } : { x0, x1, y0: y0 / 2, y1: y1 * 2 };
    }
    const pad = y1 > y0 ? 0.06 * (y1 - y0) : Math.abs(y0) * 0.1 || 1;
    return { x0, x1, y0: y0 >= 0 && y0 - pad < 0 ? 0 : y0 - pad, y1: y1 <= 0 && y0 < 0 ? Math.min(y1 + pad, 0) : y1 + pad };
  }

  draw() {
    const { g, width, height } = context(this.canvas), d = this.domain();
    const box = { left: 52, right: width - 10, top: 8, bottom: height - 37 };
    const warp = this.log ? Math.log : (v) => v;
    const X = (x) => box.left + ((x - d.x0) / (d.x1 - d.x0)) * (box.right - box.left);
    const Y = (y) => box.bottom - ((warp(y) - warp(d.y0)) / (warp(d.y1) - warp(d.y0))) * (box.bottom - box.top);
    this.frame = { d, box, X, Y };
    this.axes(g, d, box, X, Y);
    g.save();
    g.beginPath();
    g.rect(box.left, box.top - 4, box.right - box.left + 4, box.bottom - box.top + 5);
    g.clip();
    if (this.runs.length === 1) this.restarts(g, box, X);
    let drawn = 0;
    for (const s of this.visible) this.faint(g, s, box, X, Y);
    for (const s of this.visible) drawn += this.line(g, s, X, Y);
    for (const e of this.expectations()) this.expected(g, e, box, X, Y);
    if (this.drag) {
      g.fillStyle = theme("accent"); g.globalAlpha = 0.15;
      g.fillRect(Math.min(this.drag.from, this.drag.to), box.top, Math.abs(this.drag.to - this.drag.from), box.bottom - box.top);
      g.globalAlpha = 1;
    } else if (this.cursor !== null) this.cross(g, box, X, Y);
    g.restore();
    this.figure.dataset.drawn = drawn;
  }

  axes(g, d, box, X, Y) {
    g.strokeStyle = theme("grid"); g.fillStyle = theme("muted"); g.lineWidth = 1;
    const size = this.plot.percent ? 0.01 : 1, rows = Math.max(3, Math.round((box.bottom - box.top) / 44));
    const logs = this.log ? logTicks(d.y0 / size, d.y1 / size, rows) : null;
    const even = linearTicks(d.y0 / size, d.y1 / size, rows), ticks = logs ?? even.ticks;
    const write = logs ? (v) => short(v, 3) : tickWriter(ticks, even.step);
    g.textAlign = "right"; g.textBaseline = "middle";
    for (const t of ticks) {
      const y = Math.round(Y(t * size)) + 0.5;
      if (y < box.top - 1 || y > box.bottom + 1) continue;
      g.beginPath(); g.moveTo(box.left, y); g.lineTo(box.right, y); g.stroke();
      g.fillText(write(t) + (this.plot.percent ? " %" : ""), box.left - 6, y);
    }
    const axis = AXES[this.kind], scale = axis.scale(d.x1);
    const columns = linearTicks(d.x0 / scale, d.x1 / scale, Math.max(2, Math.round((box.right - box.left) / 84)));
    const say = tickWriter(columns.ticks, columns.step);
    g.textBaseline = "top"; g.strokeStyle = theme("line");
    for (const t of columns.ticks) {
      const x = Math.round(X(t * scale)) + 0.5, text = say(t), half = g.measureText(text).width / 2;
      g.beginPath(); g.moveTo(x, box.bottom); g.lineTo(x, box.bottom + 4); g.stroke();
      g.textAlign = "center";
      g.fillText(text, Math.min(x, box.right + 9 - half), box.bottom + 6);
    }
    g.beginPath(); g.moveTo(box.left, box.bottom + 0.5); g.lineTo(box.right, box.bottom + 0.5); g.stroke();
    g.textBaseline = "alphabetic";
    g.fillText(axis.title(d.x1), (box.left + box.right) / 2, box.bottom + 33);
  }

  // What the strong line is a mean of: under all strong lines, fainter the more runs there are.
  faint(g, s, box, X, Y) {
    const { raw, hasFaint } = this.points(s);
    if (!hasFaint) return;
    g.strokeStyle = g.fillStyle = s.color; g.lineWidth = 1;
    g.globalAlpha = Math.max(0.08, 0.34 / Math.sqrt(this.runs.length));
    if (X(raw.x[raw.x.length - 1]) - X(raw.x[0]) < raw.x.length) this.bars(g, raw, box, X, Y);
    else this.path(g, raw, X, Y);
    g.globalAlpha = 1;
  }

  // A line with more points than pixels: in each column from its least to its largest value.
  bars(g, { x, y }, box, X, Y) {
    let column = NaN, top, bottom, last;
    const flush = () => { if (column >= box.left) g.fillRect(column, top, 1, Math.max(bottom - top, 1)); };
    for (let i = 0; i < y.length; i++) {
      if (this.log && y[i] <= 0) continue;
      const at = Math.round(X(x[i])), py = Y(y[i]);
      if (at !== column) {
        flush();
        top = bottom = column === at - 1 ? last : py;
        column = at;
      }
      top = Math.min(top, py); bottom = Math.max(bottom, py); last = py;
    }
    flush();
  }

  line(g, s, X, Y) {
    const { raw, strong } = this.points(s);
    g.strokeStyle = g.fillStyle = s.color;
    g.lineJoin = "bevel"; g.lineWidth = 1.6; g.setLineDash(s.dash);
    this.path(g, strong, X, Y);
    g.setLineDash([]);
    if (strong.y.length === 1 || (s.dots && strong.y.length <= MARKERS)) {
      for (let i = 0; i < strong.y.length; i++) {
        if (this.log && strong.y[i] <= 0) continue;
        g.beginPath(); g.arc(X(strong.x[i]), Y(strong.y[i]), 2.8, 0, 7); g.fill();
      }
    }
    return raw.y.length;
  }

  path(g, { x, y }, X, Y) {
    g.beginPath();
    for (let i = 0, pen = false; i < y.length; i++) {
      if (this.log && y[i] <= 0) { pen = false; continue; }
      if (pen) g.lineTo(X(x[i]), Y(y[i])); else g.moveTo(X(x[i]), Y(y[i]));
      pen = true;
    }
    g.stroke();
  }

  restarts(g, box, X) {
    const run = this.runs[0], steps = run.events.filter((e) => e.kind === "attempt" && e.step > 0).map((e) => e.step);
    g.strokeStyle = theme("muted"); g.globalAlpha = 0.5; g.setLineDash([1, 3]);
    for (const x of positions(run.axis, this.kind, steps)) {
      g.beginPath(); g.moveTo(X(x), box.top); g.lineTo(X(x), box.bottom); g.stroke();
    }
    g.setLineDash([]); g.globalAlpha = 1;
  }

  expected(g, { r, loss }, box, X, Y) {
    const single = this.runs.length === 1;
    g.strokeStyle = g.fillStyle = single ? theme("muted") : colorOf(r);
    g.lineWidth = 1.2; g.setLineDash([7, 4]);
    g.beginPath(); g.moveTo(box.left, Y(loss)); g.lineTo(box.right, Y(loss)); g.stroke();
    g.setLineDash([]);
    if (!single) return;
    g.textAlign = "left"; g.textBaseline = "bottom";
    g.fillText(`expected at the end ${loss.toFixed(3)}`, box.left + 8, Y(loss) - 3);
  }

  cross(g, box, X, Y) {
    const near = this.near();
    if (!near.length) return;
    g.strokeStyle = theme("muted"); g.lineWidth = 1;
    const x = Math.round(X(near[0].x)) + 0.5;
    g.beginPath(); g.moveTo(x, box.top); g.lineTo(x, box.bottom); g.stroke();
    for (const n of near) {
      g.fillStyle = n.s.color;
      g.beginPath(); g.arc(X(n.x), Y(n.y), 3.4, 0, 7); g.fill();
    }
  }

  // The nearest value of every line that reaches the cursor.
  near() {
    const { d } = this.frame, reach = 0.02 * (d.x1 - d.x0);
    return this.visible.flatMap((s) => {
      const { strong } = this.points(s), i = nearest(strong.x, this.cursor), x = strong.x[i];
      const isThere = this.cursor >= strong.x[0] - reach && this.cursor <= strong.x[strong.x.length - 1] + reach;
      return isThere ? [{ s, x, y: strong.y[i] }] : [];
    });
  }

  show(at) {
    const near = this.near(), value = (y) => (this.plot.percent ? `${short(100 * y)} %` : short(y, 5));
    this.read.style.display = near.length ? "block" : "none";
    if (!near.length) return;
    const rows = new Map(); // of several runs each has one row, with the values of all lines
    for (const n of near) {
      const key = this.runs.length > 1 ? n.s.r : n.s.l, row = rows.get(key);
      if (row) row.text += ` · ${value(n.y)}`;
      else rows.set(key, { s: n.s, text: value(n.y) });
    }
    const lines = [...new Set(near.map((n) => this.plot.lines[n.s.l].label))];
    const what = this.runs.length > 1 && lines.length > 1 ? `: ${lines.join(" · ")}` : "";
    this.read.replaceChildren(element("div", { className: "at", textContent: AXES[this.kind].say(near[0].x) + what }),
      ...[...rows.values()].map(({ s, text }) => {
        const mark = element("i");
        mark.style.background = s.color;
        return element("div", {}, mark, element("span", { textContent: s.name }), element("span", { className: "v", textContent: text }));
      }));
    place(this.read, this.figure, at, this.canvas.offsetTop);
  }

  listen() {
    const c = this.canvas, inside = (x) => Math.min(Math.max(x, this.frame.box.left), this.frame.box.right);
    const toX = (px) => {
      const { d, box } = this.frame;
      return d.x0 + ((inside(px) - box.left) / (box.right - box.left)) * (d.x1 - d.x0);
    };
    c.onpointerdown = (e) => {
      if (e.pointerType === "mouse" && e.button === 0) {
        this.drag = { from: inside(e.offsetX), to: inside(e.offsetX) };
        c.setPointerCapture(e.pointerId);
      }
      c.onpointermove(e);
    };
    c.onpointermove = (e) => {
      if (this.drag) this.drag.to = inside(e.offsetX);
      this.cursor = toX(e.offsetX);
      this.draw();
      this.show(e.offsetX);
    };
    c.onpointerup = () => {
      const { drag } = this;
      this.drag = null;
      if (drag && Math.abs(drag.to - drag.from) > 6) {
        view.zoom[this.kind] = [toX(Math.min(drag.from, drag.to)), toX(Math.max(drag.from, drag.to))];
        view.redraw();
      } else this.draw();
    };
    c.onpointerleave = c.onpointercancel = () => {
      this.cursor = this.drag = null;
      this.read.style.display = "none";
      this.draw();
    };
    c.ondblclick = () => { view.zoom = {}; view.redraw(); };
  }
}
