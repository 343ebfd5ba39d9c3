// Is it working, who is serving, what needs me.
import { get as fetchJson, send } from '../api.js';
import { legend, sparkline, stacked } from '../charts.js';
import { fill, h, icon, keyed, text } from '../dom.js';
import { ago, at, clock, compact, duration, exact, now, num, percent, ticking, wait, zone } from '../format.js';
import { known, plural, pref, setPref, t } from '../i18n.js';
import { signIn, testCall } from '../login.js';
import { activate } from '../palette.js';
import { go, hash } from '../router.js';
import { CLIENTS, clientSeen, snippets } from '../snippets.js';
import { accountOf, get, nameOf, on, reducers } from '../store.js';
import { button, card, codeBlock, details, empty, figure, good, iconButton, isRejected, leftOf, loader, menu, meter,
  moreMeters, note, notice, pill, resetOf, row, segmented, tag, windows } from '../ui.js';

const HOUR = 3600000;
const RANGES = { '1h': [HOUR, 'minute'], '24h': [24 * HOUR, 'hour'], '7d': [168 * HOUR, 'hour'] };
const COLOURS = { ok: 'ok', failed: 'bad', cancelled: 'c5' }; // of the results of calls
const KINDS = { error: 'bad', warn: 'warn', info: 'info' }; // of notices, the most urgent first
const FEW_CLIENTS = ['python', 'js', 'curl', 'codex'];

const least = (account) => (windows(account).length ? t('quota.left', { p: leftOf(account) }) : t('quota.none'));
const why = (code) => t(known(`reason.${code}`) ? `reason.${code}` : 'reason.other');
const sum = (list) => list.reduce((all, n) => all + n, 0);
const nameLink = (account) => h('a', { href: hash('accounts', [account.id]), title: account.email }, nameOf(account));
const link = (href, key) => h('a', { href }, t(key));
let offs = [];
/** `el`, which `update()` draws now and whenever one of these slices changes. */
function live(slices, el, update) {
  offs.push(on(slices, update));
  update();
  return el;
}

// -- now serving

function hero() {
  const title = h('h2', { class: 'live' }), name = h('a'), state = row(), more = moreMeters(), auto = h('span');
  const line = h('ol', { class: 'queue' }), skipped = h('div', { class: 'skipped' });
  const choose = () => menu(change, get('accounts').map((one) => ({ icon: one.active ? 'check' : 'accounts',
    label: `${nameOf(one)} · ${least(one)}`, run: () => activate(one) })));
  const read = async () => reducers.account(await send('POST', `/accounts/${get('routing').activeId}/refresh-quota`));
  const change = button(t('hero.switch'), { icon: 'switch', on: choose }), fresh = iconButton('refresh', '', read);
  const who = h('div', null, title, h('p', { class: 'name' }, name), state, row(change, fresh), more);
  const next = h('div', null, h('div', { class: 'over' }, h('h2', null, t('hero.next')), note(auto)), line, skipped);
  const el = h('section', { class: 'card hero', 'aria-label': t('hero.now') });
  function serving(account) {
    const { quota } = account, shown = windows(account).slice(0, 2), seen = quota?.capturedAt;
    const how = { big: true, at: seen, trusted: quota?.trusted !== false && !isRejected(account) };
    text(name, nameOf(account));
    [name.href, name.title] = [hash('accounts', [account.id]), account.email];
    fill(state, tag(account.plan), pill(account));
    fresh.title = fresh.ariaLabel = seen ? t('hero.read', { ago: ago(seen) }) : t('hero.readNever');
    more.patch([...windows(account).slice(2), ...(quota?.extra ?? [])], account);
    const bars = shown.length ? shown : [{ key: 'primary', minutes: 300 }];
    keyed(el, [{ el: who }, ...bars, { el: next }], (one) => one.el ?? one.key,
      (one) => one.el ?? h('div', null, meter(one, how)), (cell, one) => one.el || cell.firstChild.patch(one, how));
  }
  return live(['accounts', 'routing'], el, () => {
    const { queue, skipped: passed, autoSwitch, activeId } = get('routing'), account = accountOf(activeId);
    fill(title, account ? [h('i'), t('hero.now'), h('span', { class: 'role' }, 'API')] : t('hero.none'));
    change.hidden = !get('accounts').length;
    fresh.hidden = more.hidden = !account;
    if (!account) fill(state, note(t('hero.noneText')));
    if (account) serving(account);
    else keyed(el, [who], (one) => one, (one) => one);
    text(auto, autoSwitch ? t('hero.autoOn') : t('hero.autoOff'));
    const others = queue.filter(({ id }) => id !== activeId && accountOf(id)).slice(0, 3);
    const place = (one, title) => h('li', { title }, nameLink(one), tag(one.plan), h('b', null, least(one)));
    fill(line, others.map(({ id, reason }) => place(accountOf(id), why(reason))),
      !others.length && h('li', { class: 'note' }, t('hero.queueNone')));
    const sentence = ({ id, reason, until }) => t(until ? 'hero.skippedUntil' : 'hero.skippedOne',
      { name: nameOf(accountOf(id)), why: why(reason), t: until && at(until) });
    fill(skipped, passed.length > 0 && details(plural('hero.skipped', passed.length),
      h('ul', null, passed.slice(0, 8).map((one) => h('li', null, sentence(one))))));
  });
}

// -- what needs me

/** One sentence and one action each, the most urgent first; what accounts say of themselves counts too. */
function notices() {
  const el = h('div', { class: 'notices' }), order = ({ level }) => Object.keys(KINDS).indexOf(level);
  const worded = (key, { id, until, ...params } = {}) => t(key, { ...params, name: nameOf(accountOf(id)) || '?',
    t: until ? at(until) : '' });
  const again = (account) => button(t('login.again'), { href: hash('accounts', ['add', 'browser'], { account }) });
  const item = ({ level, code, params, message, action }) => notice(KINDS[level], level === 'info' ? 'info' : 'warn',
    known(`notice.${code}`) ? worded(`notice.${code}`, params) : message,
    action?.kind === 'login' && again(action.accountId));
  return live(['accounts', 'notices'], el, () => {
    const told = new Set(get('notices').map((one) => one.params?.id));
    const own = get('accounts').filter((one) => isRejected(one) && !told.has(one.id)).map(({ id, status }) => (
      { level: 'warn', code: status, params: { id }, action: { kind: 'login', accountId: id } }));
    const all = [...get('notices'), ...own].sort((a, b) => order(a) - order(b));
    fill(el, all.slice(0, 2).map(item), all.length > 2
      && h('a', { href: '#/accounts?status=action' }, plural('ov.more', all.length - 2)));
  });
}

// -- figures and traffic

const series = (length, bucket, measure, by) => fetchJson('/usage/series',
  { from: now() - length, bucket, measure, by, tz: zone() });
function column({ keys, points }, key) {
  const place = keys.findIndex((one) => one.key === key);
  return points.map((one) => one.v[place] || 0);
}

function figures() {
  const el = h('div', { class: 'figures' });
  let hours = {}; // figure -> its number in each hour of the last day
  const update = () => {
    const { requestCount: calls = 0, successCount: ok = 0, failureCount: failed = 0, totalTokens: used = 0,
      inputTokens: sent = 0, cachedInputTokens: cached = 0, unknownTokenCount: unknown, firstTokenMedianMs: median,
      p95DurationMs: p95 } = get('today'), none = t('fig.noneYet');
    const part = (key, n, all) => (all ? t(key, { p: percent(n / all * 100) }) : none);
    const silent = unknown && plural('fig.unknown', unknown);
    fill(el, [['fig.requests', compact(calls), t('fig.okFailed', { ok: num(ok), failed: num(failed) }), num(calls)],
      ['fig.tokens', compact(used), silent || part('fig.cached', cached, sent), num(used)],
      ['fig.first', median ? duration(median) : '–', p95 ? t('fig.p95', { d: duration(p95) }) : none],
      ['fig.failures', compact(failed), part('fig.failedPart', failed, calls), num(failed)],
    ].map(([key, ...words]) => figure(t(key), ...words, hours[key]?.some(Boolean)
      && sparkline(hours[key], t('fig.perHour', { name: t(key) })))));
  };
  const read = async () => {
    const [calls, used] = await Promise.all([['requests', 'result'], ['tokens', 'model']]
      .map((what) => series(24 * HOUR, 'hour', ...what)));
    const sums = ({ points }) => points.map((one) => sum(one.v));
    hours = { 'fig.requests': sums(calls), 'fig.tokens': sums(used), 'fig.failures': column(calls, 'failed') };
    update();
  };
  const refresh = () => read().catch(() => {}); // they stand without their little charts
  refresh();
  return [live('today', el, update), refresh];
}

function traffic() {
  const keys = Object.entries(COLOURS).map(([key, colour]) => ({ key, label: t(`res.${key}`), colour }));
  const place = h('div');
  let range = RANGES[pref('traffic')] ? pref('traffic') : '1h', data = null, chart = null;
  const take = (points, bucketMs) => {
    const [ok, failed, other] = [0, 1, 2].map((i) => sum(points.map((one) => one.v[i])));
    data = { points, bucketMs, keys, summary: t('traffic.sum', { n: num(ok + failed + other), f: num(failed) }) };
    if (chart) chart.update(data);
    else fill(place, chart = stacked(data));
  };
  const read = async () => {
    const told = await series(...RANGES[range], 'requests', 'result'), all = keys.map(({ key }) => column(told, key));
    return [told.points.map((one, i) => ({ t: one.t, v: all.map((list) => list[i]) })), told.bucketMs];
  };
  const refresh = loader(place, read, (got) => take(...got));
  offs.push(on('usage', ({ minute: { t: at, ok, failed } }) => { // the minute that is running
    if (range !== '1h' || !data) return;
    const { points, bucketMs } = data, found = points.findIndex((one) => one.t === at);
    const fresh = { t: at, v: [ok, failed, points[found]?.v[2] ?? 0] };
    take(found < 0 ? [...points.slice(-59), fresh] : points.with(found, fresh), bucketMs);
  }));
  const choice = segmented(t('traffic.range'), Object.keys(RANGES).map((one) => [one, t(`traffic.${one}`)]), range,
    (one) => { setPref('traffic', range = one); refresh(); });
  return [card({ title: t('traffic.title'), note: legend(keys), actions: choice }, place), refresh];
}

// -- lists

function recent() {
  const list = h('tbody'), none = empty('log', t('ov.noRequests'));
  const table = h('table', { class: 'rows brief' }, h('caption', { class: 'vh' }, t('ov.recent')), list);
  const patch = (line, one) => {
    const runs = one.result === 'running', status = !runs && one.status || t(`res.${one.result}`);
    const code = h('span', { class: `code ${one.result}` }, status), took = !runs && duration(one.durationMs);
    [code, one.endpoint, one.model || '–', took].forEach((cell, i) => fill(line.children[i + 1], cell));
  };
  const make = (one) => {
    const to = hash('log', [one.id]), time = h('time', { title: exact(one.at) }, clock(one.at));
    const cells = ['', 'name', 'name', 'num'].map((name) => h('td', { class: name }));
    return h('tr', { on: { click: ({ target }) => target.closest('a') || go(to) } },
      h('td', null, h('a', { href: to }, time)), cells);
  };
  const all = link('#/log', 'ov.openLog');
  return live('recent', card({ title: t('ov.recent'), class: 'flush', actions: all }, table, none), () => {
    keyed(list, get('recent').slice(0, 5), (one) => one.id, make, patch);
    none.hidden = get('recent').length > 0;
    table.hidden = !none.hidden;
  });
}

function pool() {
  const list = h('ul', { class: 'pool' }), count = h('span');
  const soonest = (one) => one.statusParams?.until || resetOf(one);
  const item = (one) => {
    const back = soonest(one), time = h('span', { class: 'note', title: back < Infinity ? exact(back) : '' });
    const key = one.status === 'empty' ? 'ov.backIn' : 'quota.resetsIn';
    if (back < Infinity) ticking(time, back, () => t(key, { d: wait(back - now()) }));
    return h('li', null, nameLink(one), pill(one), h('b', null, least(one)), time);
  };
  const el = card({ title: t('ov.pool'), class: 'flush', note: count, actions: link('#/accounts', 'ov.all') }, list);
  return live('accounts', el, () => {
    text(count, t('ov.poolNote', { n: num(get('accounts').length) }));
    fill(list, get('accounts').toSorted((a, b) => soonest(a) - soonest(b)).slice(0, 5).map(item));
  });
}

/** The snippet of the client used last, or of another. */
function connect() {
  const shown = codeBlock('', { label: t('ov.client') }), { baseUrl: base, codexBaseUrl: codexBase } = get('gateway');
  const { id: last } = CLIENTS.find((one) => one.id === pref('client')) || clientSeen(get('firstRun').clientSeen);
  const few = [...new Set([...FEW_CLIENTS, last])].slice(-4), model = get('defaultModel');
  const show = (id) => {
    const [first] = snippets(id, { base, codexBase, key: 'local', model });
    shown.set(first?.text || `${t('shell.base')}  ${base}\n${t('ov.key')}  local\n${t('ov.model')}  ${model}\n`);
    text(shown.querySelector('figcaption span'), first?.label || t(`client.${id}`));
  };
  show(last);
  const choose = (id) => { setPref('client', id); show(id); };
  return [segmented(t('ov.client'), few.map((id) => [id, t(`client.${id}`)]), last, choose), shown];
}

let leave = () => {}; // the sign-in of the first step
/** The first three steps. What is signed in or imported meanwhile, in whatever way, ticks the first one. */
function firstRun(over) {
  const places = [1, 2, 3].map(() => h('div', { class: 'doing' }));
  const rows = ['first.signIn', 'first.try', 'first.connect'].map((key, i) => (
    h('li', null, h('span', { class: 'step' }, i + 1), h('h3', null, t(key)), places[i])));
  const dismiss = button(t('first.dismiss'), { kind: 'ghost', on: over });
  const el = card({ title: t('first.title'), class: 'first', actions: dismiss }, h('ol', null, rows));
  let isIn = null;
  fill(places[2], connect(), link('#/connect', 'ov.moreClients'));
  return live('accounts', el, () => {
    const [account] = get('accounts'), form = h('div', { class: 'stack' });
    if (isIn === Boolean(account)) return;
    isIn = Boolean(account);
    rows[0].classList.toggle('done', isIn);
    rows[1].classList.toggle('locked', !isIn);
    leave(false); // what began in another tab may end there
    leave = isIn ? () => {} : signIn(form, { method: 'browser' });
    const [device, files] = ['device', 'import'].map((way) => link(`#/accounts/add/${way}`, `first.${way}`));
    fill(places[0], isIn ? [good(t('login.done', { name: nameOf(account) })), tag(account.plan)]
      : [form, note(t('first.other'), ' ', device, ' · ', files)]);
    fill(places[1], isIn ? testCall(null, [], () => rows[1].classList.add('done')) : note(t('first.tryLocked')));
  });
}

function mount(root) {
  const [numbers, readNumbers] = figures(), [chart, readChart] = traffic(), first = h('div');
  const main = h('div', { class: 'cols' }, chart), lists = h('div', { class: 'cols' }, recent(), pool());
  const rest = h('div', { class: 'stack' }, numbers, main, lists), actions = link('#/connect', 'ov.moreClients');
  const more = () => main.append(card({ title: t('ov.connect'), actions }, connect()));
  // The steps stay until dismissed, or until a client of the person's own has called.
  let isNew = pref('first') !== 'done' && !get('firstRun').clientSeen;
  const update = () => { rest.hidden = isNew && !get('accounts').length; }; // there is nothing else to do then
  const over = () => {
    isNew = false;
    setPref('first', 'done');
    leave(false);
    fill(first);
    more();
    update();
  };
  if (isNew) fill(first, firstRun(over));
  else more();
  fill(root, h('div', { class: 'stack' }, hero(), notices(), first, live('accounts', rest, update)));
  return {
    primary: button(t('acc.add'), { icon: 'plus', kind: isNew ? 'default' : 'primary', href: '#/accounts/add' }),
    refresh() { readChart(); readNumbers(); },
    rows: { list: () => [...root.querySelectorAll('.brief tr')] },
    unmount() {
      offs.forEach((off) => off());
      offs = [];
      leave(false);
    },
  };
}

export const page = { title: 'nav.overview', mount };
