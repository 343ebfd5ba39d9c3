// Who else may call: addresses, the switches for the network, keys, pairing, and the browsers that are signed in.
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

/** A QR code, dark on white in both themes, with what it says beneath. */
function qr(words, label) {
  const { width, path } = qrPath(words);
  return h('figure', { class: 'qr' }, svg('svg', { viewBox: `0 0 ${width} ${width}`, role: 'img', 'aria-label': label },
    svg('rect', { width, height: width, fill: '#fff' }), svg('path', { d: path, fill: '#000' })), h('figcaption', null,
      h('code', null, words)));
}

/** A secret, once: it is nowhere else, and gone with the dialog. `scan` = what its QR code says, shown on request. */
function once(title, secret, scan) {
  const place = h('div');
  const hide = () => fill(place, scan && button(t('share.showQr'), { icon: 'key', on: show }));
  const show = () => { fill(place, qr(scan, t('share.keyQr')), button(t('share.hide'), { on: hide })); setTimeout(hide,
    HIDE_MS); };
  hide();
  dialog({ title, body: [h('p', null, t('share.once')), h('p', { class: 'row' }, h('code', { class: 'secret' },
    secret), copyButton(secret)), place] });
}

/** {el, unmount()}; `settings` as they are saved, `reload()` reads them anew. */
export function sharingPanel({ values: { server } }, reload) {
  const place = h('div', { class: 'stack' });
  let share = { addresses: [] }, keys = [], sessions = [];
  const local = (label, props) => button(label, isLocal() ? props : { ...props, disabled: true,
    title: t('share.localOnly') });
  const change = async (name, value) => {
    await send('PATCH', '/settings', { values: { [`server.${name}`]: value } });
    if (name === 'lanConsole') await (value ? pair() : (pairing = null));
    await reload();
  };
  const addresses = (kind) => h('ul', { class: 'bullets' }, share.addresses.map((one) => h('li', null, h('code', null,
    one[kind]), ' ', one.label)));

  /** A switch that opens something says first which addresses will answer. */
  const opening = (name, kind, body) => {
    const el = toggle(t(`share.${name}`), server[name], async (wanted) => {
      const sure = !wanted || await confirm({ title: t(`share.${name}Title`), action: t('share.turnOn'),
        body: [h('p', null, t(body)), addresses(kind)] });
      if (sure) await change(name, wanted);
      else el.set(false);
    }, t(server[name] ? `share.${name}On` : `share.${name}Off`));
    el.control.disabled = !isLocal();
    return el;
  };

  async function newKey() {
    const input = h('input', { type: 'text', maxlength: '64', autocomplete: 'off' }), named = field(t('share.keyName'),
      input);
    const make = async () => {
      const { item, key } = await send('POST', '/keys', { name: input.value.trim() });
      made.close();
      await load();
      once(t('share.keyMade', { name: item.name }), key, JSON.stringify({ base_url: share.addresses[0]?.baseUrl
        || get('gateway').baseUrl, api_key: key }));
    };
    const made = dialog({ title: t('share.newKey'), body: [h('p', null, t(keys.length ? 'share.newKeyText'
      : 'share.firstKeyText')), named],
      footer: [button(t('act.cancel'), { on: () => made.close() }), button(t('share.newKey'), { kind: 'primary',
        on: () => make().catch((error) => {
        if (error.params?.field !== 'name') throw error;
        named.error(t('share.keyNameWrong'));
      }) })] });
    input.focus();
  }

  async function pair(address = share.addresses[0]?.host) {
    pairing = { ...await send('POST', '/session/pair', { address }), address };
  }

  async function revoke(path, title, body) {
    if (await confirm({ title, body, action: t('share.revoke'), danger: true })) await send('DELETE', path).then(load);
  }

  async function rotate() {
    if (!await confirm({ title: t('share.rotate'), body: t('share.rotateBody'), action: t('share.rotate'),
      danger: true })) return;
    const { token, sessionsEnded } = await send('POST', '/session/rotate-token');
    once(plural('share.rotated', sessionsEnded || 0), token);
    await load();
  }

  function pairCard() {
    const shown = () => {
      const left = ticking(h('span'), pairing.expiresAt, () => (pairing && pairing.expiresAt > now() ? t('login.left',
        { d: wait(pairing.expiresAt - now()) })
        : t('share.codeOver')));
      return [qr(pairing.url, t('share.pairQr')), h('p', { class: 'row' }, left, copyButton(pairing.url),
        share.addresses.length > 1 && select(t('share.address'), share.addresses.map((one) => [one.host,
          `${one.host} · ${one.label}`]), pairing.address,
          (host) => pair(host).then(draw)), button(t('share.hide'), { on: () => { pairing = null; draw(); } }))];
    };
    return card({ title: t('share.pair') }, h('p', null, t('share.pairText')), pairing && pairing.expiresAt > now()
      ? shown()
      : local(t('share.pair'), { icon: 'key', disabled: !server.lanConsole || !isLocal(),
        on: () => pair().then(draw) }),
    !server.lanConsole && h('p', { class: 'note' }, t('share.pairOff')));
  }

  function draw() {
    const row = (cells, action) => h('tr', null, cells.map((one, i) => h(i ? 'td' : 'th', i ? null : { scope: 'row' },
      one)), h('td', { class: 'num' }, action));
    const table = (rows) => h('div', { class: 'scroll' }, h('table', null, h('tbody', null, rows)));
    fill(place, card({ title: t('share.title'), class: 'form' }, h('p', null, t(server.lanApi
      && !/^(127\.|::1|localhost)/.test(server.host) ? 'share.truth' : 'share.off')),
      opening('lanApi', 'baseUrl', keys.length ? 'share.lanApiKey' : 'share.lanApiOpen'), server.lanApi
        && addresses('baseUrl'),
      opening('lanConsole', 'consoleUrl', 'share.lanConsoleBody'), server.lanConsole && addresses('consoleUrl'),
      h('p', { class: 'notice warn' }, icon('warn'), t('share.http')), details(t('share.safer'), h('ul',
        { class: 'bullets' },
        t('share.saferText').split('|').map((one) => h('li', null, one)))), !isLocal() && h('p', { class: 'note' },
          t('share.localOnly'))),
    card({ title: t('share.keys'), note: t(keys.length ? 'share.keysNote' : 'share.keysNone'), class: keys.length
      ? 'flush' : '',
      actions: local(t('share.newKey'), { icon: 'plus', on: newKey }) }, keys.length > 0
        && table(keys.map((one) => row([one.name, h('code', null, `${one.prefix}…`),
      one.lastUsedAt ? timeEl(one.lastUsedAt) : t('share.unused'), one.requests !== undefined && num(one.requests)],
    local(t('share.revoke'), { kind: 'danger', on: () => revoke(`/keys/${one.id}`, t('share.revokeKey',
      { name: one.name }),
      t(keys.length > 1 ? 'share.revokeBody' : 'share.revokeLast')) }))))),
    pairCard(), card({ title: t('share.browsers'), class: sessions.length ? 'flush' : '',
      actions: local(t('share.rotate'), { on: rotate }) },
      sessions.length ? table(sessions.map((one) => row([[one.agent, one.current && h('span', { class: 'tag' },
        t('share.thisOne'))], one.address, t(`share.via.${one.via}`),
        timeEl(one.lastUsedAt)], local(t('share.revoke'), { kind: 'danger', on: () => revoke(`/sessions/${one.id}`,
          t('share.endSession'), t('share.endBody')) }))))
        : h('p', { class: 'note' }, t('share.noBrowsers'))));
  }

  async function load() {
    try {
      const none = () => ({ items: [] });
      const [found, made, open] = await Promise.all([fetchJson('/share'), fetchJson('/keys'), isLocal()
        ? fetchJson('/sessions').catch(none) : none()]);
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
