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

/** [what is shown, base URL without /v1] for each place that a client may run in. */
function places({ addresses }) {
  const here = get('gateway').adminUrl.slice(0, -1);
  const others = addresses.map((one) => [one.host, one.consoleUrl.slice(0, -1)]);
  if (isLocal()) return [['here', here], ['docker', atHost(here, 'host.docker.internal')], ...others];
  return others.length ? others : [[location.hostname, location.origin]];
}

const copyLine = (label, shown, from, words) => h('div', { class: 'copyline' }, h('span', { class: 'name' }, label),
  shown, words && note(words),
  copyButton(from, '', { kind: 'ghost square', 'aria-label': `${t('act.copy')}: ${label}` }));

/** Waits for a call of this client, and tells how it went. */
function checker({ id, seen }) {
  const said = h('p', { class: 'row', role: 'status' });
  const isIts = ({ client }) => (seen.length ? seen.includes(client) : !OWN_CLIENTS.includes(client));
  const told = (_, changes) => {
    const call = changes.findLast(({ type, row: one }) => type === 'finished' && isIts(one))?.row;
    if (!call) return;
    const good = call.result === 'ok';
    stop();
    fill(said, h('span', { class: good ? 'good' : 'wrong' }, icon(good ? 'check' : 'warn'), t(good ? 'con.checkOk'
      : 'con.checkBad')), timeEl(call.at, 'clock'), h('a', { href: hash('log', [call.id]) }, t('con.openRow')));
  };
  const start = () => {
    stop();
    stop = on('request', told);
    fill(said, h('span', { class: 'spin' }), t('con.checkWait', { client: named(id) }));
  };
  return h('div', { class: 'row check' }, button(t('con.check'), { icon: 'refresh', on: start }), said);
}

const listed = (key) => bullets(t(key).split('|'));

export const page = {
  title: 'nav.connect',
  mount(root) {
    const links = tabs(t('ov.client'), CLIENTS.map(({ id }) => [id, named(id), hash('connect', [id])]), 'clients');
    const place = h('div', { class: 'stack' });
    let share = null, models = [], codex = null, shown = '';

    function build(client, wanted) {
      const { id } = client, isCodex = id === 'codex', all = places(share), blocks = h('div', { class: 'stack' });
      const [at, url] = all.find(([name]) => name === wanted) || all[0], base = `${url}${isCodex ? '/codex' : ''}/v1`;
      const where = segmented(t('con.at'), all.map(([name]) => [name, known(`con.at.${name}`) ? t(`con.at.${name}`)
        : name]), at, (name) => setQuery({ at: name === 'here' ? null : name }));
      const model = select(t('ov.model'), models.map((one) => [one.id, one.id]), get('defaultModel'), () => code());
      const input = h('input', { type: 'text', value: key, 'aria-label': t('ov.key'), autocomplete: 'off',
        spellcheck: 'false', on: { input: () => { key = input.value; code(); } } });
      const code = () => fill(blocks, snippets(id, { base, codexBase: base, key: key || 'local',
        model: model.input.value }).map((one) => codeBlock(one.text, one)));
      code();
      const steps = h('ol', { class: 'numbered' }, t(`con.steps.${id}`).split('|').map((one) => h('li', null, one)));
      const closed = h('a', { class: 'note', href: '#/settings/sharing' }, t('con.closed'));
      if (isCodex) codex ||= codexPanel();
      fill(place, isCodex && codex.el, card({ title: isCodex ? t('cdx.byHand') : named(id) },
        row(note(t('con.at')), where, isLocal() && !share.lanApi && closed), h('div', { class: 'copylines' },
          copyLine(t('shell.base'), h('code', null, base), base),
          copyLine(t('ov.key'), input, () => key, t(get('gateway').keys ? 'con.needKey' : 'con.anyKey')),
          copyLine(t('ov.model'), model, () => model.input.value)), blocks, steps, checker(client)),
      card({ title: t('con.endpoints') }, listed('con.offered'), details(t('con.absent'), listed('con.notOffered'))));
    }

    function update({ parts, query }) {
      const client = CLIENTS.find(({ id }) => id === parts[0]) || CLIENTS.find(({ id }) => id === pref('client'))
        || clientSeen(get('firstRun').clientSeen), wanted = `${client.id} ${query.at}`;
      if (parts[0] === client.id) setPref('client', client.id);
      links.show(client.id);
      if (wanted === shown || !share) return;
      shown = wanted;
      stop();
      build(client, query.at);
    }
    fill(root, h('div', { class: 'connect-page' }, links, place));
    loader(place, () => Promise.all([fetchJson('/share'), fetchJson('/models')]), (found) => {
      [share, { items: models }] = found;
      update(current());
    });
    return { update, primary: null, unmount: () => { stop(); codex?.unmount(); } };
  },
};
