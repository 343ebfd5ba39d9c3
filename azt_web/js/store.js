// What the page knows. One place; pages listen to slices of it.
import { mask } from './format.js';

const state = {
  session: null, gateway: {}, defaultModel: '', routing: { queue: [], skipped: [] }, accounts: [], removed: [],
  codex: {}, today: {}, recent: [], notices: [], jobs: [], models: {}, firstRun: {}, settings: {}, login: null,
  request: null, usage: null, connection: { state: 'connecting', retryAt: 0 },
};
const RECENT_KEPT = 20, JOBS_KEPT = 8;
const listeners = new Map();
let changes = new Map();

export const get = (slice) => state[slice];

/** `fn(value, changes)` at most once a frame; `changes` is all that was set since the last call, oldest first. */
export function on(slice, fn) {
  if (!listeners.has(slice)) listeners.set(slice, new Set());
  listeners.get(slice).add(fn);
  return () => listeners.get(slice).delete(fn);
}

export function set(slice, value, change = value) {
  state[slice] = value;
  // A hidden tab has no frames.
  if (!changes.size) (document.hidden ? setTimeout : requestAnimationFrame)(tell);
  changes.set(slice, [...(changes.get(slice) || []), change]);
}

function tell() {
  const told = changes;
  changes = new Map();
  for (const [slice, list] of told) for (const fn of [...(listeners.get(slice) || [])]) fn(state[slice], list);
}

export const store = { get, on, set };

/** All of `GET /state`. */
export function load(all) {
  for (const slice of Object.keys(state)) if (slice in all) set(slice, all[slice]);
}

const without = (list, id) => list.filter((one) => one.id !== id);

function upsert(slice, item, most = Infinity) {
  const list = state[slice], known = list.some((one) => one.id === item.id);
  set(slice, (known ? list.map((one) => (one.id === item.id ? item : one)) : [...list, item]).slice(-most), item);
}

function sawRequest(type, row) {
  set('request', { type, row });
  const recent = state.recent.some((one) => one.id === row.id)
    ? state.recent.map((one) => (one.id === row.id ? row : one)) : [row, ...state.recent].slice(0, RECENT_KEPT);
  set('recent', recent, row);
}

/** How each event of the gateway changes what is known. */
export const reducers = {
  account: (account) => upsert('accounts', account),
  'account.removed': ({ ids, undo }) => {
    set('accounts', state.accounts.filter((one) => !ids.includes(one.id)));
    if (undo) set('removed', [...state.removed, undo]);
  },
  routing: (routing) => {
    set('routing', { ...state.routing, ...routing });
    set('accounts', state.accounts.map((one) => ({ ...one, active: one.id === state.routing.activeId })));
  },
  'request.started': (row) => sawRequest('started', row),
  'request.finished': (row) => sawRequest('finished', row),
  usage: (data) => { set('usage', data); if (data.today) set('today', data.today); },
  gateway: (data) => set('gateway', { ...state.gateway, ...data }),
  job: (job) => upsert('jobs', job, JOBS_KEPT),
  login: (flow) => {
    if (flow.status === 'done') upsert('accounts', flow.account);
    set('login', flow);
  },
  codex: (codex) => set('codex', { ...state.codex, ...codex, authAccountId: codex.auth?.accountId }),
  settings: (settings) => set('settings', settings),
  models: (models) => set('models', { ...state.models, ...models }),
  notice: (notice) => upsert('notices', notice),
  'notice.cleared': ({ id }) => set('notices', without(state.notices, id)),
};

export const accountOf = (id) => state.accounts.find((one) => one.id === id) || null;
export const nameOf = (account) => (account ? account.label || mask(account.email) || account.id : '');

/** {all, ready, low, ...}: how many accounts are in each state. */
export function statusCounts() {
  const counts = { all: state.accounts.length };
  for (const { status } of state.accounts) counts[status] = (counts[status] || 0) + 1;
  return counts;
}

/** May this browser `write`, or (with the proof that is asked for then) `export` or change `codex` files? */
export const canDo = (what) => (what === 'write' ? state.session?.can?.write !== false : isLocal());
export const isLocal = () => state.session?.scope !== 'lan';
