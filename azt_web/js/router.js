// The address: `#/page/part?query`. A page is mounted while its name stands there.
let pages = {}, shell = null, mounted = null, shown = { page: '', parts: [], query: {} };

/** `?a=b` of what has a value; '' of nothing. */
export function search(query) {
  const given = new URLSearchParams(Object.entries(query ?? {}).filter(([, value]) => (value ?? '') !== ''));
  return given.size ? `?${given}` : '';
}
export const hash = (page, parts = [], query = {}) => (
  `#/${[page, ...parts.map(encodeURIComponent)].join('/')}${search(query)}`);
export function parse(address) {
  const [path, query = ''] = address.replace(/^#\//, '').split('?');
  try {
    const [page = 'overview', ...parts] = path.split('/').filter(Boolean).map(decodeURIComponent);
    return { page, parts, query: Object.fromEntries(new URLSearchParams(query)) };
  } catch { return { page: 'unknown', parts: [], query: {} }; } // a % that encodes nothing
}

export const current = () => shown;
export const go = (to) => { location.hash = to; };
export const replace = (to) => { history.replaceState(history.state, '', to); shown = parse(to); };
/** Change the query in place: no new entry in the history. */
export function setQuery(changes) {
  replace(hash(shown.page, shown.parts, { ...shown.query, ...changes }));
  mounted?.view.update?.(shown);
}

/** Show the page of the address; `isAnew`: even if it is shown already (another language, another person). */
function show(moves, isAnew) {
  shown = parse(location.hash);
  const isOther = isAnew || mounted?.name !== shown.page, page = pages[shown.page] ?? pages.unknown;
  if (isOther) {
    mounted?.view.unmount?.(); mounted = null;
    shell.outlet.replaceChildren();
    mounted = { name: shown.page, view: page.mount(shell.outlet, { route: shown }) };
    shell.onpage(page, mounted.view);
  }
  shell.onroute(shown, isOther && moves);
  mounted.view.update?.(shown);
}
export const remount = () => show(false, true);
/** `how` = {outlet, onpage(page, view), onroute(route, moved)}; `table` = {name: page, unknown: page}. */
export function start(table, how) {
  const scrolls = {};
  let key = 0;
  [pages, shell, history.scrollRestoration] = [table, how, 'manual'];
  addEventListener('scroll', () => { scrolls[history.state?.at ?? -1] = scrollY; }, { passive: true });
  const arrive = (moves) => {
    if (!/^#\/./.test(location.hash)) history.replaceState(null, '', '#/overview');
    const back = history.state?.at, top = scrolls[back] ?? 0, before = shown.page;
    if (back === undefined) history.replaceState({ at: key += 1 }, '');
    show(moves);
    if (shown.page !== before) requestAnimationFrame(() => scrollTo(0, top));
  };
  addEventListener('hashchange', () => arrive(true)); arrive(false);
}
