// The request log (console.md 5.6): what happened, as it happens, and why.
import { download, get, send } from '../api.js';
import { asCall } from '../calls.js';
import { timingRows, waterfall } from '../charts.js';
import { fill, h, icon, keyed, text } from '../dom.js';
import { bytes, clock, compact, duration, exact, now, num } from '../format.js';
import { known, plural, t } from '../i18n.js';
import { current, go, hash, setQuery } from '../router.js';
import { accountOf, nameOf, store } from '../store.js';
import * as ui from '../ui.js';
import { fixButtons, verdict } from '../why.js';

const FIRST_ROWS = 100, MORE_ROWS = 300, TYPING_MS = 200, AT_TOP_PX = 160, FAILURES_MAX = 500;
const RANGES = { '1h': 3_600_000, '24h': 86_400_000, '7d': 604_800_000 };
/** A filter in the address -> the member of a row. */
const FIELDS = { result: 'result', endpoint: 'endpoint', model: 'model', account: 'accountId', client: 'client',
  errorType: 'errorType', status: 'status' };
const SELECTS = ['endpoint', 'model', 'account', 'client', 'errorType', 'range'];
const RESULTS = ['ok', 'failed', 'cancelled', 'running'], SEARCHED = ['id', 'model', 'client', 'endpoint', 'errorType'];
const HEADS = ['time', 'result', 'endpoint', 'model', 'account', 'tokens', 'took', 'client'];
let view = null;

const filtersOf = (query) => Object.fromEntries([...Object.keys(FIELDS), 'range', 'q'].map((name) => [name, query[name]]));
const asked = ({ range, ...query }, more) => ({ ...query, since: RANGES[range] && Math.round(now() - RANGES[range]), ...more });
const fits = (row, query) => Object.entries(FIELDS).every(([name, own]) => !query[name] || String(row[own]) === query[name])
  && SEARCHED.map((name) => row[name]).join(' ').toLowerCase().includes((query.q ?? '').toLowerCase());
const accountText = ({ accountId, account }) => nameOf(accountOf(accountId)) || (account ?? '–');

// -- The table

const shown = new WeakMap();
const state = ({ result, status }) => h('span', { class: `code ${result}`, title: t(`log.${result}`) },
  status && result !== 'running' ? status : t(`log.${result}`));

function patchRow(el, row) {
  if (shown.get(el) === row) return el;
  const { durationMs: whole, firstTokenMs: first, tokens, attempts } = row;
  shown.set(el, row);
  el.dataset.result = row.result;
  while (el.children.length > 1) el.lastChild.remove(); // the first holds the link, and perhaps the focus
  el.append(...[[state(row)], [row.endpoint], [row.model], [accountText(row), attempts > 1 && h('span', { class: 'tag' }, `×${attempts}`)],
    [compact(tokens?.total)], [first && h('span', { class: 'mini', vars: { '--v': `${(first / whole) * 100}%` } }),
      duration(whole)], [row.client]].map((one, at) => h('td', { class: at === 4 || at === 5 ? 'num' : null }, one)));
  el.children[6].title = first ? t('play.first', { d: duration(first) }) : '';
  return el;
}

function makeRow(row) {
  const link = h('a', { href: hash('log', [row.id], current().query), title: exact(row.at) }, clock(row.at));
  return patchRow(h('tr', { on: { click: (event) => event.target !== link && link.click() } }, h('td', null, link)), row);
}

function paint() {
  const { rows, waiting, loaded, query } = view;
  keyed(view.body, rows, (row) => row.id, makeRow, patchRow);
  view.more.hidden = !view.next;
  view.table.hidden = !rows.length;
  fill(view.note, loaded && !rows.length && (Object.values(query).some(Boolean)
    ? ui.empty('search', t('ui.nothing'), ui.button(t('act.clearFilters'), { href: hash('log') }))
    : ui.empty('log', t('log.none'), ui.button(t('nav.connect'), { kind: 'primary', href: hash('connect') }))));
  view.fresh.hidden = !waiting.length;
  text(view.fresh.querySelector('.label'), plural('log.new', waiting.length));
}

async function load(more = false) {
  const { query, next } = view;
  try {
    const page = await get('/requests', asked(query, more ? { limit: MORE_ROWS, before: next } : { limit: FIRST_ROWS }));
    if (view?.query !== query) return;
    const { items, ...rest } = page;
    Object.assign(view, rest, { rows: [...(more ? view.rows : []), ...items], loaded: true, waiting: more ? view.waiting : [] });
    paint();
    paintFilters();
  } catch (error) {
    if (view) fill(view.note, ui.errorPanel(error, () => load(more)));
  }
}

/** A row that began or ended: known ones change in place, new ones wait while someone reads. */
function saw({ row }) {
  const wanted = fits(row, view.query) ? [row] : [];
  for (const list of [view.rows, view.waiting]) {
    const at = list.findIndex((one) => one.id === row.id);
    if (at >= 0) return list.splice(at, 1, ...wanted);
  }
  return view.waiting.push(...wanted);
}

function letIn(all = false) {
  const reads = view.hovers || view.sheet || scrollY > AT_TOP_PX || view.body.contains(document.activeElement);
  if (view.waiting.length && (all || !reads)) {
    const most = Math.max(FIRST_ROWS, view.rows.length), all = [...view.waiting.splice(0), ...view.rows].sort((a, b) => b.at - a.at);
    view.rows = all.slice(0, most);
    if (all.length > most) view.next = view.rows.at(-1).id; // the page does not grow with what it lets in
  }
  paint();
}

// -- The filters

function paintFilters() {
  const { query, facets = {}, filters } = view, held = filters.contains(document.activeElement) && document.activeElement.ariaLabel;
  const options = { ...facets, account: store.get('accounts').map((one) => [one.id, nameOf(one)]),
    range: Object.keys(RANGES).map((one) => [one, t(`log.range.${one}`)]) };
  fill(filters, SELECTS.map((name) => {
    const found = (options[name] ?? []).filter((one) => one !== '-').map((one) => [one].flat());
    const all = [['', t(`log.by.${name}`)], ...found.map(([one, words = one]) => [one, words])], chosen = query[name] ?? '';
    if (!all.some(([one]) => one === chosen)) all.push([chosen, chosen]);
    return ui.select(t(`log.by.${name}`), all, chosen, (value) => setQuery({ [name]: value }));
  }));
  if (held) [...filters.querySelectorAll('select')].find((one) => one.ariaLabel === held)?.focus();
  view.results.patch([['', t('log.all')], ...RESULTS.map((one) => [one, t(`log.${one}`)])], query.result ?? '');
}

async function clear() {
  const { kept } = await get('/requests', { limit: 1 }), body = plural('log.clearBody', kept);
  if (!(await ui.confirm({ title: t('log.clear'), body, action: t('log.clearDo'), danger: true }))) return;
  const { deleted } = await send('DELETE', '/requests');
  ui.toast(plural('log.cleared', deleted));
  load();
}

// -- One request

const about = (facts) => h('dl', { class: 'about' }, Object.entries(facts).filter(([, one]) => one !== null && one !== undefined
  && one.length !== 0).map(([name, one]) => h('div', null, h('dt', null, known(`log.f.${name}`) ? t(`log.f.${name}`) : name),
  h('dd', null, name === 'bytes' ? bytes(one) : typeof one === 'number' ? num(one) : [one].flat().join(', ')))));

function attempt(one) {
  const isGood = one.status < 400 && !one.errorType, account = accountOf(one.accountId), then = `log.then.${one.action}`;
  return h('li', null, h('b', null, one.n), account ? h('a', { href: hash('accounts', [account.id]) }, nameOf(account)) : one.account,
    h('span', { class: `pill ${isGood ? 'ok' : 'bad'}` }, icon(isGood ? 'check' : 'cross'), one.status),
    h('span', { class: 'note' }, [one.errorType, one.message, duration(one.durationMs)].filter(Boolean).join(' · ')),
    !isGood && known(then) && h('span', { class: 'then' }, t(then)));
}

/** The call as text. What was asked is not kept: a sentence stands in for it. */
function likeIt({ endpoint, model, stream }) {
  const content = t('log.prompt');
  const body = endpoint.includes('images') ? { prompt: content } : endpoint.endsWith('completions')
    ? { model, stream, messages: [{ role: 'user', content }] } : { model, stream, input: content };
  return asCall('curl', { path: endpoint, body: endpoint.endsWith('models') ? {} : body }, store.get('gateway').baseUrl);
}

function whole(row) {
  const { tokens, id } = row, steps = timingRows(row.timing ?? {}), asText = JSON.stringify(row, null, 2);
  const section = (name, ...inside) => h('section', null, h('h3', null, t(`log.${name}`)), inside);
  const counts = tokens && Object.fromEntries(Object.entries(tokens).map(([name, n]) => [name, num(n)]));
  return [h('p', { class: 'verdict' }, verdict(row)), h('div', { class: 'row' }, fixButtons(row)),
    row.attemptList?.length > 0 && section('attempts', h('ol', { class: 'attempts' }, row.attemptList.map(attempt))),
    steps.length > 0 && section('timing', waterfall(steps)),
    section('tokens', h('p', null, tokens ? t('log.tokenLine', counts) : t('usage.unknown'))),
    section('about', about({ at: exact(row.at), model: row.model, requestedModel: row.requestedModel === row.model ? null : row.requestedModel,
      account: accountText(row), client: row.client, remote: row.remote, keyId: row.keyId, errorType: row.errorType,
      imageRoute: row.imageRoute === 'none' ? null : row.imageRoute, upstreamRequestId: row.upstreamRequestId })),
    ['request', 'response', 'headers'].filter((name) => Object.keys(row[name] ?? {}).length)
      .map((name) => ui.details(t(`log.${name}`), about(row[name]))),
    h('div', { class: 'row' }, ui.copyButton(() => likeIt(row), t('log.asCurl')), ui.copyButton(asText, t('fix.copy_details')),
      ui.copyButton(id, id, { kind: 'ghost mono' }))];
}

/** The failures beside it: the next newer one and the next older one, where there are such. */
async function neighbours({ id, at }) {
  const [older, newer] = await Promise.all([{ before: id, limit: 1 }, { since: at, limit: FAILURES_MAX }].map((more) => (
    get('/requests', { result: 'failed', ...more }))));
  return { newer: newer.items.filter((one) => one.id !== id).at(-1), older: older.items[0] };
}

async function show(id) {
  view.sheet ??= ui.dialog({ title: t('log.one'), body: ui.skeleton(4), sheet: true, onclose: () => {
    if (view) view.sheet = null;
    if (current().page === 'log' && current().parts.length) go(hash('log', [], current().query));
  } });
  const { el, body } = view.sheet, isShown = () => view?.sheet && current().parts[0] === id;
  try {
    const row = await get(`/requests/${encodeURIComponent(id)}`), beside = h('div', { class: 'row' });
    if (!isShown()) return;
    text(el.querySelector('h2'), `${row.result === 'running' ? t('log.running') : row.status} · ${row.method} ${row.endpoint}`);
    fill(body, whole(row), beside);
    const found = await neighbours(row);
    fill(beside, Object.entries(found).map(([name, one]) => one && ui.button(t(`log.${name}`), { icon: name === 'newer' ? 'left' : 'right',
      kind: 'ghost', href: hash('log', [one.id], current().query) })));
  } catch (error) {
    const row = view?.rows.find((one) => one.id === id); // one that runs is not in the log yet
    if (isShown()) fill(body, row ? whole(row) : ui.errorPanel(error, () => show(id)));
  }
}

// -- The page

function mount(root, { route }) {
  const search = h('input', { type: 'search', placeholder: t('log.search'), 'aria-label': t('log.search'), value: route.query.q, on: { input: () => {
    clearTimeout(view.typing);
    view.typing = setTimeout(() => setQuery({ q: search.value }), TYPING_MS);
  } } });
  const others = ui.iconButton('more', t('nav.more'), () => { ui.menu(others, [
    { label: t('log.export'), icon: 'download', run: () => download('/requests/export', asked(view.query), 'GET') },
    { label: t('log.clear'), icon: 'trash', danger: true, run: clear }]); });
  view = { query: null, rows: [], waiting: [], body: h('tbody'), note: h('div', null, ui.skeleton(8)), filters: h('div', { class: 'filters' }),
    results: ui.chips(t('log.result'), [], '', (result) => setQuery({ result })), more: ui.button(t('log.more'), { hidden: true, on: () => load(true) }),
    fresh: ui.button('–', { kind: 'primary small', icon: 'up', hidden: true, on: () => { scrollTo(0, 0); letIn(true); } }) };
  view.table = h('table', { hidden: true }, h('thead', null, h('tr', null, HEADS.map((name) => h('th', { scope: 'col',
    class: name === 'tokens' || name === 'took' ? 'num' : null }, t(`log.h.${name}`))))), view.body);
  const rows = h('div', { class: 'card rows' }, h('div', { class: 'fresh' }, view.fresh), view.table, view.note);
  for (const [type, is] of [['pointerenter', true], ['pointerleave', false]]) {
    rows.addEventListener(type, () => { view.hovers = is; letIn(); });
  }
  fill(root, h('div', { class: 'log' }, h('div', { class: 'log-head' }, view.results, search, others), view.filters,
    rows, view.more));
  const end = new IntersectionObserver(([one]) => one.isIntersecting && view.next && load(true), { rootMargin: '400px' });
  end.observe(view.more);
  const off = [store.on('request', (value, changes) => { changes.forEach(saw); letIn(); }), store.on('accounts', paintFilters),
    // All of the state came anew: events were missed.
    store.on('recent', (value, changes) => { if (view.loaded && changes.some(Array.isArray)) load(); })];
  return {
    primary: null, search, refresh: () => load(), rows: { list: () => [...view.body.rows] },
    update({ parts, query }) {
      const wanted = filtersOf(query);
      if (JSON.stringify(view.query) !== JSON.stringify(wanted)) {
        view.query = wanted;
        if (search !== document.activeElement) search.value = query.q ?? '';
        paintFilters();
        load();
      }
      if (parts[0]) show(parts[0]);
      else view.sheet?.close();
    },
    unmount() {
      clearTimeout(view.typing);
      end.disconnect();
      for (const one of off) one();
      const { sheet } = view;
      view = null;
      sheet?.close();
    },
  };
}

export const page = { title: 'nav.log', mount };
