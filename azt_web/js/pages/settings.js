// Settings, section by section; each is saved on its own. What is fixed elsewhere is shown with what fixes it.
import { download, get as fetchJson, send } from '../api.js';
import { codexPanel } from '../codex_panel.js';
import { fill, h, icon, text } from '../dom.js';
import { duration, timeEl } from '../format.js';
import { known, lang, plural, pref, setLang, setPref, t } from '../i18n.js';
import { current, hash, remount, replace } from '../router.js';
import { sharingPanel } from '../sharing_panel.js';
import { get, isLocal, nameOf, on } from '../store.js';
import * as ui from '../ui.js';

const { button, confirm, facts, field, note, ownButton, row, table, toast, warning } = ui;

/** Section -> its settings, each edited as the value it has: a switch, a number, a text, lines, or one of `CHOICES`. */
const FIELDS = {
  general: ['defaultModel', 'ui.maskEmails'],
  routing: ['autoSwitch.enabled', 'autoSwitch.beforePercent', 'autoSwitch.order', 'autoSwitch.excludedIds',
    'quota.everyMinutes', 'quota.concurrency'],
  codex: [], images: ['image.freeAccountWebGenerationEnabled', 'image.orchestratorModel'],
  network: ['networkProxy.enabled', 'networkProxy.url', 'networkProxy.noProxy', 'limits.bodyMb'],
  sharing: ['server.host', 'server.port', 'server.tokenOnLoopback', 'apiKeys.loopbackExempt', 'server.allowedHosts',
    'server.corsOrigins'],
  data: ['log.keepRows', 'log.keepDays', 'usage.keepDays', 'usage.keepMb', 'log.level'], about: [],
};
const CHOICES = { 'ui.maskEmails': ['never', 'lan', 'always'], 'log.level': ['debug', 'info', 'warning', 'error'],
  'autoSwitch.order': ['most_left', 'soonest_reset', 'priority'], theme: ['system', 'light', 'dark'],
  language: ['en', 'zh-CN'], zone: ['browser', 'gateway', 'UTC', 'Asia/Shanghai', 'Europe/Berlin', 'America/New_York',
    'America/Los_Angeles'] };
const LOCAL = /^(server|apiKeys|networkProxy)\./, STEPS = ['dns', 'connect', 'tls', 'http'];
const READ = { number: Number, string: (typed) => typed.trim(), object: (typed) => typed.split(/\s+/).filter(Boolean) };

let saved = null;
const draft = {}; // what is typed and not saved, by key: it outlives a visit to another page

const dig = (key) => key.split('.').reduce((branch, name) => branch[name], saved.values);
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const changed = (section) => FIELDS[section].filter((key) => key in draft);
const drop = (keys) => keys.forEach((key) => { delete draft[key]; });
const named = (keys) => keys.map((key) => t(`set.${key}`));

/** Send these drafts. What was changed elsewhere meanwhile is shown beside the own values first. */
async function save(keys) {
  const values = Object.fromEntries(keys.map((key) => [key, draft[key]])), before = keys.map(dig);
  const done = await send('PATCH', '/settings', { revision: saved.revision, values }).catch((error) => {
    if (error.code !== 'stale_revision') throw error;
  });
  saved = done || await fetchJson('/settings');
  if (done) drop(keys);
  if (done) return toast(t('set.saved'));
  const both = keys.filter((key, i) => !same(dig(key), before[i]));
  const rows = both.map((key) => [t(`set.${key}`), String(dig(key)), String(draft[key])]);
  const body = [h('p', null, t('set.staleBody')), table(rows, named(['staleWhat', 'staleTheirs', 'staleYours']))];
  if (both.length && !await confirm({ title: t('set.staleTitle'), action: t('set.staleMine'), body })) drop(both);
  const rest = keys.filter((key) => key in draft);
  return rest.length && save(rest);
}

// -- one setting

function choice(key, value, put, help) {
  const words = (one) => (known(`set.${key}.${one}`) ? t(`set.${key}.${one}`) : one), name = t(`set.${key}`);
  return field(name, ui.select(name, CHOICES[key].map((one) => [one, words(one)]), value, put), { help });
}

function excluded(ids, put) {
  const now = () => put([...el.querySelectorAll(':checked')].map((box) => box.value));
  const el = ui.details(t('set.autoSwitch.excludedIds'), get('accounts').map((one) => h('label', { class: 'row' },
    h('input', { type: 'checkbox', value: one.id, checked: ids.includes(one.id), on: { change: now } }), nameOf(one))));
  return Object.assign(el, { open: ids.length > 0 });
}

/** The element for a setting; `touch()` follows each change. */
function control(key, touch) {
  const value = draft[key] ?? dig(key), kind = typeof value, name = t(`set.${key}`), by = saved.fixed[key];
  const told = [known(`set.${key}.help`) && t(`set.${key}.help`), by && t('set.fixed', { by })];
  const put = (now) => { if (same(now, dig(key))) drop([key]); else draft[key] = now; touch(); };
  const input = ({ target }) => put(READ[kind](target.value));
  const typed = () => h(kind === 'object' ? 'textarea' : 'input', { type: kind === 'number' && kind,
    spellcheck: 'false', autocomplete: 'off', value: [value].flat().join('\n'), on: { input } });
  const help = told.filter(Boolean).join(' '), el = key === 'autoSwitch.excludedIds' ? excluded(value, put)
    : kind === 'boolean' ? ui.toggle(name, value, put, help)
      : CHOICES[key] ? choice(key, value, put, help) : field(name, typed(), { help });
  el.dataset.key = key;
  const off = by || (!isLocal() && LOCAL.test(key));
  for (const one of off ? el.querySelectorAll('input,select,textarea,button') : []) one.disabled = true;
  return el;
}

// -- what only some sections have

const general = () => [choice('language', lang(), setLang), choice('theme', ui.theme(), ui.setTheme),
  choice('zone', pref('zone', 'browser'), (zone) => { setPref('zone', zone); remount(); }), note(t('set.browserOnly'))];

/** The way to the provider, tried with what stands in the fields. */
function network() {
  const place = h('div', { role: 'status' });
  const line = ({ target, ok, status, error, ...took }) => [target, ...STEPS.map((step) => duration(took[step])),
    h('span', { class: ok ? 'good' : 'wrong' }, icon(ok ? 'check' : 'cross'), status || error || t('res.failed'))];
  const start = button(t('set.testNetwork'), { icon: 'refresh', on: async () => {
    replace(hash('settings', ['network'])); // without ?test, which brought some here
    const typed = changed('network').filter((key) => LOCAL.test(key)).map((key) => [key.split('.')[1], draft[key]]);
    let { job } = await send('POST', '/network/test', { networkProxy: Object.fromEntries(typed) });
    while (['queued', 'running'].includes(job.state)) {
      await new Promise((go) => { const off = on('jobs', () => { off(); go(); }); setTimeout(go, 1000); });
      job = await fetchJson(`/jobs/${job.id}`);
    }
    const { steps, via } = job.result, heads = ['target', ...STEPS, 'status'].map((one) => `test.${one}`);
    fill(place, note(t(via === 'proxy' ? 'set.viaProxy' : 'set.viaDirect')), table(steps.map(line), named(heads)));
  } });
  if (current().query.test) start.click();
  return [row(start), place];
}

function data() {
  const clear = (key, path, count) => ownButton(t(key), { kind: 'danger', icon: 'trash', on: async () => {
    const sure = { title: t(key), body: plural('set.clearBody', await count()), action: t('set.clear'), danger: true };
    if (await confirm(sure)) await send('DELETE', path).then(() => toast(t('set.cleared')));
  } });
  return [facts([[t('set.stateDir'), h('code', null, get('gateway').stateDir)]]),
    row(ownButton(t('set.diagnostics'), { icon: 'download', on: () => download('/diagnostics', {}, 'GET') }),
      clear('set.clearLog', '/requests', async () => (await fetchJson('/requests', { limit: 1 })).kept),
      clear('set.clearUsage', '/usage', async () => (await fetchJson('/usage')).lifetime.requestCount))];
}

const restartButton = () => ownButton(t('set.restart'), { icon: 'refresh', on: async () => {
  const waits = h('input', { type: 'checkbox', checked: true }), running = get('gateway').running || 0;
  const body = [plural('set.restartBody', running), h('label', { class: 'row' }, waits, t('set.restartWait'))];
  const agreed = await confirm({ title: t('set.restart'), action: t('set.restart'), body });
  if (agreed) await send('POST', '/gateway/restart', { drainMs: waits.checked ? 60000 : 0 });
} });

function about() {
  const { version, pid, startedAt, listen } = get('gateway'), said = h('span', { role: 'status' });
  const check = button(t('set.checkVersion'), { on: async () => {
    const { latest, newer } = await send('POST', '/version/check');
    text(said, newer ? t('set.newer', { latest }) : t('set.newest'));
  } });
  return [facts([[t('set.version'), version], [t('set.licence'), 'MIT'], [t('set.where'), listen.join(', ')],
    [t('set.process'), pid, ' · ', timeEl(startedAt)]]), row(check, said), row(restartButton())];
}

const MORE = { general, network, data, about, images: () => warning(t('set.imagesWarn')) };

// -- the page

export const page = {
  title: 'nav.settings',
  mount(root) {
    let section = '', part = null;
    const links = Object.keys(FIELDS).map((one) => [one, t(`section.${one}`), hash('settings', [one])]);
    const tabs = ui.tabs(t('nav.settings'), links, 'tabs'), place = h('div', { class: 'stack' });
    const words = h('p'), bar = h('div', { class: 'dirty', role: 'status' }, words,
      button(t('act.discard'), { on: () => { drop(changed(section)); build(); } }),
      button(t('act.save'), { kind: 'primary', on: () => store() }));
    const touch = () => { bar.hidden = !changed(section).length; };
    const store = () => save(changed(section)).then(build, (error) => {
      const where = place.querySelector(`[data-key="${CSS.escape(error.params?.field || '')}"]`);
      if (!where?.error) throw error;
      where.error(error.params.reason || error.message);
    });
    function build() {
      part?.unmount?.();
      part = { codex: codexPanel, sharing: () => sharingPanel(saved.values.server, load) }[section]?.();
      const what = named(saved.restartNeeded).join(', '), title = t(part ? 'set.listen' : `section.${section}`);
      const fields = FIELDS[section].map((one) => control(one, touch));
      fill(place, what && warning(t('set.restartNeeded', { what }), 'warn', restartButton()), part?.el,
        section !== 'codex' && ui.card({ title, class: 'form' }, fields, MORE[section]?.()));
      text(words, t('set.unsaved', { section: t(`section.${section}`) }));
      touch();
    }
    function update({ parts }) {
      const wanted = parts[0] in FIELDS ? parts[0] : 'general';
      if (wanted === section) return;
      section = wanted;
      tabs.show(section);
      if (saved) build();
    }
    fill(root, h('div', { class: 'settings' }, tabs, place, bar));
    const read = () => Promise.all([fetchJson('/settings'), fetchJson('/models')]);
    const load = ui.loader(place, read, ([found, { items }]) => {
      saved = found;
      CHOICES.defaultModel = [...new Set([dig('defaultModel'), ...items.map((one) => one.id)])];
      build();
    });
    // Another tab has saved: follow it, but not under what is being typed; saving then asks.
    const off = on('settings', (now) => { if (now.revision !== saved?.revision && !changed(section).length) load(); });
    return { update, primary: null, unmount: () => { off(); part?.unmount?.(); } };
  },
};
