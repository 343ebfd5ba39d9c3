// What the page knows. One place; pages listen to slices of it.
import { mask } from './format.js';

const state = {
  session: null, gateway: {}, defaultModel: '', routing: { queue: [], skipped: [] }, accounts: [], removed: [],
  codex: {}, today: {}, recent: [], notices: [], jobs: [], models: {}, firstRun: {}, settings: {}, login: null,
  request: null, usage: null, connection: { state: 'connecting', retryAt: 0 } };
const KEPT = { recent: 20, jobs: 8, accounts: Infinity, notices: Infinity };
const listeners = Object.fromEntries(Object.keys(state).map((slice) => [slice, new Set()]));
let changes = new Map();

export const get = (slice) => state[slice];
/** `fn(value, changes)` at most once a frame for each of `slices`; `changes`: all that was set since, oldest first. */
export function on(slices, fn) {
  const heard = [slices].flat().map((slice) => listeners[slice].add(fn));
  return () => heard.forEach((one) => one.delete(fn));
}
export function set(slice, value, change = value) {
  state[slice] = value;
  if (!changes.size) (document.hidden ? setTimeout : requestAnimationFrame)(tell); // a hidden tab has no frames
  changes.set(slice, [...(changes.get(slice) ?? []), change]);
}
function tell() {
  const told = changes; changes = new Map();
  for (const [slice, list] of told) for (const fn of [...listeners[slice]]) fn(state[slice], list);
}
export const store = { get, on, set };
/** All of `GET /state`. */
export const load = (all) => Object.keys(all).forEach((slice) => slice in state && set(slice, all[slice]));

const merge = (slice, told) => set(slice, { ...state[slice], ...told }, told);
/** In its place where it is known, else `added`. */
const swap = (list, item, added) => (list.some((one) => one.id === item.id)
  ? list.map((one) => (one.id === item.id ? item : one)) : added);
const upsert = (slice, item) => set(slice, swap(state[slice], item, [...state[slice], item].slice(-KEPT[slice])), item);
function sawRequest(type, row) {
  set('request', { type, row });
  set('recent', swap(state.recent, row, [row, ...state.recent].slice(0, KEPT.recent)), row);
}
/** How each event of the gateway changes what is known. */
export const reducers = {
  account: (account) => upsert('accounts', account), job: (job) => upsert('jobs', job),
  'account.removed': ({ ids, undo }) => {
    set('accounts', state.accounts.filter((one) => !ids.includes(one.id)));
    if (undo) set('removed', [...state.removed, undo]);
  },
  routing: (told) => {
    merge('routing', told);
    set('accounts', state.accounts.map((one) => ({ ...one, active: one.id === state.routing.activeId })));
  },
  'request.started': (row) => sawRequest('started', row), 'request.finished': (row) => sawRequest('finished', row),
  usage: (told) => { set('usage', told); set('today', told.today); }, settings: (told) => set('settings', told),
  gateway: (told) => merge('gateway', told), models: (told) => merge('models', told),
  codex: (told) => merge('codex', { ...told, authAccountId: told.auth?.accountId }),
  login: (flow) => { if (flow.status === 'done') upsert('accounts', flow.account); set('login', flow); },
  notice: (notice) => upsert('notices', notice),
  'notice.cleared': ({ id }) => set('notices', state.notices.filter((one) => one.id !== id)),
};

export const accountOf = (id) => state.accounts.find((one) => one.id === id) ?? null;
export const nameOf = (account) => (account ? account.label || mask(account.email) || account.id : '');
/** {all, ready, low, ...}: how many accounts are in each state. */
export const statusCounts = () => state.accounts.reduce((counts, { status }) => (
  { ...counts, [status]: (counts[status] ?? 0) + 1 }), { all: state.accounts.length });
/** Is this page at the computer that runs azt? Elsewhere nothing is exported and no file of Codex is touched. */
export const isLocal = () => state.session?.scope !== 'lan';
