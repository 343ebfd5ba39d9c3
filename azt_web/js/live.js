// The one stream of events: kept open, taken up again after a break, closed in a hidden tab.
import * as api from './api.js';
import { setNow } from './format.js';
import { load, reducers, set } from './store.js';

const PAUSES_S = [1, 2, 4, 8, 15];
const HIDDEN_MS = 30000;
let lastId = 0, pid = 0, version = '', leaving = '', onversion = () => {};
let failures = 0, ending = null, timer = 0, hidden = 0;

/** Everything at once, and where the events go on from. */
export async function refetch() {
  const state = await api.get('/state');
  setNow(state.now);
  lastId = state.eventId || 0;
  pid = state.gateway.pid;
  load(state);
}

function take({ event, data, id }) {
  if (id) lastId = Number(id);
  const value = JSON.parse(data);
  if (event === 'hello') greet(value);
  else if (event === 'resync') refetch().catch(() => {});
  else if (event === 'bye' && value.reason === 'session_ended') api.hooks.signIn();
  else reducers[event]?.(value);
  if (event === 'gateway' && value.status === 'restarting') leaving = value.to || location.host;
}

function greet({ now, pid: process, version: told, eventId }) {
  setNow(now);
  leaving = '';
  if (process !== pid) refetch().catch(() => {}); // another process: its numbers start anew
  if (!lastId) lastId = eventId || 0;
  if (version && told !== version) onversion(told);
  version = told;
}

async function run() {
  ending = new AbortController();
  const mine = ending;
  try {
    if (failures >= 3) await refetch(); // at least that, if events cannot be had
    await api.watch(lastId, {
      signal: mine.signal, onevent: take,
      onopen: () => { failures = 0; set('connection', { state: 'live', retryAt: 0 }); },
    });
  } catch (error) {
    if (error.status === 401 || error.status === 403) return;
  }
  if (mine.signal.aborted) return;
  again();
}

function again() {
  const pause = PAUSES_S[Math.min(failures, PAUSES_S.length - 1)] * 1000 * (failures ? 0.9 + Math.random() * 0.2 : 1);
  failures += 1;
  set('connection', { state: leaving ? 'restarting' : 'offline', retryAt: Date.now() + pause });
  const port = leaving.split(':').at(-1);
  // It comes back at another port: this page can ask nothing there, only go there when it should be up.
  if (failures > 3 && leaving && port !== location.port) location.port = port;
  else timer = setTimeout(run, pause);
}

/** Open the stream: at the start, as another person, or because someone does not want to wait. */
export function retryNow() {
  clearTimeout(timer);
  ending?.abort();
  run();
}

function stop() {
  clearTimeout(timer);
  ending?.abort();
  ending = null;
}

/** Once: how events are followed from now on; `told(version)` when another version answers. */
export function follow(told) {
  onversion = told;
  document.addEventListener('visibilitychange', () => {
    clearTimeout(hidden);
    if (document.hidden) hidden = setTimeout(stop, HIDDEN_MS);
    else if (!ending) run();
  });
}
