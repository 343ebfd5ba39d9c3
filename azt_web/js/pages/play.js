// The playground (console.md 3.8): a real call through the gateway, watched while it is answered.
// `form` and `run` outlive the view, so that a change of page or language loses neither text nor answer.
import { get, saveBlob, stream } from '../api.js';
import { asCall, callOf, PICTURES_SHOWN, readAnswer, shownBody } from '../calls.js';
import { timingRows, waterfall } from '../charts.js';
import { announce, fill, h, icon, keyed, text } from '../dom.js';
import { bytes, duration, isMasking, num, timeEl } from '../format.js';
import { t } from '../i18n.js';
import { canCopyPicture, copyPicture, pictureFile, readPicture } from '../pictures.js';
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
const form = { stream: true, system: '', tools: '', raw: null, pictures: [] }; // and what the controls put there
let run = null, past = JSON.parse(sessionStorage.getItem(KEPT) ?? '[]'), models = [], view = null, frame = 0;

const promptOf = (mode) => (mode === 'image' ? 'image' : 'text'), isRunning = () => run?.state === 'running';
const nextCall = () => callOf(view.mode, form), stop = () => run.stopper.abort();
const paintSoon = () => { frame ||= requestAnimationFrame(() => { frame = 0; if (view) paint(); }); };

// -- One run, and the earlier ones: their texts, in this tab only
const drop = (picture) => URL.revokeObjectURL(picture?.url);
const blank = () => ({ text: '', thought: '', tools: [], events: [], switches: [] });
const start = (made) => { drop(run?.picture); return run = { ...blank(), ...made }; };
function take(made, event, data) {
  const { mode, events, picture: before, startedAt } = made, now = performance.now();
  events.push({ n: events.length, event, data, at: now - startedAt });
  if (data !== '[DONE]') readAnswer(mode, made, JSON.parse(data));
  const { text: said, thought, tools, picture } = made;
  if (said || thought || tools.length || picture) made.firstAt ??= now;
  if (picture !== before) { drop(before); picture.url = URL.createObjectURL(picture.file = pictureFile(picture)); }
  paintSoon();
}
async function send() {
  if (isRunning()) return;
  const { mode } = view, stopper = new AbortController(), { signal } = stopper, prompt = form[promptOf(mode)];
  const asked = { ...nextCall(), accountId: form.account || null };
  const made = start({ mode, prompt, state: 'running', startedAt: performance.now(), stopper });
  const ticking = setInterval(paintSoon, TICK_MS), onevent = ({ event, data }) => take(made, event, data);
  const onhead = ({ headers }) => Object.assign(made, { id: headers.get('x-request-id'),
    account: decodeURIComponent(headers.get('x-azt-account') ?? '') });
  announce(t('play.started')); paintSoon(); view.told.scrollIntoView({ block: 'nearest' });
  try {
    const { json } = await stream('/playground', asked, { signal, onhead, onevent });
    if (json) take(made, 'json', JSON.stringify(json));
    made.state = made.error ? 'failed' : 'done';
  } catch (error) {
    made.state = signal.aborted ? 'stopped' : 'failed';
    if (!signal.aborted) Object.assign(made, { error, id: error.requestId || made.id });
  }
  clearInterval(ticking); made.endedAt = performance.now(); keep(made);
  announce(made.text || t(`play.${made.state}`)); paintSoon(); explain();
}
/** The log knows what the answer cannot tell: the attempts before it, and where the time went. */
async function explain() {
  const made = run, isLogged = store.get('recent').some((one) => one.id === made?.id && one.result !== 'running');
  if (!isLogged || isRunning() || made.detail) return;
  made.detail = {}; made.detail = await get(`/requests/${made.id}`).catch(() => ({}));
  const { attemptList: tries = [] } = made.detail, name = (one) => nameOf(accountOf(one.accountId)) || one.account;
  made.switches = tries.slice(1).flatMap((next, at) => (tries[at].action === 'switched' ? t('play.switched', {
    from: name(tries[at]), to: name(next), reason: tries[at].errorType ?? tries[at].status }) : [])); paintSoon();
}
function keep({ stopper, events, picture, detail, error, text: said, ...made }) {
  if (made.mode === 'models' || isMasking()) return;
  past = [{ ...made, text: said.slice(0, CHARS_MAX), at: Date.now() }, ...past].slice(0, KEPT_MAX);
  sessionStorage.setItem(KEPT, JSON.stringify(past));
}
function pastRow(one) {
  const { mode, prompt, at } = one, again = () => { start(one); ask(mode, prompt); };
  return h('button', { type: 'button', class: 'past', on: { click: () => isRunning() || again() } },
    timeEl(at, 'clock'), ui.tag(t(`play.${mode}`)), h('span', { class: 'cut' }, prompt));
}

// -- The left side
const ask = (mode, prompt) => { form[promptOf(mode)] = prompt; setQuery({ mode, tab: null }); };
function preset(name) {
  Object.assign(form, { tools: name === 'tool' ? t('play.tool') : '', raw: null });
  ask(name === 'apple' ? 'image' : view.mode === 'responses' ? 'responses' : 'chat', t(`play.say.${name}`));
}
async function addPictures(files) {
  for (const file of files) {
    if (form.pictures.length === PICTURES_MAX) return ui.fail(new Error(t('play.tooMany', { n: PICTURES_MAX })));
    form.pictures.push(...await readPicture(file)); paintSoon();
  }
}
function pictureRow(one) {
  const { name, size, url } = one, remove = () => { drop(one); form.pictures.splice(form.pictures.indexOf(one), 1); };
  return h('figure', null, h('img', { src: url, alt: name }), h('figcaption', null, h('span', { class: 'cut' }, name),
    bytes(size)), ui.iconButton('close', t('play.drop', { name }), remove));
}
/** What can be chosen changes with the accounts, the models, and the chosen model. */
function paintForm() {
  const { model, effort, account } = view.asks, efforts = models.find((one) => one.id === form.model)?.efforts ?? [];
  model.set(models.map((one) => [one.id, one.name]), form.model);
  effort.set([['', t('play.auto')], ...efforts.map((one) => [one])], form.effort);
  account.set([['', t('play.automatic')], ...store.get('accounts').map((one) => [one.id, nameOf(one)])], form.account);
  paintSoon();
}
function choice(name) {
  const words = t(`play.${name}`), change = (value) => { form[name] = value; paintForm(); };
  if (name === 'stream') return ui.toggle(words, form.stream, change);
  const options = LOOKS[name]?.map((one) => [one, one === 'auto' ? t('play.auto') : one]) ?? [];
  const made = ui.select(words, options, form[name] ??= LOOKS[name]?.[0] ?? '', change);
  return Object.assign(ui.field(words, made), { set: made.set });
}
/** A text of the form, folded away until it is wanted. The raw body counts only while it is open. */
function folded(name) {
  const area = h('textarea', { rows: '6', spellcheck: 'false', class: 'mono', 'aria-label': t(`play.${name}`),
    on: { input: () => { form[name] = area.value; } } }), el = ui.details(t(`play.${name}`), area);
  el.show = () => { area.value = form[name] ?? ''; el.open = form[name] !== null && (el.open || form[name] !== ''); };
  if (name === 'raw') el.addEventListener('toggle', () => {
    try { form.raw = el.open ? form.raw ?? JSON.stringify(nextCall().body, null, 2) : null; } catch { form.raw = '{}'; }
    el.show(); paintSoon();
  });
  return el;
}
function buildForm() {
  const add = (files) => { addPictures([...files]); }, clear = () => { past = []; sessionStorage.removeItem(KEPT); };
  const names = ['model', 'effort', ...Object.keys(LOOKS), 'account', 'stream'];
  const controls = Object.fromEntries(names.map((name) => [name, choice(name)]));
  const prompt = h('textarea', { rows: '7', 'aria-label': t('play.prompt'), placeholder: t('play.prompt'), on: {
    input: () => { form[promptOf(view.mode)] = prompt.value; }, paste: (event) => add(event.clipboardData.files) } });
  const picker = h('input', { type: 'file', accept: 'image/*', multiple: true, hidden: true,
    'aria-label': t('play.attach'), on: { change: () => { add(picker.files); picker.value = ''; } } });
  const attach = ui.row(ui.button(t('play.attach'), { icon: 'image', on: () => picker.click() }), picker,
    ui.note(t('play.attachNote', { n: PICTURES_MAX }))), pictures = h('div', { class: 'pictures' }), list = h('div');
  const presets = ui.chips(t('play.presets'), PRESETS.map((one) => [one, t(`play.preset.${one}`)]), '', preset);
  const [system, tools, raw] = ['system', 'tools', 'raw'].map(folded);
  const texts = { presets, prompt, attach, pictures, system, tools, raw };
  const go = ui.button('–', { kind: 'primary', icon: 'play', 'aria-keyshortcuts': 'Control+Enter', on: send });
  const history = ui.details(t('play.history'), list, ui.button(t('play.clear'), { icon: 'trash', on: clear }));
  const hold = (event) => { event.preventDefault(); event.stopPropagation(); }; // the window takes account files
  const on = { dragenter: hold, dragover: hold, drop: (event) => { hold(event); add(event.dataTransfer.files); } };
  const el = ui.card({ title: t('play.request'), class: 'ask', on }, h('div', { class: 'controls' },
    Object.values(controls)), Object.values(texts), ui.row(ui.note(t('play.keys')), go), history);
  return { asks: { ...controls, ...texts }, list, history, go, el };
}

// -- The right side
/** More of a text is added to its node: what is selected in it stays so. */
const grow = (node, value) => (value.startsWith(node.data) ? node.appendData(value.slice(node.length))
  : node.replaceData(0, node.length, value));
function facts({ mode, state, startedAt, firstAt, endedAt = performance.now(), usage: [read, said] = [], ...made }) {
  const { events, account } = made, ms = endedAt - firstAt, first = mode === 'image' ? 'firstPicture' : 'first';
  const n = said || events.length; // until the count is here: an event for each token, nearly
  return [t(`play.${state}`), duration(endedAt - startedAt), firstAt && t(`play.${first}`, {
    d: duration(firstAt - startedAt) }), ms > 100 && events.length > 1 && t(said ? 'play.rate' : 'play.rateAbout', {
    n: num(Math.round((n * 1000) / ms)) }), said && t('play.tokens', { in: num(read), out: num(said) }),
  account && t('play.by', { name: nameOf(accountOf(account)) || account })].filter(Boolean);
}
const markOf = ({ startedAt, state, switches }) => [startedAt, state, switches.length].join();
function ending({ id, text: said, picture: { file } = {}, switches, error, models: listed, state }) {
  const act = (words, shape, on) => ui.button(t(words), { icon: shape, on });
  return h('div', { class: 'run-end' }, switches.map((one) => h('p', { class: 'switched' }, icon('switch'), one)),
    error && ui.errorPanel(error), listed && ui.table(listed.map((one) => [h('code', null, one.id)])),
    state !== 'running' && ui.row(said && ui.copyButton(said), file && [
      act('play.download', 'download', () => saveBlob(file, file.name)),
      canCopyPicture() && act('act.copy', 'copy', () => copyPicture(file)),
      act('play.reference', 'image', () => addPictures([file]))],
    id && [ui.button(t('play.inLog'), { icon: 'log', kind: 'ghost', href: hash('log', [id]) }),
      ui.copyButton(id, id, { kind: 'ghost mono' })]));
}

const pane = (paintIt, ...parts) => Object.assign(h('div', { class: 'pane' }, parts), { paintIt });
function answerPane() {
  const [said, thought, called] = [new Text(), new Text(), new Text()], tools = h('pre', { class: 'tool' }, called);
  const empty = ui.empty('play', t('play.nothing')), end = h('div'), step = h('figcaption');
  const img = h('img', { alt: t('play.picture') }), figure = h('figure', { class: 'frame' }, img, step);
  const thinking = ui.details(t('play.thought'), h('p', { class: 'said' }, thought));
  return pane(() => {
    const { text: answer = '', thought: reason = '', tools: calls = [], picture } = run ?? {};
    grow(said, answer); grow(thought, reason);
    grow(called, calls.filter(Boolean).map((one) => `${one.name}(${one.text})`).join('\n'));
    [empty.hidden, thinking.hidden, tools.hidden, figure.hidden] = [run, !reason, !called.length, !picture];
    if (picture && img.src !== picture.url) img.setAttribute('src', picture.url);
    const n = picture?.step, words = t(n ? 'play.preview' : 'play.final', { n, m: PICTURES_SHOWN });
    text(step, picture ? words : ''); keyed(end, run ? [run] : [], markOf, ending);
  }, empty, thinking, h('p', { class: 'said' }, said), tools, figure, end);
}
function eventsPane() {
  const sheet = h('div', { class: 'roll' }), list = h('div', { class: 'roller', tabindex: '0', role: 'group',
    'aria-label': t('play.tab.events'), on: { scroll: paintSoon } }, sheet);
  const make = ({ n, at, event, data }) => h('button', { type: 'button', class: 'event', vars: { '--n': n }, on: {
    click: () => ui.dialog({ title: event, wide: true, body: ui.codeBlock(data.slice(0, CHARS_MAX)) }) } },
  h('span', null, duration(at)), h('b', null, event), h('span', { class: 'cut' }, data.slice(0, 200)));
  return pane(() => {
    const all = run?.events ?? [], first = Math.max(0, Math.floor(list.scrollTop / ROW_PX) - ROWS_SPARE);
    const last = first + Math.ceil(list.clientHeight / ROW_PX) + 2 * ROWS_SPARE;
    sheet.style.setProperty('--rows', all.length); keyed(sheet, all.slice(first, last), (one) => one, make);
  }, list);
}
function requestPane() {
  const place = h('div'), base = () => store.get('gateway').baseUrl, words = ({ path, body }) => t('play.http', {
    method: view.mode === 'models' ? 'GET' : 'POST', url: base() + path.slice(3), body: shownBody(body) });
  const copy = (how) => ui.copyButton(() => asCall(how, nextCall(), base()), t(`play.as.${how}`));
  const now = () => { try { return words(nextCall()); } catch (error) { return error.message; } };
  const make = (one) => ui.codeBlock(one, { label: t('play.tab.request') });
  return pane(() => keyed(place, [now()], String, make), ui.row(['curl', 'python', 'js'].map(copy)), place);
}
function timingPane() {
  const place = h('div'), make = (rows) => (rows.length ? waterfall(rows) : ui.empty('clock', t('play.noTiming')));
  return pane(() => keyed(place, [timingRows(run?.detail?.timing ?? {})], JSON.stringify, make), place);
}
function paint() {
  [view.halt.hidden, view.history.hidden] = [!isRunning(), isMasking() || !past.length];
  fill(view.state, run && facts(run).map((one) => h('span', null, one)));
  keyed(view.asks.pictures, form.pictures, (one) => one.url, pictureRow);
  keyed(view.list, past, (one) => one.at, pastRow); view.pane.paintIt();
}

// -- The page
async function loadModels() {
  models = (await get('/models')).items;
  form.model = (models.find((one) => one.id === form.model) ?? models.find((one) => one.default) ?? models[0])?.id;
  if (view) paintForm();
}
store.on('recent', explain); store.on('accounts', () => view && paintForm());
store.on('models', () => view && loadModels());
addEventListener('keydown', ({ key, ctrlKey, metaKey }) => {
  if (view && key === 'Enter' && (ctrlKey || metaKey)) send().catch(ui.fail);
  if (view && key === 'Escape' && isRunning() && !document.querySelector('dialog[open], :popover-open')) stop();
});
function mount(root, { route: { query: { model = form.model, account = form.account } } }) {
  const pick = (name, all, words) => ui.segmented(t(`play.${name}s`), all.map((one) => [one, t(`play.${words}${one}`)]),
    '', (value) => setQuery({ [name]: value })), modes = pick('mode', MODES, ''), tabs = pick('tab', TABS, 'tab.');
  const panes = [answerPane, eventsPane, requestPane, timingPane].map((make) => make());
  const halt = ui.button(t('play.stop'), { icon: 'stop', kind: 'danger', on: stop });
  Object.assign(form, { model, account }); view = { ...buildForm(), halt, state: h('p', { class: 'run-facts' }) };
  view.told = ui.card({ class: 'told' }, h('div', { class: 'run-head' }, tabs, halt), view.state, panes);
  fill(root, h('div', { class: 'play', on: { click: paintSoon, input: paintSoon } }, modes,
    h('div', { class: 'play-two' }, view.el, view.told)));
  loadModels().catch(ui.fail);
  return { unmount() { view = null; }, update({ query }) {
    const mode = MODES[Math.max(0, MODES.indexOf(query.mode))], tab = Math.max(0, TABS.indexOf(query.tab));
    if (view.mode && view.mode !== mode) form.raw = null;
    Object.assign(view, { mode, pane: panes[tab] });
    modes.set(mode); tabs.set(TABS[tab]); text(view.go.querySelector('.label'), t(`play.go.${mode}`));
    view.asks.prompt.value = form[promptOf(mode)] ??= t(`play.say.${mode === 'image' ? 'apple' : 'count'}`);
    for (const [name, el] of Object.entries(view.asks)) { el.hidden = !isAsked(name, mode); el.show?.(); }
    for (const one of panes) one.hidden = one !== view.pane;
    paintForm();
  } };
}
export const page = { title: 'nav.play', mount };
