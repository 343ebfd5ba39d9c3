// Settings, section by section, each saved on its own; and who else may call: switches, keys, pairing, browsers.
import { download, get as fetchJson, send } from '../api.js';
import { codexPanel } from '../codex_panel.js';
import { fill, h, icon, text } from '../dom.js';
import { duration, now, num, ticking, timeEl, wait, when } from '../format.js';
import { known, lang, plural, pref, setLang, setPref, t } from '../i18n.js';
import { current, hash, remount, replace } from '../router.js';
import { get, isLocal, nameOf, on } from '../store.js';
import { bullets, button, card, confirm, copyButton, details, dialog, facts, field, fieldForm, loader, note, ownButton,
  row, select, setTheme, table, tabs, theme, toast, toggle, warning } from '../ui.js';

/** Section -> its settings, each edited as the value it has: a switch, a number, a text, lines, or one of `CHOICES`. */
const FIELDS = { general: ['defaultModel', 'ui.maskEmails'], routing: ['autoSwitch.enabled', 'autoSwitch.beforePercent',
  'autoSwitch.order', 'autoSwitch.excludedIds', 'quota.everyMinutes', 'quota.concurrency'], codex: [],
images: ['image.freeAccountWebGenerationEnabled', 'image.orchestratorModel'],
network: ['networkProxy.enabled', 'networkProxy.url', 'networkProxy.noProxy', 'limits.bodyMb'],
sharing: ['server.host', 'server.port', 'server.tokenOnLoopback', 'apiKeys.loopbackExempt', 'server.allowedHosts',
  'server.corsOrigins'],
data: ['log.keepRows', 'log.keepDays', 'usage.keepDays', 'usage.keepMb', 'log.level'], about: [] };
const CHOICES = { 'ui.maskEmails': ['never', 'lan', 'always'], 'log.level': ['debug', 'info', 'warning', 'error'],
  'autoSwitch.order': ['most_left', 'soonest_reset', 'priority'], theme: ['system', 'light', 'dark'],
  language: ['en', 'zh-CN'], zone: ['browser', 'gateway', 'UTC', 'Asia/Shanghai', 'Europe/Berlin', 'America/New_York',
    'America/Los_Angeles'] };
const LOCAL = /^(server|apiKeys|networkProxy)\./, STEPS = ['dns', 'connect', 'tls', 'http'];
const READ = { number: Number, string: (typed) => typed.trim(), object: (typed) => typed.split(/\s+/).filter(Boolean) };
const draft = {}; // what is typed and not saved, by key: it outlives a visit to another page
let saved = null;
const dig = (key) => key.split('.').reduce((branch, name) => branch[name], saved.values);
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const changed = (section) => FIELDS[section].filter((key) => key in draft);
const drop = (keys) => keys.forEach((key) => { delete draft[key]; });
const named = (keys) => keys.map((key) => t(`set.${key}`));

/** Send these drafts. What was changed elsewhere meanwhile is shown beside the own values first. */
async function save(keys) {
  const values = Object.fromEntries(keys.map((key) => [key, draft[key]])), before = keys.map(dig);
  try {
    saved = await send('PATCH', '/settings', { revision: saved.revision, values });
    drop(keys);
    return toast(t('set.saved'));
  } catch (error) { if (error.code !== 'stale_revision') throw error; }
  saved = await fetchJson('/settings');
  const both = keys.filter((key, i) => !same(dig(key), before[i]));
  const rows = both.map((key) => [t(`set.${key}`), String(dig(key)), String(draft[key])]);
  const body = [h('p', null, t('set.staleBody')), table(rows, named(['staleWhat', 'staleTheirs', 'staleYours']))];
  if (both[0] && !await confirm({ title: t('set.staleTitle'), action: t('set.staleMine'), body })) drop(both);
  return keys.some((key) => key in draft) && save(keys.filter((key) => key in draft));
}

// -- one setting
function choice(key, value, put, help) {
  const name = t(`set.${key}`), worded = (one) => [one, known(`set.${key}.${one}`) ? t(`set.${key}.${one}`) : one];
  return field(name, select(name, CHOICES[key].map(worded), value, put), { help });
}
function excluded(ids, put) {
  const change = () => put([...el.querySelectorAll(':checked')].map((box) => box.value));
  const line = ({ id: value, ...one }) => h('label', { class: 'row' }, h('input', { type: 'checkbox', value,
    checked: ids.includes(value), on: { change } }), nameOf(one));
  const el = details(t('set.autoSwitch.excludedIds'), get('accounts').map(line));
  return Object.assign(el, { open: ids.length > 0 });
}
/** The element for a setting; `touch()` follows each change. */
function control(key, touch) {
  const value = draft[key] ?? dig(key), kind = typeof value, name = t(`set.${key}`), by = saved.fixed[key];
  const told = [known(`set.${key}.help`) && t(`set.${key}.help`), by && t('set.fixed', { by })];
  const put = (now) => { if (same(now, dig(key))) drop([key]); else draft[key] = now; touch(); };
  const input = ({ target }) => put(READ[kind](target.value)), help = told.filter(Boolean).join(' ');
  const typed = () => h(kind === 'object' ? 'textarea' : 'input', { type: kind === 'number' && kind,
    spellcheck: 'false', autocomplete: 'off', value: [value].flat().join('\n'), on: { input } });
  const el = key === 'autoSwitch.excludedIds' ? excluded(value, put) : CHOICES[key] ? choice(key, value, put, help)
    : kind === 'boolean' ? toggle(name, value, put, help) : field(name, typed(), { help });
  el.dataset.key = key;
  const isFixed = by || (!isLocal() && LOCAL.test(key));
  for (const one of isFixed ? el.querySelectorAll('input, select, textarea') : []) one.disabled = true;
  return el;
}

// -- what only some sections have
const general = () => [choice('language', lang(), setLang), choice('theme', theme(), setTheme),
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
    while (/queued|running/.test(job.state)) {
      await new Promise((go) => { const off = on('jobs', () => { off(); go(); }); setTimeout(go, 1000); });
      job = await fetchJson(`/jobs/${job.id}`);
    }
    const { steps, via } = job.result, heads = named(['target', ...STEPS, 'status'].map((one) => `test.${one}`));
    fill(place, note(t(via === 'proxy' ? 'set.viaProxy' : 'set.viaDirect')), table(steps.map(line), heads));
  } });
  if (current().query.test) start.click();
  return [row(start), place];
}
/** A button that asks, then deletes what is at that path. */
const erase = (label, path, ask, then) => ownButton(label, { kind: 'danger', on: async () => (
  await confirm({ danger: true, ...await ask() }) && send('DELETE', path).then(then)) });
function data() {
  const clear = (key, path, count) => erase(t(key), path, async () => ({ title: t(key), action: t('set.clear'),
    body: plural('set.clearBody', await count()) }), () => toast(t('set.cleared')));
  return [facts([[t('set.stateDir'), h('code', null, get('gateway').stateDir)]]),
    row(ownButton(t('set.diagnostics'), { icon: 'download', on: () => download('/diagnostics', {}, 'GET') }),
      clear('set.clearLog', '/requests', async () => (await fetchJson('/requests', { limit: 1 })).kept),
      clear('set.clearUsage', '/usage', async () => (await fetchJson('/usage')).lifetime.requestCount))];
}
const restartButton = () => ownButton(t('set.restart'), { icon: 'refresh', on: async () => {
  const waits = h('input', { type: 'checkbox', checked: true }), title = t('set.restart'), wait = t('set.restartWait');
  const body = [plural('set.restartBody', get('gateway').running || 0), h('label', { class: 'row' }, waits, wait)];
  const agreed = await confirm({ title, action: title, body });
  if (agreed) await send('POST', '/gateway/restart', { drainMs: waits.checked ? 60000 : 0 });
} });
function about() {
  const { version, pid, startedAt, listen } = get('gateway'), said = h('span', { role: 'status' });
  const check = button(t('set.checkVersion'), { on: async () => {
    const { latest, newer } = await send('POST', '/version/check');
    text(said, t(newer ? 'set.newer' : 'set.newest', { latest }));
  } });
  return [facts([[t('set.version'), version], [t('set.licence'), 'MIT'], [t('set.where'), listen.join(', ')],
    [t('set.process'), pid, ' · ', timeEl(startedAt)]]), row(check, said), row(restartButton())];
}
const MORE = { general, network, data, about, images: () => warning(t('set.imagesWarn')) };

// -- sharing
let pairing = {}; // {url, expiresAt, address}: it outlives a change of the settings around it
/** A code for one device, in a link to that address of this computer. */
const pair = async (address) => ({ ...await send('POST', '/session/pair', { address }), address });
/** What is to be copied or typed, large. */
const large = (words, ...more) => row(h('code', { class: 'secret' }, words), copyButton(words), more);
/** A secret, once: it is gone with the dialog. */
const once = (title, secret, base) => dialog({ title, body: [h('p', null, t('share.once')), large(secret),
  base && row(note(t('shell.base')), h('code', null, base), copyButton(base))] });
/** How far a key goes, in words. */
const terms = ({ limit, models, expiresAt }) => [limit && plural('share.aDay', limit), models && t('share.only',
  { models: models.join(', ') }), expiresAt && t(expiresAt > now() ? 'share.ends' : 'share.ended',
  { at: when(expiresAt) })].filter(Boolean).join(' · ') || t('share.unlimited');

/** {el}; `server` are its settings as they are saved, `reload()` reads them anew. */
function sharingPanel(server, reload) {
  const el = h('div', { class: 'stack' }), open = !/^(127\.|::1$|localhost$)/.test(server.host);
  let addresses = [], keys = [], sessions = [];
  /** A switch that opens something says first which addresses will answer. */
  function opening(name, kind, words) {
    const answers = server[name] && open, title = t(`share.${name}.title`), action = t('share.turnOn');
    const listed = () => bullets(addresses.map((one) => [h('code', null, one[kind]), ' ', one.label]));
    const flip = toggle(t(`share.${name}`), server[name], async (wanted) => {
      if (wanted && !await confirm({ title, action, body: [h('p', null, t(words)), listed()] })) return flip.set(false);
      await send('PATCH', '/settings', { values: { [`server.${name}`]: wanted } });
      if (name === 'lanConsole') pairing = wanted ? await pair(addresses[0]?.host) : {};
      return reload();
    }, t(`share.${name}.${answers ? 'on' : 'off'}`));
    flip.control.disabled = !isLocal();
    return [flip, answers && listed()];
  }
  function newKey() {
    const title = t('share.newKey'), words = t(keys.length ? 'share.newKeyText' : 'share.firstKeyText');
    const wrong = (error) => { throw error.params?.field === 'name' ? new Error(t('share.keyNameWrong')) : error; };
    const make = async (wanted) => {
      const { item, key } = await send('POST', '/keys', { name: wanted }).catch(wrong);
      made.close();
      once(t('share.keyMade', item), key, addresses[0]?.baseUrl || get('gateway').baseUrl); await load();
    };
    const input = h('input', { type: 'text', maxlength: '64', autocomplete: 'off', autofocus: true });
    const form = fieldForm(t('share.keyName'), input, title, make, { kind: 'primary' });
    const made = dialog({ title, body: [h('p', null, words), form] });
  }
  const revoke = (path, title, body) => erase(t('share.revoke'), path,
    () => ({ title, body, action: t('share.revoke') }), load);
  async function rotate() {
    const title = t('share.rotate'), sure = { title, body: t('share.rotateBody'), action: title, danger: true };
    if (!await confirm(sure)) return;
    const { token, sessionsEnded } = await send('POST', '/session/rotate-token');
    once(plural('share.rotated', sessionsEnded), token); await load();
  }
  /** The link of the code, by the address that is chosen. */
  function pairCard() {
    const { expiresAt: ends = 0, url, address = addresses[0]?.host } = pairing, off = !server.lanConsole;
    const again = async (host) => { pairing = await pair(host); draw(); }, live = ends > now();
    const left = () => (ends > now() ? t('login.left', { d: wait(ends - now()) }) : t('share.codeOver'));
    const hosts = addresses.map(({ host, label }) => [host, `${host} · ${label}`]);
    return card({ title: t('share.pair') }, h('p', null, t('share.pairText')), off && note(t('share.pairOff')),
      live && large(url, ticking(h('span'), ends, left)), row(live && select(t('share.address'), hosts, address, again),
        ownButton(t('share.pair'), { icon: 'key', disabled: off, on: () => again(address) })));
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
  const load = loader(el, read, (all) => { [{ addresses }, { items: keys }, { items: sessions = [] }] = all; draw(); });
  return { el };
}

// -- the page
function mount(root) {
  let section = '', part = null;
  const links = Object.keys(FIELDS).map((one) => [one, t(`section.${one}`), hash('settings', [one])]);
  const head = tabs(t('nav.settings'), links, 'tabs'), place = h('div', { class: 'stack' }), words = h('p');
  const bar = h('div', { class: 'dirty', role: 'status' }, words,
    button(t('act.discard'), { on: () => { drop(changed(section)); build(); } }),
    button(t('act.save'), { kind: 'primary', on: () => save(changed(section)).then(build, wrong) }));
  const touch = () => { bar.hidden = !changed(section).length; };
  const wrong = (error) => {
    const where = place.querySelector(`[data-key="${CSS.escape(error.params?.field || '')}"]`);
    if (!where?.error) throw error;
    where.error(error.params.reason || error.message);
  };
  function build() {
    part?.unmount?.();
    part = { codex: codexPanel, sharing: () => sharingPanel(saved.values.server, load) }[section]?.();
    const what = named(saved.restartNeeded).join(', '), title = t(part ? 'set.listen' : `section.${section}`);
    fill(place, what && warning(t('set.restartNeeded', { what }), 'warn', restartButton()), part?.el,
      section !== 'codex' && card({ title, class: 'form' }, FIELDS[section].map((one) => control(one, touch)),
        MORE[section]?.()));
    text(words, t('set.unsaved', { section: t(`section.${section}`) })); touch();
  }
  fill(root, h('div', { class: 'settings' }, head, place, bar));
  const read = () => Promise.all([fetchJson('/settings'), fetchJson('/models')]);
  const load = loader(place, read, ([found, { items }]) => {
    saved = found; CHOICES.defaultModel = [...new Set([dig('defaultModel'), ...items.map((one) => one.id)])];
    build();
  });
  // Another tab has saved: follow it, but not under what is being typed; saving then asks.
  const off = on('settings', (now) => { if (now.revision !== saved?.revision && !changed(section).length) load(); });
  return { unmount() { off(); part?.unmount?.(); }, update({ parts: [wanted] }) {
    const next = wanted in FIELDS ? wanted : 'general';
    if (next === section) return;
    section = next; head.show(next); if (saved) build();
  } };
}
export const page = { title: 'nav.settings', mount };
