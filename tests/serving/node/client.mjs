// What the official Node client makes of a server: `node client.mjs URL` fails, or says in JSON what was written.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "tiny";
const messages = [
  { role: "developer", content: "Be kind." },
  { role: "user", content: [{ type: "text", text: "Which dragon hatched?" }] },
];
const usual = { model, messages, seed: 3, max_completion_tokens: 12 };

const names = [];
for await (const one of client.models.list()) names.push(one.id);
assert.deepEqual(names, [model]);
assert.equal((await client.models.retrieve(model)).bdh.n_layer, 2);

const whole = await client.chat.completions.create({ ...usual, logprobs: true, top_logprobs: 2 });
const chat = whole.choices[0].message.content;
assert.equal(whole.choices[0].finish_reason, "length");
assert.equal(whole.choices[0].logprobs.content.length, whole.usage.completion_tokens);
assert.ok(whole._request_id.startsWith("req_"));

let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  ...usual,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, chat);
assert.deepEqual(usage, whole.usage);

const helper = client.chat.completions.stream(usual);
let heard = "";
helper.on("content", (delta) => (heard += delta));
assert.equal(await helper.finalContent(), chat);
assert.equal(heard, chat);

const endless = await client.chat.completions.create({ ...usual, max_completion_tokens: 60000, stream: true, n: 2 });
for await (const chunk of endless) if (chunk.choices[0].delta.content) break; // closes the connection

const Egg = z.object({
  colour: z.enum(["red", "green"]),
  hatched: z.boolean(),
  names: z.array(z.string().regex(/^[a-z]{1,4}$/)).max(2),
  weight: z.int().min(1).max(9),
});
const parsed = await client.chat.completions.parse({
  ...usual,
  max_completion_tokens: 300,
  response_format: zodResponseFormat(Egg, "egg"),
});
const egg = Egg.parse(parsed.choices[0].message.parsed);
const goesOn = [...messages, parsed.choices[0].message, messages[1]]; // answers go back as they came
assert.ok(await client.chat.completions.create({ ...usual, messages: goesOn }));

const completion = await client.completions.create({ model, prompt: ["One", "Two"], max_tokens: 8, seed: 5 });

await assert.rejects(client.chat.completions.create({ ...usual, temperature: 3 }), (error) => {
  return error instanceof OpenAI.BadRequestError && error.param === "temperature" && error.requestID !== undefined;
});
await assert.rejects(client.models.retrieve("huge"), OpenAI.NotFoundError);

console.log(JSON.stringify({ chat, egg, completions: completion.choices.map((choice) => choice.text) }));
