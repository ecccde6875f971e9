/** A conversation: with its whole list of messages sent each time, or held in a session of the server. */

import { part } from "./dom.js";
import { Message } from "./message.js";
import { store, stored } from "./storage.js";
import { shownOutcome } from "./writer.js";

/** @typedef {{role: string, content: string}} Said */
/** @typedef {import("./sessions.js").Session} Session */

const AUTHORS = new Map([
  ["user", "You"],
  ["system", "System message"],
]);

export class Chat {
  /**
   * @param {import("./main.js").Page} page
   * @param {(session: Session) => void} onTurn a session has read and written
   */
  constructor(page, onTurn) {
    this.page = page;
    this.onTurn = onTurn;
    this.log = part("log", HTMLElement);
    this.empty = part("chat-empty", HTMLElement);
    this.input = part("chat-input", HTMLTextAreaElement);
    /** @type {Message[]} */
    this.messages = [];
    /** @type {Session | null} */
    this.session = null;
    part("chat-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(this.input.value);
    });
    this.open(null, stored(sessionStorage, "conversation", []));
  }

  /**
   * Shows a conversation, to go on with.
   *
   * @param {Session | null} session
   * @param {Said[]} said
   */
  open(session, said) {
    this.session = session;
    this.messages = [];
    this.log.replaceChildren();
    for (const { role, content } of said) this.#add(role, content);
    this.#settle();
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** @param {string} text */
  async send(text) {
    await this.page.sessions.pending;
    if (this.page.writer.writing || text.trim() === "") return;
    this.input.value = "";
    const question = this.#add("user", text);
    const said = this.#said();
    const answer = this.#add("assistant", "");
    this.log.scrollTop = this.log.scrollHeight;
    await this.#answer(
      answer,
      this.session ? `v1/sessions/${this.session.id}/messages` : "v1/chat/completions",
      this.session ? { content: text } : { model: this.page.model, messages: said },
      () => {
        this.#remove(answer);
        this.#remove(question);
        this.input.value ||= text;
      },
    );
  }

  /** Has the last answer written again. */
  async regenerate() {
    const answer = this.messages.at(-1);
    if (this.page.writer.writing || this.session || answer?.role !== "assistant") return;
    const before = answer.content;
    answer.written.content = "";
    const body = { model: this.page.model, messages: this.#said().slice(0, -1) };
    await this.#answer(answer, "v1/chat/completions", body, () => (answer.written.content = before));
  }

  /** Has an answer of a session that was cut short go on. */
  async goOn() {
    const answer = this.messages.at(-1);
    if (this.page.writer.writing || !this.session || answer?.role !== "assistant") return;
    await this.#answer(answer, `v1/sessions/${this.session.id}/completions`, {}, () => {});
  }

  /**
   * @param {Message} message
   * @param {string} path
   * @param {import("./api.js").Json} body
   * @param {() => void} undo for when not a piece came
   */
  async #answer(message, path, body, undo) {
    const { brain, notices, settings, writer } = this.page;
    const { length } = message.content;
    const { session } = this;
    let cut = false;
    notices.clear();
    notices.say("Writing");
    for (const other of this.messages) other.settle();
    message.begin();
    message.trace = null;
    message.traceFrom = length;
    brain.begin(message.written.node, length);
    try {
      const outcome = await writer.write(
        path,
        { ...body, ...settings.sampling(), ...brain.field() },
        {
          text: (piece) => message.written.append(piece),
          brain: (told) => {
            message.trace = told.trace;
            brain.feed(told);
          },
        },
      );
      cut = outcome.stopped || outcome.finish === "length";
      message.about.textContent = shownOutcome(outcome);
    } catch (error) {
      cut = true;
      message.about.textContent = "broken off";
      this.page.failed(error);
    }
    message.written.show();
    brain.end();
    if (cut && message.content.length === length) undo();
    else notices.say(message.content.slice(length));
    if (session && session === this.session) await this.#agree(session, cut);
    this.#settle(cut);
  }

  /**
   * Takes over what a session of the server has become: of an answer that was cut, what counts for it.
   *
   * @param {Session} session
   * @param {boolean} cut
   */
  async #agree(session, cut) {
    try {
      let now = await this.page.api.json("GET", `v1/sessions/${session.id}`);
      for (let tries = 0; now.busy && tries < 20; tries += 1) {
        await new Promise((done) => setTimeout(done, 100));
        now = await this.page.api.json("GET", `v1/sessions/${session.id}`);
      }
      if (session !== this.session) return;
      this.session = now;
      const said = this.#said(false);
      if (cut && JSON.stringify(said) !== JSON.stringify(now.messages)) this.open(now, now.messages);
      this.onTurn(now);
    } catch (error) {
      this.page.notices.show(error);
    }
  }

  /**
   * @param {string} role
   * @param {string} content
   */
  #add(role, content) {
    const message = new Message(role, AUTHORS.get(role) ?? this.page.model, content);
    this.messages.push(message);
    this.log.append(message.element);
    this.empty.hidden = true;
    return message;
  }

  /** @param {Message} message */
  #remove(message) {
    message.element.remove();
    this.messages = this.messages.filter((one) => one !== message);
  }

  /**
   * Gives each message what can be done with it, and keeps the conversation for a reload of the page.
   *
   * @param {boolean} [cut] the last answer is not complete
   */
  #settle(cut = false) {
    const last = this.messages.at(-1);
    for (const message of this.messages) {
      /** @type {import("./message.js").Action[]} */
      const actions = [];
      const { trace } = message;
      if (message === last && message.role === "assistant") {
        if (!this.session) actions.push({ label: "Regenerate", act: () => this.regenerate() });
        else if (cut) actions.push({ label: "Go on", act: () => this.goOn() });
      }
      const look = () => this.page.brain.load(trace ?? "", message.written.node, message.traceFrom);
      if (trace) actions.push({ label: "Look inside", act: look });
      message.settle(actions);
    }
    this.empty.hidden = this.messages.length > 0;
    store(sessionStorage, "conversation", this.session ? [] : this.#said(false));
  }

  /**
   * @param {boolean} [system] with the system message of the settings
   * @returns {Said[]}
   */
  #said(system = !this.session) {
    const said = this.messages.map(({ role, content }) => ({ role, content }));
    const told = system ? this.page.settings.system : "";
    return told ? [{ role: "system", content: told }, ...said] : said;
  }
}
