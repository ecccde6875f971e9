/** One message of a conversation, as it stands on the page. */

import { copyButton } from "./copy.js";
import { button, make } from "./dom.js";

/** @typedef {{label: string, act: () => void}} Action */

const NEAR_END = 40; // pixels

export class Message {
  /**
   * @param {string} role "user", "assistant" or "system"
   * @param {string} author
   * @param {string} content
   */
  constructor(role, author, content) {
    this.role = role;
    this.written = new Written(content);
    this.about = make("span", { class: "about" });
    this.actions = make("span", { class: "actions" });
    const foot = make("div", { class: "foot" }, this.about, this.actions);
    const body = make("p", { class: "text" }, this.written.node);
    this.element = make("article", { class: `message ${role}` }, make("h2", {}, author), body, foot);
    /** The trace of what the neurons did while this was written. @type {string | null} */
    this.trace = null;
    this.traceFrom = 0; // where in the content that was
    this.settle();
  }

  get content() {
    return this.written.content;
  }

  /** While it is being written there is nothing to do with it. */
  begin() {
    this.element.classList.add("writing");
    this.about.textContent = "";
    this.actions.replaceChildren();
  }

  /** @param {Action[]} [actions] besides copying it */
  settle(actions = []) {
    this.element.classList.remove("writing");
    this.actions.replaceChildren(copyButton(() => this.content));
    for (const { label, act } of actions) this.actions.append(button(label, act, { class: "quiet" }));
  }
}

/** A text that grows. Only ever a text node, so that no markup in it can be more than text. */
export class Written {
  /** @param {string} content */
  constructor(content) {
    this.node = document.createTextNode(content);
    this.waiting = ""; // for the next frame: a layout for every token would be more than the eye sees
    this.frame = 0;
  }

  get content() {
    return this.node.data + this.waiting;
  }

  set content(text) {
    this.waiting = "";
    this.node.data = text;
  }

  /** @param {string} piece */
  append(piece) {
    this.waiting += piece;
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  /** Shows what waits. */
  show() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { waiting } = this;
    this.waiting = "";
    if (waiting === "") return;
    const box = this.node.parentElement?.closest("[data-scrolls]");
    if (box instanceof HTMLElement) keepingEnd(box, () => this.node.appendData(waiting));
    else this.node.appendData(waiting);
  }
}

/**
 * Runs a change of what a box shows, and keeps its end in sight if it was.
 *
 * @param {HTMLElement} box that scrolls
 * @param {() => void} change
 */
export function keepingEnd(box, change) {
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}
