// What only a BDH has: activity and state, layer by layer.

const FAMILIES = ["active_x", "active_y", "active_z", "never_fired_x", "never_fired_y", "never_fired_z", "state_norm"];
const ABOUT = bare({
  active_x: "share of neurons, mean over tokens", active_y: "share of neurons, mean over tokens",
  active_z: "X and Y both; share, mean over tokens", never_fired_x: "share silent at every token",
  never_fired_y: "share silent at every token", never_fired_z: "share silent at every token",
  state_norm: "after a window of text",
});

/** Layers that runs tell of, of a family, from the first to the last. */
function layersOf(runs, family) {
  const found = runs.flatMap((run) => Object.keys(run.series)).map((name) => LAYERS.exec(name)).filter((match) => match?.[1] === family);
  return [...new Set(found.map((match) => Number(match[2])))].sort((a, b) => a - b);
}

/** By layer, what each run showed last up to a step. */
function profile(runs, family, layers, step) {
  return runs.flatMap((run, i) => {
    const points = layers.flatMap((layer) => {
      const series = run.series[`${family}/layer_${layer}`];
      const at = series ? firstNotBelow(series[0], step + 1) - 1 : -1;
      return at < 0 ? [] : [[layer, series[1][at]]];
    });
    return points.length ? [{ run: i, label: run.name, steps: points.map((p) => p[0]), values: points.map((p) => p[1]), marks: true }] : [];
  });
}

/** The section's content and its charts; nothing where no run tells of neurons. */
function neuronsView(runs, view) {
  const others = runs.flatMap((run) => Object.keys(run.series)).map((name) => LAYERS.exec(name)?.[1]).filter(Boolean);
  const families = [...new Set([...FAMILIES, ...others])].filter((family) => others.includes(family));
  if (!families.length) return null;
  const profiles = families.map((family) => {
    const layers = layersOf(runs, family);
    const chart = new Chart(title(family), [], runs, view, { unit: unitOf(family), axis: "layer", note: ABOUT[family], steady: true });
    return { family, layers, chart };
  });
  const steps = [...new Set(runs.flatMap((run) => Object.entries(run.series).flatMap(([name, series]) => (LAYERS.test(name) ? series[0] : []))))].sort((a, b) => a - b);
  const slider = stepSlider("By layer, at step", steps, (step) => {
    for (const { family, layers, chart } of profiles) {
      chart.lines = profile(runs, family, layers, step);
      chart.draw();
    }
  });
  const overTime = families.map((family) => {
    const names = layersOf(runs, family).map((layer) => `${family}/layer_${layer}`);
    const lines = familyLines(runs, names, (name) => `layer ${LAYERS.exec(name)[2]}`, { marks: true });
    return new Chart(title(family), lines, runs, view, { unit: unitOf(family), note: "a line a layer, later ones paler" });
  });
  if (runs.some((run) => run.series.never_fired)) {
    overTime.unshift(new Chart(title("never_fired"), linesOf(runs, "never_fired", { marks: true }), runs, view, { unit: "share" }));
  }
  const grid = (charts) => make("div", { class: "grid-of-charts" }, ...charts.map((chart) => chart.element));
  return {
    content: [
      slider, grid(profiles.map(({ chart }) => chart)),
      make("details", {}, make("summary", {}, "Over the course of training"), grid(overTime)),
    ],
    charts: [...profiles.map(({ chart }) => chart), ...overTime],
  };
}
