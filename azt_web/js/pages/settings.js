// Settings, section by section; each is saved on its own. What is fixed elsewhere is shown with what fixes it.
import { download, get as fetchJson, send } from '../api.js';
import { codexPanel } from '../codex_panel.js';
import { fill, h, icon, text } from '../dom.js';
import { duration, num, timeEl } from '../format.js';
import { known, lang, plural, pref, setLang, setPref, t } from '../i18n.js';
import { current, hash, remount, replace } from '../router.js';
import { sharingPanel } from '../sharing_panel.js';
import { accountOf, get, isLocal, nameOf, on } from '../store.js';
import { button, card, confirm, empty, errorPanel, fail, field, iconButton, select, setTheme, skeleton, theme, toast,
  toggle } from '../ui.js';

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
  data: [['log.keepRows', 'number', 0, 100000], ['log.keepDays', 'number', 1, 3650], ['log.level', 'choice', 'debug',
    'info', 'warning', 'error'], ['usage.keepDays', 'number', 1, 3650], ['usage.keepMb', 'number', 1, 100000]],
  about: [],
};
const LOCAL = /^(server|apiKeys|networkProxy)\./;
const ZONES = ['browser', 'gateway', 'UTC', 'Asia/Shanghai', 'Europe/Berlin', 'America/New_York',
  'America/Los_Angeles'];

let saved = null;
const draft = {}; // what is typed and not saved, by key: it outlives a visit to another page

const dig = (key) => key.split('.').reduce((branch, name) => branch?.[name], saved.values);
const valueOf = (key) => (key in draft ? draft[key] : dig(key));
const changed = (section) => FIELDS[section].map(([key]) => key).filter((key) => key in draft);
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** Send these drafts. Values that were changed elsewhere meanwhile are shown beside the own ones first. */
async function save(keys) {
  const before = Object.fromEntries(keys.map((key) => [key, dig(key)]));
  try {
    const values = Object.fromEntries(keys.map((key) => [key, draft[key]]));
    saved = await send('PATCH', '/settings', { revision: saved.revision, values });
  } catch (error) {
    if (error.code !== 'stale_revision') throw error;
    saved = await fetchJson('/settings');
    const both = keys.filter((key) => !same(dig(key), before[key]));
    const row = (key) => h('tr', null, h('th', { scope: 'row' }, t(`set.${key}`)), h('td', null, String(dig(key))),
      h('td', null, String(draft[key])));
    const heads = ['set.staleWhat', 'set.staleTheirs', 'set.staleYours'].map((one) => h('th', { scope: 'col' },
      t(one)));
    const mine = !both.length || await confirm({ title: t('set.staleTitle'), action: t('set.staleMine'), body: [
      h('p', null, t('set.staleBody')), h('table', null, h('thead', null, h('tr', null, heads)), h('tbody', null,
        both.map(row)))] });
    if (!mine) both.forEach((key) => { delete draft[key]; });
    return mine || keys.length > both.length ? save(keys.filter((key) => key in draft)) : undefined;
  }
  for (const key of keys) delete draft[key];
  return toast(t('set.saved'));
}

// -- one setting

/** The element for a setting: [key, kind, ...]. `touch()` follows each change. */
function control([key, kind, ...options], models, touch) {
  const value = valueOf(key), name = t(`set.${key}`), by = saved.fixed[key];
  const put = (now) => { if (same(now, dig(key))) delete draft[key]; else draft[key] = now; touch(); };
  const help = [known(`set.${key}.help`) && t(`set.${key}.help`), by && t('set.fixed',
    { by })].filter(Boolean).join(' ');
  const words = (one) => (known(`set.${key}.${one}`) ? t(`set.${key}.${one}`) : one);
  let el = null;
  if (kind === 'switch') el = toggle(name, value, put, help);
  else if (kind === 'accounts') el = excluded(name, value, put, touch);
  else if (kind === 'choice' || kind === 'model') {
    const known = kind === 'model' ? [...new Set([value, ...models])] : options;
    el = field(name, select(name, known.map((one) => [one, words(one)]), value, put), { help });
  } else {
    const list = kind === 'list', number = kind === 'number';
    const input = h(list ? 'textarea' : 'input', { type: list ? null : kind, min: options[0], max: options[1],
      value: list ? value.join('\n') : value, spellcheck: 'false', autocomplete: 'off', rows: list ? '2' : null,
      on: { input: () => put(list ? input.value.split(/\s+/).filter(Boolean) : number ? Number(input.value)
        : input.value.trim()) } });
    el = field(name, input, { help });
  }
  el.dataset.key = key;
  const off = by || (!isLocal() && LOCAL.test(key));
  for (const one of off ? el.querySelectorAll('input,select,textarea,button') : []) one.disabled = true;
  return el;
}

function excluded(name, ids, put, touch) {
  const rest = get('accounts').filter((one) => !ids.includes(one.id));
  const add = select(t('set.exclude'), [['', t('set.exclude')], ...rest.map((one) => [one.id, nameOf(one)])], '',
    (id) => { put([...ids, id]); touch(true); });
  return h('div', { class: 'field' }, h('span', { class: 'name' }, name), h('div', { class: 'row' },
    ids.map((id) => h('span', { class: 'tag' },
    nameOf(accountOf(id)) || id, iconButton('close', t('set.include', { name: nameOf(accountOf(id)) || id }),
      () => { put(ids.filter((one) => one !== id)); touch(true); }))), rest.length > 0 && add));
}

// -- what only some sections have

function general(refresh) {
  const own = (key, options, value, onchange) => field(t(key), select(t(key), options, value, onchange));
  return [own('shell.language', [['en', 'English'], ['zh-CN', '简体中文']], lang(), setLang),
    own('set.theme', ['system', 'light', 'dark'].map((one) => [one, t(`set.theme.${one}`)]), theme(), setTheme),
    own('set.zone', ZONES.map((one) => [one, known(`set.zone.${one}`) ? t(`set.zone.${one}`) : one]), pref('zone',
      'browser'),
      (one) => { setPref('zone', one); refresh(); }), h('p', { class: 'note' }, t('set.browserOnly'))];
}

/** Proxy and route, tried with what stands in the fields. */
function networkTest() {
  const place = h('div', { role: 'status' }), ms = (n) => (n === undefined || n === null ? '–' : duration(n));
  const show = ({ steps = [], via }) => fill(place, h('p', { class: 'note' }, t(via === 'proxy' ? 'set.viaProxy'
    : 'set.viaDirect')),
    h('div', { class: 'scroll' }, h('table', null, h('thead', null, h('tr', null, ['target', 'dns', 'connect', 'tls',
      'http', 'status'].map(
      (one) => h('th', { scope: 'col' }, t(`set.test.${one}`))))), h('tbody', null, steps.map((one) => h('tr', null,
      h('th', { scope: 'row' }, one.target), ['dns', 'connect', 'tls', 'http'].map((step) => h('td', null,
        ms(one[step]))),
      h('td', null, h('span', { class: one.ok ? 'good' : 'wrong' }, icon(one.ok ? 'check' : 'cross'), one.status
        || one.error || t('res.failed')))))))));
  const run = async () => {
    const keys = FIELDS.network.map(([key]) => key).filter((key) => LOCAL.test(key) && key in draft);
    const networkProxy = Object.fromEntries(FIELDS.network.slice(0, 3).map(([key]) => [key.split('.')[1],
      valueOf(key)]));
    let { job } = await send('POST', '/network/test', keys.length ? { networkProxy } : {});
    while (['queued', 'running'].includes(job.state)) {
      await new Promise((resolve) => { const off = on('jobs', () => { off(); resolve(); }); setTimeout(resolve,
        1000); });
      job = await fetchJson(`/jobs/${job.id}`);
    }
    show(job.result || {});
  };
  const start = button(t('set.testNetwork'), { icon: 'refresh', on: run });
  if (current().query.test) {
    replace(hash('settings', ['network']));
    start.click();
  }
  return [h('div', { class: 'row' }, start), place];
}

function dataActions() {
  const clear = async (path, title, count) => {
    if (await confirm({ title: t(title), body: plural('set.clearBody', count), action: t('set.clear'),
      danger: true })) {
      await send('DELETE', path);
      toast(t('set.cleared'));
    }
  };
  const danger = { kind: 'danger', icon: 'trash' };
  return [h('dl', { class: 'facts' }, h('dt', null, t('set.stateDir')), h('dd', null, h('code', null,
    get('gateway').stateDir || '–'))),
    h('div', { class: 'row' }, button(t('set.diagnostics'), { icon: 'download', disabled: !isLocal(),
      on: () => download('/diagnostics', {}, 'GET') }),
      button(t('set.clearLog'), { ...danger, on: async () => clear('/requests', 'set.clearLog',
        (await fetchJson('/requests', { limit: 1 })).kept) }),
      button(t('set.clearUsage'), { ...danger, disabled: !isLocal(),
        on: async () => clear('/usage', 'set.clearUsage', (await fetchJson('/usage')).lifetime.requestCount) }))];
}

async function restart() {
  const running = get('gateway').running || 0, waits = h('input', { type: 'checkbox', checked: true });
  const sure = await confirm({ title: t('set.restart'), action: t('set.restart'), body: [h('p', null,
    plural('set.restartBody', running)),
    h('label', { class: 'row' }, waits, t('set.restartWait'))] });
  if (sure) await send('POST', '/gateway/restart', { drainMs: waits.checked ? 60000 : 0 });
}

function about() {
  const { version, pid, startedAt, listen } = get('gateway'), said = h('span', { role: 'status' });
  const check = async () => {
    const { latest, newer } = await send('POST', '/version/check');
    fill(said, newer ? t('set.newer', { latest }) : t('set.newest'));
  };
  const fact = (name, ...value) => [h('dt', null, t(name)), h('dd', null, value)];
  return [h('dl', { class: 'facts' }, fact('set.version', version), fact('set.licence', 'MIT'), fact('set.process',
    String(pid), ' · ',
    timeEl(startedAt, 'ago')), fact('set.listen', (listen || []).join(', '))), h('div', { class: 'row' },
  button(t('set.checkVersion'), { on: check }), said), h('div', { class: 'row' },
  button(t('set.restart'), { icon: 'refresh', disabled: !isLocal(), on: restart }))];
}

// -- the page

export const page = {
  title: 'nav.settings',
  mount(root) {
    let section = '', models = [], part = null;
    const tabs = Object.keys(FIELDS).map((one) => h('a', { href: hash('settings', [one]), 'data-section': one },
      t(`section.${one}`)));
    const place = h('div', { class: 'stack' }), due = h('div'), words = h('p'), bar = h('div', { class: 'dirty',
      role: 'status', hidden: true },
      words, button(t('act.discard'),
        { on: () => { changed(section).forEach((key) => { delete draft[key]; }); build(); } }),
      button(t('act.save'), { kind: 'primary', on: store }));

    function touch(redraw) {
      if (redraw === true) build();
      bar.hidden = !changed(section).length;
      text(words, t('set.unsaved', { section: t(`section.${section}`) }));
      const wait = saved.restartNeeded || [];
      fill(due, wait.length > 0 && h('div', { class: 'notice warn' }, icon('warn'), h('p', null,
        t('set.restartNeeded', { what: wait.map((key) => t(`set.${key}`)).join(', ') })), button(t('set.restart'),
          { disabled: !isLocal(), on: restart })));
    }

    async function store() {
      try {
        await save(changed(section));
        build();
      } catch (error) {
        const where = place.querySelector(`[data-key="${CSS.escape(error.params?.field || '')}"]`);
        if (where?.error) where.error(error.params.reason || error.message);
        else throw error;
      }
    }

    function build() {
      part?.unmount();
      part = section === 'codex' ? codexPanel() : section === 'sharing' ? sharingPanel(saved, load) : null;
      const fields = FIELDS[section].filter(([key]) => dig(key) !== undefined).map((one) => control(one, models,
        touch));
      const extra = { general: () => general(remount), network: networkTest, data: dataActions, about }[section]?.()
        || [];
      const warned = section === 'images' && h('p', { class: 'notice warn' }, icon('warn'), t('set.imagesWarn'));
      fill(place, part?.el, (fields.length > 0 || extra.length > 0) && card({ title: t(part ? 'set.listen'
        : `section.${section}`), class: 'form' },
        warned, fields, extra));
      touch();
    }

    async function load() {
      try {
        saved = await fetchJson('/settings');
        build();
      } catch (error) {
        fill(place, errorPanel(error, load));
      }
    }

    function update({ parts }) {
      const wanted = parts[0] in FIELDS ? parts[0] : 'general';
      if (wanted === section) return;
      section = wanted;
      tabs.forEach((tab) => tab.toggleAttribute('aria-current', tab.dataset.section === section));
      if (saved) build();
      else fill(place, skeleton(4));
    }
    fill(root, h('div', { class: 'settings' }, h('nav', { class: 'tabs', 'aria-label': t('nav.settings') }, tabs), due,
      place, bar));
    load();
    fetchJson('/models').then(({ items }) => { models = items.map((one) => one.id); if (saved
      && section === 'general') build(); }, () => {});
    // Another tab has saved: follow it, but not under what is being typed; saving then asks.
    const off = on('settings', (now) => { if (now.revision !== saved?.revision && !changed(section).length) load(); });
    return { update, primary: null, unmount: () => { off(); part?.unmount(); } };
  },
};
