// Which figures make which chart.

const TITLES = bare({
  validation_loss: "Validation loss", perplexity: "Perplexity", bits_per_byte: "Bits per byte",
  perplexity_per_byte: "Perplexity per byte", accuracy: "Accuracy", learning_rate: "Learning rate",
  gradient_norm: "Gradient norm", parameter_norm: "Norm of all parameters", tokens_per_second: "Tokens a second",
  mfu: "Model FLOP utilisation", memory_bytes: "Memory", seconds_per_step: "Seconds of a step",
  evaluation_seconds: "Seconds of a validation", never_fired: "Neurons that never fired, in any layer",
  active_x: "Active neurons X", active_y: "Active neurons Y", active_z: "Active neurons Z",
  never_fired_x: "X never fired", never_fired_y: "Y never fired", never_fired_z: "Z never fired",
  state_norm: "Norm of the state S",
});
const PARTS = ["data", "forward", "backward", "optimizer", "checkpoint"].map((part) => `${part}_seconds`);
const FIRST = ["bits_per_byte", "perplexity", "accuracy", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "memory_bytes"];
const LAYERS = /^(.+)\/layer_(\d+)$/;

const title = (name) => TITLES[name] ?? name.replaceAll("_", " ");

function line(runs, run, name, label, more = {}) {
  const [steps, values] = runs[run].series[name];
  return { run, label, steps, values, ...more };
}

/** One line a run of a figure. */
function linesOf(runs, name, more = {}) {
  return runs.flatMap((run, i) => (run.series[name] ? [line(runs, i, name, run.name, more)] : []));
}

/** Lines of several figures of each run, paler from one to the next. */
function familyLines(runs, names, label, more = {}) {
  return runs.flatMap((run, i) => {
    const own = names.filter((name) => run.series[name]);
    return own.map((name, k) => line(runs, i, name, runs.length > 1 ? `${run.name}, ${label(name)}` : label(name), {
      shade: 1 - (0.7 * k) / Math.max(1, own.length), ...more,
    }));
  });
}

/** Charts by the section they belong to: [{title, open, charts}]. */
function curveGroups(runs, view) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.series)))].filter((name) => !LAYERS.test(name));
  const left = new Set(names);
  const take = (wanted) => wanted.filter((name) => left.delete(name));
  const single = (name) => {
    const marks = runs.every((run) => !run.series[name] || run.series.validation_loss?.[0].length === run.series[name][0].length);
    return new Chart(title(name), linesOf(runs, name, { marks }), runs, view, { unit: unitOf(name) });
  };
  const charts = [];
  const losses = take(["loss", "validation_loss"]);
  if (losses.length) {
    const training = linesOf(runs, "loss", { shade: losses.length > 1 ? 0.55 : 1 }).map((one) => ({ ...one, label: `${one.label}, training` }));
    const validation = linesOf(runs, "validation_loss", { marks: true }).map((one) => ({ ...one, label: `${one.label}, validation` }));
    charts.push(new Chart("Loss", [...training, ...validation], runs, view, { note: "nats a token; dots are validations" }));
  }
  charts.push(...take(FIRST).map(single));
  const parts = take(PARTS);
  const time = parts.length
    ? [new Chart("Parts of a step", familyLines(runs, parts, (name) => name.replace("_seconds", "")), runs, view, { unit: "seconds" })]
    : [];
  time.push(...take(["seconds_per_step", "evaluation_seconds"]).map(single));
  const parameters = take(["parameter_norm"]).map(single);
  for (const family of ["parameter_norm", "gradient_norm"]) {
    const members = take([...left].filter((name) => name.startsWith(`${family}/`)));
    const head = family === "parameter_norm" ? "Norms of parameters" : "Norms of their gradients";
    if (members.length) parameters.push(new Chart(head, familyLines(runs, members, (name) => name.slice(family.length + 1)), runs, view));
  }
  left.delete("never_fired");
  for (const name of left) if (name.startsWith("validation_long_")) left.delete(name); // of one step: in the table
  const others = [...left].map(single);
  return [
    { title: "Curves", open: true, charts },
    { title: "Where the time goes", open: false, charts: time },
    { title: "Parameters and gradients", open: false, charts: parameters },
    { title: "Other figures", open: false, charts: others },
  ].filter((group) => group.charts.length);
}

/** What all charts share, to be chosen. `redraw` is called after each choice. */
function controls(runs, view, redraw) {
  const choose = (name, value) => {
    view[name] = value;
    redraw();
  };
  const axis = make("select", { change: () => choose("axis", axis.value) }, ...["step", "tokens", "seconds"].map((name) => make("option", { value: name }, AXES[name].title)));
  const log = make("input", { type: "checkbox", change: () => choose("log", log.checked) });
  const shown = make("output", {}, "none");
  const smoothing = make("input", {
    type: "range", min: 0, max: 0.99, step: 0.01, value: 0,
    input: () => {
      shown.textContent = Number(smoothing.value) ? smoothing.value : "none";
      choose("smoothing", Number(smoothing.value));
    },
  });
  const toggles = runs.map((run, i) => {
    const box = make("input", {
      type: "checkbox", checked: true,
      change: () => {
        if (box.checked) view.hidden.delete(i);
        else view.hidden.add(i);
        redraw();
      },
    });
    return make("label", { class: "choice" }, box, swatch(i), run.name);
  });
  return make(
    "div", { class: "controls" },
    make("fieldset", { class: "runs" }, make("legend", {}, "Runs"), ...toggles),
    make("label", {}, "Over ", axis),
    make("label", { class: "choice" }, log, "log scale"),
    make("label", {}, "Smoothing ", smoothing, " ", shown),
  );
}
