// The playground (console.md 3.8): a real call through the gateway, watched while it is answered.
// `form` and `run` outlive the view, so that a change of page or language loses neither text nor answer.
import { get, saveBlob, stream } from '../api.js';
import { asCall, callOf, PICTURES_SHOWN, readAnswer, shownBody } from '../calls.js';
import { timingRows, waterfall } from '../charts.js';
import { announce, fill, h, icon, keyed, text } from '../dom.js';
import { bytes, duration, isMasking, num, timeEl } from '../format.js';
import { t } from '../i18n.js';
import { blobOf, canCopyPicture, copyPicture, readPicture } from '../pictures.js';
import { hash, setQuery } from '../router.js';
import { nameOf, store } from '../store.js';
import * as ui from '../ui.js';

const MODES = ['chat', 'responses', 'image', 'models'], TABS = ['answer', 'events', 'request', 'timing'];
const LOOKS = { size: ['1024x1024', '1536x1024', '1024x1536', 'auto'], quality: ['low', 'medium', 'high', 'auto'],
  background: ['auto', 'opaque', 'transparent'], output_format: ['png', 'webp', 'jpeg'] };
const PRESETS = ['ok', 'count', 'tool', 'picture', 'apple'];
const TOOL = [{ type: 'function', name: 'get_weather', description: 'The weather of a city.', parameters: {
  type: 'object', properties: { city: { type: 'string' } }, required: ['city'], additionalProperties: false } }];
const KEPT = 'azt.play', KEPT_MAX = 20, KEPT_CHARS = 20_000, SAID_CHARS = 500, LOOK_AGAIN_MS = [0, 300, 1500];
const PICTURES_MAX = 4, ROW_PX = 28, ROWS_SPARE = 10, EVENT_CHARS = 20_000, TICK_MS = 100;

const form = { model: '', effort: '', account: '', stream: true, text: null, image: null, system: '', tools: '', raw: null,
  looks: Object.fromEntries(Object.entries(LOOKS).map(([name, [first]]) => [name, first])), pictures: [] };
let run = null, runs = 0, models = [], view = null, frame = 0;

const modeOf = (route) => (MODES.includes(route.query.mode) ? route.query.mode : 'chat');
const tabOf = (route) => (TABS.includes(route.query.tab) ? route.query.tab : 'answer');
const promptOf = (mode) => (mode === 'image' ? 'image' : 'text');
const isRunning = () => run?.state === 'running';
const nextCall = () => callOf(view.mode, form, form[promptOf(view.mode)], form.pictures.map((one) => one.data));

// -- One run

const blank = (mode, prompt) => ({ number: runs += 1, mode, prompt, text: '', thought: '', tools: [], events: [], switches: [],
  startedAt: 0 });

function forget(made) {
  if (made?.picture) URL.revokeObjectURL(made.picture.url);
  if (made) made.picture = null;
}

function showPicture(made, data, type, step) {
  const blob = blobOf(data, type);
  forget(made);
  made.picture = { blob, url: URL.createObjectURL(blob), step };
}

function hear(made, headers) {
  made.headAt ??= performance.now();
  made.id = headers.get('x-request-id');
  made.account = decodeURIComponent(headers.get('x-azt-account') ?? '');
}

function take(made, event, data) {
  const n = made.events.length, at = performance.now();
  made.events.push({ key: `${made.number}.${n}`, n, event, data, at: at - made.startedAt });
  if (data !== '[DONE]') readAnswer(made.mode, made, JSON.parse(data));
  if (made.text || made.thought || made.tools.length || made.picture) made.firstAt ??= at;
  paintSoon();
}

async function send() {
  let call;
  try {
    call = nextCall();
  } catch (error) {
    return ui.toast(t('play.badJson', { reason: error.message }), { kind: 'error' });
  }
  if (isRunning()) return null;
  forget(run);
  const { mode } = view, stopper = new AbortController(), startedAt = performance.now();
  const made = run = { ...blank(mode, form[promptOf(mode)]), state: 'running', startedAt, stopper,
    onpicture: (...one) => showPicture(made, ...one) };
  const ticking = setInterval(paintSoon, TICK_MS);
  announce(t('play.started'));
  paint();
  try {
    const whole = await stream('/playground', { ...call, accountId: form.account || null }, { signal: stopper.signal,
      onhead: ({ headers }) => hear(made, headers), onevent: ({ event, data }) => take(made, event, data) });
    if (whole.json) take(made, 'json', JSON.stringify(whole.json));
    made.state = made.error ? 'failed' : 'done';
  } catch (error) {
    made.state = stopper.signal.aborted ? 'stopped' : 'failed';
    if (made.state === 'failed') Object.assign(made, { error, id: error.requestId || made.id });
  }
  clearInterval(ticking);
  made.endedAt = performance.now();
  keep(made);
  announce(made.text.slice(0, SAID_CHARS) || t(`play.${made.state}`));
  paint();
  return explain(made);
}

/** The log knows what the answer cannot tell: the attempts before it, and where the time went. */
async function explain(made) {
  for (const wait of made.id ? LOOK_AGAIN_MS : []) {
    await new Promise((done) => { setTimeout(done, wait); });
    made.detail ??= await get(`/requests/${made.id}`).catch(() => null);
  }
  const tries = made.detail?.attemptList ?? [];
  made.switches = tries.slice(0, -1).flatMap((one, at) => (one.action === 'switched' ? t('play.switched', {
    from: one.account, to: tries[at + 1].account, reason: one.errorType ?? one.status }) : []));
  paint();
}

// -- Earlier runs: text only, in this tab only

const kept = () => JSON.parse(sessionStorage.getItem(KEPT) ?? '[]');

function keep({ mode, prompt, text: said, state, id, account, usage, startedAt, endedAt }) {
  if (mode === 'models' || isMasking()) return;
  const one = { mode, prompt, text: said.slice(0, KEPT_CHARS), state, id, account, usage, endedAt: endedAt - startedAt };
  sessionStorage.setItem(KEPT, JSON.stringify([{ ...one, at: Date.now() }, ...kept()].slice(0, KEPT_MAX)));
  if (view) paintHistory();
}

function paintHistory() {
  const show = (one) => {
    if (isRunning()) return;
    forget(run);
    run = { ...blank(), ...one };
    form[promptOf(one.mode)] = one.prompt;
    setQuery({ mode: one.mode, tab: null });
  };
  const clear = () => { sessionStorage.removeItem(KEPT); paintHistory(); };
  view.history.hidden = !kept().length || isMasking();
  fill(view.kept, h('ul', { class: 'plain' }, kept().map((one) => h('li', null, h('button', { type: 'button', class: 'past',
    on: { click: () => show(one) } }, timeEl(one.at, 'clock'), h('span', { class: 'tag' }, t(`play.${one.mode}`)),
  h('span', { class: 'cut' }, one.prompt))))), ui.button(t('play.clear'), { kind: 'ghost', icon: 'trash', on: clear }));
}

// -- Pictures to start from

async function addPictures(files) {
  for (const file of files) {
    if (form.pictures.length === PICTURES_MAX) return ui.toast(t('play.tooMany', { n: PICTURES_MAX }), { kind: 'error' });
    const one = await readPicture(file);
    if (one) form.pictures.push(one);
    paintPictures();
  }
  return null;
}

function paintPictures() {
  const drop = (one) => {
    URL.revokeObjectURL(one.url);
    form.pictures = form.pictures.filter((other) => other !== one);
    paintPictures();
  };
  fill(view.pictures, form.pictures.map((one) => h('figure', null, h('img', { src: one.url, alt: one.name }),
    h('figcaption', null, h('span', { class: 'cut' }, one.name), bytes(one.size)),
    ui.iconButton('close', t('play.drop', { name: one.name }), () => drop(one)))));
  paintSoon();
}

// -- The left side

function controls() {
  const chosen = models.find((one) => one.id === form.model);
  const set = (name, options) => ui.select(t(`play.${name}`), options, form[name], (value) => { form[name] = value; paintForm(); });
  const look = ([name, values]) => ui.field(t(`play.${name}`), ui.select(t(`play.${name}`), values.map((one) => [one,
    one === 'auto' ? t('play.auto') : one]), form.looks[name], (value) => { form.looks[name] = value; paintSoon(); }));
  const streams = ui.toggle(t('play.stream'), form.stream, (value) => { form.stream = value; paintSoon(); });
  const account = ui.field(t('play.account'), set('account', [['', t('play.automatic')],
    ...store.get('accounts').map((one) => [one.id, nameOf(one)])]));
  if (view.mode === 'models') return [account];
  if (view.mode === 'image') return [...Object.entries(LOOKS).map(look), account, streams];
  return [ui.field(t('play.model'), set('model', models.map((one) => [one.id, one.name ?? one.id]))), ui.field(t('play.effort'),
    set('effort', [['', t('play.auto')], ...(chosen?.efforts ?? []).map((one) => [one, one])])), account, streams];
}

/** Its selects are made anew: only after a choice, or when no one is choosing. */
function paintForm() {
  const name = view.controls.contains(document.activeElement) && document.activeElement.getAttribute('aria-label');
  fill(view.controls, controls());
  if (name) [...view.controls.querySelectorAll('select')].find((one) => one.ariaLabel === name)?.focus();
  paintSoon();
}

function preset(name) {
  const mode = name === 'apple' ? 'image' : view.mode === 'responses' ? 'responses' : 'chat';
  form[promptOf(mode)] = t(`play.say.${name}`);
  Object.assign(form, { tools: name === 'tool' ? JSON.stringify(TOOL, null, 2) : '', raw: null });
  setQuery({ mode, tab: null });
}

/** A text of the form, folded away until it is wanted. */
function folded(name, opens = () => form[name], closes = () => form[name]) {
  const area = h('textarea', { rows: '6', spellcheck: 'false', class: 'mono', 'aria-label': t(`play.${name}`), value: form[name],
    on: { input: () => { form[name] = area.value; paintSoon(); } } });
  const el = ui.details(t(`play.${name}`), area);
  el.addEventListener('toggle', () => {
    form[name] = el.open ? opens() : closes();
    el.show();
    paint();
  });
  el.show = () => {
    if (area.value !== (form[name] ?? '')) area.value = form[name] ?? '';
    if (form[name]) el.open = true;
  };
  return el;
}

function buildForm() {
  const prompt = h('textarea', { rows: '7', 'aria-label': t('play.prompt'), placeholder: t('play.prompt'),
    on: { input: () => { form[promptOf(view.mode)] = prompt.value; paintSoon(); },
      paste: (event) => { if (event.clipboardData.files.length) addPictures([...event.clipboardData.files]); } } });
  const picker = h('input', { type: 'file', accept: 'image/*', multiple: true, hidden: true, 'aria-label': t('play.attach'),
    on: { change: () => { addPictures([...picker.files]); picker.value = ''; } } });
  const presets = PRESETS.map((name) => ui.button(t(`play.preset.${name}`), { kind: 'ghost', on: () => preset(name) }));
  const rawBody = () => { try { return JSON.stringify({ ...nextCall().body }, null, 2); } catch { return '{}'; } };
  const folds = [folded('system'), folded('tools'), folded('raw', () => form.raw ?? rawBody(), () => null)];
  const attach = h('div', { class: 'attach' }, ui.button(t('play.attach'), { icon: 'image', on: () => picker.click() }), picker,
    h('span', { class: 'note' }, t('play.attachNote', { n: PICTURES_MAX })));
  const made = { prompt, folds, attach, controls: h('div', { class: 'controls' }), pictures: h('div', { class: 'pictures' }),
    presets: h('div', { class: 'presets', role: 'group', 'aria-label': t('play.presets') }, presets),
    send: ui.button(t('play.send'), { kind: 'primary', icon: 'play', 'aria-keyshortcuts': 'Control+Enter', on: () => { send(); } }),
    kept: h('div'), history: null };
  made.history = ui.details(t('play.history'), made.kept);
  made.form = ui.card({ title: t('play.request'), class: 'ask' }, made.controls, made.presets, prompt, attach, made.pictures, folds,
    h('div', { class: 'row' }, h('span', { class: 'note' }, t('play.keys')), made.send), made.history);
  // The window takes account files; what falls here are pictures.
  for (const type of ['dragenter', 'dragover', 'drop']) {
    made.form.addEventListener(type, (event) => {
      event.preventDefault();
      event.stopPropagation();
      if (type === 'drop') addPictures([...event.dataTransfer.files]);
    });
  }
  return made;
}

// -- The right side

function paintSoon() { frame ||= requestAnimationFrame(paint); }

/** More of a text is added to its node: what is selected in it stays so. */
function grow(node, value) {
  if (node.length > value.length) node.data = '';
  if (node.length < value.length) node.appendData(value.slice(node.length));
}

function facts() {
  const { state, startedAt, firstAt, endedAt = performance.now(), usage, events, account } = run, streamed = endedAt - firstAt;
  // Until the count is here: an event for each token, nearly.
  const rate = streamed > 100 && events.length > 1 ? num(Math.round(((usage?.[1] ?? events.length) * 1000) / streamed)) : '';
  return [t(`play.${state}`), duration(endedAt - startedAt), firstAt && t('play.first', { d: duration(firstAt - startedAt) }),
    rate && t(usage ? 'play.rate' : 'play.rateAbout', { n: rate }), usage && t('play.tokens', { in: num(usage[0]), out: num(usage[1]) }),
    account && t('play.by', { name: account })].filter(Boolean);
}

function ending() {
  const { id, text: said, picture, switches, error, models: listed, state } = run;
  const asFile = picture && new File([picture.blob], `picture.${picture.blob.type.slice(6)}`, { type: picture.blob.type });
  return [switches.map((one) => h('p', { class: 'switched' }, icon('switch'), one)), error && ui.errorPanel(error),
    listed && h('table', null, h('tbody', null, listed.map((one) => h('tr', null, h('td', null, h('code', null, one.id)),
      h('td', null, one.owned_by), h('td', null, ui.copyButton(one.id, t('act.copy'), { kind: 'ghost' })))))),
    state !== 'running' && h('div', { class: 'row' },
      said && ui.copyButton(said),
      picture && [ui.button(t('play.download'), { icon: 'download', on: () => saveBlob(asFile, asFile.name) }),
        canCopyPicture() && ui.button(t('act.copy'), { icon: 'copy', on: () => copyPicture(picture.blob) }),
        ui.button(t('play.reference'), { icon: 'image', on: () => addPictures([asFile]) })],
      id && ui.button(t('play.inLog'), { icon: 'log', kind: 'ghost', href: hash('log', [id]) }),
      id && h('span', { class: 'mono note' }, id))];
}

const PAINT = {
  answer({ parts }) {
    parts.empty.hidden = Boolean(run);
    grow(parts.said, run?.text ?? '');
    grow(parts.thought, run?.thought ?? '');
    parts.thinking.hidden = !run?.thought;
    keyed(parts.tools, (run?.tools ?? []).map((one, at) => ({ ...one, key: `${run.number}.${at}` })), (one) => one.key,
      () => h('pre', { class: 'tool' }), (node, one) => text(node, `${one.name}(${one.text})`));
    parts.figure.hidden = !run?.picture;
    if (run?.picture && parts.img.getAttribute('src') !== run.picture.url) parts.img.setAttribute('src', run.picture.url);
    text(parts.step, run?.picture?.step ? t('play.preview', { n: run.picture.step, m: PICTURES_SHOWN }) : t('play.final'));
    const mark = run && [run.number, run.state, run.switches.length, Boolean(run.picture)].join();
    if (mark !== view.mark) fill(parts.end, run && ending());
    view.mark = mark;
  },
  events({ list, sheet }) {
    const all = run?.events ?? [], first = Math.max(0, Math.floor(list.scrollTop / ROW_PX) - ROWS_SPARE);
    const some = all.slice(first, first + Math.ceil(list.clientHeight / ROW_PX) + 2 * ROWS_SPARE);
    sheet.style.setProperty('--rows', all.length);
    keyed(sheet, some, (one) => one.key, (one) => h('button', { type: 'button', class: 'event', vars: { '--n': one.n },
      on: { click: () => view.whole.set(one.data.slice(0, EVENT_CHARS)) } }, h('span', { class: 'note' }, duration(one.at)),
    h('b', null, one.event), h('span', { class: 'cut' }, one.data.slice(0, 200))));
  },
  request({ code }) {
    let words = t('play.badJson', { reason: '' });
    try {
      const { path, body } = nextCall(), base = store.get('gateway').baseUrl ?? '';
      words = `${path.endsWith('models') ? 'GET' : 'POST'} ${base}${path.slice(3)}\nAuthorization: Bearer azt\n`
        + `Content-Type: application/json\n\n${shownBody(body)}`;
    } catch { /* a body by hand is not finished yet */ }
    if (code.textContent !== words) code.set(words);
  },
  timing({ times }) {
    const { headAt, firstAt, startedAt, endedAt, detail } = run ?? {};
    const own = { firstByteMs: headAt - startedAt, firstTokenMs: firstAt - startedAt, streamMs: endedAt - firstAt };
    const rows = timingRows(detail?.timing ?? (endedAt && headAt ? own : {})), mark = JSON.stringify(rows);
    if (view.timed !== mark) fill(times, rows.length ? waterfall(rows) : ui.empty('clock', t('play.noTiming')));
    view.timed = mark;
  },
};

function paint() {
  cancelAnimationFrame(frame);
  frame = 0;
  if (!view) return;
  view.stop.hidden = !isRunning();
  view.send.setAttribute('aria-disabled', String(isRunning()));
  fill(view.facts, run && facts().map((one) => h('span', null, one)));
  PAINT[view.tab](view);
}

async function loadModels() {
  models = (await get('/models')).items;
  if (!models.some((one) => one.id === form.model)) form.model = (models.find((one) => one.default) ?? models[0])?.id ?? '';
  if (view) paintForm();
}

function onKey(event) {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) send();
  else if (event.key === 'Escape' && isRunning() && !document.querySelector('dialog[open],:popover-open')) run.stopper.abort();
}

function mount(root, { route }) {
  form.text ??= t('play.say.count');
  form.image ??= t('play.say.apple');
  for (const name of ['model', 'account']) form[name] = route.query[name] ?? form[name];
  const said = document.createTextNode(''), thought = document.createTextNode('');
  const parts = { said, thought, empty: ui.empty('play', t('play.nothing')), thinking: ui.details(t('play.thought'), h('p', { class: 'said' }, thought)),
    tools: h('div'), img: h('img', { alt: t('play.picture') }), step: h('figcaption'), end: h('div', { class: 'end' }) };
  parts.figure = h('figure', { class: 'frame' }, parts.img, parts.step);
  const sheet = h('div', { class: 'sheet' }), list = h('div', { class: 'events', tabindex: '0', role: 'group', 'aria-label': t('play.tab.events'),
    on: { scroll: paintSoon } }, sheet);
  const whole = ui.codeBlock('', { label: t('play.event') }), code = ui.codeBlock('', { label: t('play.tab.request') });
  const copies = ['curl', 'python', 'js'].map((how) => ui.copyButton(() => asCall(how, nextCall(), store.get('gateway').baseUrl), t(`play.as.${how}`)));
  const panes = {
    answer: [parts.empty, parts.thinking, h('p', { class: 'said' }, said), parts.tools, parts.figure, parts.end],
    events: [list, whole], request: [h('div', { class: 'row' }, copies), code], timing: h('div'),
  };
  for (const name of TABS) panes[name] = h('div', { class: `pane ${name}`, hidden: true }, panes[name]);
  const modes = ui.segmented(t('play.mode'), MODES.map((one) => [one, t(`play.${one}`)]), '', (mode) => setQuery({ mode }));
  const tabs = ui.segmented(t('play.tabs'), TABS.map((one) => [one, t(`play.tab.${one}`)]), '', (tab) => setQuery({ tab }));
  const stop = ui.button(t('play.stop'), { icon: 'stop', kind: 'danger', hidden: true, on: () => run.stopper.abort() });
  view = { ...buildForm(), parts, sheet, list, whole, code, times: panes.timing, panes, stop, facts: h('p', { class: 'facts' }) };
  const answer = ui.card({ title: null, class: 'told' }, h('div', { class: 'toolbar' }, tabs, stop), view.facts, Object.values(panes));
  fill(root, h('div', { class: 'play' }, modes, h('div', { class: 'two' }, view.form, answer)));
  const off = [store.on('accounts', () => { if (!view.controls.contains(document.activeElement)) paintForm(); }), store.on('models', loadModels)];
  document.addEventListener('keydown', onKey);
  loadModels().catch(ui.fail);
  paintPictures();
  paintHistory();
  return {
    primary: null,
    update(now) {
      const mode = modeOf(now), isModels = mode === 'models';
      if (view.mode && view.mode !== mode) form.raw = null;
      Object.assign(view, { mode, tab: tabOf(now) });
      modes.set(mode);
      tabs.set(view.tab);
      view.prompt.value = form[promptOf(mode)];
      for (const one of [view.prompt, view.presets, view.attach, view.pictures, ...view.folds]) one.hidden = isModels;
      for (const one of view.folds) one.show();
      for (const name of TABS) panes[name].hidden = name !== view.tab;
      text(view.send.querySelector('.label'), t(mode === 'image' ? 'play.generate' : isModels ? 'play.list' : 'play.send'));
      paintForm();
      paint();
    },
    unmount() {
      document.removeEventListener('keydown', onKey);
      for (const one of off) one();
      view = null;
    },
  };
}

export const page = { title: 'nav.play', mount };
