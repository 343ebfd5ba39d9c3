// The command box (Ctrl K), the list of shortcuts, and what was said lately.
import { send } from './api.js';
import { fill, h, icon } from './dom.js';
import { clock, isMasking, setMasking } from './format.js';
import { lang, pref, setLang, setPref, t } from './i18n.js';
import { go, hash, remount } from './router.js';
import { CLIENTS } from './snippets.js';
import { get, nameOf, reducers } from './store.js';
import { copy, dialog, fail, isDark, messages, setTheme, toast, toggle } from './ui.js';

const SECTIONS = ['general', 'routing', 'codex', 'images', 'network', 'sharing', 'data', 'about'];
const KEYS = [['Ctrl K', 'keys.box'], ['/', 'keys.search'], ['g o', 'nav.overview'], ['g a', 'nav.accounts'],
  ['g p', 'nav.play'], ['g l', 'nav.log'], ['g u', 'nav.usage'], ['g c', 'nav.connect'], ['g s', 'nav.settings'],
  ['j k', 'keys.rows'], ['Enter', 'keys.open'], ['x', 'keys.select'], ['.', 'keys.menu'], ['n', 'acc.add'],
  ['r', 'keys.refresh'], ['Ctrl Enter', 'keys.send'], ['Esc', 'keys.close'], ['?', 'keys.list']];

/** Serve with this account from now on; the toast takes it back. */
export async function activate(account) {
  const before = get('routing').activeId;
  const serve = async (id) => reducers.routing({ activeId: (await send('POST', `/accounts/${id}/activate`)).activeId });
  await serve(account.id);
  toast(t('toast.switched', { name: nameOf(account) }), before && before !== account.id
    ? { action: { label: t('act.undo'), run: () => serve(before) } } : {});
}

export function showShortcuts() {
  const row = ([keys, words]) => h('div', null, h('dt', null, keys.split(' ').map((key) => h('kbd', null, key))),
    h('dd', null, t(words)));
  const single = toggle(t('keys.single'), pref('keys') !== 'off', (on) => setPref('keys', on ? null : 'off'));
  dialog({ title: t('keys.list'), body: [h('dl', { class: 'keys' }, KEYS.map(row)), single] });
}

function showMessages() {
  const said = messages.toReversed().map((one) => (
    h('li', { class: one.kind }, h('time', null, clock(one.at)), one.text)));
  dialog({ title: t('box.messages'), body: h('ul', { class: 'messages' }, said.length ? said : t('box.noMessages')) });
}

const page = (name, words, parts) => ({ icon: name, words, hint: t('box.page'), run: () => go(hash(...parts)) });

function entries(pages) {
  return [
    ...pages.map(([name, shape, , { title }]) => page(shape, t(title), [name])),
    { icon: 'plus', words: t('acc.add'), run: () => go('#/accounts/add') },
    { icon: 'copy', words: t('box.copyBase'),
      run: async () => { if (await copy(get('gateway').baseUrl)) toast(t('act.copied')); } },
    { icon: 'refresh', words: t('acc.refreshAll'), run: () => send('POST', '/accounts/refresh-quotas') },
    ...get('accounts').flatMap((one) => [
      { icon: 'switch', words: t('box.serve', { name: nameOf(one) }), hint: one.label && one.email, run: () => activate(one) },
      { icon: 'accounts', words: nameOf(one), hint: t('box.account'), run: () => go(hash('accounts', [one.id])) },
    ]),
    ...CLIENTS.map(({ id }) => page('connect', t('box.connect', { name: t(`client.${id}`) }), ['connect', [id]])),
    ...SECTIONS.map((one) => page('settings', `${t('nav.settings')}: ${t(`section.${one}`)}`, ['settings', [one]])),
    { icon: isDark() ? 'sun' : 'moon', words: t('shell.theme'), run: () => setTheme(isDark() ? 'light' : 'dark') },
    { icon: 'info', words: t('box.language'), run: () => setLang(lang() === 'en' ? 'zh-CN' : 'en') },
    { icon: 'image', words: t('box.mask'), hint: 'm', run: () => { setMasking(!isMasking()); remount(); } },
    { icon: 'log', words: t('box.messages'), run: showMessages },
    { icon: 'info', words: t('keys.list'), hint: '?', run: showShortcuts },
  ];
}

export function openBox(pages) {
  if (document.querySelector('dialog[open]')) return;
  const all = entries(pages), list = h('ul', { role: 'listbox', id: 'found', 'aria-label': t('shell.search') });
  let found = [], at = 0;
  const input = h('input', { type: 'text', role: 'combobox', 'aria-expanded': 'true', 'aria-controls': 'found',
    'aria-label': t('shell.search'), placeholder: t('shell.search'), autocomplete: 'off', spellcheck: 'false' });
  const run = (one) => { box.close(); Promise.resolve(one.run()).catch(fail); };
  const mark = (step) => {
    at = found.length ? (at + step + found.length) % found.length : 0;
    [...list.children].forEach((row, i) => row.setAttribute('aria-selected', String(i === at)));
    list.children[at]?.scrollIntoView({ block: 'nearest' });
    input.setAttribute('aria-activedescendant', `found-${at}`);
  };
  const search = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (one) => words.every((word) => `${one.words} ${one.hint || ''}`.toLowerCase().includes(word));
    found = all.filter(fits).slice(0, 40);
    const option = (one, i) => h('li', { id: `found-${i}`, role: 'option', on: { click: () => run(one) } },
      icon(one.icon), h('span', null, one.words), one.hint && h('small', null, one.hint));
    fill(list, found.length ? found.map(option)
      : h('li', { class: 'note', role: 'option', 'aria-disabled': 'true' }, t('ui.nothing')));
    at = 0;
    mark(0);
  };
  input.addEventListener('input', search);
  input.addEventListener('keydown', (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) mark(step);
    else if (event.key === 'Enter' && found[at]) run(found[at]);
    else return;
    event.preventDefault();
  });
  const box = dialog({ title: t('shell.search'), body: [input, list] });
  box.el.classList.add('box');
  search();
  input.focus();
}
