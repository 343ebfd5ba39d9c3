// The start: who is this, what is known, what happens now, which page; and the frame around the pages.
import * as api from './api.js';
import { fill, h, icon, keyed, text } from './dom.js';
import { ticking } from './format.js';
import { known, lang, onLang, pref, setLang, t } from './i18n.js';
import { refetch, retryNow } from './live.js';
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
import { accountOf, get, nameOf, on, set } from './store.js';
import * as ui from './ui.js';

const unknown = { title: 'page.unknown', mount: (root) => fill(root, ui.empty('search', t('page.unknownText'),
  ui.button(t('nav.overview'), { kind: 'primary', href: '#/overview' }))) && {} };
const MAIN = { overview, accounts, playground, log, usage, connect, settings };
/** Its first letter follows `g`; its title is `nav.` and its icon; the first four stay in the bar of a phone. */
const NAV = Object.entries(MAIN).map(([name, { title }]) => ({ name, title, shape: title.slice(4) }));
const $ = (id) => document.getElementById(id), openSearch = () => openBox(NAV);
let view = null, unseen = 0;

// -- the frame
const languages = () => ui.segmented(t('shell.language'), [['en', 'English'], ['zh-CN', '中文']], lang(), setLang);
function frame() {
  const entry = ({ name, shape, title: words }) => h('li', { class: `n-${name}` }, h('a', { href: `#/${name}`,
    'data-page': name }, icon(shape), h('span', null, t(words)), h('b', { class: 'count', hidden: true })));
  const more = h('button', { type: 'button', on: { click: openMore } }, icon('more'), h('span', null, t('nav.more')));
  const find = h('button', { type: 'button', class: 'find', title: t('shell.search'), on: { click: openSearch } },
    icon('search'), h('span', null, t('shell.search')), h('kbd', { 'aria-hidden': 'true' }, 'Ctrl K'));
  text($('skip'), t('shell.skip'));
  [$('rail').ariaLabel, $('toasts').ariaLabel] = [t('shell.nav'), t('box.messages')];
  fill($('nav'), NAV.map(entry), h('li', { class: 'n-more' }, more));
  fill($('foot'), h('p', { class: 'live', id: 'live' }, h('i'), h('span')), h('p', { class: 'note', id: 'version' }),
    languages());
  const flip = ui.iconButton('moon', t('shell.theme'), ui.flipTheme, { id: 'theme' });
  fill($('tools'), find, h('span', { id: 'base' }), flip, h('span', { class: 'primary-slot', id: 'primary' }));
  base(); connection(); counts();
}
function openMore() {
  const shut = (then) => () => { made.close(); then?.(); };
  const link = ({ name, shape, title: words }) => ui.button(t(words), { icon: shape, href: `#/${name}`, on: shut() });
  const made = ui.dialog({ title: t('nav.more'), sheet: true, body: h('div', { class: 'more' }, NAV.slice(4).map(link),
    ui.button(t('shell.theme'), { icon: 'moon', on: ui.flipTheme }),
    ui.button(t('shell.search'), { icon: 'search', on: shut(openSearch) }), languages()) });
}
function base() {
  const { baseUrl = '', listen = [], version } = get('gateway'), short = baseUrl.replace('http://', '');
  const title = t('shell.copyBase', { url: short });
  const chip = ui.copyButton(baseUrl, '', { kind: 'chip-copy', 'aria-label': title, title });
  chip.prepend(h('small', null, t('shell.base')), ' ', h('code', null, short));
  fill($('base'), baseUrl && chip); text($('version'), version ? `${listen[0]} · v${version}` : '');
}
function connection() {
  const { state, retryAt, to } = get('connection'), isGone = ['offline', 'restarting'].includes(state);
  const key = to ? 'live.moving' : state === 'restarting' ? 'live.restarting' : 'shell.offline';
  const words = () => t(key, { to, s: Math.max(1, Math.ceil((retryAt - Date.now()) / 1000)) });
  $('live').dataset.state = state; text($('live').lastChild, t(`live.${state}`));
  document.body.classList.toggle('offline', isGone);
  fill($('gone'), isGone && h('div', { class: 'notice warn', id: 'offline', role: 'status' }, icon('warn'),
    ticking(h('p'), Date.now(), words), ui.button(t(to ? 'live.go' : 'shell.retry'), { kind: 'ghost',
      ...to ? { href: to } : { on: retryNow } })));
}
function counts() {
  const action = get('accounts').filter(ui.isRejected).length;
  const isUrgent = action > 0 || get('notices').some((one) => one.level !== 'info');
  for (const [name, n] of [['accounts', action], ['log', unseen]]) Object.assign(
    document.querySelector(`[data-page=${name}] b`), { hidden: !n, textContent: n, title: t(`badge.${name}`, { n }) });
  document.title = `${isUrgent ? '(!) ' : ''}${$('title').textContent} · azt`;
  $('icon').href = isUrgent ? 'favicon-dot.svg' : 'favicon.svg';
}

// -- pages
const onpage = (page, made) => { view = made; text($('title'), t(page.title)); fill($('primary'), made.primary); };
function onroute(route, moved) {
  if (route.page === 'log') unseen = 0;
  document.body.classList.toggle('bare', route.page === 'signin' && !get('session').signedIn);
  const mark = (one) => { one.ariaCurrent = one.dataset.page === route.page ? 'page' : null; };
  document.querySelectorAll('[data-page]').forEach(mark);
  counts();
  if (moved && !document.querySelector('dialog[open]')) $('title').focus({ preventScroll: true });
}

// -- keys
let before = '';
/** Single letters, while nothing is being typed, no dialog is open and the settings have not ended them. */
function onkey(event) {
  const { key, target } = event, was = before, { rows, search, refresh } = view ?? {};
  const isChord = event.ctrlKey || event.metaKey, isSearch = isChord && key.toLowerCase() === 'k';
  const isBusy = event.defaultPrevented || document.querySelector('dialog[open], :popover-open')
    || target.matches('select, textarea, input:not([type=checkbox], [type=radio])');
  if (!isSearch && (isChord || event.altKey || isBusy || pref('keys') === 'off')) return;
  before = key;
  const list = rows?.list() ?? [], at = list.findIndex((row) => row.contains(document.activeElement)), here = list[at];
  const page = was === 'g' && NAV.find(({ name }) => name[0] === key), to = (hash) => () => router.go(hash);
  const step = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 }[key], walks = step && list[0] && (here || key.length === 1);
  const walk = () => (list[here ? at + step : 0] ?? here).querySelector('a, button').focus();
  const does = isSearch ? openSearch : page ? to(`#/${page.name}`) : walks ? walk : { n: to('#/accounts/add'),
    r: refresh, '/': search && (() => search.focus()), '?': () => showShortcuts(NAV),
    x: here && rows.select && (() => rows.select(here)), '.': here && rows.menu && (() => rows.menu(here)) }[key];
  if (does) { event.preventDefault(); does(); }
}

// -- what happens elsewhere
function onrouting(routing, changes) {
  const { cause } = changes.findLast((one) => one.cause) ?? {};
  if (!cause) return;
  const from = accountOf(cause.from), why = t(known(`reason.${cause.code}`) ? `reason.${cause.code}` : 'reason.other');
  const back = { label: t('toast.switchBack'), run: () => api.send('POST', `/accounts/${cause.from}/activate`) };
  const words = { a: nameOf(from), b: nameOf(accountOf(cause.to || routing.activeId)), why };
  ui.toast(t('toast.autoSwitched', words), { kind: 'info', action: from && back });
}
const followed = new Set();
/** One line for each job that runs, and a word when one that was seen running is done. */
function onjobs(jobs, changes) {
  for (const { id, kind, state, done, failed, total } of changes.flat()) {
    const words = { name: t(`job.${kind}`), n: done - failed, m: total };
    if (state === 'done' && followed.delete(id)) ui.toast(t('job.done', words), { kind: failed ? 'info' : 'ok' });
  }
  const running = jobs.filter((job) => ['queued', 'running'].includes(job.state));
  running.forEach(({ id }) => followed.add(id));
  keyed($('jobs'), running, (job) => job.id, ui.jobLine, (line, job) => line.patch(job));
}
function onrequest(last, changes) {
  if (router.current().page !== 'log') unseen += changes.filter((one) => one?.row.result === 'failed').length;
  counts();
}

// -- the start
async function boot() {
  const entrance = () => router.hash('signin', [], { to: location.hash });
  const signIn = () => router.current().page === 'signin' || router.go(entrance());
  const reload = { label: t('shell.reload'), run: () => location.reload() };
  const otherVersion = () => ui.toast(t('shell.newVersion'), { kind: 'info', action: reload });
  Object.assign(api.hooks, { proof: askProof, signIn, otherVersion });
  ui.setTheme(ui.theme()); frame();
  on('gateway', base); on('connection', connection); on(['accounts', 'notices'], counts);
  on('routing', onrouting); on('jobs', onjobs); on('request', onrequest);
  onLang(() => { frame(); router.remount(); });
  addEventListener('keydown', onkey); installAdd();
  $('skip').addEventListener('click', (event) => { event.preventDefault(); $('main').focus(); });
  // Without an answer the bar will say that the gateway is gone.
  const session = await api.get('/session').catch(() => ({ signedIn: true, scope: 'local' }));
  set('session', session);
  if (session.signedIn) await refetch().catch((error) => error.status === 401 || ui.fail(error));
  if (!session.signedIn && !/^#\/(pair|open|signin)/.test(location.hash)) history.replaceState(null, '', entrance());
  $('shell').hidden = false;
  router.start({ ...MAIN, signin, pair: signin, open: signin, unknown }, { outlet: $('main'), onpage, onroute });
  if (session.signedIn) retryNow();
}
if ('showPopover' in HTMLElement.prototype && CSS.supports('color', 'light-dark(red, red)')) boot();
else document.body.prepend(h('p', { class: 'plain' }, t('shell.oldBrowser')));
