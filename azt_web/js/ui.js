// The components of every page: buttons, dialogs, messages, meters.
import { send } from './api.js';
import { announce, fill, h, icon, text } from './dom.js';
import { at, duration, exact, num, ticking, ago, until, wait } from './format.js';
import { known, plural, pref, setPref, t } from './i18n.js';
import { isLocal } from './store.js';

let ids = 0;
const nextId = (name) => `${name}-${ids += 1}`;

/** A handler that returns a promise makes its button busy, and is not called again until then. */
export function button(label, { icon: shape, kind = 'default', on, ...props } = {}) {
  const click = (event) => {
    if (el.getAttribute('aria-disabled') === 'true') return;
    const done = on?.(event);
    if (done instanceof Promise) busy(el, done).catch(fail);
  };
  const el = h(props.href ? 'a' : 'button', { ...(!props.href && { type: 'button' }), class: `btn ${kind}`, ...props,
    on: { click } }, shape && icon(shape), label && h('span', { class: 'label' }, label));
  return el;
}

export const iconButton = (shape, label, on, props = {}) => button('', {
  icon: shape, kind: 'ghost square', on, 'aria-label': label, title: label, ...props });

export async function busy(el, promise) {
  el.setAttribute('aria-disabled', 'true');
  el.classList.add('busy');
  try {
    return await promise;
  } finally {
    el.removeAttribute('aria-disabled');
    el.classList.remove('busy');
  }
}

// -- messages

/** The newest last: [{at, kind, text}]. */
export const messages = [];
const SHOWN = 3;

export function toast(said, { kind = 'ok', action } = {}) {
  messages.push({ at: Date.now(), kind, text: said });
  messages.splice(0, messages.length - 50);
  const place = document.getElementById('toasts');
  const close = () => { clearTimeout(timer); el.remove(); };
  const el = h('div', { class: `toast ${kind}`, role: kind === 'error' ? 'alert' : null },
    icon({ ok: 'check', info: 'info', error: 'warn' }[kind]), h('p', null, said),
    action && button(action.label, { kind: 'ghost', on: () => { close(); return action.run(); } }),
    iconButton('close', t('act.close'), close));
  let timer = 0;
  const leave = () => { if (kind !== 'error') timer = setTimeout(close, action ? 10000 : 6000); };
  for (const type of ['pointerenter', 'focusin']) el.addEventListener(type, () => clearTimeout(timer));
  for (const type of ['pointerleave', 'focusout']) el.addEventListener(type, leave);
  while (place.children.length >= SHOWN) place.firstChild.remove();
  // Behind a modal dialog nothing can be reached, or read aloud.
  ([...document.querySelectorAll('dialog[open]')].at(-1) || document.body).append(place);
  place.append(el);
  leave();
  if (kind !== 'error') announce(said);
  return close;
}

/** What went wrong, in words: those of the code, else the gateway's own. */
export const wording = ({ code, params, message }) => (known(`err.${code}`) ? t(`err.${code}`, params) : message);

export function fail(error) {
  if (error.name !== 'AbortError') toast(wording(error), { kind: 'error' });
}

// -- dialogs

export function dialog({ title, body, footer = [], wide, sheet, onclose }) {
  const id = nextId('dialog');
  const content = h('div', { class: 'body' }, body), shut = () => el.close();
  const el = h('dialog', { class: `dialog ${wide ? 'wide' : ''} ${sheet ? 'sheet' : ''}`, 'aria-labelledby': id },
    h('header', null, h('h2', { id }, title), iconButton('close', t('act.close'), shut)),
    content, footer.length > 0 && h('footer', null, footer));
  el.addEventListener('close', () => {
    if (el.contains(document.getElementById('toasts'))) document.body.append(document.getElementById('toasts'));
    el.remove();
    onclose?.();
  });
  el.addEventListener('pointerdown', (event) => { if (event.target === el) shut(); });
  document.body.append(el);
  el.showModal();
  return { el, body: content, close: shut };
}

/** Promise of true when the person agreed. Dangerous things start on Cancel; `typed` must be typed first. */
export function confirm({ title, body, action, danger, typed, wide }) {
  return new Promise((resolve) => {
    const input = typed && h('input', { type: 'text', autocomplete: 'off' });
    const agree = () => {
      if (typed && input.value.trim() !== typed) return input.focus();
      resolve(true);
      return made.close();
    };
    const cancel = button(t('act.cancel'), { on: () => made.close() });
    const ok = button(action, { kind: danger ? 'danger solid' : 'primary', on: agree });
    const made = dialog({
      title, wide, footer: [cancel, ok], onclose: () => resolve(false),
      body: [typeof body === 'string' ? h('p', null, body) : body, typed && field(t('ui.type', { typed }), input)],
    });
    (danger ? cancel : made.body.querySelector('[type=text]') || ok).focus();
  });
}

export function menu(anchor, items) {
  const entries = items.map((item) => h('button', {
    type: 'button', role: 'menuitem', tabindex: '-1', class: item.danger ? 'danger' : null,
    on: { click: () => { el.hidePopover(); const done = item.run(); if (done instanceof Promise) done.catch(fail); } },
  }, item.icon && icon(item.icon), item.label));
  const el = h('div', { class: 'menu', role: 'menu', popover: 'auto' }, entries);
  const keys = { ArrowDown: 1, ArrowUp: -1 };
  el.addEventListener('keydown', (event) => {
    const step = keys[event.key], here = entries.indexOf(document.activeElement);
    if (!step && !['Home', 'End'].includes(event.key)) return;
    event.preventDefault();
    entries.at(step ? (here + step) % entries.length : event.key === 'Home' ? 0 : -1).focus();
  });
  el.addEventListener('toggle', (event) => { if (event.newState === 'closed') { el.remove(); anchor.focus?.(); } });
  (anchor.closest('dialog') || document.body).append(el);
  el.showPopover();
  const box = anchor.getBoundingClientRect(), own = el.getBoundingClientRect();
  const below = box.bottom + 4 + own.height < innerHeight;
  el.style.setProperty('left', `${Math.max(8, Math.min(box.right - own.width, innerWidth - own.width - 8))}px`);
  el.style.setProperty('top', `${Math.max(8, below ? box.bottom + 4 : box.top - own.height - 4)}px`);
  entries[0]?.focus();
  return el;
}

// -- choices

/** One of a few exclusive views; `el.set(value)` shows another without telling. */
export function segmented(label, options, value, onchange) {
  const parts = options.map(([one, words]) => h('button', { type: 'button', role: 'radio', 'data-value': one,
    on: { click: () => choose(one) } }, words));
  const el = h('div', { class: 'segmented', role: 'radiogroup', 'aria-label': label }, parts);
  const show = (wanted) => parts.forEach((part, index) => {
    const is = options[index][0] === wanted;
    part.setAttribute('aria-checked', String(is));
    part.tabIndex = is || (index === 0 && !options.some(([one]) => one === wanted)) ? 0 : -1;
  });
  const choose = (wanted) => { show(wanted); onchange(wanted); };
  el.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = (parts.indexOf(document.activeElement) + step + parts.length) % parts.length;
    parts[next].focus();
    choose(options[next][0]);
  });
  show(value);
  el.set = show;
  return el;
}

/** Toggle buttons with counts; `el.patch(options, value)` follows new ones. */
export function chips(label, options, value, onchange) {
  const el = h('div', { class: 'chips', role: 'group', 'aria-label': label });
  el.patch = (now, chosen) => {
    const focused = document.activeElement?.dataset?.chip;
    fill(el, now.map(([one, words, count]) => h('button', { type: 'button', class: 'chip', 'data-chip': one,
      'aria-pressed': String(one === chosen), on: { click: () => { el.patch(now, one); onchange(one); } } },
    words, count !== undefined && count !== null && h('b', null, num(count)))));
    if (focused !== undefined) [...el.children].find((one) => one.dataset.chip === focused)?.focus();
  };
  el.patch(options, value);
  return el;
}

/** A labelled select whose label only screen readers need; the element itself is `.input`. */
export function select(label, options, value, onchange) {
  const input = h('select', { 'aria-label': label, title: label, on: { change: () => onchange?.(input.value) } },
    options.map(([one, words]) => h('option', { value: one, selected: String(one) === String(value) }, words)));
  return Object.assign(h('span', { class: 'select' }, input, icon('down')), { input });
}

/** Label above, help and error below; `el.error(text)` says what is wrong, or nothing. */
export function field(label, input, { help, error } = {}) {
  const kinds = 'input,select,textarea', control = input.matches(kinds) ? input : input.querySelector(kinds);
  if (control) control.id ||= nextId('in');
  const wrong = h('p', { class: 'wrong', id: nextId('wrong'), hidden: true });
  const note = help && h('p', { class: 'help', id: nextId('help') }, help);
  const name = h(control ? 'label' : 'span', { for: control?.id, class: 'name' }, label);
  const el = h('div', { class: 'field' }, name, input, note, wrong);
  el.error = (words) => {
    fill(wrong, words && icon('warn'), words);
    wrong.hidden = !words;
    control?.setAttribute('aria-invalid', String(Boolean(words)));
  };
  control?.setAttribute('aria-describedby', [note?.id, wrong.id].filter(Boolean).join(' '));
  if (error) el.error(error);
  return el;
}

/** A switch; when `onchange(wanted)` rejects it goes back. */
export function toggle(label, checked, onchange, help) {
  const id = nextId('switch');
  const show = (is) => el.setAttribute('aria-checked', String(is));
  const flip = () => {
    if (el.getAttribute('aria-disabled') === 'true') return;
    const wanted = el.getAttribute('aria-checked') !== 'true';
    show(wanted);
    const done = onchange(wanted);
    if (done instanceof Promise) busy(el, done).catch((error) => { show(!wanted); fail(error); });
  };
  const on = { click: flip };
  const el = h('button', { type: 'button', role: 'switch', class: 'switch', 'aria-labelledby': id, on });
  show(checked);
  const words = h('div', null, h('span', { id, class: 'name', on }, label), help && h('p', { class: 'help' }, help));
  return Object.assign(h('div', { class: 'toggle' }, el, words), { set: show, control: el });
}

/** Links [[id, words, href]] of which one is current: `el.show(id)`. */
export function tabs(label, links, kind) {
  const all = links.map(([id, words, href]) => h('a', { href, 'data-id': id }, words));
  return Object.assign(h('nav', { class: kind, 'aria-label': label }, all), { show: (id) => all.forEach((one) => {
    one.toggleAttribute('aria-current', one.dataset.id === id);
    if (one.dataset.id === id) one.scrollIntoView({ block: 'nearest', inline: 'center' });
  }) });
}

// -- copying

/** The clipboard, where there is one; else the old way; else the text is shown, selected. */
export async function copy(value) {
  try {
    await navigator.clipboard.writeText(value);
    return true;
  } catch { /* no secure context, or refused: below */ }
  const area = h('textarea', { class: 'vh', value, readonly: true, 'aria-hidden': 'true', tabindex: '-1' });
  const home = document.querySelector('dialog[open]') || document.body, before = document.activeElement;
  home.append(area);
  area.select();
  const done = document.execCommand('copy');
  area.remove();
  before?.focus?.();
  if (done) return true;
  const shown = h('textarea', { value, readonly: true, rows: '4' });
  dialog({ title: t('ui.copyTitle'), body: field(t('ui.copyBy'), shown) });
  shown.select();
  return false;
}

export function copyButton(from, label = t('act.copy'), props = {}) {
  const el = button(label, { icon: 'copy', ...props, on: async () => {
    if (!(await copy(await (typeof from === 'function' ? from() : from)))) return;
    const words = el.querySelector('.label');
    el.classList.add('done');
    announce(t('act.copied'));
    if (words) text(words, t('act.copied'));
    setTimeout(() => { el.classList.remove('done'); if (words) text(words, label); }, 1600);
  } });
  return el;
}

const WORDS = 'async|await|const|curl|export|for|from|if|import|in|model_provider|new|of|print|set';
const MARKS = new RegExp(String.raw`("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|\b(?:${WORDS})\b`, 'g');

/** Strings and keywords are marked; `label` names the block and is its header. */
export function codeBlock(source, { label = '', copyable = true } = {}) {
  const code = h('code');
  const el = h('figure', { class: 'code' }, h('figcaption', null, h('span', null, label),
    copyable && copyButton(() => code.textContent, t('act.copy'), { kind: 'ghost' })),
  h('pre', { tabindex: '0', role: 'group', 'aria-label': label || t('ui.code') }, code));
  el.set = (words) => {
    let last = 0;
    code.replaceChildren();
    for (const found of words.matchAll(MARKS)) {
      code.append(words.slice(last, found.index), h('span', { class: found[1] ? 'str' : 'kw' }, found[0]));
      last = found.index + found[0].length;
    }
    code.append(words.slice(last));
  };
  el.set(source);
  return el;
}

// -- pieces of pages

export function card({ title, note, actions, ...props }, ...children) {
  const id = nextId('card');
  return h('section', { ...props, class: `card ${props.class || ''}`, 'aria-labelledby': title ? id : null },
    title && h('header', null, h('h2', { id }, title), note && h('span', { class: 'note' }, note),
      actions && h('div', { class: 'actions' }, actions)), h('div', { class: 'content' }, children));
}

/** Status -> [colour, icon, string]. */
const STATES = {
  ready: ['ok', 'check', 'st.ready'], low: ['warn', 'warn', 'st.low'], empty: ['warn', 'warn', 'st.empty'],
  unknown: ['idle', 'clock', 'st.unknown'], login_rejected: ['bad', 'cross', 'st.login'],
  auth_error: ['bad', 'cross', 'st.autherr'], expired: ['bad', 'cross', 'st.expired'],
  excluded: ['idle', 'pause', 'st.excluded'],
};

export function statusText(account) {
  const key = STATES[account.status]?.[2] || 'st.unknown', back = account.statusParams?.until;
  return key === 'st.empty' && !back ? t('st.emptyNow') : t(key, { t: back ? at(back) : '' });
}

export function pill(account) {
  const [colour, shape] = STATES[account.status] || STATES.unknown;
  const back = account.statusParams?.until;
  return h('span', { class: `pill ${colour}`, title: back ? exact(back) : null }, icon(shape), statusText(account));
}

export const tag = (plan) => plan && h('span', { class: 'tag' }, known(`plan.${plan}`) ? t(`plan.${plan}`) : plan);

export function windowName({ key, minutes }) {
  if (known(`quota.${key}`)) return t(`quota.${key}`);
  if (!minutes) return t('quota.any');
  if (minutes === 300) return t('quota.5h');
  if (minutes === 10080) return t('quota.week');
  const [unit, length] = minutes >= 1440 ? ['quota.days', 1440] : ['quota.hours', 60];
  return plural(unit, Math.round(minutes / length));
}

/** [colour, icon, words] of how a window is doing. */
function verdict(quota, trusted) {
  const left = quota.remainingPercent, { verdict: said, emptyAt } = quota.pace || {};
  const colour = left <= 5 ? 'bad' : left <= 25 || said === 'fast' ? 'warn' : 'ok';
  if (!trusted) return ['idle', 'clock', ''];
  if (left <= 0 || said === 'empty') return ['bad', 'warn', t('quota.empty')];
  if (said === 'fast') return [colour, 'warn', emptyAt ? t('quota.fast', { t: at(emptyAt) }) : t('quota.fastNow')];
  return [colour, 'check', said === 'ok' ? t('quota.onPace') : ''];
}

/** What is left of one window, and (the tick) how much of its time is still to go. `at`: when it was read. */
export function meter(quota, options = {}) {
  const name = h('span', { class: 'name' }), left = h('b'), pace = h('span', { class: 'pace' }), reset = h('span');
  const track = h('div', { class: 'track', role: 'meter', 'aria-valuemin': 0, 'aria-valuemax': 100 }, h('i'), h('s'));
  const el = h('div', null, h('div', { class: 'over' }, name, left), track, h('div', { class: 'under' }, pace, reset));
  el.patch = (now, { big, trusted = true, at: read } = {}) => {
    const value = now?.remainingPercent, has = typeof value === 'number';
    const [colour, shape, words] = has ? verdict(now, trusted) : ['none', 'clock', ''];
    const tick = trusted && has ? now.pace?.timeLeftPercent : null;
    el.className = `meter ${colour} ${big ? 'big' : ''}`;
    text(name, windowName(now || {}));
    text(left, has ? t('quota.left', { p: value }) : t('quota.none'));
    fill(pace, words && [icon(shape), words]);
    track.style.setProperty('--v', `${has ? value : 0}%`);
    track.style.setProperty('--t', `${tick ?? 0}%`);
    track.classList.toggle('ticked', typeof tick === 'number' && tick > 0 && tick < 100);
    const say = () => {
      if (!trusted) return read ? t('quota.stale', { ago: ago(read) }) : t('quota.staleNow');
      if (!has) return t('quota.unknown');
      if (!now.resetsAt) return t('quota.idle');
      const d = wait(now.resetsAt - Date.now());
      return big ? t('quota.resetsAt', { t: at(now.resetsAt), d }) : t('quota.resetsIn', { d });
    };
    ticking(reset, now?.resetsAt || 0, say);
    reset.title = now?.resetsAt ? exact(now.resetsAt) : '';
    track.setAttribute('aria-label', name.textContent);
    track.setAttribute('aria-valuenow', String(has ? value : 0));
    track.setAttribute('aria-valuetext', [left.textContent, say(), words].filter(Boolean).join(', '));
  };
  el.patch(quota, options);
  return el;
}

export function progress(done, total, label) {
  const bar = h('div', { class: 'progress', role: 'progressbar', 'aria-label': label || t('ui.progress') }, h('i'));
  bar.patch = (now, all) => {
    bar.classList.toggle('unknown', !all);
    bar.style.setProperty('--v', `${all ? Math.min(100, (now / all) * 100) : 0}%`);
    if (!all) return;
    for (const [name, value] of [['min', 0], ['max', all], ['now', now]]) bar.setAttribute(`aria-value${name}`, value);
  };
  bar.patch(done, total);
  return bar;
}

/** A job as one line: how far it is, what is left, Cancel. `el.patch(job)`. */
export function jobLine(job) {
  const words = h('span', { class: 'name' }), rest = h('span', { class: 'note' }), bar = progress(job.done, job.total);
  const cancel = button(t('act.cancel'), { kind: 'ghost', on: () => send('DELETE', `/jobs/${job.id}`) });
  const el = h('div', { class: 'jobline' }, icon('refresh'), words, bar, rest, cancel);
  el.patch = (now) => {
    const name = t(`job.${now.kind}`), runs = ['queued', 'running'].includes(now.state);
    text(words, now.total ? t('job.line', { name, n: num(now.done), m: num(now.total) }) : name);
    bar.setAttribute('aria-label', name);
    bar.patch(now.done, now.total);
    const soon = now.etaMs && now.done * 10 >= now.total ? t('job.eta', { d: duration(now.etaMs) }) : '';
    text(rest, [soon, now.failed ? plural('job.failed', now.failed) : ''].filter(Boolean).join(' · '));
    cancel.hidden = !runs || now.cancellable === false;
  };
  el.patch(job);
  return el;
}

export function empty(shape, words, ...actions) {
  const row = actions.length > 0 && h('div', { class: 'row' }, actions);
  return h('div', { class: 'empty' }, icon(shape), h('p', null, words), row);
}

export function errorPanel(error, retry) {
  const detail = [wording(error) === error.message ? '' : error.message, error.requestId].filter(Boolean).join(' · ');
  return h('div', { class: 'empty bad', role: 'alert' }, icon('warn'), h('p', null, wording(error)),
    detail && h('p', { class: 'note' }, detail), retry && button(t('act.tryAgain'), { icon: 'refresh', on: retry }));
}

/** Grey blocks where rows will be; the style sheet shows them only after 150 ms. */
export const skeleton = (rows = 3) => h('div', { class: 'skeleton', role: 'status', 'aria-busy': 'true',
  'aria-label': t('ui.loading') }, Array.from({ length: rows }, () => h('i')));

export const details = (summary, ...children) => h('details', null, h('summary', null, icon('right'), summary),
  h('div', { class: 'inner' }, children));

export const row = (...children) => h('div', { class: 'row' }, children);
export const note = (...words) => h('p', { class: 'note' }, words);
export const bullets = (items) => h('ul', { class: 'bullets' }, items.map((one) => h('li', null, one)));
export const warning = (words, shape = 'warn', ...more) => h('div', { class: 'notice warn' }, icon(shape),
  h('p', null, words), more);

/** Pairs of a term and what is told of it. */
export const facts = (pairs) => h('dl', { class: 'facts' }, pairs.map(([term, ...told]) => [h('dt', null, term),
  h('dd', null, told)]));

/** Rows of cells, of which the first is a head; `heads` stand above them. */
export const table = (rows, heads) => h('div', { class: 'scroll' }, h('table', null,
  heads && h('thead', null, h('tr', null, heads.map((one) => h('th', { scope: 'col' }, one)))),
  h('tbody', null, rows.map(([head, ...cells]) => h('tr', null, h('th', { scope: 'row' }, head),
    cells.map((one) => h('td', null, one)))))));

/** A button that works only on the computer that runs azt. */
export const ownButton = (label, props) => button(label, isLocal() ? props : { ...props, disabled: true,
  title: t('share.localOnly') });

/** `read()` again and again into `place`: `draw(got)`, grey blocks before the first, what failed and a way back. */
export function loader(place, read, draw) {
  let drawn = false;
  const load = async () => {
    try {
      draw(await read());
      drawn = true;
    } catch (error) {
      if (drawn) fail(error);
      else fill(place, errorPanel(error, load));
    }
  };
  fill(place, skeleton(4));
  load();
  return load;
}

// -- theme

export const theme = () => pref('theme', 'system');
export function setTheme(wanted) {
  setPref('theme', wanted);
  document.documentElement.dataset.theme = wanted;
}
const darkest = matchMedia('(prefers-color-scheme: dark)');
export const flipTheme = () => setTheme((theme() === 'system' ? darkest.matches : theme() === 'dark') ? 'light' : 'dark');
