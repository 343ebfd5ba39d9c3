// The one page of the gateway: is it up, what to give to a client, and three programs to try.
// Text reaches the page through textContent only.

const POLL_MS = 10_000;
const CALL_MS = 5_000;
const NEEDS_KEY = 401;
const byId = (id) => document.getElementById(id);
const base = `${location.origin}/v1`;
let key = 'azt';

const SNIPPETS = {
  curl: (model) => `curl -N ${base}/chat/completions \\
  -H "Content-Type: application/json" \\
  -H "Authorization: Bearer ${key}" \\
  -d '{"model": "${model}", "stream": true,
       "messages": [{"role": "user", "content": "Say hello"}]}'`,
  python: (model) => `from openai import OpenAI

client = OpenAI(base_url="${base}", api_key="${key}")
stream = client.responses.create(model="${model}", input="Say hello", stream=True)
for event in stream:
    if event.type == "response.output_text.delta":
        print(event.delta, end="", flush=True)`,
  javascript: (model) => `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${base}", apiKey: "${key}" });
const stream = await client.responses.create({
  model: "${model}", input: "Say hello", stream: true,
});
for await (const event of stream) {
  if (event.type === "response.output_text.delta") process.stdout.write(event.delta);
}`,
};

async function get(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(CALL_MS), cache: 'no-store' });
  return { status: answer.status, value: answer.ok ? await answer.json() : null };
}

function showStatus(state, text) {
  const pill = byId('status');
  pill.dataset.state = state;
  if (pill.textContent !== text) pill.textContent = text;
}

function showNotice(text) {
  byId('notice').textContent = text;
  byId('notice').hidden = text === '';
}

function showModels(ids, preferred) {
  const select = byId('model');
  const options = ids.map((id) => {
    const option = document.createElement('option');
    option.value = option.textContent = id;
    return option;
  });
  select.replaceChildren(...options);
  select.value = ids.includes(preferred) ? preferred : ids[0] ?? '';
  select.disabled = ids.length === 0;
}

function showTexts() {
  const model = byId('model').value || 'gpt-5.4';
  byId('base').textContent = base;
  byId('key').textContent = key;
  for (const [name, write] of Object.entries(SNIPPETS)) byId(name).textContent = write(model);
}

// Only this machine may read the state; other devices see the page without these facts.
function showState(state) {
  const active = state.accounts.find((account) => account.active);
  byId('version').textContent = state.gateway.version;
  const who = active ? `${active.label ?? active.email} (${active.plan})` : 'no account yet';
  const secret = state.gateway.keys ? '' : ' No key is set, so any text will do as the API key.';
  byId('facts').textContent = `Serving: ${who}.${secret}`;
  if (!active) showNotice('No account yet. Run: azt accounts import ~/.codex/auth.json');
}

async function load() {
  const [models, state] = await Promise.all([get('/v1/models'), get('/_gateway/admin/state')]);
  showNotice('');
  if (models.status === NEEDS_KEY) {
    key = 'YOUR_AZT_KEY';
    showNotice('This gateway asks for a key. Use one that was made with: azt keys add NAME');
  }
  showModels((models.value?.data ?? []).map((model) => model.id), state.value?.defaultModel);
  if (state.value) showState(state.value);
  showTexts();
}

let isUp = false;

async function check() {
  try {
    const health = await get('/_gateway/health');
    if (!health.value?.ok) throw new Error(`health answered ${health.status}`);
    if (!isUp) await load();
    isUp = true;
    showStatus('ok', 'Running');
  } catch {
    isUp = false;
    showStatus('bad', 'Not reachable');
    showNotice('The gateway does not answer. Start it with: azt start');
  }
}

// Browsers offer `navigator.clipboard` on secure origins only, which an address on the LAN is not.
async function copy(id) {
  const from = byId(id);
  const text = from.value ?? from.textContent;
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement('textarea');
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand('copy');
  area.remove();
  if (!copied) throw new Error('the browser refused');
}

async function onCopy(button) {
  let said = 'Copied';
  try {
    await copy(button.dataset.copy);
  } catch {
    said = 'Not copied';
  }
  byId('said').textContent = said;
  button.textContent = said;
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
}

for (const button of document.querySelectorAll('[data-copy]')) {
  button.addEventListener('click', () => onCopy(button));
}
byId('model').addEventListener('change', showTexts);
document.addEventListener('visibilitychange', () => { if (!document.hidden) check(); });
setInterval(() => { if (!document.hidden) check(); }, POLL_MS);
showTexts();
check();
