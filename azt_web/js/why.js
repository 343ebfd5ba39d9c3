// Why a request ended as it did, in a sentence, and what may help (console.md, appendix B).
import { send } from './api.js';
import { announce } from './dom.js';
import { at, bytes, duration, num } from './format.js';
import { known, t } from './i18n.js';
import { activate } from './palette.js';
import { go, hash } from './router.js';
import { accountOf, nameOf, store } from './store.js';
import * as ui from './ui.js';

const ABLE = ['ready', 'low', 'unknown'];
const WORDS = { until: at, d: duration, size: bytes, limit: bytes, n: num,
  reason: (value) => (known(`reason.${value}`) ? t(`reason.${value}`) : value) };

/** The account that is back first, while none can serve. */
function firstBack() {
  const waiting = store.get('accounts').filter((one) => one.statusParams?.until);
  if (store.get('accounts').some((one) => ABLE.includes(one.status))) return null;
  return waiting.sort((a, b) => a.statusParams.until - b.statusParams.until)[0] ?? null;
}

/** Its account, and the parameters of its sentence as words; what the row does not tell, the account may. */
function about({ why, accountId }) {
  const account = why.code === 'all_exhausted' ? firstBack() : accountOf(why.fixes?.[0]?.accountId ?? accountId);
  const spent = account?.quota?.windows?.find((one) => one.remainingPercent <= 0);
  const told = Object.entries(why.params ?? {}).filter(([, value]) => value !== '-');
  const found = { account: account?.id, until: account?.statusParams?.until, window: spent && ui.windowName(spent),
    plan: account?.plan, ...Object.fromEntries(told) };
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
  const able = store.get('accounts').filter((one) => !one.active && ABLE.includes(one.status));
  if (!able.length) return go(hash('accounts'));
  return ui.menu(anchor, able.map((one) => ({ label: nameOf(one), run: () => activate(one) })));
}

const modeOf = ({ endpoint = '' }) => (endpoint.includes('image') ? 'image' : endpoint.endsWith('responses') ? 'responses' : 'chat');
const copied = (text) => ui.copy(text).then((done) => done && announce(t('act.copied')));
/** Where a fix leads, or what it does: (its account, the row, the fix, until when, event). */
const PLACES = {
  open_account: (account) => ['accounts', [account.id]], open_accounts: () => ['accounts'], add_account: () => ['accounts', ['add']],
  login: (account) => ['accounts', ['add', 'browser'], { account: account?.id }], endpoint_notes: () => ['connect', ['generic']],
  test_network: () => ['settings', ['network'], { test: 1 }], open_proxy: () => ['settings', ['network']],
  raise_limit: () => ['settings', ['network']], open_keys: () => ['settings', ['sharing']], image_settings: () => ['settings', ['images']],
  diagnostics: () => ['settings', ['data']], use_model: (account, row, { model }) => ['playground', [], { model, mode: modeOf(row) }],
  send_again: (account, row) => ['playground', [], { model: row.model, mode: modeOf(row) }],
};
const DEEDS = {
  exclude_until: (account, row, fix, until) => exclude(account, until), use_account: (account) => activate(account),
  switch_account: (account, row, fix, until, event) => chooseAccount(event.currentTarget), sync_models: () => send('POST', '/models/refresh'),
  copy_model: (account, row, fix) => copied(fix.model ?? store.get('defaultModel')),
};
const NEEDS = { exclude_until: 'until', use_account: 'account', open_account: 'account' };

/** A button for each thing that may help; none for an account that is gone. */
export function fixButtons(row) {
  if (!row.why) return [];
  const { account: mainly, until, params } = about(row), { code, fixes = [] } = row.why;
  const first = code === 'all_exhausted' && mainly ? [{ kind: 'open_account' }] : [];
  return [...first, ...fixes].map((fix) => {
    const { kind, accountId } = fix, account = accountOf(accountId) ?? mainly, place = PLACES[kind], deed = DEEDS[kind];
    if (!(place || deed) || (NEEDS[kind] && !(account && { until, account }[NEEDS[kind]]))) return null;
    return ui.button(t(`fix.${kind}`, { ...params, account: nameOf(account), model: fix.model ?? row.model }),
      place ? { href: hash(...place(account, row, fix)) } : { on: (event) => deed(account, row, fix, until, event) });
  });
}
