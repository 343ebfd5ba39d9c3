// Add an account, or sign in again: a dialog with three ways, and the drop zone of the whole window.
import { ApiError, get, send, stream, upload } from '../api.js';
import { fill, h, icon, text } from '../dom.js';
import { bytes, num, now, ticking, wait } from '../format.js';
import { known, plural, t } from '../i18n.js';
import { go, hash, parse } from '../router.js';
import { accountOf, isLocal, nameOf, store } from '../store.js';
import * as ui from '../ui.js';

const UPLOAD_MAX = 32 * 2 ** 20; // bytes; the gateway takes no more at once
const LOOK_MS = 2000; // how often a sign-in is looked at while no events come
const TYPING_MS = 400; // a pause after which pasted text is looked at
const METHODS = ['browser', 'device', 'import'];
/** What an import would do with an entry -> colour, icon, chosen at first; false: there is nothing to choose. */
const RESULTS = {
  new: ['ok', 'check', true], update: ['ok', 'refresh', true], same: ['idle', 'dot'], expired: ['warn', 'warn', false],
  unreadable: ['bad', 'cross'],
};
let box = null, leave = () => {}; // the open dialog, and what ends the way that it shows
let dropped = []; // files on their way into it

const paragraph = (words) => h('p', null, words);
/** A link out of the console. Whoever follows or copies it, in whatever way, is expected back. */
const outward = (href, label, opened, props) => h('a', { ...props, href, target: '_blank', rel: 'noopener noreferrer',
  on: { click: opened, auxclick: opened, contextmenu: opened } }, label, icon('external'));
const left = (ms) => ticking(h('span', { class: 'note' }), ms, () => t('login.left', { d: wait(ms - now()) }));

// -- Signing in

/** The whole address of the failed page: it must name a code, or the refusal, and the state. */
const isCallback = (words) => /[?&]?(code|error)=[^&]/.test(words) && /[?&]?state=[^&]/.test(words);

/** One small real call by this account; its answer grows in `place`. */
async function testCall(accountId, place) {
  let said = '';
  const body = { model: store.get('defaultModel'), input: 'Say OK', stream: true };
  fill(place, t('login.testing'));
  await stream('/playground', { path: '/v1/responses', accountId, body }, { onevent: ({ event, data }) => {
    const { delta, response } = JSON.parse(data);
    if (event === 'response.output_text.delta') text(place, said += delta);
    if (event === 'response.failed') text(place, response.error.message);
  } });
}

/** What follows on a success: the quota of the account as soon as it is read, a test call. */
function ready(account, words, isMany = false) {
  const meters = h('div', { class: 'grid two' }), answer = h('p', { class: 'answer', role: 'status' });
  const show = () => {
    const one = accountOf(account.id) ?? account;
    fill(meters, !isMany && (one.quota?.windows ?? []).map((it) => ui.meter(it, { at: one.quota.capturedAt })));
    serve.hidden = store.get('routing').activeId === one.id;
  };
  const test = ui.button(t('play.test'), { kind: 'primary', icon: 'play', on: () => testCall(account.id, answer) });
  const serve = ui.button(t('acc.useApi'), { on: () => send('POST', `/accounts/${account.id}/activate`) });
  const another = ui.button(t('login.another'), { on: () => { go('#/accounts/add/browser'); sync(true); } });
  const patch = () => (meters.isConnected ? show() : off.forEach((stop) => stop()));
  const off = ['accounts', 'routing'].map((slice) => store.on(slice, patch));
  const said = h('p', { class: 'good', role: 'status' }, icon('check'), h('strong', null, words),
    !isMany && ui.tag(account.plan));
  show();
  return [said, meters, h('div', { class: 'row' }, test, serve, another), answer];
}

/** A sign-in, shown in `host` until it ends. Returns what gives it up. */
function signIn(host, method, wanted) {
  let flow = null, view = null;
  const path = (tail = '') => `/login/${flow.flowId}${tail}`;
  const isOpen = () => ['waiting', 'exchanging'].includes(flow?.status);
  const start = async () => {
    fill(host, ui.skeleton(2));
    try {
      flow = await send('POST', '/login', { method: method || 'browser', accountId: wanted });
    } catch (error) {
      fill(host, ui.errorPanel(error, start));
      return;
    }
    if (!method && !flow.portFree) go(hash('accounts', ['add', 'device'], { account: wanted }));
    view = (flow.method === 'device' ? deviceWay : browserWay)(flow, take, path);
    fill(host, view.parts);
    view.patch(flow);
  };
  const take = (now) => {
    if (!flow || now?.flowId !== flow.flowId) return;
    flow = { ...flow, ...now };
    if (isOpen()) view.patch(flow);
    else if (flow.status === 'done') fill(host, ready(flow.account, t('login.done', { name: nameOf(flow.account) })));
    else fill(host, ended());
  };
  const ended = () => {
    if (flow.error?.code !== 'account_mismatch') {
      const words = flow.error ? ui.wording(flow.error) : t('login.over');
      return h('div', { class: 'empty bad', role: 'alert' }, icon('warn'), paragraph(words),
        ui.button(t(flow.error ? 'act.tryAgain' : 'login.newLink'), { kind: 'primary', on: start }));
    }
    const keep = async () => take(await send('POST', path('/callback'), { keep: true }));
    const names = { came: nameOf(flow.account), wanted: nameOf(accountOf(wanted)) };
    const discard = ui.button(t('login.discard'), { on: () => box.close() });
    return h('div', { class: 'stack', role: 'alert' }, paragraph(t('login.mismatch', names)),
      h('div', { class: 'row' }, discard, ui.button(t('login.keep'), { kind: 'primary', on: keep })));
  };
  const off = store.on('login', (last, flows) => flows.forEach(take));
  const look = () => isOpen() && store.get('connection').state !== 'live' && get(path()).then(take, () => {});
  const timer = setInterval(look, LOOK_MS);
  start();
  return () => {
    off();
    clearInterval(timer);
    if (flow && flow.status !== 'done') send('DELETE', path()).catch(() => {}); // it ends by itself anyhow
  };
}

function browserWay(flow, take, path) {
  const opened = () => send('POST', path('/open'), {}, { keepalive: true }).then(take, ui.fail);
  const state = h('span', { role: 'status' }), why = paragraph(''), placeholder = `${flow.redirectUri}?code=…`;
  const input = h('input', { type: 'text', autocomplete: 'off', spellcheck: 'false', placeholder });
  const address = ui.field(t('login.address'), input);
  const finish = async (event) => {
    event.preventDefault();
    address.error('');
    if (!isCallback(input.value)) return address.error(t('err.bad_callback_url'));
    try {
      const now = await send('POST', path('/callback'), { url: input.value.trim() });
      input.value = '';
      return take(now);
    } catch (error) {
      return address.error(ui.wording(error));
    }
  };
  const paste = ui.details(t('login.paste'), why, h('form', { on: { submit: finish } }, address,
    ui.button(t('login.finish'), { type: 'submit' })));
  return {
    parts: [paragraph(t('login.browser')), paragraph(t('login.private')), h('div', { class: 'row' },
      outward(flow.authorizeUrl, t('login.open'), opened, { class: 'btn primary' }),
      ui.copyButton(() => { opened(); return flow.authorizeUrl; }, t('login.copy'))),
    h('div', { class: 'row' }, state, left(flow.expiresAt)), paste],
    patch: ({ status, portFree, listenError }) => {
      text(state, t(`login.${status}`));
      why.hidden = portFree !== false && !listenError;
      text(why, why.hidden ? '' : t('login.portTaken', { port: new URL(flow.redirectUri).port }));
      paste.open ||= !why.hidden;
    },
  };
}

function deviceWay(flow) {
  const { verificationUrl: url, userCode, intervalMs, expiresAt } = flow, state = h('span', { role: 'status' });
  const copy = (words) => ui.copyButton(words, '', { kind: 'ghost square', 'aria-label': t('act.copy') });
  const code = h('code', { class: 'big' }, userCode);
  return {
    parts: [h('ol', { class: 'steps' },
      h('li', null, t('login.deviceOpen'), ' ', outward(url, url.replace('https://', ''), () => {}), copy(url)),
      h('li', null, t('login.deviceCode'), ' ', code, copy(userCode)),
      h('li', null, t('login.deviceBack', { n: num(Math.round(intervalMs / 1000)) }))),
    h('div', { class: 'row' }, state, left(expiresAt))],
    patch: ({ status }) => text(state, t(`login.${status}`)),
  };
}

// -- Import

/** Files or text -> what an import would do -> the import. */
function importing(host, files) {
  let timer = 0;
  const picker = h('input', { type: 'file', multiple: true, accept: '.json,.zip', hidden: true,
    on: { change: () => ofFiles([...picker.files]) } });
  const area = h('textarea', { rows: '4', spellcheck: 'false', autocomplete: 'off', on: { input: () => {
    clearTimeout(timer);
    timer = setTimeout(ofText, TYPING_MS);
  } } });
  const pasted = ui.field(t('imp.paste'), area), found = h('div', { class: 'found' });
  const example = async () => { area.value = JSON.stringify(await get('/accounts/import/template'), null, 1); };

  const look = async (ask, what) => {
    pasted.error('');
    fill(found, ui.skeleton(3));
    try {
      fill(found, preview(await ask(), what, host));
    } catch (error) {
      fill(found, ui.errorPanel(error, () => look(ask, what)));
    }
  };
  const ofFiles = (list) => look(() => {
    const form = new FormData(), size = list.reduce((sum, one) => sum + one.size, 0);
    for (const one of list) form.append('file', one, one.name);
    if (size > UPLOAD_MAX) throw new ApiError(413, { code: 'too_large', params: { limit: bytes(UPLOAD_MAX) } });
    return upload('/accounts/import', form, { dryRun: 1 });
  }, list.map((one) => one.name).join(', '));
  const ofText = () => {
    try {
      const payload = area.value.trim() && JSON.parse(area.value);
      fill(found);
      if (payload) look(() => send('POST', '/accounts/import', { payload }, { query: { dryRun: 1 } }), t('imp.pasted'));
    } catch {
      pasted.error(t('imp.notJson'));
    }
  };
  const choose = ui.button(t('imp.choose'), { icon: 'upload', kind: 'primary', on: () => picker.click() });
  fill(host, h('div', { class: 'row' }, choose, picker, h('span', { class: 'note' }, t('imp.anywhere'))), pasted,
    h('div', null, ui.button(t('imp.example'), { kind: 'ghost', on: example })), found);
  if (files.length) ofFiles(files);
  return () => clearTimeout(timer);
}

/** The verdict on every entry, a choice among them, and the import itself. `what`: the names of the files. */
function preview({ previewId, summary, items }, what, host) {
  const chosen = new Set(items.filter((one) => RESULTS[one.result][2]).map((one) => one.index));
  let check = false;
  const run = async () => {
    const done = await send('POST', '/accounts/import', { previewId, indexes: [...chosen], check });
    const [first, second] = done.items, words = plural('imp.done', done.items.length, { name: nameOf(first) });
    fill(host, ready(first, words, Boolean(second)));
  };
  const start = ui.button(' ', { kind: 'primary', on: run });
  const count = () => { text(start.firstChild, plural('imp.go', chosen.size)); start.disabled = !chosen.size; };
  const pick = (one) => h('input', { type: 'checkbox', checked: chosen.has(one.index),
    'aria-label': t('acc.boxOf', { name: nameOf(one) }),
    on: { change: ({ target }) => { chosen[target.checked ? 'add' : 'delete'](one.index); count(); } } });
  const verdict = (name, words, title) => {
    const [colour, shape] = RESULTS[name];
    return h('span', { class: `pill ${colour}`, title }, icon(shape), words);
  };
  const row = (one) => {
    const { result, file, plan, message } = one, key = `imp.${one.code ?? result}`;
    const told = verdict(result, known(key) ? t(key) : message, message);
    const cells = [RESULTS[result].length > 2 && pick(one), file ?? '–', nameOf(one) || '–', ui.tag(plan), told];
    return h('tr', null, cells.map((cell) => h('td', null, cell)));
  };
  const heads = ['file', 'account', 'plan', 'result'].map((name) => h('th', { scope: 'col' }, t(`imp.col.${name}`)));
  const sums = Object.keys(RESULTS).map((name) => summary[name] > 0
    && verdict(name, [num(summary[name]), ' ', t(`imp.${name}`)]));
  count();
  return [h('h3', null, what), h('div', { class: 'row', role: 'status' }, sums),
    h('div', { class: 'scroll', tabindex: '0', role: 'group', 'aria-label': what },
      h('table', null, h('thead', null, h('tr', null, h('td'), heads)), h('tbody', null, items.map(row)))),
    ui.toggle(t('imp.check'), false, (is) => { check = is; }),
    h('div', { class: 'row end' }, ui.button(t('act.cancel'), { on: () => box.close() }), start)];
}

// -- The dialog and the drop zone

/** The dialog follows the address: `#/accounts/add/<way>`. `anew`: also where the address is the same. */
function sync(anew = false) {
  const { page, parts: [first, method], query } = parse(location.hash), isHere = page === 'accounts' && first === 'add';
  if (!isHere) return box?.close();
  const wanted = accountOf(query.account), way = method || (isLocal() ? '' : 'device');
  if (!box) box = opened(wanted);
  if (box.way === way && !anew) return null;
  box.way = way;
  box.tabs.set(way || 'browser');
  leave();
  const files = dropped;
  dropped = [];
  leave = way === 'import' ? importing(box.host, files) : signIn(box.host, way, query.account);
  return null;
}

function opened(wanted) {
  const ways = METHODS.slice(0, wanted ? 2 : 3).map((one) => [one, t(`add.${one}`)]), host = h('div', { class: 'add' });
  const to = (one) => go(hash('accounts', ['add', one], parse(location.hash).query));
  const tabs = ui.segmented(t('add.way'), ways, '', to);
  const onclose = () => {
    box = null;
    leave();
    leave = () => {};
    const { page, parts, query } = parse(location.hash);
    if (page === 'accounts' && parts[0] === 'add') go(hash('accounts', [], { ...query, account: null }));
  };
  const title = wanted ? t('add.again', { name: nameOf(wanted) }) : t('acc.add');
  const made = ui.dialog({ title, wide: true, body: [tabs, host], onclose });
  return { ...made, host, tabs, way: null };
}

/** For the start of the console: the dialog at its address, and files dropped anywhere. */
export function install() {
  const zone = h('div', { class: 'dropzone', popover: 'manual' });
  const takes = ({ dataTransfer: it, target }) => it?.types.includes('Files') && !target.closest?.('[data-drop]')
    && ![...it.items].some((one) => one.type.startsWith('image/'));
  document.body.append(zone);
  addEventListener('hashchange', () => sync());
  addEventListener('dragover', (event) => {
    if (!takes(event)) return;
    event.preventDefault();
    if (zone.matches(':popover-open')) return;
    fill(zone, icon('upload'), h('strong', null, t('acc.drop')), paragraph(t('acc.dropNote')));
    zone.showPopover();
  });
  addEventListener('dragleave', (event) => { if (!event.relatedTarget) zone.hidePopover(); });
  addEventListener('drop', (event) => {
    zone.hidePopover();
    if (!takes(event)) return;
    event.preventDefault();
    dropped = [...event.dataTransfer.files];
    const here = hash('accounts', ['add', 'import']);
    if (location.hash === here) sync(true);
    else go(here);
  });
  sync();
}
