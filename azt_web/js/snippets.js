// Which clients there are, and what to paste into each: snippets.txt, filled in so that no value breaks out.
import { file } from './api.js';

const PARTS = [...(await file('snippets.txt')).matchAll(/^== (\S+) (\S+) (.+)\n((?:(?!== ).*\n)*)/gm)];
/** What a value becomes between the quotes around its place; `code` in Python, JavaScript, JSON, YAML and TOML. */
const QUOTED = { code: (text) => JSON.stringify(text).slice(1, -1), sh: (text) => text.replaceAll("'", "'\\''"),
  fish: (text) => text.replace(/[\\']/g, '\\$&'), power: (text) => text.replace(/['‘’‚‛]/g, '$&$&') };

/** Its name in strings.js is client.<id>, its steps con.steps.<id>; `seen` are its names in the request log. */
const client = (id, ...seen) => ({ id, seen });
export const CLIENTS = [
  client('python', 'OpenAI/Python'), client('js', 'OpenAI/JS'), client('curl', 'curl'), client('codex', 'Codex'),
  client('openclaw', 'OpenClaw', 'OpenAI/JS'), client('cline', 'Cline', 'OpenAI/JS'), client('openwebui', 'Open WebUI'),
  client('continue', 'Continue', 'OpenAI/JS'), client('langchain', 'LangChain', 'OpenAI/Python'), client('env'),
  client('generic'),
];
/** The client that the request log calls `name`; the first one when it is not known. */
export const clientSeen = (name) => CLIENTS.find((one) => one.seen.includes(name)) ?? CLIENTS[0];
/** The same address for a program that sees this computer under another name. */
export const atHost = (url, host) => url.replace(/\/\/(\[[^\]]*\]|[^/:]*)/, () => `//${host}`);

/** [{label, text}] with {base, codexBase, key, model}; none for a client that is set up in a form. */
export function snippets(id, values) {
  const dockerBase = values.base.replace(/\/\/(127\.0\.0\.1|localhost|\[::1\])/, '//host.docker.internal');
  const given = { ...values, dockerBase, json: JSON.stringify(values.model ?? '') };
  return PARTS.filter(([, of, quotes]) => of === id && QUOTED[quotes]).map(([, , quotes, label, text]) => {
    const filled = (whole, name) => (name in given ? QUOTED[quotes](given[name]) : whole);
    return { label, text: `${text.trimEnd().replace(/\{(\w+)\}/g, filled)}\n` };
  });
}
