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
const isAsked = (name, mode) => (mode === 'models' ? name === 'account' : mode === 'image'
  ? !['model', 'effort', 'system', 'tools'].includes(name) : !(name in LOOKS));
const PRESETS = ['ok', 'count', 'tool', 'picture', 'apple'], KEPT = 'azt.play', KEPT_MAX = 20;
const CHARS_MAX = 20_000, PICTURES_MAX = 4, ROW_PX = 28, ROWS_SPARE = 10, TICK_MS = 100;

const form = { model: '', effort: '', account: '', stream: true, system: '', tools: '',
  raw: null, size: '1024x1024', quality: 'low', background: 'auto', output_format: 'png', pictures: [] };
let run = null, runs = 0, past = JSON.parse(sessionStorage.getItem(KEPT) ?? '[]'), models = [], view = null, frame = 0;

const oneOf = (all, wanted) => (all.includes(wanted) ? wanted : all[0]);
const promptOf = (mode) => (mode === 'image' ? 'image' : 'text');
const isRunning = () => run?.state === 'running';
const nextCall = () => callOf(view.mode, form);
const paintSoon = () => { frame ||= requestAnimationFrame(paint); };

// -- One run

function start(made) {
  URL.revokeObjectURL(run?.picture?.url);
  run = { text: '', thought: '', tools: [], events: [], switches: [], ...made, number: runs += 1 };
  return run;
}

function take(made, event, data) {
  const n = made.events.length, now = performance.now(), before = made.picture;
  made.events.push({ key: `${made.number}.${n}`, n, event, data, at: now - made.startedAt });
  if (data !== '[DONE]') readAnswer(made.mode, made, JSON.parse(data));
  if (made.text || made.thought || made.tools.length || made.picture) made.firstAt ??= now;
  if (made.picture !== before) {
    made.picture.url = URL.createObjectURL(made.picture.blob = blobOf(made.picture.data, made.picture.type));
    URL.revokeObjectURL(before?.url);
  }
  paintSoon();
}

async function send() {
  if (isRunning()) return;
  const { mode } = view, stopper = new AbortController(), { signal } = stopper;
  const asked = { ...nextCall(), accountId: form.account || null };
  const made = start({ mode, prompt: form[promptOf(mode)], state: 'running', startedAt: performance.now(), stopper });
  const ticking = setInterval(paintSoon, TICK_MS), onevent = ({ event, data }) => take(made, event, data);
  const onhead = ({ headers }) => {
    const name = decodeURIComponent(headers.get('x-azt-account') ?? '');
    Object.assign(made, { id: headers.get('x-request-id'), account: nameOf(accountOf(name)) || name });
  };
  announce(t('play.started'));
  paint();
  view.told.scrollIntoView({ block: 'nearest' });
  try {
    const { json } = await stream('/playground', asked, { signal, onhead, onevent });
    if (json) take(made, 'json', JSON.stringify(json));
    made.state = made.error ? 'failed' : 'done';
  } catch (error) {
    made.state = signal.aborted ? 'stopped' : 'failed';
    if (!signal.aborted) Object.assign(made, { error, id: error.requestId || made.id });
  }
  clearInterval(ticking);
  made.endedAt = performance.now();
  keep(made);
  announce(made.text || t(`play.${made.state}`));
  paint();
  explain();
}

/** The log knows what the answer cannot tell: the attempts before it, and where the time went. */
async function explain() {
  const made = run, isLogged = store.get('recent').some((one) => one.id === made?.id && one.result !== 'running');
  if (!isLogged || isRunning() || made.detail) return;
  made.detail = {};
  made.detail = await get(`/requests/${made.id}`).catch(() => ({}));
  const { attemptList: tries = [] } = made.detail, name = (one) => nameOf(accountOf(one.accountId)) || one.account;
  made.switches = tries.slice(1).flatMap((next, at) => (tries[at].action === 'switched' ? t('play.switched', {
    from: name(tries[at]), to: name(next), reason: tries[at].errorType ?? tries[at].status }) : []));
  paint();
}

// -- Earlier runs: text only, in this tab only

function keep({ stopper, events, picture, detail, error, text: said, ...made }) {
  if (made.mode === 'models' || isMasking()) return;
  past = [{ ...made, text: said.slice(0, CHARS_MAX), at: Date.now() }, ...past].slice(0, KEPT_MAX);
  sessionStorage.setItem(KEPT, JSON.stringify(past));
}

function pastRow(one) {
  const again = () => {
    if (isRunning()) return;
    form[promptOf(one.mode)] = start(one).prompt;
    setQuery({ mode: one.mode, tab: null });
  };
  return h('button', { type: 'button', class: 'past', on: { click: again } }, timeEl(one.at, 'clock'),
    ui.tag(t(`play.${one.mode}`)), h('span', { class: 'cut' }, one.prompt));
}

// -- The left side

async function addPictures(files) {
  for (const file of files) {
    if (form.pictures.length === PICTURES_MAX) return ui.fail(new Error(t('play.tooMany', { n: PICTURES_MAX })));
    const one = await readPicture(file);
    if (one) form.pictures.push(one);
    paintSoon();
  }
}

function pictureRow(one) {
  const drop = () => { URL.revokeObjectURL(one.url); form.pictures.splice(form.pictures.indexOf(one), 1); };
  const name = h('figcaption', null, h('span', { class: 'cut' }, one.name), bytes(one.size));
  return h('figure', null, h('img', { src: one.url, alt: one.name }), name,
    ui.iconButton('close', t('play.drop', { name: one.name }), drop));
}

/** What can be chosen changes with the accounts, the models, and the chosen model. */
function paintForm() {
  const { model, effort, account } = view.asks, efforts = models.find((one) => one.id === form.model)?.efforts ?? [];
  model.set(models.map((one) => [one.id, one.name]), form.model);
  effort.set([['', t('play.auto')], ...efforts.map((one) => [one])], form.effort);
  account.set([['', t('play.automatic')], ...store.get('accounts').map((one) => [one.id, nameOf(one)])], form.account);
  paintSoon();
}

function preset(name) {
  const mode = name === 'apple' ? 'image' : view.mode === 'responses' ? 'responses' : 'chat', tools = name === 'tool';
  Object.assign(form, { [promptOf(mode)]: t(`play.say.${name}`), tools: tools ? t('play.tool') : '', raw: null });
  setQuery({ mode, tab: null });
}

function choice(name) {
  const options = LOOKS[name]?.map((one) => [one, one === 'auto' ? t('play.auto') : one]) ?? [];
  const made = ui.select(t(`play.${name}`), options, form[name], (value) => { form[name] = value; paintForm(); });
  return Object.assign(ui.field(t(`play.${name}`), made), { set: made.set });
}

/** A text of the form, folded away until it is wanted. The raw body counts only while it is open. */
function folded(name) {
  const area = h('textarea', { rows: '6', spellcheck: 'false', class: 'mono', 'aria-label': t(`play.${name}`),
    on: { input: () => { form[name] = area.value; } } });
  const el = ui.details(t(`play.${name}`), area);
  el.show = () => { area.value = form[name] ?? ''; el.open = form[name] !== null && (el.open || form[name] !== ''); };
  if (name === 'raw') el.addEventListener('toggle', () => {
    try { form.raw = el.open ? form.raw ?? JSON.stringify(nextCall().body, null, 2) : null; } catch { form.raw = '{}'; }
    el.show();
    paintSoon();
  });
  return el;
}

function buildForm() {
  const add = (files) => { addPictures([...files]); }, note = (words) => h('span', { class: 'note' }, words);
  const prompt = h('textarea', { rows: '7', 'aria-label': t('play.prompt'), placeholder: t('play.prompt'), on: {
    input: () => { form[promptOf(view.mode)] = prompt.value; }, paste: (event) => add(event.clipboardData.files) } });
  const picker = h('input', { type: 'file', accept: 'image/*', multiple: true, hidden: true,
    'aria-label': t('play.attach'), on: { change: () => { add(picker.files); picker.value = ''; } } });
  const controls = {};
  for (const name of ['model', 'effort', ...Object.keys(LOOKS), 'account']) controls[name] = choice(name);
  controls.stream = ui.toggle(t('play.stream'), form.stream, (is) => { form.stream = is; });
  const presets = ui.chips(t('play.presets'), PRESETS.map((one) => [one, t(`play.preset.${one}`)]), '', preset);
  const attach = ui.row(ui.button(t('play.attach'), { icon: 'image', on: () => picker.click() }),
    picker, note(t('play.attachNote', { n: PICTURES_MAX }))), pictures = h('div', { class: 'pictures' });
  const [system, tools, raw] = ['system', 'tools', 'raw'].map(folded);
  const texts = { presets, prompt, attach, pictures, system, tools, raw };
  const go = ui.button('–', { kind: 'primary', icon: 'play', 'aria-keyshortcuts': 'Control+Enter', on: send });
  const clear = () => { past = []; sessionStorage.removeItem(KEPT); }, list = h('div');
  const history = ui.details(t('play.history'), list, ui.button(t('play.clear'), { icon: 'trash', on: clear }));
  const hold = (event) => { event.preventDefault(); event.stopPropagation(); }; // the window takes account files
  const drop = (event) => { hold(event); add(event.dataTransfer.files); };
  const el = ui.card({ title: t('play.request'), class: 'ask', on: { dragenter: hold, dragover: hold, drop } },
    h('div', { class: 'controls' }, Object.values(controls)), Object.values(texts),
    ui.row(note(t('play.keys')), go), history);
  return { asks: { ...controls, ...texts }, list, history, go, el };
}

// -- The right side

/** More of a text is added to its node: what is selected in it stays so. */
const grow = (node, value) => (value.startsWith(node.data) ? node.appendData(value.slice(node.length))
  : node.replaceData(0, node.length, value));

function facts({ mode, state, startedAt, firstAt, endedAt = performance.now(), usage, events, account }) {
  const streamed = endedAt - firstAt, first = mode === 'image' ? 'play.firstPicture' : 'play.first';
  // Until the count is here: an event for each token, nearly.
  const rate = streamed > 100 && events.length > 1 && ((usage?.[1] || events.length) * 1000) / streamed;
  return [t(`play.${state}`), duration(endedAt - startedAt), firstAt && t(first, { d: duration(firstAt - startedAt) }),
    rate && t(usage ? 'play.rate' : 'play.rateAbout', { n: num(Math.round(rate)) }), usage?.[1]
    && t('play.tokens', { in: num(usage[0]), out: num(usage[1]) }), account && t('play.by', { name: account })];
}

const markOf = ({ number, state, switches }) => [number, state, switches.length].join();
function ending({ id, text: said, picture, switches, error, models: listed, state }) {
  const type = picture?.type, file = picture && new File([picture.blob], `picture.${type.slice(6)}`, { type });
  const model = (one) => [h('code', null, one.id), ui.copyButton(one.id, t('act.copy'), { kind: 'ghost' })];
  return h('div', { class: 'run-end' }, switches.map((one) => h('p', { class: 'switched' }, icon('switch'), one)),
    error && ui.errorPanel(error), listed && ui.table(listed.map(model), null, ['', 'num']),
    state !== 'running' && ui.row(said && ui.copyButton(said),
      file && [ui.button(t('play.download'), { icon: 'download', on: () => saveBlob(file, file.name) }),
        canCopyPicture() && ui.button(t('act.copy'), { icon: 'copy', on: () => copyPicture(file) }),
        ui.button(t('play.reference'), { icon: 'image', on: () => addPictures([file]) })],
      id && [ui.button(t('play.inLog'), { icon: 'log', kind: 'ghost', href: hash('log', [id]) }),
        ui.copyButton(id, id, { kind: 'ghost mono' })]));
}

const pane = (name, paintIt, ...parts) => Object.assign(h('div', { class: `pane ${name}` }, parts), { paintIt });
const PANES = {
  answer() {
    const [said, thought, called] = [new Text(), new Text(), new Text()], tools = h('pre', { class: 'tool' }, called);
    const empty = ui.empty('play', t('play.nothing')), end = h('div'), step = h('figcaption');
    const img = h('img', { alt: t('play.picture') }), figure = h('figure', { class: 'frame' }, img, step);
    const thinking = ui.details(t('play.thought'), h('p', { class: 'said' }, thought));
    return pane('answer', () => {
      const { picture, tools: calls = [] } = run ?? {};
      grow(said, run?.text ?? '');
      grow(thought, run?.thought ?? '');
      grow(called, calls.filter(Boolean).map((one) => `${one.name}(${one.text})`).join('\n'));
      const shown = [[empty, !run], [thinking, thought.length], [tools, called.length], [figure, picture]];
      for (const [el, is] of shown) el.hidden = !is;
      if (picture && img.src !== picture.url) img.setAttribute('src', picture.url);
      text(step, picture?.step ? t('play.preview', { n: picture.step, m: PICTURES_SHOWN }) : t('play.final'));
      keyed(end, run ? [run] : [], markOf, ending);
    }, empty, thinking, h('p', { class: 'said' }, said), tools, figure, end);
  },
  events() {
    const sheet = h('div', { class: 'roll' }), list = h('div', { class: 'roller', tabindex: '0', role: 'group',
      'aria-label': t('play.tab.events'), on: { scroll: paintSoon } }, sheet);
    const make = ({ n, at, event, data }) => h('button', { type: 'button', class: 'event', vars: { '--n': n }, on: {
      click: () => ui.dialog({ title: event, wide: true, body: ui.codeBlock(data.slice(0, CHARS_MAX)) }) } },
    h('span', null, duration(at)), h('b', null, event), h('span', { class: 'cut' }, data.slice(0, 200)));
    return pane('events', () => {
      const all = run?.events ?? [], first = Math.max(0, Math.floor(list.scrollTop / ROW_PX) - ROWS_SPARE);
      const last = first + Math.ceil(list.clientHeight / ROW_PX) + 2 * ROWS_SPARE;
      sheet.style.setProperty('--rows', all.length);
      keyed(sheet, all.slice(first, last), (one) => one.key, make);
    }, list);
  },
  request() {
    const place = h('div'), base = () => store.get('gateway').baseUrl, words = ({ path, body }) => t('play.http', {
      method: view.mode === 'models' ? 'GET' : 'POST', url: base() + path.slice(3), body: shownBody(body) });
    const copy = (how) => ui.copyButton(() => asCall(how, nextCall(), base()), t(`play.as.${how}`));
    const make = (one) => ui.codeBlock(one, { label: t('play.tab.request') });
    return pane('request', () => {
      let now;
      try { now = words(nextCall()); } catch (error) { now = error.message; }
      keyed(place, [now], String, make);
    }, ui.row(['curl', 'python', 'js'].map(copy)), place);
  },
  timing() {
    const place = h('div'), make = (rows) => (rows.length ? waterfall(rows) : ui.empty('clock', t('play.noTiming')));
    return pane('timing', () => keyed(place, [timingRows(run?.detail?.timing ?? {})], JSON.stringify, make), place);
  },
};

function paint() {
  cancelAnimationFrame(frame);
  frame = 0;
  if (!view) return;
  const kept = isMasking() ? [] : past;
  [view.stop.hidden, view.history.hidden] = [!isRunning(), !kept.length];
  fill(view.facts, run && facts(run).filter(Boolean).map((one) => h('span', null, one)));
  keyed(view.asks.pictures, form.pictures, (one) => one.url, pictureRow);
  keyed(view.list, kept, (one) => one.at, pastRow);
  view.pane.paintIt();
}

// -- The page

async function loadModels() {
  models = (await get('/models')).items;
  const chosen = models.find((one) => one.id === form.model) ?? models.find((one) => one.default) ?? models[0];
  form.model = chosen?.id ?? '';
  if (view) paintForm();
}

function onKey({ key, ctrlKey, metaKey }) {
  if (key === 'Enter' && (ctrlKey || metaKey)) send().catch(ui.fail);
  const isOver = document.querySelector('dialog[open], :popover-open');
  if (key === 'Escape' && isRunning() && !isOver) run.stopper.abort();
}

function mount(root, { route: { query: given } }) {
  const { text: said = t('play.say.count'), image = t('play.say.apple') } = form, { model, account } = given;
  Object.assign(form, { text: said, image }, model && { model }, account && { account });
  const pick = (name, all, words) => ui.segmented(t(`play.${name}s`), all.map((one) => [one, t(`play.${words}${one}`)]),
    '', (value) => setQuery({ [name]: value }));
  const panes = TABS.map((name) => PANES[name]());
  const modes = pick('mode', MODES, ''), tabs = pick('tab', TABS, 'tab.');
  const stop = ui.button(t('play.stop'), { icon: 'stop', kind: 'danger', on: () => run.stopper.abort() });
  view = { ...buildForm(), stop, facts: h('p', { class: 'run-facts' }) };
  view.told = ui.card({ class: 'told' }, h('div', { class: 'run-head' }, tabs, stop), view.facts, panes);
  fill(root, h('div', { class: 'play', on: { click: paintSoon, input: paintSoon } }, modes,
    h('div', { class: 'play-two' }, view.el, view.told)));
  const off = [store.on('models', loadModels), store.on('recent', explain), store.on('accounts', paintForm)];
  document.addEventListener('keydown', onKey);
  loadModels().catch(ui.fail);
  return {
    primary: null,
    update({ query }) {
      const mode = oneOf(MODES, query.mode), tab = oneOf(TABS, query.tab);
      if (view.mode && view.mode !== mode) form.raw = null;
      Object.assign(view, { mode, pane: panes[TABS.indexOf(tab)] });
      modes.set(mode);
      tabs.set(tab);
      view.asks.prompt.value = form[promptOf(mode)];
      for (const [name, el] of Object.entries(view.asks)) { el.hidden = !isAsked(name, mode); el.show?.(); }
      for (const one of panes) one.hidden = one !== view.pane;
      text(view.go.querySelector('.label'), t(`play.go.${mode}`));
      paintForm();
      paint();
    },
    unmount() { document.removeEventListener('keydown', onKey); off.forEach((one) => one()); view = null; },
  };
}

export const page = { title: 'nav.play', mount };
