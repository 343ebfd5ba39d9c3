// Columns to SVG, drawn at the real width. Each chart has a summary, and its table.
import { announce, fill, h, svg, text } from './dom.js';
import { at, day, duration, exact, minute, num } from './format.js';
import { t } from './i18n.js';

const AXIS = { left: 44, bottom: 20, top: 8 };
const HEIGHT = 200;

export function sparkline(values, summary) {
  const most = Math.max(1, ...values), step = 96 / Math.max(values.length, 1);
  return svg('svg', { class: 'spark', viewBox: '0 0 96 34', width: 96, height: 34, role: 'img', 'aria-label': summary },
    values.map((value, i) => svg('rect', { x: i * step, width: Math.max(1, step - 1.5), class: value ? '' : 'none',
      y: 34 - Math.max(1, (value / most) * 34), height: Math.max(1, (value / most) * 34) })));
}

export const legend = (keys) => h('ul', { class: 'legend' },
  keys.map(({ label, colour }, i) => h('li', { class: `k-${colour || `c${i + 1}`}` }, h('i'), label)));

/** A round step for about three grid lines. */
function roundStep(most) {
  const raw = most / 3, power = 10 ** Math.floor(Math.log10(raw));
  return Math.max(1, power * [1, 2, 2.5, 5, 10].find((n) => n * power >= raw));
}

/** How a bucket is called: its time, or its day. */
const bucketName = (ms, length) => (length >= 86400000 ? day : length >= 3600000 ? at : minute)(ms);

/**
 * Stacked bars of `points`: [{t, v: [one for each key]}], with gaps where a bucket is missing;
 * `keys`: [{key, label, colour?}]. `.update(data)` draws others. Arrow keys and the pointer move one readout.
 */
export function stacked(first) {
  let data = first, chosen = -1, width = 0;
  const readout = h('p', { class: 'readout' }), area = h('div', { class: 'plot', tabindex: '0', role: 'img' });
  const table = h('div', { class: 'scroll', hidden: true, tabindex: '0', role: 'group' });
  const flip = h('button', { type: 'button', class: 'link', 'aria-pressed': 'false', on: { click: () => {
    table.hidden = !table.hidden;
    area.hidden = !table.hidden;
    flip.setAttribute('aria-pressed', String(!table.hidden));
    draw();
  } } }, t('chart.table'));
  const el = h('div', { class: 'chart' }, h('div', { class: 'over' }, readout, flip), area, table);
  const show = (n) => (data.format || num)(n);
  const say = (point) => t('chart.read', { t: bucketName(point.t, data.bucketMs),
    v: data.keys.map((key, i) => `${key.label} ${show(point.v[i] || 0)}`).join(' · ') });

  function draw() {
    const { points, keys, bucketMs } = data;
    area.setAttribute('aria-label', data.summary);
    table.setAttribute('aria-label', data.summary);
    text(readout, points[chosen] ? say(points[chosen]) : data.summary);
    if (!table.hidden) return fill(table, asTable());
    if (!width || !points.length) return fill(area, !points.length && h('p', { class: 'note' }, t('chart.none')));
    const sums = points.map((point) => point.v.reduce((sum, n) => sum + n, 0));
    const step = roundStep(Math.max(1, ...sums)), top = Math.max(step, Math.ceil(Math.max(...sums) / step) * step);
    const from = points[0].t, count = Math.round((points.at(-1).t - from) / bucketMs) + 1;
    const slot = (width - AXIS.left) / Math.max(count, 8), bar = Math.max(1, slot - Math.min(4, slot * 0.25));
    const y = (n) => AXIS.top + (HEIGHT - AXIS.top - AXIS.bottom) * (1 - n / top);
    const x = (ms) => AXIS.left + Math.round((ms - from) / bucketMs) * slot;
    const grid = [];
    for (let n = 0; n <= top; n += step) {
      grid.push(svg('line', { x1: AXIS.left, x2: width, y1: y(n), y2: y(n), class: n ? 'grid' : 'base' }),
        svg('text', { x: AXIS.left - 8, y: y(n) + 4, 'text-anchor': 'end' }, show(n)));
    }
    const hours = bucketMs < 86400000 && points.length > 48 && bucketMs >= 3600000; // days are named, at their midnight
    const named = hours ? points.filter((point) => minute(point.t) === '00:00') : points;
    const every = Math.ceil(named.length / Math.max(2, Math.floor((width - AXIS.left) / 90)));
    const names = named.filter((point, i) => i % every === 0 && x(point.t) < width - 30).map((point) => svg('text',
      { x: x(point.t), y: HEIGHT - 4 }, hours ? day(point.t) : bucketName(point.t, bucketMs)));
    const bars = points.map((point, index) => {
      let base = 0;
      const parts = keys.map((key, i) => {
        const n = point.v[i] || 0, part = n > 0 && svg('rect', { class: `k-${key.colour || `c${i + 1}`}`, x: x(point.t),
          width: bar, y: y(base + n), height: Math.max(1, y(base) - y(base + n)) });
        base += n;
        return part;
      });
      return svg('g', { class: index === chosen ? 'on' : '' }, parts,
        svg('rect', { class: 'hit', x: x(point.t), width: slot, height: HEIGHT - AXIS.bottom, 'data-at': index }));
    });
    return fill(area, svg('svg', { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, 'aria-hidden': 'true' },
      grid, names, bars));
  }

  function asTable() {
    return h('table', null, h('caption', { class: 'vh' }, data.summary),
      h('thead', null, h('tr', null, h('th', { scope: 'col' }, t('chart.time')),
        data.keys.map((key) => h('th', { scope: 'col', class: 'num' }, key.label)))),
      h('tbody', null, data.points.map((point) => h('tr', null, h('th', { scope: 'row' },
        h('time', { title: exact(point.t) }, bucketName(point.t, data.bucketMs))),
      data.keys.map((key, i) => h('td', { class: 'num' }, show(point.v[i] || 0)))))));
  }

  const choose = (index) => { if (index !== chosen) { chosen = index; draw(); } };
  area.addEventListener('pointermove', ({ target }) => choose(Number(target.dataset?.at ?? -1)));
  area.addEventListener('pointerleave', () => choose(-1));
  area.addEventListener('blur', () => choose(-1));
  area.addEventListener('keydown', (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], many = data.points.length;
    if (!step || !many) return;
    event.preventDefault();
    choose(chosen < 0 ? many - 1 : Math.max(0, Math.min(many - 1, chosen + step)));
    announce(say(data.points[chosen]));
  });
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = Math.floor(entry.contentRect.width);
    draw();
  }).observe(area);
  el.update = (next) => { data = next; chosen = Math.min(chosen, data.points.length - 1); draw(); };
  draw();
  return el;
}

export const shareBar = (part) => (
  h('span', { class: 'share', 'aria-hidden': 'true', vars: { '--v': `${part * 100}%` } }, h('i')));

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
