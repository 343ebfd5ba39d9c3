// The only module that calls the gateway.
import { search } from './router.js';

const BASE = '/_gateway/admin', PATIENCE_MS = 60000, JSON_TYPE = 'application/json';
/** Set by main.js: proof() asks for the admin token, true when it was given; signIn() shows where; otherVersion(). */
export const hooks = {};
export class ApiError extends Error {
  /** `error` as the gateway sends it; `offline`: there was no answer at all. */
  constructor(status, { code, params = {}, message, requestId = '' } = {}) {
    super(message || code || `HTTP ${status}`);
    Object.assign(this, { status, code: code || (status ? 'unknown' : 'offline'), params, requestId });
  }
}

/** One call; its answer is good. A missing proof is asked for, and the call made once more. */
async function call(method, path, how = {}, isAgain = false) {
  const { body, query, signal, headers, patient, keepalive } = how, isForm = body instanceof FormData;
  const own = { ...method !== 'GET' && { 'X-AZT-Admin': '1' }, ...body && !isForm && { 'Content-Type': JSON_TYPE } };
  const signals = [signal, !patient && !isForm && AbortSignal.timeout(PATIENCE_MS)].filter(Boolean);
  const init = { method, headers: { ...own, ...headers }, body: isForm ? body : JSON.stringify(body), keepalive,
    cache: 'no-store', signal: AbortSignal.any(signals) };
  const answer = await fetch(BASE + path + search(query), init).catch((error) => {
    if (signal?.aborted) throw error;
    throw new ApiError(0, { code: error.name === 'TimeoutError' ? 'no_answer' : 'offline' });
  });
  if (answer.ok) return answer;
  const { error: said } = await answer.json().catch(() => ({}));
  const error = new ApiError(answer.status, { requestId: answer.headers.get('x-request-id'), ...said });
  if (error.code === 'not_signed_in') hooks.signIn();
  if (error.code !== 'proof_needed' || isAgain || !await hooks.proof()) throw error;
  return call(method, path, how, true);
}

const parsed = async (answer) => (answer.status === 204 ? null : answer.json());
export const get = async (path, query) => parsed(await call('GET', path, { query }));
/** A text beside the pages. */
export const file = async (name) => (await fetch(name)).text();
/** `body`: an object, or a FormData. */
export const send = async (method, path, body = {}, how = {}) => parsed(await call(method, path, { body, ...how }));
/** The answer becomes a file in the downloads; nothing of it is shown. */
export async function download(path, body, method = 'POST') {
  const answer = await call(method, path, method === 'GET' ? { query: body } : { body });
  const [, name] = /filename="([\w.-]{1,80})"/.exec(answer.headers.get('content-disposition')) ?? [];
  saveBlob(await answer.blob(), name ?? 'azt-download');
}
export function saveBlob(blob, name) {
  const href = URL.createObjectURL(blob);
  Object.assign(document.createElement('a'), { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
}

/** Server-sent events out of text that comes in any pieces: `feed(text)` calls `onevent({event, data, id})`. */
export function sseReader(onevent) {
  let rest = '', data = [];
  const last = { event: '', id: '' }, take = (line) => {
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (name === 'data') data.push(value); else if (name in last) last[name] = value;
    if (line) return;
    if (data.length) onevent({ event: last.event || 'message', data: data.join('\n'), id: last.id });
    last.event = ''; data = [];
  };
  return (piece) => {
    const lines = (rest + piece).split(/\r\n|\n|\r(?!$)/); // a \r at the end may be the first half of \r\n
    rest = lines.pop(); lines.forEach(take);
  };
}
/** A call whose answer may be a stream: `onhead({headers})`, then `onevent({event, data, id})`; else {json}. */
export async function stream(path, body, { signal, onhead, onevent, method = 'POST', headers: own }) {
  const answer = await call(method, path, { body, signal, headers: own, patient: true }), { headers } = answer;
  onhead?.({ headers });
  if (!headers.get('content-type')?.startsWith('text/event-stream')) return { json: await answer.json() };
  const feed = sseReader(onevent), reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try { for (let piece; !(piece = await reader.read()).done;) feed(piece.value); } catch (error) {
    throw error.name === 'AbortError' ? error : new ApiError(0, { code: 'stream_cut' });
  }
  feed('\n');
  return {};
}
/** The gateway's own events, from the one after `lastId`; ends when the stream does. */
export const watch = (lastId, how) => stream('/events', undefined, {
  ...how, method: 'GET', headers: lastId ? { 'Last-Event-ID': String(lastId) } : {} });
