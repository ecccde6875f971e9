/** Copies text. The clipboard itself is there for https and this machine only; elsewhere a selection has to do. */

import { make } from "./dom.js";

const SHOWN_FOR = 1500; // milliseconds

/** @param {string} text */
export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = make("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser does not let the page copy");
}

/**
 * A button that copies a text and says whether it could.
 *
 * @param {() => string} text
 */
export function copyButton(text) {
  const element = make("button", { type: "button", class: "quiet" }, "Copy");
  element.addEventListener("click", async () => {
    element.textContent = await copy(text()).then(
      () => "Copied",
      () => "Not allowed",
    );
    setTimeout(() => (element.textContent = "Copy"), SHOWN_FOR);
  });
  return element;
}
