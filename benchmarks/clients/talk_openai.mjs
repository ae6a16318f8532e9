// The conversation of other_clients.py through OpenAI's client for Node: URL KEY WRONG_KEY JSON.
import OpenAI from "openai";
import { VERSION } from "openai/version";

const [url, key, wrong, given] = [...process.argv.slice(2, 5), JSON.parse(process.argv[5])];
const client = (apiKey) => new OpenAI({ baseURL: url, apiKey, maxRetries: 0 });
const ask = (messages, options = {}, apiKey = key) =>
  client(apiKey).chat.completions.create({
    model: given.model, messages, temperature: 0, max_completion_tokens: given.max_tokens, ...options,
  });

const chat = [{ role: "user", content: given.questions[0] }];
const whole = await ask(chat);
const first = whole.choices[0].message.content;
chat.push({ role: "assistant", content: first }, { role: "user", content: given.questions[1] });
const pieces = [];
for await (const chunk of await ask(chat, { stream: true })) pieces.push(chunk.choices[0]?.delta?.content ?? "");
const stopped = (await ask(chat, { stop: given.stop })).choices[0];
const refused = await ask(chat, {}, wrong).then(() => "no", (error) => error.constructor.name);
console.log(JSON.stringify({
  version: VERSION,
  first,
  second: pieces.join(""),
  pieces: pieces.filter(Boolean).length,
  stopped: stopped.message.content,
  finish: stopped.finish_reason,
  tokens: [whole.usage.prompt_tokens, whole.usage.completion_tokens],
  refused,
}));
