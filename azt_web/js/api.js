// The only module that calls the gateway.
const BASE = '/_gateway/admin';
const PATIENCE_MS = 60000;

/** Set by the sign-in page: `proof()` asks for the admin token, true when it was given. */
export const hooks = { proof: async () => false, signIn: () => {} };

export class ApiError extends Error {
  /** `error` as the gateway sends it; `offline`: there was no answer at all. */
  constructor(status, error = {}) {
    super(error.message || error.code || `HTTP ${status}`);
    this.status = status;
    this.code = error.code || (status ? 'unknown' : 'offline');
    this.params = error.params || {};
    this.requestId = error.requestId || '';
  }
}

function address(path, query) {
  const given = new URLSearchParams(Object.entries(query || {}).filter(([, value]) => (value ?? '') !== ''));
  return `${BASE}${path}${given.size ? '?' : ''}${given}`;
}

async function refusal(answer) {
  const said = await answer.json().catch(() => ({}));
  const id = answer.headers.get('x-request-id');
  return new ApiError(answer.status, { requestId: id, ...(said.error || {}) });
}

/** One call; its answer is good. A missing proof is asked for, and the call made once more. */
async function call(method, path, { body, query, signal, headers = {}, patient, keepalive } = {}) {
  const own = method === 'GET' ? {} : { 'X-AZT-Admin': '1' };
  const isForm = body instanceof FormData;
  if (body !== undefined && !isForm) own['Content-Type'] = 'application/json';
  const signals = [signal, patient ? null : AbortSignal.timeout(PATIENCE_MS)].filter(Boolean);
  const init = {
    method, headers: { ...own, ...headers }, body: body === undefined || isForm ? body : JSON.stringify(body),
    signal: signals.length ? AbortSignal.any(signals) : undefined, cache: 'no-store', keepalive,
  };
  for (let again = false; ; again = true) {
    let answer;
    try {
      answer = await fetch(address(path, query), init);
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError(0, { code: error.name === 'TimeoutError' ? 'no_answer' : 'offline' });
    }
    if (answer.ok) return answer;
    const error = await refusal(answer);
    if (error.code === 'not_signed_in') hooks.signIn();
    if (error.code !== 'proof_needed' || again || !(await hooks.proof())) throw error;
  }
}

const parsed = async (answer) => (answer.status === 204 ? null : answer.json());

export const get = async (path, query, how = {}) => parsed(await call('GET', path, { query, ...how }));
export const send = async (method, path, body = {}, how = {}) => parsed(await call(method, path, { body, ...how }));
export const upload = async (path, form, query) => (
  parsed(await call('POST', path, { body: form, query, patient: true })));

/** The answer becomes a file in the downloads; nothing of it is shown. */
export async function download(path, body, method = 'POST') {
  const answer = await call(method, path, method === 'GET' ? { query: body } : { body });
  const named = /filename="([\w.-]{1,80})"/.exec(answer.headers.get('content-disposition') || '');
  saveBlob(await answer.blob(), named ? named[1] : 'azt-download');
}

export function saveBlob(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = document.createElement('a');
  link.setAttribute('href', url);
  link.setAttribute('download', name);
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Server-sent events out of text that comes in any pieces: `feed(text)` calls `onevent({event, data, id})`. */
export function sseReader(onevent) {
  let rest = '', event = '', data = [], id = '';
  const line = (one) => {
    if (one === '') {
      if (data.length) onevent({ event: event || 'message', data: data.join('\n'), id });
      event = '';
      data = [];
      return;
    }
    const at = one.indexOf(':'), name = at < 0 ? one : one.slice(0, at);
    const value = at < 0 ? '' : one.slice(at + 1).replace(/^ /, '');
    if (name === 'data') data.push(value);
    else if (name === 'event') event = value;
    else if (name === 'id') id = value;
  };
  return (piece) => {
    rest += piece;
    // A lone \r at the end may be the first half of \r\n: it waits for the next piece.
    for (let end; (end = /\r\n|\n|\r(?!$)/.exec(rest)); rest = rest.slice(end.index + end[0].length)) {
      line(rest.slice(0, end.index));
    }
  };
}

async function readEvents(answer, onevent) {
  const feed = sseReader(onevent), decoder = new TextDecoder(), reader = answer.body.getReader();
  try {
    for (let piece; !(piece = await reader.read()).done;) feed(decoder.decode(piece.value, { stream: true }));
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(0, { code: 'stream_cut' });
  }
  feed('\n');
}

/** A call whose answer may be a stream: `onhead({status, headers})`, then `onevent({event, data})`; else {json}. */
export async function stream(path, body, { signal, onhead, onevent } = {}) {
  const answer = await call('POST', path, { body, signal, patient: true });
  onhead?.({ status: answer.status, headers: answer.headers });
  if (!(answer.headers.get('content-type') || '').startsWith('text/event-stream')) {
    return { json: await answer.json(), headers: answer.headers };
  }
  await readEvents(answer, onevent || (() => {}));
  return { headers: answer.headers };
}

/** The gateway's own events, from the one after `lastId`; ends when the stream does. */
export async function watch(lastId, { signal, onopen, onevent }) {
  const headers = lastId ? { 'Last-Event-ID': String(lastId) } : {};
  const answer = await call('GET', '/events', { signal, headers, patient: true });
  onopen();
  await readEvents(answer, onevent);
}
