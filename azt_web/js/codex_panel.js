// Codex: where its requests go, which sign-in it holds, and the way back. Every write is looked at first.
import { get as fetchJson, send } from './api.js';
import { fill, h, icon } from './dom.js';
import { bytes, mask, timeEl } from './format.js';
import { t } from './i18n.js';
import { snippets } from './snippets.js';
import { accountOf, get, isLocal, nameOf, on, set } from './store.js';
import { card, codeBlock, confirm, details, facts, loader, menu, note, ownButton, row, tag, toast, warning,
  wording } from './ui.js';

const MODES = ['openai', 'ai-zero-token'];
const who = (one) => (one ? mask(one.email) : t('cdx.nobody'));

const look = () => set('codex', { ...get('codex') }); // the panel reads anew, before the watcher of the files tells

/** Dry run, agree, write; when the file was changed between the two, look again. The toast takes the write back. */
async function change({ path, title, action, body = {}, shows, told, said }) {
  const seen = await send('POST', path, { ...body, dryRun: true });
  const lines = (seen.diff || []).map(({ op, text }) => h('span', { class: { '+': 'plus', '-': 'minus' }[op] },
    `${op} ${text}\n`));
  const agreed = await confirm({ title, action, wide: true, body: [said && warning(said),
    note(t(seen.willBackup ? 'cdx.willBackup' : 'cdx.noBackup', { path: seen.path })), shows?.(seen),
    lines.length > 0 && h('pre', { class: 'diff', tabindex: '0', role: 'group', 'aria-label': t('cdx.diff') }, lines),
    'to' in seen && facts([[t('cdx.from'), who(seen.from)], [t('cdx.to'), who(seen.to)]])] });
  if (!agreed) return;
  try {
    const { backup } = await send('POST', path, { ...body, dryRun: false, base: seen.base });
    const undo = async () => {
      await send('POST', `/codex/backups/${backup.id}/restore`);
      look();
      toast(t('cdx.undone'));
    };
    look();
    toast(`${told} ${t('cdx.restart')}`, { action: backup && { label: t('act.undo'), run: undo } });
  } catch (error) {
    if (error.code !== 'file_changed') throw error;
    await change({ path, title, action, body, shows, told, said: wording(error) });
  }
}

/** `Use in Codex`: its auth.json gets the sign-in of this account. */
export const useInCodex = (account) => change({ path: '/codex/auth', body: { accountId: account.id },
  title: t('cdx.useTitle', { name: nameOf(account) }), action: t('cdx.writeAuth'),
  told: t('cdx.used', { name: nameOf(account) }), shows: () => get('codex').takeover?.on && note(t('cdx.useNote')) });

// -- the panel: a function for each of its lines, of what `GET /codex` says

const line = (key, ...children) => h('div', { class: 'line' }, h('span', { class: 'name' }, t(key)),
  h('div', { class: 'stack' }, children));

function takeOver(mode) {
  const body = { historyMode: mode, baseUrl: null, moveHistory: false };
  const moves = (n) => h('label', { class: 'row' }, h('input', { type: 'checkbox', on: { change: ({ target }) => {
    body.moveHistory = target.checked;
  } } }), t('cdx.move', { n }));
  return change({ path: '/codex/takeover', body, title: t('cdx.takeTitle'), action: t('cdx.writeConfig'),
    told: t('cdx.taken'), shows: ({ history, keyNeeded }) => [mode === MODES[0] && history?.toMigrate > 0
      && moves(history.toMigrate), keyNeeded && warning(t('cdx.keyNeeded'), 'key')] });
}

async function release() {
  const { editedSince } = (await fetchJson('/codex')).takeover;
  await change({ path: '/codex/release', title: t('cdx.releaseTitle'), action: t('cdx.writeConfig'),
    told: t('cdx.released'), shows: () => editedSince && h('p', null, t('cdx.edited')) });
}

function requests({ on: isOn, since, matchesGateway, baseUrl, gatewayUrl, path, historyMode }, mode) {
  const foreign = isOn && !matchesGateway, verb = !isOn ? 'cdx.take' : foreign ? 'cdx.point' : 'cdx.switch';
  const state = (key, is) => h('p', { class: `state ${is ? 'on' : ''}` }, icon(is ? 'check' : 'dot'), t(key),
    is && h('span', { class: 'vh' }, t('cdx.now')));
  return line('cdx.requests', state('cdx.direct', !isOn), state('cdx.takeover', isOn), note(h('code', null, path),
    isOn && [' · ', t('cdx.since', { mode: historyMode }), ' ', since && timeEl(since, 'when')]),
  foreign && warning(t('cdx.foreign', { there: baseUrl, here: gatewayUrl })),
  row((verb !== 'cdx.switch' || mode !== historyMode) && ownButton(t(verb), { kind: 'primary',
    on: () => takeOver(mode) }), isOn && ownButton(t('cdx.release'), { on: release })));
}

function signIn({ accountId, email, exists }) {
  const account = accountOf(accountId), name = account ? nameOf(account) : mask(email);
  const choose = ({ currentTarget }) => menu(currentTarget, get('accounts').map((one) => ({ label: nameOf(one),
    icon: one.id === accountId ? 'check' : 'accounts', run: () => useInCodex(one) })));
  const holds = name ? 'cdx.holds' : exists ? 'cdx.holdsOther' : 'cdx.holdsNone';
  return line('cdx.signIn', h('p', { class: 'row' }, t(holds, { name }), tag(account?.plan)), note(t('cdx.apart')),
    row(ownButton(t('cdx.another'), { icon: 'switch', on: choose })));
}

async function remove({ id, file }) {
  const title = t('cdx.deleteTitle', { file });
  if (!await confirm({ title, body: t('cdx.deleteBody'), action: t('act.remove'), danger: true })) return;
  await send('DELETE', `/codex/backups/${id}`);
  look();
}

const restore = ({ id, file, at }) => change({ path: `/codex/backups/${id}/restore`, action: t('cdx.restore'),
  title: t('cdx.restoreTitle', { file }), told: t('cdx.restored', { file }), shows: () => note(timeEl(at, 'when')) });

const backups = (list) => h('ul', { class: 'backups' }, list.map((one) => h('li', null, h('code', null, one.file),
  timeEl(one.at, 'when'), h('span', { class: 'note cut' }, [t(`cdx.why.${one.reason}`), mask(one.email),
    bytes(one.size)].filter(Boolean).join(' · ')),
  ownButton(t('cdx.restore'), { kind: 'ghost', on: () => restore(one) }), ownButton('', { icon: 'trash',
    kind: 'ghost square', 'aria-label': t('cdx.deleteTitle', one), title: t('act.remove'), on: () => remove(one) }))));

/** {el, unmount()}: the panel of Connect and of Settings. */
export function codexPanel() {
  const place = h('div');
  let codex = null, mode = '';

  function draw() {
    const { takeover, auth, backups: kept, problem, installed, home } = codex, focused = document.activeElement?.name;
    mode ||= takeover.historyMode || MODES[0];
    const radio = (one) => h('label', { class: 'row' }, h('input', { type: 'radio', name: 'mode', value: one,
      checked: mode === one, on: { change: () => { mode = one; draw(); } } }), t(`cdx.mode.${one}`), note(one));
    fill(place, problem && warning(problem), !installed && note(t('cdx.missing', { home })), requests(takeover, mode),
      line('cdx.history', h('div', { class: 'radios', role: 'radiogroup', 'aria-label': t('cdx.history') },
        MODES.map(radio))), signIn(auth), line('cdx.running', h('p', null, t('cdx.restart'))),
      line('cdx.backups', kept.length ? backups(kept.slice(0, 5)) : note(t('cdx.noBackups')),
        kept.length > 5 && details(t('cdx.moreBackups', { n: kept.length - 5 }), backups(kept.slice(5)))),
      problem && snippets('codex', { codexBase: takeover.gatewayUrl }).map((one) => codeBlock(one.text, one)),
      !isLocal() && note(t('share.localOnly')));
    if (focused === 'mode') place.querySelector('[name=mode]:checked').focus();
  }
  const load = loader(place, () => fetchJson('/codex'), (got) => { codex = got; draw(); });
  return { el: card({ title: t('cdx.title'), class: 'codex' }, place), unmount: on('codex', load) };
}
