// The model API as the console calls it: bodies of requests, what answers say, and the same call for other programs.
import { t } from './i18n.js';

const PREVIEWS = 2, PATHS = { chat: '/v1/chat/completions', responses: '/v1/responses',
  image: '/v1/images/generations', edits: '/v1/images/edits', models: '/v1/models' };
export const PICTURES_SHOWN = PREVIEWS + 1, ENDPOINTS = Object.values(PATHS);
export const modeOf = (path) => (path.includes('images') ? 'image' : path.endsWith('responses') ? 'responses' : 'chat');

// -- The request
const toolsOf = (source, wrap) => (source?.trim() ? JSON.parse(source).map(wrap) : undefined);
const asked = (type, text, pictures) => (pictures.length ? [{ type, text }, ...pictures] : text);
const BODIES = {
  chat: ({ model, stream, system, effort, tools, text }, urls) => ({ model, stream,
    stream_options: stream ? { include_usage: true } : undefined, reasoning_effort: effort || undefined,
    messages: [...(system ? [{ role: 'system', content: system }] : []), { role: 'user', content: asked('text', text,
      urls.map((url) => ({ type: 'image_url', image_url: { url } }))) }],
    tools: toolsOf(tools, ({ type, function: inner, ...one }) => (type === 'function' ? { type, function: inner ?? one }
      : { type, ...one })) }),
  responses: ({ model, stream, system, effort, tools, text }, urls) => ({ model, stream,
    instructions: system || undefined, reasoning: effort ? { effort, summary: 'auto' } : undefined,
    input: [{ role: 'user', content: asked('input_text', text, urls.map((url) => (
      { type: 'input_image', image_url: url }))) }],
    tools: toolsOf(tools, ({ function: inner, ...one }) => ({ ...one, ...inner })) }),
  image: ({ image: prompt, size, quality, background, output_format, stream }, urls) => ({
    prompt, size, quality, background, output_format, stream, partial_images: stream ? PREVIEWS : undefined,
    images: urls.length ? urls.map((url) => ({ image_url: url })) : undefined }),
  models: () => ({}),
};
/** {path, body} out of the form; its `raw` is a body written by hand. Throws for JSON that is none. */
export function callOf(mode, form) {
  const urls = (form.pictures ?? []).map((one) => one.data);
  try {
    const body = JSON.parse(form.raw ?? JSON.stringify(BODIES[mode](form, urls)));
    return { path: PATHS[mode === 'image' && body.images ? 'edits' : mode], body };
  } catch (error) { throw new Error(t('play.badJson', { reason: error.message })); }
}

// -- The answer. `made` gathers {text, thought, tools: [{name, text}], models, usage: [in, out],
// picture: {data, type, step}, error}
const addTool = ({ tools }, at, name = '', more = '') => { (tools[at] ??= { name, text: '' }).text += more; };
const READ = {
  chat(made, { choices: [{ delta, message: said = delta } = {}] = [] }) {
    made.text += said?.content ?? said?.refusal ?? ''; made.thought += said?.reasoning_content ?? '';
    said?.tool_calls?.forEach(({ index, function: one }, at) => addTool(made, index ?? at, one?.name, one?.arguments));
  },
  responses(made, { type = '', delta, item, output_index: at, output = [] }) {
    const [, kind] = /^response\.(\w+)\.delta$/.exec(type) ?? [];
    if (kind === 'output_text' || kind === 'refusal') made.text += delta;
    else if (kind?.startsWith('reasoning')) made.thought += delta;
    else if (kind) addTool(made, at, '', delta);
    else if (type === 'response.output_item.added' && item.name) addTool(made, at, item.name);
    output.forEach((one, index) => {
      if (one.type === 'message') made.text += one.content.map((part) => part.text ?? part.refusal ?? '').join('');
      else if (one.name) addTool(made, index, one.name, one.arguments ?? one.input);
    });
  },
  image(made, { type = '', b64_json: one, partial_image_index: index = 0, output_format: format = 'png', data }) {
    const coded = data?.[0].b64_json ?? one, step = type.endsWith('partial_image') && index + 1;
    if (coded) made.picture = { data: coded, type: `image/${format}`, step };
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

// -- The same call elsewhere: the texts call.<how> of strings.js, filled in
const METHODS = { [PATHS.chat]: 'chat.completions.create', [PATHS.responses]: 'responses.create',
  [PATHS.image]: 'images.generate', [PATHS.edits]: 'images.edit', [PATHS.models]: 'models.list' };
const WORDS = { true: 'True', false: 'False', null: 'None' }, quoted = (words) => `'${words.replaceAll("'", "'\\''")}'`;
const python = (json) => json.replace(/"(?:[^"\\]|\\.)*"|true|false|null/g, (one) => WORDS[one] ?? one);
/** A body as it can be shown: pictures are named, not written out. */
export const shownBody = (body) => JSON.stringify(body, (name, value) => (
  typeof value === 'string' && value.startsWith('data:') ? `${value.slice(0, value.indexOf(',') + 1)}...` : value), 2);
/** A call as text: how = 'curl', 'python' or 'js'; `base` ends in /v1. Pictures become files beside it. */
export function asCall(how, { path, body }, base) {
  const { images = [], ...given } = JSON.parse(shownBody(body)), json = JSON.stringify(given, null, 2);
  const files = images.map((one, at) => t(`call.${how}.file`, { n: at + 1 })), all = files.join(', ');
  const fields = Object.entries(given).map((one) => `--form-string ${quoted(one.join('='))}`);
  const data = all ? fields : path === PATHS.models ? [] : [t('call.curl.json', { json: quoted(json) })];
  const values = { curl: [...files, ...data].map((one) => ` \\\n  ${one}`).join(''),
    python: `${all && `image=[${all}], `}**${python(json)}`,
    js: all ? json.replace('{', `{\n  "image": [${all}],`) : json }[how];
  return t(given.stream && how !== 'curl' ? `call.${how}.stream` : `call.${how}`, {
    base, url: base.slice(0, -3) + path, values, method: METHODS[path] });
}
