// Lines of charts: where their points lie on the chosen axis, and smoothed.
//
// A line is {run, label, steps, values, shade, marks}: `run` numbers the run, `shade` is its opacity.

const AXES = {
  step: { title: "step", unit: "number" },
  tokens: { title: "tokens", unit: "number" },
  seconds: { title: "time", unit: "duration" },
  layer: { title: "layer", unit: "number" },
};

/** The index of the first of the rising `numbers` that is not below `value`. */
function firstNotBelow(numbers, value) {
  let low = 0, high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The index of the number nearest to `value`. */
function nearest(numbers, value) {
  const after = Math.min(firstNotBelow(numbers, value), numbers.length - 1);
  return after > 0 && value - numbers[after - 1] < numbers[after] - value ? after - 1 : after;
}

/** Steps of a run on an axis; between two logged steps by a straight line. */
function along(run, steps, axis) {
  if (axis === "step" || axis === "layer") return steps;
  const known = run.places[0], values = run.places[axis === "tokens" ? 1 : 2];
  if (!known.length) return steps.map(() => 0);
  return steps.map((step) => {
    const after = Math.min(firstNotBelow(known, step), known.length - 1);
    const before = Math.max(0, after - 1);
    const width = known[after] - known[before];
    const part = width ? Math.min(1, Math.max(0, (step - known[before]) / width)) : 1;
    return values[before] + part * (values[after] - values[before]);
  });
}

/** A running mean that forgets: each point counts `weight` times as much as the one after it. */
function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0, norm = 0;
  return values.map((value) => {
    sum = sum * weight + value;
    norm = norm * weight + 1;
    return sum / norm;
  });
}

/** The smallest and the largest of numbers; nothing where there are none. */
function extent(lists) {
  let low = Infinity, high = -Infinity;
  for (const list of lists) {
    for (const value of list) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : null;
}

/** The drawing of a line: an SVG path through the points that lie on the chart. */
function pathOf(xs, ys, x, y, log) {
  let path = "", pen = "M";
  for (let i = 0; i < xs.length; i += 1) {
    if (log && ys[i] <= 0) {
      pen = "M";
      continue;
    }
    path += `${pen}${x(xs[i]).toFixed(1)} ${y(ys[i]).toFixed(1)}`;
    pen = "L";
  }
  return path;
}
