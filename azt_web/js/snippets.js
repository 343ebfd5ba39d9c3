// What to paste into which client. Pure text: every value goes in quoted the way its language wants it.

/** Its name in strings.js is client.<id>, its steps con.steps.<id>; `seen` are its names in the request log. */
export const CLIENTS = Object.entries({
  python: ['OpenAI/Python'], js: ['OpenAI/JS'], curl: ['curl'], codex: ['Codex'], openclaw: ['OpenClaw', 'OpenAI/JS'],
  cline: ['Cline', 'OpenAI/JS'], openwebui: ['Open WebUI'], continue: ['Continue', 'OpenAI/JS'],
  langchain: ['LangChain', 'OpenAI/Python'], env: [], generic: [],
}).map(([id, seen]) => ({ id, seen }));

/** The client that the request log calls `name`; the first one when it is not known. */
export const clientSeen = (name) => CLIENTS.find((one) => one.seen.includes(name)) ?? CLIENTS[0];

/** The same address for a program that sees this computer under another name. */
export const atHost = (url, host) => url.replace(/\/\/(\[[^\]]*\]|[^/:]*)/, () => `//${host}`);

const q = JSON.stringify; // right for Python, JavaScript, JSON, YAML and TOML
const sh = (text) => (/^[\w.:/@+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
const fish = (text) => `'${text.replaceAll('\\', '\\\\').replaceAll("'", "\\'")}'`;
const power = (text) => `'${text.replace(/['‘’‚‛]/g, '$&$&')}'`;

const curl = ({ base, key }, path, body, rest = '') => `curl -sS${body.stream ? 'N' : ''} ${sh(base + path)} \\
  -H ${sh(`Authorization: Bearer ${key}`)} -H 'Content-Type: application/json' \\
  -d ${sh(q(body))}${rest}\n`;

const PICTURE = `python3 -c "import base64, json, sys
sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))" > apple.png`;

const python = ({ base, key }) => `from openai import OpenAI

client = OpenAI(base_url=${q(base)}, api_key=${q(key)})\n`;
const js = ({ base, key }) => `import OpenAI from "openai";

const client = new OpenAI({ baseURL: ${q(base)}, apiKey: ${q(key)} });\n`;

const CODE = {
  python: (o) => [
    { label: 'call.py', lang: 'python', text: `${python(o)}
answer = client.responses.create(model=${q(o.model)}, input="Say OK")
print(answer.output_text)\n` },
    { label: 'stream.py', lang: 'python', text: `${python(o)}
with client.responses.stream(model=${q(o.model)}, input="Count to 20") as stream:
    for event in stream:
        if event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)\n` }],
  js: (o) => [{ label: 'call.mjs', lang: 'js', text: `${js(o)}
const stream = await client.responses.create({ model: ${q(o.model)}, input: "Count to 20", stream: true });
for await (const event of stream) {
  if (event.type === "response.output_text.delta") process.stdout.write(event.delta);
}\n` }],
  curl: (o) => [
    { label: '/v1/responses', lang: 'sh', text: curl(o, '/responses', { model: o.model, input: 'Say OK' }) },
    { label: '/v1/chat/completions', lang: 'sh', text: curl(o, '/chat/completions',
      { model: o.model, stream: true, messages: [{ role: 'user', content: 'Count to 20' }] }) },
    { label: '/v1/images/generations', lang: 'sh', text: curl(o, '/images/generations',
      { model: 'gpt-image-2', prompt: 'A red apple', size: '1024x1024' }, ` \\\n  | ${PICTURE}`) }],
  codex: (o) => [
    { label: '~/.codex/config.toml · openai', lang: 'toml',
      text: `model_provider = "openai"\nopenai_base_url = ${q(o.codexBase)}\n` },
    { label: '~/.codex/config.toml · ai-zero-token', lang: 'toml', text: `model_provider = "ai-zero-token"

[model_providers.ai-zero-token]
name = "AI Zero Token"
base_url = ${q(o.codexBase)}
wire_api = "responses"
supports_websockets = false\n` }],
  openclaw: (o) => [{ label: '~/.openclaw/openclaw.json', lang: 'json', text: `${JSON.stringify({
    models: { mode: 'merge', providers: { azt: { baseUrl: o.base, apiKey: o.key, api: 'openai-completions',
      models: [{ id: o.model, name: o.model, reasoning: true, input: ['text', 'image'] }] } } },
    agents: { defaults: { model: { primary: `azt/${o.model}` } } },
  }, null, 2)}\n` }],
  openwebui: (o) => [{ label: 'docker', lang: 'sh', text: `docker run -d --name open-webui -p 3000:8080 \\
  --add-host=host.docker.internal:host-gateway -v open-webui:/app/backend/data \\
  -e OPENAI_API_BASE_URL=${sh(o.base)} -e OPENAI_API_KEY=${sh(o.key)} \\
  ghcr.io/open-webui/open-webui:main\n` }],
  continue: (o) => [{ label: '~/.continue/config.yaml', lang: 'yaml', text: `name: azt\nversion: 1.0.0\nschema: v1
models:
  - name: ${q(o.model)}
    provider: openai
    model: ${q(o.model)}
    apiBase: ${q(o.base)}
    apiKey: ${q(o.key)}\n` }],
  langchain: (o) => [{ label: 'chain.py', lang: 'python', text: `from langchain_openai import ChatOpenAI

model = ChatOpenAI(model=${q(o.model)}, base_url=${q(o.base)}, api_key=${q(o.key)})
for part in model.stream("Count to 20"):
    print(part.content, end="", flush=True)\n` }],
  env: (o) => [
    { label: 'sh', lang: 'sh', text: `export OPENAI_BASE_URL=${sh(o.base)}\nexport OPENAI_API_KEY=${sh(o.key)}\n` },
    { label: 'fish', lang: 'fish',
      text: `set -gx OPENAI_BASE_URL ${fish(o.base)}\nset -gx OPENAI_API_KEY ${fish(o.key)}\n` },
    { label: 'PowerShell', lang: 'powershell',
      text: `$env:OPENAI_BASE_URL = ${power(o.base)}\n$env:OPENAI_API_KEY = ${power(o.key)}\n` }],
};

/**
 * @param {{base: string, codexBase: string, key: string, model: string}} values `base` ends in /v1
 * @returns {{label: string, lang: string, text: string}[]} none for clients that are set up in a form
 */
export const snippets = (id, values) => CODE[id]?.(values) ?? [];
