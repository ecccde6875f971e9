/** One line about what went wrong, and words for those who listen instead of looking. */

import { ApiError } from "./api.js";
import { part } from "./dom.js";

export class Notices {
  /** @param {() => void} onUnauthorized asks for a key */
  constructor(onUnauthorized) {
    this.line = part("notice", HTMLElement);
    this.text = part("notice-text", HTMLElement);
    this.spoken = part("spoken", HTMLElement);
    this.onUnauthorized = onUnauthorized;
    part("notice-close", HTMLButtonElement).addEventListener("click", () => this.clear());
  }

  /** Whether there is something wrong, as far as the page has told. */
  get showing() {
    return !this.line.hidden;
  }

  /** @param {unknown} error */
  show(error) {
    this.tell(explained(error));
    if (error instanceof ApiError && error.status === 401) this.onUnauthorized();
  }

  /** @param {string} words */
  tell(words) {
    this.text.textContent = words;
    this.line.hidden = false;
  }

  clear() {
    this.line.hidden = true;
    this.text.textContent = "";
  }

  /**
   * Has a screen reader say something when it is done with what it says now.
   *
   * @param {string} words
   */
  say(words) {
    this.spoken.textContent = words;
  }
}

/** @param {unknown} error */
export function explained(error) {
  if (!(error instanceof ApiError)) return `The page made a mistake: ${error}`;
  const words = error.message.charAt(0).toUpperCase() + error.message.slice(1);
  if (error.status === 401) return `This server asks for an API key. ${words}.`;
  return error.retryAfter === null ? `${words}.` : `${words}. Try again in ${error.retryAfter} s.`;
}
