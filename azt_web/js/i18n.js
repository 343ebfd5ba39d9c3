// Two languages, and what this browser remembers of the person's choices.
import { STRINGS } from './strings.js';

const LANGUAGES = ['en', 'zh-CN'];
/** Kept in this browser: language, theme, time zone, views. Never a secret, a name or a text. */
export function pref(name, fallback = null) {
  try { return localStorage.getItem(`azt.${name}`) ?? fallback; } catch { return fallback; }
}
export function setPref(name, value) {
  try {
    if (value === null) localStorage.removeItem(`azt.${name}`); else localStorage.setItem(`azt.${name}`, value);
  } catch { /* a browser that keeps nothing forgets it with the page */ }
}

const wished = [pref('lang', ''), ...navigator.languages].map((one) => one.slice(0, 2).toLowerCase());
let language = wished.find((one) => one === 'en' || one === 'zh') === 'zh' ? 'zh-CN' : 'en', onchange = null;
document.documentElement.lang = language;
export const lang = () => language;
export const onLang = (fn) => { onchange = fn; };
export function setLang(wanted) {
  language = document.documentElement.lang = wanted;
  setPref('lang', language); onchange?.();
}

export const known = (key) => key in STRINGS;
/** The sentence of a key, with `{name}` replaced by `params.name`. */
export const t = (key, params = {}) => (STRINGS[key]?.[LANGUAGES.indexOf(language)] ?? key)
  .replace(/\{(\w+)\}/g, (whole, name) => params[name] ?? whole);
/** `key.one` or `key.other`, as the language counts; `{n}` is the number. */
export function plural(key, n, params = {}) {
  const form = new Intl.PluralRules(language).select(n) === 'one' ? 'one' : 'other';
  return t(`${key}.${form}`, { n: new Intl.NumberFormat(language).format(n), ...params });
}
