// The start: who is this, what is known, what happens now, which page; and the frame around the pages.
import * as api from './api.js';
import { fill, h, icon, text } from './dom.js';
import { ticking } from './format.js';
import { known, lang, onLang, pref, setLang, t } from './i18n.js';
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
import { accountOf, get, nameOf, on, set, statusCounts } from './store.js';
import { button, copyButton, dialog, empty, fail, iconButton, isDark, jobLine, setTheme, theme, toast } from './ui.js';

/** Route, icon, key after `g`, page; the first four stay in the bar of a phone. */
const NAV = [
  ['overview', 'overview', 'o', overview], ['accounts', 'accounts', 'a', accounts],
  ['playground', 'play', 'p', playground], ['log', 'log', 'l', log], ['usage', 'usage', 'u', usage],
  ['connect', 'connect', 'c', connect], ['settings', 'settings', 's', settings],
];
const unknown = {
  title: 'page.unknown',
  mount: (root) => {
    const home = button(t('nav.overview'), { kind: 'primary', href: '#/overview' });
    fill(root, empty('search', t('page.unknownText'), home));
    return { primary: null };
  },
};
const PAGES = { signin, pair: signin, open: signin, unknown };
for (const [name, , , page] of NAV) PAGES[name] = page;
const NEEDS_ACTION = ['login_rejected', 'auth_error', 'expired'];

const $ = (id) => document.getElementById(id);
const openSearch = () => openBox(NAV);
let view = null, title = '', unseen = 0, dotted = false;

// -- the frame

function frame() {
  const entry = ([name, shape, , page]) => h('li', { class: `n-${name}` },
    h('a', { href: `#/${name}`, 'data-page': name }, icon(shape), h('span', null, t(page.title)),
      h('b', { class: 'count', hidden: true })));
  const more = h('button', { type: 'button', on: { click: openMore } }, icon('more'), h('span', null, t('nav.more')));
  const search = h('button', { type: 'button', class: 'find', title: t('shell.search'), on: { click: openSearch } },
    icon('search'), h('span', null, t('shell.search')), h('kbd', { 'aria-hidden': 'true' }, 'Ctrl K'));
  text($('skip'), t('shell.skip'));
  $('rail').setAttribute('aria-label', t('shell.nav'));
  $('toasts').setAttribute('aria-label', t('box.messages'));
  fill($('nav'), NAV.map(entry), h('li', { class: 'n-more' }, more));
  const dark = iconButton(isDark() ? 'sun' : 'moon', t('shell.theme'), flipTheme, { id: 'theme' });
  fill($('foot'), h('p', { class: 'live', id: 'live' }, h('i'), h('span')), h('p', { class: 'note', id: 'version' }),
    languages());
  fill($('tools'), search, h('span', { id: 'base' }), dark, h('span', { class: 'primary-slot', id: 'primary' }));
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
  const shut = (then) => () => { made.close(); then?.(); };
  const link = ([name, shape, , page]) => button(t(page.title), { icon: shape, href: `#/${name}`, on: shut() });
  const made = dialog({ title: t('nav.more'), sheet: true, body: h('div', { class: 'more' }, NAV.slice(4).map(link),
    button(t('shell.theme'), { icon: 'moon', on: flipTheme }),
    button(t('shell.search'), { icon: 'search', on: shut(openSearch) }), languages()) });
}

function base() {
  const { baseUrl = '', listen = [], version } = get('gateway'), short = baseUrl.replace('http://', '');
  const words = t('shell.copyBase', { url: short });
  const chip = copyButton(() => get('gateway').baseUrl, '', { kind: 'chip-copy', 'aria-label': words, title: words });
  chip.prepend(h('small', null, t('shell.base')), ' ', h('code', null, short));
  fill($('base'), baseUrl && chip);
  text($('version'), [listen[0], version && `v${version}`].filter(Boolean).join(' · '));
}

function connection() {
  const { state, retryAt } = get('connection'), isGone = state === 'offline' || state === 'restarting';
  $('live').dataset.state = state;
  text($('live').lastChild, t(`live.${state}`));
  document.body.classList.toggle('offline', isGone);
  const bar = $('offline') || h('div', { class: 'notice warn', id: 'offline', role: 'status' }), left = h('p');
  if (!isGone) return bar.remove();
  const seconds = () => Math.max(1, Math.ceil((retryAt - Date.now()) / 1000));
  ticking(left, Date.now(), () => t(state === 'restarting' ? 'live.restarting' : 'shell.offline', { s: seconds() }));
  fill(bar, icon('warn'), left, button(t('shell.retry'), { kind: 'ghost', on: () => { retryNow(); } }));
  return bar.isConnected || $('bars').prepend(bar);
}

function counts() {
  const states = statusCounts(), action = NEEDS_ACTION.reduce((sum, one) => sum + (states[one] || 0), 0);
  for (const [name, n] of [['accounts', action], ['log', unseen]]) {
    const badge = document.querySelector(`[data-page=${name}] .count`);
    badge.hidden = !n;
    text(badge, n || '');
    badge.title = n ? t(`badge.${name}`, { n }) : '';
  }
  const urgent = action > 0 || get('notices').some((one) => one.level !== 'info');
  document.title = `${urgent ? '(!) ' : ''}${title} · azt`;
  if (urgent !== dotted) dot(urgent).catch(() => {}); // the icon is a comfort
  dotted = urgent;
}

/** The icon of the tab gets a dot while something needs the person. */
async function dot(urgent) {
  const link = document.querySelector('link[rel=icon]');
  if (!urgent) return link.setAttribute('href', 'favicon.svg');
  const drawn = await (await fetch('favicon.svg')).text();
  const marked = drawn.replace('</svg>', '<circle cx="19" cy="5" r="5" fill="#d13a30"/></svg>');
  return link.setAttribute('href', URL.createObjectURL(new Blob([marked], { type: 'image/svg+xml' })));
}

// -- pages

function onpage(page, made) {
  view = made;
  title = t(page.title);
  text($('title'), title);
  const add = button(t('acc.add'), { icon: 'plus', kind: 'primary', href: '#/accounts/add' });
  fill($('primary'), made.primary === undefined ? add : made.primary);
}

function onroute(route, moved) {
  if (route.page === 'log') unseen = 0;
  document.body.classList.toggle('bare', route.page === 'signin' && get('session').signedIn !== true);
  for (const link of document.querySelectorAll('[data-page]')) {
    link.ariaCurrent = link.dataset.page === route.page ? 'page' : null;
  }
  counts();
  if (moved && !document.querySelector('dialog[open]')) $('title').focus({ preventScroll: true });
}

// -- keys

const isTyping = (el) => el.matches('select, textarea, input:not([type=checkbox], [type=radio])');
let before = '';

/** Single letters, while nothing is being typed, no dialog is open and the settings have not ended them. */
function onkey(event) {
  const { key, target } = event, chord = event.ctrlKey || event.metaKey, was = before, rows = view?.rows;
  if (chord && key.toLowerCase() === 'k') {
    event.preventDefault();
    openSearch();
  }
  const busy = isTyping(target) || event.defaultPrevented || document.querySelector('dialog[open], :popover-open');
  if (chord || event.altKey || busy || pref('keys') === 'off') return;
  before = key;
  const list = rows?.list() || [], here = list.findIndex((row) => row.contains(document.activeElement));
  const page = was === 'g' && NAV.find((one) => one[2] === key);
  const step = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 }[key];
  const walk = () => {
    const row = list[Math.max(0, Math.min(list.length - 1, here < 0 ? 0 : here + step))];
    (row.matches('a, button, [tabindex]') ? row : row.querySelector('a, button')).focus();
  };
  const action = {
    '/': view?.search && (() => view.search.focus()), n: () => router.go('#/accounts/add'), r: view?.refresh,
    '?': showShortcuts, x: here >= 0 && rows.select && (() => rows.select(list[here])),
    '.': here >= 0 && rows.menu && (() => rows.menu(list[here])),
  }[key];
  const walks = step && list.length && (here >= 0 || key.length === 1);
  const does = page ? () => router.go(`#/${page[0]}`) : walks ? walk : action;
  if (!does) return;
  event.preventDefault();
  does();
}

// -- what happens elsewhere

function onrouting(routing, changes) {
  const { cause } = changes.findLast((one) => one.cause) || {};
  if (!cause) return;
  const from = accountOf(cause.from), why = t(known(`reason.${cause.code}`) ? `reason.${cause.code}` : 'reason.other');
  const back = { label: t('toast.switchBack'), run: () => api.send('POST', `/accounts/${cause.from}/activate`) };
  const words = { a: nameOf(from), b: nameOf(accountOf(cause.to || routing.activeId)), why };
  toast(t('toast.autoSwitched', words), { kind: 'info', action: from && back });
}

const followed = new Set();

/** One line for each job that runs, and a word when one that was seen running is done. */
function onjobs(jobs, changes) {
  for (const job of changes.flat()) {
    const words = { name: t(`job.${job.kind}`), n: job.done - job.failed, m: job.total };
    const isDone = job.state === 'done' && followed.delete(job.id);
    if (isDone) toast(t('job.done', words), { kind: job.failed ? 'info' : 'ok' });
  }
  const lines = new Map([...$('bars').querySelectorAll('.jobline')].map((el) => [el.dataset.job, el]));
  for (const job of jobs.filter((one) => ['queued', 'running'].includes(one.state))) {
    followed.add(job.id);
    const line = lines.get(job.id) || jobLine(job);
    line.dataset.job = job.id;
    line.patch(job);
    if (!lines.delete(job.id)) $('bars').append(line);
  }
  for (const el of lines.values()) el.remove();
}

function onrequest(last, changes) {
  if (router.current().page !== 'log') unseen += changes.filter((one) => one?.row.result === 'failed').length;
  counts();
}

async function boot() {
  setTheme(theme());
  frame();
  api.hooks.proof = askProof;
  api.hooks.signIn = () => {
    if (router.current().page !== 'signin') router.go(router.hash('signin', [], { to: location.hash }));
  };
  const heard = { gateway: base, connection, routing: onrouting, jobs: onjobs, request: onrequest };
  for (const [slice, fn] of Object.entries({ ...heard, accounts: counts, notices: counts })) on(slice, fn);
  onLang(() => { frame(); router.remount(); });
  addEventListener('keydown', onkey);
  installAdd();
  $('skip').addEventListener('click', (event) => { event.preventDefault(); $('main').focus(); });
  // Without an answer the bar will say that the gateway is gone.
  const session = await api.get('/session').catch(() => ({ signedIn: true, scope: 'local' }));
  set('session', session);
  if (session.signedIn) await refetch().catch((error) => error.status === 401 || fail(error));
  const { page } = router.parse(location.hash);
  if (!session.signedIn && !['pair', 'open', 'signin'].includes(page)) {
    history.replaceState(null, '', router.hash('signin', [], { to: location.hash }));
  }
  $('shell').hidden = false;
  router.start(PAGES, { outlet: $('main'), onpage, onroute });
  const reload = { label: t('shell.reload'), run: () => location.reload() };
  follow(() => toast(t('shell.newVersion'), { kind: 'info', action: reload }));
  if (session.signedIn) retryNow();
}

const isNew = 'showPopover' in HTMLElement.prototype && CSS.supports('color', 'light-dark(red, red)');
if (isNew) boot();
else document.body.prepend(h('p', { class: 'plain' }, t('shell.oldBrowser')));
