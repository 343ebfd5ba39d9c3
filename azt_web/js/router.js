// The address: `#/page/part?query`. A page is mounted while its name stands there.
const bare = (value) => decodeURIComponent(value);
let pages = {}, shell = null, mounted = null, shown = { page: '', parts: [], query: {} };

export function hash(page, parts = [], query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== '');
  const path = [page, ...parts.map((part) => encodeURIComponent(part))].join('/');
  return `#/${path}${given.length ? `?${new URLSearchParams(given)}` : ''}`;
}

export function parse(address) {
  const [path, search] = address.replace(/^#\//, '').split('?');
  try {
    const [page, ...parts] = path.split('/').filter(Boolean).map(bare);
    return { page: page || 'overview', parts, query: Object.fromEntries(new URLSearchParams(search || '')) };
  } catch {
    return { page: 'unknown', parts: [], query: {} }; // a % that encodes nothing
  }
}

export const current = () => shown;
export const go = (to) => { location.hash = to; };

/** Change the query in place: no new entry in the history. */
export function setQuery(changes) {
  replace(hash(shown.page, shown.parts, { ...shown.query, ...changes }));
  update();
}

export function replace(to) {
  history.replaceState(history.state, '', to);
  shown = parse(to);
}

export const mountedPage = () => mounted;

function update() {
  mounted?.view.update?.(shown);
}

/** Take the page down and put it up again: another language, another person. */
export function remount() {
  unmount();
  show(false);
}

function unmount() {
  mounted?.view.unmount?.();
  mounted = null;
  shell.outlet.replaceChildren();
}

function show(moves) {
  shown = parse(location.hash);
  if (mounted?.name === shown.page) {
    update();
    shell.onroute(shown, false);
    return;
  }
  if (mounted) unmount();
  const page = pages[shown.page] || pages.unknown;
  const view = page.mount(shell.outlet, { route: shown });
  mounted = { name: shown.page, page, view };
  shell.onpage(page, view);
  shell.onroute(shown, moves);
  view.update?.(shown);
}

/** `how` = {outlet, onpage(page, view), onroute(route, moved)}; `table` = {name: page, unknown: page}. */
export function start(table, how) {
  [pages, shell] = [table, how];
  history.scrollRestoration = 'manual';
  let key = 0;
  const scrolls = {};
  const mark = () => { scrolls[history.state?.at ?? -1] = scrollY; };
  addEventListener('scroll', mark, { passive: true });
  const arrive = (moves) => {
    if (!/^#\/./.test(location.hash)) history.replaceState(null, '', '#/overview');
    const back = history.state?.at;
    if (back === undefined) history.replaceState({ at: key += 1 }, '');
    const top = scrolls[back] || 0, before = shown.page;
    show(moves);
    if (shown.page !== before) requestAnimationFrame(() => scrollTo(0, top));
  };
  addEventListener('hashchange', () => arrive(true));
  arrive(false);
}
