/** Server-sent events out of the bytes of a response, wherever its pieces are cut. */

/** @typedef {{event: string, data: string}} ServerEvent */

/**
 * Yields each event as its blank line arrives. What stands after the last blank line is no event.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<ServerEvent, void, void>}
 */
export async function* serverEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // keeps half a character until its other half comes
  /** @type {string[]} */
  let data = [];
  let event = "";
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a \r at the end may be half of a \r\n
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (line === "") {
          if (data.length > 0) yield { event: event || "message", data: data.join("\n") };
          data = [];
          event = "";
          continue;
        }
        const { name, value: content } = field(line);
        if (name === "data") data.push(content);
        else if (name === "event") event = content;
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be over, or aborted, already
  }
}

/**
 * @param {string} line
 * @returns {{name: string, value: string}} a comment has no name
 */
function field(line) {
  const colon = line.indexOf(":");
  if (colon < 0) return { name: line, value: "" };
  const value = line.slice(colon + 1);
  return { name: line.slice(0, colon), value: value.startsWith(" ") ? value.slice(1) : value };
}
