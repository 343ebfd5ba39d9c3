// Is it working, who is serving, what needs me.
import { get as fetchJson, send } from '../api.js';
import { legend, sparkline, stacked } from '../charts.js';
import { fill, h, icon, keyed, text } from '../dom.js';
import { ago, at, clock, compact, duration, exact, now, num, percent, timeEl, zone } from '../format.js';
import { known, plural, pref, setPref, t } from '../i18n.js';
import { signIn, testCall } from '../login.js';
import { activate } from '../palette.js';
import { hash, remount } from '../router.js';
import { CLIENTS, clientSeen, snippets } from '../snippets.js';
import { accountOf, get, nameOf, on, reducers } from '../store.js';
import { button, card, codeBlock, details, empty, figure, good, iconButton, isRejected, leftOf, loader, menu, meter,
  moreMeters, note, notice, pill, resetOf, row, segmented, tag, windows } from '../ui.js';

const HOUR = 3600000, FEW_CLIENTS = ['python', 'js', 'curl', 'codex'];
const RANGES = { '1h': [HOUR, 'minute'], '24h': [24 * HOUR, 'hour'], '7d': [168 * HOUR, 'hour'] };
const COLOURS = { ok: 'ok', failed: 'bad', cancelled: 'c5' }; // of the results of calls

const least = (account) => (windows(account).length ? t('quota.left', { p: leftOf(account) }) : t('quota.none'));
const why = (code) => t(known(`reason.${code}`) ? `reason.${code}` : 'reason.other');
const sum = (list) => list.reduce((all, n) => all + n, 0);
const whose = (account) => ({ href: hash('accounts', [account.id]), title: nameOf(account) });
const nameLink = (account) => h('a', whose(account), nameOf(account));
const link = (href, key) => h('a', { href }, t(key));
let offs = [], reads = []; // what ends with the page, and what reads its numbers anew
/** `el`, which `update()` draws now and whenever one of these slices changes. */
function live(slices, el, update) {
  offs.push(on(slices, update)); update();
  return el;
}

// -- now serving
function hero() {
  const title = h('h2', { class: 'live' }), name = h('a'), state = row(), more = moreMeters();
  const line = h('ol', { class: 'queue' }), skipped = h('div', { class: 'skipped' }), auto = h('span');
  const bars = [1, 2].map(() => h('div', null, meter({}, {})));
  const choose = () => menu(change, get('accounts').map((one) => ({ icon: one.active ? 'check' : 'accounts',
    label: `${nameOf(one)} · ${least(one)}`, run: () => activate(one) })));
  const read = async () => reducers.account(await send('POST', `/accounts/${get('routing').activeId}/refresh-quota`));
  const change = button(t('hero.switch'), { icon: 'switch', on: choose }), fresh = iconButton('refresh', '', read);
  const who = h('div', null, title, h('p', { class: 'name' }, name), state, row(change, fresh), more);
  const next = h('div', null, h('div', { class: 'over' }, h('h2', null, t('hero.next')), note(auto)), line, skipped);
  function serving(account) {
    const all = windows(account), shown = all[0] ? all : [{ key: 'primary', minutes: 300 }], { quota } = account;
    text(name, nameOf(account)); Object.assign(name, whose(account)); fill(state, tag(account.plan), pill(account));
    fresh.title = fresh.ariaLabel = quota ? t('hero.read', { ago: ago(quota.capturedAt) }) : t('hero.readNever');
    const how = { big: true, at: quota?.capturedAt, trusted: !isRejected(account) };
    bars.forEach((bar, i) => { bar.hidden = !shown[i]; if (shown[i]) bar.firstChild.patch(shown[i], how); });
    more.patch([...all.slice(2), ...(quota?.extra ?? [])], account);
  }
  const el = h('section', { class: 'card hero', 'aria-label': t('hero.now') }, who, bars, next);
  return live(['accounts', 'routing'], el, () => {
    const { queue, skipped: passed, autoSwitch, activeId } = get('routing'), account = accountOf(activeId);
    fill(title, account ? [h('i'), t('hero.now'), h('span', { class: 'role' }, 'API')] : t('hero.none'));
    change.hidden = !get('accounts').length;
    for (const one of [name, fresh, more, ...bars, next]) one.hidden = !account;
    if (account) serving(account); else fill(state, note(t('hero.noneText')));
    text(auto, t(autoSwitch ? 'hero.autoOn' : 'hero.autoOff'));
    const others = queue.filter(({ id }) => id !== activeId && accountOf(id)).slice(0, 3);
    const place = (one, title) => h('li', { title }, nameLink(one), tag(one.plan), h('b', null, least(one)));
    fill(line, others[0] ? others.map(({ id, reason }) => place(accountOf(id), why(reason)))
      : h('li', { class: 'note' }, t('hero.queueNone')));
    const sentence = ({ id, reason, until }) => t(until ? 'hero.skippedUntil' : 'hero.skippedOne',
      { name: nameOf(accountOf(id)), why: why(reason), t: until && at(until) });
    fill(skipped, passed.length > 0 && details(plural('hero.skipped', passed.length),
      h('ul', null, passed.slice(0, 8).map((one) => h('li', null, sentence(one))))));
  });
}

/** What needs me, the most urgent first: what is broken, and the sign-ins that are lost. */
function notices() {
  const el = h('div', { class: 'notices' });
  const again = (account) => button(t('login.again'), { href: hash('accounts', ['add', 'browser'], { account }) });
  const breakage = ({ code, params }) => notice('bad', 'warn', t(`notice.${code}`, params));
  const loss = (one) => notice('warn', 'warn', t(`notice.${one.status}`, { name: nameOf(one) }), again(one.id));
  return live(['accounts', 'notices'], el, () => {
    const broken = get('notices').filter((one) => one.level === 'error'), lost = get('accounts').filter(isRejected);
    const lines = [...broken.map(breakage), ...lost.slice(0, 2).map(loss)].slice(0, 2);
    const rest = broken.length + lost.length - lines.length;
    fill(el, lines, rest > 0 && h('a', { href: '#/accounts?status=action' }, plural('ov.more', rest)));
  });
}

// -- figures and traffic
/** Buckets of the last `length` ms: {points: [{t, v}], bucketMs}, in `v` one number for each of `COLOURS`. */
async function series(measure, length, bucket) {
  const told = await fetchJson('/usage/series', { from: now() - length, bucket, measure, by: 'result', tz: zone() });
  const places = Object.keys(COLOURS).map((key) => told.keys.findIndex((one) => one.key === key));
  return { ...told, points: told.points.map(({ t: begun, v }) => ({ t: begun, v: places.map((i) => v[i] || 0) })) };
}
function figures() {
  const el = h('div', { class: 'figures' }), hours = {}; // figure -> its number in each hour of the last day
  const update = () => {
    const { requestCount: calls, successCount: ok, failureCount: failed, totalTokens: used, unknownTokenCount: mute,
      inputTokens: sent, cachedInputTokens: cached, firstTokenMedianMs: first, p95DurationMs: p95 } = get('today');
    const none = t('fig.noneYet'), part = (key, n, all) => (all ? t(key, { p: percent(n / all * 100) }) : none);
    const all = { requests: [compact(calls), t('fig.okFailed', { ok: num(ok), failed: num(failed) }), num(calls)],
      tokens: [compact(used), mute ? plural('fig.unknown', mute) : part('fig.cached', cached, sent), num(used)],
      first: [first ? duration(first) : '–', p95 ? t('fig.p95', { d: duration(p95) }) : none],
      failures: [compact(failed), part('fig.failedPart', failed, calls), num(failed)] };
    fill(el, Object.entries(all).map(([key, words]) => figure(t(`fig.${key}`), ...words, hours[key]?.some(Boolean)
      && sparkline(hours[key], t('fig.perHour', { name: t(`fig.${key}`) })))));
  };
  const took = (one) => ({ points }) => { hours[one] = points.map(({ v }) => sum(v)); update(); };
  const read = (one) => series(one, ...RANGES['24h']).then(took(one), () => {}); // else it stands without its chart
  const refresh = () => ['requests', 'tokens', 'failures'].forEach(read);
  reads.push(refresh); refresh();
  return live('today', el, update);
}
function traffic() {
  const keys = Object.entries(COLOURS).map(([key, colour]) => ({ key, label: t(`res.${key}`), colour }));
  const place = h('div'), ranges = Object.keys(RANGES).map((one) => [one, t(`traffic.${one}`)]);
  let range = RANGES[pref('traffic')] ? pref('traffic') : '1h', data = null, chart = null;
  const draw = ({ points, bucketMs }) => {
    const [ok, failed, other] = keys.map((key, i) => sum(points.map((one) => one.v[i])));
    data = { points, bucketMs, keys, summary: t('traffic.sum', { n: num(ok + failed + other), f: num(failed) }) };
    if (chart) chart.update(data); else fill(place, chart = stacked(data));
  };
  const read = loader(place, () => series('requests', ...RANGES[range]), draw);
  reads.push(read);
  offs.push(on('usage', ({ minute: { t: begun, ok, failed } }) => { // the minute that is running
    if (range !== '1h' || !data) return;
    const past = data.points.filter((one) => one.t < begun), cancelled = data.points[past.length]?.v[2] ?? 0;
    draw({ ...data, points: [...past.slice(-59), { t: begun, v: [ok, failed, cancelled] }] });
  }));
  return card({ title: t('traffic.title'), note: legend(keys), actions: segmented(t('traffic.range'), ranges, range,
    (one) => { setPref('traffic', range = one); read(); }) }, place);
}

// -- lists
function recent() {
  const list = h('tbody'), none = empty('log', t('ov.noRequests'));
  const table = h('table', { class: 'rows brief' }, h('caption', { class: 'vh' }, t('ov.recent')), list);
  const make = ({ id, at: ms }) => {
    const time = h('a', { href: hash('log', [id]) }, h('time', { title: exact(ms) }, clock(ms)));
    return h('tr', { on: { click: ({ target }) => target.closest('a') || time.click() } }, h('td', null, time),
      ['', 'name', 'name', 'num'].map((name) => h('td', { class: name })));
  };
  const patch = ({ cells }, { result: how, status, endpoint, model, durationMs }) => {
    const done = how !== 'running', code = h('span', { class: `code ${how}` }, (done && status) || t(`res.${how}`));
    [code, endpoint, model || '–', done && duration(durationMs)].forEach((one, i) => fill(cells[i + 1], one));
  };
  const el = card({ title: t('ov.recent'), class: 'flush', actions: link('#/log', 'ov.openLog') }, table, none);
  return live('recent', el, () => {
    keyed(list, get('recent').slice(0, 5), (one) => one.id, make, patch);
    none.hidden = get('recent').length > 0; table.hidden = !none.hidden;
  });
}
function pool() {
  const list = h('ul', { class: 'pool' }), count = h('span'), soonest = (it) => it.statusParams?.until || resetOf(it);
  const item = (one) => h('li', null, nameLink(one), pill(one), h('b', null, least(one)),
    h('span', { class: 'note' }, timeEl(soonest(one), 'until')));
  const el = card({ title: t('ov.pool'), class: 'flush', note: count, actions: link('#/accounts', 'ov.all') }, list);
  return live('accounts', el, () => {
    text(count, t('ov.poolNote', { n: num(get('accounts').length) }));
    fill(list, get('accounts').toSorted((a, b) => soonest(a) - soonest(b)).slice(0, 5).map(item));
  });
}
/** The snippet of the client used last, or of another. */
function connect() {
  const { baseUrl: base, codexBaseUrl: codexBase } = get('gateway'), model = get('defaultModel');
  const { id: last } = CLIENTS.find((one) => one.id === pref('client')) || clientSeen(get('firstRun').clientSeen);
  const few = [...new Set([...FEW_CLIENTS, last])].slice(-4).map((id) => [id, t(`client.${id}`)]);
  const byHand = `${t('shell.base')}  ${base}\n${t('ov.key')}  local\n${t('ov.model')}  ${model}\n`;
  const place = h('div', { class: 'stack' }), show = (id) => {
    const [shown = { label: t(`client.${id}`), text: byHand }] = snippets(id, { base, codexBase, key: 'local', model });
    fill(place, codeBlock(shown.text, shown));
  };
  show(last);
  return [segmented(t('ov.client'), few, last, (id) => { setPref('client', id); show(id); }), place];
}

let leave = () => {}; // the sign-in of the first step: what began here may end elsewhere
/** The first three steps. What is signed in or imported meanwhile, in whatever way, ticks the first one. */
function firstRun() {
  const [account] = get('accounts'), form = h('div', { class: 'stack' }), more = link('#/connect', 'ov.moreClients');
  const [device, files] = ['device', 'import'].map((way) => link(`#/accounts/add/${way}`, `first.${way}`));
  leave = account ? () => {} : signIn(form, { method: 'browser' });
  const doing = account ? [[good(t('login.done', { name: nameOf(account) })), tag(account.plan)],
    testCall(null, [], () => { rows[1].className = 'done'; }), [connect(), more]]
    : [[form, note(t('first.other'), ' ', device, ' · ', files)], note(t('first.tryLocked')), [connect(), more]];
  const rows = doing.map((one, i) => h('li', { class: account ? !i && 'done' : i === 1 && 'locked' },
    h('span', { class: 'step' }, i + 1), h('h3', null, t(`first.step${i}`)), h('div', { class: 'doing' }, one)));
  const actions = button(t('first.dismiss'), { kind: 'ghost', on: () => { setPref('first', 'done'); remount(); } });
  offs.push(on('accounts', ([first]) => !first === !account || remount()));
  return card({ title: t('first.title'), class: 'first', actions }, h('ol', null, rows));
}

function mount(root) {
  // The steps stay until dismissed, or until a client of the person's own has called. At first there is nothing else.
  const isNew = pref('first') !== 'done' && !get('firstRun').clientSeen, hidden = isNew && !get('accounts').length;
  const title = t('ov.connect'), actions = link('#/connect', 'ov.moreClients'), cols = { class: 'cols' };
  const clients = !isNew && card({ title, actions }, connect());
  fill(root, h('div', { class: 'stack' }, hero(), notices(), isNew && firstRun(), h('div', { class: 'stack', hidden },
    figures(), h('div', cols, traffic(), clients), h('div', cols, recent(), pool()))));
  return { rows: { list: () => [...root.querySelectorAll('.brief tr')] },
    primary: button(t('acc.add'), { icon: 'plus', kind: isNew ? 'default' : 'primary', href: '#/accounts/add' }),
    refresh: () => reads.forEach((read) => read()),
    unmount() { leave(false); offs.forEach((off) => off()); [offs, reads] = [[], []]; } };
}
export const page = { title: 'nav.overview', mount };
