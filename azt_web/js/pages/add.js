// Add an account, or sign in again: a dialog with three ways, and the drop zone of the whole window.
import { ApiError, get, send } from '../api.js';
import { fill, h, icon, text } from '../dom.js';
import { num } from '../format.js';
import { known, plural, t } from '../i18n.js';
import { signIn, testCall } from '../login.js';
import { go, hash, parse } from '../router.js';
import { accountOf, isLocal, nameOf, store } from '../store.js';
import * as ui from '../ui.js';

const UPLOAD_MAX = 32 * 2 ** 20, TYPING_MS = 400; // bytes at once; a pause after which pasted text is looked at
/** What an import would do with an entry -> colour, icon, chosen at first; false: there is nothing to choose. */
const RESULTS = { new: ['ok', 'check', true], update: ['ok', 'refresh', true], same: ['idle', 'dot'],
  expired: ['warn', 'warn', false], unreadable: ['bad', 'cross'] };
let box = null, leave = () => {}, dropped = []; // the open dialog, what ends its way, files on their way into it
const turn = (next = () => {}) => { leave(); leave = next; };

/** What follows on a success: the quota of the account as soon as it is read, a test call. */
function ready(host, words, account) {
  const bars = h('div', { class: 'grid two' }), { id, plan } = account;
  const serve = ui.button(t('acc.useApi'), { on: () => send('POST', `/accounts/${id}/activate`) });
  const another = ui.button(t('login.another'), { on: () => begin('browser') });
  const show = () => {
    ui.meters(bars, ui.windows(accountOf(id) ?? account), accountOf(id) ?? account);
    serve.hidden = store.get('routing').activeId === id;
  };
  turn(store.on(['accounts', 'routing'], show));
  fill(host, ui.row(ui.good(words), ui.tag(plan)), bars, testCall(id, [serve, another]));
  show();
}

// -- Import
/** Files, or text as if it were one -> what an import would do -> the import. */
function importing(host, files) {
  let timer = 0;
  const found = h('div', { class: 'found' }), look = (list) => ui.loader(found, async () => {
    const form = new FormData();
    for (const one of list) form.append('file', one);
    if (list.reduce((sum, one) => sum + one.size, 0) > UPLOAD_MAX) throw new ApiError(413, { code: 'too_large' });
    return send('POST', '/accounts/import', form, { query: { dryRun: 1 } });
  }, (seen) => fill(found, preview(seen, list.map((one) => one.name).join(', '), host)));
  const typed = () => (area.value.trim() ? look([new File([area.value], t('imp.pasted'))]) : fill(found));
  const input = () => { clearTimeout(timer); timer = setTimeout(typed, TYPING_MS); };
  const area = h('textarea', { rows: '4', spellcheck: 'false', autocomplete: 'off', on: { input } });
  const picker = h('input', { type: 'file', multiple: true, accept: '.json,.zip', hidden: true,
    on: { change: () => look([...picker.files]) } });
  const choose = ui.button(t('imp.choose'), { icon: 'upload', kind: 'primary', on: () => picker.click() });
  const fillIn = async () => { area.value = JSON.stringify(await get('/accounts/import/template'), null, 1); };
  fill(host, ui.row(choose, picker, h('span', { class: 'note' }, t('imp.anywhere'))), ui.field(t('imp.paste'), area),
    ui.row(ui.button(t('imp.example'), { kind: 'ghost', on: fillIn })), found);
  if (files.length) look(files);
}
/** The verdict on every entry, a choice among them, and the import itself. `what`: the names of the files. */
function preview({ previewId, summary, items }, what, host) {
  const boxes = items.map((one) => h('input', { type: 'checkbox', value: one.index, checked: RESULTS[one.result][2],
    hidden: !(2 in RESULTS[one.result]), 'aria-label': t('acc.boxOf', { name: nameOf(one) }) }));
  const chosen = () => boxes.filter((one) => one.checked).map((one) => Number(one.value));
  const check = ui.toggle(t('imp.check'), false, () => {});
  const start = ui.button(' ', { kind: 'primary', on: async () => {
    const how = { previewId, indexes: chosen(), check: check.control.checked };
    const { items: done } = await send('POST', '/accounts/import', how);
    const words = plural('imp.done', done.length, { name: nameOf(done[0]) });
    return done[1] ? fill(host, ui.good(words)) : ready(host, words, done[0]);
  } });
  const count = () => { text(start.firstChild, plural('imp.go', chosen().length)); start.disabled = !chosen().length; };
  const verdict = (code, message) => (known(`imp.${code}`) ? t(`imp.${code}`) : message);
  const rows = items.map(({ file, result, message, code = result, ...one }, i) => [[boxes[i], ' ', file ?? '–'],
    nameOf(one) || '–', ui.tag(one.plan), ui.badge(RESULTS[result], verdict(code, message), message)]);
  const table = ui.table(rows, ['file', 'account', 'plan', 'result'].map((name) => t(`imp.col.${name}`)));
  const sums = Object.keys(RESULTS).filter((name) => summary[name])
    .map((name) => ui.badge(RESULTS[name], [num(summary[name]), ' ', t(`imp.${name}`)]));
  Object.assign(table, { tabIndex: 0, role: 'group', ariaLabel: what }).addEventListener('change', count);
  count();
  return [h('h3', null, what), h('div', { class: 'row', role: 'status' }, sums), table, check,
    h('div', { class: 'row end' }, ui.button(t('act.cancel'), { on: () => box.close() }), start)];
}

// -- The dialog and the drop zone
/** `#/accounts/add/<way>` -> {way, query}, of any other address {}. */
function asked() {
  const { page, parts: [first, way = isLocal() ? '' : 'device'], query } = parse(location.hash);
  return page === 'accounts' && first === 'add' ? { way, query } : {};
}
/** The dialog follows the address. */
function sync() {
  const { way, query } = asked(), host = h('div', { class: 'add' });
  turn();
  if (!query) return box?.close();
  box ??= opened(accountOf(query.account));
  const ondone = (account) => ready(host, t('login.done', { name: nameOf(account) }), account);
  fill(box.place, host);
  box.tabs.set(way || 'browser');
  if (way === 'import') return importing(host, dropped.splice(0));
  return leave = signIn(host, { method: way, wanted: query.account, ondone, discard: () => box.close() });
}
/** That way, from its start: also where the address is the same. */
const begin = (way) => (asked().way === way && !asked().query.account ? sync() : go(`#/accounts/add/${way}`));
function opened(wanted) {
  const ways = ['browser', 'device', !wanted && 'import'].filter(Boolean).map((one) => [one, t(`add.${one}`)]);
  const tabs = ui.segmented(t('add.way'), ways, '', (one) => go(hash('accounts', ['add', one], asked().query)));
  const title = wanted ? t('add.again', { name: nameOf(wanted) }) : t('acc.add'), place = h('div');
  const onclose = () => {
    const { query } = asked();
    turn(); box = null;
    if (query) go(hash('accounts', [], { ...query, account: null }));
  };
  return { ...ui.dialog({ title, wide: true, body: [tabs, place], onclose }), place, tabs };
}
/** For the start of the console: the dialog at its address, and files dropped anywhere. */
export function install() {
  const zone = h('div', { class: 'dropzone', popover: 'manual' });
  const takes = ({ dataTransfer: it, target }) => it?.types.includes('Files') && !target.closest?.('[data-drop]')
    && ![...it.items].some((one) => one.type.startsWith('image/'));
  const over = () => {
    fill(zone, icon('upload'), h('strong', null, t('acc.drop')), h('p', null, t('acc.dropNote')));
    zone.togglePopover(true);
  };
  const drop = ({ dataTransfer }) => { dropped = [...dataTransfer.files]; begin('import'); };
  const taken = (run) => (event) => { if (takes(event)) { event.preventDefault(); run(event); } };
  document.body.append(zone);
  addEventListener('hashchange', sync);
  addEventListener('dragover', taken(over));
  addEventListener('dragleave', ({ relatedTarget }) => relatedTarget || zone.hidePopover());
  addEventListener('drop', () => zone.hidePopover());
  addEventListener('drop', taken(drop));
  sync();
}
