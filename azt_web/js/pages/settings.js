// Settings, section by section; each is saved on its own. What is fixed elsewhere is shown with what fixes it.
import { download, get as fetchJson, send } from '../api.js';
import { codexPanel } from '../codex_panel.js';
import { fill, h, icon, text } from '../dom.js';
import { duration, timeEl } from '../format.js';
import { known, lang, plural, pref, setLang, setPref, t } from '../i18n.js';
import { current, hash, remount, replace } from '../router.js';
import { sharingPanel } from '../sharing_panel.js';
import { accountOf, get, isLocal, nameOf, on } from '../store.js';
import * as ui from '../ui.js';

const { button, confirm, field, select } = ui;

/** Section -> [key, kind, ...]; kinds: switch, text, list, model, accounts, number (least, most), choice (values). */
const FIELDS = {
  general: [['defaultModel', 'model'], ['ui.maskEmails', 'choice', 'never', 'lan', 'always']],
  routing: [['autoSwitch.enabled', 'switch'], ['autoSwitch.beforePercent', 'number', 0, 99],
    ['autoSwitch.order', 'choice', 'most_left', 'soonest_reset', 'priority'], ['autoSwitch.excludedIds', 'accounts'],
    ['quota.everyMinutes', 'number', 0, 10080], ['quota.concurrency', 'number', 1, 32]],
  codex: [],
  images: [['image.freeAccountWebGenerationEnabled', 'switch'], ['image.orchestratorModel', 'text']],
  network: [['networkProxy.enabled', 'switch'], ['networkProxy.url', 'text'], ['networkProxy.noProxy', 'text'],
    ['limits.bodyMb', 'number', 1, 4096]],
  sharing: [['server.host', 'text'], ['server.port', 'number', 0, 65535], ['server.tokenOnLoopback', 'switch'],
    ['apiKeys.loopbackExempt', 'switch'], ['server.allowedHosts', 'list'], ['server.corsOrigins', 'list']],
  data: [['log.keepRows', 'number', 0, 100000], ['log.keepDays', 'number', 1, 3650],
    ['usage.keepDays', 'number', 1, 3650], ['usage.keepMb', 'number', 1, 100000],
    ['log.level', 'choice', 'debug', 'info', 'warning', 'error']],
  about: [],
};
const LOCAL = /^(server|apiKeys|networkProxy)\./;
const ZONES = 'browser gateway UTC Asia/Shanghai Europe/Berlin America/New_York America/Los_Angeles'.split(' ');
const STEPS = ['dns', 'connect', 'tls', 'http'];

let saved = null;
const draft = {}; // what is typed and not saved, by key: it outlives a visit to another page

const dig = (key) => key.split('.').reduce((branch, name) => branch?.[name], saved.values);
const valueOf = (key) => (key in draft ? draft[key] : dig(key));
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const changed = (section) => FIELDS[section].map(([key]) => key).filter((key) => key in draft);
const drop = (keys) => keys.forEach((key) => { delete draft[key]; });
const worded = (key, plain) => [plain, known(`${key}.${plain}`) ? t(`${key}.${plain}`) : plain];
const row = (...children) => h('div', { class: 'row' }, children);
const warning = (words, ...more) => h('div', { class: 'notice warn' }, icon('warn'), h('p', null, words), more);
const facts = (all) => h('dl', { class: 'facts' }, all.map(([key, ...value]) => [h('dt', null, t(key)),
  h('dd', null, value)]));
/** Heads, and rows of cells of which the first is a head too. */
const table = (heads, rows) => h('div', { class: 'scroll' }, h('table', null,
  h('thead', null, h('tr', null, heads.map((one) => h('th', { scope: 'col' }, t(one))))),
  h('tbody', null, rows.map(([head, ...cells]) => h('tr', null, h('th', { scope: 'row' }, head),
    cells.map((one) => h('td', null, one)))))));

/** Send these drafts. What was changed elsewhere meanwhile is shown beside the own values first. */
async function save(keys) {
  const values = Object.fromEntries(keys.map((key) => [key, draft[key]])), before = keys.map(dig);
  try {
    saved = await send('PATCH', '/settings', { revision: saved.revision, values });
  } catch (error) {
    if (error.code !== 'stale_revision') throw error;
    saved = await fetchJson('/settings');
    const both = keys.filter((key, i) => !same(dig(key), before[i]));
    const body = [h('p', null, t('set.staleBody')), table(['set.staleWhat', 'set.staleTheirs', 'set.staleYours'],
      both.map((key) => [t(`set.${key}`), String(dig(key)), String(draft[key])]))];
    const mine = !both.length || await confirm({ title: t('set.staleTitle'), action: t('set.staleMine'), body });
    if (!mine) drop(both);
    const rest = keys.filter((key) => key in draft);
    return rest.length ? save(rest) : undefined;
  }
  drop(keys);
  return ui.toast(t('set.saved'));
}

// -- one setting

/** The element for [key, kind, ...]; `touch(again)` follows each change, and draws anew when asked. */
function control([key, kind, ...options], models, touch) {
  const value = valueOf(key), name = t(`set.${key}`), by = saved.fixed[key], help = `set.${key}.help`;
  const notes = [known(help) && t(help), by && t('set.fixed', { by })].filter(Boolean).join(' ');
  const put = (now) => { if (same(now, dig(key))) drop([key]); else draft[key] = now; touch(kind === 'accounts'); };
  let el = null;
  if (kind === 'switch') el = ui.toggle(name, value, put, notes);
  else if (kind === 'accounts') el = excluded(name, value, put);
  else if (kind === 'choice' || kind === 'model') {
    const all = (kind === 'model' ? [...new Set([value, ...models])] : options).map((one) => worded(`set.${key}`, one));
    el = field(name, select(name, all, value, put), { help: notes });
  } else {
    const lists = kind === 'list', read = { number: Number, text: (now) => now.trim(),
      list: (now) => now.split(/\s+/).filter(Boolean) };
    const input = h(lists ? 'textarea' : 'input', { type: lists ? null : kind, min: options[0], max: options[1],
      value: lists ? value.join('\n') : value, rows: lists ? 2 : null, spellcheck: 'false', autocomplete: 'off',
      on: { input: () => put(read[kind](input.value)) } });
    el = field(name, input, { help: notes });
  }
  el.dataset.key = key;
  const off = by || (!isLocal() && LOCAL.test(key));
  for (const one of off ? el.querySelectorAll('input,select,textarea,button') : []) one.disabled = true;
  return el;
}

function excluded(label, ids, put) {
  const name = (id) => nameOf(accountOf(id)) || id, rest = get('accounts').filter((one) => !ids.includes(one.id));
  const tag = (id) => h('span', { class: 'tag' }, name(id), ui.iconButton('close', t('set.include', { name: name(id) }),
    () => put(ids.filter((one) => one !== id))));
  const others = [['', t('set.exclude')], ...rest.map((one) => [one.id, nameOf(one)])];
  return h('div', { class: 'field' }, h('span', { class: 'name' }, label), row(ids.map(tag),
    rest.length > 0 && select(t('set.exclude'), others, '', (id) => put([...ids, id]))));
}

// -- what only some sections have

function general() {
  const own = (key, options, value, onchange) => field(t(key), select(t(key), options, value, onchange));
  const move = (one) => { setPref('zone', one); remount(); };
  return [own('shell.language', [['en', 'English'], ['zh-CN', '简体中文']], lang(), setLang),
    own('set.theme', ['system', 'light', 'dark'].map((one) => worded('set.theme', one)), ui.theme(), ui.setTheme),
    own('set.zone', ZONES.map((one) => worded('set.zone', one)), pref('zone', 'browser'), move),
    h('p', { class: 'note' }, t('set.browserOnly'))];
}

/** The way to the provider, tried with what stands in the fields. */
function network() {
  const place = h('div', { role: 'status' });
  const result = ({ ok, status, error }) => h('span', { class: ok ? 'good' : 'wrong' }, icon(ok ? 'check' : 'cross'),
    status || error || t('res.failed'));
  const run = async () => {
    const proxy = FIELDS.network.map(([key]) => key).filter((key) => LOCAL.test(key));
    const typed = proxy.some((key) => key in draft) && { networkProxy: Object.fromEntries(
      proxy.map((key) => [key.split('.')[1], valueOf(key)])) };
    let { job } = await send('POST', '/network/test', typed || {});
    while (['queued', 'running'].includes(job.state)) {
      await new Promise((go) => { const off = on('jobs', () => { off(); go(); }); setTimeout(go, 1000); });
      job = await fetchJson(`/jobs/${job.id}`);
    }
    const { steps = [], via } = job.result || {};
    fill(place, h('p', { class: 'note' }, t(via === 'proxy' ? 'set.viaProxy' : 'set.viaDirect')),
      table(['target', ...STEPS, 'status'].map((one) => `set.test.${one}`), steps.map((one) => [one.target,
        ...STEPS.map((step) => duration(one[step])), result(one)])));
  };
  const start = button(t('set.testNetwork'), { icon: 'refresh', on: run });
  if (current().query.test) {
    replace(hash('settings', ['network']));
    start.click();
  }
  return [row(start), place];
}

function data() {
  const here = { disabled: !isLocal() }, folder = h('code', null, get('gateway').stateDir);
  const clear = async (key, path, count) => {
    const body = plural('set.clearBody', count), sure = { title: t(key), body, action: t('set.clear'), danger: true };
    if (await confirm(sure)) await send('DELETE', path).then(() => ui.toast(t('set.cleared')));
  };
  const log = async () => clear('set.clearLog', '/requests', (await fetchJson('/requests', { limit: 1 })).kept);
  const usage = async () => clear('set.clearUsage', '/usage', (await fetchJson('/usage')).lifetime.requestCount);
  const bundle = () => download('/diagnostics', {}, 'GET'), danger = { kind: 'danger', icon: 'trash', ...here };
  return [facts([['set.stateDir', folder]]),
    row(button(t('set.diagnostics'), { icon: 'download', ...here, on: bundle }),
    button(t('set.clearLog'), { ...danger, on: log }), button(t('set.clearUsage'), { ...danger, on: usage }))];
}

function restartButton() {
  const restart = async () => {
    const waits = h('input', { type: 'checkbox', checked: true }), title = t('set.restart');
    const body = [h('p', null, plural('set.restartBody', get('gateway').running || 0)),
      h('label', { class: 'row' }, waits, t('set.restartWait'))];
    if (!await confirm({ title, action: title, body })) return;
    await send('POST', '/gateway/restart', { drainMs: waits.checked ? 60000 : 0 });
  };
  return button(t('set.restart'), { icon: 'refresh', disabled: !isLocal(), on: restart });
}

function about() {
  const { version, pid, startedAt, listen = [] } = get('gateway'), said = h('span', { role: 'status' });
  const check = async () => {
    const { latest, newer } = await send('POST', '/version/check');
    text(said, newer ? t('set.newer', { latest }) : t('set.newest'));
  };
  return [facts([['set.version', version], ['set.licence', 'MIT'], ['set.process', pid, ' · ', timeEl(startedAt)],
    ['set.where', listen.join(', ')]]), row(button(t('set.checkVersion'), { on: check }), said), row(restartButton())];
}

const MORE = { general, network, data, about };

// -- the page

export const page = {
  title: 'nav.settings',
  mount(root) {
    let section = '', models = [], part = null;
    const tab = (one) => h('a', { href: hash('settings', [one]), 'data-section': one }, t(`section.${one}`));
    const tabs = Object.keys(FIELDS).map(tab);
    const place = h('div', { class: 'stack' }), due = h('div'), words = h('p');
    const discard = () => { drop(changed(section)); build(); };
    const bar = h('div', { class: 'dirty', role: 'status', hidden: true }, words,
      button(t('act.discard'), { on: discard }), button(t('act.save'), { kind: 'primary', on: store }));

    function touch(again) {
      if (again) return build();
      bar.hidden = !changed(section).length;
      text(words, t('set.unsaved', { section: t(`section.${section}`) }));
      const what = (saved.restartNeeded || []).map((key) => t(`set.${key}`)).join(', ');
      return fill(due, what && warning(t('set.restartNeeded', { what }), restartButton()));
    }

    async function store() {
      try {
        await save(changed(section));
        build();
      } catch (error) {
        const where = place.querySelector(`[data-key="${CSS.escape(error.params?.field || '')}"]`);
        if (!where?.error) throw error;
        where.error(error.params.reason || error.message);
      }
    }

    function build() {
      part?.unmount();
      part = { codex: () => codexPanel(), sharing: () => sharingPanel(saved.values.server, load) }[section]?.();
      const fields = FIELDS[section].filter(([key]) => dig(key) !== undefined);
      fill(place, part?.el, section !== 'codex' && ui.card({ title: t(part ? 'set.listen' : `section.${section}`),
        class: 'form' }, section === 'images' && warning(t('set.imagesWarn')),
      fields.map((one) => control(one, models, touch)), MORE[section]?.()));
      touch();
    }

    async function load() {
      try {
        saved = await fetchJson('/settings');
        build();
      } catch (error) {
        fill(place, ui.errorPanel(error, load));
      }
    }

    function update({ parts }) {
      const wanted = parts[0] in FIELDS ? parts[0] : 'general';
      if (wanted === section) return;
      section = wanted;
      for (const one of tabs) one.toggleAttribute('aria-current', one.dataset.section === section);
      tabs.find((one) => one.dataset.section === section).scrollIntoView({ block: 'nearest', inline: 'center' });
      if (saved) build();
      else fill(place, ui.skeleton(4));
    }
    fill(root, h('div', { class: 'settings' }, h('nav', { class: 'tabs', 'aria-label': t('nav.settings') }, tabs), due,
      place, bar));
    load();
    const offer = ({ items }) => { models = items.map((one) => one.id); if (saved && section === 'general') build(); };
    fetchJson('/models').then(offer, () => {});
    // Another tab has saved: follow it, but not under what is being typed; saving then asks.
    const off = on('settings', (now) => { if (now.revision !== saved?.revision && !changed(section).length) load(); });
    return { update, primary: null, unmount: () => { off(); part?.unmount(); } };
  },
};
