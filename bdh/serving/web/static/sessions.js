/** Sessions: conversations whose synapses stay on the server, and those that are saved there. */

import { ask } from "./dialogs.js";
import { button, make, part, shownBytes, shownCount } from "./dom.js";
import { store, stored } from "./storage.js";

/**
 * @typedef {object} Session
 * @property {string} id
 * @property {string} model
 * @property {string | null} name
 * @property {number} created
 * @property {number} position tokens read
 * @property {number} state_bytes
 * @property {boolean} busy
 * @property {import("./chat.js").Said[]} [messages]
 */

/** @typedef {{name: string, model: string | null, created: number, bytes: number}} Saved */

const NAME = "[A-Za-z0-9][A-Za-z0-9_.\\-]{0,63}";

export class Sessions {
  /**
   * @param {import("./main.js").Page} page
   * @param {(session: Session | null, said: import("./chat.js").Said[]) => void} onOpen
   */
  constructor(page, onOpen) {
    this.page = page;
    this.onOpen = onOpen;
    /** @type {Session | null} */
    this.current = null;
    /** What is being done: a message that is sent meanwhile is for what comes out. @type {Promise<void>} */
    this.pending = Promise.resolve();
    this.open = part("session-list", HTMLElement);
    this.kept = part("saved-list", HTMLElement);
    this.bar = part("session-bar", HTMLElement);
    this.about = part("session-about", HTMLElement);
    part("new-chat", HTMLButtonElement).addEventListener("click", () => this.#try(async () => this.#enter(null, [])));
    part("new-session", HTMLButtonElement).addEventListener("click", () => this.#try(() => this.#create()));
    part("save-session", HTMLButtonElement).addEventListener("click", () => this.#try(() => this.#save()));
    part("delete-session", HTMLButtonElement).addEventListener("click", () => this.#try(() => this.#delete()));
  }

  /** Goes on with the session that this tab had before it was reloaded, if it is still there. */
  async resume() {
    const id = stored(sessionStorage, "session", null);
    const sessions = await this.#list();
    if (sessions.some((session) => session.id === id)) await this.#show(String(id));
    else store(sessionStorage, "session", null);
  }

  /**
   * A session has read and written.
   *
   * @param {Session} session
   */
  async update(session) {
    this.current = session;
    this.#showBar();
    await this.#list();
  }

  /** @param {() => Promise<void>} action one that may fail */
  #try(action) {
    if (this.page.writer.writing) {
      this.page.notices.tell("An answer is being written. Stop it first, with Esc.");
      return;
    }
    this.page.notices.clear();
    this.pending = this.pending.then(action).catch((error) => this.page.notices.show(error));
  }

  async #create() {
    const { system } = this.page.settings;
    const body = { model: this.page.model, ...(system && { system }) };
    const session = await this.page.api.json("POST", "v1/sessions", body);
    this.#enter(session, system ? [{ role: "system", content: system }] : []);
    await this.#list();
  }

  /** @param {string} id */
  async #show(id) {
    const session = await this.page.api.json("GET", `v1/sessions/${id}`);
    this.#enter(session, session.messages);
  }

  async #save() {
    if (!this.current) return;
    const { id } = this.current;
    const text = "Its messages and synapses are written to the server's disk, to go on from at any time.";
    const field = { label: "Name", type: "text", value: this.current.name ?? "", pattern: NAME };
    const name = await ask({ title: "Save the session", text, action: "Save", field });
    if (name === null) return;
    await this.page.api.json("POST", `v1/sessions/${id}/save`, { name });
    this.page.notices.say(`Saved as ${name}`);
    await this.#list();
  }

  async #delete() {
    if (!this.current) return;
    const { id } = this.current;
    const text = "Its synapses are forgotten. What was saved of it stays.";
    if ((await ask({ title: "Delete the session?", text, action: "Delete", dangerous: true })) === null) return;
    await this.page.api.json("DELETE", `v1/sessions/${id}`);
    this.#enter(null, []);
    await this.#list();
  }

  /** @param {Saved} saved */
  async #reopen(saved) {
    const body = { model: saved.model ?? this.page.model, saved: saved.name };
    const session = await this.page.api.json("POST", "v1/sessions", body);
    await this.#show(session.id);
    await this.#list();
  }

  /** @param {Saved} saved */
  async #forget(saved) {
    const question = {
      title: `Delete ${saved.name}?`,
      text: "It is removed from the server's disk.",
      action: "Delete",
    };
    if ((await ask({ ...question, dangerous: true })) === null) return;
    await this.page.api.json("DELETE", `v1/sessions/saved/${encodeURIComponent(saved.name)}`);
    await this.#list();
  }

  /**
   * @param {Session | null} session
   * @param {import("./chat.js").Said[]} said
   */
  #enter(session, said) {
    this.current = session;
    store(sessionStorage, "session", session && session.id);
    this.#showBar();
    this.onOpen(session, said);
    for (const entry of this.open.querySelectorAll("button")) mark(entry, entry.dataset.id === session?.id);
  }

  #showBar() {
    this.bar.hidden = this.current === null;
    if (!this.current) return;
    const { position, state_bytes: bytes } = this.current;
    const read = `${shownCount(position)} token${position === 1 ? "" : "s"} read`;
    this.about.textContent = `${named(this.current)} · ${read} · ${shownBytes(bytes)} of synapses`;
  }

  /** @returns {Promise<Session[]>} */
  async #list() {
    const answer = await this.page.api.json("GET", "v1/sessions");
    /** @type {Session[]} */
    const sessions = answer.data;
    /** @type {Saved[]} */
    const kept = answer.saved;
    this.open.replaceChildren(...sessions.map((session) => this.#entry(session)));
    this.kept.replaceChildren(...kept.map((saved) => this.#savedEntry(saved)));
    part("sessions-none", HTMLElement).hidden = sessions.length > 0;
    part("saved", HTMLElement).hidden = kept.length === 0;
    return sessions;
  }

  /** @param {Session} session */
  #entry(session) {
    const entry = button("", () => this.#try(() => this.#show(session.id)), { class: "entry", "data-id": session.id });
    entry.append(
      make("span", { class: "name" }, named(session)),
      make("span", { class: "small" }, `${shownCount(session.position)} tokens · ${shownBytes(session.state_bytes)}`),
    );
    mark(entry, session.id === this.current?.id);
    return make("li", {}, entry);
  }

  /** @param {Saved} saved */
  #savedEntry(saved) {
    const entry = button("", () => this.#try(() => this.#reopen(saved)), {
      class: "entry",
      "aria-label": `Reopen ${saved.name}`,
    });
    entry.append(
      make("span", { class: "name" }, saved.name),
      make(
        "span",
        { class: "small" },
        `${new Date(1000 * saved.created).toLocaleDateString()} · ${shownBytes(saved.bytes)}`,
      ),
    );
    const remove = button("×", () => this.#try(() => this.#forget(saved)), {
      class: "icon quiet",
      "aria-label": `Delete ${saved.name}`,
    });
    return make("li", { class: "row" }, entry, remove);
  }
}

/** @param {Session} session */
function named(session) {
  if (session.name) return session.name;
  const time = new Date(1000 * session.created);
  return `Session of ${time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}`;
}

/**
 * @param {HTMLElement} entry
 * @param {boolean} current
 */
function mark(entry, current) {
  if (current) entry.setAttribute("aria-current", "true");
  else entry.removeAttribute("aria-current");
}
