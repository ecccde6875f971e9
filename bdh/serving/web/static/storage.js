/** What the browser keeps for the page. Where it keeps nothing, as some private windows do, the page works without. */

/**
 * @template T
 * @param {Storage} storage
 * @param {string} name
 * @param {T} otherwise
 * @returns {T}
 */
export function stored(storage, name, otherwise) {
  try {
    const text = storage.getItem(`bdh.${name}`);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/**
 * @param {Storage} storage
 * @param {string} name
 * @param {unknown} value null forgets it
 */
export function store(storage, name, value) {
  try {
    if (value === null) storage.removeItem(`bdh.${name}`);
    else storage.setItem(`bdh.${name}`, JSON.stringify(value));
  } catch {
    // full, or not allowed: then it is not kept
  }
}
