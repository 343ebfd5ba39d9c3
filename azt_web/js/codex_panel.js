// Codex: where its requests go, which sign-in it holds, and the way back. Every write: preview, agree, backup, write.
import { get as fetchJson, send } from './api.js';
import { fill, h, icon } from './dom.js';
import { bytes, mask, timeEl } from './format.js';
import { t } from './i18n.js';
import { snippets } from './snippets.js';
import { accountOf, get, isLocal, nameOf, on } from './store.js';
import { button, card, codeBlock, confirm, details, dialog, errorPanel, fail, menu, skeleton, tag, toast, wording } from './ui.js';

const MODES = ['openai', 'ai-zero-token'];

/** Put a backup back; what is there becomes a backup itself, so the toast can undo this too. */
async function restore(id) {
  const { restored, backup } = await send('POST', `/codex/backups/${id}/restore`);
  written(t('cdx.restored', { file: restored }), backup);
}

function written(words, backup) {
  toast(`${words} ${t('cdx.restart')}`, { action: backup && { label: t('act.undo'), run: () => restore(backup.id) } });
}

const diffOf = (lines) => (lines.length ? h('pre', { class: 'diff', tabindex: '0', role: 'group', 'aria-label': t('cdx.diff') },
  lines.map(({ op, text }) => h('span', { class: { '+': 'plus', '-': 'minus' }[op] ?? null }, `${op} ${text}\n`)))
  : h('p', { class: 'note' }, t('cdx.noChange')));

/**
 * The preview of a write and its button. `shows(preview)` are the nodes that explain it; a file that changed meanwhile
 * is previewed again, in place. `done(answer)` after it was written.
 */
async function preview({ title, path, body, action, shows, done, danger }) {
  let seen = await send('POST', path, { ...body(), dryRun: true });
  const said = h('p', { class: 'wrong', role: 'alert', hidden: true }), place = h('div', { class: 'stack' });
  const show = () => fill(place, h('p', { class: 'note' }, t(seen.willBackup ? 'cdx.willBackup' : 'cdx.noBackup', { path: seen.path })),
    shows(seen));
  const write = async () => {
    try {
      const answer = await send('POST', path, { ...body(), dryRun: false, base: seen.base });
      made.close();
      done(answer);
    } catch (error) {
      if (error.code === 'file_changed') {
        seen = await send('POST', path, { ...body(), dryRun: true });
        show();
      }
      fill(said, icon('warn'), wording(error));
      said.hidden = false;
    }
  };
  show();
  const made = dialog({ title, wide: true, body: [said, place],
    footer: [button(t('act.cancel'), { on: () => made.close() }), button(action, { kind: danger ? 'danger' : 'primary', on: write })] });
}

/** `Use in Codex`: its auth.json gets the sign-in of this account. */
export const useInCodex = (account) => preview({
  title: t('cdx.useTitle', { name: nameOf(account) }), path: '/codex/auth', body: () => ({ accountId: account.id }),
  action: t('cdx.writeAuth'), done: ({ backup }) => written(t('cdx.used', { name: nameOf(account) }), backup),
  shows: ({ from, to, changed }) => [h('dl', { class: 'change' },
    h('div', null, h('dt', null, t('cdx.from')), h('dd', null, from ? mask(from.email) : t('cdx.nobody'))),
    h('div', null, h('dt', null, t('cdx.to')), h('dd', null, mask(to.email)))),
  changed === false && h('p', { class: 'note' }, t('cdx.noChange')), get('codex').takeover?.on && h('p', null, t('cdx.useNote'))],
});

/** {el, unmount()}: the panel of Connect and of Settings. */
export function codexPanel() {
  const place = h('div'), el = card({ title: t('cdx.title'), class: 'codex' }, place);
  let codex = null, mode = '', moves = false;
  const can = (label, props) => button(label, isLocal() ? props : { ...props, disabled: true, title: t('share.localOnly') });
  const line = (key, ...children) => h('div', { class: 'line' }, h('span', { class: 'name' }, t(key)), h('div', { class: 'stack' }, children));

  const takeOver = () => preview({ title: t('cdx.takeTitle'), path: '/codex/takeover', action: t('cdx.writeConfig'),
    body: () => ({ historyMode: mode, baseUrl: null, moveHistory: moves }), shows: ({ diff, history, keyNeeded }) => [diffOf(diff),
      mode === MODES[0] && history?.toMigrate > 0 && h('label', { class: 'row' }, h('input', { type: 'checkbox', checked: moves,
        on: { change: (event) => { moves = event.target.checked; } } }), t('cdx.move', { n: history.toMigrate })),
      keyNeeded && h('p', { class: 'notice warn' }, icon('key'), t('cdx.keyNeeded'))],
    done: ({ backup }) => written(t('cdx.taken'), backup) });
  const release = () => preview({ title: t('cdx.releaseTitle'), path: '/codex/release', action: t('cdx.writeConfig'), body: () => ({}),
    shows: ({ diff }) => [codex.takeover.editedSince && h('p', null, t('cdx.edited')), diffOf(diff)],
    done: ({ backup }) => written(t('cdx.released'), backup) });

  function requests({ on: isOn, since, matchesGateway, baseUrl, gatewayUrl, path, historyMode }) {
    const states = [['cdx.direct', !isOn], ['cdx.takeover', isOn]].map(([key, is]) => h('p', { class: is ? 'state on' : 'state' },
      icon(is ? 'check' : 'dot'), t(key), is && h('span', { class: 'vh' }, t('cdx.now'))));
    const foreign = isOn && !matchesGateway;
    return line('cdx.requests', states, isOn && h('p', { class: 'note' }, t('cdx.since', { mode: historyMode }), ' ',
      since && timeEl(since, 'when')), h('code', { class: 'note' }, path),
    foreign && h('p', { class: 'notice warn' }, icon('warn'), t('cdx.foreign', { there: baseUrl, here: gatewayUrl })),
    h('div', { class: 'row' }, (!isOn || foreign || mode !== historyMode) && can(t(!isOn ? 'cdx.take' : foreign ? 'cdx.point' : 'cdx.switch'),
      { kind: 'primary', on: takeOver }), isOn && can(t('cdx.release'), { on: release })));
  }

  function backups(list) {
    const compare = async (one) => {
      const sure = await confirm({ title: t('cdx.restoreTitle', { file: one.file }), action: t('cdx.restore'), body: [
        h('p', null, t('cdx.restoreBody'), ' ', timeEl(one.at, 'when'), one.email && ` · ${mask(one.email)}`)] });
      if (sure) await restore(one.id);
    };
    const remove = async (one) => {
      const sure = await confirm({ title: t('cdx.deleteTitle', { file: one.file }), body: t('cdx.deleteBody'), action: t('act.remove'), danger: true });
      if (sure) await send('DELETE', `/codex/backups/${one.id}`).then(load);
    };
    return list.map((one) => h('li', null, h('code', null, one.file), timeEl(one.at, 'when'),
      h('span', { class: 'note cut' }, [t(`cdx.why.${one.reason}`), one.email && mask(one.email), bytes(one.size)].filter(Boolean).join(' · ')),
      can(t('cdx.restore'), { kind: 'ghost', on: () => compare(one) }), can('', { icon: 'trash', kind: 'ghost square',
        'aria-label': t('cdx.deleteTitle', { file: one.file }), title: t('act.remove'), on: () => remove(one) })));
  }

  function draw() {
    const { takeover, auth, backups: kept = [], problem, installed } = codex, current = document.activeElement?.closest('.codex [name=mode]');
    mode ||= takeover.historyMode || MODES[0];
    const radio = (one, key) => h('label', { class: 'row' }, h('input', { type: 'radio', name: 'mode', value: one, checked: mode === one,
      on: { change: () => { mode = one; draw(); } } }), h('span', null, t(key)), h('code', { class: 'note' }, one));
    const who = auth.accountId ? accountOf(auth.accountId) : null, name = who ? nameOf(who) : mask(auth.email);
    const choose = (event) => menu(event.currentTarget, get('accounts').map((one) => ({ label: nameOf(one),
      icon: one.id === auth.accountId ? 'check' : 'accounts', run: () => useInCodex(one) })));
    fill(place, problem && h('p', { class: 'notice warn' }, icon('warn'), problem),
      !installed && h('p', { class: 'notice info' }, icon('info'), t('cdx.missing', { home: codex.home })), requests(takeover),
      line('cdx.history', h('div', { class: 'radios', role: 'radiogroup', 'aria-label': t('cdx.history') },
        radio(MODES[0], 'cdx.modeOpenai'), radio(MODES[1], 'cdx.modeAzt'))),
      line('cdx.signIn', h('p', { class: 'row' }, t(auth.exists ? (name ? 'cdx.holds' : 'cdx.holdsOther') : 'cdx.holdsNone', { name }), tag(who?.plan)),
        h('p', { class: 'note' }, t('cdx.apart')), h('div', { class: 'row' }, can(t('cdx.another'), { icon: 'switch', on: choose }))),
      line('cdx.running', h('p', null, t('cdx.restart'))),
      line('cdx.backups', kept.length ? h('ul', { class: 'backups' }, backups(kept.slice(0, 5))) : h('p', { class: 'note' }, t('cdx.noBackups')),
        kept.length > 5 && details(t('cdx.moreBackups', { n: kept.length - 5 }), h('ul', { class: 'backups' }, backups(kept.slice(5))))),
      problem && snippets('codex', { codexBase: takeover.gatewayUrl }).map((one) => codeBlock(one.text, { label: one.label })),
      !isLocal() && h('p', { class: 'note' }, t('share.localOnly')));
    if (current) place.querySelector(`[name=mode][value=${mode}]`)?.focus();
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
