// Best figures, settings and samples.

// figure, its name, how to choose one value of a run, and which of several runs is the better one
const BEST = [
  ["validation_loss", "Validation loss", "lowest", "low"],
  ["perplexity", "Perplexity", "lowest", "low"],
  ["bits_per_byte", "Bits per byte", "lowest", "low"],
  ["validation_long_bits_per_byte", "Bits per byte beyond the block", "last", "low"],
  ["accuracy", "Accuracy", "highest", "high"],
  ["loss", "Training loss", "last", null],
  ["tokens_per_second", "Tokens a second", "median", "high"],
  ["mfu", "Model FLOP utilisation", "median", "high"],
  ["memory_bytes", "Memory", "highest", null],
];

function chosen([steps, values], how) {
  if (how === "last") return { value: values.at(-1), step: steps.at(-1) };
  if (how === "median") return { value: [...values].sort((a, b) => a - b)[values.length >> 1], step: null };
  let best = 0;
  values.forEach((value, i) => {
    if (how === "lowest" ? value < values[best] : value > values[best]) best = i;
  });
  return { value: values[best], step: steps[best] };
}

function runHeads(runs) {
  return runs.map((run, i) => make("th", { scope: "col" }, swatch(i), run.name));
}

function bestTable(runs) {
  const body = make("tbody");
  for (const [name, title, how, better] of BEST) {
    const found = runs.map((run) => (run.series[name] ? chosen(run.series[name], how) : null));
    const values = found.filter(Boolean).map((one) => one.value);
    if (!values.length) continue;
    const top = better && values.length > 1 ? Math[better === "low" ? "min" : "max"](...values) : null;
    const cells = found.map((one) => {
      if (!one) return make("td", {}, "–");
      const best = one.value === top ? [make("span", { class: "badge" }, "best")] : [];
      const step = one.step === null ? how : `${how === "last" ? "last, " : ""}step ${words(one.step, "whole")}`;
      return make("td", {}, make("b", {}, words(one.value, unitOf(name), 4)), ...best, make("div", { class: "note" }, step));
    });
    body.append(make("tr", {}, make("th", { scope: "row" }, title), ...cells));
  }
  body.append(make("tr", {}, make("th", { scope: "row" }, "Progress"), ...runs.map(progress)));
  return tableBox("Best figures", make("table", {}, make("thead", {}, make("tr", {}, make("td", {}), ...runHeads(runs))), body));
}

/** How far a run has come. */
function progress(run) {
  const step = run.places[0].at(-1) ?? 0, most = Number(run.settings["training.max_steps"]);
  const of = most ? ` of ${words(most, "whole")}` : "";
  const more = [`${short(run.places[1].at(-1) ?? 0)} tokens`, duration(run.places[2].at(-1) ?? 0)].join(", ");
  return make("td", {}, make("b", {}, `step ${words(step, "whole")}${of}`), make("div", { class: "note" }, more));
}

/** A setting as people write it. */
function settingText(text) {
  if (text === undefined) return "–";
  const value = JSON.parse(text);
  return typeof value === "string" ? value : text;
}

function settingsTable(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const known = runs.filter((run) => Object.keys(run.settings).length);
  const body = make("tbody"), none = make("p", { hidden: true }, "All settings are the same.");
  const box = tableBox("Settings", make("table", {}, make("thead", {}, make("tr", {}, make("td", {}), ...runHeads(runs))), body));
  const fill = (all) => {
    const shown = names.filter((name) => all || new Set(known.map((run) => run.settings[name])).size > 1);
    body.replaceChildren(...shown.map((name) => make(
      "tr", {}, make("th", { scope: "row" }, make("code", {}, name)),
      ...runs.map((run) => make("td", {}, settingText(run.settings[name]))),
    )));
    box.hidden = shown.length === 0;
    none.hidden = shown.length > 0;
  };
  const all = make("input", { type: "checkbox", change: () => fill(all.checked) });
  all.checked = runs.length < 2;
  fill(all.checked);
  return [make("label", { class: "choice" }, all, "all settings, not only those that differ"), none, box];
}

/** Samples of all runs at one step, side by side. */
function samplesView(runs) {
  const steps = [...new Set(runs.flatMap((run) => run.samples.map(([step]) => step)))].sort((a, b) => a - b);
  const columns = make("div", { class: "samples" });
  const show = (step) => columns.replaceChildren(...runs.map((run, i) => {
    const found = run.samples.findLast(([at]) => at <= step);
    const texts = found ? found[1].map((text) => make("pre", {}, text)) : [make("p", { class: "note" }, "nothing yet")];
    const at = found ? make("span", { class: "note" }, `step ${words(found[0], "whole")}`) : "";
    return make("section", {}, make("h3", {}, swatch(i), run.name, " ", at), ...texts);
  }));
  return [stepSlider("Samples up to step", steps, show), columns];
}

/** A slider over steps, with buttons to go to the next one; begins at the last. */
function stepSlider(label, steps, show) {
  const slider = make("input", { type: "range", min: 0, max: steps.length - 1, step: 1, "aria-label": label });
  const shown = make("output", {});
  const set = (index) => {
    const i = Math.min(Math.max(index, 0), steps.length - 1);
    slider.value = i;
    slider.setAttribute("aria-valuetext", `step ${steps[i]}`);
    shown.textContent = words(steps[i], "whole");
    back.disabled = i === 0;
    on.disabled = i === steps.length - 1;
    show(steps[i]);
  };
  const back = make("button", { type: "button", "aria-label": `${label}: the one before`, click: () => set(Number(slider.value) - 1) }, "‹");
  const on = make("button", { type: "button", "aria-label": `${label}: the next`, click: () => set(Number(slider.value) + 1) }, "›");
  slider.addEventListener("input", () => set(Number(slider.value)));
  set(steps.length - 1);
  return make("div", { class: "stepper" }, make("span", {}, label, " ", make("b", {}, shown)), back, slider, on);
}
