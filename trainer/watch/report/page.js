// Puts the plots onto the page. <html> gets data-ready, the milliseconds from the page's start until all are drawn and
// on the screen, and data-error where something went wrong.

for (const kind of ["error", "securitypolicyviolation"]) {
  window.addEventListener(kind, (e) => { document.documentElement.dataset.error = e.message ?? `refused: ${e.blockedURI}`; });
}

const { plots, runs } = JSON.parse(document.getElementById("data").textContent);
const byId = new Map(plots.map((plot) => [plot.id, plot]));
const drawings = [];
for (const figure of document.querySelectorAll("[data-plot]")) {
  drawings.push(new Chart(figure, byId.get(figure.dataset.plot), runs));
}
for (const figure of document.querySelectorAll("[data-heat]")) drawings.push(new Heat(figure, runs));
for (const figure of document.querySelectorAll("[data-timeline]")) drawings.push(new Timeline(figure, runs));

view.redraw = () => {
  for (const drawing of drawings) drawing.draw();
  whole.hidden = !Object.keys(view.zoom).length;
};

// One of several values, as a row of buttons.
function choice(label, options, chosen, choose) {
  const group = element("div", { className: "group" }, element("span", { textContent: label }));
  for (const [text, value] of options) {
    const button = element("button", { textContent: text });
    button.setAttribute("aria-pressed", value === chosen);
    button.onclick = () => {
      for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
      choose(value);
      view.redraw();
    };
    group.append(button);
  }
  return group;
}

const tools = document.getElementById("tools");
if (runs.length > 1) {
  const group = element("div", { className: "group runs" });
  runs.forEach((run, r) => group.append(keyButton(run.name, colorOf(r), [], (shown) => {
    if (shown) view.hidden.delete(r); else view.hidden.add(r);
    view.redraw();
  })));
  tools.append(group);
}
const whole = element("button", { textContent: "Show all", hidden: true, title: "Undo the zoom" });
whole.onclick = () => { view.zoom = {}; view.redraw(); };
tools.append(
  choice("against", [["tokens", "tokens"], ["steps", "step"], ["time", "seconds"]], view.x, (x) => { view.x = x; }),
  choice("smooth", [["no", 0], ["a little", 0.02], ["more", 0.1]], 0, (share) => { view.smoothing = share; }),
  whole);

view.redraw();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; view.redraw(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.redraw());
// The second frame begins when the first, which shows the plots, is done.
requestAnimationFrame(() => requestAnimationFrame(() => {
  document.documentElement.dataset.ready = performance.now().toFixed(0);
}));
