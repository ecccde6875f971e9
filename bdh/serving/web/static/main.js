/** Puts the page together: models, modes, keys of the keyboard, and the key of the server. */

import { Api, ApiError } from "./api.js";
import { Brain } from "./brain.js";
import { Chat } from "./chat.js";
import { Completion } from "./completion.js";
import { ask } from "./dialogs.js";
import { make, part } from "./dom.js";
import { Notices, explained } from "./notices.js";
import { Sessions } from "./sessions.js";
import { Settings } from "./settings.js";
import { store, stored } from "./storage.js";
import { Writer } from "./writer.js";

const PATIENCE = 600; // seconds that a model may take to load
const NARROW = matchMedia("(max-width: 63.99rem)"); // as in the style sheet: the drawer is closed at first

/** What the parts of the page share. */
export class Page {
  constructor() {
    this.api = new Api(document.baseURI);
    this.api.key = stored(sessionStorage, "key", "");
    this.notices = new Notices(() => this.askForKey());
    this.settings = new Settings();
    this.brain = new Brain(this.api);
    this.writer = new Writer(this.api, (writing) => this.#writing(writing));
    this.models = part("model", HTMLSelectElement);
    this.sends = [part("chat-send", HTMLButtonElement), part("completion-send", HTMLButtonElement)];
    this.chat = new Chat(this, (session) => this.sessions.update(session));
    this.completion = new Completion(this);
    this.sessions = new Sessions(this, (session, said) => this.#opened(session, said));
    this.asking = false;
    this.models.addEventListener("change", () => store(localStorage, "model", this.model));
    this.#listen();
    this.#mode();
    this.load();
  }

  /** The name of the chosen model. */
  get model() {
    return this.models.value;
  }

  /** Asks the server what there is, as soon as it is ready. */
  async load() {
    try {
      await this.#ready();
      const { data } = await this.api.json("GET", "v1/models");
      this.models.replaceChildren(...data.map((/** @type {{id: string}} */ { id }) => make("option", {}, id)));
      const last = stored(localStorage, "model", "");
      if (data.some((/** @type {{id: string}} */ { id }) => id === last)) this.models.value = last;
      await this.sessions.resume();
    } catch (error) {
      this.notices.show(error);
    }
  }

  /** Tells why there is no answer. @param {unknown} error */
  failed(error) {
    this.notices.show(error);
    if (!(error instanceof ApiError) || error.param !== "brain") return;
    this.brain.switch(false); // the model, or the server, does not let itself be watched
    this.notices.tell(`${explained(error)} The brain view is off now: try again.`);
  }

  async askForKey() {
    if (this.asking) return;
    this.asking = true;
    const text = "It is kept until this tab is closed, and sent to this server only.";
    const field = { label: "API key", type: "password", value: this.api.key, optional: true };
    const key = await ask({ title: "API key", text, action: "Use it", field });
    this.asking = false;
    if (key === null) return;
    this.api.key = key;
    store(sessionStorage, "key", key || null);
    this.notices.clear();
    await this.load();
  }

  async #ready() {
    for (let waited = 0; waited < PATIENCE; waited += 1) {
      try {
        await this.api.json("GET", "health/ready");
        if (waited > 0) this.notices.clear();
        return;
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 503) throw error;
        this.notices.tell("The server is not ready: it loads its models, or is about to end. The page waits.");
        await new Promise((done) => setTimeout(done, 1000));
      }
    }
  }

  /**
   * @param {import("./sessions.js").Session | null} session
   * @param {import("./chat.js").Said[]} said
   */
  #opened(session, said) {
    this.brain.begin(null);
    this.chat.open(session, said);
    if (location.hash === "#completion") location.hash = "#chat";
    this.#mode();
    this.#drawer(false);
    this.chat.input.focus();
  }

  /** @param {boolean} writing */
  #writing(writing) {
    this.sends.forEach((send, number) => {
      send.textContent = writing ? "Stop" : ["Send", "Write"][number];
      send.classList.toggle("stop", writing);
    });
  }

  #listen() {
    for (const send of this.sends) {
      send.addEventListener("click", (event) => {
        if (!this.writer.writing) return;
        event.preventDefault();
        if (event.detail < 2) this.writer.stop(); // the second click of a double one is none
      });
    }
    for (const input of [this.chat.input, this.completion.input]) {
      input.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        if (!this.writer.writing) input.form?.requestSubmit();
      });
    }
    document.addEventListener("keydown", (event) => this.#escape(event));
    window.addEventListener("hashchange", () => this.#mode());
    part("open-drawer", HTMLButtonElement).addEventListener("click", () => this.#drawer(!this.drawn));
    part("main", HTMLElement).addEventListener("pointerdown", () => this.#drawer(false));
    part("change-key", HTMLButtonElement).addEventListener("click", () => this.askForKey());
    NARROW.addEventListener("change", () => this.#drawer(false));
  }

  /** @param {KeyboardEvent} event */
  #escape(event) {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (this.writer.writing) this.writer.stop();
    else if (this.drawn) {
      this.#drawer(false);
      part("open-drawer", HTMLButtonElement).focus();
    } else this.brain.large(false);
  }

  #mode() {
    const completing = location.hash === "#completion";
    part("chat", HTMLElement).hidden = completing;
    part("completion", HTMLElement).hidden = !completing;
    part("to-chat", HTMLElement).setAttribute("aria-current", completing ? "false" : "page");
    part("to-completion", HTMLElement).setAttribute("aria-current", completing ? "page" : "false");
    const { session } = this.chat;
    this.models.disabled = session !== null && !completing; // a session is of its model
    if (session && !completing) this.models.value = session.model;
  }

  /** On a narrow page: opens or closes the list of conversations. @param {boolean} open */
  #drawer(open) {
    this.drawn = open;
    document.body.dataset.drawer = open ? "open" : "closed";
    part("open-drawer", HTMLButtonElement).setAttribute("aria-expanded", String(open));
    if (open) this.models.focus();
  }
}

new Page();
