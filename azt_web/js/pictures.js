// Pictures: from a file to what a request carries, and from what an answer carries to the screen.
import { bytes } from './format.js';
import { t } from './i18n.js';
import * as ui from './ui.js';

const LARGE_BYTES = 4 << 20, LARGE_PX = 2048, KINDS = ['image/png', 'image/jpeg', 'image/webp'];
async function redraw(blob, type) {
  const bitmap = await createImageBitmap(blob), scale = Math.min(1, LARGE_PX / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(...[bitmap.width, bitmap.height].map((n) => Math.round(n * scale)));
  canvas.getContext('2d').drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type, quality: 0.9 });
}
/** [{name, size, data (a data URL), url (blob:)}]; [] where it is no picture, or too large and not to be scaled. */
export async function readPicture(file) {
  const { width, height } = await createImageBitmap(file).catch(() => ({})), { name, size } = file;
  if (!width) { ui.toast(t('play.noPicture', { name }), { kind: 'error' }); return []; }
  const isLarge = size > LARGE_BYTES || Math.max(width, height) > LARGE_PX, type = isLarge ? 'image/jpeg' : 'image/png';
  const body = t('play.scaleBody', { name, size: bytes(size), width, height, px: LARGE_PX });
  if (isLarge && !(await ui.confirm({ title: t('play.scale'), body, action: t('play.scaleDo') }))) return [];
  const blob = isLarge || !KINDS.includes(file.type) ? await redraw(file, type) : file, reader = new FileReader();
  const data = await new Promise((done) => { reader.onload = () => done(reader.result); reader.readAsDataURL(blob); });
  return [{ name, size: blob.size, data, url: URL.createObjectURL(blob) }];
}
export const pictureFile = ({ data, type }) => new File([Uint8Array.from(atob(data), (one) => one.charCodeAt(0))],
  `picture.${type.slice(6)}`, { type });
/** Clipboards take PNG alone, and only in secure contexts. */
export const canCopyPicture = () => Boolean(navigator.clipboard?.write && globalThis.ClipboardItem);
export const copyPicture = (blob) => navigator.clipboard.write([new ClipboardItem({
  'image/png': blob.type === 'image/png' ? blob : redraw(blob, 'image/png') })]);
