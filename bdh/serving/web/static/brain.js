/** The brain view: what the neurons and synapses do while a text is written. */

import { Details } from "./details.js";
import { make, part, shownCount, shownShare } from "./dom.js";
import { Marks, clickedOffset, spans } from "./highlight.js";
import { explained } from "./notices.js";
import { Raster } from "./raster.js";
import { store, stored } from "./storage.js";
import { TokenList } from "./tokens.js";

/** @typedef {{index: number, id: number, text: string, prompt: boolean, share: number[], raster: string[]}} Token */

const NARROW = matchMedia("(max-width: 47.99rem)"); // as in the style sheet

export class Brain {
  on = true;
  trace = "";
  from = 0;
  /** The answer that the tokens make up. @type {Text | null} */
  answer = null;
  /** @type {Token[]} */
  tokens = [];
  /** For the next frame. @type {Token[]} */
  waiting = [];
  /** A place in `tokens`. @type {number | null} */
  chosen = null;

  /** @param {import("./api.js").Api} api */
  constructor(api) {
    this.api = api;
    this.toggle = part("brain-toggle", HTMLButtonElement);
    this.panel = part("brain", HTMLElement);
    this.about = part("brain-about", HTMLElement);
    this.problem = part("brain-problem", HTMLElement);
    this.empty = part("brain-empty", HTMLElement);
    this.view = part("brain-view", HTMLElement);
    this.grow = part("brain-grow", HTMLButtonElement);
    this.shares = part("shares", HTMLDetailsElement);
    this.raster = new Raster((place) => this.choose(place));
    this.list = new TokenList((place) => this.choose(place));
    this.marks = new Marks();
    this.details = new Details(
      api,
      (index) => this.choose(this.#placeOf(index)),
      (weights) => this.#mark(weights),
    );
    this.begin(null);
    this.large(false);
    NARROW.addEventListener("change", () => this.large(false));
    this.switch(stored(localStorage, "brain", true));
    this.toggle.addEventListener("click", () => this.switch(!this.on));
    this.grow.addEventListener("click", () => this.large(this.panel.dataset.size !== "large"));
    this.shares.addEventListener("toggle", () => this.#showShares());
    document.addEventListener("click", (event) => this.#clicked(event));
  }

  /** @param {boolean} on */
  switch(on) {
    this.on = on;
    document.body.dataset.brain = on ? "on" : "off";
    this.panel.hidden = !on;
    this.toggle.setAttribute("aria-pressed", String(on));
    store(localStorage, "brain", on);
    if (on) return;
    this.marks.clear();
    this.large(false);
  }

  /** On a narrow page: the view over all else, or a strip of it. @param {boolean} large */
  large(large) {
    this.panel.dataset.size = large ? "large" : "small";
    part("main", HTMLElement).inert = large && NARROW.matches;
    this.raster.compact = NARROW.matches && !large;
    this.grow.textContent = large ? "Close" : "Open";
    this.grow.setAttribute("aria-expanded", String(large));
  }

  /** The field of a request that asks for what is shown here. */
  field() {
    return this.on ? { brain: true } : {};
  }

  /**
   * A text begins.
   *
   * @param {Text | null} answer that shall hold it
   * @param {number} [from] where in the answer
   */
  begin(answer, from = 0) {
    this.answer = answer;
    this.from = from;
    this.trace = "";
    this.tokens = [];
    this.waiting = [];
    this.chosen = null;
    this.raster.reset();
    this.list.reset();
    this.details.clear();
    this.marks.clear();
    this.problem.hidden = true;
    this.#tell("");
  }

  /** @param {{trace: string, tokens?: Token[]}} told by the server, beside a piece of the text */
  feed({ trace, tokens = [] }) {
    this.trace = trace;
    if (this.waiting.length === 0) requestAnimationFrame(() => this.#show());
    this.waiting.push(...tokens);
  }

  /** The text is over. */
  end() {
    this.#show();
    this.#showShares();
  }

  /**
   * Shows a text that was written before.
   *
   * @param {string} trace
   * @param {Text} answer
   * @param {number} [from]
   */
  async load(trace, answer, from = 0) {
    this.switch(true);
    this.begin(answer, from);
    this.trace = trace;
    this.large(NARROW.matches);
    try {
      const { tokens } = await this.api.json("GET", `v1/brain/${trace}`);
      if (this.trace !== trace || this.tokens.length > 0) return;
      this.feed({ trace, tokens });
      this.end();
    } catch (error) {
      this.problem.hidden = false;
      this.problem.textContent = explained(error);
    }
  }

  /** @param {number | null} place in the list of tokens */
  choose(place) {
    if (place === null || (place === this.chosen && this.details.token === this.tokens[place].index)) return;
    this.#show();
    this.chosen = place;
    this.raster.choose(place);
    this.list.choose(place);
    this.#mark(new Map());
    this.details.showToken(this.trace, this.tokens[place].index);
    if (NARROW.matches) this.large(true);
  }

  #show() {
    const tokens = this.waiting;
    if (tokens.length === 0) return;
    this.waiting = [];
    this.tokens.push(...tokens);
    this.view.hidden = false; // before it is drawn: it must have a size
    this.raster.add(tokens);
    this.list.add(tokens);
    this.#tell(`${shownCount(this.tokens.length)} tokens, ${this.tokens[0].share.length} layers`);
  }

  /** @param {string} words */
  #tell(words) {
    this.about.textContent = words;
    this.view.hidden = this.tokens.length === 0;
    this.empty.hidden = this.tokens.length > 0;
  }

  /** @param {number} index that the server gave the token */
  #placeOf(index) {
    const place = this.tokens.findIndex((token) => token.index === index);
    return place < 0 ? null : place;
  }

  /** @param {Map<number, number>} weights by index */
  #mark(weights) {
    /** @type {Map<number, number>} */
    const places = new Map();
    for (const [index, weight] of weights) {
      const place = this.#placeOf(index);
      if (place !== null) places.set(place, weight);
    }
    this.list.mark(places);
    this.raster.mark(places.keys());
    if (!this.answer?.isConnected) return;
    const { start, found } = this.#written(this.answer.data);
    const within = new Map([...places].map(([place, weight]) => [place - start, weight]));
    this.marks.show(this.answer, found, (this.chosen ?? -1) - start, within);
  }

  /**
   * The tokens that the model wrote: where they begin, and where each lies in the answer.
   *
   * @param {string} text of the answer
   */
  #written(text) {
    const first = this.tokens.findIndex((token) => !token.prompt);
    const start = first < 0 ? this.tokens.length : first;
    const pieces = this.tokens.slice(start).map((token) => token.text);
    return { start, found: spans(text, pieces, this.from) };
  }

  /** @param {MouseEvent} event perhaps on a word of the answer */
  #clicked(event) {
    if (!this.on || !this.answer || !(event.target instanceof Node) || !event.target.contains(this.answer)) return;
    const offset = clickedOffset(this.answer, event);
    if (offset === null) return;
    const { start, found } = this.#written(this.answer.data);
    const place = found.findIndex(([from, to]) => from <= offset && offset < to);
    if (place >= 0) this.choose(start + place);
  }

  #showShares() {
    const table = part("share-table", HTMLTableElement);
    table.replaceChildren();
    if (!this.shares.open || this.tokens.length === 0) return;
    const head = make("tr", {}, make("th", { scope: "col" }, "Token"));
    for (const layer of this.tokens[0].share.keys()) head.append(make("th", { scope: "col" }, `Layer ${layer}`));
    const body = make("tbody");
    for (const { index, text, share } of this.tokens) {
      const row = make("tr", {}, make("th", { scope: "row" }, `${index} ${text}`));
      row.append(...share.map((one) => make("td", {}, shownShare(one))));
      body.append(row);
    }
    table.append(make("caption", { class: "unseen" }, "Share of each layer's neurons that are active"));
    table.append(make("thead", {}, head), body);
  }
}
