// Codex: where its requests go, which sign-in it holds, and the way back. Every write is looked at first.
import { get as fetchJson, send } from './api.js';
import { fill, h, icon } from './dom.js';
import { bytes, mask, timeEl } from './format.js';
import { t } from './i18n.js';
import { accountOf, get, isLocal, nameOf, on, set } from './store.js';
import { card, confirm, facts, loader, menu, note, ownButton, row, tag, toast, warning, wording } from './ui.js';

const MODES = ['openai', 'ai-zero-token'], KINDS = { '+': 'plus', '-': 'minus' };
const look = () => set('codex', { ...get('codex') }); // the panel reads anew, before the watcher of the files tells

/** Dry run, agree, write; when the file was changed between the two, look again. The toast takes the write back.
 * What is said is cdx.<what>.title, .do and .done, with `names`; `shows(seen)` adds to what is agreed to. */
async function change(what, path, { body, names, shows, said }) {
  const seen = await send('POST', path, { ...body, dryRun: true }), words = (part) => t(`cdx.${what}.${part}`, names);
  const diff = seen.diff?.map(({ op, text }) => h('span', { class: KINDS[op] }, `${op} ${text}\n`));
  if (!(await confirm({ title: words('title'), action: words('do'), wide: true, body: [said && warning(said),
    note(t(seen.willBackup ? 'cdx.willBackup' : 'cdx.noBackup', { path: seen.path })), shows?.(seen),
    diff?.length > 0 && h('pre', { class: 'diff', tabindex: '0', role: 'group', 'aria-label': t('cdx.diff') }, diff),
    seen.to && facts(['from', 'to'].map((one) => [t(`cdx.${one}`), mask(seen[one]?.email) || '–']))] }))) return;
  const ended = (now, action) => { look(); toast(now, { action }); };
  try {
    const { backup } = await send('POST', path, { ...body, dryRun: false, base: seen.base });
    const undo = () => send('POST', `/codex/backups/${backup.id}/restore`).then(() => ended(t('cdx.undone')));
    ended(`${words('done')} ${t('cdx.restart')}`, backup && { label: t('act.undo'), run: undo });
  } catch (error) {
    if (error.code !== 'file_changed') throw error;
    await change(what, path, { body, names, shows, said: wording(error) });
  }
}
/** `Use in Codex`: its auth.json gets the sign-in of this account. */
export const useInCodex = (account) => change('use', '/codex/auth', { body: { accountId: account.id },
  names: { name: nameOf(account) }, shows: () => get('codex').takeover?.on && note(t('cdx.use.note')) });
function takeOver(historyMode) {
  const box = h('input', { type: 'checkbox' }), body = { historyMode, get moveHistory() { return box.checked; } };
  return change('take', '/codex/takeover', { body, shows: ({ history: { toMigrate: n }, keyNeeded }) => [
    historyMode === MODES[0] && n > 0 && h('label', { class: 'row' }, box, t('cdx.take.move', { n })),
    keyNeeded && warning(t('cdx.take.key'), 'key')] });
}
/** What is released is read first: the watcher of the files may not have told yet. */
const release = () => fetchJson('/codex').then(({ takeover: { editedSince } }) => change('release', '/codex/release',
  { shows: () => editedSince && note(t('cdx.release.edited')) }));
const restore = ({ id, file, at }) => change('restore', `/codex/backups/${id}/restore`, { names: { file },
  shows: () => note(timeEl(at, 'when')) });
const remove = ({ id, file }) => confirm({ title: t('cdx.deleteTitle', { file }), body: t('cdx.deleteBody'),
  action: t('act.remove'), danger: true }).then((sure) => sure && send('DELETE', `/codex/backups/${id}`).then(look));

const line = (key, ...children) => h('div', { class: 'line' }, h('span', { class: 'name' }, t(key)),
  h('div', { class: 'stack' }, children));
function requests({ on: isOn, since, matchesGateway, baseUrl: there, gatewayUrl: here, path, historyMode }, mode) {
  const foreign = isOn && !matchesGateway, verb = foreign ? 'cdx.point' : isOn ? 'cdx.switch' : 'cdx.take';
  const state = (key, is) => h('p', { class: `state ${is ? 'on' : ''}` }, icon(is ? 'check' : 'dot'), t(key),
    is && h('span', { class: 'vh' }, t('cdx.now')));
  return line('cdx.requests', state('cdx.direct', !isOn), state('cdx.takeover', isOn), note(h('code', null, path),
    isOn && [' · ', t('cdx.since', { mode: historyMode }), ' ', since && timeEl(since, 'when')]),
  foreign && warning(t('cdx.foreign', { there, here })), row((!isOn || foreign || mode !== historyMode)
    && ownButton(t(verb), { kind: 'primary', on: () => takeOver(mode) }),
  isOn && ownButton(t('cdx.release'), { on: release })));
}
function signIn({ accountId, email, exists }) {
  const account = accountOf(accountId), name = nameOf(account) || mask(email);
  const holds = t(name ? 'cdx.holds' : exists ? 'cdx.holdsOther' : 'cdx.holdsNone', { name });
  const on = ({ currentTarget }) => menu(currentTarget, get('accounts').map((one) => ({ label: nameOf(one),
    icon: one.id === accountId ? 'check' : 'accounts', run: () => useInCodex(one) })));
  return line('cdx.signIn', row(holds, tag(account?.plan)), note(t('cdx.apart')),
    row(ownButton(t('cdx.another'), { icon: 'switch', on })));
}
const backups = (list) => h('div', { class: 'scroll' }, h('ul', { class: 'backups' }, list.map((one) => h('li', null,
  h('code', null, one.file), timeEl(one.at, 'when'), h('span', { class: 'note cut' }, [t(`cdx.why.${one.reason}`),
    mask(one.email), bytes(one.size)].filter(Boolean).join(' · ')), ownButton(t('cdx.restore.do'), { kind: 'ghost',
    on: () => restore(one) }), ownButton('', { icon: 'trash', kind: 'ghost square', title: t('act.remove'),
    'aria-label': t('cdx.deleteTitle', one), on: () => remove(one) })))));

/** {el, unmount()}: the panel of Connect and of Settings. */
export function codexPanel() {
  const place = h('div'), byHand = h('a', { href: '#/connect/codex' }, t('cdx.byHand'));
  let mode = '';
  function draw(codex) {
    const { takeover, auth, backups: kept, problem, installed, home } = codex, focused = document.activeElement.name;
    mode ||= takeover.historyMode || MODES[0];
    const radio = (one) => h('label', { class: 'row' }, h('input', { type: 'radio', name: 'mode', checked: mode === one,
      on: { change: () => { mode = one; draw(codex); } } }), t(`cdx.mode.${one}`), note(one));
    const history = h('div', { class: 'radios', role: 'radiogroup', 'aria-label': t('cdx.history') }, MODES.map(radio));
    fill(place, problem && warning(problem, 'warn', byHand), !installed && note(t('cdx.missing', { home })),
      requests(takeover, mode), line('cdx.history', history), signIn(auth), line('cdx.running', t('cdx.restart')),
      line('cdx.backups', kept.length ? backups(kept) : note(t('cdx.noBackups'))),
      !isLocal() && note(t('share.localOnly')));
    if (focused === 'mode') place.querySelector('[name=mode]:checked').focus();
  }
  return { el: card({ title: t('cdx.title'), class: 'codex' }, place),
    unmount: on('codex', loader(place, () => fetchJson('/codex'), draw)) };
}
