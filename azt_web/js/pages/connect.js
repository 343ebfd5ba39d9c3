// How each client is pointed at this gateway, and whether its call arrives.
import { get as fetchJson } from '../api.js';
import { codexPanel } from '../codex_panel.js';
import { fill, h, icon } from '../dom.js';
import { timeEl } from '../format.js';
import { known, pref, setPref, t } from '../i18n.js';
import { current, hash, setQuery } from '../router.js';
import { CLIENTS, atHost, clientSeen, snippets } from '../snippets.js';
import { get, isLocal, on } from '../store.js';
import { bullets, button, card, codeBlock, copyButton, details, loader, note, row, segmented, select,
  tabs } from '../ui.js';

const OWN_CLIENTS = ['console', 'azt', 'Playground'];
let key = 'local'; // what was typed stays while this page is open, and nowhere else
let stop = () => {}; // waiting for a call

const named = (id) => t(known(`con.${id}`) ? `con.${id}` : `client.${id}`);
const listed = (name) => bullets(t(name).split('|'));

/** [what is shown, base URL without /v1] for each place that a client may run in. */
function places({ addresses }) {
  const here = get('gateway').adminUrl.slice(0, -1);
  const others = addresses.map((one) => [one.host, one.consoleUrl.slice(0, -1)]);
  if (isLocal()) return [['here', here], ['docker', atHost(here, 'host.docker.internal')], ...others];
  return others.length ? others : [[location.hostname, location.origin]];
}

const copyLine = (name, shown, from, told) => h('div', { class: 'copyline' }, h('span', { class: 'name' }, name), shown,
  told && note(told), copyButton(from, '', { kind: 'ghost square', 'aria-label': `${t('act.copy')}: ${name}` }));

/** Waits for a call of this client, and tells how it went. */
function checker({ id, seen }) {
  const said = h('p', { class: 'row', role: 'status' });
  const isIts = ({ client }) => (seen.length ? seen.includes(client) : !OWN_CLIENTS.includes(client));
  const told = (_, changes) => {
    const call = changes.findLast(({ type, row: one }) => type === 'finished' && isIts(one))?.row;
    if (!call) return;
    stop();
    fill(said, call.result === 'ok' ? h('span', { class: 'good' }, icon('check'), t('con.checkOk'))
      : h('span', { class: 'wrong' }, icon('warn'), t('con.checkBad')), timeEl(call.at, 'clock'),
    h('a', { href: hash('log', [call.id]) }, t('con.openRow')));
  };
  const start = () => {
    stop();
    stop = on('request', told);
    fill(said, h('span', { class: 'spin' }), t('con.checkWait', { client: named(id) }));
  };
  return h('div', { class: 'row check' }, button(t('con.check'), { icon: 'refresh', on: start }), said);
}

function mount(root) {
  const links = tabs(t('ov.client'), CLIENTS.map(({ id }) => [id, named(id), hash('connect', [id])]), 'clients');
  const place = h('div', { class: 'stack' });
  let share = null, models = [], codex = null, shown = '';

  function build(client, wanted) {
    const { id } = client, isCodex = id === 'codex', all = places(share), blocks = h('div', { class: 'stack' });
    const [at, url] = all.find(([name]) => name === wanted) || all[0], base = `${url}${isCodex ? '/codex' : ''}/v1`;
    const words = all.map(([name]) => [name, known(`con.at.${name}`) ? t(`con.at.${name}`) : name]);
    const where = segmented(t('con.at'), words, at, (name) => setQuery({ at: name === 'here' ? null : name }));
    const values = () => ({ base, codexBase: base, key: key || 'local', model: model.input.value });
    const code = () => fill(blocks, snippets(id, values()).map((one) => codeBlock(one.text, one)));
    const model = select(t('ov.model'), models.map((one) => [one.id]), get('defaultModel'), code);
    const input = h('input', { type: 'text', value: key, 'aria-label': t('ov.key'), autocomplete: 'off',
      spellcheck: 'false', on: { input: () => { key = input.value; code(); } } });
    const closed = h('a', { class: 'note', href: '#/settings/sharing' }, t('con.closed'));
    const lines = [copyLine(t('shell.base'), h('code', null, base), base),
      copyLine(t('ov.key'), input, () => key, t(get('gateway').keys ? 'con.needKey' : 'con.anyKey')),
      copyLine(t('ov.model'), model, () => model.input.value)];
    if (isCodex) codex ||= codexPanel();
    code();
    fill(place, isCodex && codex.el, card({ title: isCodex ? t('cdx.byHand') : named(id) }, row(note(t('con.at')),
      where, isLocal() && !share.lanApi && closed), h('div', { class: 'copylines' }, lines), blocks,
      h('ol', { class: 'numbered' }, [...listed(`con.steps.${id}`).children]), checker(client)),
    card({ title: t('con.endpoints') }, listed('con.offered'), details(t('con.absent'), listed('con.notOffered'))));
  }
  function update({ parts, query }) {
    const own = (name) => CLIENTS.find(({ id }) => id === name);
    const client = own(parts[0]) || own(pref('client')) || clientSeen(get('firstRun').clientSeen);
    const { id } = client, wanted = `${id} ${query.at}`;
    if (parts[0] === id) setPref('client', id);
    links.show(id);
    if (wanted === shown || !share) return;
    stop();
    shown = wanted;
    build(client, query.at);
  }
  fill(root, h('div', { class: 'connect-page' }, links, place));
  loader(place, () => Promise.all([fetchJson('/share'), fetchJson('/models')]), (found) => {
    [share, { items: models }] = found;
    update(current());
  });
  return { update, unmount: () => { stop(); codex?.unmount(); } };
}

export const page = { title: 'nav.connect', mount };
