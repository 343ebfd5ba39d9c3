// Why a request ended as it did, in a sentence, and what may help (console.md, appendix B).
import { send } from './api.js';
import { modeOf } from './calls.js';
import { at, bytes, duration, num } from './format.js';
import { known, t } from './i18n.js';
import { activate } from './palette.js';
import { go, hash } from './router.js';
import { accountOf, nameOf, store } from './store.js';
import * as ui from './ui.js';

const WORDS = { until: at, d: duration, size: bytes, limit: bytes, n: num,
  reason: (code) => (known(`reason.${code}`) ? t(`reason.${code}`) : code) };
const isAble = ({ status }) => ['ready', 'low', 'unknown'].includes(status);
const backAt = (account) => account?.statusParams?.until;
/** The account that is back first, while none can serve. */
const firstBack = (all) => (all.some(isAble) ? null : all.filter(backAt).sort((a, b) => backAt(a) - backAt(b))[0]);

/** Its account, and the parameters of its sentence as words; what the row does not tell, the account may. */
function about({ why, accountId }) {
  const account = why.code === 'all_exhausted' ? firstBack(store.get('accounts'))
    : accountOf(why.fixes[0]?.accountId ?? accountId);
  const { id, plan, quota } = account ?? {}, spent = quota?.windows.find((one) => one.remainingPercent <= 0);
  const found = { account: id, plan, until: backAt(account), window: spent && ui.windowName(spent), ...why.params };
  const worded = ([name, value]) => [name, WORDS[name]?.(value) ?? (nameOf(accountOf(value)) || value)];
  const params = Object.fromEntries(Object.entries(found).filter(([, value]) => value).map(worded));
  return { account, until: found.until, params };
}
/** The sentence; a shorter one where a parameter is not known, else the gateway's own. */
export function verdict(row) {
  if (!row.why) return t(row.result === 'running' ? 'why.running' : 'why.fine', { d: duration(row.durationMs) });
  const { code, text = code } = row.why, { params } = about(row);
  const keys = [`why.${code}`, `why.${code}.until`, `why.${code}.bare`].filter(known);
  return keys.map((key) => t(key, params)).find((one) => !/\{\w+\}/.test(one)) ?? text;
}

function exclude(account, until) {
  const change = (excluded, excludedUntil) => send('PATCH', `/accounts/${account.id}`, { excluded, excludedUntil });
  const action = { label: t('act.undo'), run: () => change(false, null) }, name = nameOf(account);
  return change(true, until).then(() => ui.toast(t('log.excluded', { name, t: at(until) }), { action }));
}
function chooseAccount({ currentTarget }) {
  const able = store.get('accounts').filter((one) => !one.active && isAble(one));
  const items = able.map((one) => ({ label: nameOf(one), run: () => activate(one) }));
  return items.length ? ui.menu(currentTarget, items) : go('#/accounts');
}
const copied = (isDone) => isDone && ui.toast(t('act.copied'));
const play = ({ endpoint }, model) => ({ href: hash('playground', [], { model, mode: modeOf(endpoint) }) });
/** Where each leads, */
const PLACES = { add_account: 'accounts/add', diagnostics: 'settings/data', endpoint_notes: 'connect/generic',
  image_settings: 'settings/images', open_accounts: 'accounts', open_keys: 'settings/sharing',
  open_proxy: 'settings/network', raise_limit: 'settings/network', test_network: 'settings/network?test=1' };
/** or what it does; nothing where its account is gone. */
const DEEDS = {
  copy_model: ({ model = store.get('defaultModel') }) => ({ on: () => ui.copy(model).then(copied) }),
  exclude_until: ({ account, until }) => account && until && { on: () => exclude(account, until) },
  login: ({ account }) => ({ href: hash('accounts', ['add', 'browser'], { account: account?.id }) }),
  open_account: ({ account }) => account && { href: hash('accounts', [account.id]) },
  send_again: ({ row }) => play(row, row.model), use_model: ({ row, model }) => play(row, model),
  switch_account: () => ({ on: chooseAccount }), sync_models: () => ({ on: () => send('POST', '/models/refresh') }),
};

/** A button for each thing that may help. */
export function fixButtons(row) {
  if (!row.why) return [];
  const { account: mainly, until, params } = about(row), { code, fixes } = row.why;
  const first = code === 'all_exhausted' && mainly ? [{ kind: 'open_account' }] : [];
  return [...first, ...fixes].map(({ kind, accountId, model }) => {
    const account = accountOf(accountId) ?? mainly, place = PLACES[kind] && { href: `#/${PLACES[kind]}` };
    const how = place ?? DEEDS[kind]?.({ account, until, row, model });
    return how && ui.button(t(`fix.${kind}`, { ...params, account: nameOf(account), model: model ?? row.model }), how);
  });
}
