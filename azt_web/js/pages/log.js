// The request log (console.md 5.6): what happened, as it happens, and why.
import { download, get, send } from '../api.js';
import { asCall, callOf, ENDPOINTS, modeOf } from '../calls.js';
import { timingRows, waterfall } from '../charts.js';
import { fill, h, keyed, text } from '../dom.js';
import { bytes, clock, compact, duration, exact, now, num } from '../format.js';
import { known, plural, t } from '../i18n.js';
import { current, go, hash, setQuery } from '../router.js';
import { accountOf, nameOf, store } from '../store.js';
import * as ui from '../ui.js';
import { fixButtons, verdict } from '../why.js';

const FIRST_ROWS = 100, MORE_ROWS = 300, AT_TOP_PX = 160, RESULTS = ['', 'ok', 'failed', 'cancelled', 'running'];
const RANGES = { '1h': 3_600_000, '24h': 86_400_000, '7d': 604_800_000 }, SEARCHED = ['id', 'model', 'client',
  'endpoint', 'errorType'], SELECTS = ['endpoint', 'model', 'account', 'client', 'errorType', 'range'];
const HEADS = ['time', 'result', 'endpoint', 'model', 'account', 'tokens', 'took', 'client'];

const asked = ({ range, ...query }) => ({ ...query, since: RANGES[range] && Math.round(now() - RANGES[range]) });
const accountText = ({ accountId, account }) => nameOf(accountOf(accountId)) || (account ?? '–');
const codeOf = ({ result, status }) => (result !== 'running' && status) || t(`log.${result}`);
const fits = (row, { q = '', account, ...query }) => (!account || row.accountId === account)
  && SEARCHED.some((name) => row[name]?.toLowerCase().includes(q.toLowerCase()))
  && Object.entries(query).every(([name, wanted]) => !(name in row) || String(row[name]) === wanted);

// -- The rows
const kindOf = (name) => (name === 'tokens' || name === 'took' ? 'num' : null);
/** What stands behind the time, which is the link to the rest. */
function cellsOf({ result, durationMs: all, firstTokenMs: first, attempts, ...row }) {
  const title = t('play.first', { d: duration(first) }), vars = { '--v': `${(first / all) * 100}%` };
  return [h('span', { class: `code ${result}`, title: t(`log.${result}`) }, codeOf({ result, ...row })),
    row.endpoint, row.model, [accountText(row), attempts > 1 && ui.tag(`×${attempts}`)], compact(row.tokens?.total),
    [first && h('span', { class: 'mini', title, vars }), duration(all)], row.client];
}
function patchRow(el, row) {
  if (el.dataset.result !== row.result) cellsOf(row).forEach((content, at) => fill(el.cells[at + 1], content));
  el.dataset.result = row.result;
}
function makeRow({ id, at }) {
  const link = h('a', { href: hash('log', [id], current().query), title: exact(at) }, clock(at));
  const click = ({ target }) => target !== link && link.click();
  return h('tr', { on: { click } }, HEADS.map((name, column) => h('td', { class: kindOf(name) }, !column && link)));
}

// -- One request
const about = (told) => ui.facts(Object.entries(told).map(([name, one]) => [known(`log.f.${name}`) ? t(`log.f.${name}`)
  : name, name === 'bytes' ? bytes(one) : [one].flat().join(', ')]).filter(([, words]) => words));
function attempt({ n, status, errorType, message, durationMs, action, accountId, account }) {
  const isGood = status < 400 && !errorType, href = hash('accounts', [accountId]), name = nameOf(accountOf(accountId));
  return h('li', null, h('b', null, n), name ? h('a', { href }, name) : account,
    ui.badge(isGood ? ['ok', 'check'] : ['bad', 'cross'], status),
    h('span', { class: 'note' }, [errorType, message, duration(durationMs)].filter(Boolean).join(' · ')),
    !isGood && h('span', { class: 'then' }, t(`log.then.${action}`)));
}
/** The call as text. What was asked is not kept: a sentence stands in for it. */
const likeIt = ({ endpoint: path, model, stream }) => asCall('curl', { path, body: callOf(modeOf(path), { model, stream,
  text: t('log.prompt'), image: t('log.prompt') }).body }, store.get('gateway').baseUrl);
/** All that is known of it; `rows` are those beside it. */
function whole(row, rows) {
  const { id, model, requestedModel: wanted, imageRoute: route, tokens, timing = {}, attemptList: tries = [] } = row;
  const section = (name, ...inside) => h('section', null, h('h3', null, t(`log.${name}`)), inside);
  const failed = rows.filter((one) => one.result === 'failed' || one.id === id), steps = timingRows(timing);
  const at = failed.findIndex((one) => one.id === id), beside = (name, icon, one) => at >= 0 && one && ui.button(
    t(`log.${name}`), { icon, kind: 'ghost', href: hash('log', [one.id], current().query) });
  const counts = Object.fromEntries(Object.entries(tokens ?? {}).map(([name, n]) => [name, num(n)]));
  return [h('p', { class: 'verdict' }, verdict(row)), ui.row(fixButtons(row)),
    tries.length > 0 && section('attempts', h('ol', { class: 'attempts' }, tries.map(attempt))),
    steps.length > 0 && section('timing', waterfall(steps)),
    section('tokens', h('p', null, t(tokens ? 'log.tokenLine' : 'usage.unknown', counts))),
    section('about', about({ at: exact(row.at), model, requestedModel: wanted === model ? '' : wanted,
      account: accountText(row), client: row.client, remote: row.remote, keyId: row.keyId, errorType: row.errorType,
      imageRoute: route === 'none' ? '' : route, conversation: row.sessionHint, upstreamId: row.upstreamRequestId })),
    ['request', 'response', 'headers'].map((name) => Object.keys(row[name] ?? {}).length > 0
      && ui.details(t(`log.${name}`), about(row[name]))),
    ui.row(ui.copyButton(() => likeIt(row), t('log.asCurl')),
      ui.copyButton(JSON.stringify(row, null, 2), t('fix.copy_details')), ui.copyButton(id, id, { kind: 'ghost mono' }),
      beside('newer', 'up', failed[at - 1]), beside('older', 'down', failed[at + 1]))];
}
const back = ({ page, parts, query }) => page === 'log' && parts[0] && go(hash('log', [], query));
async function clear() {
  const { kept } = await get('/requests', { limit: 1 }), body = plural('log.clearBody', kept);
  if (!(await ui.confirm({ title: t('log.clear'), body, action: t('log.clearDo'), danger: true }))) return;
  const { deleted } = await send('DELETE', '/requests'); ui.toast(plural('log.cleared', deleted));
}

// -- The page
function mount(root) {
  // The newest of `rows` wait while someone reads: those that came after the one at `top`.
  let query = null, rows = [], facets = null, next = null, top = 0, most = FIRST_ROWS, reading = null, sheet = null;
  const head = h('tr', null, HEADS.map((name) => h('th', { scope: 'col', class: kindOf(name) }, t(`log.h.${name}`))));
  const body = h('tbody'), table = h('table', null, h('thead', null, head), body), note = h('div', null, ui.skeleton(8));
  const more = ui.button(t('log.more'), { on: () => load(next) });
  const fresh = ui.button('–', { kind: 'primary small', icon: 'up', on: () => { scrollTo(0, 0); paint(true); } });
  const results = ui.chips(t('log.result'), [], '', (result) => setQuery({ result }));
  const search = h('input', { type: 'search', placeholder: t('log.search'), 'aria-label': t('log.search'),
    on: { input: () => setQuery({ q: search.value }) } });
  const selects = SELECTS.map((name) => ui.select(t(`log.by.${name}`), [], '', (one) => setQuery({ [name]: one })));
  const others = ui.iconButton('more', t('nav.more'), () => { ui.menu(others, [
    { label: t('log.export'), icon: 'download', run: () => download('/requests/export', asked(query), 'GET') },
    { label: t('log.clear'), icon: 'trash', danger: true, run: () => clear().then(() => load()) }]); });
  const place = h('div', { class: 'card rows', on: { pointerleave: () => paint() } },
    h('div', { class: 'fresh' }, fresh), table, note);
  fill(root, h('div', { class: 'log' }, h('div', { class: 'log-head' }, results, search, others),
    h('div', { class: 'filters' }, selects), place, more));
  function paint(all) {
    const reads = sheet || scrollY > AT_TOP_PX || place.matches(':hover') || body.contains(document.activeElement);
    // The page does not grow with what it lets in.
    if (all || !reads) { next = rows[most] ? rows[most - 1].id : next; rows = rows.slice(0, most); top = rows[0]?.at; }
    const listed = rows.filter((row) => row.at <= top), waiting = rows.length - listed.length;
    keyed(body, listed, (row) => row.id, makeRow, patchRow);
    [table.hidden, more.hidden, fresh.hidden] = [!rows.length, !next, !waiting];
    text(fresh.querySelector('.label'), plural('log.new', waiting));
    if (facets) fill(note, !rows.length && (Object.keys(query).length
      ? ui.empty('search', t('ui.nothing'), ui.button(t('act.clearFilters'), { href: hash('log') }))
      : ui.empty('log', t('log.none'), ui.button(t('nav.connect'), { kind: 'primary', href: hash('connect') }))));
  }
  function paintFilters() {
    const said = { account: (id) => nameOf(accountOf(id)), range: (id) => t(`log.range.${id}`) }, all = { ...facets,
      endpoint: ENDPOINTS, account: store.get('accounts').map((one) => one.id), range: Object.keys(RANGES) };
    SELECTS.forEach((name, at) => {
      const chosen = query[name] ?? '', values = [...new Set(['', ...(all[name] ?? []), chosen])];
      selects[at].set(values.map((one) => [one, one ? said[name]?.(one) || one : t(`log.by.${name}`)]), chosen);
    });
    results.patch(RESULTS.map((one) => [one, t(`log.${one || 'all'}`)]), query.result ?? '');
  }
  async function load(before) {
    const how = query, fail = (error) => { fill(note, ui.errorPanel(error, () => load(before))); };
    const page = await get('/requests', { ...asked(how), before, limit: before ? MORE_ROWS : FIRST_ROWS }).catch(fail);
    if (query !== how || !page) return;
    ({ next, facets } = page); rows = before ? [...rows, ...page.items] : page.items;
    most = Math.max(FIRST_ROWS, rows.length); paint(!before); paintFilters();
  }
  /** Requests that began or ended: known ones change in place. Where all came anew, events were missed. */
  function saw(value, changes) {
    if (changes.some(Array.isArray)) { if (facets) load(); return; }
    const seen = new Map([...rows, ...changes].map((row) => [row.id, row]));
    rows = [...seen.values()].filter((row) => fits(row, query)).sort((a, b) => b.at - a.at); paint();
  }
  function show(id) {
    sheet ??= ui.dialog({ title: t('log.one'), sheet: true, onclose: () => { sheet = null; back(current()); } });
    const { el, body: inside } = sheet, own = h('div', { class: 'stack' });
    const ask = () => reading.then(() => get(`/requests/${encodeURIComponent(id)}`)).catch((error) => (
      rows.find((row) => row.id === id) ?? Promise.reject(error))); // one that still runs is not in the log yet
    fill(inside, own);
    ui.loader(own, ask, (row) => {
      text(el.querySelector('h2'), `${codeOf(row)} · ${row.method} ${row.endpoint}`); fill(own, whole(row, rows));
    });
  }
  new IntersectionObserver(([one]) => one.isIntersecting && next && load(next), { rootMargin: '400px' }).observe(more);
  const off = store.on('recent', saw), list = () => [...body.rows];
  return { search, refresh: () => load(), rows: { list },
    update({ parts: [id], query: wanted }) {
      if (JSON.stringify(query) !== JSON.stringify(wanted)) { query = wanted; paintFilters(); reading = load(); }
      if (search !== document.activeElement) search.value = query.q ?? '';
      if (id) show(id); else sheet?.close();
    },
    unmount() { off(); sheet?.close(); } };
}
export const page = { title: 'nav.log', mount };
