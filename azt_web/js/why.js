// Why a request ended as it did, in a sentence, and what may help (console.md, appendix B).
import { send } from './api.js';
import { announce } from './dom.js';
import { at, bytes, duration, num } from './format.js';
import { known, t } from './i18n.js';
import { activate } from './palette.js';
import { go, hash } from './router.js';
import { accountOf, nameOf, store } from './store.js';
import * as ui from './ui.js';

const WORDS = { until: at, d: duration, size: bytes, limit: bytes, n: num,
  reason: (value) => (known(`reason.${value}`) ? t(`reason.${value}`) : value) };

/** Its account, and the parameters of its sentence as words; what the row does not tell, the account may. */
function about({ why, accountId }) {
  const account = accountOf(why.fixes?.[0]?.accountId ?? accountId);
  const spent = account?.quota?.windows?.find((one) => one.remainingPercent <= 0);
  const told = Object.entries(why.params ?? {}).filter(([, value]) => value !== '-');
  const found = { until: account?.statusParams?.until, window: spent && ui.windowName(spent), plan: account?.plan,
    ...Object.fromEntries(told) };
  const words = Object.entries(found).filter(([, value]) => (value ?? '') !== '').map(([name, value]) => (
    [name, WORDS[name]?.(value) ?? (nameOf(accountOf(value)) || value)]));
  return { account, until: found.until, params: Object.fromEntries(words) };
}

/** The sentence; a shorter one where a parameter is not known, else the gateway's own. */
export function verdict(row) {
  if (!row.why) return t(row.result === 'running' ? 'why.running' : 'why.fine', { d: duration(row.durationMs) });
  const { code, text } = row.why, { params } = about(row);
  const told = [`why.${code}`, `why.${code}.until`, `why.${code}.bare`].filter(known).map((key) => t(key, params));
  return told.find((one) => !/\{\w+\}/.test(one)) ?? text ?? code;
}

async function exclude(account, until) {
  const change = (excluded, excludedUntil) => send('PATCH', `/accounts/${account.id}`, { excluded, excludedUntil });
  await change(true, until);
  ui.toast(t('log.excluded', { name: nameOf(account), t: at(until) }),
    { action: { label: t('act.undo'), run: () => change(false, null) } });
}

function chooseAccount(anchor) {
  const able = store.get('accounts').filter((one) => !one.active && ['ready', 'low', 'unknown'].includes(one.status));
  if (!able.length) return go(hash('accounts'));
  return ui.menu(anchor, able.map((one) => ({ label: nameOf(one), run: () => activate(one) })));
}

const PLACES = { open_accounts: ['accounts'], add_account: ['accounts', ['add']], open_proxy: ['settings', ['network']],
  raise_limit: ['settings', ['data']], open_keys: ['settings', ['sharing']], image_settings: ['settings', ['images']],
  diagnostics: ['settings', ['data']], endpoint_notes: ['connect', ['generic']] };
const modeOf = ({ endpoint = '' }) => (endpoint.includes('image') ? 'image' : endpoint.endsWith('responses') ? 'responses' : 'chat');
/** What a button does: (row, its fix, its account, until when, event). */
const RUN = {
  exclude_until: (row, fix, account, until) => exclude(account, until),
  switch_account: (row, fix, account, until, event) => chooseAccount(event.currentTarget),
  use_account: (row, fix, account) => activate(account),
  open_account: (row, fix, account) => go(hash('accounts', [account.id])),
  login: (row, fix, account) => go(hash('accounts', ['add', 'browser'], { account: account?.id })),
  sync_models: () => send('POST', '/models/refresh').then(() => ui.toast(t('fix.synced'))),
  test_network: () => send('POST', '/network/test').then(() => go(hash('settings', ['network']))),
  use_model: (row, fix) => go(hash('playground', [], { model: fix.model, mode: modeOf(row) })),
  copy_model: (row, fix) => ui.copy(fix.model ?? store.get('defaultModel')).then((done) => done && ui.toast(t('act.copied'))),
  send_again: (row) => go(hash('playground', [], { model: row.model, mode: modeOf(row) })),
  copy_details: (row) => ui.copy(JSON.stringify(row, null, 2)).then((done) => done && announce(t('act.copied'))),
};
const NEEDS_ACCOUNT = ['exclude_until', 'use_account', 'open_account'];

/** A button for each thing that may help; none for an account that is gone. */
export function fixButtons(row) {
  const { account, until, params } = row.why ? about(row) : {};
  return (row.why?.fixes ?? []).map((fix) => {
    const { kind, accountId } = fix, its = accountOf(accountId) ?? account, run = RUN[kind];
    const lacks = (NEEDS_ACCOUNT.includes(kind) && !its) || (kind === 'exclude_until' && !until);
    if (lacks || !(run || PLACES[kind])) return null;
    return ui.button(t(`fix.${kind}`, { ...params, account: nameOf(its), model: fix.model ?? row.model }),
      run ? { on: (event) => run(row, fix, its, until, event) } : { href: hash(...PLACES[kind]) });
  });
}
