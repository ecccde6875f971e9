// Elements of the page. Text goes in as text: nothing that a run says is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** An HTML element; an attribute that is a function listens to the event of that name. */
function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An SVG element. */
function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** An object with its own names only: runs choose names freely, and "constructor" is one like any other. */
function bare(object) {
  return Object.setPrototypeOf(object, null);
}

/** A colour patch of a run, beside its name. */
function swatch(number) {
  return make("span", { class: `swatch run-${number % 8}`, "aria-hidden": "true" });
}

/** A table within a box that scrolls sideways by itself, so that the page does not. */
function tableBox(label, table) {
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
}
