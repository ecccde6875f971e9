/** What one token did: its neurons, its synapses, and where it read from. And what one neuron is excited by. */

import { explained } from "./notices.js";
import { button, make, part, shownCount, shownShare } from "./dom.js";
import { quoted } from "./raster.js";

/**
 * @typedef {{from: number, to: number, strength: number}} Synapse
 * @typedef {{index: number, text: string, weight: number}} Source
 * @typedef {{index: number, text: string, activity: number}} Excitement
 * @typedef {{neuron: number, activity: number}} Neuron
 * @typedef {{neurons: Neuron[], written: Synapse[], read: Synapse[], sources: Source[]}} Lists
 * @typedef {{log_decay: number[] | null, write_strength: number[] | null}} Gates
 * @typedef {{layer: number, active: number, share: number} & Lists & Gates} Layer
 * @typedef {{index: number, id: number, text: string, layers: Layer[]}} TokenDetails
 * @typedef {{layer: number, neuron: number, head: number}} Place
 * @typedef {{fired: number, of: number, tokens: Excitement[]} & Place} NeuronDetails
 * @typedef {{label: Node, value: number}} Bar
 */

const AT_FIRST = 8; // entries of a list

export class Details {
  /**
   * @param {import("./api.js").Api} api
   * @param {(index: number) => void} onPick a token
   * @param {(weights: Map<number, number>) => void} onMark tokens by index, from 0 to 1
   */
  constructor(api, onPick, onMark) {
    this.api = api;
    this.onPick = onPick;
    this.onMark = onMark;
    this.box = part("details", HTMLElement);
    this.layer = 0; // the one that is shown, of every token
    this.trace = "";
    /** The index of the token that is shown; null where a neuron is, or nothing. @type {number | null} */
    this.token = null;
    this.calls = 0; // an answer to an older call comes too late
  }

  /** Shows nothing. */
  clear() {
    this.calls += 1;
    this.token = null;
    this.box.replaceChildren();
    this.box.hidden = true;
  }

  /**
   * @param {string} trace
   * @param {number} index
   */
  async showToken(trace, index) {
    this.trace = trace;
    this.token = index;
    /** @type {TokenDetails | null} */
    const token = await this.#get(`tokens/${index}`);
    if (token) this.#showToken(token);
  }

  /**
   * @param {number} layer
   * @param {number} neuron
   * @param {TokenDetails} from where it was chosen
   */
  async #showNeuron(layer, neuron, from) {
    /** @type {NeuronDetails | null} */
    const found = await this.#get(`neurons/${layer}/${neuron}`);
    if (!found) return;
    this.token = null;
    const title = make("h3", { tabindex: "-1" }, `Neuron ${found.neuron}`);
    const often = `${shownCount(found.fired)} of ${shownCount(found.of)} tokens`;
    const share = found.of > 0 ? ` (${shownShare(found.fired / found.of)})` : "";
    const before = `← Token ${from.index} ${quoted(from.text)}`;
    const back = button(before, () => this.#back(from), { class: "quiet back" });
    const excited = found.tokens.map((token) => ({ label: this.#tokenButton(token), value: token.activity }));
    const list = bars("Tokens that excite it most", excited, "None so far.");
    const about = `Layer ${found.layer}, head ${found.head}. It fired for ${often}${share}.`;
    this.#replace(back, title, make("p", { class: "small" }, about), list);
    this.onMark(weights(found.tokens.map(({ index, activity }) => [index, activity])));
    title.focus({ preventScroll: true });
  }

  /** @param {TokenDetails} token */
  #back(token) {
    this.token = token.index;
    this.#showToken(token);
    this.box.querySelector("h3")?.focus({ preventScroll: true });
  }

  /** @param {TokenDetails} token */
  #showToken(token) {
    this.layer = Math.min(this.layer, token.layers.length - 1);
    const layer = token.layers[this.layer];
    const title = make("h3", { tabindex: "-1" }, `Token ${token.index} ${quoted(token.text)}`);
    const about = `${shownCount(layer.active)} neurons are active, ${shownShare(layer.share)} of the layer.`;
    const neuron = (/** @type {number} */ number) => this.#neuronButton(layer.layer, number, token);
    const strongest = layer.neurons.map((one) => ({ label: neuron(one.neuron), value: one.activity }));
    const sources = layer.sources.map((one) => ({ label: this.#tokenButton(one), value: one.weight }));
    const lists = make(
      "div",
      { class: "lists" },
      bars("Strongest neurons", strongest, "No neuron is active."),
      bars("It reads most from", sources, "Nothing that came before."),
      bars("Synapses it wrote", synapses(layer.written, neuron), "None."),
      bars("Synapses it read", synapses(layer.read, neuron), "None."),
    );
    this.#replace(title, this.#layers(token), make("p", { class: "small" }, about), ...gates(layer), lists);
    this.onMark(weights(layer.sources.map(({ index, weight }) => [index, weight])));
  }

  /** @param {TokenDetails} token */
  #layers(token) {
    const choice = make("fieldset", { class: "layers" }, make("legend", { class: "unseen" }, "Layer"));
    token.layers.forEach(({ layer }, number) => {
      const radio = make("input", { type: "radio", name: "layer", value: String(number) });
      radio.checked = number === this.layer;
      radio.addEventListener("change", () => {
        this.layer = number;
        this.#showToken(token);
        const now = this.box.querySelector("input:checked");
        if (now instanceof HTMLElement) now.focus();
      });
      choice.append(make("label", {}, radio, make("span", {}, `Layer ${layer}`)));
    });
    return choice;
  }

  /**
   * @param {number} layer
   * @param {number} number
   * @param {TokenDetails} from
   */
  #neuronButton(layer, number, from) {
    const label = `Neuron ${number}: what excites it`;
    return button(String(number), () => this.#showNeuron(layer, number, from), { class: "link", "aria-label": label });
  }

  /** @param {{index: number, text: string}} token */
  #tokenButton({ index, text }) {
    const link = button("", () => this.onPick(index), { class: "link" });
    link.append(quoted(text), make("span", { class: "small" }, ` ${index}`));
    return link;
  }

  /** @param {...Node} parts */
  #replace(...parts) {
    this.box.hidden = false;
    this.box.replaceChildren(...parts);
  }

  /**
   * @param {string} path
   * @returns {Promise<any>} null if something else is wanted by now, or it went wrong
   */
  async #get(path) {
    const call = (this.calls += 1);
    try {
      const answer = await this.api.json("GET", `v1/brain/${this.trace}/${path}`);
      return call === this.calls ? answer : null;
    } catch (error) {
      if (call === this.calls) this.#replace(make("p", { class: "small", role: "status" }, explained(error)));
      return null;
    }
  }
}

/**
 * @param {Synapse[]} all
 * @param {(neuron: number) => Node} neuron
 * @returns {Bar[]}
 */
function synapses(all, neuron) {
  return all.map(({ from, to, strength }) => {
    return { label: make("span", {}, neuron(from), " → ", neuron(to)), value: strength };
  });
}

/**
 * The gates of a model that has them: what each head retains of its synapses, and how strongly it writes.
 *
 * @param {Gates} layer
 * @returns {Node[]}
 */
function gates({ log_decay, write_strength }) {
  const percent = (/** @type {number} */ part) =>
    `${(100 * part).toLocaleString("en", { maximumSignificantDigits: 4 })} %`;
  const line = (/** @type {string} */ name, /** @type {number[]} */ heads) =>
    make("p", { class: "small" }, `${name}, by head: ${heads.map(percent).join(", ")}.`);
  return [
    ...(log_decay ? [line("Synapses retained", log_decay.map(Math.exp))] : []),
    ...(write_strength ? [line("Write strength", write_strength)] : []),
  ];
}

/**
 * Values of tokens as parts of the largest.
 *
 * @param {[number, number][]} values by index
 * @returns {Map<number, number>}
 */
function weights(values) {
  const most = largest(values.map(([, value]) => value));
  return new Map(values.map(([index, value]) => [index, Math.abs(value) / most]));
}

/** @param {number[]} values */
function largest(values) {
  return Math.max(Number.MIN_VALUE, ...values.map(Math.abs));
}

/**
 * A list with a bar behind each entry; the first few, and a button for the others.
 *
 * @param {string} title
 * @param {Bar[]} entries
 * @param {string} none what stands there instead of an empty list
 */
function bars(title, entries, none) {
  const section = make("section", {}, make("h4", {}, title));
  if (entries.length === 0) section.append(make("p", { class: "small" }, none));
  const list = make("ol", { class: "bars" });
  const most = largest(entries.map(({ value }) => value));
  for (const { label, value } of entries) {
    const bar = make("span", { class: value < 0 ? "bar negative" : "bar", "aria-hidden": "true" });
    bar.style.setProperty("--value", (Math.abs(value) / most).toFixed(3));
    list.append(make("li", {}, bar, label, make("span", { class: "value" }, short(value))));
  }
  const others = [...list.children].slice(AT_FIRST);
  for (const entry of others) entry.toggleAttribute("hidden", true);
  section.append(list);
  if (others.length === 0) return section;
  const more = button(
    `${others.length} more`,
    () => {
      for (const entry of others) entry.removeAttribute("hidden");
      more.remove();
      others[0].querySelector("button")?.focus();
    },
    { class: "quiet" },
  );
  section.append(more);
  return section;
}

/** @param {number} value */
function short(value) {
  const size = Math.abs(value);
  const plain = size === 0 || (size >= 0.001 && size < 1e6);
  return plain
    ? value.toLocaleString("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 })
    : value.toExponential(1);
}
