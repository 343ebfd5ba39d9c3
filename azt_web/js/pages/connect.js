// How each client is pointed at this gateway, and whether its call arrives.
import { get as fetchJson } from '../api.js';
import { codexPanel } from '../codex_panel.js';
import { fill, h, icon, text } from '../dom.js';
import { timeEl } from '../format.js';
import { known, pref, setPref, t } from '../i18n.js';
import { current, hash, setQuery } from '../router.js';
import { CLIENTS, atHost, clientSeen, snippets } from '../snippets.js';
import { get, isLocal, on } from '../store.js';
import { button, card, codeBlock, copyButton, details, segmented, select } from '../ui.js';

/** What is offered under /v1, in the words con.ep.<name>; what is not. */
const ENDPOINTS = [
  ['POST /v1/responses', 'responses'], ['POST /v1/chat/completions', 'chat'], ['GET /v1/models', 'models'],
  ['POST /v1/images/generations', 'images'], ['POST /v1/images/edits', 'edits'],
  ['POST /v1/responses/input_tokens', 'count'], ['* /codex/v1', 'codex'],
];
const ABSENT = ['embeddings', 'files', 'audio', 'assistants', 'completions'];
const OWN_CLIENTS = ['console', 'azt', 'Playground'];

let key = 'local'; // what was typed stays while this page is open, and nowhere else

const named = (id) => (known(`con.${id}`) ? t(`con.${id}`) : t(`client.${id}`));

/** [what is shown, base URL without /v1] for each place that a client may run in. */
function places(share) {
  const here = get('gateway').adminUrl?.replace(/\/$/, '') || location.origin;
  const others = (share?.addresses || []).map((one) => [one.host, one.baseUrl.replace(/\/v1$/, '')]);
  const own = isLocal() ? [['here', here], ['docker', atHost(here, 'host.docker.internal')]] : [];
  return [...own, ...(isLocal() || others.length ? others : [[location.hostname, location.origin]])];
}

function copyLine(label, shown, from, note) {
  return h('div', { class: 'copyline' }, h('span', { class: 'name' }, label), shown, note && h('span',
    { class: 'note' }, note),
    copyButton(from, '', { kind: 'ghost square', 'aria-label': `${t('act.copy')}: ${label}` }));
}

/** Waits for a call of this client, and tells how it went. */
function checker({ id, seen }) {
  const name = named(id), said = h('p', { class: 'row', role: 'status' });
  let off = null;
  const stop = () => { off?.(); off = null; };
  const isIts = ({ client }) => (seen.length ? seen.includes(client) : !OWN_CLIENTS.includes(client));
  const told = (_, changes) => {
    const row = changes.findLast((one) => one?.type === 'finished' && isIts(one.row))?.row;
    if (!row) return;
    stop();
    const good = row.result === 'ok';
    fill(said, h('span', { class: good ? 'good' : 'wrong' }, icon(good ? 'check' : 'warn'), t(good ? 'con.checkOk'
      : 'con.checkBad')),
      timeEl(row.at, 'clock'), h('a', { href: hash('log', [row.id]) }, t('con.openRow')));
  };
  const start = () => {
    stop();
    off = on('request', told);
    fill(said, h('span', { class: 'spin' }), t('con.checkWait', { client: name }));
  };
  return { el: h('div', { class: 'row check' }, button(t('con.check'), { icon: 'refresh', on: start }), said), stop };
}

const endpoints = () => card({ title: t('con.endpoints') }, h('dl', { class: 'endpoints' }, ENDPOINTS.map(([path,
  name]) => (
  h('div', null, h('dt', null, h('code', null, path)), h('dd', null, t(`con.ep.${name}`)))))),
details(t('con.absent'), h('ul', { class: 'bullets' }, ABSENT.map((name) => h('li', null, t(`con.no.${name}`))))));

export const page = {
  title: 'nav.connect',
  mount(root) {
    const links = CLIENTS.map(({ id }) => h('a', { href: hash('connect', [id]), 'data-id': id }, named(id)));
    const place = h('div', { class: 'stack' });
    let share = null, models = [], check = null, codex = null, shown = '';

    function build(client) {
      const { id } = client, needs = get('gateway').keys > 0, all = places(share);
      const wanted = current().query.at, [at, url] = all.find(([name]) => name === wanted) || all[0] || ['', ''];
      const model = select(t('ov.model'), (models.length ? models : [get('defaultModel')]).map((one) => [one, one]),
        get('defaultModel'), () => code());
      const input = h('input', { type: 'text', value: key, 'aria-label': t('ov.key'), autocomplete: 'off',
        spellcheck: 'false',
        on: { input: () => { key = input.value; code(); } } });
      const blocks = h('div', { class: 'stack' });
      const values = () => ({ base: `${url}/v1`, codexBase: `${url}/codex/v1`, key: key || 'local',
        model: model.input.value });
      const code = () => fill(blocks, snippets(id, values()).map((one) => codeBlock(one.text, { label: one.label })));
      code();
      const where = segmented(t('con.at'), all.map(([name]) => [name, ['here', 'docker'].includes(name)
        ? t(`con.at.${name}`) : name]),
        at, (name) => setQuery({ at: name === 'here' ? null : name }));
      const closed = isLocal() && share && !share.lanApi;
      check = checker(client);
      const steps = h('ol', { class: 'numbered' }, t(`con.steps.${id}`).split('|').map((one) => h('li', null, one)));
      const body = [h('div', { class: 'row' }, h('span', { class: 'note' }, t('con.at')), where,
        closed && h('a', { class: 'note', href: '#/settings/sharing' }, t('con.closed'))),
      h('div', { class: 'copylines' }, copyLine(t('shell.base'), h('code', null, id === 'codex' ? values().codexBase
        : values().base),
        () => (id === 'codex' ? values().codexBase : values().base)),
      copyLine(t('ov.key'), input, () => key, t(needs ? 'con.needKey' : 'con.anyKey')),
      copyLine(t('ov.model'), model, () => model.input.value)), blocks, steps, check.el];
      if (id !== 'codex') return fill(place, card({ title: named(id) }, body), endpoints());
      codex ||= codexPanel();
      return fill(place, codex.el, card({ title: t('cdx.byHand') }, body), endpoints());
    }

    const chosen = ({ parts }) => CLIENTS.find(({ id }) => id === parts[0])
      || CLIENTS.find(({ id }) => id === pref('client')) || clientSeen(get('firstRun').clientSeen);
    function update(route) {
      const client = chosen(route), wanted = `${client.id} ${route.query.at} ${models.length} ${Boolean(share)}`;
      if (wanted === shown) return;
      shown = wanted;
      if (route.parts[0]) setPref('client', client.id);
      links.forEach((link) => link.toggleAttribute('aria-current', link.dataset.id === client.id));
      links.find((link) => link.dataset.id === client.id).scrollIntoView({ block: 'nearest', inline: 'center' });
      check?.stop();
      build(client);
    }
    fill(root, h('div', { class: 'connect-page' }, h('nav', { class: 'clients', 'aria-label': t('ov.client') }, links),
      place));
    const later = (path, take) => fetchJson(path).then((got) => { take(got); update(current()); }, () => {});
    later('/share', (got) => { share = got; });
    later('/models', ({ items }) => { models = items.map((one) => one.id); });
    return { update, primary: null, unmount: () => { check?.stop(); codex?.unmount(); } };
  },
};
