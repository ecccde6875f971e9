// Puts the page together.

const data = JSON.parse(document.getElementById("data").textContent);
const { runs } = data;
for (const run of runs) [run.series, run.settings].forEach(bare);
const view = { axis: "step", log: false, smoothing: 0, hidden: new Set() };
const all = [];
const report = document.getElementById("report");

function section(heading, ...content) {
  report.append(make("section", {}, make("h2", {}, heading), ...content));
}

function grid(charts) {
  all.push(...charts);
  return make("div", { class: "grid-of-charts" }, ...charts.map((chart) => chart.element));
}

let due = 0;
function redraw() {
  cancelAnimationFrame(due);
  due = requestAnimationFrame(() => all.forEach((chart) => chart.draw()));
}

document.getElementById("made").textContent = `${data.made}, bdh ${data.version}`;
if (runs.length === 1) document.querySelector("h1").textContent = runs[0].name;

const notes = runs.flatMap((run, i) => run.notes.map((note) => make("li", {}, swatch(i), make("b", {}, run.name), `: ${note}`)));
if (notes.length) report.append(make("ul", { class: "notes" }, ...notes));
section("Best figures", bestTable(runs));

const groups = curveGroups(runs, view);
if (groups.length) {
  report.append(controls(runs, view, redraw));
  for (const group of groups) {
    if (group.open) section(group.title, grid(group.charts));
    else report.append(make("details", { class: "section" }, make("summary", {}, make("h2", {}, group.title)), grid(group.charts)));
  }
}
const neurons = neuronsView(runs, view);
if (neurons) {
  all.push(...neurons.charts);
  section("Neurons, layer by layer", ...neurons.content);
}
if (runs.some((run) => Object.keys(run.settings).length)) section(runs.length > 1 ? "Differences of settings" : "Settings", ...settingsTable(runs));
if (runs.some((run) => run.samples.length)) section("Samples", ...samplesView(runs));
