/** Shows tokens within the text of an answer, and finds the token that was clicked there. The text stays one piece. */

/** @typedef {import("./brain.js").Token} Token */
/** @typedef {[number, number]} Span of characters */

const BYTE = /<0x[0-9A-F]{2}>/g; // how the server writes a part of a character
const LEVELS = ["faint", "clear", "strong"]; // names of highlights in the style sheet, by a token's weight

/**
 * Where each token lies in the text they make up. A token that is a part of a character lies on that character.
 *
 * @param {string} text
 * @param {string[]} pieces the tokens' texts
 * @param {number} [from] where the first one lies
 * @returns {Span[]}
 */
export function spans(text, pieces, from = 0) {
  let at = from;
  let parts = 0; // of characters, since the last piece that was found
  return pieces.map((piece) => {
    const whole = piece.replace(BYTE, "");
    const found = find(text, at === from ? [whole, whole.trimStart()] : [whole], at, at + 2 * parts);
    if (found === null) {
      parts += 1;
      return [at, Math.min(text.length, at + 1)];
    }
    parts = whole === piece ? 0 : 1;
    at = found[1];
    return found;
  });
}

/**
 * @param {string} text
 * @param {string[]} pieces any of them
 * @param {number} from
 * @param {number} to where a piece begins at the latest
 * @returns {Span | null}
 */
function find(text, pieces, from, to) {
  for (const piece of pieces) {
    const start = from + text.slice(from, to + piece.length).indexOf(piece);
    if (piece && start >= from) return [start, start + piece.length];
  }
  return null;
}

export class Marks {
  constructor() {
    this.can = "highlights" in CSS; // where not, the list of tokens shows as much
  }

  /**
   * @param {Text} node an answer
   * @param {Span[]} places of its tokens
   * @param {number} chosen
   * @param {Map<number, number>} weights of tokens, from 0 to 1
   */
  show(node, places, chosen, weights) {
    this.clear();
    if (!this.can) return;
    const range = (/** @type {Span} */ [start, end]) => {
      const one = new Range();
      one.setStart(node, Math.min(start, node.length));
      one.setEnd(node, Math.min(end, node.length));
      return one;
    };
    for (const [place, weight] of weights) {
      const name = LEVELS[Math.min(LEVELS.length - 1, Math.floor(LEVELS.length * weight))];
      if (places[place]) this.#add(name, range(places[place]));
    }
    if (places[chosen]) this.#add("token", range(places[chosen]));
  }

  clear() {
    if (this.can) for (const name of [...LEVELS, "token"]) CSS.highlights.delete(name);
  }

  /**
   * @param {string} name
   * @param {Range} range
   */
  #add(name, range) {
    const marks = CSS.highlights.get(name) ?? new Highlight();
    CSS.highlights.set(name, marks.add(range));
  }
}

/**
 * The character of a text that was clicked, or null if none was.
 *
 * @param {Text} node
 * @param {MouseEvent} event
 */
export function clickedOffset(node, event) {
  if (!document.caretPositionFromPoint || !getSelection()?.isCollapsed) return null;
  const caret = document.caretPositionFromPoint(event.clientX, event.clientY);
  if (!caret || caret.offsetNode !== node) return null;
  const { clientX: x, clientY: y } = event;
  const within = (/** @type {DOMRect} */ box) => box.left <= x && x <= box.right && box.top <= y && y <= box.bottom;
  for (const offset of [caret.offset, caret.offset - 1]) {
    const box = characterBox(node, offset);
    if (box && within(box)) return offset;
  }
  return null;
}

/**
 * @param {Text} node
 * @param {number} offset
 */
function characterBox(node, offset) {
  if (offset < 0 || offset >= node.length) return null;
  const range = new Range();
  range.setStart(node, offset);
  range.setEnd(node, offset + 1);
  return range.getBoundingClientRect();
}
