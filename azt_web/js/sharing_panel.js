// Who else may call: the switches for the network, keys, pairing, and the browsers that are signed in.
import { get as fetchJson, send } from './api.js';
import { fill, h } from './dom.js';
import { now, num, ticking, timeEl, wait, when } from './format.js';
import { plural, t } from './i18n.js';
import { get, isLocal } from './store.js';
import { bullets, card, confirm, copyButton, details, dialog, fieldForm, loader, note, ownButton, row, select, table,
  toggle, warning } from './ui.js';

let pairing = null; // {url, expiresAt, address}: it outlives a change of the settings around it

/** What is to be copied or typed, large. */
const large = (words, ...more) => row(h('code', { class: 'secret' }, words), copyButton(words), more);

/** A code for one device, in a link to that address of this computer. */
const pair = async (address) => ({ ...await send('POST', '/session/pair', { address }), address });

/** A secret, once: it is gone with the dialog. */
const once = (title, secret, base) => dialog({ title, body: [h('p', null, t('share.once')), large(secret),
  base && row(note(t('shell.base')), h('code', null, base), copyButton(base))] });

/** How far a key goes, in words. */
const terms = ({ limit, models, expiresAt }) => [limit && plural('share.aDay', limit),
  models && t('share.only', { models: models.join(', ') }), expiresAt && t(expiresAt > now() ? 'share.ends'
    : 'share.ended', { at: when(expiresAt) })].filter(Boolean).join(' · ') || t('share.unlimited');

/** {el}; `server` are its settings as they are saved, `reload()` reads them anew. */
export function sharingPanel(server, reload) {
  const el = h('div', { class: 'stack' }), open = !/^(127\.|::1$|localhost$)/.test(server.host);
  let share = null, keys = [], sessions = [];

  /** A switch that opens something says first which addresses will answer. */
  function opening(name, kind, words) {
    const answers = server[name] && open;
    const addresses = () => bullets(share.addresses.map((one) => [h('code', null, one[kind]), ' ', one.label]));
    const ask = () => confirm({ title: t(`share.${name}.title`), action: t('share.turnOn'),
      body: [h('p', null, t(words)), addresses()] });
    const flip = toggle(t(`share.${name}`), server[name], async (wanted) => {
      if (wanted && !await ask()) return flip.set(false);
      await send('PATCH', '/settings', { values: { [`server.${name}`]: wanted } });
      if (name === 'lanConsole') pairing = wanted ? await pair(share.addresses[0]?.host) : null;
      return reload();
    }, t(`share.${name}.${answers ? 'on' : 'off'}`));
    flip.control.disabled = !isLocal();
    return [flip, answers && addresses()];
  }

  function newKey() {
    const input = h('input', { type: 'text', maxlength: '64', autocomplete: 'off' }), title = t('share.newKey');
    const wrong = (error) => { throw error.params?.field === 'name' ? new Error(t('share.keyNameWrong')) : error; };
    const make = async (wanted) => {
      const { item: { name }, key } = await send('POST', '/keys', { name: wanted }).catch(wrong);
      made.close();
      once(t('share.keyMade', { name }), key, share.addresses[0]?.baseUrl || get('gateway').baseUrl);
      await load();
    };
    const words = h('p', null, t(keys.length ? 'share.newKeyText' : 'share.firstKeyText'));
    const form = fieldForm(t('share.keyName'), input, title, make, { kind: 'primary' });
    const made = dialog({ title, body: [words, form] });
    input.focus();
  }

  const revoke = (path, title, body) => ownButton(t('share.revoke'), { kind: 'danger', on: async () => {
    if (await confirm({ title, body, action: t('share.revoke'), danger: true })) await send('DELETE', path).then(load);
  } });

  async function rotate() {
    const title = t('share.rotate');
    if (!await confirm({ title, body: t('share.rotateBody'), action: title, danger: true })) return;
    const { token, sessionsEnded } = await send('POST', '/session/rotate-token');
    once(plural('share.rotated', sessionsEnded), token);
    await load();
  }

  /** The link of the code, by the address that is chosen. */
  function pairCard() {
    const { expiresAt, url, address = share.addresses[0]?.host } = pairing || {};
    const again = (host) => pair(host).then((made) => { pairing = made; draw(); });
    const left = () => (expiresAt > now() ? t('login.left', { d: wait(expiresAt - now()) }) : t('share.codeOver'));
    const hosts = share.addresses.map(({ host, label }) => [host, `${host} · ${label}`]), off = !server.lanConsole;
    return card({ title: t('share.pair') }, h('p', null, t('share.pairText')), off && note(t('share.pairOff')),
      expiresAt > now() && large(url, ticking(h('span'), expiresAt, left)), row(expiresAt > now() && select(
        t('share.address'), hosts, address, again), ownButton(t('share.pair'), { icon: 'key', disabled: off,
        on: () => again(address) })));
  }

  const list = (title, words, rows, label, props) => card({ title: t(title), note: t(words),
    actions: ownButton(t(label), props), class: rows.length ? 'flush' : 'bare' }, rows.length > 0 && table(rows));
  const keyRow = ({ id, name, prefix, lastUsedAt, requests, ...rest }) => [name, terms(rest),
    h('code', null, `${prefix}…`), lastUsedAt ? timeEl(lastUsedAt) : t('share.unused'), num(requests),
    revoke(`/keys/${id}`, t('share.revokeKey', { name }), t(keys[1] ? 'share.revokeBody' : 'share.revokeLast'))];
  const browserRow = ({ id, agent, current, address, via, lastUsedAt }) => [
    [agent, ' ', current && h('span', { class: 'tag' }, t('share.thisOne'))], address, t(`share.via.${via}`),
    timeEl(lastUsedAt), revoke(`/sessions/${id}`, t('share.endSession'), t('share.endBody'))];

  function draw() {
    fill(el, card({ title: t('share.title'), class: 'form' }, h('p', null, t(open ? 'share.truth' : 'share.off')),
      opening('lanApi', 'baseUrl', keys.length ? 'share.lanApi.key' : 'share.lanApi.noKey'),
      opening('lanConsole', 'consoleUrl', 'share.lanConsole.body'), warning(t('share.http')),
      details(t('share.safer'), bullets(t('share.saferText').split('|'))), !isLocal() && note(t('share.localOnly'))),
    list('share.keys', keys.length ? 'share.keysNote' : 'share.keysNone', keys.map(keyRow), 'share.newKey',
      { icon: 'plus', on: newKey }), pairCard(),
    list('share.browsers', 'share.browsersNote', sessions.map(browserRow), 'share.rotate', { on: rotate }));
  }

  const read = () => Promise.all(['/share', '/keys', isLocal() && '/sessions'].map((path) => path && fetchJson(path)));
  const load = loader(el, read, (found) => {
    [share, { items: keys }, { items: sessions = [] }] = found;
    draw();
  });
  return { el };
}
