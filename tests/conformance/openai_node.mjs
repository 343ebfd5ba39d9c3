// The official Node library. Each function takes {url, ...} and returns plain data for the test.
import OpenAI, { toFile } from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const Weather = z.object({ city: z.string() });
const HI = [{ role: "user", content: "hi" }];

function library({ url, key = "any key", headers = {}, options = {} }) {
  return new OpenAI({ baseURL: url, apiKey: key, defaultHeaders: headers, ...options });
}

async function all(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

// -- Chat Completions

export async function chat(given) {
  return library(given).chat.completions.create({ messages: HI, ...given.body });
}

export async function chatStream(given) {
  return all(await library(given).chat.completions.create({ messages: HI, stream: true, ...given.body }));
}

export async function chatStreamHelper(given) {
  const stream = library(given).chat.completions.stream({ messages: HI, ...given.body });
  const snapshots = [];
  stream.on("content", (delta, snapshot) => delta && snapshots.push(snapshot));
  return {
    completion: await stream.finalChatCompletion(),
    content: await stream.finalContent(),
    message: await stream.finalMessage(),
    call: (await stream.finalFunctionToolCall()) ?? null,
    usage: await stream.totalUsage(),
    snapshots,
  };
}

export async function chatRunTools(given) {
  const asked = [];
  const weather = ({ city }) => (asked.push(city), `sunny in ${city}`);
  const tools = [zodFunction({ name: "get_weather", parameters: Weather, function: weather })];
  const runner = library(given).chat.completions.runTools({ messages: HI, tools, ...given.body });
  const content = await runner.finalContent();
  const result = await runner.finalFunctionToolCallResult();
  return { asked, content, result, roles: runner.messages.map((message) => message.role) };
}

export async function chatParse(given) {
  const said = await library(given).chat.completions.parse({
    messages: HI,
    response_format: zodResponseFormat(Weather, "weather"),
    ...given.body,
  });
  return said.choices[0].message.parsed;
}

export async function chatParseTool(given) {
  const said = await library(given).chat.completions.parse({
    messages: HI,
    tools: [zodFunction({ name: "get_weather", parameters: Weather })],
    ...given.body,
  });
  return said.choices[0].message.tool_calls[0].function.parsed_arguments;
}

// -- Responses

export async function response(given) {
  const response = await library(given).responses.create({ input: "hi", ...given.body });
  return { text: response.output_text, usage: response.usage };
}

export async function responseStream(given) {
  return all(await library(given).responses.create({ input: "hi", stream: true, ...given.body }));
}

export async function responseStreamHelper(given) {
  const stream = library(given).responses.stream({
    input: "hi",
    tools: [zodResponsesFunction({ name: "get_weather", parameters: Weather })],
    ...given.body,
  });
  const snapshots = [];
  stream.on("response.output_text.delta", (event) => snapshots.push(event.snapshot));
  const final = await stream.finalResponse();
  return { snapshots, text: final.output_text, output: final.output };
}

export async function responseStreamParse(given) {
  const text = { format: zodTextFormat(Weather, "weather") };
  const stream = library(given).responses.stream({ input: "hi", text, ...given.body });
  return (await stream.finalResponse()).output_parsed;
}

export async function responseParse(given) {
  const text = { format: zodTextFormat(Weather, "weather") };
  const response = await library(given).responses.parse({ input: "hi", text, ...given.body });
  return response.output_parsed;
}

export async function responseToolLoop(given) {
  const client = library(given);
  const first = await client.responses.create({ input: "weather?", ...given.body });
  const call = first.output.find((item) => item.type === "function_call");
  const output = { type: "function_call_output", call_id: call.call_id, output: "sunny" };
  const second = await client.responses.create({
    previous_response_id: first.id,
    input: [output],
    ...given.body,
  });
  return second.output_text;
}

// -- Models, errors, time

export async function models(given) {
  const listed = await all(await library(given).models.list());
  return listed.map((model) => model.id);
}

async function caught(promise) {
  const error = await promise.then(
    () => null,
    (error) => error,
  );
  const { status, code, message, requestID } = error;
  return { name: error.constructor.name, status, code, message, requestID };
}

/** What is thrown, after how many requests and seconds. */
export async function failure(given) {
  let requests = 0;
  const counting = (...call) => (requests++, fetch(...call));
  const options = { ...given.options, fetch: counting };
  const client = library({ ...given, options });
  const started = performance.now();
  const asked = { messages: HI, stream: true, ...given.body };
  const error = await caught(client.chat.completions.create(asked));
  return { ...error, requests, took_s: (performance.now() - started) / 1000 };
}

/** What is thrown in the middle of a stream, and what was heard before. */
export async function streamFailure(given) {
  const heard = [];
  const read = async () => {
    const client = library(given);
    const asked = { messages: HI, stream: true, ...given.body };
    for await (const chunk of await client.chat.completions.create(asked)) {
      heard.push(chunk.choices[0].delta.content);
    }
  };
  return { ...(await caught(read())), heard };
}

export async function streamHelperFailure(given) {
  const stream = library(given).responses.stream({ input: "hi", ...given.body });
  const events = [];
  stream.on("event", (event) => events.push(event));
  await stream.done().catch(() => null);
  return events.at(-1);
}

export async function leaveAfterTwoEvents(given) {
  let seen = 0;
  const stream = await library(given).chat.completions.create({ messages: HI, stream: true, ...given.body });
  for await (const _ of stream) if (++seen === 2) break;
  return seen;
}

async function arrivals(way, isDelta) {
  const client = library(way);
  const stream = way.body.input
    ? await client.responses.create(way.body)
    : await client.chat.completions.create(way.body);
  const arrived = [];
  for await (const event of stream) if (isDelta(event)) arrived.push(performance.now() / 1000);
  return arrived;
}

/** Seconds at which the text deltas came: directly, and on both ways through azt, all at once. */
async function threeWays({ direct, url }) {
  const { model } = direct.body;
  const chatBody = { model, messages: HI, stream: true };
  const isText = (event) => event.type === "response.output_text.delta";
  const isContent = (chunk) => Boolean(chunk.choices[0]?.delta.content);
  const [reference, responses, chat] = await Promise.all([
    arrivals(direct, isText),
    arrivals({ url, body: direct.body }, isText),
    arrivals({ url, body: chatBody }, isContent),
  ]);
  return { reference, responses, chat };
}

/** The second of two rounds: in the first one the process is still loading. */
export async function gaps(given) {
  await threeWays(given);
  return threeWays(given);
}

// -- Images

export async function image(given) {
  return library(given).images.generate(given.body);
}

export async function imageStream(given) {
  return all(await library(given).images.generate({ ...given.body, stream: true }));
}

export async function imageEdit(given) {
  const file = (text, name) => toFile(Buffer.from(text, "base64"), name, { type: "image/png" });
  const files = await Promise.all(given.pictures.map((one, index) => file(one, `${index}.png`)));
  const mask = await file(given.mask, "mask.png");
  return library(given).images.edit({ ...given.body, image: files.length > 1 ? files : files[0], mask });
}
