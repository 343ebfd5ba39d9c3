// Is it working, who is serving, what needs me.
import * as api from '../api.js';
import { sparkline, stacked, legend } from '../charts.js';
import { announce, fill, h, icon, keyed, text } from '../dom.js';
import { ago, at, clock, compact, duration, exact, now, num, percent, ticking, timeEl, wait, zone } from '../format.js';
import { known, plural, pref, setPref, t } from '../i18n.js';
import { activate } from '../palette.js';
import { go, hash } from '../router.js';
import { accountOf, get, nameOf, on } from '../store.js';
import { busy, button, card, copyButton, details, empty, errorPanel, fail, iconButton, menu, meter, pill, segmented, tag,
  wording } from '../ui.js';

const HOUR = 3600000;
const RANGES = { '1h': [HOUR, 'minute'], '24h': [24 * HOUR, 'hour'], '7d': [168 * HOUR, 'hour'] };
const BROKEN = ['login_rejected', 'auth_error', 'expired'];
const why = (code) => (known(`reason.${code}`) ? t(`reason.${code}`) : t('reason.other'));
const reset = (account) => Math.min(...(account.quota?.windows || []).map((one) => one.resetsAt || Infinity), Infinity);
const least = (account) => {
  const all = (account.quota?.windows || []).map((one) => one.remainingPercent);
  return all.length ? t('quota.left', { p: Math.min(...all) }) : t('quota.none');
};

// -- now serving

function hero() {
  const el = h('section', { class: 'card hero', 'aria-label': t('hero.now') });
  const choose = (event) => menu(event.currentTarget, get('accounts').map((one) => ({
    icon: one.active ? 'check' : 'accounts', label: `${nameOf(one)} · ${least(one)}`, run: () => activate(one),
  })));
  const read = (account) => iconButton('refresh', account.quota?.capturedAt
    ? t('hero.read', { ago: ago(account.quota.capturedAt) }) : t('hero.readNever'),
  () => api.send('POST', `/accounts/${account.id}/refresh-quota`));
  let shown = '', patch = () => {};

  function build(account) {
    const state = h('span'), main = h('span', { class: 'row' }), windows = account.quota?.windows || [];
    const meters = (windows.length ? windows.slice(0, 2) : [null]).map((one) => meter(one, { big: true }));
    const extra = h('div', { class: 'extra' }), line = h('ol', { class: 'queue' }), auto = h('span', { class: 'note' });
    const skipped = h('div', { class: 'skipped' }), fresh = h('span');
    fill(el, h('div', { class: 'who' },
      h('h2', { class: 'live' }, h('i'), t('hero.now')),
      h('p', { class: 'name', title: account.email }, h('a', { href: hash('accounts', [account.id]) }, nameOf(account))),
      h('p', { class: 'row' }, tag(account.plan), state, h('span', { class: 'role' }, 'API')),
      h('p', { class: 'row' }, button(t('hero.switch'), { icon: 'switch', on: choose }), fresh)),
    meters.map((one) => h('div', { class: 'part' }, one, one === meters.at(-1) && extra)),
    h('div', { class: 'part next' }, h('div', { class: 'over' }, h('h2', null, t('hero.next')), auto), line, skipped), main);
    main.remove();
    return (same) => {
      const { quota } = same, trusted = quota?.trusted !== false && !BROKEN.includes(same.status);
      fill(state, pill(same));
      fill(fresh, read(same));
      meters.forEach((one, i) => one.patch(quota?.windows?.[i], { big: true, trusted, at: quota?.capturedAt }));
      const more = [...(quota?.windows || []).slice(2), ...(quota?.extra || [])];
      if (!more.length) fill(extra);
      else if (extra.childElementCount === 0) {
        fill(extra, details(plural('quota.more', more.length), more.map((one) => meter(one, { trusted }))));
      }
    };
  }

  function queue() {
    const { queue: next = [], skipped = [], autoSwitch } = get('routing');
    const line = el.querySelector('.queue');
    if (!line) return;
    text(el.querySelector('.next .note'), autoSwitch ? t('hero.autoOn') : t('hero.autoOff'));
    fill(line, next.slice(0, 3).map(({ id, reason }) => [accountOf(id), reason]).filter(([one]) => one).map(([one, reason]) => h('li',
      { title: why(reason) }, h('a', { href: hash('accounts', [one.id]), title: one.email }, nameOf(one)), tag(one.plan),
      h('b', null, least(one)))), !next.length && h('li', { class: 'note' }, t('hero.queueNone')));
    const list = skipped.map(({ id, reason, until }) => ({ name: nameOf(accountOf(id)), why: why(reason), t: until && at(until) }));
    fill(el.querySelector('.skipped'), list.length > 0 && details(plural('hero.skipped', list.length),
      h('ul', null, list.slice(0, 8).map((one) => h('li', null, t(one.t ? 'hero.skippedUntil' : 'hero.skippedOne', one))))));
  }

  function update() {
    const account = accountOf(get('routing').activeId) || get('accounts').find((one) => one.active);
    const key = account ? `${account.id} ${account.quota?.windows?.length} ${nameOf(account)} ${account.plan}` : '';
    if (!account) {
      fill(el, h('div', { class: 'who' }, h('h2', null, t('hero.none')), h('p', { class: 'note' }, t('hero.noneText')),
        get('accounts').length > 0 && button(t('hero.switch'), { icon: 'switch', on: choose })));
    } else if (key !== shown) patch = build(account);
    shown = key;
    if (account) patch(account);
    queue();
  }
  return { el, update };
}

// -- what needs me

/** One sentence and one action for each notice; what the accounts say of themselves counts too. */
function notices() {
  const el = h('div', { class: 'notices' });
  const item = ({ words, level, action }) => h('div', { class: `notice ${level === 'error' ? 'bad' : level}` },
    icon(level === 'info' ? 'info' : 'warn'), h('p', null, words), action);
  const own = () => get('accounts').filter((one) => BROKEN.includes(one.status)).map((one) => ({ level: 'warn',
    code: one.status, params: { id: one.id }, action: { kind: 'login', accountId: one.id } }));
  const update = () => {
    const told = get('notices'), seen = new Set(told.map((one) => one.params?.id).filter(Boolean));
    const all = [...told, ...own().filter((one) => !seen.has(one.params.id))].map((one) => {
      const key = `notice.${one.code}`, params = { ...one.params, name: nameOf(accountOf(one.params?.id)) || '?' };
      if (params.until) params.t = at(params.until);
      return { level: one.level, words: known(key) ? t(key, params) : one.message || one.code,
        action: one.action?.kind === 'login' && button(t('login.again'),
          { href: hash('accounts', ['add', 'browser'], { account: one.action.accountId }) }) };
    });
    const order = ['error', 'warn', 'info'];
    all.sort((a, b) => order.indexOf(a.level) - order.indexOf(b.level));
    fill(el, all.slice(0, 2).map(item), all.length > 2
      && h('a', { class: 'note', href: hash('accounts', [], { status: 'action' }) }, plural('ov.more', all.length - 2)));
  };
  return { el, update };
}

// -- figures and traffic

function figures() {
  const tile = (key) => {
    const value = h('b'), note = h('span', { class: 'note' }), chart = h('span');
    return { el: h('div', { class: 'card figure' }, h('span', { class: 'name' }, t(key)), value, note, chart), value, note, chart, key };
  };
  const [requests, tokens, first, failures] = ['fig.requests', 'fig.tokens', 'fig.first', 'fig.failures'].map(tile);
  const put = (one, value, title, note) => { text(one.value, value); one.value.title = title; text(one.note, note); };
  const update = () => {
    const today = get('today'), count = today.requestCount || 0;
    const tokenNote = today.unknownTokenCount ? plural('fig.unknown', today.unknownTokenCount)
      : today.inputTokens ? t('fig.cached', { p: percent((today.cachedInputTokens || 0) / today.inputTokens * 100) }) : t('fig.noneYet');
    put(requests, compact(count), num(count), t('fig.okFailed', { ok: num(today.successCount || 0), failed: num(today.failureCount || 0) }));
    put(tokens, compact(today.totalTokens || 0), num(today.totalTokens || 0), tokenNote);
    put(first, today.firstTokenMedianMs ? duration(today.firstTokenMedianMs) : '–', '',
      today.p95DurationMs ? t('fig.p95', { d: duration(today.p95DurationMs) }) : t('fig.noneYet'));
    put(failures, compact(today.failureCount || 0), num(today.failureCount || 0),
      count ? t('fig.failedPart', { p: percent((today.failureCount || 0) / count * 100) }) : t('fig.noneYet'));
  };
  const spark = (one, values) => fill(one.chart, values.some(Boolean) && sparkline(values, t('fig.perHour', { name: t(one.key) })));
  const refresh = async () => {
    const query = { from: now() - 24 * HOUR, bucket: 'hour', tz: zone() };
    const [calls, used] = await Promise.all([api.get('/usage/series', { ...query, measure: 'requests', by: 'result' }),
      api.get('/usage/series', { ...query, measure: 'tokens', by: 'model' })]);
    const failed = calls.keys.findIndex((one) => one.key === 'failed'), sum = (list) => list.reduce((all, n) => all + n, 0);
    spark(requests, calls.points.map((one) => sum(one.v)));
    spark(failures, calls.points.map((one) => (failed < 0 ? 0 : one.v[failed])));
    spark(tokens, used.points.map((one) => sum(one.v)));
  };
  return { el: h('div', { class: 'figures' }, requests.el, tokens.el, first.el, failures.el), update, refresh };
}

function traffic() {
  let range = pref('traffic', '1h'), data = null, chart = null;
  const keys = () => [{ key: 'ok', label: t('res.ok'), colour: 'ok' }, { key: 'failed', label: t('res.failed'), colour: 'bad' },
    { key: 'other', label: t('res.cancelled'), colour: 'c5' }];
  const place = h('div');
  const el = card({ title: t('traffic.title'), class: 'traffic', note: legend(keys()), actions: segmented(t('traffic.range'),
    Object.keys(RANGES).map((one) => [one, t(`traffic.${one}`)]), range, (one) => { range = one; setPref('traffic', one); refresh(); }) }, place);
  const draw = () => {
    const sums = data.points.reduce((all, one) => all.map((n, i) => n + one.v[i]), [0, 0, 0]);
    const summary = t('traffic.sum', { n: num(sums[0] + sums[1] + sums[2]), f: num(sums[1]) });
    if (chart) chart.update({ ...data, summary });
    else fill(place, chart = stacked({ ...data, summary }));
  };
  async function refresh() {
    const [length, bucket] = RANGES[range];
    try {
      const got = await api.get('/usage/series', { from: now() - length, bucket, measure: 'requests', by: 'result', tz: zone() });
      const of = (name) => got.keys.findIndex((one) => one.key === name);
      const [ok, failed] = [of('ok'), of('failed')];
      const points = got.points.map(({ t: start, v }) => ({ t: start, v: [v[ok] || 0, v[failed] || 0,
        v.reduce((sum, n, i) => sum + (i === ok || i === failed ? 0 : n), 0)] }));
      data = { points, keys: keys(), bucketMs: got.bucketMs };
      draw();
    } catch (error) {
      if (!data) fill(place, errorPanel(error, refresh));
    }
  }
  /** The minute that is running, from the event stream. */
  const minute = (one) => {
    if (!one || range !== '1h' || !data) return;
    const same = data.points.find((point) => point.t === one.t);
    if (same) [same.v[0], same.v[1]] = [one.ok, one.failed];
    else data.points = [...data.points.slice(-59), { t: one.t, v: [one.ok, one.failed, 0] }];
    draw();
  };
  return { el, refresh, minute };
}

// -- lists

function recent() {
  const list = h('tbody'), none = h('div');
  const table = h('table', { class: 'rows' }, h('caption', { class: 'vh' }, t('ov.recent')), list);
  const patch = (row, one) => {
    const [when, status, what, model, took] = row.children;
    when.firstChild.href = hash('log', [one.id]);
    fill(status, h('span', { class: `code ${one.result}` }, one.result === 'running' ? t('res.running') : one.status || t(`res.${one.result}`)));
    text(what, one.endpoint);
    text(model, one.model || '–');
    model.title = one.model || '';
    text(took, one.durationMs ? duration(one.durationMs) : '');
    row.className = one.result;
  };
  const make = (one) => {
    const link = h('a', { href: hash('log', [one.id]) }, h('time', { title: exact(one.at) }, clock(one.at)));
    const row = h('tr', { on: { click: (event) => { if (!event.target.closest('a')) go(hash('log', [one.id])); } } },
      h('td', null, link), h('td'), h('td', { class: 'name' }), h('td', { class: 'name' }), h('td', { class: 'num' }));
    patch(row, one);
    return row;
  };
  const update = () => {
    const rows = get('recent').slice(0, 5);
    keyed(list, rows, (one) => one.id, make, patch);
    table.hidden = !rows.length;
    fill(none, !rows.length && empty('log', t('ov.noRequests')));
  };
  const el = card({ title: t('ov.recent'), class: 'flush', actions: h('a', { href: '#/log' }, t('ov.openLog')) }, table, none);
  return { el, update };
}

function pool() {
  const list = h('ul', { class: 'pool' }), count = h('span', { class: 'note' });
  const el = card({ title: t('ov.pool'), class: 'flush', note: count, actions: h('a', { href: '#/accounts' }, t('ov.all')) }, list);
  const item = (one) => {
    const back = one.statusParams?.until || (reset(one) < Infinity ? reset(one) : 0);
    const time = h('span', { class: 'note', title: back ? exact(back) : '' });
    if (back) ticking(time, back, () => t(one.status === 'empty' ? 'ov.backIn' : 'quota.resetsIn', { d: wait(back - now()) }));
    return h('li', null, h('a', { href: hash('accounts', [one.id]), title: one.email }, nameOf(one)), tag(one.plan), pill(one),
      h('b', null, least(one)), time);
  };
  const update = () => {
    const all = get('accounts');
    text(count, t('ov.poolNote', { n: num(all.length) }));
    fill(list, [...all].sort((a, b) => reset(a) - reset(b)).slice(0, 5).map(item));
  };
  return { el, update };
}

// -- the first three steps

let flow = null, answer = null;

function firstRun() {
  const number = (n) => h('span', { class: 'step' }, n), body = [1, 2, 3].map(() => h('div', { class: 'doing' }));
  const el = card({ title: t('first.title'), class: 'first', actions: button(t('first.dismiss'), { kind: 'ghost',
    on: () => { setPref('first', 'done'); el.remove(); } }) },
  h('ol', null, ['first.signIn', 'first.try', 'first.connect'].map((key, i) => h('li', null, number(i + 1),
    h('h3', null, t(key)), body[i]))));
  const usable = () => get('accounts').length > 0;

  const begin = async () => {
    flow = await api.send('POST', '/login', { method: 'browser' });
    signIn();
  };
  const opened = () => { api.send('POST', `/login/${flow.flowId}/open`).then((now) => { flow = { ...flow, ...now, opened: true }; signIn(); }, fail); };

  function signIn() {
    const [place] = body, done = flow?.status === 'done' ? flow.account : get('accounts')[0];
    el.querySelectorAll('li')[0].classList.toggle('done', usable());
    if (usable()) return fill(place, h('p', { class: 'good' }, icon('check'), nameOf(done), ' ', tag(done?.plan)));
    const others = h('p', { class: 'note' }, t('first.other'), ' ', h('a', { href: '#/accounts/add/device' }, t('first.device')), ' · ',
      h('a', { href: '#/accounts/add/import' }, t('first.import')));
    if (!flow) return fill(place, h('p', { class: 'note' }, t('ui.loading')), others);
    if (['failed', 'expired', 'cancelled'].includes(flow.status) || flow.expiresAt < now()) {
      return fill(place, h('p', { class: 'wrong' }, icon('warn'), flow.error ? wording(flow.error) : t('first.expired')),
        button(t('first.newLink'), { kind: 'primary', on: begin }), others);
    }
    const left = ticking(h('span', { class: 'note' }), flow.expiresAt, () => t('first.left', { d: wait(flow.expiresAt - now()) }));
    return fill(place, h('p', null, t('first.signInText')), h('p', { class: 'row' }, button(t('login.open'), { icon: 'external',
      kind: 'primary', href: flow.authorizeUrl, target: '_blank', rel: 'noopener noreferrer', on: opened }),
    flow.opened && h('span', { class: 'spin' }), flow.opened ? [h('span', { role: 'status' }, t('login.waiting')), left] : null,
    copyButton(() => { opened(); return flow.authorizeUrl; })),
    flow.listenError && h('p', { class: 'wrong' }, t('err.port_in_use')), others);
  }

  const test = async () => {
    const began = performance.now(), shown = h('p', { class: 'answer' }), note = h('span', { class: 'note' }, t('first.streaming'));
    fill(body[1], shown, note);
    try {
      await api.stream('/playground', { path: '/v1/responses', accountId: null, body: { model: get('defaultModel'), input: 'Say OK', stream: true } }, {
        onevent: ({ event, data }) => {
          if (event === 'response.output_text.delta') shown.append(JSON.parse(data).delta);
          if (event === 'response.failed' || event === 'error') throw new api.ApiError(200, JSON.parse(data).response?.error || JSON.parse(data));
        } });
      answer = { words: shown.textContent, ms: performance.now() - began };
      announce(answer.words);
    } catch (error) {
      answer = { error };
    }
    tryIt();
  };

  function tryIt() {
    const row = el.querySelectorAll('li')[1];
    row.classList.toggle('locked', !usable());
    row.classList.toggle('done', Boolean(answer?.words));
    if (!usable()) return fill(body[1], h('p', { class: 'note' }, t('first.tryLocked')));
    const go = button(t('play.test'), { icon: 'play', kind: answer?.words ? 'default' : 'primary', on: test });
    return fill(body[1], h('p', { class: 'row' }, go, h('span', { class: 'note' }, t('first.tryText', { model: get('defaultModel') }))),
      answer?.words !== undefined && h('p', { class: 'answer' }, answer.words), answer?.ms && h('p', { class: 'good' }, icon('check'),
        t('first.done', { d: duration(answer.ms) })), answer?.error && h('p', { class: 'wrong' }, icon('warn'), wording(answer.error)));
  }
  const onlogin = (now) => {
    if (!now || now.flowId !== flow?.flowId) return;
    flow = { ...flow, ...now };
    signIn();
  };
  const update = () => { signIn(); tryIt(); };
  fill(body[2], connectBody());
  if (!usable() && !flow) begin().catch((error) => fill(body[0], errorPanel(error, begin)));
  return { el, update, onlogin };
}

// -- connect

function connectBody() {
  const line = (name, value, note) => h('div', { class: 'copyline' }, h('span', { class: 'name' }, name), h('code', { title: value }, value),
    note && h('span', { class: 'note' }, note), copyButton(value, '', { kind: 'ghost square', 'aria-label': `${t('act.copy')}: ${name}` }));
  const needs = get('gateway').keys > 0;
  return h('div', { class: 'copylines' }, line(t('shell.base'), get('gateway').baseUrl || ''),
    line(t('ov.key'), 'local', needs ? t('ov.needKey') : t('ov.anyKey')), line(t('ov.model'), get('defaultModel') || ''));
}

function connect() {
  return card({ title: t('ov.connect'), class: 'connect', actions: h('a', { href: '#/connect' }, t('ov.moreClients')) }, connectBody());
}

export const page = {
  title: 'nav.overview',
  mount(root) {
    const top = hero(), bad = notices(), first = h('div'), rest = h('div', { class: 'stack' });
    const offs = [];
    let steps = null, parts = null;
    const wanted = () => pref('first') !== 'done' && !get('firstRun').clientSeen && !get('firstRun').hasCalled;
    const begin = wanted();
    const body = () => {
      if (parts || (!get('accounts').length && begin)) return;
      parts = { figures: figures(), traffic: traffic(), recent: recent(), pool: pool() };
      fill(rest, parts.figures.el, h('div', { class: 'cols' }, parts.traffic.el, connect()), h('div', { class: 'cols' }, parts.recent.el, parts.pool.el));
      parts.figures.update();
      parts.recent.update();
      parts.pool.update();
      refresh();
    };
    const refresh = () => {
      parts?.traffic.refresh();
      parts?.figures.refresh().catch(() => {});
    };
    fill(root, h('div', { class: 'stack' }, top.el, bad.el, first, rest));
    if (begin) fill(first, (steps = firstRun()).el);
    const all = () => { top.update(); bad.update(); steps?.update(); parts?.pool.update(); body(); };
    for (const slice of ['accounts', 'routing', 'notices']) offs.push(on(slice, all));
    offs.push(on('recent', () => parts?.recent.update()), on('today', () => parts?.figures.update()),
      on('usage', (now) => parts?.traffic.minute(now?.minute)), on('login', (now) => steps?.onlogin(now)));
    all();
    return { refresh, unmount: () => offs.forEach((off) => off()) };
  },
};
