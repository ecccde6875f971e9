/** The colours of the raster: from the ground, over embers, to a glow. */

/** @typedef {[number, number, number]} Colour red, green and blue */

/**
 * @typedef {object} Palette
 * @property {Colour[]} embers from weak to strong, at equal distances
 * @property {string} share of the bars
 * @property {string} prompt of the bars of tokens that were given
 * @property {string} chosen of the frame around a token, and of the ticks over others
 */

/** @type {Palette} */
const DARK = {
  embers: [
    [24, 20, 18],
    [72, 29, 20],
    [152, 54, 18],
    [244, 124, 32],
    [255, 238, 186],
  ],
  share: "#e0762b",
  prompt: "#75675c",
  chosen: "#7fd4ff",
};
/** @type {Palette} */
const LIGHT = {
  embers: [
    [253, 250, 247],
    [250, 222, 200],
    [243, 156, 84],
    [196, 66, 12],
    [74, 14, 6],
  ],
  share: "#c8520f",
  prompt: "#b3a598",
  chosen: "#0b62a8",
};

/**
 * @param {boolean} dark
 * @returns {Palette}
 */
export function palette(dark) {
  return dark ? DARK : LIGHT;
}

/**
 * The colour of each byte: that of the ground up to `low`, that of the glow from `high` on.
 *
 * @param {Palette} palette
 * @param {[number, number]} range
 * @returns {Uint8ClampedArray} three for each
 */
export function table({ embers }, [low, high]) {
  const colours = new Uint8ClampedArray(256 * 3);
  for (let byte = 0; byte < 256; byte += 1) {
    const at = Math.min(1, Math.max(0, (byte - low) / (high - low))) * (embers.length - 1);
    const below = Math.min(embers.length - 2, Math.floor(at));
    for (let part = 0; part < 3; part += 1) {
      const [from, to] = [embers[below][part], embers[below + 1][part]];
      colours[3 * byte + part] = from + (at - below) * (to - from);
    }
  }
  return colours;
}
