// One chart: drawn anew whenever its size or the view changes.

const HEIGHT = 230, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 34;
const HINT = "Arrow keys read it, plus and minus zoom, 0 shows all. Drag to zoom, or turn the wheel once it is chosen.";
let charts = 0;

class Chart {
  /**
   * @param {string} title
   * @param {object[]} lines as in lines.js
   * @param {object[]} runs all runs of the page
   * @param {object} view what all charts share: {axis, log, smoothing, hidden}
   * @param {{unit?: string, note?: string, axis?: string, steady?: boolean}} options `axis`: not the shared one;
   *   `steady`: never smoothed
   */
  constructor(title, lines, runs, view, options = {}) {
    Object.assign(this, { title, lines, runs, view, options, zoom: null, cursor: null });
    this.clip = `clip-${(charts += 1)}`;
    this.svg = draw("svg", { class: "plot", height: HEIGHT, tabindex: "0", role: "group", "aria-label": `${title}. ${HINT}` });
    this.tip = make("div", { class: "tip", hidden: true });
    this.readout = make("output", { class: "unseen", "aria-live": "polite" });
    this.reset = make("button", { type: "button", hidden: true, click: () => this.zoomTo(null) }, "Show all");
    const note = options.note ? [make("span", { class: "note" }, options.note)] : [];
    this.element = make(
      "figure", { class: "chart" },
      make("figcaption", {}, make("h3", {}, title), ...note, this.reset),
      (this.frame = make("div", { class: "frame" }, this.svg, this.tip)), this.readout,
    );
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.frame);
  }

  get axis() {
    return this.options.axis ?? this.view.axis;
  }

  get log() {
    return this.view.log && this.options.axis === undefined;
  }

  draw() {
    const width = this.frame.clientWidth;
    if (!width) return;
    this.width = width;
    this.svg.setAttribute("width", width);
    this.svg.replaceChildren();
    this.tip.hidden = true;
    this.reset.hidden = this.zoom === null;
    const smoothing = this.options.steady ? 0 : this.view.smoothing;
    this.shown = this.lines.filter((line) => !this.view.hidden.has(line.run)).map((line) => ({
      ...line, raw: line.values,
      xs: along(this.runs[line.run], line.steps, this.axis),
      ys: line.marks ? line.values : smoothed(line.values, smoothing),
    }));
    this.full = extent(this.shown.map((line) => line.xs));
    const [low, high] = this.full === null ? [0, 1] : this.zoom ?? this.full;
    const margin = low === high ? Math.abs(low) * 0.1 || 1 : 0;
    this.x = scale(low - margin, high + margin, LEFT, width - RIGHT);
    const inside = this.shown.map((line) => this.visible(line, low, high));
    const range = extent(inside);
    if (this.full === null || range === null) {
      const empty = this.full === null ? "nothing to show" : "nothing here";
      this.svg.append(draw("text", { x: width / 2, y: HEIGHT / 2, class: "empty" }, empty));
      return;
    }
    this.y = this.verticalScale(range);
    this.drawAxes(low - margin, high + margin);
    this.drawLines(smoothing);
    this.marks = draw("g", { class: "marks" });
    this.selection = draw("rect", { class: "selection", y: TOP, height: HEIGHT - TOP - BOTTOM, width: 0, x: LEFT });
    this.svg.append(this.marks, this.selection);
  }

  /** Values of a line that lie between two places, and those next to them, so that lines that cross are seen. */
  visible(line, low, high) {
    const from = Math.max(0, firstNotBelow(line.xs, low) - (this.zoom ? 1 : 0));
    const to = firstNotBelow(line.xs, high) + 1;
    const found = line.ys.slice(from, to);
    return this.log ? found.filter((value) => value > 0) : found;
  }

  verticalScale([low, high]) {
    if (this.log) {
      const room = low === high ? 2 : (high / low) ** 0.05;
      [low, high] = [low / room, high * room];
    } else {
      const room = (high - low) * 0.06 || Math.abs(low) * 0.1 || 1;
      [low, high] = [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    }
    this.range = [low, high];
    return scale(low, high, HEIGHT - BOTTOM, TOP, this.log);
  }

  drawAxes(low, high) {
    const { width, axis } = this, bottom = HEIGHT - BOTTOM;
    const rows = this.log ? logTicks(...this.range) : ticks(...this.range, 6);
    for (const value of rows) {
      const at = this.y(value).toFixed(1);
      const text = words(value, this.options.unit, 3);
      this.svg.append(
        draw("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }),
        draw("text", { class: "tick", x: LEFT - 6, y: at, "text-anchor": "end", dy: "0.32em" }, text),
      );
    }
    const columns = ticks(low, high, Math.max(2, Math.floor(width / 110)));
    for (const value of axis === "layer" ? columns.filter(Number.isInteger) : columns) {
      const text = axis === "seconds" ? duration(value) : short(value, 3);
      const at = this.x(value), end = at > width - 40 ? "end" : "middle";
      this.svg.append(
        draw("line", { class: "stub", x1: at, x2: at, y1: bottom, y2: bottom + 4 }),
        draw("text", { class: "tick", x: end === "end" ? width - 2 : at, y: bottom + 16, "text-anchor": end }, text),
      );
    }
    this.svg.append(
      draw("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: bottom, y2: bottom }),
      draw("text", { class: "axis-title", x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, AXES[axis].title),
    );
  }

  drawLines(smoothing) {
    const area = { x: LEFT - 4, y: TOP - 4, width: Math.max(0, this.width - LEFT - RIGHT + 8), height: HEIGHT - TOP - BOTTOM + 8 };
    const group = draw("g", { "clip-path": `url(#${this.clip})` });
    this.svg.append(draw("clipPath", { id: this.clip }, draw("rect", area)), group);
    for (const line of this.shown) {
      const look = { class: `line run-${line.run % 8}`, "stroke-dasharray": line.run > 7 ? "5 3" : undefined };
      if (smoothing && !line.marks) {
        const d = pathOf(line.xs, line.raw, this.x, this.y, this.log);
        group.append(draw("path", { ...look, d, "stroke-opacity": 0.2 * (line.shade ?? 1) }));
      }
      const d = pathOf(line.xs, line.ys, this.x, this.y, this.log);
      group.append(draw("path", { ...look, d, "stroke-opacity": line.shade ?? 1 }));
      if (line.marks ? line.xs.length <= 80 : line.xs.length === 1) {
        line.xs.forEach((value, i) => {
          if (this.log && line.ys[i] <= 0) return;
          const at = { cx: this.x(value), cy: this.y(line.ys[i]), r: 3, opacity: line.shade ?? 1 };
          group.append(draw("circle", { class: `dot run-${line.run % 8}`, ...at }));
        });
      }
    }
  }

  // ---------------------------------------------------------------------------------------------- reading and zooming

  /** Shows what lies at a place of the axis; `speak` tells it to those who listen. */
  point(value, height = null, speak = false) {
    if (!this.marks) return;
    this.cursor = value;
    const near = (this.x.back(this.width) - this.x.back(0)) * 0.02;  // a line that has ended, or not begun, has no say
    const there = (line) => line.xs.length && value >= line.xs[0] - near && value <= line.xs.at(-1) + near;
    const found = this.shown.filter(there).map((line) => {
      const i = nearest(line.xs, value);
      return { line, at: line.xs[i], value: line.ys[i] };
    }).filter(({ at, value: v }) => at >= this.x.back(LEFT - 1) && at <= this.x.back(this.width - RIGHT + 1) && !(this.log && v <= 0));
    this.marks.replaceChildren();
    this.tip.hidden = found.length === 0;
    if (!found.length) return;
    const middle = found.reduce((best, one) => (Math.abs(one.at - value) < Math.abs(best.at - value) ? one : best)).at;
    if (height !== null) found.sort((a, b) => Math.abs(this.y(a.value) - height) - Math.abs(this.y(b.value) - height));
    const few = found.slice(0, 8);
    this.marks.append(draw("line", { class: "cursor", x1: this.x(middle), x2: this.x(middle), y1: TOP, y2: HEIGHT - BOTTOM }));
    for (const one of few) {
      this.marks.append(draw("circle", { class: `dot run-${one.line.run % 8}`, cx: this.x(one.at), cy: this.y(one.value), r: 4 }));
    }
    const place = this.placeName(middle);
    const rows = few.map((one) => make(
      "div", {}, swatch(one.line.run), make("span", {}, one.line.label), make("b", {}, words(one.value, this.options.unit, 5)),
    ));
    const more = found.length > few.length ? [make("div", { class: "note" }, `and ${found.length - few.length} more`)] : [];
    this.tip.replaceChildren(make("div", { class: "note" }, place), ...rows, ...more);
    const left = this.x(middle) + 12;
    this.tip.style.left = `${left + this.tip.offsetWidth > this.width ? Math.max(0, left - 24 - this.tip.offsetWidth) : left}px`;
    if (speak) {
      this.readout.textContent = `${place}: ${few.map((one) => `${one.line.label} ${words(one.value, this.options.unit, 5)}`).join(", ")}`;
    }
  }

  placeName(value) {
    const { title, unit } = AXES[this.axis];
    return `${title} ${unit === "duration" ? duration(value) : Math.round(value).toLocaleString("en-US")}`;
  }

  leave() {
    this.marks?.replaceChildren();
    this.tip.hidden = true;
  }

  /** Shows the part of the axis between two places, or all of it. */
  zoomTo(range) {
    const hadFocus = document.activeElement === this.reset;
    if (range !== null && this.full) {
      const [low, high] = [Math.max(range[0], this.full[0]), Math.min(range[1], this.full[1])];
      const whole = low <= this.full[0] && high >= this.full[1];
      if (!whole && high - low < (this.full[1] - this.full[0]) * 1e-4) return;
      range = whole ? null : [low, high];
    }
    this.zoom = range;
    this.draw();
    if (hadFocus) this.svg.focus();
  }

  zoomAround(value, factor) {
    if (!this.full) return;
    const [low, high] = this.zoom ?? this.full;
    this.zoomTo([value - (value - low) * factor, value + (high - value) * factor]);
  }

  listen() {
    const place = (event) => event.clientX - this.svg.getBoundingClientRect().left;
    let from = null;
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !this.marks) return;
      from = place(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (!this.marks) return;
      const at = Math.min(Math.max(place(event), LEFT), this.width - RIGHT);
      this.point(this.x.back(at), event.clientY - this.svg.getBoundingClientRect().top);
      if (from === null) return;
      this.selection.setAttribute("x", Math.min(from, at));
      this.selection.setAttribute("width", Math.abs(at - from));
    });
    const stop = (event) => {
      if (from === null) return;
      const at = Math.min(Math.max(place(event), LEFT), this.width - RIGHT);
      const chosen = [from, at].map(this.x.back).sort((a, b) => a - b);
      const far = Math.abs(at - from) > 6;
      from = null;
      this.selection.setAttribute("width", 0);
      if (far && event.type === "pointerup") this.zoomTo(chosen);
    };
    this.svg.addEventListener("pointerup", stop);
    this.svg.addEventListener("pointercancel", stop);
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("dblclick", () => this.zoomTo(null));
    this.svg.addEventListener("wheel", (event) => {
      if (!this.marks || !(event.ctrlKey || event.metaKey || document.activeElement === this.svg)) return;
      event.preventDefault();
      this.zoomAround(this.x.back(place(event)), event.deltaY > 0 ? 1.25 : 0.8);
    }, { passive: false });
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("blur", () => this.leave());
  }

  key(event) {
    if (!this.marks || event.ctrlKey || event.metaKey || event.altKey) return;
    const line = this.shown.reduce((most, one) => (one.xs.length > most.xs.length ? one : most));
    const [low, high] = this.zoom ?? this.full;
    const first = firstNotBelow(line.xs, low), last = Math.max(first, firstNotBelow(line.xs, high + 1e-9) - 1);
    const now = this.cursor === null ? first - 1 : nearest(line.xs, this.cursor);
    const go = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: first, End: last }[event.key];
    if (go !== undefined) this.point(line.xs[Math.min(Math.max(go, first), Math.min(last, line.xs.length - 1))], null, true);
    else if (event.key === "+" || event.key === "=") this.zoomAround(this.cursor ?? (low + high) / 2, 0.6);
    else if (event.key === "-") this.zoomAround(this.cursor ?? (low + high) / 2, 1 / 0.6);
    else if (event.key === "0" || event.key === "Escape") this.zoomTo(null);
    else return;
    event.preventDefault();
  }
}
