// The components of every page: buttons, dialogs, messages, meters.
import { send } from './api.js';
import { announce, fill, h, icon, keyed, text } from './dom.js';
import { ago, at, duration, exact, num, ticking, wait } from './format.js';
import { known, plural, pref, setPref, t } from './i18n.js';
import { isLocal } from './store.js';

let ids = 0;
const nextId = (name) => `${name}-${ids += 1}`;
/** `el` with a method of that name, which is called once. */
const having = (el, name, run, ...first) => { el[name] = run; run(...first); return el; };

/** A handler that returns a promise makes its button busy, and is not called again until then. */
export function button(label, { icon: shape, kind = 'default', on, ...props } = {}) {
  const click = (event) => el.ariaDisabled !== 'true' && busy(el, on?.(event)).catch(fail);
  const el = h(props.href ? 'a' : 'button', { type: props.href ? null : 'button', class: `btn ${kind}`, ...props,
    on: { click } }, shape && icon(shape), label && h('span', { class: 'label' }, label));
  return el;
}
export const iconButton = (shape, label, on, props = {}) => button('', {
  icon: shape, kind: 'ghost square', on, 'aria-label': label, title: label, ...props });
function busy(el, work) {
  const mark = (is) => { el.ariaDisabled = is ? 'true' : null; el.classList.toggle('busy', is); };
  mark(true);
  return Promise.resolve(work).finally(() => mark(false));
}

// -- messages
const SHOWN = 3, KEPT = 50;
export const messages = []; // the newest last: [{at, text}]
/** Behind a modal dialog nothing can be reached, or read aloud. */
const topmost = () => [...document.querySelectorAll('dialog[open]')].at(-1) ?? document.body;
export function toast(said, { kind = 'ok', action } = {}) {
  const place = document.getElementById('toasts'), isError = kind === 'error';
  let timer = 0;
  const hold = () => clearTimeout(timer), close = () => { hold(); el.remove(); };
  const leave = () => { if (!isError) timer = setTimeout(close, action ? 10000 : 6000); };
  const el = h('div', { class: `toast ${kind}`, role: isError && 'alert',
    on: { pointerenter: hold, focusin: hold, pointerleave: leave, focusout: leave } },
  icon({ ok: 'check', info: 'info', error: 'warn' }[kind]), h('p', null, said), action && button(action.label, {
    kind: 'ghost', on: () => { close(); return action.run(); } }), iconButton('close', t('act.close'), close));
  messages.push({ at: Date.now(), text: said }); messages.splice(0, messages.length - KEPT);
  if (place.children.length >= SHOWN) place.firstChild.remove();
  topmost().append(place); place.append(el);
  if (!isError) { leave(); announce(said); }
}
/** What went wrong, in words: those of the code, else the gateway's own. */
export const wording = ({ code, params, message }) => (known(`err.${code}`) ? t(`err.${code}`, params) : message);
export const fail = (error) => error.name === 'AbortError' || toast(wording(error), { kind: 'error' });

// -- dialogs
export function dialog({ title, body, footer, wide, sheet, onclose }) {
  const id = nextId('dialog'), content = h('div', { class: 'body' }, body), close = () => el.close();
  const closed = () => { document.body.append(...el.querySelectorAll('#toasts')); el.remove(); onclose?.(); };
  const el = h('dialog', { class: `dialog ${wide ? 'wide' : ''} ${sheet ? 'sheet' : ''}`, 'aria-labelledby': id,
    on: { close: closed, pointerdown: (event) => event.target === el && close() } },
  h('header', null, h('h2', { id }, title), iconButton('close', t('act.close'), close)), content,
  footer && h('footer', null, footer));
  document.body.append(el); el.showModal();
  return { el, body: content, close };
}
/** Promise of true when the person agreed. Dangerous things start on Cancel; `typed` must be typed first. */
export const confirm = ({ title, body, action, danger, typed, wide }) => new Promise((resolve) => {
  const close = () => made.close(), input = typed && h('input', { type: 'text', autocomplete: 'off' });
  const agree = () => { if (typed && input.value.trim() !== typed) input.focus(); else { resolve(true); close(); } };
  const cancel = button(t('act.cancel'), { autofocus: danger, on: close });
  const ok = button(action, { kind: danger ? 'danger solid' : 'primary', autofocus: !danger, on: agree });
  const asked = [typeof body === 'string' ? h('p', null, body) : body, typed && field(t('ui.type', { typed }), input)];
  const made = dialog({ title, wide, body: asked, footer: [cancel, ok], onclose: () => resolve(false) });
});
export function menu(anchor, items) {
  const entries = items.map(({ label, icon: shape, danger, run }) => h('button', { tabindex: '-1', role: 'menuitem',
    class: danger && 'danger', on: { click: () => { el.hidePopover(); busy(el, run()).catch(fail); } } },
  shape && icon(shape), label));
  const keydown = (event) => {
    const here = entries.indexOf(document.activeElement), to = { ArrowDown: (here + 1) % entries.length,
      ArrowUp: here - 1, Home: 0, End: -1 }[event.key];
    if (to !== undefined) { event.preventDefault(); entries.at(to).focus(); }
  };
  const toggled = ({ newState }) => { if (newState === 'closed') { el.remove(); anchor.focus(); } };
  const el = h('div', { class: 'menu', role: 'menu', popover: 'auto', on: { keydown, toggle: toggled } }, entries);
  topmost().append(el); el.showPopover();
  const box = anchor.getBoundingClientRect(), { width, height } = el.getBoundingClientRect();
  const top = box.bottom + 4 + height < innerHeight ? box.bottom + 4 : box.top - height - 4;
  el.style.setProperty('left', `${Math.max(8, Math.min(box.right, innerWidth - 8) - width)}px`);
  el.style.setProperty('top', `${Math.max(8, top)}px`);
  entries[0].focus();
}

// -- choices
/** One of a few exclusive views; `el.set(value)` shows another without telling. */
export function segmented(label, options, value, onchange) {
  const name = nextId('one'), change = ({ target }) => onchange(target.value);
  const el = h('div', { class: 'segmented', role: 'radiogroup', 'aria-label': label, on: { change } },
    options.map(([one, words]) => h('label', null, h('input', { type: 'radio', name, value: one }), words)));
  const set = (wanted) => { for (const one of el.querySelectorAll('input')) one.checked = one.value === wanted; };
  return having(el, 'set', set, value);
}
/** Toggle buttons with counts; `el.patch(options, value)` follows new ones. */
export function chips(label, options, value, onchange) {
  const el = h('div', { class: 'chips', role: 'group', 'aria-label': label });
  const make = ([one]) => h('button', { type: 'button', class: 'chip', on: { click: () => onchange(one) } });
  return having(el, 'patch', (now, chosen) => keyed(el, now, ([one]) => one, make, (chip, [one, words, count]) => {
    chip.ariaPressed = String(one === chosen);
    fill(chip, words, Number.isFinite(count) && h('b', null, num(count)));
  }), options, value);
}
/** A select whose label only screen readers need; `.input` is the element, `.set(options, value)` has others. */
export function select(label, options, value, onchange) {
  const input = h('select', { 'aria-label': label, title: label, on: { change: () => onchange(input.value) } });
  const set = (all, chosen) => {
    keyed(input, all, String, ([one, words = one]) => h('option', { value: one }, words));
    if (all.some(([one]) => String(one) === String(chosen))) input.value = chosen;
  };
  return Object.assign(having(h('span', { class: 'select' }, input), 'set', set, options, value), { input });
}
/** Label above, help and error below; `el.error(text)` says what is wrong, or nothing. */
export function field(label, input, { help } = {}) {
  const kinds = 'input, select, textarea', control = input.matches(kinds) ? input : input.querySelector(kinds);
  const id = control.id = nextId('in'), wrong = h('p', { class: 'wrong', id: `${id}-wrong`, hidden: true });
  control.setAttribute('aria-describedby', help ? `${id}-help ${id}-wrong` : `${id}-wrong`);
  const error = (words) => {
    fill(wrong, words && icon('warn'), words); wrong.hidden = !words; control.ariaInvalid = String(Boolean(words));
  };
  return Object.assign(h('div', { class: 'field' }, h('label', { for: id, class: 'name' }, label), input,
    help && h('p', { class: 'help', id: `${id}-help` }, help), wrong), { error });
}
/** A switch; when `onchange(wanted)` rejects it goes back. */
export function toggle(label, checked, onchange, help) {
  const id = nextId('switch'), set = (is) => { control.checked = is; };
  const control = h('input', { type: 'checkbox', role: 'switch', class: 'switch', id, checked, on: {
    click: (event) => control.ariaDisabled === 'true' && event.preventDefault(),
    change: () => busy(control, onchange(control.checked)).catch((said) => { set(!control.checked); fail(said); }) } });
  const words = h('div', null, h('label', { class: 'name', for: id }, label), help && h('p', { class: 'help' }, help));
  return Object.assign(h('div', { class: 'toggle' }, control, words), { set, control });
}
/** Links [[id, words, href]] of which one is current: `el.show(id)`. */
export function tabs(label, links, kind) {
  const all = links.map(([id, words, href]) => h('a', { href, 'data-id': id }, words));
  return Object.assign(h('nav', { class: kind, 'aria-label': label }, all), { show: (id) => all.forEach((one) => {
    one.ariaCurrent = one.dataset.id === id ? 'page' : null;
    if (one.ariaCurrent) one.scrollIntoView({ block: 'nearest', inline: 'center' });
  }) });
}

// -- copying
/** The clipboard, where there is one; else the old way, out of a dialog that stays when that fails too. */
export async function copy(value) {
  if (await navigator.clipboard?.writeText(value).then(() => true, () => false)) return true; // or no secure context
  const shown = h('textarea', { value, readonly: true, rows: '4' });
  const byHand = dialog({ title: t('ui.copyTitle'), body: field(t('ui.copyBy'), shown) });
  shown.focus(); shown.select();
  const isCopied = document.execCommand('copy');
  if (isCopied) byHand.close();
  return isCopied;
}
/** `from`: the text, or a function that makes it. */
export function copyButton(from, label = t('act.copy'), props = {}) {
  const show = (words, isDone) => { el.classList.toggle('done', isDone); if (label) text(el.lastChild, words); };
  const el = button(label, { icon: 'copy', ...props, on: async () => {
    if (!await copy(typeof from === 'function' ? await from() : from)) return;
    show(t('act.copied'), true); setTimeout(show, 1600, label, false); announce(t('act.copied'));
  } });
  return el;
}
const WORDS = 'async|await|const|curl|export|for|from|if|import|in|model_provider|new|of|print|set';
const MARKS = new RegExp(String.raw`("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|\b(${WORDS})\b`);
/** Strings and keywords are marked; `label` names the block and is its header. `el.set(text)` shows another. */
export function codeBlock(source, { label = '' } = {}) {
  const code = h('code'), kinds = [null, 'str', 'kw'];
  const mark = (part, i) => (i % 3 && part ? h('span', { class: kinds[i % 3] }, part) : part);
  return having(h('figure', { class: 'code' }, h('figcaption', null, h('span', null, label),
    copyButton(() => code.textContent, t('act.copy'), { kind: 'ghost' })),
  h('pre', { tabindex: '0', role: 'group', 'aria-label': label || t('ui.code') }, code)),
  'set', (words) => fill(code, words.split(MARKS).map(mark)), source);
}

// -- pieces of pages
export function card({ title, note, actions, ...props }, ...children) {
  const id = nextId('card');
  return h('section', { ...props, class: `card ${props.class ?? ''}`, 'aria-labelledby': title && id },
    title && h('header', null, h('h2', { id }, title), note && h('span', { class: 'note' }, note),
      actions && h('div', { class: 'actions' }, actions)), h('div', { class: 'content' }, children));
}
/** One field and its button. What `run(value)` throws is told below the field, which keeps its value. */
export function fieldForm(label, content, action, run, { help, kind } = {}) {
  const named = field(label, content, { help }), input = named.querySelector('input');
  const failed = (error) => { named.error(wording(error)); input.focus(); };
  const on = () => { named.error(''); return input.checkValidity() && run(input.value.trim()).catch(failed); };
  return h('form', { on: { submit: (event) => event.preventDefault() } }, named,
    row(button(action, { kind, type: 'submit', on })));
}
/** One number, with its name above and a note below; the full number is its title. */
export const figure = (name, value, words, title, ...more) => h('div', { class: 'card figure' },
  h('span', { class: 'name' }, name), h('b', { title }, value), h('span', { class: 'note' }, words), more);

// -- accounts
const BAD = ['bad', 'cross'], WARN = ['warn', 'warn'];
/** Status -> [colour, icon]; its words are st.<status>. */
const STATES = { ready: ['ok', 'check'], low: WARN, empty: WARN, unknown: ['idle', 'clock'], login_rejected: BAD,
  auth_error: BAD, expired: BAD, excluded: ['idle', 'pause'] };
/** A word with its colour and icon. */
export const badge = ([hue, shape], words, title) => h('span', { class: `pill ${hue}`, title }, icon(shape), words);
export function pill({ status, statusParams }) {
  const back = statusParams?.until, key = status === 'empty' && !back ? 'st.emptyNow' : `st.${status}`;
  return badge(STATES[status], t(key, { t: back && at(back) }), back && exact(back));
}
export const isRejected = ({ status }) => STATES[status]?.[0] === 'bad'; // only the person can help
export const windows = (account) => account.quota?.windows ?? [];
/** The least that is left, and the soonest reset: Infinity when unknown. */
export const leftOf = (account) => Math.min(...windows(account).map((one) => one.remainingPercent));
export const resetOf = (account) => Math.min(...windows(account).map((one) => one.resetsAt || Infinity));
export const tag = (plan) => plan && h('span', { class: 'tag' }, known(`plan.${plan}`) ? t(`plan.${plan}`) : plan);
export function windowName({ key: name, minutes }) {
  if (known(`quota.${name}`)) return t(`quota.${name}`);
  if (!minutes || minutes === 10080) return t(minutes ? 'quota.week' : 'quota.any');
  const [key, length] = minutes >= 1440 ? ['quota.days', 1440] : ['quota.hours', 60];
  return plural(key, Math.round(minutes / length));
}
/** [colour, icon, words] of how a window is doing. */
function verdict({ remainingPercent: left, pace = {} }, trusted) {
  const isFast = pace.verdict === 'fast', colour = left <= 5 ? 'bad' : left <= 25 || isFast ? 'warn' : 'ok';
  if (!trusted) return ['idle', 'clock', ''];
  if (left <= 0) return ['bad', 'warn', t('quota.empty')];
  if (isFast) return [colour, 'warn', pace.emptyAt ? t('quota.fast', { t: at(pace.emptyAt) }) : t('quota.fastNow')];
  return [colour, 'check', pace.verdict === 'ok' ? t('quota.onPace') : ''];
}
/** What is left of one window, and (the tick) how much of its time is still to go. `at`: when it was read. */
export function meter(quota, options) {
  const name = h('span', { class: 'name' }), left = h('b'), pace = h('span', { class: 'pace' }), reset = h('span');
  const track = h('div', { class: 'track', role: 'meter', 'aria-valuemin': 0, 'aria-valuemax': 100 }, h('i'), h('s'));
  const el = h('div', null, h('div', { class: 'over' }, name, left), track, h('div', { class: 'under' }, pace, reset));
  return having(el, 'patch', (now, { big, trusted, at: read }) => {
    const { remainingPercent: value, resetsAt: resets } = now, has = Number.isFinite(value);
    const [colour, shape, words] = has ? verdict(now, trusted) : ['none', 'clock', ''];
    const tick = (trusted && has && now.pace?.timeLeftPercent) || 0;
    const say = () => {
      if (!trusted) return read ? t('quota.stale', { ago: ago(read) }) : t('quota.staleNow');
      if (!has || !resets) return t(has ? 'quota.idle' : 'quota.unknown');
      return t(big ? 'quota.resetsAt' : 'quota.resetsIn', { t: at(resets), d: wait(resets - Date.now()) });
    };
    el.className = `meter ${colour} ${big ? 'big' : ''}`;
    text(name, windowName(now)); text(left, has ? t('quota.left', { p: value }) : t('quota.none'));
    fill(pace, words && [icon(shape), words]);
    ticking(reset, resets ?? 0, say); reset.title = resets ? exact(resets) : '';
    track.style.setProperty('--v', `${value ?? 0}%`); track.style.setProperty('--t', `${tick}%`);
    track.classList.toggle('ticked', tick > 0 && tick < 100);
    Object.assign(track, { ariaLabel: name.textContent, ariaValueNow: value ?? 0,
      ariaValueText: [left.textContent, say(), words].filter(Boolean).join(', ') });
  }, quota, options);
}
/** `host` has a meter for each of these windows of an account; survivors are patched. */
export function meters(host, shown, account) {
  const { quota } = account, how = { at: quota?.capturedAt, trusted: quota?.trusted !== false && !isRejected(account) };
  keyed(host, shown, (one) => one.key, (one) => meter(one, how), (el, one) => el.patch(one, how));
}
/** The windows that are shown folded: `el.patch(windows, account)`. */
export function moreMeters() {
  const inner = h('div', { class: 'grid' }), count = h('span'), folded = details(count, inner);
  return Object.assign(folded, { className: 'extra', patch(extra, account) {
    text(count, plural('quota.more', extra.length)); meters(inner, extra, account);
    folded.hidden = !extra.length;
  } });
}

// -- what runs, what is missing, what went wrong
/** A job as one line: how far it is, what is left, Cancel. `el.patch(job)`. */
export function jobLine(job) {
  const name = t(`job.${job.kind}`), words = h('span', { class: 'name' }), rest = h('span', { class: 'note' });
  const bar = h('progress', { 'aria-label': name });
  const cancel = button(t('act.cancel'), { kind: 'ghost', on: () => send('DELETE', `/jobs/${job.id}`) });
  const el = h('div', { class: 'jobline' }, icon('refresh'), words, bar, rest, cancel);
  return having(el, 'patch', ({ done, total, failed, etaMs }) => {
    const soon = etaMs && done * 10 >= total && t('job.eta', { d: duration(etaMs) });
    text(words, total ? t('job.line', { name, n: num(done), m: num(total) }) : name);
    text(rest, [soon, failed && plural('job.failed', failed)].filter(Boolean).join(' · '));
    if (total) Object.assign(bar, { max: total, value: done });
  }, job);
}
export const empty = (shape, words, ...actions) => h('div', { class: 'empty' }, icon(shape), h('p', null, words),
  actions.length > 0 && row(actions));
export function errorPanel(error, retry) {
  const detail = [wording(error) === error.message ? '' : error.message, error.requestId].filter(Boolean).join(' · ');
  return h('div', { class: 'empty bad', role: 'alert' }, icon('warn'), h('p', null, wording(error)),
    detail && note(detail), retry && button(t('act.tryAgain'), { icon: 'refresh', on: retry }));
}
/** Grey blocks where rows will be; the style sheet shows them only after 150 ms. */
export const skeleton = (rows) => h('div', { class: 'skeleton', role: 'status', 'aria-busy': 'true',
  'aria-label': t('ui.loading') }, Array.from({ length: rows }, () => h('i')));
/** `read()` again and again into `place`: `draw(got)`, grey blocks before the first, what failed and a way back. */
export function loader(place, read, draw) {
  let drawn = false;
  const failed = (error) => (drawn ? fail(error) : fill(place, errorPanel(error, load)));
  const load = async () => { try { draw(await read()); drawn = true; } catch (error) { failed(error); } };
  fill(place, skeleton(4)); load();
  return load;
}

// -- words and lists
export const details = (summary, ...children) => h('details', null, h('summary', null, icon('right'), summary),
  h('div', { class: 'inner' }, children));
export const row = (...children) => h('div', { class: 'row' }, children);
export const note = (...words) => h('p', { class: 'note' }, words);
export const bullets = (items) => h('ul', { class: 'bullets' }, items.map((one) => h('li', null, one)));
export const good = (words) => h('p', { class: 'good', role: 'status' }, icon('check'), words);
/** A banner; `words` may be an element with more in it. */
export const notice = (kind, shape, words, ...more) => h('div', { class: `notice ${kind}` }, icon(shape),
  words instanceof Node ? words : h('p', null, words), more);
export const warning = (words, shape = 'warn', ...more) => notice('warn', shape, words, ...more);
/** Pairs of a term and what is told of it. */
export const facts = (pairs) => h('dl', { class: 'facts' }, pairs.map(([term, ...told]) => [h('dt', null, term),
  h('dd', null, told)]));
/** Rows of cells, of which the first is a head; `heads` stand above them, `kinds` are the classes of the columns. */
export const table = (rows, heads, kinds = []) => h('div', { class: 'scroll' }, h('table', null,
  heads && h('thead', null, h('tr', null, heads.map((one, at) => h('th', { scope: 'col', class: kinds[at] }, one)))),
  h('tbody', null, rows.map(([head, ...cells]) => h('tr', null, h('th', { scope: 'row', class: kinds[0] }, head),
    cells.map((one, at) => h('td', { class: kinds[at + 1] }, one)))))));
/** A button that works only on the computer that runs azt. */
export const ownButton = (label, props) => button(label, isLocal() ? props : { ...props, disabled: true,
  title: t('share.localOnly') });

// -- theme
export const theme = () => pref('theme', 'system');
export const setTheme = (is) => { setPref('theme', is); document.documentElement.dataset.theme = is; };
export function flipTheme() {
  const isDark = theme() === 'system' ? matchMedia('(prefers-color-scheme: dark)').matches : theme() === 'dark';
  setTheme(isDark ? 'light' : 'dark');
}
