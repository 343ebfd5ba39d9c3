// Which clients there are, and what to paste into each: texts of strings.js, filled in so that no value breaks out.
import { t } from './i18n.js';

/** What a value becomes between the quotes around its place; `code` in Python, JavaScript, JSON, YAML and TOML. */
const code = (text) => JSON.stringify(text).slice(1, -1), sh = (text) => text.replaceAll("'", "'\\''");
const fish = (text) => text.replace(/[\\']/g, '\\$&'), power = (text) => text.replace(/['‘’‚‛]/g, '$&$&');

/** Its name in strings.js is client.<id>, its steps con.steps.<id>, its texts paste.<id>.<number>: a line that names
 * the text, then the text, with these `quotes`. `seen` are its names in the request log. */
const client = (id, seen, ...quotes) => ({ id, seen, quotes });
export const CLIENTS = [
  client('python', ['OpenAI/Python'], code, code), client('js', ['OpenAI/JS'], code),
  client('curl', ['curl'], sh, sh, sh), client('codex', ['Codex'], code, code),
  client('openclaw', ['OpenClaw', 'OpenAI/JS'], code), client('cline', ['Cline', 'OpenAI/JS']),
  client('openwebui', ['Open WebUI'], sh), client('continue', ['Continue', 'OpenAI/JS'], code),
  client('langchain', ['LangChain', 'OpenAI/Python'], code), client('env', [], sh, fish, power), client('generic', []),
];
/** The client that the request log calls `name`; the first one when it is not known. */
export const clientSeen = (name) => CLIENTS.find((one) => one.seen.includes(name)) ?? CLIENTS[0];
/** The same address for a program that sees this computer under another name. */
export const atHost = (url, host) => url.replace(/\/\/(\[[^\]]*\]|[^/:]*)/, () => `//${host}`);

/** [{label, text}] with {base (ends in /v1), codexBase, key, model}; none for a client that is set up in a form. */
export function snippets(id, values) {
  // A shell is given the model within JSON: quoted for both.
  const given = Object.entries({ ...values, json: JSON.stringify(values.model ?? '') });
  return CLIENTS.find((one) => one.id === id).quotes.map((quote, n) => {
    const quoted = Object.fromEntries(given.map(([name, value]) => [name, quote(value)]));
    const [label, ...lines] = t(`paste.${id}.${n}`, quoted).split('\n');
    return { label, text: lines.join('\n') };
  });
}
