/** Has the model write: one answer at a time, piece by piece, until it is over or stopped. */

/**
 * @typedef {object} Outcome
 * @property {string | null} finish why the model ended, or null if it was stopped
 * @property {number | null} promptTokens
 * @property {number | null} tokens written
 * @property {number | null} rate tokens a second, from the first to the last
 * @property {boolean} stopped by the one who looks at the page
 */

/**
 * @typedef {object} Listener
 * @property {(piece: string) => void} text
 * @property {(part: {trace: string, tokens?: import("./brain.js").Token[]}) => void} brain
 */

export class Writer {
  /**
   * @param {import("./api.js").Api} api
   * @param {(writing: boolean) => void} onChange
   */
  constructor(api, onChange) {
    this.api = api;
    this.onChange = onChange;
    /** @type {AbortController | null} */
    this.abort = null;
  }

  get writing() {
    return this.abort !== null;
  }

  /** Ends what is being written; what there is of it stays. */
  stop() {
    this.abort?.abort();
  }

  /**
   * Asks for an answer and hands its pieces on.
   *
   * @param {string} path
   * @param {import("./api.js").Json} body
   * @param {Listener} listener
   * @returns {Promise<Outcome>}
   */
  async write(path, body, listener) {
    const abort = new AbortController();
    const meter = new Meter();
    /** @type {Outcome} */
    const outcome = { finish: null, promptTokens: null, tokens: null, rate: null, stopped: false };
    this.abort = abort;
    this.onChange(true);
    try {
      const request = { ...body, stream: true, stream_options: { include_usage: true } };
      for await (const chunk of this.api.stream(path, request, abort.signal)) {
        const choice = chunk.choices?.[0];
        if (chunk.brain) listener.brain(chunk.brain);
        const piece = choice?.delta?.content ?? choice?.text ?? "";
        if (piece) listener.text(piece);
        if (piece) meter.tick();
        if (choice?.finish_reason) outcome.finish = choice.finish_reason;
        if (chunk.usage) {
          outcome.promptTokens = chunk.usage.prompt_tokens;
          outcome.tokens = chunk.usage.completion_tokens;
        }
      }
    } catch (error) {
      if (!abort.signal.aborted) throw error;
      outcome.stopped = true;
    } finally {
      this.abort = null;
      this.onChange(false);
    }
    outcome.rate = meter.rate(outcome.tokens);
    return outcome;
  }
}

/** How fast tokens come. */
class Meter {
  constructor() {
    this.pieces = 0;
    this.first = 0;
    this.last = 0;
  }

  tick() {
    this.last = performance.now();
    if (this.pieces === 0) this.first = this.last;
    this.pieces += 1;
  }

  /** @param {number | null} tokens that came in all, where that is known; the first one starts the clock */
  rate(tokens) {
    const seconds = (this.last - this.first) / 1000;
    const count = (tokens ?? this.pieces) - 1;
    return count > 0 && seconds > 0 ? count / seconds : null;
  }
}

/**
 * An outcome in words, as "132 tokens · 48 tokens/s · 54 in the prompt".
 *
 * @param {Outcome} outcome
 */
export function shownOutcome(outcome) {
  const words = [];
  if (outcome.tokens !== null)
    words.push(`${outcome.tokens.toLocaleString("en")} token${outcome.tokens === 1 ? "" : "s"}`);
  if (outcome.rate !== null) words.push(`${outcome.rate.toFixed(outcome.rate < 10 ? 1 : 0)} tokens/s`);
  if (outcome.promptTokens !== null) words.push(`${outcome.promptTokens.toLocaleString("en")} in the prompt`);
  if (outcome.stopped) words.push("stopped");
  else if (outcome.finish === "length") words.push("cut at the token limit");
  return words.join(" · ");
}
