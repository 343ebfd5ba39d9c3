// Totals, trends and what they are made of. Days are those of the chosen zone; what was not reported is not zero.
import { download, get as fetchJson } from '../api.js';
import { legend, shareBar, stacked } from '../charts.js';
import { fill, h } from '../dom.js';
import { compact, num, now, percent, zone } from '../format.js';
import { t } from '../i18n.js';
import { hash, setQuery } from '../router.js';
import { accountOf, get, nameOf, on } from '../store.js';
import * as ui from '../ui.js';

const DAY = 86_400_000, AGAIN_MS = 10_000;
/** Range -> days before today, and the bucket of its chart. */
const RANGES = {
  today: [0, 'hour'], '7d': [6, 'hour'], '30d': [29, 'day'], '90d': [89, 'day'], process: [], all: [364, 'day'] };
const BY = { model: 'byModel', account: 'byAccount', endpoint: 'byEndpoint', client: 'bySource' };
const CHOICES = { range: Object.keys(RANGES), measure: ['tokens', 'requests', 'images'], by: Object.keys(BY) };
const FIRST = { range: '7d', measure: 'tokens', by: 'model' };
/** A figure -> the sum, and of what it is a part. */
const FIGURES = { requests: ['requestCount'], tokens: ['totalTokens'], cached: ['cachedInputTokens', 'inputTokens'],
  images: ['imageCount'], failed: ['failureCount', 'requestCount'], unknown: ['unknownTokenCount'] };

const part = (n, whole) => (whole ? percent((n / whole) * 100) : '–');
const label = (by, { key, label: told }) => (key === '_other' ? t('usage.other') : !key || key === '-'
  ? t('usage.unnamed') : (by === 'account' && nameOf(accountOf(key))) || told || key);

/** {from, bucket, tz} of a range: `from` is a day of the zone, or a time. */
function stretch(range) {
  const [days, bucket] = RANGES[range], from = get('gateway').startedAt, age = now() - from, tz = zone();
  if (!bucket) return { from, bucket: age < DAY / 8 ? 'minute' : age < 8 * DAY ? 'hour' : 'day', tz };
  return { from: new Intl.DateTimeFormat('sv-SE', { timeZone: tz }).format(now() - days * DAY), bucket, tz };
}

function figures(sums) {
  const words = Object.fromEntries(Object.entries(sums).map(([name, n]) => [name, compact(n)]));
  const tile = ([name, [sum, whole]]) => ui.figure(t(`usage.${name}`), whole ? part(sums[sum], sums[whole])
    : words[sum], t(`usage.${name}Note`, words), num(sums[sum]));
  return h('div', { class: 'figures' }, Object.entries(FIGURES).map(tile));
}

function table(title, heads, rows, none, actions) {
  const place = ui.table(rows, heads.map((name) => t(`usage.${name}`)), ['name', 'num', 'num']);
  Object.assign(place, { tabIndex: 0, role: 'group', ariaLabel: title });
  return ui.card({ title, class: 'flush', actions }, rows.length ? place : ui.empty('check', t(none)));
}
function breakdown(by, rows) {
  const whole = rows.reduce((sum, { aggregate }) => sum + aggregate.requestCount, 0);
  return table(t(`usage.by.${by}`), [by, 'requests', 'tokens', 'share'], rows.map(({ aggregate, ...row }) => {
    const { requestCount: n, totalTokens } = aggregate, title = label(by, row);
    return [h('span', { title }, title), num(n), compact(totalTokens),
      h('span', { title: part(n, whole) }, shareBar(n / whole))];
  }), 'usage.none');
}
const link = (errorType, words) => h('a', { href: hash('log', [], { result: 'failed', errorType }) }, words);
const errors = (rows) => table(t('usage.errors'), ['errors', 'requests'], rows.map(({ key, aggregate }) => (
  [link(key, key), num(aggregate.requestCount)])), 'usage.noErrors', link('', t('ov.openLog')));

function mount(root) {
  let how = FIRST, load = null, chart = null, readAt = 0, waiting = 0;
  const [tiles, plot, names, parts] = ['', '', '', 'cols'].map((name) => h('div', { class: name }));
  const [range, measure, by] = Object.entries(CHOICES).map(([name, all]) => ui.segmented(t(`usage.${name}`),
    all.map((one) => [one, t(`usage.${one}`)]), '', (value) => setQuery({ [name]: value })));
  const days = h('a', { class: 'note', href: '#/settings/general' }, t('usage.zone', { zone: zone() }));
  fill(root, h('div', { class: 'stack usage' }, ui.row(range, days), tiles,
    ui.card({ title: t('usage.trend'), note: names, actions: [measure, by] }, plot), parts));

  async function read() {
    const asked = how, { from, bucket, tz } = stretch(how.range), ofSums = how.range === 'all' ? {} : { from, tz };
    [readAt, waiting] = [Date.now(), 0];
    return [asked, ...await Promise.all([fetchJson('/usage', ofSums), fetchJson('/usage/series', { from, bucket, tz,
      measure: how.measure, by: how.by, top: 4 })])];
  }
  function draw([asked, usage, { keys: all, points, totals, bucketMs }]) {
    if (asked !== how) return;
    const keys = all.map((one) => ({ key: one.key, label: label(how.by, one) }));
    const first = how.range === 'all' ? Math.max(0, points.findIndex((one) => one.v.some(Boolean))) : 0;
    const n = num(totals.reduce((sum, one) => sum + one, 0)), { measure: what, range: time } = how;
    const summary = t('usage.sum', { n, what: t(`usage.${what}`), range: t(`usage.${time}`) });
    const data = { points: points.slice(first), keys, bucketMs, format: compact, summary };
    fill(tiles, figures(usage.range));
    fill(names, legend(keys));
    if (chart) chart.update(data);
    else fill(plot, chart = stacked(data));
    fill(parts, Object.entries(BY).map(([name, key]) => breakdown(name, usage[key])), errors(usage.byError));
  }
  function update({ query }) {
    const chosen = ([name, first]) => [name, CHOICES[name].includes(query[name]) ? query[name] : first];
    how = Object.fromEntries(Object.entries(FIRST).map(chosen));
    for (const [name, el] of Object.entries({ range, measure, by })) el.set(how[name]);
    if (load) load();
    else load = ui.loader(tiles, read, draw);
  }

  const off = on('usage', () => { waiting ||= setTimeout(load, Math.max(0, readAt + AGAIN_MS - Date.now())); });
  const save = () => download('/usage/export', { from: stretch(how.range).from, tz: zone() }, 'GET');
  const primary = ui.button(t('usage.csv'), { icon: 'download', kind: 'primary', on: save });
  return { update, primary, refresh: () => load(), unmount: () => { off(); clearTimeout(waiting); } };
}

export const page = { title: 'nav.usage', mount };
