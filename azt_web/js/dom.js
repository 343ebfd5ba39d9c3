// Nodes out of text. Nothing here, or anywhere, takes HTML.
import { ICONS } from './icons.js';

const SVG = 'http://www.w3.org/2000/svg';
/** Where a link may lead: the provider's pages, and this computer (the sign-in of the demo and of tests). */
const HOSTS = ['auth.openai.com', 'chatgpt.com'];
const OWN_HOSTS = ['127.0.0.1', 'localhost'];
/** Set as properties, because the attribute is only where they start. */
const PROPERTIES = ['checked', 'disabled', 'hidden', 'indeterminate', 'open', 'selected', 'value'];

export function safeHref(url) {
  if (/^(#|\/(?!\/))/.test(url)) return url;
  const { protocol, hostname } = new URL(url);
  const fits = protocol === 'https:' ? HOSTS : protocol === 'http:' || protocol === 'blob:' ? OWN_HOSTS : [];
  if (!fits.includes(hostname)) throw new Error('a link to a place that is not on the list');
  return url;
}

function apply(node, props) {
  for (const [name, value] of Object.entries(props)) {
    if (name === 'on') for (const [type, run] of Object.entries(value)) node.addEventListener(type, run);
    else if (name === 'vars') for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    else if (PROPERTIES.includes(name)) node[name] = value ?? (name === 'value' ? '' : false);
    else if (value === false || value === null || value === undefined) continue;
    else if (name === 'style' || name.startsWith('on')) throw new Error(`${name} is not for text`);
    else node.setAttribute(name, value === true ? '' : name === 'href' ? safeHref(value) : String(value));
  }
}

const isProps = (one) => one !== null && typeof one === 'object' && !(one instanceof Node) && !Array.isArray(one);

function build(node, props, children) {
  if (isProps(props)) apply(node, props);
  else children.unshift(props);
  add(node, children);
  return node;
}

function add(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false && child !== true && child !== '') {
      node.append(child instanceof Node ? child : String(child));
    }
  }
}

/** An element: `h('a', {href: '#/log', class: 'x', on: {click}}, 'text', node, [more])`. */
export const h = (tag, props, ...children) => build(document.createElement(tag), props, children);
export const svg = (tag, props, ...children) => build(document.createElementNS(SVG, tag), props, children);

export function icon(name) {
  return svg('svg', { viewBox: '0 0 16 16', class: `icon i-${name}`, 'aria-hidden': 'true' },
    svg('path', { d: ICONS[name] || ICONS.dot }));
}

export function text(node, value) {
  if (node.textContent !== String(value)) node.textContent = value;
}

export function fill(node, ...children) {
  node.replaceChildren();
  add(node, children);
  return node;
}

const KEPT = new WeakMap();

/** Children of `parent` follow `items`: survivors are moved and patched, never made anew. */
export function keyed(parent, items, keyOf, make, patch) {
  const before = KEPT.get(parent) || new Map(), after = new Map();
  for (const item of items) {
    const key = keyOf(item), known = before.get(key);
    const node = known || make(item);
    if (known && patch) patch(known, item);
    after.set(key, node);
    before.delete(key);
  }
  for (const node of before.values()) node.remove();
  let at = parent.firstChild;
  for (const node of after.values()) {
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
  KEPT.set(parent, after);
}

/** Said by a screen reader, and seen by no one. */
export function announce(message, urgent = false) {
  const region = document.getElementById(urgent ? 'alert' : 'said');
  region.textContent = '';
  requestAnimationFrame(() => { region.textContent = message; });
}
