// The conversation of other_clients.py through the AI SDK, which chat pages are made with: URL KEY WRONG_KEY JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { readFileSync } from "node:fs";

const [url, key, wrong, given] = [...process.argv.slice(2, 5), JSON.parse(process.argv[5])];
const model = (apiKey) => createOpenAICompatible({ name: "ours", baseURL: url, apiKey, includeUsage: true })(given.model);
const options = (messages, apiKey = key) => ({
  model: model(apiKey), messages, temperature: 0, maxOutputTokens: given.max_tokens, maxRetries: 0,
});

const chat = [{ role: "user", content: given.questions[0] }];
const whole = await generateText(options(chat));
chat.push({ role: "assistant", content: whole.text }, { role: "user", content: given.questions[1] });
const pieces = [];
for await (const piece of streamText(options(chat)).textStream) pieces.push(piece);
const stopped = await generateText({ ...options(chat), stopSequences: [given.stop] });
const refused = await generateText(options(chat, wrong)).then(() => "no", (error) => `${error.statusCode}`);
console.log(JSON.stringify({
  version: JSON.parse(readFileSync(new URL("./node_modules/ai/package.json", import.meta.url))).version,
  first: whole.text,
  second: pieces.join(""),
  pieces: pieces.filter(Boolean).length,
  stopped: stopped.text,
  finish: stopped.finishReason,
  tokens: [whole.usage.inputTokens, whole.usage.outputTokens],
  refused,
}));
