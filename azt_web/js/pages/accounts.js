// The pool of accounts: filters, cards or table, selection with its bulk bar, and the sheet of one account.
import { download, get, send } from '../api.js';
import { sparkline } from '../charts.js';
import { useInCodex } from '../codex_panel.js';
import { fill, h, icon, keyed, text } from '../dom.js';
import { num, timeEl } from '../format.js';
import { plural, pref, setPref, t } from '../i18n.js';
import { activate } from '../palette.js';
import { current, go, hash, setQuery } from '../router.js';
import { accountOf, isLocal, nameOf, on, reducers, statusCounts, store } from '../store.js';
import * as ui from '../ui.js';

const TABLE_ABOVE = 24, TYPED_ABOVE = 10; // accounts: the table is the default, a removal asks for its number
const CHUNK = 40, DAY_MIN = 1440; // rows at first, more follow as one scrolls; minutes, above it a window is weekly
const STATUSES = ['action', 'ready', 'low', 'empty', 'unknown', 'login_rejected', 'auth_error', 'expired', 'excluded'];
const COLUMNS = ['name', 'state', 'short', 'long', 'reset', 'role', 'used'];
const SORTS = { reset: ui.resetOf, most: (one) => (ui.windows(one).length ? -ui.leftOf(one) : 1), least: ui.leftOf,
  name: (one) => nameOf(one).toLowerCase(), plan: (one) => one.plan, used: (one) => -(one.lastUsedAt ?? 0) };
const selected = new Set(); // ids; outlives a change of language

/** The accounts that the query asks for, in its order; the status `action` is any that needs the person. */
function matching({ status, plan, q = '', sort }) {
  const wanted = q.trim().toLowerCase(), key = SORTS[sort] ?? SORTS.reset, order = (x, y) => (x < y ? -1 : x > y);
  const has = (one) => [one.email, one.label, one.id, one.accountId].some((it) => it?.toLowerCase().includes(wanted));
  const is = (one) => !status || (status === 'action' ? ui.isRejected(one) : one.status === status);
  return store.get('accounts').filter((one) => is(one) && (!plan || one.plan === plan) && has(one))
    .sort((a, b) => order(key(a), key(b)) || order(SORTS.name(a), SORTS.name(b)));
}

// -- What is done
const where = (one) => `/accounts/${one.id}`, idsOf = (some) => some.map((one) => one.id);
const done = (words, undo) => ui.toast(words, { action: undo && { label: t('act.undo'), run: undo } });
const again = (one) => hash('accounts', ['add', 'browser'], { account: one.id });
/** Names that stay few: the first five, and how many more. */
const named = (some) => ui.bullets([...some.slice(0, 5).map(nameOf),
  some.length > 5 && plural('acc.andMore', some.length - 5)].filter(Boolean));
const refreshOne = async (one) => reducers.account(await send('POST', `${where(one)}/refresh-quota`));
/** Its progress is on the page, also of one that runs already. */
const refreshMany = (ids) => send('POST', '/accounts/refresh-quotas', { ids }).then(({ job }) => reducers.job(job),
  (error) => error.code === 'already_running' || ui.fail(error));
async function exclude(some, excluded) {
  const changed = some.filter((one) => accountOf(one.id).excluded !== excluded);
  for (const one of changed) reducers.account(await send('PATCH', where(one), { excluded }));
  const words = plural(excluded ? 'acc.excluded' : 'acc.included', changed.length);
  if (changed[0]) done(words, () => exclude(changed, !excluded));
}
async function remove(some) {
  const ids = idsOf(some), next = store.get('routing').queue.find((it) => !ids.includes(it.id));
  const heir = t(next ? 'acc.remove.next' : 'acc.remove.noNext', { name: nameOf(accountOf(next?.id)) });
  const title = ids[1] ? plural('acc.remove.many', ids.length) : t('acc.remove.title', { name: nameOf(some[0]) });
  const body = [ids[1] && named(some), h('p', null, t('acc.remove.body')), some.some((one) => one.active) && heir];
  const sure = { title, body, action: t('act.remove'), typed: ids.length > TYPED_ABOVE && String(ids.length) };
  if (!(await ui.confirm({ ...sure, danger: true }))) return;
  const { removed, undo } = await send('POST', '/accounts/remove', { ids });
  reducers['account.removed']({ ids, undo }); // its event may know no undo yet
  done(plural('acc.removed', removed), () => restore(undo));
}
async function restore({ token }) {
  const { restored, accounts } = await send('POST', '/accounts/restore', { token });
  store.set('removed', store.get('removed').filter((one) => one.token !== token));
  accounts.forEach(reducers.account); done(plural('acc.restored', restored));
}
/** The one answer with tokens in it goes from the gateway into a file, never into the page. */
async function exportThem(some) {
  let format = 'json';
  const kinds = ui.segmented(t('exp.format'), [['json', 'JSON'], ['zip', 'ZIP']], format, (one) => { format = one; });
  const title = plural('exp.title', some.length), body = [ui.warning(t('exp.warn')), named(some), kinds];
  if (!(await ui.confirm({ title, body, action: t('exp.download') }))) return;
  await download('/accounts/export', { ids: idsOf(some), format }).then(() => done(t('exp.done')));
}
/** What the bulk bar does with all that are selected, and a menu with one: [sentence, icon, run]. */
const MANY = [['act.refresh', 'refresh', (some) => (some[1] ? refreshMany(idsOf(some)) : refreshOne(some[0]))],
  ['acc.export', 'download', exportThem], ['acc.out', 'pause', (some) => exclude(some, true)],
  ['acc.in', 'play', (some) => exclude(some, false)], ['acc.remove', 'trash', remove]];
const actions = (one) => [['acc.open', 'right', () => go(hash('accounts', [one.id], current().query))],
  ['acc.useApi', 'switch', () => activate(one)], ['acc.useCodex', 'switch', () => useInCodex(one)],
  ['login.again', 'key', () => go(again(one))],
  ...MANY.filter(([key]) => key !== (one.excluded ? 'acc.out' : 'acc.in')),
].map(([key, shape, run]) => ({ label: t(key), icon: shape, run: () => run([one]), danger: shape === 'trash' }));

// -- One account: the same pieces in a row (which the style sheet may show as a card) and in the sheet
/** The live parts of one account. `patch(one)` changes what differs and never makes a control anew. */
function pieces(pick) {
  let one = null;
  const small = (on) => ui.button(' ', { kind: 'small', on }), has = (name) => [name, h('div', { class: name })];
  const at = { ...Object.fromEntries(['state', 'short', 'long', 'reset', 'used', 'seen'].map(has)),
    box: h('input', { type: 'checkbox', on: { click: (event) => pick(one, event.shiftKey) } }),
    name: h('a', { class: 'name' }), login: ui.button(t('login.again'), { kind: 'small', href: '#' }),
    api: small(() => activate(one)), codex: small(() => useInCodex(one)), extra: ui.moreMeters(),
    refresh: ui.iconButton('refresh', '', () => refreshOne(one)),
    menu: ui.iconButton('more', '', () => ui.menu(at.menu, actions(one))) };
  const show = () => {
    const all = ui.windows(one), name = nameOf(one), count = one.exports?.count, lost = ui.isRejected(one);
    const [long, short] = [true, false].map((is) => all.filter((it) => (it.minutes > DAY_MIN) === is));
    for (const part of ['box', 'refresh', 'menu']) at[part].title = at[part].ariaLabel = t(`acc.${part}Of`, { name });
    [at.name.title, at.name.href, at.login.href] = [name, hash('accounts', [one.id]), again(one)];
    [at.login.hidden, at.api.hidden, at.codex.hidden, at.codex.disabled] = [!lost, lost, lost, !isLocal()];
    fill(at.state, ui.tag(one.plan), ui.pill(one),
      count > 0 && h('span', { class: 'note', title: plural('acc.exported', count) }, icon('download'), num(count)));
    ui.meters(at.short, all.length ? short : [{ key: 'primary', minutes: 300 }], one);
    ui.meters(at.long, long, one); at.extra.patch(one.quota?.extra ?? [], one);
    text(at.name, name); fill(at.reset, timeEl(ui.resetOf(one), 'until'));
    fill(at.used, timeEl(one.lastUsedAt)); fill(at.seen, timeEl(one.quota?.capturedAt));
  };
  const role = (button, isOn, label) => {
    [button.ariaPressed, button.ariaLabel] = [String(isOn), `${label}: ${nameOf(one)}`];
    if (button.textContent !== label) fill(button, isOn && icon('check'), h('span', { class: 'label' }, label));
  };
  at.patch = (given) => {
    if (one !== given) show(one = given);
    const serves = store.get('routing').activeId === one.id, applied = store.get('codex').authAccountId === one.id;
    role(at.api, serves, t(serves ? 'acc.servingApi' : 'acc.useApi'));
    role(at.codex, applied, t(applied ? 'acc.inCodex' : 'acc.useCodex'));
  };
  return Object.assign(at, { roles: ui.row(at.login, at.api, at.codex) });
}
/** A row that knows its pieces. */
const row = (at) => Object.assign(h('tr', null, [at.box, at.name, at.state, at.short, [at.long, at.extra], at.reset,
  at.roles, [at.used, at.seen], [at.refresh, at.menu]]
  .map((part, index) => h('td', { class: `c-${['box', ...COLUMNS, 'tools'][index]}` }, part))), { at });

// -- The sheet of one account
/** What only the account's own answer holds: who it is, its history, its requests, its exports. */
function details(one) {
  const { history = [], exports, requests, accountId } = one, when = (ms) => timeEl(ms, 'when');
  const copied = ui.copyButton(accountId, '', { kind: 'ghost square', 'aria-label': t('act.copy') });
  const left = history.map((it) => it.secondary ?? it.primary), window = ui.windowName(ui.windows(one).at(-1) ?? {});
  const rows = requests.map((it) => [h('a', { href: hash('log', [it.id]) }, when(it.at)),
    ` ${it.status ?? ''} ${it.model ?? ''} `, h('span', { class: 'note' }, it.client)]);
  const known = { email: nameOf({ ...one, label: '' }), id: [h('code', null, accountId), copied],
    renews: when(one.tokenExpiresAt), added: when(one.createdAt),
    can: t(one.images.ok ? 'acc.canImages' : 'acc.canText', { n: num(store.get('models').count) }) };
  const identity = Object.entries(known).map(([key, value]) => [t(`acc.${key}`), value]);
  return [ui.details(t('acc.identity'), ui.facts(identity)), left.length > 1 && [h('h3', null, t('acc.history',
    { name: window })), sparkline(left, t('acc.historySays', { n: num(left.at(-1)) }))],
  ui.details(plural('acc.requests', rows.length), rows.length ? ui.bullets(rows) : t('acc.noRequests')),
  ui.details(t('acc.exports'), exports && [plural('acc.exported', exports.count), ' · ', when(exports.lastAt)])];
}
/** What a person may set; each field is sent as soon as it is left. */
function controls(one) {
  const change = (values, undo) => send('PATCH', where(one), values).then(reducers.account)
    .then(() => undo && done(t('acc.saved'), () => change(undo)));
  const input = (name, props, read = String) => h('input', { ...props, value: one[name], on: { change: ({ target }) => (
    change({ [name]: read(target.value) }, { [name]: accountOf(one.id)[name] ?? null }).catch(ui.fail)) } });
  const number = input('priority', { type: 'number', min: 0 }, Number);
  return [ui.field(t('acc.label'), input('label', { type: 'text', maxlength: 64 })),
    ui.field(t('acc.priority'), number, { help: t('acc.priorityHelp') }),
    ui.toggle(t('acc.rotation'), !one.excluded, (isOn) => exclude([one], !isOn), t('acc.rotationHelp'))];
}
function openSheet(id) {
  const gone = () => current().parts[0] === id && go(hash('accounts', [], current().query));
  let one = accountOf(id);
  if (!one) return ui.dialog({ title: id, body: ui.empty('accounts', t('acc.notFound')), sheet: true, onclose: gone });
  const at = pieces(), own = h('div', { class: 'grid' }), more = h('div', { class: 'stack' });
  const show = () => {
    if (!(one = accountOf(id))) return box.close();
    at.patch(one);
    return own.contains(document.activeElement) || fill(own, controls(one));
  };
  const off = on(['accounts', 'codex', 'routing'], show);
  const box = ui.dialog({ title: nameOf(one), sheet: true, onclose: () => { off(); gone(); },
    body: [ui.row(at.state, at.seen, at.refresh), at.roles, at.short, at.long, at.extra, own, more],
    footer: [ui.button(t('acc.remove'), { kind: 'danger', on: () => remove([one]) }),
      ui.button(t('acc.export'), { icon: 'download', on: () => exportThem([one]) })] });
  show();
  ui.loader(more, () => get(where(one)), (all) => fill(more, details(all)));
  return box;
}

// -- The page
/** A job that ended with failures says which and why, and tries those again. Running ones stand above the page. */
const isOver = ({ state, failures }) => failures.length > 0 && !/queued|running/.test(state);
function jobView({ id, failures }) {
  const close = () => store.set('jobs', store.get('jobs').filter((job) => job.id !== id));
  const retry = () => { close(); return refreshMany(idsOf(failures)); };
  const lines = failures.map((it) => [`${nameOf(accountOf(it.id)) || it.id}: `, ui.wording(it)]);
  return ui.notice('warn', 'warn', h('div', null, plural('acc.failed', lines.length), ui.bullets(lines)),
    ui.button(t('acc.retryFailed'), { on: retry }), ui.iconButton('close', t('act.close'), close));
}
const goneView = ({ count = 1, label: name = '', expiresAt, token }) => ui.notice('', 'trash',
  h('p', null, plural('acc.gone', count, { name }), ' ', timeEl(expiresAt, 'until')),
  ui.button(t('act.undo'), { icon: 'undo', on: () => restore({ token }) }));

function mount(root) {
  let limit = CHUNK, shown = [], anchor = -1, sheet = null;
  const made = new Map(); // id -> its row, also while it is filtered out
  const ask = (changes) => { limit = CHUNK; setQuery(changes); };
  const choose = (some, how = 'add') => { for (const { id } of some) selected[how](id); draw(); };
  const search = h('input', { type: 'search', placeholder: t('acc.search'), 'aria-label': t('acc.search'),
    on: { input: () => ask({ q: search.value }) } }), find = h('div', { class: 'search' }, icon('search'), search);
  const chips = ui.chips(t('acc.status'), [], '', (status) => ask({ status }));
  const plans = ui.select(t('acc.plan'), [], '', (plan) => ask({ plan }));
  const sorts = ui.select(t('acc.sort'), Object.keys(SORTS).map((one) => [one, t(`acc.sort.${one}`)]), '',
    (sort) => ask({ sort }));
  const view = ui.segmented(t('acc.view'), ['cards', 'table'].map((one) => [one, t(`acc.${one}`)]), '',
    (one) => { setPref('accounts.view', one); draw(); });
  const [jobs, none, gone] = ['stack', 'none', 'stack'].map((name) => h('div', { class: name }));
  const items = h('tbody'), count = h('strong'), more = ui.button(' ', { kind: 'ghost', on: () => choose(shown) });
  const heads = COLUMNS.map((name) => h('th', { scope: 'col', class: `c-${name}` }, t(`acc.col.${name}`)));
  const table = h('table', null, h('thead', null, h('tr', null, h('td'), heads, h('td'))), items);
  const tools = MANY.map(([key, shape, run]) => ui.button(t(key), { icon: shape,
    on: () => run(store.get('accounts').filter((one) => selected.has(one.id))) }));
  const bulk = h('div', { class: 'bulk', role: 'toolbar', 'aria-label': t('acc.bulk') }, count, tools, more,
    ui.button(t('acc.clear'), { kind: 'ghost', on: () => choose(store.get('accounts'), 'delete') }));
  const iconic = (key, props) => ui.button(t(key), { 'aria-label': t(key), ...props }); // a phone shows the icon alone
  const primary = [iconic('acc.refreshAll', { icon: 'refresh', on: () => refreshMany() }),
    iconic('acc.add', { icon: 'plus', kind: 'primary', href: '#/accounts/add' })];
  const drop = h('div', { class: 'drop' }, icon('upload'), h('p', null, t('acc.drop')), ui.note(t('acc.dropNote')),
    ui.button(t('acc.importFiles'), { href: '#/accounts/add/import' }));
  const grow = ([{ isIntersecting }]) => { if (isIntersecting && shown.length > limit) { limit += CHUNK; draw(); } };
  const below = new IntersectionObserver(grow, { rootMargin: '800px' });
  function pick(one, isRange) {
    const at = shown.findIndex((it) => it.id === one.id), from = isRange && anchor >= 0 ? anchor : at;
    anchor = at;
    choose(shown.slice(Math.min(from, at), Math.max(from, at) + 1), selected.has(one.id) ? 'delete' : 'add');
  }
  const make = ({ id }) => made.get(id) ?? made.set(id, row(pieces(pick))).get(id);
  const patch = (el, one) => {
    el.at.patch(one); el.at.box.checked = selected.has(one.id);
    el.classList.toggle('active', one.active); el.classList.toggle('selected', el.at.box.checked);
  };
  function drawChoices(all, { status = '', plan = '', sort = 'reset', q = '' }) {
    const counts = statusCounts(), named = new Map(all.map((one) => [one.plan, ui.tag(one.plan)?.textContent]));
    const chip = (one) => [one, t(one ? `acc.st.${one}` : 'acc.all'), counts[one || 'all']];
    chips.patch(['', ...STATUSES.filter((one) => counts[one] || one === status)].map(chip), status);
    plans.set([['', t('acc.anyPlan')], ...[...named].sort()], plan);
    plans.hidden = named.size < 2; sorts.input.value = sort;
    if (search !== document.activeElement) search.value = q;
  }
  function draw() {
    const { query } = current(), all = store.get('accounts');
    const mode = pref('accounts.view') ?? (all.length > TABLE_ABOVE ? 'table' : 'cards');
    for (const id of selected) if (!accountOf(id)) selected.delete(id);
    shown = matching(query);
    drawChoices(all, query); view.set(mode);
    [table.className, table.hidden] = [`accounts as-${mode}`, !shown.length];
    keyed(items, shown.slice(0, limit), (one) => one.id, make, patch);
    below.unobserve(drop); below.observe(drop); // it is told anew where that stands
    const anyway = all.length ? ['search', t('ui.nothing'), ui.button(t('act.clearFilters'), { href: '#/accounts' })]
      : ['accounts', t('acc.none'), ui.button(t('acc.add'), { kind: 'primary', href: '#/accounts/add' })];
    fill(none, !shown.length && ui.empty(...anyway));
    text(count, plural('acc.selected', selected.size));
    text(more.firstChild, plural('acc.selectMatching', shown.length));
    [bulk.hidden, more.hidden] = [!selected.size, shown.every((one) => selected.has(one.id))];
  }
  const drawJobs = () => keyed(jobs, store.get('jobs').filter(isOver), (job) => job.id, jobView);
  const drawGone = () => fill(gone, ...new Map(store.get('removed').map((one) => [one.token, goneView(one)])).values());
  const off = [on(['accounts', 'codex', 'routing'], draw), on('jobs', drawJobs), on('removed', drawGone)];
  fill(root, h('div', { class: 'stack' }, h('div', { class: 'toolbar' }, find, chips, plans, sorts, view), jobs, table,
    none, gone, drop, bulk));
  drawJobs(); drawGone();
  const part = (name) => (el) => el.at[name].click();
  return { primary, search, refresh: () => refreshMany(),
    rows: { list: () => [...items.children], open: part('name'), select: part('box'), menu: part('menu') },
    update({ parts: [id] }) {
      draw();
      if (sheet?.id === id) return;
      sheet?.box.close();
      sheet = id && id !== 'add' ? { id, box: openSheet(id) } : null;
    },
    unmount() { off.forEach((stop) => stop()); below.disconnect(); sheet = sheet?.box.close(); } };
}
export const page = { title: 'nav.accounts', mount };
