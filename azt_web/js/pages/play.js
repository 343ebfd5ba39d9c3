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
import { accountOf, nameOf, store } from '../store.js';
import * as ui from '../ui.js';

const MODES = ['chat', 'responses', 'image', 'models'], TABS = ['answer', 'events', 'request', 'timing'];
const LOOKS = { size: ['1024x1024', '1536x1024', '1024x1536', 'auto'], quality: ['low', 'medium', 'high', 'auto'],
  background: ['auto', 'opaque', 'transparent'], output_format: ['png', 'webp', 'jpeg'] };
const PRESETS = ['ok', 'count', 'tool', 'picture', 'apple'];
const TOOL = [{ type: 'function', name: 'get_weather', description: 'The weather of a city.', parameters: {
  type: 'object', properties: { city: { type: 'string' } }, required: ['city'], additionalProperties: false } }];
const KEPT = 'azt.play', KEPT_MAX = 20, KEPT_CHARS = 20_000, SAID_CHARS = 500;
const PICTURES_MAX = 4, ROW_PX = 28, ROWS_SPARE = 10, EVENT_CHARS = 20_000, TICK_MS = 100;

const form = { model: '', effort: '', account: '', stream: true, text: null, image: null, system: '', tools: '', raw: null,
  looks: Object.fromEntries(Object.entries(LOOKS).map(([name, [first]]) => [name, first])), pictures: [] };
let run = null, runs = 0, models = [], view = null, frame = 0;

const oneOf = (all, wanted) => (all.includes(wanted) ? wanted : all[0]);
const promptOf = (mode) => (mode === 'image' ? 'image' : 'text');
const isRunning = () => run?.state === 'running';
const nextCall = () => callOf(view.mode, form, form[promptOf(view.mode)], form.pictures.map((one) => one.data));
function paintSoon() { frame ||= requestAnimationFrame(paint); }

// -- One run

function newRun(mode, prompt, more) {
  URL.revokeObjectURL(run?.picture?.url);
  run = { number: runs += 1, mode, prompt, text: '', thought: '', tools: [], events: [], switches: [], startedAt: 0, ...more };
  return run;
}

function take(made, event, data) {
  const n = made.events.length, at = performance.now();
  made.events.push({ key: `${made.number}.${n}`, n, event, data, at: at - made.startedAt });
  if (data !== '[DONE]') readAnswer(made.mode, made, JSON.parse(data));
  if (made.text || made.thought || made.tools.length || made.picture) made.firstAt ??= at;
  paintSoon();
}

async function send() {
  if (isRunning()) return;
  let call;
  try { call = nextCall(); } catch (error) { return void ui.toast(t('play.badJson', { reason: error.message }), { kind: 'error' }); }
  const stopper = new AbortController(), { signal } = stopper, startedAt = performance.now();
  const made = newRun(view.mode, form[promptOf(view.mode)], { state: 'running', startedAt, stopper, onpicture: (data, type, step) => {
    URL.revokeObjectURL(made.picture?.url);
    const blob = blobOf(data, type);
    made.picture = { blob, step, url: URL.createObjectURL(blob) };
  } });
  const ticking = setInterval(paintSoon, TICK_MS);
  announce(t('play.started'));
  paint();
  view.told.scrollIntoView({ block: 'nearest' });
  try {
    const whole = await stream('/playground', { ...call, accountId: form.account || null }, { signal, onhead: ({ headers }) => {
      const name = decodeURIComponent(headers.get('x-azt-account') ?? '');
      Object.assign(made, { id: headers.get('x-request-id'), account: nameOf(accountOf(name)) || name });
    }, onevent: ({ event, data }) => take(made, event, data) });
    if (whole.json) take(made, 'json', JSON.stringify(whole.json));
    made.state = made.error ? 'failed' : 'done';
  } catch (error) {
    made.state = signal.aborted ? 'stopped' : 'failed';
    if (!signal.aborted) Object.assign(made, { error, id: error.requestId || made.id });
  }
  clearInterval(ticking);
  made.endedAt = performance.now();
  keep(made);
  announce(made.text.slice(0, SAID_CHARS) || t(`play.${made.state}`));
  paint();
  explain();
}

/** The log knows what the answer cannot tell: the attempts before it, and where the time went. */
async function explain() {
  const made = run, isLogged = store.get('recent').some((one) => one.id === made?.id && one.result !== 'running');
  if (!isLogged || isRunning() || made.detail) return;
  made.detail = {};
  made.detail = await get(`/requests/${made.id}`).catch(() => ({}));
  const tries = made.detail.attemptList ?? [], name = (one) => nameOf(accountOf(one.accountId)) || one.account;
  made.switches = tries.slice(0, -1).flatMap((one, at) => (one.action === 'switched' ? t('play.switched', {
    from: name(one), to: name(tries[at + 1]), reason: one.errorType ?? one.status }) : []));
  paint();
}

// -- Earlier runs: text only, in this tab only

const kept = () => JSON.parse(sessionStorage.getItem(KEPT) ?? '[]');

function keep({ mode, prompt, text: said, state, id, account, usage, startedAt, endedAt }) {
  if (mode === 'models' || isMasking()) return;
  const one = { prompt, text: said.slice(0, KEPT_CHARS), state, id, account, usage, endedAt: endedAt - startedAt, at: Date.now() };
  sessionStorage.setItem(KEPT, JSON.stringify([{ mode, ...one }, ...kept()].slice(0, KEPT_MAX)));
  if (view) paintHistory();
}

function paintHistory() {
  const again = (one) => {
    if (isRunning()) return;
    newRun(one.mode, one.prompt, one);
    form[promptOf(one.mode)] = one.prompt;
    setQuery({ mode: one.mode, tab: null });
  };
  view.history.hidden = !kept().length || isMasking();
  fill(view.kept, kept().map((one) => h('button', { type: 'button', class: 'past', on: { click: () => again(one) } }, timeEl(one.at, 'clock'),
    h('span', { class: 'tag' }, t(`play.${one.mode}`)), h('span', { class: 'cut' }, one.prompt))), ui.button(t('play.clear'), {
    kind: 'ghost', icon: 'trash', on: () => { sessionStorage.removeItem(KEPT); paintHistory(); } }));
}

// -- The left side

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
  fill(view.pictures, form.pictures.map((one) => h('figure', null, h('img', { src: one.url, alt: one.name }),
    h('figcaption', null, h('span', { class: 'cut' }, one.name), bytes(one.size)), ui.iconButton('close', t('play.drop', { name: one.name }),
      () => {
        URL.revokeObjectURL(one.url);
        form.pictures = form.pictures.filter((other) => other !== one);
        paintPictures();
      }))));
  paintSoon();
}

/** Its selects are made anew: after a choice, which keeps the focus, or when no one is choosing. */
function paintForm() {
  const { mode, controls } = view, held = controls.contains(document.activeElement) && document.activeElement.ariaLabel;
  const choose = (name, options, owner = form) => ui.field(t(`play.${name}`), ui.select(t(`play.${name}`), options.map(([one, words]) => [one,
    words ?? (one === 'auto' || !one ? t('play.auto') : one)]), owner[name], (value) => { owner[name] = value; paintForm(); }));
  const plain = (values) => (values ?? []).map((one) => [one]);
  const efforts = models.find((one) => one.id === form.model)?.efforts;
  fill(controls, mode === 'image' ? Object.entries(LOOKS).map(([name, values]) => choose(name, plain(values), form.looks)) : mode !== 'models'
    && [choose('model', models.map((one) => [one.id, one.name])), choose('effort', [[''], ...plain(efforts)])],
  choose('account', [['', t('play.automatic')], ...store.get('accounts').map((one) => [one.id, nameOf(one)])]),
  mode !== 'models' && ui.toggle(t('play.stream'), form.stream, (value) => { form.stream = value; paintSoon(); }));
  if (held) [...controls.querySelectorAll('select')].find((one) => one.ariaLabel === held)?.focus();
  paintSoon();
}

function preset(name) {
  const mode = name === 'apple' ? 'image' : view.mode === 'responses' ? 'responses' : 'chat';
  form[promptOf(mode)] = t(`play.say.${name}`);
  Object.assign(form, { tools: name === 'tool' ? JSON.stringify(TOOL, null, 2) : '', raw: null });
  setQuery({ mode, tab: null });
}

/** A text of the form, folded away until it is wanted. The raw body counts only while it is open. */
function folded(name) {
  const area = h('textarea', { rows: '6', spellcheck: 'false', class: 'mono', 'aria-label': t(`play.${name}`),
    on: { input: () => { form[name] = area.value; paintSoon(); } } });
  const el = ui.details(t(`play.${name}`), area);
  el.show = () => { area.value = form[name] ?? ''; el.open ||= Boolean(form[name]); };
  el.addEventListener('toggle', () => {
    if (name !== 'raw') return;
    try { form.raw = el.open ? form.raw ?? JSON.stringify(nextCall().body, null, 2) : null; } catch { form.raw = '{}'; }
    el.show();
    paintSoon();
  });
  return el;
}

function buildForm() {
  const prompt = h('textarea', { rows: '7', 'aria-label': t('play.prompt'), placeholder: t('play.prompt'), on: {
    input: () => { form[promptOf(view.mode)] = prompt.value; paintSoon(); }, paste: (event) => { addPictures([...event.clipboardData.files]); } } });
  const picker = h('input', { type: 'file', accept: 'image/*', multiple: true, hidden: true, 'aria-label': t('play.attach'),
    on: { change: () => { addPictures([...picker.files]); picker.value = ''; } } });
  const made = { prompt, folds: ['system', 'tools', 'raw'].map(folded), kept: h('div'), pictures: h('div', { class: 'pictures' }),
    controls: h('div', { class: 'controls' }),
    attach: h('div', { class: 'row' }, ui.button(t('play.attach'), { icon: 'image', on: () => picker.click() }), picker,
      h('span', { class: 'note' }, t('play.attachNote', { n: PICTURES_MAX }))),
    presets: h('div', { class: 'chips', role: 'group', 'aria-label': t('play.presets') }, PRESETS.map((name) => h('button', { type: 'button',
      class: 'chip', on: { click: () => preset(name) } }, t(`play.preset.${name}`)))),
    send: ui.button(t('play.send'), { kind: 'primary', icon: 'play', 'aria-keyshortcuts': 'Control+Enter', on: () => { send(); } }) };
  made.history = ui.details(t('play.history'), made.kept);
  made.form = ui.card({ title: t('play.request'), class: 'ask' }, made.controls, made.presets, prompt, made.attach, made.pictures, made.folds,
    h('div', { class: 'row' }, h('span', { class: 'note' }, t('play.keys')), made.send), made.history);
  for (const type of ['dragenter', 'dragover', 'drop']) {
    made.form.addEventListener(type, (event) => {
      event.preventDefault();
      event.stopPropagation(); // the window takes account files; what falls here are pictures
      if (type === 'drop') addPictures([...event.dataTransfer.files]);
    });
  }
  return made;
}

// -- The right side

/** More of a text is added to its node: what is selected in it stays so. */
function grow(node, value) {
  if (node.length > value.length) node.data = '';
  if (node.length < value.length) node.appendData(value.slice(node.length));
}

function facts() {
  const { state, startedAt, firstAt, endedAt = performance.now(), usage, events, account } = run, streamed = endedAt - firstAt;
  // Until the count is here: an event for each token, nearly.
  const rate = streamed > 100 && events.length > 1 && num(Math.round(((usage?.[1] || events.length) * 1000) / streamed));
  return [t(`play.${state}`), duration(endedAt - startedAt), firstAt && t(run.mode === 'image' ? 'play.firstPicture' : 'play.first', { d: duration(firstAt - startedAt) }),
    rate && t(usage ? 'play.rate' : 'play.rateAbout', { n: rate }),
    usage?.[1] && t('play.tokens', { in: num(usage[0]), out: num(usage[1]) }), account && t('play.by', { name: account })];
}

function ending() {
  const { id, text: said, picture, switches, error, models: listed, state } = run;
  const file = picture && new File([picture.blob], `picture.${picture.blob.type.slice(6)}`, { type: picture.blob.type });
  return [switches.map((one) => h('p', { class: 'switched' }, icon('switch'), one)), error && ui.errorPanel(error),
    listed && h('table', null, h('tbody', null, listed.map((one) => h('tr', null, h('td', null, h('code', null, one.id)),
      h('td', { class: 'num' }, ui.copyButton(one.id, t('act.copy'), { kind: 'ghost' })))))),
    state !== 'running' && h('div', { class: 'row' }, said && ui.copyButton(said),
      file && [ui.button(t('play.download'), { icon: 'download', on: () => saveBlob(file, file.name) }),
        canCopyPicture() && ui.button(t('act.copy'), { icon: 'copy', on: () => copyPicture(file) }),
        ui.button(t('play.reference'), { icon: 'image', on: () => addPictures([file]) })],
      id && [ui.button(t('play.inLog'), { icon: 'log', kind: 'ghost', href: hash('log', [id]) }), ui.copyButton(id, id, { kind: 'ghost mono' })])];
}

const PAINT = {
  answer({ parts }) {
    const { text: said = '', thought = '', picture, number, state, switches } = run ?? {}, tools = (run?.tools ?? []).filter(Boolean);
    parts.empty.hidden = Boolean(run);
    parts.thinking.hidden = !thought;
    grow(parts.said, said);
    grow(parts.thought, thought);
    keyed(parts.tools, tools.map((one, at) => ({ ...one, key: `${number}.${at}` })), (one) => one.key, () => h('pre', { class: 'tool' }));
    tools.forEach((one, at) => text(parts.tools.children[at], `${one.name}(${one.text})`));
    parts.figure.hidden = !picture;
    if (picture && parts.img.getAttribute('src') !== picture.url) parts.img.setAttribute('src', picture.url);
    text(parts.step, picture?.step ? t('play.preview', { n: picture.step, m: PICTURES_SHOWN }) : t('play.final'));
    const mark = [number, state, switches?.length].join();
    if (mark !== view.mark) fill(parts.end, run && ending());
    view.mark = mark;
  },
  events({ list, sheet }) {
    const all = run?.events ?? [], first = Math.max(0, Math.floor(list.scrollTop / ROW_PX) - ROWS_SPARE);
    const some = all.slice(first, first + Math.ceil(list.clientHeight / ROW_PX) + 2 * ROWS_SPARE);
    sheet.style.setProperty('--rows', all.length);
    keyed(sheet, some, (one) => one.key, (one) => h('button', { type: 'button', class: 'event', vars: { '--n': one.n },
      on: { click: () => { view.chosen.set(one.data.slice(0, EVENT_CHARS)); view.chosen.hidden = false; } } }, h('span', null, duration(one.at)), h('b', null, one.event),
    h('span', { class: 'cut' }, one.data.slice(0, 200))));
  },
  request({ code }) {
    let words = '';
    try {
      const { path, body } = nextCall(), start = `${view.mode === 'models' ? 'GET' : 'POST'} ${store.get('gateway').baseUrl}${path.slice(3)}`;
      words = `${start}\nAuthorization: Bearer azt\nContent-Type: application/json\n\n${shownBody(body)}`;
    } catch (error) { words = error.message; }
    if (code.querySelector('code').textContent !== words) code.set(words);
  },
  timing({ panes: { timing } }) {
    const rows = timingRows(run?.detail?.timing ?? {}), mark = JSON.stringify(rows);
    if (view.timed !== mark) fill(timing, rows.length ? waterfall(rows) : ui.empty('clock', t('play.noTiming')));
    view.timed = mark;
  },
};

function paint() {
  cancelAnimationFrame(frame);
  frame = 0;
  if (!view) return;
  view.stop.hidden = !isRunning();
  view.send.setAttribute('aria-disabled', String(isRunning()));
  fill(view.facts, run && facts().filter(Boolean).map((one) => h('span', null, one)));
  PAINT[view.tab](view);
}

// -- The page

async function loadModels() {
  models = (await get('/models')).items;
  if (!models.some((one) => one.id === form.model)) form.model = (models.find((one) => one.default) ?? models[0])?.id ?? '';
  if (view) paintForm();
}

function onKey(event) {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) send();
  else if (event.key === 'Escape' && isRunning() && !document.querySelector('dialog[open],:popover-open')) run.stopper.abort();
}

function buildAnswer() {
  const said = document.createTextNode(''), thought = document.createTextNode('');
  const parts = { said, thought, empty: ui.empty('play', t('play.nothing')), thinking: ui.details(t('play.thought'), h('p', { class: 'said' },
    thought)), tools: h('div'), img: h('img', { alt: t('play.picture') }), step: h('figcaption'), end: h('div', { class: 'run-end' }) };
  parts.figure = h('figure', { class: 'frame' }, parts.img, parts.step);
  const sheet = h('div', { class: 'roll' }), chosen = ui.codeBlock('', { label: t('play.event') }), code = ui.codeBlock('', { label: t('play.tab.request') });
  const list = h('div', { class: 'roller', tabindex: '0', role: 'group', 'aria-label': t('play.tab.events'), on: { scroll: paintSoon } }, sheet);
  chosen.hidden = true;
  const copies = ['curl', 'python', 'js'].map((how) => ui.copyButton(() => asCall(how, nextCall(), store.get('gateway').baseUrl),
    t(`play.as.${how}`)));
  const panes = { answer: [parts.empty, parts.thinking, h('p', { class: 'said' }, said), parts.tools, parts.figure, parts.end],
    events: [list, chosen], request: [h('div', { class: 'row' }, copies), code], timing: null };
  for (const name of TABS) panes[name] = h('div', { class: `pane ${name}` }, panes[name]);
  const tabs = ui.segmented(t('play.tabs'), TABS.map((one) => [one, t(`play.tab.${one}`)]), '', (tab) => setQuery({ tab }));
  const stop = ui.button(t('play.stop'), { icon: 'stop', kind: 'danger', hidden: true, on: () => run.stopper.abort() });
  return { parts, sheet, list, chosen, code, panes, tabs, stop, facts: h('p', { class: 'run-facts' }) };
}

function mount(root, { route }) {
  form.text ??= t('play.say.count');
  form.image ??= t('play.say.apple');
  for (const name of ['model', 'account']) form[name] = route.query[name] ?? form[name];
  const modes = ui.segmented(t('play.mode'), MODES.map((one) => [one, t(`play.${one}`)]), '', (mode) => setQuery({ mode }));
  view = { ...buildForm(), ...buildAnswer() };
  view.told = ui.card({ class: 'told' }, h('div', { class: 'run-head' }, view.tabs, view.stop), view.facts, Object.values(view.panes));
  fill(root, h('div', { class: 'play' }, modes, h('div', { class: 'play-two' }, view.form, view.told)));
  const off = [store.on('models', loadModels), store.on('recent', explain), store.on('accounts', () => view.controls.contains(document.activeElement) || paintForm())];
  document.addEventListener('keydown', onKey);
  loadModels().catch(ui.fail);
  paintPictures();
  paintHistory();
  return {
    primary: null,
    update({ query }) {
      const mode = oneOf(MODES, query.mode), isModels = mode === 'models';
      if (view.mode && view.mode !== mode) form.raw = null;
      Object.assign(view, { mode, tab: oneOf(TABS, query.tab) });
      modes.set(mode);
      view.tabs.set(view.tab);
      view.prompt.value = form[promptOf(mode)];
      for (const one of [view.prompt, view.presets, view.attach, view.pictures, ...view.folds]) one.hidden = isModels;
      for (const one of view.folds.slice(0, 2)) one.hidden = isModels || mode === 'image';
      for (const one of view.folds) one.show();
      for (const name of TABS) view.panes[name].hidden = name !== view.tab;
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
