/** A text that the model writes on. */

import { copyButton } from "./copy.js";
import { button, make, part } from "./dom.js";
import { Written } from "./message.js";
import { store, stored } from "./storage.js";
import { shownOutcome } from "./writer.js";

export class Completion {
  /** @param {import("./main.js").Page} page */
  constructor(page) {
    this.page = page;
    this.input = part("prompt", HTMLTextAreaElement);
    this.result = part("result", HTMLElement);
    this.paper = part("paper", HTMLElement);
    this.about = part("result-about", HTMLElement);
    this.actions = part("result-actions", HTMLElement);
    this.given = make("span", { class: "given" });
    this.written = new Written("");
    /** @type {string | null} */
    this.trace = null;
    this.paper.append(this.given, this.written.node);
    this.input.value = stored(sessionStorage, "prompt", "");
    this.input.addEventListener("input", () => store(sessionStorage, "prompt", this.input.value));
    part("completion-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      this.write(this.input.value);
    });
  }

  /** @param {string} prompt */
  async write(prompt) {
    const { brain, notices, settings, writer } = this.page;
    if (writer.writing || prompt === "") return;
    notices.clear();
    notices.say("Writing");
    this.#begin(prompt);
    try {
      const body = { model: this.page.model, prompt, ...settings.sampling(), ...brain.field() };
      const outcome = await writer.write("v1/completions", body, {
        text: (piece) => this.written.append(piece),
        brain: (told) => {
          this.trace = told.trace;
          brain.feed(told);
        },
      });
      this.about.textContent = shownOutcome(outcome);
    } catch (error) {
      this.about.textContent = "broken off";
      this.page.failed(error);
    }
    this.written.show();
    brain.end();
    notices.say(this.written.content);
    this.#settle();
  }

  /** @param {string} prompt */
  #begin(prompt) {
    this.result.hidden = false;
    this.paper.classList.add("writing");
    this.given.textContent = prompt;
    this.written.content = "";
    this.trace = null;
    this.about.textContent = "";
    this.actions.replaceChildren();
    this.page.brain.begin(this.written.node);
  }

  #settle() {
    const { trace } = this;
    const prompt = this.given.textContent ?? "";
    const whole = () => prompt + this.written.content;
    const quiet = { class: "quiet" };
    this.paper.classList.remove("writing");
    this.result.hidden = this.written.content === "" && this.page.notices.showing;
    this.actions.replaceChildren(
      copyButton(whole),
      button("Regenerate", () => this.write(prompt), quiet),
      button("Write on", () => this.#writeOn(whole()), quiet),
    );
    if (!trace) return;
    this.actions.append(button("Look inside", () => this.page.brain.load(trace, this.written.node), quiet));
  }

  /** @param {string} text that there is, all of it to be the prompt */
  #writeOn(text) {
    this.input.value = text;
    store(sessionStorage, "prompt", text);
    this.write(text);
  }
}
