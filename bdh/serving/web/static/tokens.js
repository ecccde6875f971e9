/** The text token by token: a list to click on, or to walk through with the arrow keys. */

import { make, part } from "./dom.js";
import { keepingEnd } from "./message.js";

/** @typedef {import("./brain.js").Token} Token */

const NAMES = new Map([
  ["", "nothing"],
  [" ", "space"],
  ["\n", "new line"],
  ["\t", "tab"],
]);
const FAR = 10; // tokens, for Page Up and Page Down

export class TokenList {
  /** @param {(place: number) => void} onPick */
  constructor(onPick) {
    this.onPick = onPick;
    this.box = part("tokens", HTMLElement);
    /** @type {HTMLElement[]} */
    this.entries = [];
    /** @type {number | null} */
    this.chosen = null;
    /** @type {Set<HTMLElement>} */
    this.marked = new Set();
    this.box.addEventListener("click", (event) => {
      const entry = event.target instanceof Element ? event.target.closest("[role=option]") : null;
      if (entry instanceof HTMLElement) onPick(this.entries.indexOf(entry));
    });
    this.box.addEventListener("keydown", (event) => this.#walk(event));
  }

  reset() {
    this.entries = [];
    this.box.replaceChildren();
    this.box.hidden = true; // a list of nothing is none
    this.choose(null);
  }

  /** @param {Token[]} tokens that follow */
  add(tokens) {
    this.box.hidden = this.entries.length + tokens.length === 0;
    keepingEnd(this.box, () => {
      for (const token of tokens) {
        const entry = make("span", { role: "option", id: `token-${this.entries.length}`, "aria-selected": "false" });
        entry.textContent = token.text.replaceAll("\n", "↵\n") || "·";
        const name = NAMES.get(token.text);
        if (name) entry.setAttribute("aria-label", name);
        entry.classList.toggle("given", token.prompt);
        this.entries.push(entry);
        this.box.append(entry);
      }
    });
  }

  /** @param {number | null} place */
  choose(place) {
    if (this.chosen !== null) this.entries[this.chosen]?.setAttribute("aria-selected", "false");
    this.chosen = place;
    this.mark(new Map());
    if (place === null) {
      this.box.removeAttribute("aria-activedescendant");
      return;
    }
    const entry = this.entries[place];
    entry.setAttribute("aria-selected", "true");
    this.box.setAttribute("aria-activedescendant", entry.id);
    const above = entry.offsetTop;
    const { scrollTop, clientHeight } = this.box;
    if (above < scrollTop || above + entry.offsetHeight > scrollTop + clientHeight) {
      this.box.scrollTop = above - clientHeight / 2;
    }
  }

  /** @param {Map<number, number>} weights of places, from 0 to 1 */
  mark(weights) {
    for (const entry of this.marked) entry.classList.remove("marked");
    this.marked.clear();
    for (const [place, weight] of weights) {
      const entry = this.entries[place];
      if (!entry) continue;
      entry.classList.add("marked");
      entry.style.setProperty("--weight", weight.toFixed(3));
      this.marked.add(entry);
    }
  }

  /** @param {KeyboardEvent} event */
  #walk(event) {
    const end = this.entries.length - 1;
    const at = this.chosen ?? -1;
    /** @type {Record<string, number>} */
    const places = {
      ArrowRight: at + 1,
      ArrowDown: at + 1,
      ArrowLeft: at - 1,
      ArrowUp: at - 1,
      PageDown: at + FAR,
      PageUp: at - FAR,
      Home: 0,
      End: end,
    };
    const place = places[event.key];
    if (place === undefined || end < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.onPick(Math.min(end, Math.max(0, place)));
  }
}
