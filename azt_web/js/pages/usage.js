// Totals, trends and what they are made of. Days are those of the chosen zone; what was not reported is not zero.
import { download, get as fetchJson } from '../api.js';
import { legend, shareBar, stacked } from '../charts.js';
import { fill, h } from '../dom.js';
import { compact, num, now, percent, zone } from '../format.js';
import { t } from '../i18n.js';
import { current, hash, setQuery } from '../router.js';
import { accountOf, get, nameOf, on } from '../store.js';
import { button, card, empty, errorPanel, segmented, skeleton } from '../ui.js';

const DAY = 86400000;
/** Range -> days before today, and the bucket of its chart. */
const RANGES = {
  today: [0, 'hour'], '7d': [6, 'hour'], '30d': [29, 'day'], '90d': [89, 'day'], process: [], all: [364, 'day'] };
const MEASURES = ['tokens', 'requests', 'images'];
const BY = { model: 'byModel', account: 'byAccount', endpoint: 'byEndpoint', client: 'bySource' };
const AGAIN_MS = 10000;

const dayOf = (ms) => new Intl.DateTimeFormat('sv-SE', { timeZone: zone() }).format(ms);

/** {from, bucket, tz} of a range: `from` is a day of the zone, or a time. */
function stretch(range) {
  const [days, bucket] = RANGES[range], since = get('gateway').startedAt || now();
  if (days !== undefined) return { from: dayOf(now() - days * DAY), bucket, tz: zone() };
  const age = now() - since;
  return { from: since, bucket: age < DAY / 8 ? 'minute' : age < 8 * DAY ? 'hour' : 'day', tz: zone() };
}

function label(by, { key, label: told }) {
  if (key === '_other') return t('usage.other');
  if (key === '-' || !key) return t('usage.unnamed');
  return (by === 'account' && nameOf(accountOf(key))) || told || key;
}

function figures(sums) {
  const of = (name) => sums[name] || 0, short = (name) => compact(of(name));
  const part = (name, whole) => (of(whole) ? percent((of(name) / of(whole)) * 100) : '–');
  const tile = ([key, name, value, note]) => h('div', { class: 'card figure' }, h('span', { class: 'name' }, t(key)),
    h('b', { title: num(of(name)) }, value), h('span', { class: 'note' }, note));
  return h('div', { class: 'figures six' }, [
    ['usage.requests', 'requestCount', short('requestCount'), t('usage.ok', { n: short('successCount') })],
    ['usage.tokens', 'totalTokens', short('totalTokens'),
      t('usage.inOut', { i: short('inputTokens'), o: short('outputTokens') })],
    ['usage.cached', 'cachedInputTokens', part('cachedInputTokens', 'inputTokens'), t('usage.cachedNote')],
    ['usage.images', 'imageCount', short('imageCount'), t('usage.imagesNote')],
    ['usage.failed', 'failureCount', part('failureCount', 'requestCount'),
      t('usage.failedNote', { n: short('failureCount'), c: short('cancelledCount') })],
    ['usage.unknown', 'unknownTokenCount', short('unknownTokenCount'), t('usage.unknownNote')],
  ].map(tile));
}

function breakdown(by, rows) {
  const whole = rows.reduce((sum, row) => sum + row.aggregate.requestCount, 0) || 1, title = t(`usage.by.${by}`);
  const line = ({ aggregate, ...row }) => h('tr', null,
    h('th', { scope: 'row', class: 'name', title: label(by, row) }, label(by, row)),
    h('td', { class: 'num' }, num(aggregate.requestCount)), h('td', { class: 'num' }, compact(aggregate.totalTokens
      || 0)),
    h('td', { title: percent((aggregate.requestCount / whole) * 100) }, shareBar(aggregate.requestCount / whole)));
  const heads = [[by], ['requests', 'num'], ['tokens', 'num'], ['share']];
  return card({ title, class: 'flush' }, h('div', { class: 'scroll', tabindex: '0', role: 'group',
    'aria-label': title },
    h('table', null, h('thead', null, h('tr', null, heads.map(([name, kind]) => (
      h('th', { scope: 'col', class: kind ?? null }, t(`usage.${name}`)))))), h('tbody', null, rows.map(line)))));
}

function errors(rows) {
  const line = ({ key, aggregate }) => h('tr', null, h('th', { scope: 'row', class: 'name' },
    h('a', { href: hash('log', [], { result: 'failed', errorType: key }) }, key)),
  h('td', { class: 'num' }, num(aggregate.requestCount)));
  const log = h('a', { href: hash('log', [], { result: 'failed' }) }, t('ov.openLog'));
  return card({ title: t('usage.errors'), class: 'flush', actions: log },
    rows.length ? h('table', null, h('tbody', null, rows.map(line))) : empty('check', t('usage.noErrors')));
}

export const page = {
  title: 'nav.usage',
  mount(root) {
    const asked = ({ range, by, measure }) => ({ range: range in RANGES ? range : '7d', by: by in BY ? by : 'model',
      measure: MEASURES.includes(measure) ? measure : 'tokens' });
    let shown = '', sums = null, chart = null, readAt = 0, waiting = 0;
    const tiles = h('div'), plot = h('div'), names = h('span'), parts = h('div', { class: 'cols' });
    const pick = (name, options, prefix) => segmented(t(`usage.${name}`), options.map((one) => [one,
      t(`${prefix}.${one}`)]),
      asked(current().query)[name], (value) => setQuery({ [name]: value }));
    const choices = { range: pick('range', Object.keys(RANGES), 'usage.range'), measure: pick('measure', MEASURES,
      'usage'),
      by: pick('by', Object.keys(BY), 'usage') };
    fill(root, h('div', { class: 'stack usage' }, h('div', { class: 'toolbar' }, choices.range,
      h('a', { class: 'note', href: '#/settings/general' }, t('usage.zone', { zone: zone() }))), tiles,
    card({ title: t('usage.trend'), note: names, actions: [choices.measure, choices.by] }, plot), parts));

    function draw(series, { range, by, measure }) {
      const keys = series.keys.map((one) => ({ key: one.key, label: label(by, one) }));
      const first = range === 'all' ? series.points.findIndex((one) => one.v.some(Boolean)) : 0;
      const all = series.totals.reduce((sum, n) => sum + n, 0);
      const data = { points: series.points.slice(Math.max(0, first)), keys, bucketMs: series.bucketMs, format: compact,
        summary: t('usage.sum', { n: num(all), what: t(`usage.${measure}`), range: t(`usage.range.${range}`) }) };
      fill(names, legend(keys));
      if (chart) chart.update(data);
      else fill(plot, chart = stacked(data));
    }

    async function load() {
      const how = asked(current().query), { from, bucket, tz } = stretch(how.range);
      readAt = Date.now();
      try {
        const [usage, series] = await Promise.all([fetchJson('/usage', how.range === 'all' ? {} : { from, tz }),
          fetchJson('/usage/series', { from, bucket, tz, measure: how.measure, by: how.by, top: 4 })]);
        if (JSON.stringify(how) !== shown) return;
        sums = how.range === 'all' ? usage.lifetime : usage.range || usage.lifetime;
        fill(tiles, figures(sums));
        draw(series, how);
        fill(parts, Object.entries(BY).map(([by, name]) => breakdown(by, usage[name] || [])), errors(usage.byError
          || []));
      } catch (error) {
        if (!sums) fill(tiles, errorPanel(error, load));
      }
    }

    function update({ query }) {
      const how = asked(query);
      if (JSON.stringify(how) === shown) return;
      if (!shown) fill(tiles, skeleton(3));
      shown = JSON.stringify(how);
      for (const [name, el] of Object.entries(choices)) el.set(how[name]);
      load();
    }
    const again = () => { waiting = 0; load(); };
    const off = on('usage', () => { waiting ||= setTimeout(again, Math.max(0, readAt + AGAIN_MS - Date.now())); });
    const primary = button(t('usage.csv'), { icon: 'download', kind: 'primary', on: () => {
      const { from, tz } = stretch(asked(current().query).range);
      return download('/usage/export', { from, tz }, 'GET');
    } });
    return { update, primary, refresh: load, unmount: () => { off(); clearTimeout(waiting); } };
  },
};
