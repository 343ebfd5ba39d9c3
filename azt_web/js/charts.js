// Columns to SVG, drawn at the real width. Each chart has a summary, and its table.
import { announce, fill, h, svg, text } from './dom.js';
import { at, day, duration, exact, minute, num } from './format.js';
import { t } from './i18n.js';
import { button, table } from './ui.js';

const LEFT = 44, TOP = 8, FLOOR = 180, HEIGHT = 200, HOUR_MS = 3600000, DAY_MS = 24 * HOUR_MS;
/** Its own colour, that of a status or a series, or the next one in the order of tokens.css. */
function colourOf({ colour }, i) {
  const name = colour ?? `c${i + 1}`;
  return { '--k': `var(--${name}-solid, var(--${name}))` };
}

export function sparkline(values, summary) {
  const most = Math.max(1, ...values), step = 96 / values.length, tall = (n) => Math.max(1, (n / most) * 34);
  const bar = (n, i) => svg('rect', { x: i * step, y: 34 - tall(n), width: step * 0.8, height: tall(n),
    class: !n && 'none' });
  return svg('svg', { class: 'spark', width: 96, height: 34, role: 'img', 'aria-label': summary }, values.map(bar));
}
export const legend = (keys) => h('ul', { class: 'legend' },
  keys.map((key, i) => h('li', { vars: colourOf(key, i) }, h('i'), key.label)));
export const shareBar = (part) => h('span', { class: 'share', vars: { '--v': `${part * 100}%` } }, h('i'));

/** How a bucket is called: its time, or its day. */
const bucketName = (ms, length) => (length >= DAY_MS ? day : length >= HOUR_MS ? at : minute)(ms);

/** The bars of `points` as one drawing of `width`; the one at `chosen` is marked. */
function drawing({ points, keys, bucketMs }, show, width, chosen) {
  const most = Math.max(1, ...points.map(({ v }) => v.reduce((sum, n) => sum + n, 0))), from = points[0].t;
  const power = 10 ** Math.floor(Math.log10(most / 3)); // a round step, for about three grid lines
  const step = Math.max(1, power * [1, 2, 2.5, 5, 10].find((n) => n * power >= most / 3));
  const top = Math.ceil(most / step) * step, y = (n) => TOP + (FLOOR - TOP) * (1 - n / top);
  const slot = (width - LEFT) / Math.max(8, Math.round((points.at(-1).t - from) / bucketMs) + 1);
  const bar = Math.max(1, slot - Math.min(4, slot / 4)), x = (ms) => LEFT + Math.round((ms - from) / bucketMs) * slot;
  const grid = Array.from({ length: top / step + 1 }, (_, i) => i * step).map((n) => [
    svg('line', { x1: LEFT, x2: width, y1: y(n), y2: y(n), class: !n && 'base' }),
    svg('text', { x: LEFT - 8, y: y(n) + 4, 'text-anchor': 'end' }, show(n))]);
  const isLong = bucketMs === HOUR_MS && points.length > 48; // hours of many days: the days are named, at midnight
  const named = isLong ? points.filter((point) => minute(point.t) === '00:00') : points;
  const every = Math.ceil(named.length / Math.max(2, Math.floor((width - LEFT) / 90)));
  const names = named.filter((point, i) => i % every === 0 && x(point.t) < width - 30).map((point) => svg('text',
    { x: x(point.t), y: HEIGHT - 4 }, bucketName(point.t, isLong ? DAY_MS : bucketMs)));
  const bars = points.map(({ t: ms, v }, index) => {
    let base = 0;
    return svg('g', { class: index === chosen && 'on' }, keys.map((key, i) => {
      const under = y(base), over = y(base += v[i] || 0), height = Math.max(1, under - over);
      return over < under && svg('rect', { x: x(ms), y: over, width: bar, height, vars: colourOf(key, i) });
    }), svg('rect', { class: 'hit', x: x(ms), width: slot, height: FLOOR, 'data-at': index }));
  });
  return svg('svg', { width, height: HEIGHT, 'aria-hidden': 'true' }, grid, names, bars);
}

const asTable = ({ points, keys, bucketMs }, show) => table(points.map(({ t: ms, v }) => [
  h('span', { title: exact(ms) }, bucketName(ms, bucketMs)), ...keys.map((key, i) => show(v[i] || 0))]),
[t('chart.time'), ...keys.map((key) => key.label)], ['', ...keys.map(() => 'num')]).firstChild;

/**
 * Stacked bars of `points`: [{t, v: [one for each key]}], with gaps where a bucket is missing;
 * `keys`: [{key, label, colour?}]. `.update(data)` draws others. Arrow keys and the pointer move one readout.
 */
export function stacked(data) {
  let chosen = -1;
  const show = (n) => (data.format ?? num)(n);
  const say = ({ t: ms, v }) => t('chart.read', { t: bucketName(ms, data.bucketMs),
    v: data.keys.map((key, i) => `${key.label} ${show(v[i] || 0)}`).join(' · ') });
  const draw = () => {
    const { points, summary } = data, width = area.clientWidth;
    area.ariaLabel = list.ariaLabel = summary;
    text(readout, points[chosen] ? say(points[chosen]) : summary);
    if (!list.hidden) fill(list, asTable(data, show));
    else if (!points.length) fill(area, h('p', { class: 'note' }, t('chart.none')));
    else if (width) fill(area, drawing(data, show, width, chosen));
  };
  const choose = (index) => { if (index !== chosen) { chosen = index; draw(); } };
  const none = () => choose(-1), pointermove = ({ target }) => choose(Number(target.dataset.at ?? -1));
  const keydown = ({ key }) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[key], last = data.points.length - 1;
    if (!step || last < 0) return;
    choose(chosen < 0 ? last : Math.max(0, Math.min(last, chosen + step)));
    announce(say(data.points[chosen]));
  };
  const swap = () => { list.hidden = area.hidden; flip.ariaPressed = area.hidden = !list.hidden; draw(); };
  const readout = h('p', { class: 'readout' }), area = h('div', { class: 'plot', tabindex: '0', role: 'img',
    on: { pointermove, pointerleave: none, blur: none, keydown } });
  const list = h('div', { class: 'scroll', hidden: true, tabindex: '0', role: 'group' });
  const flip = button(t('chart.table'), { kind: 'ghost small', 'aria-pressed': 'false', on: swap });
  new ResizeObserver(draw).observe(area);
  draw();
  return Object.assign(h('div', { class: 'chart' }, h('div', { class: 'over' }, readout, flip), area, list), {
    update: (next) => { data = next; chosen = Math.min(chosen, data.points.length - 1); draw(); } });
}

/** The timing of a request (console.md 6.6) as steps, [{label, ms}]; what is not known is left out. */
export function timingRows({ queueMs = 0, connectMs = 0, firstByteMs, firstTokenMs, streamMs }) {
  const steps = { queue: queueMs, connect: connectMs, wait: firstByteMs - queueMs - connectMs,
    first: firstTokenMs - firstByteMs, stream: streamMs };
  return Object.entries(steps).filter(([, ms]) => ms > 0).map(([name, ms]) => ({ label: t(`log.t.${name}`), ms }));
}
/** Such steps, one after the other. */
export function waterfall(steps) {
  const sum = (some) => some.reduce((all, { ms }) => all + ms, 0), part = (ms) => `${(ms / sum(steps)) * 100}%`;
  return h('dl', { class: 'waterfall' }, steps.map(({ label, ms }, i) => [h('dt', null, label), h('dd', { class: 'lane',
    vars: { '--from': part(sum(steps.slice(0, i))), '--v': part(ms) } }, h('i')), h('dd', null, duration(ms))]));
}
