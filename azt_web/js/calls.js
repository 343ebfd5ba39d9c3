// The model API as the console calls it: bodies of requests, what answers say, and the same call for other programs.
const PREVIEWS = 2;
export const PICTURES_SHOWN = PREVIEWS + 1;
export const PATHS = { chat: '/v1/chat/completions', responses: '/v1/responses', image: '/v1/images/generations',
  models: '/v1/models' };
export const EDITS = '/v1/images/edits';

// -- The request

const orNone = (value) => value || undefined;
const toolsOf = (source, wrap) => (source.trim() ? JSON.parse(source).map(wrap) : undefined);
const BODIES = {
  chat: (form, prompt, urls) => ({
    model: form.model, stream: form.stream, stream_options: orNone(form.stream && { include_usage: true }),
    messages: [...(form.system ? [{ role: 'system', content: form.system }] : []), { role: 'user', content: urls.length
      ? [{ type: 'text', text: prompt }, ...urls.map((url) => ({ type: 'image_url', image_url: { url } }))] : prompt }],
    reasoning_effort: orNone(form.effort),
    tools: toolsOf(form.tools, (one) => (one.function || one.type !== 'function' ? one
      : { type: 'function', function: { ...one, type: undefined } })),
  }),
  responses: (form, prompt, urls) => ({
    model: form.model, stream: form.stream, instructions: orNone(form.system),
    input: urls.length ? [{ role: 'user', content: [{ type: 'input_text', text: prompt },
      ...urls.map((url) => ({ type: 'input_image', image_url: url }))] }] : prompt,
    reasoning: orNone(form.effort && { effort: form.effort, summary: 'auto' }),
    tools: toolsOf(form.tools, ({ function: inner, ...one }) => ({ ...one, ...inner })),
  }),
  image: (form, prompt, urls) => ({
    prompt, ...form.looks, stream: orNone(form.stream), partial_images: orNone(form.stream && PREVIEWS),
    images: orNone(urls.length && urls.map((url) => ({ image_url: url }))),
  }),
  models: () => ({}),
};

/** {path, body} out of the form; `raw` is a body written by hand. Throws SyntaxError for JSON that is none. */
export function callOf(mode, form, prompt, urls) {
  const body = form.raw === null ? JSON.parse(JSON.stringify(BODIES[mode](form, prompt, urls))) : JSON.parse(form.raw);
  return { path: mode === 'image' && body.images ? EDITS : PATHS[mode], body };
}

// -- The answer. `made` gathers {text, thought, tools: [{name, text}], models, usage: [in, out], error}

function addTool(made, at, name, more) {
  const one = made.tools[at] ??= { name: '', text: '' };
  one.name ||= name ?? '';
  one.text += more ?? '';
}

const READ = {
  chat(made, event) {
    const choice = event.choices?.[0], said = choice?.delta ?? choice?.message ?? {};
    made.text += said.content ?? said.refusal ?? '';
    made.thought += said.reasoning_content ?? '';
    for (const [at, { index = at, function: one = {} }] of (said.tool_calls ?? []).entries()) {
      addTool(made, index, one.name, one.arguments);
    }
  },
  responses(made, { type = '', delta = '', item, output_index: at, output = [] }) {
    if (/^response\.(output_text|refusal)\.delta$/.test(type)) made.text += delta;
    else if (/^response\.reasoning_(summary_)?text\.delta$/.test(type)) made.thought += delta;
    else if (/^response\.(function_call_arguments|custom_tool_call_input)\.d/.test(type)) addTool(made, at, '', delta);
    else if (type === 'response.output_item.added' && item.name) addTool(made, at, item.name);
    output.forEach((one, index) => {
      if (one.type === 'message') made.text += one.content.map((part) => part.text ?? part.refusal ?? '').join('');
      else if (one.name) addTool(made, index, one.name, one.arguments ?? one.input);
    });
  },
  image(made, { type = '', b64_json: one, partial_image_index: index = 0, output_format: format = 'png', data = [] }) {
    const picture = data[0]?.b64_json ?? one;
    if (picture) made.onpicture(picture, `image/${format}`, type.endsWith('partial_image') ? index + 1 : null);
  },
  models(made, { data }) { made.models = data; },
};

/** One event of an answer, or a whole one, as members of `made`. */
export function readAnswer(mode, made, event) {
  READ[mode](made, event);
  const whole = event.response ?? event, used = whole.usage;
  if (used) made.usage = [used.input_tokens ?? used.prompt_tokens, used.output_tokens ?? used.completion_tokens];
  if (whole.error || event.type === 'error') made.error = whole.error ?? event;
}

// -- The same call elsewhere

const text = JSON.stringify;
/** A body as it can be shown: pictures are named, not written out. */
export const shownBody = (body) => JSON.stringify(body, (name, value) => (
  typeof value === 'string' && value.startsWith('data:') ? `${value.slice(0, value.indexOf(',') + 1)}...` : value), 2);

const python = (value, pad = '') => {
  const inner = `${pad}    `, put = (open, all, close) => open + (all.length ? `\n${all.join('')}${pad}` : '') + close;
  if (Array.isArray(value)) return put('[', value.map((one) => `${inner}${python(one, inner)},\n`), ']');
  if (value === null) return 'None';
  if (typeof value !== 'object') return { true: 'True', false: 'False' }[value] ?? text(value);
  return put('{', Object.entries(value).map(([name, one]) => `${inner}${text(name)}: ${python(one, inner)},\n`), '}');
};
const METHODS = { [PATHS.chat]: 'chat.completions.create', [PATHS.responses]: 'responses.create',
  [PATHS.image]: 'images.generate', [EDITS]: 'images.edit', [PATHS.models]: 'models.list' };

/** A call as text: how = 'curl', 'python' or 'js'; `base` ends in /v1. Pictures become files beside it. */
export function asCall(how, { path, body }, base, key = 'azt') {
  const { images = [], ...given } = JSON.parse(shownBody(body)), isEmpty = !Object.keys(given).length;
  const files = images.map((one, at) => `picture-${at + 1}.png`);
  const shell = (value) => `'${value.replaceAll("'", "'\\''")}'`, loop = given.stream;
  if (how === 'curl') {
    const fields = [...files.map((name) => `-F ${shell(`image[]=@${name}`)}`),
      ...Object.entries(given).map((one) => `--form-string ${shell(one.join('='))}`)];
    const json = isEmpty ? '' : ` \\\n  -H 'Content-Type: application/json' \\\n  -d ${shell(text(given, null, 2))}`;
    const data = files.length ? fields.map((one) => ` \\\n  ${one}`).join('') : json;
    return `curl -N ${shell(base + path.slice(3))} \\\n  -H 'Authorization: Bearer ${key}'${data}\n`;
  }
  if (how === 'python') {
    const opened = files.map((name) => `open("${name}", "rb")`).join(', ');
    const values = [opened && `image=[${opened}]`, !isEmpty && `**${python(given)}`].filter(Boolean).join(', ');
    return `from openai import OpenAI\n\nclient = OpenAI(base_url=${text(base)}, api_key=${text(key)})\n`
      + `answer = client.${METHODS[path]}(${values})\n${loop ? 'for event in answer:\n    print(event)' : 'print(answer)'}\n`;
  }
  const opened = files.map((name) => `fs.createReadStream("${name}")`).join(', ');
  const values = isEmpty ? '' : text(given, null, 2).replace('{', opened ? `{\n  "image": [${opened}],` : '{');
  return `${opened && 'import fs from "node:fs";\n'}import OpenAI from "openai";\n\n`
    + `const client = new OpenAI({ baseURL: ${text(base)}, apiKey: ${text(key)} });\n`
    + `const answer = await client.${METHODS[path]}(${values});\n`
    + `${loop ? 'for await (const event of answer) console.log(event);' : 'console.log(answer);'}\n`;
}
