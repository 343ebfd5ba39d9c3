// The start: who is this, what is known, what happens now, which page; and the frame around the pages.
import * as api from './api.js';
import { fill, h, icon, text } from './dom.js';
import { ticking } from './format.js';
import { lang, onLang, setLang, t } from './i18n.js';
import { follow, refetch, retryNow } from './live.js';
import { openBox, showShortcuts } from './palette.js';
import { page as accounts } from './pages/accounts.js';
import { install as installAdd } from './pages/add.js';
import { page as connect } from './pages/connect.js';
import { page as log } from './pages/log.js';
import { page as overview } from './pages/overview.js';
import { page as playground } from './pages/play.js';
import { page as settings } from './pages/settings.js';
import { askProof, page as signin } from './pages/signin.js';
import { page as usage } from './pages/usage.js';
import * as router from './router.js';
import { accountOf, get, load, nameOf, on, set, statusCounts } from './store.js';
import { button, copyButton, dialog, empty, fail, iconButton, isDark, jobLine, setTheme, theme, toast } from './ui.js';

/** Route, title, icon, key after `g`; the first four stay in the bar of a phone. A page joins here. */
const NAV = [
  ['overview', 'nav.overview', 'overview', 'o'], ['accounts', 'nav.accounts', 'accounts', 'a'],
  ['playground', 'nav.play', 'play', 'p'], ['log', 'nav.log', 'log', 'l'], ['usage', 'nav.usage', 'usage', 'u'],
  ['connect', 'nav.connect', 'connect', 'c'], ['settings', 'nav.settings', 'settings', 's'],
];
const unknown = {
  title: 'page.unknown',
  mount: (root) => {
    fill(root, empty('search', t('page.unknownText'), button(t('nav.overview'), { kind: 'primary', href: '#/overview' })));
    return { primary: null };
  },
};
const PAGES = { overview, accounts, playground, log, usage, connect, settings, signin, pair: signin, open: signin, unknown };
const NEEDS_ACTION = ['login_rejected', 'auth_error', 'expired'];

const $ = (id) => document.getElementById(id);
let view = null, title = '', seenFailures = 0;

// -- the frame

function frame() {
  text($('skip'), t('shell.skip'));
  $('rail').setAttribute('aria-label', t('shell.nav'));
  $('toasts').setAttribute('aria-label', t('box.messages'));
  fill($('nav'), NAV.map(([name, words, shape]) => h('li', { class: `n-${name}` }, h('a', { href: `#/${name}`, 'data-page': name },
    icon(shape), h('span', null, t(words)), h('b', { class: 'count', hidden: true })))),
  h('li', { class: 'n-more' }, h('button', { type: 'button', on: { click: openMore } }, icon('more'), h('span', null, t('nav.more')))));
  fill($('foot'), h('p', { class: 'live', id: 'live' }, h('i'), h('span')), h('p', { class: 'note', id: 'version' }), languages());
  fill($('tools'), h('button', { type: 'button', class: 'find', id: 'find', title: t('shell.search'),
    on: { click: () => openBox(NAV) } }, icon('search'), h('span', null, t('shell.search')), h('kbd', { 'aria-hidden': 'true' }, 'Ctrl K')),
  h('span', { class: 'base', id: 'base' }), iconButton(isDark() ? 'sun' : 'moon', t('shell.theme'), flipTheme, { id: 'theme' }),
  h('span', { class: 'primary-slot', id: 'primary' }));
  base();
  connection();
  counts();
}

const languages = () => h('div', { class: 'languages', role: 'group', 'aria-label': t('shell.language') },
  [['en', 'English'], ['zh-CN', '中文']].map(([code, name]) => h('button', { type: 'button', lang: code,
    'aria-pressed': String(lang() === code), on: { click: () => setLang(code) } }, name)));

function flipTheme() {
  setTheme(isDark() ? 'light' : 'dark');
  $('theme').querySelector('svg').replaceWith(icon(isDark() ? 'sun' : 'moon'));
}

function openMore() {
  const links = NAV.slice(4).map(([name, words, shape]) => button(t(words), { icon: shape, href: `#/${name}`, on: () => made.close() }));
  const made = dialog({ title: t('nav.more'), sheet: true, body: h('div', { class: 'more' }, links,
    button(t('shell.theme'), { icon: 'moon', on: flipTheme }),
    button(t('shell.search'), { icon: 'search', on: () => { made.close(); openBox(NAV); } }), languages()) });
}

function base() {
  const url = get('gateway').baseUrl || '';
  const short = url.replace('http://', ''), words = t('shell.copyBase', { url: short });
  fill($('base'), url && copyButton(() => get('gateway').baseUrl, '', { kind: 'chip-copy', 'aria-label': words, title: words }));
  $('base').firstChild?.prepend(h('small', null, t('shell.base')), ' ', h('code', null, short));
  text($('version'), [get('gateway').listen?.[0], get('gateway').version && `v${get('gateway').version}`].filter(Boolean).join(' · '));
}

function connection() {
  const { state, retryAt } = get('connection');
  const words = { live: t('shell.live'), connecting: t('shell.connecting'), restarting: t('shell.restarting') };
  $('live').dataset.state = state;
  text($('live').lastChild, words[state] || t('shell.offlineShort'));
  document.body.classList.toggle('offline', ['offline', 'restarting'].includes(state));
  let bar = $('offline');
  if (state === 'live' || state === 'connecting') return bar?.remove();
  if (!bar) $('bars').prepend(bar = h('div', { class: 'notice warn', id: 'offline', role: 'status' }));
  const said = h('p');
  ticking(said, Date.now(), () => (state === 'restarting' ? t('shell.restarting')
    : t('shell.offline', { s: Math.max(1, Math.ceil((retryAt - Date.now()) / 1000)) })));
  return fill(bar, icon('warn'), said, button(t('shell.retry'), { kind: 'ghost', on: () => { retryNow(); } }));
}

function counts() {
  const states = statusCounts(), action = NEEDS_ACTION.reduce((sum, one) => sum + (states[one] || 0), 0);
  const badge = (name, n) => {
    const el = document.querySelector(`[data-page=${name}] .count`);
    if (!el) return;
    el.hidden = !n;
    text(el, n || '');
    el.setAttribute('aria-label', n ? t(`badge.${name}`, { n }) : '');
  };
  badge('accounts', action);
  badge('log', seenFailures);
  const urgent = action > 0 || get('notices').some((one) => one.level !== 'info');
  document.title = `${urgent ? '(!) ' : ''}${title} · azt`;
  mark(urgent);
}

let marked = false;
/** The icon of the tab gets a dot while something needs the person. */
async function mark(urgent) {
  if (urgent === marked) return;
  marked = urgent;
  const link = document.querySelector('link[rel=icon]');
  if (!urgent) return link.setAttribute('href', 'favicon.svg');
  const drawn = await (await fetch('favicon.svg')).text();
  const dotted = drawn.replace('</svg>', '<circle cx="19" cy="5" r="5" fill="#d13a30"/></svg>');
  return link.setAttribute('href', URL.createObjectURL(new Blob([dotted], { type: 'image/svg+xml' })));
}

// -- pages

function onpage(page, made) {
  view = made;
  title = t(page.title);
  text($('title'), title);
  const add = button(t('acc.add'), { icon: 'plus', kind: 'primary', href: '#/accounts/add' });
  fill($('primary'), made.primary === undefined ? add : made.primary);
  counts();
}

function onroute(route, moved) {
  if (route.page === 'log') seenFailures = 0;
  for (const link of document.querySelectorAll('[data-page]')) {
    if (link.dataset.page === route.page) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  counts();
  if (moved && !document.querySelector('dialog[open]')) $('title').focus({ preventScroll: true });
}

// -- keys

const isTyping = (el) => el.isContentEditable || (/^(INPUT|SELECT|TEXTAREA)$/.test(el.tagName) && !/checkbox|radio/.test(el.type));
let after = '';

function onkey(event) {
  const { key } = event, chord = event.ctrlKey || event.metaKey;
  if (chord && key.toLowerCase() === 'k') { event.preventDefault(); openBox(NAV); return; }
  const off = chord || event.altKey || isTyping(event.target) || document.querySelector('dialog[open],:popover-open');
  if (off || event.defaultPrevented) return;
  const was = after, rows = view?.rows;
  after = key === 'g' ? 'g' : '';
  const list = rows?.list() || [], here = list.findIndex((row) => row.contains(document.activeElement));
  const step = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 }[key];
  const actions = {
    '/': () => view?.search?.focus(), n: () => router.go('#/accounts/add'), r: () => view?.refresh?.(), '?': showShortcuts,
    x: () => here >= 0 && rows.select?.(list[here]), '.': () => here >= 0 && rows.menu?.(list[here]),
  };
  const target = was === 'g' && NAV.find((one) => one[3] === key);
  if (target) router.go(`#/${target[0]}`);
  else if (step && list.length && (here >= 0 || key.length === 1)) {
    const row = list[Math.max(0, Math.min(list.length - 1, here < 0 ? 0 : here + step))];
    (row.matches('a,button,[tabindex]') ? row : row.querySelector('a,button'))?.focus();
  } else if (actions[key]) actions[key]();
  else return;
  event.preventDefault();
}

// -- what happens elsewhere

function onrouting(routing, changes) {
  const { cause } = changes.findLast((one) => one.cause) || {};
  if (!cause) return;
  const a = nameOf(accountOf(cause.from)), b = nameOf(accountOf(cause.to || routing.activeId));
  toast(t('toast.autoSwitched', { a, b, why: t(`reason.${cause.code}`) }), { kind: 'info', action: accountOf(cause.from) && {
    label: t('toast.switchBack'), run: () => api.send('POST', `/accounts/${cause.from}/activate`) } });
}

const followed = new Set();

/** One line for each job that runs, and a word when one that was seen running is done. */
function onjobs(jobs, changes) {
  const running = jobs.filter((one) => ['queued', 'running'].includes(one.state));
  for (const job of changes.flat()) {
    if (job.state === 'done' && followed.delete(job.id)) toast(t('job.done', { name: t(`job.${job.kind}`),
      n: job.done - job.failed, m: job.total }), { kind: job.failed ? 'info' : 'ok' });
  }
  for (const job of running) followed.add(job.id);
  const known = new Map([...$('bars').querySelectorAll('.jobline')].map((el) => [el.dataset.job, el]));
  for (const job of running) {
    if (known.has(job.id)) known.get(job.id).patch(job);
    else {
      const line = jobLine(job);
      line.dataset.job = job.id;
      $('bars').append(line);
    }
    known.delete(job.id);
  }
  for (const el of known.values()) el.remove();
}

async function boot() {
  setTheme(theme());
  frame();
  api.hooks.proof = askProof;
  api.hooks.signIn = () => { if (router.current().page !== 'signin') router.go(router.hash('signin', [], { to: location.hash })); };
  on('gateway', base);
  on('connection', connection);
  on('routing', onrouting);
  on('jobs', onjobs);
  on('request', (now, changes) => {
    const failed = changes.filter((one) => one?.type === 'finished' && one.row.result === 'failed');
    if (failed.length && router.current().page !== 'log') { seenFailures += failed.length; counts(); }
  });
  for (const slice of ['accounts', 'notices']) on(slice, counts);
  onLang(() => { frame(); router.remount(); });
  addEventListener('keydown', onkey);
  $('skip').addEventListener('click', (event) => { event.preventDefault(); $('main').focus(); });
  try {
    set('session', await api.get('/session'));
  } catch (error) {
    set('session', { signedIn: error.status !== 401 && error.status !== 403, scope: 'local', can: { write: true } });
  }
  if (get('session').signedIn) await refetch().catch((error) => { if (error.status !== 401) fail(error); });
  $('shell').hidden = false;
  router.start(PAGES, { outlet: $('main'), onpage, onroute });
  installAdd();
  if (!get('session').signedIn && !['pair', 'open'].includes(router.current().page)) return api.hooks.signIn();
  follow(() => toast(t('shell.newVersion'), { kind: 'info', action: { label: t('shell.reload'), run: () => location.reload() } }));
  return load({});
}

const modern = 'showPopover' in HTMLElement.prototype && CSS.supports('color', 'light-dark(red, red)');
if (modern) boot();
else document.body.prepend(h('p', { class: 'plain' }, t('shell.oldBrowser')));
