// Pictures: from a file to what a request carries, and from what an answer carries to the screen.
import { h } from './dom.js';
import { bytes } from './format.js';
import { t } from './i18n.js';
import * as ui from './ui.js';

const LARGE_BYTES = 4 << 20, LARGE_PX = 2048, KINDS = ['image/png', 'image/jpeg', 'image/webp'];

async function redraw(blob, type) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, LARGE_PX / Math.max(bitmap.width, bitmap.height));
  const canvas = h('canvas', { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  canvas.getContext('2d').drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => { canvas.toBlob(done, type, 0.9); });
}

/** {name, size, data (a data URL), url (blob:)}; null where it is no picture, or too large and not to be scaled. */
export async function readPicture(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return ui.toast(t('play.noPicture', { name: file.name }), { kind: 'error' }) && null;
  const { width, height } = bitmap, isLarge = file.size > LARGE_BYTES || Math.max(width, height) > LARGE_PX;
  const body = t('play.scaleBody', { name: file.name, size: bytes(file.size), width, height, px: LARGE_PX });
  if (isLarge && !(await ui.confirm({ title: t('play.scale'), body, action: t('play.scaleDo') }))) return null;
  const type = isLarge ? 'image/jpeg' : 'image/png';
  const blob = isLarge || !KINDS.includes(file.type) ? await redraw(file, type) : file;
  const reader = new FileReader(), read = new Promise((done) => { reader.onload = () => done(reader.result); });
  reader.readAsDataURL(blob);
  return { name: file.name, size: blob.size, data: await read, url: URL.createObjectURL(blob) };
}

export const blobOf = (base64, type) => new Blob([Uint8Array.from(atob(base64), (one) => one.charCodeAt(0))], { type });

/** Clipboards take PNG alone, and only in secure contexts. */
export const canCopyPicture = () => Boolean(navigator.clipboard?.write && globalThis.ClipboardItem);
export async function copyPicture(blob) {
  const png = blob.type === 'image/png' ? blob : redraw(blob, 'image/png');
  await navigator.clipboard.write([new ClipboardItem({ 'image/png': png })]);
}
