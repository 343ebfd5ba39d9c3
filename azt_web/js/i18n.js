// Two languages, and what this browser remembers of the person's choices.
import { STRINGS } from './strings.js';

const LANGUAGES = ['en', 'zh-CN'];
const listeners = new Set();

/** Kept in this browser: language, theme, time zone, views. Never a secret, a name or a text. */
export function pref(name, fallback = null) {
  try {
    return localStorage.getItem(`azt.${name}`) ?? fallback;
  } catch {
    return fallback;
  }
}

export function setPref(name, value) {
  try {
    if (value === null) localStorage.removeItem(`azt.${name}`);
    else localStorage.setItem(`azt.${name}`, value);
  } catch { /* a browser that keeps nothing forgets it with the page */ }
}

const wished = [pref('lang'), ...(navigator.languages || [])].filter(Boolean);
const fits = wished.map((one) => (/^zh/i.test(one) ? 'zh-CN' : /^en/i.test(one) ? 'en' : '')).find(Boolean);
let language = fits || 'en';
document.documentElement.lang = language;

export const lang = () => language;

export function setLang(wanted) {
  language = LANGUAGES.includes(wanted) ? wanted : 'en';
  setPref('lang', language);
  document.documentElement.lang = language;
  for (const fn of listeners) fn();
}

export const onLang = (fn) => listeners.add(fn);

export const known = (key) => key in STRINGS;

/** The sentence of a key, with `{name}` replaced by `params.name`. */
export function t(key, params = {}) {
  const sentence = STRINGS[key]?.[LANGUAGES.indexOf(language)] ?? key;
  return sentence.replace(/\{(\w+)\}/g, (whole, name) => params[name] ?? whole);
}

/** `key.one` or `key.other`, as the language counts; `{n}` is the number. */
export function plural(key, n, params = {}) {
  const form = new Intl.PluralRules(language).select(n) === 'one' ? 'one' : 'other';
  return t(`${key}.${form}`, { n: new Intl.NumberFormat(language).format(n), ...params });
}
