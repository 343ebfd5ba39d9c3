// Who is not trusted yet: admin token, pairing code, or the code that `azt open` put into the address.
import { send, get as fetchJson } from '../api.js';
import { fill, h, icon } from '../dom.js';
import { t } from '../i18n.js';
import { refetch, retryNow } from '../live.js';
import { remount, replace } from '../router.js';
import { get, set } from '../store.js';
import { button, dialog, fieldForm, note, row, wording } from '../ui.js';

/** Sign in with {token} or {code}; then everything is known anew. */
async function enter(what) {
  await send('POST', '/session', what);
  set('session', await fetchJson('/session'));
  await refetch(); retryNow();
}
/** The field for the admin token (`pairs`: or a pairing code) and its button; `done()` after it was right. */
function tokenForm(done, pairs) {
  const input = h('input', { type: 'password', autocomplete: 'current-password', name: 'token',
    required: true, autofocus: !pairs });
  const flip = (type) => { input.type = type; show.ariaPressed = String(type === 'text'); };
  const show = button(t('signin.show'), { kind: 'ghost', 'aria-pressed': 'false',
    on: () => flip(input.type === 'text' ? 'password' : 'text') });
  return fieldForm(t(pairs ? 'signin.either' : 'signin.token'), row(input, show), t('signin.go'),
    (token) => enter({ token, code: pairs ? token : '' }).then(done), { help: t('signin.where'), kind: 'primary' });
}

/** A thing that needs proof of who asks: the token now, or `azt open`. True when it was given. */
export const askProof = () => new Promise((resolve) => {
  const form = tokenForm(() => { resolve(true); made.close(); });
  const made = dialog({ title: t('proof.title'), onclose: () => resolve(false), body: [h('p', null, t('proof.text')),
    h('p', null, t('proof.open'), ' ', h('code', null, 'azt open')), form] });
});

function mount(root, { route: { page: way, parts: [code], query: { to } } }) {
  const box = h('div', { class: 'content' }), { lan, scope } = get('session');
  const inside = () => { replace(/^#\/(?!signin|pair|open)/.test(to) ? to : '#/overview'); remount(); };
  const ask = (words) => fill(box, h('h2', null, t('signin.heading')), h('p', null, t('signin.text')),
    words && h('p', { class: 'wrong', role: 'alert' }, icon('warn'), words), tokenForm(inside, true),
    note(t('signin.pair')));
  fill(root, h('section', { class: 'card signin' }, box));
  if (code && way !== 'signin') {
    history.replaceState(null, '', '#/signin'); // single use, and not for the history
    fill(box, h('p', { role: 'status' }, t('signin.checking')));
    enter({ code }).then(inside, (error) => ask(wording(error)));
  } else if (scope !== 'lan' || lan.consoleOn) ask('');
  else fill(box, h('h2', null, t('lan.closed')), h('p', null, t('lan.closedText')));
  return {};
}
export const page = { title: 'signin.title', mount };
