/** Questions that are asked in a dialog of the page. */

import { make } from "./dom.js";

/**
 * @typedef {object} Question
 * @property {string} title
 * @property {string} text
 * @property {string} action what the button says
 * @property {boolean} [dangerous]
 * @property {{label: string, type: string, value: string, pattern?: string, optional?: boolean}} [field]
 */

let asked = 0; // for ids that are used once

/**
 * Asks; resolves to what was entered ("" for a question without a field), or to null.
 *
 * @param {Question} question
 * @returns {Promise<string | null>}
 */
export function ask(question) {
  const title = `question-${(asked += 1)}`;
  const action = make("button", { type: "submit", class: question.dangerous ? "danger" : "primary" }, question.action);
  const cancel = make("button", { type: "button" }, "Cancel");
  const input = question.field && field(question.field);
  const form = make("form", {}, make("h2", { id: title }, question.title), make("p", {}, question.text));
  if (question.field && input) form.append(make("label", { class: "field" }, question.field.label, input));
  form.append(make("div", { class: "row end" }, cancel, action));
  const dialog = make("dialog", { "aria-labelledby": title, class: "question" }, form);
  document.body.append(dialog);
  return new Promise((resolve) => {
    /** @type {string | null} */
    let answer = null;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      answer = input ? input.value.trim() : "";
      dialog.close();
    });
    cancel.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(answer);
    });
    dialog.showModal();
    (input ?? cancel).focus();
  });
}

/** @param {NonNullable<Question["field"]>} asked */
function field(asked) {
  const input = make("input", { type: asked.type, autocomplete: "off", spellcheck: "false" });
  input.value = asked.value;
  input.required = !asked.optional;
  if (asked.pattern) input.pattern = asked.pattern;
  return input;
}
