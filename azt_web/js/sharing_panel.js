// Who else may call: the switches for the network, keys, pairing, and the browsers that are signed in.
import { get as fetchJson, send } from './api.js';
import { fill, h, icon, svg } from './dom.js';
import { now, num, ticking, timeEl, wait } from './format.js';
import { plural, t } from './i18n.js';
import { qrPath } from './qr.js';
import { get, isLocal } from './store.js';
import { button, card, confirm, copyButton, details, dialog, errorPanel, field, select, skeleton,
  toggle } from './ui.js';

const HIDE_MS = 60000;
let pairing = null; // {code, url, expiresAt, address}: it outlives a change of the settings around it

const row = (...children) => h('div', { class: 'row' }, children);
const note = (words) => h('p', { class: 'note' }, words);
const bullets = (items) => h('ul', { class: 'bullets' }, items.map((one) => h('li', null, one)));
/** Only on the computer that runs azt. */
const local = (label, props) => button(label, isLocal() ? props : { ...props, disabled: true,
  title: t('share.localOnly') });

/** Dark on white in both themes, with what it says beneath. */
function qr(words, label) {
  const { width, path } = qrPath(words);
  return h('figure', { class: 'qr' }, svg('svg', { viewBox: `0 0 ${width} ${width}`, role: 'img', 'aria-label': label },
    svg('rect', { width, height: width, fill: '#fff' }), svg('path', { d: path, fill: '#000' })),
  h('figcaption', null, h('code', null, words)));
}

/** A secret, once: it is gone with the dialog. `scan`: what its QR code says, which is shown on request. */
function once(title, secret, scan) {
  const place = h('div', { class: 'stack' });
  const hide = () => fill(place, scan && row(button(t('share.showQr'), { icon: 'key', on: show })));
  const show = () => {
    fill(place, qr(scan, t('share.keyQr')), row(button(t('share.hide'), { on: hide })));
    setTimeout(hide, HIDE_MS);
  };
  hide();
  dialog({ title, body: [h('p', null, t('share.once')), h('p', { class: 'row' }, h('code', { class: 'secret' }, secret),
    copyButton(secret)), place] });
}

/** {el, unmount()}; `server` are its settings as they are saved, `reload()` reads them anew. */
export function sharingPanel(server, reload) {
  const place = h('div', { class: 'stack' });
  const open = !/^(127\.|::1$|localhost$)/.test(server.host);
  let share = { addresses: [] }, keys = [], sessions = [];
  const addresses = (kind) => bullets(share.addresses.map((one) => [h('code', null, one[kind]), ' ', one.label]));
  const pair = async (address = share.addresses[0]?.host) => {
    pairing = { ...await send('POST', '/session/pair', { address }), address };
  };

  /** A switch that opens something says first which addresses will answer. */
  function opening(name, kind, words) {
    const is = server[name], answers = is && open, body = () => [h('p', null, t(words)), addresses(kind)];
    const ask = () => confirm({ title: t(`share.${name}.title`), action: t('share.turnOn'), body: body() });
    const el = toggle(t(`share.${name}`), is, async (wanted) => {
      if (wanted && !await ask()) return el.set(false);
      await send('PATCH', '/settings', { values: { [`server.${name}`]: wanted } });
      if (name === 'lanConsole') pairing = null;
      if (name === 'lanConsole' && wanted) await pair();
      return reload();
    }, t(`share.${name}.${answers ? 'on' : 'off'}`));
    el.control.disabled = !isLocal();
    return [el, answers && addresses(kind)];
  }

  async function newKey() {
    const input = h('input', { type: 'text', maxlength: '64', autocomplete: 'off' });
    const named = field(t('share.keyName'), input), words = t(keys.length ? 'share.newKeyText' : 'share.firstKeyText');
    const make = async () => {
      try {
        const { item, key } = await send('POST', '/keys', { name: input.value.trim() });
        made.close();
        once(t('share.keyMade', { name: item.name }), key, JSON.stringify({
          base_url: share.addresses[0]?.baseUrl || get('gateway').baseUrl, api_key: key }));
        await load();
      } catch (error) {
        if (error.params?.field !== 'name') throw error;
        named.error(t('share.keyNameWrong'));
      }
    };
    const made = dialog({ title: t('share.newKey'), body: [h('p', null, words), named], footer: [
      button(t('act.cancel'), { on: () => made.close() }), button(t('share.newKey'), { kind: 'primary', on: make })] });
    input.focus();
  }

  const revoke = (path, title, body) => local(t('share.revoke'), { kind: 'danger', on: async () => {
    if (!await confirm({ title, body, action: t('share.revoke'), danger: true })) return;
    await send('DELETE', path);
    await load();
  } });

  async function rotate() {
    const title = t('share.rotate');
    if (!await confirm({ title, body: t('share.rotateBody'), action: title, danger: true })) return;
    const { token, sessionsEnded } = await send('POST', '/session/rotate-token');
    once(plural('share.rotated', sessionsEnded || 0), token);
    await load();
  }

  function pairCard() {
    const { expiresAt, url, address } = pairing || {}, again = (host) => pair(host).then(draw);
    const left = () => (expiresAt > now() ? t('login.left', { d: wait(expiresAt - now()) }) : t('share.codeOver'));
    const hide = () => { pairing = null; draw(); };
    const hosts = share.addresses.map((one) => [one.host, [one.host, one.label].filter(Boolean).join(' · ')]);
    const shown = () => [qr(url, t('share.pairQr')), row(ticking(h('span'), expiresAt, left), copyButton(url),
      button(t('share.hide'), { on: hide }), hosts.length > 1 && select(t('share.address'), hosts, address, again))];
    const off = { icon: 'key', disabled: !server.lanConsole, on: () => again() };
    return card({ title: t('share.pair') }, h('p', null, t('share.pairText')),
      expiresAt > now() ? shown() : row(local(t('share.pair'), off)), !server.lanConsole && note(t('share.pairOff')));
  }

  /** A card with a row for each of `items`: `cells(item)`, the last of which is a button. */
  function list({ title, words, action, items, cells }) {
    const cell = (one, i) => (i ? h('td', null, one) : h('th', { scope: 'row' }, one));
    const line = (item) => h('tr', null, cells(item).map(cell));
    return card({ title: t(title), note: t(words), actions: action, class: items.length ? 'flush' : 'bare' },
      items.length > 0 && h('div', { class: 'scroll' }, h('table', null, h('tbody', null, items.map(line)))));
  }
  const key = ({ id, name, prefix, lastUsedAt, requests }) => [name, h('code', null, `${prefix}…`),
    lastUsedAt ? timeEl(lastUsedAt) : t('share.unused'), requests !== undefined && num(requests),
    revoke(`/keys/${id}`, t('share.revokeKey', { name }), t(keys[1] ? 'share.revokeBody' : 'share.revokeLast'))];
  const browser = ({ id, agent, current, address, via, lastUsedAt }) => [
    [agent, ' ', current && h('span', { class: 'tag' }, t('share.thisOne'))], address, t(`share.via.${via}`),
    timeEl(lastUsedAt), revoke(`/sessions/${id}`, t('share.endSession'), t('share.endBody'))];

  function draw() {
    fill(place, card({ title: t('share.title'), class: 'form' }, h('p', null, t(open ? 'share.truth' : 'share.off')),
      opening('lanApi', 'baseUrl', keys.length ? 'share.lanApi.key' : 'share.lanApi.noKey'),
      opening('lanConsole', 'consoleUrl', 'share.lanConsole.body'),
      h('div', { class: 'notice warn' }, icon('warn'), h('p', null, t('share.http'))),
      details(t('share.safer'), bullets(t('share.saferText').split('|'))), !isLocal() && note(t('share.localOnly'))),
    list({ title: 'share.keys', words: keys.length ? 'share.keysNote' : 'share.keysNone', items: keys, cells: key,
      action: local(t('share.newKey'), { icon: 'plus', on: newKey }) }), pairCard(),
    list({ title: 'share.browsers', words: 'share.browsersNote', items: sessions, cells: browser,
      action: local(t('share.rotate'), { on: rotate }) }));
  }

  async function load() {
    try {
      const [found, made, open] = await Promise.all([fetchJson('/share').catch(() => share), fetchJson('/keys'),
        isLocal() ? fetchJson('/sessions') : { items: [] }]);
      [share, keys, sessions] = [found, made.items, open.items];
      draw();
    } catch (error) {
      fill(place, errorPanel(error, load));
    }
  }
  fill(place, skeleton(4));
  load();
  return { el: place, unmount: () => {} };
}
