/** The bins of tokens as columns of pixels, and which of their values are weak and which are strong. */

const WEAK = 0.04; // this part of the pixels has the colour of the ground …
const STRONG = 0.002; // … and this part that of the glow

export class Columns {
  /** Of each token, the bins of each layer. @type {Uint8Array[][]} */
  bins = [];
  /** The same, each with one byte for each row: the largest of its bins. @type {Uint8Array[][]} */
  pixels = [];
  /** How many pixels have each value. */
  counts = new Uint32Array(256);
  rows = 1;

  reset() {
    this.bins = [];
    this.#forgetPixels();
  }

  /** @param {string[]} raster of a token: of each layer, base64 of its bins */
  add(raster) {
    this.bins.push(raster.map((layer) => Uint8Array.from(atob(layer), (letter) => letter.charCodeAt(0))));
    this.#merge(this.bins[this.bins.length - 1]);
  }

  /** Makes columns of this height, at most. @param {number} rows */
  fit(rows) {
    const fitting = Math.max(1, Math.min(rows, this.bins[0]?.[0]?.length ?? 1));
    if (fitting === this.rows) return;
    this.rows = fitting;
    this.#forgetPixels();
    for (const layers of this.bins) this.#merge(layers);
  }

  /**
   * The values at which colours begin and end. They follow what there is so far: models differ, and so does how many
   * neurons share a pixel.
   *
   * @returns {[number, number]}
   */
  range() {
    const all = this.counts.reduce((sum, count) => sum + count, 0);
    const low = this.#quantile(WEAK * all);
    return [low, Math.max(low + 1, this.#quantile((1 - STRONG) * all))];
  }

  #forgetPixels() {
    this.pixels = [];
    this.counts.fill(0);
  }

  /** @param {Uint8Array[]} layers */
  #merge(layers) {
    const merged = layers.map((bins) => largest(bins, this.rows));
    for (const layer of merged) for (const value of layer) this.counts[value] += 1;
    this.pixels.push(merged);
  }

  /** @param {number} count that are at most the value */
  #quantile(count) {
    let sum = 0;
    const value = this.counts.findIndex((here) => (sum += here) >= count);
    return Math.max(0, value);
  }
}

/**
 * @param {Uint8Array} bins
 * @param {number} rows
 */
function largest(bins, rows) {
  return Uint8Array.from({ length: rows }, (_, row) => {
    const end = Math.ceil(((row + 1) * bins.length) / rows);
    let most = 0;
    for (let bin = Math.floor((row * bins.length) / rows); bin < end; bin += 1) most = Math.max(most, bins[bin]);
    return most;
  });
}
