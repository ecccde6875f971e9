/** How answers are drawn: a form that the browser remembers. An empty field leaves it to the server. */

import { part } from "./dom.js";
import { store, stored } from "./storage.js";

/** @typedef {Record<string, string | boolean>} Values by the fields' names */

const USUAL_TOKENS = 256; // the API's own is 16 for completions, and for a chat much
const WHOLE = new Set(["max_tokens", "top_k", "seed"]);
const TEXTS = new Set(["system", "stop", "regex"]);

export class Settings {
  constructor() {
    this.form = part("settings-form", HTMLFormElement);
    this.dialog = part("settings", HTMLDialogElement);
    this.opener = part("open-settings", HTMLButtonElement);
    this.#fill(stored(localStorage, "settings", {}));
    this.form.addEventListener("input", () => this.#changed());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.dialog.close();
    });
    this.opener.addEventListener("click", () => this.dialog.showModal());
    part("reset-settings", HTMLButtonElement).addEventListener("click", () => {
      this.#fill({});
      this.#changed();
    });
    this.#changed();
  }

  /** What the assistant is told before all else, or "". */
  get system() {
    return String(this.#values().system ?? "");
  }

  /**
   * The fields of a request; those without a value are left out, but for the most tokens to write.
   *
   * @returns {import("./api.js").Json}
   */
  sampling() {
    /** @type {import("./api.js").Json} */
    const fields = { max_tokens: USUAL_TOKENS };
    for (const [name, value] of Object.entries(this.#values())) {
      if (name === "system") continue;
      if (name === "stop") fields.stop = String(value).split("\n").filter(Boolean).map(unescaped);
      else if (typeof value === "boolean" || TEXTS.has(name)) fields[name] = value;
      else fields[name] = WHOLE.has(name) ? Number.parseInt(value, 10) : Number(value);
    }
    return fields;
  }

  /** @returns {(HTMLInputElement | HTMLTextAreaElement)[]} */
  #inputs() {
    const all = [...this.form.elements];
    return all.filter((one) => one instanceof HTMLInputElement || one instanceof HTMLTextAreaElement);
  }

  /** @returns {Values} without empty ones */
  #values() {
    /** @type {Values} */
    const values = {};
    for (const input of this.#inputs()) {
      if (input.type === "checkbox" && input instanceof HTMLInputElement) {
        if (input.checked) values[input.name] = true;
      } else if (input.value !== "") values[input.name] = input.value;
    }
    return values;
  }

  /** @param {Values} values */
  #fill(values) {
    for (const input of this.#inputs()) {
      const value = values[input.name];
      if (input.type === "checkbox" && input instanceof HTMLInputElement) input.checked = value === true;
      else input.value = typeof value === "string" ? value : "";
    }
  }

  #changed() {
    const values = this.#values();
    const count = Object.keys(values).length;
    store(localStorage, "settings", values);
    this.opener.dataset.count = count === 0 ? "" : String(count);
    this.opener.setAttribute("aria-label", count === 0 ? "Settings" : `Settings, ${count} changed`);
  }
}

/**
 * A line of the stop field as the text it stands for: \n is a new line.
 *
 * @param {string} line
 */
function unescaped(line) {
  return line.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
}
