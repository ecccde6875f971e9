/**
 * The raster: a column for each token, a band for each layer with its neurons in bins, and under each band a bar for
 * the share of its neurons that are active. Only what is in sight is drawn, so that a text may be long.
 */

import { Columns } from "./columns.js";
import { make, part, shownShare } from "./dom.js";
import { palette, table } from "./palette.js";

/** @typedef {import("./brain.js").Token} Token */

const CELL = 6; // pixels of the page, as all of these
// All bands together, as a part of the window; one of them; the bars under it; and the gap under these.
const ROOMY = { bands: 0.25, least: 24, most: 90, share: 14, gap: 7 };
const COMPACT = { bands: 0.11, least: 12, most: 26, share: 0, gap: 3 };
const TOP = 6; // for the ticks over the first band

export class Raster {
  /** @type {Token[]} */
  tokens = [];
  columns = new Columns();
  /** @type {number | null} */
  chosen = null;
  /** @type {Set<number>} */
  marked = new Set();
  layers = 0;
  most = 0; // the largest share so far: the height of a full bar
  frame = 0;

  /** @param {(place: number) => void} onPick */
  constructor(onPick) {
    this.canvas = part("raster", HTMLCanvasElement);
    this.scroller = part("raster-scroll", HTMLElement);
    this.space = part("raster-space", HTMLElement);
    this.labels = part("raster-labels", HTMLElement);
    this.hint = part("raster-hint", HTMLElement);
    this.scratch = document.createElement("canvas");
    this.sizes = ROOMY;
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    this.palette = palette(scheme.matches);
    scheme.addEventListener("change", () => {
      this.palette = palette(scheme.matches);
      this.#draw();
    });
    this.canvas.addEventListener("click", (event) => {
      const place = this.#placeOf(event);
      if (place !== null) onPick(place);
    });
    this.canvas.addEventListener("pointermove", (event) => this.#tell(this.#placeOf(event)));
    this.canvas.addEventListener("pointerleave", () => this.#tell(null));
    this.scroller.addEventListener("scroll", () => this.#draw());
    new ResizeObserver(() => this.#draw()).observe(this.scroller);
    this.reset();
  }

  /** Forgets all tokens. */
  reset() {
    this.tokens = [];
    this.columns.reset();
    this.chosen = null;
    this.marked = new Set();
    this.layers = 0;
    this.most = 1e-9;
    this.labels.replaceChildren();
    this.#draw();
  }

  /** @param {Token[]} tokens that follow */
  add(tokens) {
    const { scroller } = this;
    const atEnd = scroller.scrollLeft + scroller.clientWidth > scroller.scrollWidth - 2 * CELL;
    for (const token of tokens) {
      this.tokens.push(token);
      this.columns.add(token.raster);
      this.most = Math.max(this.most, ...token.share);
    }
    if (this.layers === 0 && this.tokens.length > 0) {
      this.layers = this.tokens[0].share.length;
      this.#label();
    }
    this.space.style.width = `${CELL * this.tokens.length}px`;
    if (atEnd) scroller.scrollLeft = scroller.scrollWidth;
    this.#tell(null);
    this.#describe();
    this.#draw();
  }

  /** @param {number | null} place of a token */
  choose(place) {
    this.chosen = place;
    this.marked = new Set();
    if (place !== null) {
      const left = CELL * place;
      const { scrollLeft, clientWidth } = this.scroller;
      if (left < scrollLeft || left + CELL > scrollLeft + clientWidth)
        this.scroller.scrollLeft = left - clientWidth / 2;
    }
    this.#tell(null);
    this.#draw();
  }

  /** @param {Iterable<number>} places of tokens */
  mark(places) {
    this.marked = new Set(places);
    this.#draw();
  }

  /** @param {MouseEvent} event */
  #placeOf(event) {
    const place = Math.floor((event.offsetX + this.scroller.scrollLeft) / CELL);
    return place >= 0 && place < this.tokens.length ? place : null;
  }

  /** Whether there is little room: then there are no bars, and bands are low. @param {boolean} compact */
  set compact(compact) {
    this.sizes = compact ? COMPACT : ROOMY;
    this.#label();
    this.#draw();
  }

  get #band() {
    const { bands, least, most } = this.sizes;
    return Math.round(Math.min(most, Math.max(least, (bands * innerHeight) / Math.max(this.layers, 1))));
  }

  get #step() {
    return this.#band + this.sizes.share + this.sizes.gap;
  }

  #label() {
    this.labels.replaceChildren();
    for (let layer = 0; layer < this.layers; layer += 1) {
      const label = make("div", {}, make("b", {}, `Layer ${layer}`), make("span"));
      label.style.height = `${this.#step}px`;
      this.labels.append(label);
    }
    this.#tell(null);
  }

  /** @param {number | null} place of the token to tell about; null: of the chosen one, or else the last one */
  #tell(place) {
    const token = this.tokens[place ?? this.chosen ?? this.tokens.length - 1];
    this.hint.textContent = token ? `Token ${token.index} ${quoted(token.text)}` : "";
    [...this.labels.children].forEach((label, layer) => {
      const share = label.lastElementChild;
      if (share) share.textContent = token ? shownShare(token.share[layer]) : "";
    });
  }

  /** Says in words what the canvas shows. */
  #describe() {
    const means = Array.from({ length: this.layers }, (_, layer) => {
      const sum = this.tokens.reduce((all, token) => all + token.share[layer], 0);
      return `layer ${layer} ${shownShare(sum / this.tokens.length)}`;
    });
    const words = `Activity of the neurons over ${this.tokens.length} tokens. Active on average: ${means.join(", ")}.`;
    this.canvas.setAttribute("aria-label", words);
  }

  #draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.#drawNow());
  }

  #drawNow() {
    const context = this.canvas.getContext("2d");
    const width = this.scroller.clientWidth;
    const height = TOP + Math.max(this.layers, 1) * this.#step;
    const scale = devicePixelRatio;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    if (!context || this.layers === 0) return;
    context.scale(scale, scale);
    context.imageSmoothingEnabled = false;
    const left = this.scroller.scrollLeft;
    const first = Math.floor(left / CELL);
    const last = Math.min(this.tokens.length, Math.ceil((left + width) / CELL));
    if (last <= first) return;
    context.translate(-left, TOP);
    this.columns.fit(Math.round(this.#band * scale));
    const colours = table(this.palette, this.columns.range());
    for (let layer = 0; layer < this.layers; layer += 1) {
      const top = layer * this.#step;
      const columns = this.columns.pixels.slice(first, last).map((layers) => layers[layer]);
      paint(this.scratch, columns, colours);
      context.fillStyle = `rgb(${this.palette.embers[0].join(" ")})`;
      context.fillRect(left, top, width, this.#band);
      context.drawImage(this.scratch, first * CELL, top, (last - first) * CELL, this.#band);
      if (this.sizes.share > 0) this.#drawShares(context, layer, first, last, top + this.#step - this.sizes.gap);
    }
    this.#drawChoice(context, height - TOP - this.sizes.gap / 2);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {number} layer
   * @param {number} first
   * @param {number} last
   * @param {number} bottom
   */
  #drawShares(context, layer, first, last, bottom) {
    for (let place = first; place < last; place += 1) {
      const token = this.tokens[place];
      const tall = Math.max(1, ((this.sizes.share - 2) * token.share[layer]) / this.most);
      context.fillStyle = token.prompt ? this.palette.prompt : this.palette.share;
      context.fillRect(place * CELL, bottom - tall, CELL - 1, tall);
    }
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {number} height
   */
  #drawChoice(context, height) {
    context.fillStyle = this.palette.chosen;
    for (const place of this.marked) {
      context.beginPath();
      context.moveTo(place * CELL, -TOP);
      context.lineTo((place + 1) * CELL, -TOP);
      context.lineTo((place + 0.5) * CELL, -1);
      context.fill();
    }
    if (this.chosen === null) return;
    context.strokeStyle = this.palette.chosen;
    context.lineWidth = 1.5;
    context.strokeRect(this.chosen * CELL - 0.75, -1, CELL + 0.5, height + 1);
  }
}

/**
 * Paints columns of bytes, a pixel for each.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {Uint8Array[]} columns
 * @param {Uint8ClampedArray} colours of bytes
 */
function paint(canvas, columns, colours) {
  const rows = columns[0].length;
  canvas.width = columns.length;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  if (!context) return;
  const image = context.createImageData(columns.length, rows);
  columns.forEach((column, x) => {
    column.forEach((value, row) => {
      const at = 4 * (row * columns.length + x);
      for (let part = 0; part < 3; part += 1) image.data[at + part] = colours[3 * value + part];
      image.data[at + 3] = 255;
    });
  });
  context.putImageData(image, 0, 0);
}

/**
 * A token's text where it stands alone, with what cannot be seen made visible.
 *
 * @param {string} text
 */
export function quoted(text) {
  return `“${text.replaceAll("\n", "↵").replaceAll("\t", "⇥")}”`;
}
