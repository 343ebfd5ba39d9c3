// Codex: where its requests go, which sign-in it holds, and the way back. Every write is looked at first.
import { get as fetchJson, send } from './api.js';
import { fill, h, icon } from './dom.js';
import { bytes, mask, timeEl } from './format.js';
import { t } from './i18n.js';
import { snippets } from './snippets.js';
import { accountOf, get, isLocal, nameOf, on, set } from './store.js';
import { button, card, codeBlock, confirm, details, errorPanel, fail, menu, skeleton, tag, toast,
  wording } from './ui.js';

const MODES = ['openai', 'ai-zero-token'];
const COLOURS = { '+': 'plus', '-': 'minus' };
const note = (...words) => h('p', { class: 'note' }, words);
const warning = (words, shape = 'warn') => h('div', { class: 'notice warn' }, icon(shape), h('p', null, words));
const who = (one) => (one ? mask(one.email) : t('cdx.nobody'));

const look = () => set('codex', { ...get('codex') }); // the panel reads anew, before the watcher of the files tells

/** Dry run, agree, write; when the file was changed between the two, look again. The toast takes the write back. */
async function change({ path, title, action, body = {}, shows, told, said }) {
  const seen = await send('POST', path, { ...body, dryRun: true });
  const lines = (seen.diff || []).map(({ op, text }) => h('span', { class: COLOURS[op] ?? null }, `${op} ${text}\n`));
  const agreed = await confirm({ title, action, wide: true, body: [said && warning(said),
    note(t(seen.willBackup ? 'cdx.willBackup' : 'cdx.noBackup', { path: seen.path })), shows?.(seen),
    lines.length > 0 && h('pre', { class: 'diff', tabindex: '0', role: 'group', 'aria-label': t('cdx.diff') }, lines),
    'to' in seen && h('dl', { class: 'facts' }, h('dt', null, t('cdx.from')), h('dd', null, who(seen.from)),
      h('dt', null, t('cdx.to')), h('dd', null, who(seen.to)))] });
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
  told: t('cdx.used', { name: nameOf(account) }), shows: () => get('codex').takeover?.on && h('p', null,
    t('cdx.useNote')) });

const putBack = ({ id, file, at }) => change({ path: `/codex/backups/${id}/restore`, action: t('cdx.restore'),
  title: t('cdx.restoreTitle', { file }), told: t('cdx.restored', { file }), shows: () => note(timeEl(at, 'when')) });

/** {el, unmount()}: the panel of Connect and of Settings. */
export function codexPanel() {
  const place = h('div'), el = card({ title: t('cdx.title'), class: 'codex' }, place);
  let codex = null, mode = '';
  const can = (label, props) => button(label, isLocal() ? props
    : { ...props, disabled: true, title: t('share.localOnly') });
  const line = (key, ...children) => h('div', { class: 'line' }, h('span', { class: 'name' }, t(key)),
    h('div', { class: 'stack' }, children));

  function takeOver() {
    const body = { historyMode: mode, baseUrl: null, moveHistory: false };
    const moves = (n) => h('label', { class: 'row' }, h('input', { type: 'checkbox',
      on: { change: ({ target }) => { body.moveHistory = target.checked; } } }), t('cdx.move', { n }));
    return change({ path: '/codex/takeover', body, title: t('cdx.takeTitle'), action: t('cdx.writeConfig'),
      told: t('cdx.taken'),
      shows: ({ history, keyNeeded }) => [mode === MODES[0] && history?.toMigrate > 0 && moves(history.toMigrate),
        keyNeeded && warning(t('cdx.keyNeeded'), 'key')] });
  }
  async function release() {
    const { editedSince } = (await fetchJson('/codex')).takeover;
    await change({ path: '/codex/release', title: t('cdx.releaseTitle'), action: t('cdx.writeConfig'),
      told: t('cdx.released'), shows: () => editedSince && h('p', null, t('cdx.edited')) });
  }

  function requests({ on: isOn, since, matchesGateway, baseUrl, gatewayUrl, path, historyMode }) {
    const foreign = isOn && !matchesGateway, verb = !isOn ? 'cdx.take' : foreign ? 'cdx.point' : 'cdx.switch';
    const states = [['cdx.direct', !isOn], ['cdx.takeover', isOn]].map(([key, is]) => h('p',
      { class: `state ${is ? 'on' : ''}` },
      icon(is ? 'check' : 'dot'), t(key), is && h('span', { class: 'vh' }, t('cdx.now'))));
    return line('cdx.requests', states, note(h('code', null, path), isOn && [' · ', t('cdx.since',
      { mode: historyMode }), ' ',
      since && timeEl(since, 'when')]), foreign && warning(t('cdx.foreign', { there: baseUrl, here: gatewayUrl })),
    h('div', { class: 'row' }, (verb !== 'cdx.switch' || mode !== historyMode) && can(t(verb), { kind: 'primary',
      on: takeOver }),
      isOn && can(t('cdx.release'), { on: release })));
  }

  async function remove({ id, file }) {
    const title = t('cdx.deleteTitle', { file });
    if (!await confirm({ title, body: t('cdx.deleteBody'), action: t('act.remove'), danger: true })) return;
    await send('DELETE', `/codex/backups/${id}`);
    await load();
  }
  const backups = (list) => h('ul', { class: 'backups' }, list.map((one) => h('li', null, h('code', null, one.file),
    timeEl(one.at, 'when'), h('span', { class: 'note cut' },
      [t(`cdx.why.${one.reason}`), mask(one.email), bytes(one.size)].filter(Boolean).join(' · ')),
    can(t('cdx.restore'), { kind: 'ghost', on: () => putBack(one) }), can('', { icon: 'trash', kind: 'ghost square',
      'aria-label': t('cdx.deleteTitle', one), title: t('act.remove'), on: () => remove(one) }))));

  function signIn({ accountId, email, exists }) {
    const account = accountOf(accountId), name = account ? nameOf(account) : mask(email);
    const choose = ({ currentTarget }) => menu(currentTarget, get('accounts').map((one) => ({ label: nameOf(one),
      icon: one.id === accountId ? 'check' : 'accounts', run: () => useInCodex(one) })));
    return line('cdx.signIn', h('p', { class: 'row' }, t(name ? 'cdx.holds' : exists ? 'cdx.holdsOther'
      : 'cdx.holdsNone', { name }),
      tag(account?.plan)), note(t('cdx.apart')), h('div', { class: 'row' }, can(t('cdx.another'), { icon: 'switch',
        on: choose })));
  }

  function draw() {
    const { takeover, auth, backups: kept = [], problem, installed, home } = codex;
    const focused = document.activeElement?.name === 'mode';
    mode ||= takeover.historyMode || MODES[0];
    const radio = (one) => h('label', { class: 'row' }, h('input', { type: 'radio', name: 'mode', value: one,
      checked: mode === one,
      on: { change: () => { mode = one; draw(); } } }), h('span', null, t(`cdx.mode.${one}`)), note(one));
    fill(place, problem && warning(problem), !installed && note(t('cdx.missing', { home })), requests(takeover),
      line('cdx.history', h('div', { class: 'radios', role: 'radiogroup', 'aria-label': t('cdx.history') },
        MODES.map(radio))),
      signIn(auth), line('cdx.running', h('p', null, t('cdx.restart'))),
      line('cdx.backups', kept.length ? backups(kept.slice(0, 5)) : note(t('cdx.noBackups')),
        kept.length > 5 && details(t('cdx.moreBackups', { n: kept.length - 5 }), backups(kept.slice(5)))),
      problem && snippets('codex', { codexBase: takeover.gatewayUrl }).map((one) => codeBlock(one.text,
        { label: one.label })),
      !isLocal() && note(t('share.localOnly')));
    if (focused) place.querySelector('[name=mode]:checked')?.focus();
  }

  async function load() {
    try {
      codex = await fetchJson('/codex');
      draw();
    } catch (error) {
      if (codex) fail(error);
      else fill(place, errorPanel(error, load));
    }
  }
  fill(place, skeleton(4));
  load();
  return { el, unmount: on('codex', load) };
}
