// The time line: a lane for each run, with what happened to it.

const MARKS = {
  checkpoint: { color: "#3ca951", name: "checkpoint" },
  attempt: { color: "#4269d0", name: "attempt" },
  skipped: { color: "#e4572e", name: "skipped update" },
  "not finite": { color: "#e4572e", name: "not finite" },
  warning: { color: "#d99a0b", name: "warning" },
  stop: { color: "#8b929c", name: "told to stop" },
  error: { color: "#c2255c", name: "error" },
};
const LANE = 34;

class Timeline {
  constructor(figure, runs) {
    Object.assign(this, { figure, runs, off: new Set() });
    const found = new Set(runs.flatMap((run) => run.events.map((e) => e.kind)));
    const keys = element("span", { className: "keys" });
    for (const [kind, { color, name }] of Object.entries(MARKS)) {
      if (!found.has(kind)) continue;
      keys.append(keyButton(name, color, [], (shown) => {
        if (shown) this.off.delete(kind); else this.off.add(kind);
        this.draw();
      }));
    }
    this.canvas = element("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "Events; the lists below say the same in words");
    this.read = element("div", { className: "read" });
    this.figure.append(element("figcaption", {}, element("b", { textContent: "Time line" }), keys), this.canvas, this.read);
    this.canvas.onpointerdown = this.canvas.onpointermove = (e) => this.show(e.offsetX, e.offsetY);
    this.canvas.onpointerleave = this.canvas.onpointercancel = () => { this.read.style.display = "none"; };
  }

  draw() {
    const runs = this.runs.filter((_, r) => !view.hidden.has(r)), several = this.runs.length > 1;
    this.canvas.style.height = `${LANE * Math.max(runs.length, 1) * (several ? 1.25 : 1) + 40}px`;
    const { g, width, height } = context(this.canvas), box = { left: 12, right: width - 12, bottom: height - 37 };
    const ends = runs.map((run) => Math.max(...positions(run.axis, view.x, [run.axis.step[run.axis.step.length - 1]]), 0));
    const [x0, x1] = view.zoom[view.x] ?? [0, Math.max(...ends, 1e-9)];
    const X = (x) => box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left);
    const axis = AXES[view.x], scale = axis.scale(x1), columns = linearTicks(x0 / scale, x1 / scale, Math.max(2, Math.round(width / 84)));
    const say = tickWriter(columns.ticks, columns.step);
    g.fillStyle = theme("muted"); g.strokeStyle = theme("grid"); g.textAlign = "center"; g.textBaseline = "top";
    for (const t of columns.ticks) {
      const x = Math.round(X(t * scale)) + 0.5;
      g.beginPath(); g.moveTo(x, 0); g.lineTo(x, box.bottom + 3); g.stroke();
      g.textAlign = x > width - 24 ? "right" : x < 24 ? "left" : "center";
      g.fillText(say(t), x, box.bottom + 6);
    }
    g.textAlign = "center"; g.textBaseline = "alphabetic";
    g.fillText(axis.title(x1), width / 2, height - 4);
    this.marks = [];
    const lane = box.bottom / Math.max(runs.length, 1);
    runs.forEach((run, i) => {
      const y = (i + (several ? 0.68 : 0.5)) * lane;
      if (several) {
        g.fillStyle = theme("text"); g.textAlign = "left"; g.textBaseline = "bottom";
        g.fillText(run.name, box.left, y - 9);
      }
      g.strokeStyle = several ? colorOf(this.runs.indexOf(run)) : theme("muted");
      g.lineWidth = 2;
      g.beginPath(); g.moveTo(X(Math.max(0, x0)), y); g.lineTo(X(Math.min(ends[i], x1)), y); g.stroke();
      const at = positions(run.axis, view.x, run.events.map((e) => e.step));
      for (const kind of Object.keys(MARKS)) {
        run.events.forEach((event, k) => {
          if (event.kind !== kind || this.off.has(kind) || at[k] < x0 || at[k] > x1) return;
          this.mark(g, kind, X(at[k]), y);
          this.marks.push({ x: X(at[k]), y, event });
        });
      }
    });
    this.figure.dataset.drawn = this.marks.length;
  }

  mark(g, kind, x, y) {
    g.strokeStyle = g.fillStyle = MARKS[kind].color;
    g.lineWidth = 2;
    g.beginPath();
    if (kind === "checkpoint") g.arc(x, y, 3.5, 0, 7);
    else if (kind === "attempt") g.rect(x - 1.5, y - 9, 3, 18);
    else if (kind === "warning") { g.moveTo(x, y - 8); g.lineTo(x + 5, y + 1); g.lineTo(x - 5, y + 1); g.closePath(); }
    else if (kind === "error" || kind === "stop") g.rect(x - 4, y - 4, 8, 8);
    else {
      g.moveTo(x - 4, y - 4); g.lineTo(x + 4, y + 4); g.moveTo(x + 4, y - 4); g.lineTo(x - 4, y + 4);
      g.stroke();
      return;
    }
    g.fill();
  }

  show(x, y) {
    const near = this.marks.filter((m) => Math.abs(m.x - x) <= 7 && Math.abs(m.y - y) <= 18).slice(-6);
    this.read.style.display = near.length ? "block" : "none";
    if (!near.length) return;
    this.read.replaceChildren(...near.map(({ event }) => {
      const mark = element("i");
      mark.style.background = MARKS[event.kind].color;
      return element("div", {}, mark, element("span", { textContent: `step ${event.step.toLocaleString("en")}: ${event.text}` }));
    }));
    place(this.read, this.figure, x, this.canvas.offsetTop + Math.max(0, y - 30));
  }
}
