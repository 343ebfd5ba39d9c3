// Signing in with an account, by browser or by a code, and the first call after it: for the dialog and the first steps.
import { ApiError, get, send, stream } from './api.js';
import { readAnswer } from './calls.js';
import { fill, h, icon, text } from './dom.js';
import { duration, num, now, ticking, wait } from './format.js';
import { t } from './i18n.js';
import { go, hash } from './router.js';
import { accountOf, nameOf, store } from './store.js';
import * as ui from './ui.js';

/** A link out of the console. Whoever follows or copies it, in whatever way, is expected back. */
const outward = (href, label, kind, opened) => h('a', { class: kind, href, target: '_blank', rel: 'noopener noreferrer',
  on: { click: opened, auxclick: opened, contextmenu: opened } }, label, icon('external'));

/** One small real call, by this account or whichever serves; `others` stand beside its button. */
export function testCall(accountId, others, ongood) {
  const body = { model: store.get('defaultModel'), input: 'Say OK', stream: true };
  const answer = h('p', { class: 'answer', role: 'status', hidden: true });
  const told = h('div', { class: 'note' }, t('first.tryText', body));
  const test = async () => {
    const began = performance.now(), made = { text: '' };
    const onevent = ({ data }) => { readAnswer('responses', made, JSON.parse(data)); text(answer, made.text); };
    [answer.hidden, answer.ariaBusy] = [false, 'true']; // it is read aloud when it is whole
    text(told, t('first.streaming'));
    try {
      await stream('/playground', { path: '/v1/responses', accountId, body }, { onevent });
      if (made.error) throw new ApiError(200, made.error);
      fill(told, ui.good(t('first.done', { d: duration(performance.now() - began) })));
      ongood?.();
    } catch (error) { fill(told, h('span', { class: 'wrong' }, icon('warn'), ui.wording(error))); }
    answer.ariaBusy = 'false';
  };
  return [ui.row(ui.button(t('play.test'), { kind: 'primary', icon: 'play', on: test }), others, told), answer];
}

/** A sign-in, shown in `host` until `ondone(account)`. `method`: browser, device, or none for what fits; `wanted`: the
 * id of the account that is to come; `discard()` gives another one up. Returns what leaves it: `leave(gives up)`. */
export function signIn(host, { method, wanted, ondone, discard }) {
  let flow = null;
  const path = (tail = '') => `/login/${flow.flowId}${tail}`, isOpen = () => /waiting|exchanging/.test(flow?.status);
  const call = async (tail, body, how) => take(await send('POST', path(tail), body, how));
  const state = h('span', { role: 'status' }), why = h('p');
  const opened = () => call('/open', {}, { keepalive: true }).catch(ui.fail);
  const finish = async (url) => { // of the failed page, whole: it names a code, or the refusal, and the state
    if (!/(code|error)=[^&]/.test(url) || !/state=[^&]/.test(url)) throw new ApiError(0, { code: 'bad_callback_url' });
    await call('/callback', { url }); input.value = '';
  };
  const input = h('input', { type: 'text', autocomplete: 'off', spellcheck: 'false' });
  const paste = ui.details(t('login.paste'), why, ui.fieldForm(t('login.address'), input, t('login.finish'), finish));
  const byLink = ({ authorizeUrl: url }) => [h('p', null, t('login.browser')),
    store.get('accounts').length > 0 && h('p', null, t('login.private')),
    ui.row(outward(url, t('login.open'), 'btn primary', opened),
      ui.copyButton(() => { opened(); return url; }, t('login.copy')))];
  const copy = (words) => ui.copyButton(words, '', { kind: 'ghost square', 'aria-label': t('act.copy') });
  const byCode = ({ verificationUrl: url, userCode: code, intervalMs }) => h('ol', { class: 'steps' }, [
    [t('login.deviceOpen'), ' ', outward(url, url.replace('https://', '')), copy(url)],
    [t('login.deviceCode'), ' ', h('code', { class: 'big' }, code), copy(code)],
    t('login.deviceBack', { n: num(intervalMs / 1000) })].map((words) => h('li', null, words)));
  const ask = () => send('POST', '/login', { method: method || 'browser', accountId: wanted });
  const start = () => ui.loader(host, ask, (begun) => {
    const isLink = begun.method === 'browser', left = () => t('login.left', { d: wait(begun.expiresAt - now()) });
    if (!method && !begun.portFree) go(hash('accounts', ['add', 'device'], { account: wanted }));
    fill(host, isLink ? byLink(begun) : byCode(begun),
      ui.row(state, ticking(h('span', { class: 'note' }), begun.expiresAt, left)), isLink && paste);
    flow = begun; take(begun);
  });
  const take = (told) => {
    if (told?.flowId !== flow?.flowId) return;
    flow = { ...flow, ...told };
    if (flow.status === 'done') ondone?.(flow.account);
    else if (isOpen()) text(state, t(`login.${flow.status}`));
    else fill(host, ended(flow));
    if (flow.portFree !== false && !flow.listenError) return;
    text(why, t('login.portTaken', { port: new URL(flow.redirectUri).port })); paste.open = true;
  };
  const ended = ({ error, account }) => {
    const names = { came: nameOf(account), wanted: nameOf(accountOf(wanted)) };
    const again = ui.button(t(error ? 'act.tryAgain' : 'login.newLink'), { kind: 'primary', on: start });
    const keep = ui.button(t('login.keep'), { kind: 'primary', on: () => call('/callback', { keep: true }) });
    const [words, ...choice] = error?.code === 'account_mismatch' ? [t('login.mismatch', names),
      ui.button(t('login.discard'), { on: discard }), keep] : [error ? ui.wording(error) : t('login.over'), again];
    return h('div', { role: 'alert' }, ui.empty('warn', words, ...choice));
  };
  const look = () => isOpen() && store.get('connection').state !== 'live' && get(path()).then(take, () => {});
  const off = store.on('login', (last, flows) => flows.forEach(take)), timer = setInterval(look, 2000);
  start();
  return (givesUp = true) => {
    off(); clearInterval(timer);
    if (givesUp && flow && flow.status !== 'done') send('DELETE', path()).catch(() => {}); // it ends by itself anyhow
  };
}
