// The one stream of events: kept open, taken up again after a break, closed in a hidden tab.
import * as api from './api.js';
import { setGatewayZone, setNow } from './format.js';
import { load, reducers, set } from './store.js';

const PAUSES_S = [1, 2, 4, 8], HIDDEN_MS = 30000;
let lastId = 0, pid = 0, version = '', leaving = '', failures = 0, ending = null, timer = 0, hidden = 0;
/** Everything at once, and where the events go on from. */
export async function refetch() {
  const state = await api.get('/state');
  setNow(state.now); setGatewayZone(state.gateway.timeZone);
  lastId = state.eventId; pid = state.gateway.pid; load(state);
}
function onevent({ event, data, id }) {
  const told = JSON.parse(data), isOther = event === 'hello' && told.pid !== pid; // its numbers start anew
  if (id) lastId = Number(id);
  if (event === 'resync' || isOther) refetch().catch(() => {});
  if (event === 'hello') {
    setNow(told.now);
    if (version && told.version !== version) api.hooks.otherVersion();
    [leaving, lastId, version] = ['', lastId || told.eventId, told.version];
  } else if (event === 'bye' && told.reason === 'session_ended') api.hooks.signIn();
  else reducers[event]?.(told);
  if (event === 'gateway' && told.status === 'restarting') leaving = told.to;
}

async function run() {
  const { signal } = ending = new AbortController();
  const onhead = () => { failures = 0; set('connection', { state: 'live', retryAt: 0 }); };
  try {
    if (failures >= 3) await refetch(); // at least that, if events cannot be had
    await api.watch(lastId, { signal, onevent, onhead });
  } catch (error) { if ([401, 403].includes(error.status)) return; }
  if (!signal.aborted) again();
}
/** After a pause. At another port this page can ask nothing: it only goes there, when it should be up. */
function again() {
  const pause = (PAUSES_S[failures] ?? 15) * (900 + Math.random() * 200), there = new URL(location);
  there.port = new URL(`http://${leaving || location.host}`).port;
  const to = there.port !== location.port && there.href;
  set('connection', { state: leaving ? 'restarting' : 'offline', retryAt: Date.now() + pause, to });
  failures += 1;
  if (to && failures > 3) location.assign(to); else timer = setTimeout(run, pause);
}
function stop() { clearTimeout(timer); ending?.abort(); ending = null; }
/** Open the stream: at the start, as another person, or because someone does not want to wait. */
export const retryNow = () => { stop(); run(); };
document.addEventListener('visibilitychange', () => {
  clearTimeout(hidden);
  if (document.hidden) hidden = setTimeout(stop, HIDDEN_MS); else if (!ending) run();
});
