// Numbers and times as the person reads them. Times are milliseconds, UTC.
import { h, text } from './dom.js';
import { lang, pref, t } from './i18n.js';

const MINUTE = 60000, HOUR = 60 * MINUTE, DAY = 24 * HOUR, OWN_ZONE = Intl.DateTimeFormat().resolvedOptions().timeZone;
let ahead = 0, gatewayZone = 'UTC', masking = false;
/** The clock of the gateway, which is what reset times are measured by. */
export const now = () => Date.now() + ahead;
export const setNow = (server) => { ahead = Math.abs(server - Date.now()) > 2000 ? server - Date.now() : 0; };
export const setGatewayZone = (name) => { gatewayZone = name || 'UTC'; };

const formats = new Map();
/** Making a format takes longer than using it a hundred times. */
function format(Kind, options, value) {
  const key = Kind.name + lang() + JSON.stringify(options);
  if (!formats.has(key)) formats.set(key, new Kind(lang(), options));
  return formats.get(key).format(value);
}
export const num = (n, options = {}) => (Number.isFinite(n) ? format(Intl.NumberFormat, options, n) : '–');
export const compact = (n) => num(n, Math.abs(n) > 9999 ? { notation: 'compact', maximumSignificantDigits: 3 } : {});
export const percent = (n) => num(n / 100, { style: 'percent', maximumFractionDigits: Math.abs(n) < 10 ? 1 : 0 });
export function bytes(n) {
  const step = n < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(n) / 3));
  const unit = ['byte', 'kilobyte', 'megabyte', 'gigabyte'][step];
  return num(n / 1000 ** step, { style: 'unit', unit, unitDisplay: 'short', maximumFractionDigits: step ? 1 : 0 });
}
/** Two units at most: `840 ms`, `4.9 s`, `3 h 06 m`, `2 d 22 h`. */
export function duration(ms) {
  const n = Math.max(0, ms), of = (unit) => Math.floor(n / unit), two = (value) => String(value).padStart(2, '0');
  if (!Number.isFinite(ms)) return '–';
  if (n < 1000) return t('time.ms', { n: Math.round(n) });
  if (n < MINUTE) return t('time.s', { n: num(n / 1000, { maximumFractionDigits: n < 9950 ? 1 : 0 }) });
  if (n < HOUR) return t('time.ms2', { m: of(MINUTE), s: two(of(1000) % 60) });
  if (n < DAY) return t('time.hm', { h: of(HOUR), m: two(of(MINUTE) % 60) });
  return t('time.dh', { d: of(DAY), h: of(HOUR) % 24 });
}
/** A stretch that a person waits for: whole seconds below two minutes, else no seconds. */
export const wait = (ms) => (ms < MINUTE ? t('time.s', { n: Math.ceil(Math.max(0, ms) / 1000) })
  : ms < 2 * MINUTE || ms >= HOUR ? duration(ms) : t('time.m', { n: Math.round(ms / MINUTE) }));

/** The zone that days and times are shown in: that of the `browser` (the default), of the `gateway`, or a name. */
export const zone = () => ({ browser: OWN_ZONE, gateway: gatewayZone })[pref('zone', 'browser')] ?? pref('zone');
const date = (ms, options) => format(Intl.DateTimeFormat, { timeZone: zone(), hourCycle: 'h23', ...options }, ms);
const HM = { hour: '2-digit', minute: '2-digit' }, DM = { day: 'numeric', month: 'short' };
export const minute = (ms) => date(ms, HM), day = (ms) => date(ms, DM);
export const clock = (ms) => date(ms, { ...HM, second: '2-digit' });
export const when = (ms) => date(ms, { ...HM, ...DM, year: 'numeric' });
/** As short as it is clear: the time today, the weekday within six days, else the date. */
export const at = (ms) => date(ms, { ...HM, ...(day(ms) === day(now()) ? {}
  : Math.abs(ms - now()) < 6 * DAY ? { weekday: 'short' } : DM) });
export const ago = (ms) => (now() - ms < 5000 ? t('time.now') : t('time.ago', { d: wait(now() - ms) }));
export const until = (ms) => (ms <= now() ? t('time.now') : t('time.in', { d: wait(ms - now()) }));
/** Full date, time and zone: the title behind every short one. */
export const exact = (ms) => `${date(ms, { dateStyle: 'medium', timeStyle: 'medium' })} ${zone()}`;

const ticks = new Map();
/** `node` shows `words()`, made again as time goes by: each second near `ms`, else twice a minute. */
export function ticking(node, ms, words) {
  text(node, words()); ticks.set(node, { ms, words, born: Date.now() });
  return node;
}
setInterval(() => {
  if (document.hidden) return;
  for (const [node, { ms, words, born }] of ticks) {
    if (!node.isConnected && Date.now() - born > 30000) ticks.delete(node);
    else if (Math.abs(ms - now()) < 2 * MINUTE || Math.round(Date.now() / 1000) % 30 === 0) text(node, words());
  }
}, 1000);
/** A time that keeps itself current: how = 'ago', 'until', 'clock', 'when' or 'at'. */
export function timeEl(ms, how = 'ago') {
  if (!Number.isFinite(ms)) return h('span', null, '–');
  const node = h('time', { datetime: new Date(ms).toISOString(), title: exact(ms) });
  return ticking(node, ms, () => ({ ago, until, clock, when, at })[how](ms));
}

/** Screenshot mode: e-mails are shown with stars. */
export const isMasking = () => masking;
export const setMasking = (wanted) => { masking = wanted; };
export const mask = (email) => (masking && email ? email.replace(/^(.)[^@]*@/, '$1•••@') : email ?? '');
