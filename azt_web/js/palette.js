// The command box (Ctrl K), the list of shortcuts, and what was said lately.
import { send } from './api.js';
import { fill, h, icon } from './dom.js';
import { clock, isMasking, mask, setMasking } from './format.js';
import { lang, pref, setLang, setPref, t } from './i18n.js';
import { go, hash, remount } from './router.js';
import { CLIENTS } from './snippets.js';
import { get, nameOf, reducers } from './store.js';
import { copy, dialog, facts, fail, flipTheme, messages, note, toast, toggle } from './ui.js';

const SECTIONS = ['general', 'routing', 'codex', 'images', 'network', 'sharing', 'data', 'about'];
const KEYS = { 'Ctrl K': 'keys.box', '/': 'keys.search', 'j k': 'keys.rows', Enter: 'keys.open', x: 'keys.select',
  '.': 'keys.menu', n: 'acc.add', r: 'keys.refresh', 'Ctrl Enter': 'keys.send', Esc: 'keys.close', '?': 'keys.list' };
/** Serve with this account from now on; the toast takes it back. */
export async function activate(account) {
  const before = get('routing').activeId, undo = { label: t('act.undo'), run: () => serve(before) };
  const serve = async (id) => reducers.routing({ activeId: (await send('POST', `/accounts/${id}/activate`)).activeId });
  await serve(account.id);
  toast(t('toast.switched', { name: nameOf(account) }), { action: before && before !== account.id && undo });
}
export function showShortcuts(pages) {
  const all = [...pages.map(({ name, title }) => [`g ${name[0]}`, title]), ...Object.entries(KEYS)];
  const row = ([keys, words]) => [keys.split(' ').map((key) => [h('kbd', null, key), ' ']), t(words)];
  const single = toggle(t('keys.single'), pref('keys') !== 'off', (on) => setPref('keys', on ? null : 'off'));
  dialog({ title: t('keys.list'), body: [facts(all.map(row)), single] });
}
const showMessages = () => dialog({ title: t('box.messages'), body: messages[0] ? facts(messages.toReversed()
  .map((one) => [clock(one.at), one.text])) : note(t('box.noMessages')) });

/** What the box offers: {shape, words, hint, run}, and the text that is searched. */
function entries(pages) {
  const to = (shape, words, ...parts) => [shape, words, () => go(hash(...parts)), t('box.page')];
  return [
    ...pages.map(({ name, shape, title }) => to(shape, t(title), name)),
    ['plus', t('acc.add'), () => go('#/accounts/add')],
    ['copy', t('box.copyBase'), async () => { if (await copy(get('gateway').baseUrl)) toast(t('act.copied')); }],
    ['refresh', t('acc.refreshAll'), () => send('POST', '/accounts/refresh-quotas')],
    ...get('accounts').flatMap((one) => [
      ['switch', t('box.serve', { name: nameOf(one) }), () => activate(one), one.label && mask(one.email)],
      ['accounts', nameOf(one), () => go(hash('accounts', [one.id])), t('box.account')]]),
    ...CLIENTS.map(({ id }) => to('connect', t('box.connect', { name: t(`client.${id}`) }), 'connect', [id])),
    ...SECTIONS.map((one) => to('settings', `${t('nav.settings')}: ${t(`section.${one}`)}`, 'settings', [one])),
    ['moon', t('shell.theme'), flipTheme], ['log', t('box.messages'), showMessages],
    ['info', t('box.language'), () => setLang(lang() === 'en' ? 'zh-CN' : 'en')],
    ['image', t('box.mask'), () => { setMasking(!isMasking()); remount(); }, 'm'],
    ['info', t('keys.list'), () => showShortcuts(pages), '?'],
  ].map(([shape, words, run, hint = '']) => ({ shape, words, run, hint, text: `${words} ${hint}`.toLowerCase() }));
}
export function openBox(pages) {
  if (document.querySelector('dialog[open]')) return;
  const all = entries(pages), list = h('ul', { role: 'listbox', id: 'found', 'aria-label': t('shell.search') });
  let found = [], at = 0;
  const run = async (one) => { box.close(); await one.run(); };
  const mark = (step) => {
    at = (at + step + found.length) % found.length || 0;
    [...list.children].forEach((row, i) => { row.ariaSelected = String(i === at); });
    list.children[at].scrollIntoView({ block: 'nearest' }); input.setAttribute('aria-activedescendant', `found-${at}`);
  };
  const search = () => {
    const words = input.value.toLowerCase().split(/\s+/);
    found = all.filter((one) => words.every((word) => one.text.includes(word))).slice(0, 40);
    fill(list, found.map((one, i) => h('li', { id: `found-${i}`, role: 'option',
      on: { click: () => run(one).catch(fail) } }, icon(one.shape), h('span', null, one.words),
    one.hint && h('small', null, one.hint))), !found[0] && h('li', { class: 'note', role: 'option',
      'aria-disabled': 'true' }, t('ui.nothing')));
    at = 0; mark(0);
  };
  const keydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) mark(step); else if (event.key === 'Enter' && found[at]) list.children[at].click(); else return;
    event.preventDefault();
  };
  const input = h('input', { type: 'text', role: 'combobox', 'aria-expanded': 'true', 'aria-controls': 'found',
    'aria-label': t('shell.search'), placeholder: t('shell.search'), autocomplete: 'off', spellcheck: 'false',
    on: { input: search, keydown } });
  const box = dialog({ title: t('shell.search'), body: [input, list] });
  box.el.classList.add('box');
  search(); input.focus();
}
