// Is it working, who is serving, what needs me.
import * as api from '../api.js';
import { legend, sparkline, stacked } from '../charts.js';
import { announce, fill, h, icon, keyed, text } from '../dom.js';
import { ago, at, clock, compact, duration, exact, now, num, percent, ticking, wait, zone } from '../format.js';
import { known, plural, pref, setPref, t } from '../i18n.js';
import { activate } from '../palette.js';
import { go, hash } from '../router.js';
import { CLIENTS, clientSeen, snippets } from '../snippets.js';
import { accountOf, get, nameOf, on, reducers } from '../store.js';
import { button, card, codeBlock, copyButton, details, empty, errorPanel, fail, iconButton, menu, meter, pill,
  segmented, tag, wording } from '../ui.js';

const HOUR = 3600000;
const RANGES = { '1h': [HOUR, 'minute'], '24h': [24 * HOUR, 'hour'], '7d': [168 * HOUR, 'hour'] };
const BROKEN = ['login_rejected', 'auth_error', 'expired'];
const FEW_CLIENTS = ['python', 'js', 'curl', 'codex'];

const windows = (account) => account.quota?.windows || [];
const soonest = (account) => account.statusParams?.until
  || Math.min(...windows(account).map((one) => one.resetsAt || Infinity));
const least = (account) => {
  const left = windows(account).map((one) => one.remainingPercent);
  return left.length ? t('quota.left', { p: Math.min(...left) }) : t('quota.none');
};
const why = (code) => t(known(`reason.${code}`) ? `reason.${code}` : 'reason.other');
const sum = (list) => list.reduce((all, n) => all + n, 0);
const nameLink = (account) => h('a', { href: hash('accounts', [account.id]), title: account.email }, nameOf(account));
const note = (...words) => h('p', { class: 'note' }, words);

// -- now serving

function hero() {
  const el = h('section', { class: 'card hero', 'aria-label': t('hero.now') });
  const line = h('ol', { class: 'queue' }), skipped = h('div', { class: 'skipped' });
  const auto = h('span', { class: 'note' });
  const over = h('div', { class: 'over' }, h('h2', null, t('hero.next')), auto);
  const choose = (event) => menu(event.currentTarget, get('accounts').map((one) => ({
    icon: one.active ? 'check' : 'accounts', label: `${nameOf(one)} · ${least(one)}`, run: () => activate(one),
  })));
  const change = () => button(t('hero.switch'), { icon: 'switch', on: choose });
  let shape = '', patch = () => {};

  function build(account) {
    const read = async () => reducers.account(await api.send('POST', `/accounts/${account.id}/refresh-quota`));
    const state = h('span'), fresh = iconButton('refresh', '', read), all = windows(account);
    const meters = (all.length ? all.slice(0, 2) : [null]).map((one) => meter(one, { big: true }));
    const extra = [...all.slice(2), ...(account.quota?.extra || [])];
    const rest = extra.length > 0 && details(plural('quota.more', extra.length), extra.map((one) => meter(one)));
    fill(el, h('div', null, h('h2', { class: 'live' }, h('i'), t('hero.now'), h('span', { class: 'role' }, 'API')),
      h('p', { class: 'name' }, nameLink(account)), h('p', { class: 'row' }, tag(account.plan), state),
      h('p', { class: 'row' }, change(), fresh)),
    meters.map((one, i) => h('div', null, one, i === meters.length - 1 && rest)), h('div', null, over, line, skipped));
    return (same) => {
      const { quota, status } = same, trusted = quota?.trusted !== false && !BROKEN.includes(status);
      fill(state, pill(same));
      meters.forEach((one, i) => one.patch(quota?.windows?.[i], { big: true, trusted, at: quota?.capturedAt }));
      const words = quota?.capturedAt ? t('hero.read', { ago: ago(quota.capturedAt) }) : t('hero.readNever');
      for (const name of ['title', 'aria-label']) fresh.setAttribute(name, words);
    };
  }

  function update() {
    const { queue = [], skipped: passed = [], autoSwitch, activeId } = get('routing');
    const account = accountOf(activeId);
    const seen = account && [account.id, windows(account).length, nameOf(account), account.plan].join();
    if (!account) {
      const others = get('accounts').length > 0 && change();
      fill(el, h('div', null, h('h2', null, t('hero.none')), note(t('hero.noneText')), others));
    } else if (seen !== shape) patch = build(account);
    shape = seen;
    if (account) patch(account);
    text(auto, autoSwitch ? t('hero.autoOn') : t('hero.autoOff'));
    const others = queue.filter(({ id }) => id !== activeId && accountOf(id)).slice(0, 3);
    const place = (one, title) => h('li', { title }, nameLink(one), tag(one.plan), h('b', null, least(one)));
    const places = others.map(({ id, reason }) => place(accountOf(id), why(reason)));
    fill(line, places.length ? places : h('li', { class: 'note' }, t('hero.queueNone')));
    const sentence = ({ id, reason, until }) => t(until ? 'hero.skippedUntil' : 'hero.skippedOne',
      { name: nameOf(accountOf(id)), why: why(reason), t: until && at(until) });
    fill(skipped, passed.length > 0 && details(plural('hero.skipped', passed.length),
      h('ul', null, passed.slice(0, 8).map((one) => h('li', null, sentence(one))))));
  }
  return { el, update };
}

// -- what needs me

/** One sentence and one action each, the most urgent first; what accounts say of themselves counts too. */
function notices() {
  const el = h('div', { class: 'notices' }), order = ['error', 'warn', 'info'];
  const words = (code, params, message) => (known(`notice.${code}`) ? t(`notice.${code}`, { ...params,
    name: nameOf(accountOf(params.id)) || '?', t: params.until ? at(params.until) : '' }) : message || code);
  const again = (account) => button(t('login.again'), { href: hash('accounts', ['add', 'browser'], { account }) });
  const item = ({ level, code, params = {}, message, action }) => h('div',
    { class: `notice ${level === 'error' ? 'bad' : level}` }, icon(level === 'info' ? 'info' : 'warn'),
    h('p', null, words(code, params, message)), action?.kind === 'login' && again(action.accountId));
  const update = () => {
    const told = new Set(get('notices').map((one) => one.params?.id));
    const broken = get('accounts').filter((one) => BROKEN.includes(one.status) && !told.has(one.id));
    const own = broken.map(({ id, status }) => (
      { level: 'warn', code: status, params: { id }, action: { kind: 'login', accountId: id } }));
    const all = [...get('notices'), ...own].sort((a, b) => order.indexOf(a.level) - order.indexOf(b.level));
    const more = all.length > 2 && h('a', { href: '#/accounts?status=action' }, plural('ov.more', all.length - 2));
    fill(el, all.slice(0, 2).map(item), more);
  };
  return { el, update };
}

// -- figures and traffic

function figures() {
  const tiles = ['fig.requests', 'fig.tokens', 'fig.first', 'fig.failures'].map((key) => {
    const value = h('b'), words = h('span', { class: 'note' }), spark = h('span');
    const put = (big, small, title = '') => { text(value, big); value.title = title; text(words, small); };
    const draw = (list) => fill(spark, list.some(Boolean) && sparkline(list, t('fig.perHour', { name: t(key) })));
    const el = h('div', { class: 'card figure' }, h('span', { class: 'name' }, t(key)), value, words, spark);
    return { el, put, draw };
  });
  const [requests, tokens, first, failures] = tiles;
  const update = () => {
    const { requestCount: calls = 0, successCount: ok = 0, failureCount: failed = 0, totalTokens: used = 0,
      inputTokens: sent = 0, cachedInputTokens: cached = 0, unknownTokenCount: unknown, firstTokenMedianMs: median,
      p95DurationMs: p95 } = get('today');
    requests.put(compact(calls), t('fig.okFailed', { ok: num(ok), failed: num(failed) }), num(calls));
    tokens.put(compact(used), unknown ? plural('fig.unknown', unknown)
      : sent ? t('fig.cached', { p: percent(cached / sent * 100) }) : t('fig.noneYet'), num(used));
    first.put(median ? duration(median) : '–', p95 ? t('fig.p95', { d: duration(p95) }) : t('fig.noneYet'));
    const part = calls ? t('fig.failedPart', { p: percent(failed / calls * 100) }) : t('fig.noneYet');
    failures.put(compact(failed), part, num(failed));
  };
  const refresh = async () => {
    const since = { from: now() - 24 * HOUR, bucket: 'hour', tz: zone() };
    const read = (measure, by) => api.get('/usage/series', { ...since, measure, by });
    const [calls, used] = await Promise.all([read('requests', 'result'), read('tokens', 'model')]);
    const failed = calls.keys.findIndex((one) => one.key === 'failed');
    requests.draw(calls.points.map((one) => sum(one.v)));
    failures.draw(calls.points.map((one) => one.v[failed] || 0));
    tokens.draw(used.points.map((one) => sum(one.v)));
  };
  return { el: h('div', { class: 'figures' }, tiles.map((one) => one.el)), update, refresh };
}

function traffic() {
  const colours = { ok: 'ok', failed: 'bad', cancelled: 'c5' };
  const keys = Object.entries(colours).map(([key, colour]) => ({ key, label: t(`res.${key}`), colour }));
  const place = h('div');
  let range = RANGES[pref('traffic')] ? pref('traffic') : '1h', data = null, chart = null;
  const draw = () => {
    const [ok, failed, other] = [0, 1, 2].map((i) => sum(data.points.map((one) => one.v[i])));
    const shown = { ...data, keys, summary: t('traffic.sum', { n: num(ok + failed + other), f: num(failed) }) };
    if (chart) chart.update(shown);
    else fill(place, chart = stacked(shown));
  };
  async function refresh() {
    const [length, bucket] = RANGES[range];
    try {
      const asked = { from: now() - length, bucket, measure: 'requests', by: 'result', tz: zone() };
      const { points, bucketMs, keys: got } = await api.get('/usage/series', asked);
      const columns = keys.map(({ key }) => got.findIndex((one) => one.key === key));
      data = { points: points.map((one) => ({ t: one.t, v: columns.map((i) => one.v[i] || 0) })), bucketMs };
      draw();
    } catch (error) {
      if (!data) fill(place, errorPanel(error, refresh));
    }
  }
  /** The minute that is running, from the event stream. */
  const minute = (one) => {
    if (!one || range !== '1h' || !data) return;
    const fresh = { t: one.t, v: [one.ok, one.failed, one.cancelled || 0] };
    const place = data.points.findIndex((point) => point.t === one.t);
    data.points = place < 0 ? [...data.points.slice(-59), fresh] : data.points.with(place, fresh);
    draw();
  };
  const choose = (one) => { setPref('traffic', range = one); refresh(); };
  const options = Object.keys(RANGES).map((one) => [one, t(`traffic.${one}`)]);
  const choice = segmented(t('traffic.range'), options, range, choose);
  return { el: card({ title: t('traffic.title'), note: legend(keys), actions: choice }, place), refresh, minute };
}

// -- lists

function recent() {
  const list = h('tbody'), none = h('div');
  const table = h('table', { class: 'rows brief' }, h('caption', { class: 'vh' }, t('ov.recent')), list);
  const patch = (row, one) => {
    const [, status, what, model, took] = row.children;
    const words = one.result !== 'running' && one.status || t(`res.${one.result}`);
    fill(status, h('span', { class: `code ${one.result}` }, words));
    text(what, one.endpoint);
    text(model, one.model || '–');
    text(took, one.result === 'running' ? '' : duration(one.durationMs));
  };
  const make = (one) => {
    const to = hash('log', [one.id]), open = (event) => { if (!event.target.closest('a')) go(to); };
    const link = h('a', { href: to }, h('time', { title: exact(one.at) }, clock(one.at)));
    const row = h('tr', { on: { click: open } }, h('td', null, link), h('td'), h('td', { class: 'name' }),
      h('td', { class: 'name' }), h('td', { class: 'num' }));
    patch(row, one);
    return row;
  };
  const update = () => {
    const rows = get('recent').slice(0, 5);
    keyed(list, rows, (one) => one.id, make, patch);
    table.hidden = !rows.length;
    fill(none, !rows.length && empty('log', t('ov.noRequests')));
  };
  const all = h('a', { href: '#/log' }, t('ov.openLog'));
  return { el: card({ title: t('ov.recent'), class: 'flush', actions: all }, table, none), update, list };
}

function pool() {
  const list = h('ul', { class: 'pool' }), count = h('span', { class: 'note' });
  const item = (one) => {
    const back = soonest(one), time = h('span', { class: 'note', title: back < Infinity ? exact(back) : '' });
    const words = one.status === 'empty' ? 'ov.backIn' : 'quota.resetsIn';
    if (back < Infinity) ticking(time, back, () => t(words, { d: wait(back - now()) }));
    return h('li', null, nameLink(one), pill(one), h('b', null, least(one)), time);
  };
  const update = () => {
    text(count, t('ov.poolNote', { n: num(get('accounts').length) }));
    fill(list, [...get('accounts')].sort((a, b) => soonest(a) - soonest(b)).slice(0, 5).map(item));
  };
  const all = h('a', { href: '#/accounts' }, t('ov.all'));
  return { el: card({ title: t('ov.pool'), class: 'flush', note: count, actions: all }, list), update };
}

// -- connect

/** The snippet of the client used last, or of another. */
function connect() {
  const shown = codeBlock('', { label: t('ov.client') }), { baseUrl: base, codexBaseUrl: codexBase } = get('gateway');
  const last = CLIENTS.find((one) => one.id === pref('client')) || clientSeen(get('firstRun').clientSeen);
  const few = FEW_CLIENTS.includes(last.id) ? FEW_CLIENTS : [last.id, ...FEW_CLIENTS.slice(0, 3)];
  const model = get('defaultModel');
  const show = (id) => {
    const [first] = snippets(id, { base, codexBase, key: 'local', model });
    shown.set(first?.text || `${t('shell.base')}  ${base}\n${t('ov.key')}  local\n${t('ov.model')}  ${model}\n`);
    text(shown.querySelector('figcaption span'), first?.label || t(`client.${id}`));
  };
  const choose = (id) => { setPref('client', id); show(id); };
  show(last.id);
  return [segmented(t('ov.client'), few.map((id) => [id, t(`client.${id}`)]), last.id, choose), shown];
}

// -- the first three steps

let flow = null, answer = null, running = false;

function firstRun(over) {
  const places = [1, 2, 3].map(() => h('div', { class: 'doing' }));
  const step = (key, i) => h('li', null, h('span', { class: 'step' }, i + 1), h('h3', null, t(key)), places[i]);
  const rows = ['first.signIn', 'first.try', 'first.connect'].map(step);
  const dismiss = button(t('first.dismiss'), { kind: 'ghost', on: over });
  const el = card({ title: t('first.title'), class: 'first', actions: dismiss }, h('ol', null, rows));
  const usable = () => get('accounts').length > 0;
  const wrong = (error) => h('p', { class: 'wrong' }, icon('warn'), wording(error));

  const begin = async () => {
    flow = await api.send('POST', '/login', { method: 'browser' });
    update();
  };
  const opened = () => {
    flow.opened = true;
    api.send('POST', `/login/${flow.flowId}/open`).then((told) => onlogin(told), fail);
    update();
  };
  const onlogin = (told) => {
    if (told?.flowId !== flow?.flowId) return;
    flow = { ...flow, ...told };
    update();
  };

  function signIn() {
    if (usable()) {
      const done = accountOf(flow?.account?.id) || get('accounts')[0];
      return h('p', { class: 'good' }, icon('check'), t('login.done', { name: nameOf(done) }), tag(done.plan));
    }
    if (!flow) return note(t('ui.loading'));
    if (flow.status !== 'waiting' && flow.status !== 'exchanging') {
      const retry = button(t('first.newLink'), { kind: 'primary', on: begin });
      return [wrong(flow.error || { code: 'flow_expired' }), h('p', null, retry)];
    }
    const words = () => t('first.left', { d: wait(flow.expiresAt - now()) });
    const open = button(t('login.open'), { icon: 'external', kind: 'primary', href: flow.authorizeUrl, target: '_blank',
      rel: 'noopener noreferrer', on: opened });
    const waiting = () => [h('span', { class: 'spin' }), h('span', { role: 'status' }, t('login.waiting')),
      ticking(h('span', { class: 'note' }), flow.expiresAt, words)];
    const link = () => copyButton(() => { opened(); return flow.authorizeUrl; }, t('first.copyLink'));
    return [h('p', null, t('first.signInText')), h('p', { class: 'row' }, open, flow.opened ? waiting() : link()),
      flow.listenError && h('p', { class: 'wrong' }, icon('warn'), t('first.portTaken'),
        h('a', { href: '#/accounts/add/browser' }, t('first.paste')))];
  }

  async function test() {
    const began = performance.now(), shown = h('p', { class: 'answer' });
    running = true;
    fill(places[1], shown, note(t('first.streaming')));
    try {
      const body = { model: get('defaultModel'), input: 'Say OK', stream: true };
      const onevent = ({ event, data }) => {
        const told = JSON.parse(data);
        if (event === 'response.output_text.delta') shown.append(told.delta);
        const isError = event === 'response.failed' || event === 'error';
        if (isError) throw new api.ApiError(200, told.response?.error || told.error || told);
      };
      await api.stream('/playground', { path: '/v1/responses', accountId: null, body }, { onevent });
      answer = { words: shown.textContent, ms: performance.now() - began };
      announce(answer.words);
    } catch (error) {
      answer = { error };
    }
    running = false;
    update();
  }

  function tryIt() {
    if (!usable()) return note(t('first.tryLocked'));
    const send = button(t('play.test'), { icon: 'play', kind: answer?.words ? 'default' : 'primary', on: test });
    const model = get('defaultModel'), done = () => [icon('check'), t('first.done', { d: duration(answer.ms) })];
    const after = h('span', { class: answer?.words ? 'good' : 'note' }, answer?.words ? done() : t('first.tryText', { model }));
    return [answer?.words && h('p', { class: 'answer' }, answer.words), answer?.error && wrong(answer.error),
      h('p', { class: 'row' }, send, after)];
  }

  function update() {
    const others = [h('a', { href: '#/accounts/add/device' }, t('first.device')), ' · ',
      h('a', { href: '#/accounts/add/import' }, t('first.import'))];
    fill(places[0], signIn(), !usable() && note(t('first.other'), ' ', others));
    if (!running) fill(places[1], tryIt());
    [usable(), Boolean(answer?.words), false].forEach((done, i) => rows[i].classList.toggle('done', done));
    rows[1].classList.toggle('locked', !usable());
  }

  fill(places[2], connect(), h('a', { href: '#/connect' }, t('ov.moreClients')));
  if (!usable() && flow?.status !== 'waiting') begin().catch((error) => fill(places[0], errorPanel(error, begin)));
  return { el, update, onlogin };
}

export const page = {
  title: 'nav.overview',
  mount(root) {
    const top = hero(), bad = notices(), first = h('div'), rest = h('div', { class: 'stack' });
    const over = () => { setPref('first', 'done'); fill(first); steps = null; all(); };
    let steps = null, parts = null;
    const refresh = () => {
      parts?.traffic.refresh();
      parts?.figures.refresh().catch(() => {}); // the figures stand without their little charts
    };
    const all = () => {
      top.update();
      bad.update();
      steps?.update();
      // Until there is an account, the three steps are all there is to do.
      if (!parts && (!steps || get('accounts').length)) {
        parts = { figures: figures(), traffic: traffic(), recent: recent(), pool: pool() };
        const more = h('a', { href: '#/connect' }, t('ov.moreClients'));
        const clients = !steps && card({ title: t('ov.connect'), actions: more }, connect());
        fill(rest, parts.figures.el, h('div', { class: 'cols' }, parts.traffic.el, clients),
          h('div', { class: 'cols' }, parts.recent.el, parts.pool.el));
        parts.figures.update();
        parts.recent.update();
        refresh();
      }
      parts?.pool.update();
    };
    fill(root, h('div', { class: 'stack' }, top.el, bad.el, first, rest));
    // They stay until dismissed, or until a client of the person's own has called.
    if (pref('first') !== 'done' && !get('firstRun').clientSeen) fill(first, (steps = firstRun(over)).el);
    const offs = [...['accounts', 'routing', 'notices'].map((slice) => on(slice, all)),
      on('login', (told) => steps?.onlogin(told)), on('recent', () => parts?.recent.update()),
      on('today', () => parts?.figures.update()), on('usage', (told) => parts?.traffic.minute(told?.minute))];
    all();
    const add = button(t('acc.add'), { icon: 'plus', kind: steps ? 'default' : 'primary', href: '#/accounts/add' });
    const rows = { list: () => [...(parts?.recent.list.children || [])] };
    return { primary: add, refresh, rows, unmount: () => offs.forEach((off) => off()) };
  },
};
