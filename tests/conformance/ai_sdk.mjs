// The Vercel AI SDK. Each function takes {url, provider, ...} and returns plain data for the test.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, isStepCount, Output, streamText, tool } from "ai";
import { z } from "zod";

const Weather = z.object({ city: z.string() });

function sdk({ url, provider, model, settings = {} }, sent = []) {
  const recording = (to, how) => (sent.push(JSON.parse(how.body)), fetch(to, how));
  const options = { baseURL: url, apiKey: "any key", fetch: recording, ...settings };
  if (provider === "compatible") {
    const compatible = { name: "azt", includeUsage: true, supportsStructuredOutputs: true };
    return createOpenAICompatible({ ...compatible, ...options })(model);
  }
  const openai = createOpenAI(options);
  return provider === "chat" ? openai.chat(model) : openai(model);
}

export async function generate(given) {
  const said = await generateText({ model: sdk(given), prompt: "hi", ...given.options });
  const { text, reasoningText, finishReason, usage } = said;
  return { text, reasoning: reasoningText ?? null, finishReason, usage };
}

export async function stream(given) {
  const errors = [];
  const onError = ({ error }) => errors.push(error.message ?? String(error.error?.message ?? error));
  const said = streamText({ model: sdk(given), prompt: "hi", onError, ...given.options });
  const deltas = [];
  for await (const delta of said.textStream) deltas.push(delta);
  if (errors.length) return { deltas, errors };
  const reasoning = (await said.reasoningText) ?? null;
  return { deltas, reasoning, finishReason: await said.finishReason, usage: await said.usage };
}

/**
 * Seconds at which the text came, in the second of two streams: at its first chunk the SDK sets
 * itself up for up to half a second, and what arrives meanwhile is handed out all at once.
 */
export async function arrivals(given) {
  await stream(given);
  const arrived = [];
  for await (const delta of streamText({ model: sdk(given), prompt: "hi" }).textStream) {
    if (delta) arrived.push(performance.now() / 1000);
  }
  return arrived;
}

function weather(asked) {
  const execute = async ({ city }) => (asked.push(city), `sunny in ${city}`);
  return { get_weather: tool({ description: "weather", inputSchema: Weather, execute }) };
}

export async function toolLoop(given) {
  const asked = [];
  const said = await generateText({
    model: sdk(given),
    prompt: "weather?",
    tools: weather(asked),
    stopWhen: isStepCount(3),
  });
  return { asked, text: said.text, steps: said.steps.length, total: said.totalUsage?.totalTokens };
}

export async function toolLoopStreamed(given) {
  const asked = [];
  const said = streamText({
    model: sdk(given),
    prompt: "weather?",
    tools: weather(asked),
    stopWhen: isStepCount(3),
  });
  const text = await said.text;
  return { asked, text, steps: (await said.steps).length };
}

export async function object(given) {
  const said = await generateObject({ model: sdk(given), schema: Weather, prompt: "where?" });
  return said.object;
}

export async function outputObject(given) {
  const output = Output.object({ schema: Weather });
  return (await generateText({ model: sdk(given), output, prompt: "where?" })).output;
}

/** Two turns in one conversation, the second with the messages that the first one returned. */
export async function conversation(given) {
  const sent = [];
  const model = sdk(given, sent);
  const messages = [{ role: "user", content: "first" }];
  const first = await generateText({ model, messages });
  messages.push(...first.response.messages, { role: "user", content: "second" });
  const second = await generateText({ model, messages });
  return { text: second.text, sent: sent.at(-1).input ?? sent.at(-1).messages };
}

/** What is thrown after how many requests; a retried failure is told by its last error. */
export async function failure(given) {
  const sent = [];
  const asked = { model: sdk(given, sent), prompt: "hi", ...given.options };
  const error = await generateText(asked).then(
    () => null,
    (error) => error,
  );
  const { statusCode, message, isRetryable } = error.lastError ?? error;
  return { status: statusCode, message, isRetryable, requests: sent.length };
}
