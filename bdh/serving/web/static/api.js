/** Talks to the server the page came from: JSON, streams of it, and errors that can be shown as they are. */

import { serverEvents } from "./sse.js";

/** @typedef {Record<string, unknown>} Json */

/** What went wrong, in one line for the one who looks at the page. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {number} status of HTTP; 0 where there was no answer, or none to its end
   * @param {number | null} retryAfter seconds
   * @param {string | null} param the field of the request that is wrong, if one is
   */
  constructor(message, status = 0, retryAfter = null, param = null) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.retryAfter = retryAfter;
    this.param = param;
  }
}

export class Api {
  /** @param {string} base the page's own address */
  constructor(base) {
    this.base = base;
    /** Sent with every request, where there is one. */
    this.key = "";
  }

  /**
   * @param {string} method
   * @param {string} path as "v1/models"
   * @param {Json} [body]
   * @returns {Promise<any>} the JSON of the answer, or null where it has none
   */
  async json(method, path, body) {
    const response = await this.#fetch(method, path, body);
    return response.status === 204 ? null : response.json();
  }

  /**
   * Yields the objects of a streamed answer. Raises ApiError for one that is an error, and if the end does not come.
   *
   * @param {string} path
   * @param {Json} body
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<any, void, void>}
   */
  async *stream(path, body, signal) {
    const response = await this.#fetch("POST", path, body, signal);
    if (response.body === null) throw new ApiError("the server's answer is empty");
    const events = serverEvents(response.body);
    try {
      for (;;) {
        const { done, value } = await events.next().catch(unreachable);
        if (done) throw new ApiError("the connection ended before the answer was complete");
        if (value.data === "[DONE]") return;
        const chunk = JSON.parse(value.data);
        if (chunk.error) throw new ApiError(oneLine(chunk.error.message));
        yield chunk;
      }
    } finally {
      await events.return();
    }
  }

  /**
   * @param {string} method
   * @param {string} path
   * @param {Json} [body]
   * @param {AbortSignal} [signal]
   * @returns {Promise<Response>}
   */
  async #fetch(method, path, body, signal) {
    /** @type {Record<string, string>} */
    const headers = {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (this.key) headers["Authorization"] = `Bearer ${this.key}`;
    const request = { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal };
    const response = await fetch(new URL(path, this.base), { ...request, cache: "no-store" }).catch(unreachable);
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

/**
 * @param {unknown} error
 * @returns {never}
 */
function unreachable(error) {
  if (error instanceof DOMException && error.name === "AbortError") throw error;
  throw new ApiError("the server cannot be reached; see whether it is running, then try again");
}

/**
 * @param {Response} response
 * @returns {Promise<ApiError>}
 */
async function refusal(response) {
  const answer = await response.json().catch(() => null);
  const message = oneLine(answer?.error?.message ?? `the server answers with HTTP ${response.status}`);
  const after = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new ApiError(message, response.status, Number.isFinite(after) ? after : null, answer?.error?.param ?? null);
}

/** @param {unknown} words */
function oneLine(words) {
  return String(words).replace(/\s+/g, " ").trim().slice(0, 400);
}
