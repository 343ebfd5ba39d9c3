// Columns to SVG, drawn at the real width. Each chart has a summary, and its table.
import { announce, fill, h, svg, text } from './dom.js';
import { at, day, duration, exact, minute, num } from './format.js';
import { t } from './i18n.js';

const LEFT = 44, TOP = 8, FLOOR = 180, HEIGHT = 200, HOUR_MS = 3600000, DAY_MS = 24 * HOUR_MS;
const colourOf = ({ colour }, i) => `k-${colour ?? `c${i + 1}`}`;

export function sparkline(values, summary) {
  const most = Math.max(1, ...values), step = 96 / values.length, tall = (n) => Math.max(1, (n / most) * 34);
  return svg('svg', { class: 'spark', width: 96, height: 34, role: 'img', 'aria-label': summary },
    values.map((n, i) => svg('rect', { x: i * step, y: 34 - tall(n), width: Math.max(1, step - 1.5), height: tall(n),
      class: !n && 'none' })));
}
export const legend = (keys) => h('ul', { class: 'legend' },
  keys.map((key, i) => h('li', { class: colourOf(key, i) }, h('i'), key.label)));

/** A round step for about three grid lines. */
function roundStep(most) {
  const power = 10 ** Math.floor(Math.log10(most / 3));
  return Math.max(1, power * [1, 2, 2.5, 5, 10].find((n) => n * power >= most / 3));
}

/** How a bucket is called: its time, or its day. */
const bucketName = (ms, length) => (length >= DAY_MS ? day : length >= HOUR_MS ? at : minute)(ms);

/** The bars of `points` as one drawing of `width`; the one at `chosen` is marked. */
function drawing({ points, keys, bucketMs }, show, width, chosen) {
  const sums = points.map((point) => point.v.reduce((sum, n) => sum + n, 0)), most = Math.max(1, ...sums);
  const step = roundStep(most), top = Math.ceil(most / step) * step, from = points[0].t;
  const slot = (width - LEFT) / Math.max(8, Math.round((points.at(-1).t - from) / bucketMs) + 1);
  const bar = Math.max(1, slot - Math.min(4, slot / 4)), x = (ms) => LEFT + Math.round((ms - from) / bucketMs) * slot;
  const y = (n) => TOP + (FLOOR - TOP) * (1 - n / top);
  const grid = Array.from({ length: top / step + 1 }, (_, i) => i * step).map((n) => [
    svg('line', { x1: LEFT, x2: width, y1: y(n), y2: y(n), class: n ? 'grid' : 'base' }),
    svg('text', { x: LEFT - 8, y: y(n) + 4, 'text-anchor': 'end' }, show(n))]);
  const isLong = bucketMs === HOUR_MS && points.length > 48; // hours of many days: the days are named, at midnight
  const named = isLong ? points.filter((point) => minute(point.t) === '00:00') : points;
  const every = Math.ceil(named.length / Math.max(2, Math.floor((width - LEFT) / 90)));
  const names = named.filter((point, i) => i % every === 0 && x(point.t) < width - 30).map((point) => svg('text',
    { x: x(point.t), y: HEIGHT - 4 }, bucketName(point.t, isLong ? DAY_MS : bucketMs)));
  const bars = points.map((point, index) => {
    let base = 0;
    const part = (key, i) => {
      const n = point.v[i] || 0, under = y(base), over = y(base += n);
      return n > 0 && svg('rect', { class: colourOf(key, i), x: x(point.t), width: bar, y: over,
        height: Math.max(1, under - over) });
    };
    return svg('g', { class: index === chosen && 'on' }, keys.map(part),
      svg('rect', { class: 'hit', x: x(point.t), width: slot, height: FLOOR, 'data-at': index }));
  });
  return svg('svg', { width, height: HEIGHT, 'aria-hidden': 'true' }, grid, names, bars);
}

const asTable = ({ points, keys, bucketMs, summary }, show) => h('table', null,
  h('caption', { class: 'vh' }, summary), h('thead', null, h('tr', null, h('th', { scope: 'col' }, t('chart.time')),
    keys.map((key) => h('th', { scope: 'col', class: 'num' }, key.label)))),
  h('tbody', null, points.map((point) => h('tr', null, h('th', { scope: 'row', title: exact(point.t) },
    bucketName(point.t, bucketMs)), keys.map((key, i) => h('td', { class: 'num' }, show(point.v[i] || 0)))))));

/**
 * Stacked bars of `points`: [{t, v: [one for each key]}], with gaps where a bucket is missing;
 * `keys`: [{key, label, colour?}]. `.update(data)` draws others. Arrow keys and the pointer move one readout.
 */
export function stacked(first) {
  let data = first, chosen = -1, width = 0;
  const show = (n) => (data.format ?? num)(n);
  const say = ({ t: ms, v }) => t('chart.read', { t: bucketName(ms, data.bucketMs),
    v: data.keys.map((key, i) => `${key.label} ${show(v[i] || 0)}`).join(' · ') });
  const draw = () => {
    const { points, summary } = data;
    for (const one of [area, table]) one.setAttribute('aria-label', summary);
    text(readout, points[chosen] ? say(points[chosen]) : summary);
    if (!table.hidden) fill(table, asTable(data, show));
    else if (!points.length) fill(area, h('p', { class: 'note' }, t('chart.none')));
    else if (width) fill(area, drawing(data, show, width, chosen));
  };
  const choose = (index) => { if (index !== chosen) { chosen = index; draw(); } };
  const none = () => choose(-1), pointermove = ({ target }) => choose(Number(target.dataset.at ?? -1));
  const keydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], last = data.points.length - 1;
    if (!step || last < 0) return;
    event.preventDefault();
    choose(chosen < 0 ? last : Math.max(0, Math.min(last, chosen + step)));
    announce(say(data.points[chosen]));
  };
  const swap = () => {
    area.hidden = table.hidden;
    table.hidden = !area.hidden;
    flip.ariaPressed = String(area.hidden);
    draw();
  };
  const readout = h('p', { class: 'readout' }), area = h('div', { class: 'plot', tabindex: '0', role: 'img',
    on: { pointermove, pointerleave: none, blur: none, keydown } });
  const table = h('div', { class: 'scroll', hidden: true, tabindex: '0', role: 'group' });
  const flip = h('button', { type: 'button', class: 'link', 'aria-pressed': 'false', on: { click: swap } },
    t('chart.table'));
  new ResizeObserver(([{ contentRect }]) => { width = Math.floor(contentRect.width); draw(); }).observe(area);
  draw();
  return Object.assign(h('div', { class: 'chart' }, h('div', { class: 'over' }, readout, flip), area, table), {
    update: (next) => { data = next; chosen = Math.min(chosen, data.points.length - 1); draw(); } });
}

export const shareBar = (part) => h('span', { class: 'share', vars: { '--v': `${part * 100}%` } }, h('i'));
/** Steps one after the other: [{label, ms}]. */
export function waterfall(steps) {
  const whole = Math.max(1, steps.reduce((sum, one) => sum + one.ms, 0));
  let before = 0;
  return h('dl', { class: 'waterfall' }, steps.map(({ label, ms }) => {
    const vars = { '--from': `${(before / whole) * 100}%`, '--v': `${(ms / whole) * 100}%` };
    before += ms;
    const lane = h('span', { class: 'lane', vars }, h('i'));
    return h('div', null, h('dt', null, label), h('dd', null, lane, duration(ms)));
  }));
}

/** The timing of a request (console.md 6.6) as such steps; what is not known is left out. */
export function timingRows({ queueMs = 0, connectMs = 0, firstByteMs, firstTokenMs, streamMs }) {
  const steps = { queue: queueMs, connect: connectMs, wait: firstByteMs - queueMs - connectMs,
    first: firstTokenMs - firstByteMs, stream: streamMs };
  return Object.entries(steps).filter(([, ms]) => ms > 0).map(([name, ms]) => ({ label: t(`log.t.${name}`), ms }));
}
