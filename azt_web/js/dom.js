// Nodes out of text. Nothing here, or anywhere, takes HTML.
import { ICONS } from './icons.js';

/** Where a link may lead: the provider's pages, and this computer (the sign-in of the demo and of tests). */
const PLACES = { 'https:': ['auth.openai.com', 'chatgpt.com'], 'http:': ['127.0.0.1', 'localhost', location.hostname] };
/** Set as properties, because the attribute is only where they start. */
const PROPERTIES = ['checked', 'disabled', 'hidden', 'open', 'value'], SVG = 'http://www.w3.org/2000/svg';
function safeHref(url) {
  const { protocol, hostname } = new URL(url, 'http://localhost'); // where `#...` and `/...` are
  if (!PLACES[protocol]?.includes(hostname)) throw new Error('a link to a place that is not on the list');
  return url;
}
const nodes = (children) => children.flat(Infinity).filter((child) => child === 0 || (child && child !== true));
function build(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (name === 'on') for (const [type, run] of Object.entries(value)) node.addEventListener(type, run);
    else if (name === 'vars') for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    else if (PROPERTIES.includes(name)) node[name] = value ?? (name === 'value' ? '' : false);
    else if (value === false || value === null || value === undefined) continue;
    else if (name === 'style' || name.startsWith('on')) throw new Error(`${name} is not for text`);
    else node.setAttribute(name, value === true ? '' : name === 'href' ? safeHref(value) : String(value));
  }
  node.append(...nodes(children));
  return node;
}

/** An element: `h('a', {href: '#/log', class: 'x', on: {click}}, 'text', node, [more])`. */
export const h = (tag, props, ...children) => build(document.createElement(tag), props, children);
export const svg = (tag, props, ...children) => build(document.createElementNS(SVG, tag), props, children);
export const icon = (name) => svg('svg', { viewBox: '0 0 16 16', class: `icon i-${name}`, 'aria-hidden': 'true' },
  svg('path', { d: ICONS[name] }));
export const text = (node, value) => { if (node.textContent !== String(value)) node.textContent = value; };
export const fill = (node, ...children) => { node.replaceChildren(...nodes(children)); return node; };

const KEPT = new WeakMap();
/** Children of `parent` follow `items`: survivors are moved, never made anew; `patch(node, item)` fills each. */
export function keyed(parent, items, keyOf, make, patch) {
  const before = KEPT.get(parent) ?? new Map(), after = new Map();
  for (const item of items) {
    const key = keyOf(item), node = before.get(key) ?? make(item);
    patch?.(node, item); after.set(key, node); before.delete(key);
  }
  before.forEach((node) => node.remove());
  let at = parent.firstChild;
  for (const node of after.values()) if (node === at) at = at.nextSibling; else parent.insertBefore(node, at);
  KEPT.set(parent, after);
}
/** Said by a screen reader, and seen by no one. */
export function announce(message) {
  const region = document.getElementById('said'); region.textContent = '';
  requestAnimationFrame(() => { region.textContent = message; });
}
