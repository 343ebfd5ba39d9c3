// The pool of accounts: filters, cards or table, selection with its bulk bar, and the sheet of one account.
import { download, get, send } from '../api.js';
import { sparkline } from '../charts.js';
import { useInCodex } from '../codex_panel.js';
import { fill, h, icon, keyed, text } from '../dom.js';
import { num, timeEl } from '../format.js';
import { plural, pref, setPref, t } from '../i18n.js';
import { activate } from '../palette.js';
import { current, go, hash, setQuery } from '../router.js';
import { accountOf, canDo, nameOf, statusCounts, store } from '../store.js';
import * as ui from '../ui.js';

const TABLE_ABOVE = 24; // accounts; above it the table is the default
const CHUNK = 40; // rows; more follow as the person scrolls, so that 300 accounts never hold up a key press
const TYPED_ABOVE = 10; // a larger removal asks for its number
const DAY_MIN = 1440; // minutes; the windows above it are the weekly ones
const REJECTED = ['login_rejected', 'auth_error', 'expired'];
const STATUSES = ['action', 'ready', 'low', 'empty', 'unknown', ...REJECTED, 'excluded'];
const COLUMNS = ['name', 'state', 'short', 'long', 'reset', 'role', 'used'];
const selected = new Set(); // ids; outlives a change of language
const dismissed = new Set(); // ids of ended jobs

// -- What is shown: pure

const windows = (one) => one.quota?.windows ?? [];
const leftOf = (one) => Math.min(...windows(one).map((it) => it.remainingPercent)); // Infinity: unknown
const resetOf = (one) => Math.min(...windows(one).map((it) => it.resetsAt || Infinity));
const SORTS = {
  reset: resetOf, least: leftOf, most: (one) => (leftOf(one) === Infinity ? 1 : -leftOf(one)),
  name: (one) => nameOf(one).toLowerCase(), plan: (one) => one.plan, used: (one) => -(one.lastUsedAt ?? 0),
};

/** The accounts that the query asks for, in its order; the status `action` is any that needs the person. */
function matching(accounts, { status, plan, q = '', sort }) {
  const wanted = q.trim().toLowerCase(), states = status === 'action' ? REJECTED : [status];
  const key = SORTS[sort] ?? SORTS.reset, order = (a, b) => (a < b ? -1 : Number(a > b));
  const names = (one) => [one.email, one.label, one.id, one.accountId];
  return accounts.filter((one) => (!status || states.includes(one.status)) && (!plan || one.plan === plan)
      && (!wanted || names(one).some((it) => it?.toLowerCase().includes(wanted))))
    .map((one) => ({ one, key: key(one), name: SORTS.name(one) }))
    .sort((a, b) => order(a.key, b.key) || order(a.name, b.name)).map((it) => it.one);
}

// -- What is done

const where = (one, tail = '') => `/accounts/${encodeURIComponent(one.id)}${tail}`;
const idsOf = (chosen) => chosen.map((one) => one.id);
const paragraph = (words) => words && h('p', null, words);
const warning = (words) => words && h('p', { class: 'notice warn' }, icon('warn'), h('span', null, words));
const done = (words, undo) => ui.toast(words, { action: undo && { label: t('act.undo'), run: undo } });
const saved = (one) => store.set('accounts', store.get('accounts').map((it) => (it.id === one.id ? one : it)));
const again = (one) => hash('accounts', ['add', 'browser'], { account: one.id });
/** Names that stay few: the first five, and how many more. */
const named = (chosen) => h('ul', null, chosen.slice(0, 5).map((one) => h('li', null, nameOf(one))),
  chosen.length > 5 && h('li', null, plural('acc.andMore', chosen.length - 5)));

const refreshOne = async (one) => saved(await send('POST', where(one, '/refresh-quota')));

async function refreshMany(ids) {
  try {
    const { job } = await send('POST', '/accounts/refresh-quotas', ids ? { ids } : {}), jobs = store.get('jobs');
    if (!jobs.some((it) => it.id === job.id)) store.set('jobs', [...jobs, job]);
  } catch (error) {
    if (error.code !== 'already_running') throw error; // its progress is on the page
  }
}

async function exclude(chosen, excluded) {
  const changed = chosen.filter((one) => accountOf(one.id).excluded !== excluded);
  for (const one of changed) saved(await send('PATCH', where(one), { excluded }));
  const back = changed.length > 0 && (() => exclude(changed, !excluded));
  done(plural(excluded ? 'acc.excluded' : 'acc.included', changed.length), back);
}

async function remove(chosen) {
  const ids = idsOf(chosen), next = store.get('routing').queue?.find((it) => !ids.includes(it.id));
  const heir = chosen.some((one) => one.active)
    && t(next ? 'acc.remove.next' : 'acc.remove.noNext', { name: nameOf(accountOf(next?.id)) });
  const title = ids[1] ? plural('acc.remove.many', ids.length) : t('acc.remove.title', { name: nameOf(chosen[0]) });
  const body = [ids[1] && named(chosen), paragraph(t('acc.remove.body')), paragraph(heir)];
  const typed = ids.length > TYPED_ABOVE ? String(ids.length) : undefined;
  if (!(await ui.confirm({ title, body, action: t('act.remove'), danger: true, typed }))) return;
  const { removed, undo } = await send('POST', '/accounts/remove', { ids });
  done(plural('acc.removed', removed), () => restore(undo));
}

async function restore({ token }) {
  const { restored } = await send('POST', '/accounts/restore', { token });
  store.set('removed', store.get('removed').filter((one) => one.token !== token));
  done(plural('acc.restored', restored));
}

/** The one answer with tokens in it goes from the gateway into a file, never into the page. */
function exportThem(chosen) {
  let format = 'json';
  const save = async () => {
    await download('/accounts/export', { ids: idsOf(chosen), format });
    box.close();
    done(t('exp.done'));
  };
  const kinds = ui.segmented(t('exp.format'), [['json', 'JSON'], ['zip', 'ZIP']], format, (one) => { format = one; });
  const how = { icon: 'download', kind: 'primary', on: save, disabled: !canDo('export') };
  const box = ui.dialog({
    title: plural('exp.title', chosen.length), body: [warning(t('exp.warn')), named(chosen), kinds],
    footer: [ui.button(t('act.cancel'), { on: () => box.close() }), ui.button(t('exp.download'), how)],
  });
}

const actions = (one) => [
  { label: t('acc.open'), icon: 'right', run: () => go(hash('accounts', [one.id], current().query)) },
  { label: t('acc.useApi'), icon: 'switch', run: () => activate(one) },
  { label: t('acc.useCodex'), icon: 'switch', run: () => useInCodex(one) },
  { label: t('act.refresh'), icon: 'refresh', run: () => refreshOne(one) },
  { label: t('login.again'), icon: 'key', run: () => go(again(one)) },
  { label: t('acc.export'), icon: 'download', run: () => exportThem([one]) },
  { label: t(one.excluded ? 'acc.include' : 'acc.exclude'), icon: 'pause', run: () => exclude([one], !one.excluded) },
  { label: t('acc.remove'), icon: 'trash', danger: true, run: () => remove([one]) },
];

// -- One account: the same pieces in a row (which the style sheet may show as a card) and in the sheet

/** The live parts of one account. `patch(one)` changes what differs and never makes a control anew. */
function pieces(pick) {
  let one = null;
  const serves = () => store.get('routing').activeId === one.id;
  const applied = () => store.get('codex').authAccountId === one.id;
  const role = (isOn, work) => ui.button(' ', { kind: 'small', on: () => (isOn() ? null : work(one)) });
  const at = {
    box: h('input', { type: 'checkbox', on: { click: (event) => pick?.(one, event.shiftKey) } }),
    name: h('a', { class: 'name' }), login: ui.button(t('login.again'), { kind: 'small', href: '#' }),
    api: role(serves, activate), codex: role(applied, useInCodex),
    refresh: ui.iconButton('refresh', '', () => refreshOne(one)),
    menu: ui.iconButton('more', '', (event) => { ui.menu(event.currentTarget, actions(one)); }),
  };
  for (const name of ['state', 'short', 'long', 'extra', 'reset', 'used', 'seen']) at[name] = h('div', { class: name });
  const bars = (host, list) => {
    const how = { trusted: one.quota?.trusted !== false && !REJECTED.includes(one.status), at: one.quota?.capturedAt };
    keyed(host, list, (it) => it.key, (it) => ui.meter(it, how), (el, it) => el.patch(it, how));
  };
  const time = (host, ms, how = 'ago') => fill(host, ms > 0 && ms < Infinity ? timeEl(ms, how) : '–');
  const show = () => {
    const all = windows(one), name = nameOf(one), count = one.exports?.count, more = one.quota?.extra ?? [];
    text(at.name, name);
    at.name.title = name;
    for (const part of ['box', 'refresh', 'menu']) {
      at[part].title = t(`acc.${part}Of`, { name });
      at[part].setAttribute('aria-label', at[part].title);
    }
    [at.name.href, at.login.href] = [hash('accounts', [one.id]), again(one)];
    at.api.hidden = at.codex.hidden = REJECTED.includes(one.status);
    at.login.hidden = !at.api.hidden;
    at.codex.disabled = !canDo('codex');
    fill(at.state, ui.tag(one.plan), ui.pill(one),
      count > 0 && h('span', { class: 'note', title: plural('acc.exported', count) }, icon('download'), num(count)));
    bars(at.short, all.length ? all.filter((it) => it.minutes <= DAY_MIN) : [{ key: 'primary', minutes: 300 }]);
    bars(at.long, all.filter((it) => it.minutes > DAY_MIN));
    fill(at.extra, more.length > 0 && ui.details(plural('quota.more', more.length), more.map((it) => ui.meter(it))));
    time(at.reset, resetOf(one), 'until');
    time(at.used, one.lastUsedAt);
    time(at.seen, one.quota?.capturedAt);
  };
  const setRole = (button, isOn, label) => {
    button.setAttribute('aria-pressed', String(isOn));
    button.setAttribute('aria-label', `${label}: ${nameOf(one)}`);
    if (button.textContent !== label) fill(button, isOn && icon('check'), h('span', { class: 'label' }, label));
  };
  at.patch = (given) => {
    if (one !== given) show(one = given);
    setRole(at.api, serves(), t(serves() ? 'acc.servingApi' : 'acc.useApi'));
    setRole(at.codex, applied(), t(applied() ? 'acc.inCodex' : 'acc.useCodex'));
  };
  return at;
}

const roles = (at) => h('div', { class: 'row' }, at.login, at.api, at.codex);
const row = (at) => h('tr', null, [at.box, at.name, at.state, at.short, [at.long, at.extra], at.reset, roles(at),
  [at.used, at.seen], [at.refresh, at.menu]]
  .map((part, index) => h('td', { class: `c-${['box', ...COLUMNS, 'tools'][index]}` }, part)));

// -- The sheet of one account

/** What only the account's own answer holds: its history, its requests, its exports. */
function past(one) {
  const left = (one.history ?? []).map((it) => it.secondary ?? it.primary), { exports, requests = [] } = one;
  const rows = requests.map((it) => h('li', null, h('a', { href: hash('log', [it.id]) }, timeEl(it.at, 'when')),
    ` ${it.status ?? ''} ${it.model ?? ''} `, h('span', { class: 'note' }, it.client)));
  const told = exports?.count ? [plural('acc.exported', exports.count), ' · ', timeEl(exports.lastAt, 'when')] : '–';
  const head = () => h('h3', null, t('acc.history', { name: ui.windowName(windows(one).at(-1) ?? {}) }));
  return [left.length > 1 && [head(), sparkline(left, t('acc.historySays', { n: num(left.at(-1)) }))],
    ui.details(plural('acc.requests', rows.length), rows[0] ? h('ul', null, rows) : t('acc.noRequests')),
    ui.details(t('acc.exports'), told)];
}

/** What a person may set; each field is sent as soon as it is left. */
function controls(one, change) {
  const input = (name, props, read) => h('input', { ...props, value: one[name],
    on: { change: ({ target }) => change({ [name]: read(target.value) }) } });
  const priority = input('priority', { type: 'number', min: 0, max: 1000 }, Number);
  return [ui.field(t('acc.label'), input('label', { type: 'text', maxlength: 64 }, String)),
    ui.field(t('acc.priority'), priority, { help: t('acc.priorityHelp') }),
    ui.toggle(t('acc.rotation'), !one.excluded, (isOn) => exclude([one], !isOn), t('acc.rotationHelp'))];
}

function identity(one) {
  const copied = ui.copyButton(one.accountId, '', { kind: 'ghost square', 'aria-label': t('act.copy') });
  const when = (ms) => ms > 0 && timeEl(ms, 'when');
  const facts = { email: nameOf({ ...one, label: '' }), id: one.accountId && [h('code', null, one.accountId), copied],
    renews: when(one.tokenExpiresAt), added: when(one.createdAt),
    can: t(one.images?.ok ? 'acc.canImages' : 'acc.canText', { n: num(store.get('models').count) }) };
  return ui.details(t('acc.identity'), h('dl', { class: 'facts' }, Object.entries(facts).map(([name, value]) => value
    && [h('dt', null, t(`acc.${name}`)), h('dd', null, value)])));
}

/** `gone` runs when the sheet is closed. */
function openSheet(id, gone) {
  let one = accountOf(id);
  if (!one) return ui.dialog({ title: id, body: ui.empty('accounts', t('acc.notFound')), sheet: true, onclose: gone });
  const at = pieces(), own = h('div', { class: 'grid' }), more = h('div', { class: 'stack' }, ui.skeleton());
  const change = async (values, isUndo) => {
    const [[name, before]] = Object.keys(values).map((key) => [key, one[key]]);
    saved(await send('PATCH', where(one), values));
    if (!isUndo) done(t('acc.saved'), () => change({ [name]: before }, true));
  };
  const show = () => {
    if (!(one = accountOf(id))) return box.close();
    at.patch(one);
    const isEdited = own.contains(document.activeElement);
    return isEdited || fill(own, controls(one, (values) => change(values).catch(ui.fail)));
  };
  const load = () => get(where(one)).then((all) => fill(more, identity(all), past(all)),
    (error) => fill(more, ui.errorPanel(error, load)));
  const off = ['accounts', 'codex', 'routing'].map((slice) => store.on(slice, show));
  const box = ui.dialog({ title: nameOf(one), sheet: true, onclose: () => { off.forEach((stop) => stop()); gone(); },
    body: [h('div', { class: 'row' }, at.state, at.seen, at.refresh), roles(at), at.short, at.long, at.extra,
      own, more],
    footer: [ui.button(t('acc.remove'), { kind: 'danger', on: () => remove([one]) }),
      ui.button(t('acc.export'), { icon: 'download', on: () => exportThem([one]) })] });
  show();
  load();
  return box;
}

// -- The page

const RUNNING = ['queued', 'running'];
const isOver = (job) => job.failures?.length > 0 && !dismissed.has(job.id) && !RUNNING.includes(job.state);

/** A job that ended with failures says which and why, and tries those again. Running ones stand above the page. */
function jobView({ id, failures }) {
  const close = () => { dismissed.add(id); store.set('jobs', store.get('jobs')); };
  const retry = () => { close(); return refreshMany(failures.map((it) => it.id)); };
  const lines = failures.map((it) => h('li', null, `${nameOf(accountOf(it.id)) || it.id}: `, ui.wording(it)));
  const told = h('div', null, plural('acc.failed', lines.length), h('ul', null, lines));
  return h('div', { class: 'notice warn' }, icon('warn'), told, ui.button(t('acc.retryFailed'), { on: retry }),
    ui.iconButton('close', t('act.close'), close));
}

function mount(root) {
  let limit = CHUNK, shown = [], anchor = -1, sheet = null;
  const made = new Map(); // id -> its pieces and their row, also while it is filtered out
  const chosen = () => store.get('accounts').filter((one) => selected.has(one.id));
  const ask = (changes) => { limit = CHUNK; setQuery(changes); };
  const clear = () => { selected.clear(); draw(); };
  const every = () => { shown.forEach((one) => selected.add(one.id)); draw(); };
  const search = h('input', { type: 'search', placeholder: t('acc.search'), 'aria-label': t('acc.search'),
    on: { input: () => ask({ q: search.value }) } });
  const chips = ui.chips(t('acc.status'), [], '', (status) => ask({ status }));
  const views = ['cards', 'table'].map((one) => [one, t(`acc.${one}`)]);
  const view = ui.segmented(t('acc.view'), views, '', (one) => { setPref('accounts.view', one); draw(); });
  const [jobs, none, gone, selects] = ['stack', 'none', 'stack', 'row'].map((name) => h('div', { class: name }));
  const items = h('tbody'), count = h('strong'), more = ui.button(' ', { kind: 'ghost', on: every });
  const all = h('input', { type: 'checkbox', 'aria-label': t('acc.selectAll'),
    on: { click: () => (all.checked ? every() : clear()) } });
  const heads = COLUMNS.map((name) => h('th', { scope: 'col', class: `c-${name}` }, t(`acc.col.${name}`)));
  const top = h('thead', null, h('tr', null, h('td', { class: 'c-box' }, all), heads, h('td')));
  const table = h('table', null, top, items);
  const tool = (words, shape, work) => ui.button(t(words), { icon: shape, on: () => work(chosen()) });
  const bulk = h('div', { class: 'bulk', role: 'toolbar', 'aria-label': t('acc.bulk') }, count,
    tool('act.refresh', 'refresh', (some) => refreshMany(idsOf(some))), tool('acc.export', 'download', exportThem),
    tool('acc.out', 'pause', (some) => exclude(some, true)), tool('acc.in', 'play', (some) => exclude(some, false)),
    tool('acc.remove', 'trash', remove), more, ui.button(t('acc.clear'), { kind: 'ghost', on: clear }));
  const iconic = (key, props) => ui.button(t(key), { 'aria-label': t(key), ...props }); // a phone shows the icon alone
  const primary = [iconic('acc.refreshAll', { icon: 'refresh', on: () => refreshMany() }),
    iconic('acc.add', { icon: 'plus', kind: 'primary', href: '#/accounts/add' })];
  const drop = h('div', { class: 'drop' }, icon('upload'), h('p', null, t('acc.drop')),
    h('p', { class: 'note' }, t('acc.dropNote')), ui.button(t('acc.importFiles'), { href: '#/accounts/add/import' }));

  const grow = ([it]) => { if (it.isIntersecting) { limit += CHUNK; draw(); } };
  const below = new IntersectionObserver(grow, { rootMargin: '800px' });

  function pick(one, isRange) {
    const at = shown.findIndex((it) => it.id === one.id), isOn = !selected.has(one.id);
    const ends = [at, isRange && anchor >= 0 ? anchor : at].sort((a, b) => a - b);
    for (const it of shown.slice(ends[0], ends[1] + 1)) selected[isOn ? 'add' : 'delete'](it.id);
    anchor = at;
    draw();
  }

  function patch(el, one) {
    const { at } = made.get(one.id);
    at.patch(one);
    at.box.checked = selected.has(one.id);
    el.classList.toggle('active', one.active);
    el.classList.toggle('selected', at.box.checked);
    return el;
  }

  function make(one) {
    const at = made.get(one.id)?.at ?? pieces(pick), el = made.get(one.id)?.el ?? row(at);
    made.set(el.dataset.id = one.id, { at, el });
    return patch(el, one);
  }

  function drawChoices(accounts, { status = '', plan = '', sort = 'reset' }) {
    const counts = statusCounts(), plans = [...new Set(accounts.map((one) => one.plan))].sort();
    const states = STATUSES.filter((one) => counts[one] || one === status);
    const chip = (one) => [one, t(`acc.st.${one}`), counts[one]];
    chips.patch([['', t('acc.all'), counts.all], ...states.map(chip)], status);
    if (selects.contains(document.activeElement)) return;
    const choice = (name, options, value) => ui.select(t(`acc.${name}`), options, value, (one) => ask({ [name]: one }));
    const option = (one) => [one, ui.tag(one)?.textContent];
    fill(selects, plans[1] && choice('plan', [['', t('acc.anyPlan')], ...plans.map(option)], plan),
      choice('sort', Object.keys(SORTS).map((one) => [one, t(`acc.sort.${one}`)]), sort));
  }

  function drawBulk() {
    const n = selected.size, isAll = shown.every((one) => selected.has(one.id));
    bulk.hidden = !n;
    text(count, plural('acc.selected', n));
    text(more.firstChild, plural('acc.selectMatching', shown.length));
    more.hidden = isAll;
    [all.checked, all.indeterminate] = [n > 0 && isAll, n > 0 && !isAll];
  }

  function draw() {
    const { query } = current(), accounts = store.get('accounts');
    const mode = pref('accounts.view') ?? (accounts.length > TABLE_ABOVE ? 'table' : 'cards');
    shown = matching(accounts, query);
    for (const id of selected) if (!accountOf(id)) selected.delete(id);
    drawChoices(accounts, query);
    if (search !== document.activeElement) search.value = query.q ?? '';
    view.set(mode);
    table.className = `accounts as-${mode}`;
    table.hidden = !shown[0];
    keyed(items, shown.slice(0, limit), (one) => one.id, make, patch);
    below.disconnect();
    if (shown.length > limit) below.observe(drop);
    const anyway = accounts[0] ? ['search', t('ui.nothing'), ui.button(t('act.clearFilters'), { href: '#/accounts' })]
      : ['accounts', t('acc.none'), ui.button(t('acc.add'), { kind: 'primary', href: '#/accounts/add' })];
    fill(none, !shown[0] && ui.empty(...anyway));
    drawBulk();
  }

  const drawJobs = () => keyed(jobs, store.get('jobs').filter(isOver), (job) => job.id, jobView);
  const drawGone = () => fill(gone, store.get('removed').map((one) => h('p', { class: 'notice' }, icon('trash'),
    h('span', null, plural('acc.gone', one.count ?? 1, { name: one.label ?? '' }), ' ', timeEl(one.expiresAt, 'until')),
    ui.button(t('act.undo'), { icon: 'undo', on: () => restore(one) }))));
  const find = h('div', { class: 'search' }, icon('search'), search);
  const tools = h('div', { class: 'toolbar' }, find, chips, selects, view);
  fill(root, h('div', { class: 'stack' }, tools, jobs, table, none, gone, drop, bulk));
  const off = ['accounts', 'codex', 'routing'].map((slice) => store.on(slice, draw));
  off.push(store.on('jobs', drawJobs), store.on('removed', drawGone));
  drawJobs();
  drawGone();
  return {
    primary, search, refresh: () => refreshMany().catch(ui.fail),
    rows: {
      list: () => [...items.children], open: (el) => made.get(el.dataset.id).at.name.click(),
      select: (el) => made.get(el.dataset.id).at.box.click(), menu: (el) => made.get(el.dataset.id).at.menu.click(),
    },
    update({ parts: [id] }) {
      draw();
      const wanted = id === 'add' ? undefined : id;
      if (sheet?.id === wanted) return;
      sheet?.box.close();
      const leave = () => { if (sheet?.id === id) go(hash('accounts', [], current().query)); };
      sheet = wanted && { id, box: openSheet(id, leave) };
    },
    unmount() {
      off.forEach((stop) => stop());
      below.disconnect();
      sheet = sheet?.box.close();
    },
  };
}

export const page = { title: 'nav.accounts', mount };
