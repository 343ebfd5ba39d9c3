// QR codes as in ISO/IEC 18004: byte mode, level M, versions 1 to 10 (213 bytes at most), all eight masks.

// Of each version: correction bytes in a block, blocks, data bytes in all, places of the alignment patterns.
const VERSIONS = [
  [10, 1, 16, []], [16, 1, 28, [6, 18]], [26, 1, 44, [6, 22]], [18, 2, 64, [6, 26]], [24, 2, 86, [6, 30]],
  [16, 4, 108, [6, 34]], [18, 4, 124, [6, 22, 38]], [22, 4, 154, [6, 24, 42]], [22, 5, 182, [6, 26, 46]],
  [26, 5, 216, [6, 28, 50]],
];

const MASKS = [
  (x, y) => (x + y) % 2, (x, y) => y % 2, (x) => x % 3, (x, y) => (x + y) % 3,
  (x, y) => ((x / 3 | 0) + (y / 2 | 0)) % 2, (x, y) => (x * y) % 2 + (x * y) % 3,
  (x, y) => ((x * y) % 2 + (x * y) % 3) % 2, (x, y) => ((x + y) % 2 + (x * y) % 3) % 2,
];

// -- Correction: Reed-Solomon in GF(256) with x^8 + x^4 + x^3 + x^2 + 1 --

const EXP = [], LOG = [];
for (let i = 0, x = 1; i < 255; i += 1, x = (x << 1) ^ (x > 127 ? 0x11d : 0)) { EXP[i] = x; LOG[x] = i; }
const times = (a, b) => (a && b ? EXP[(LOG[a] + LOG[b]) % 255] : 0);

function correction(data, count) {
  let divisor = [1];
  for (let i = 0; i < count; i += 1) {
    divisor = [...divisor, 0].map((v, at) => v ^ times(at ? divisor[at - 1] : 0, EXP[i]));
  }
  const rest = new Array(count).fill(0);
  for (const byte of data) {
    const factor = byte ^ rest.shift();
    rest.push(0);
    for (let i = 0; i < count; i += 1) rest[i] ^= times(divisor[i + 1], factor);
  }
  return rest;
}

/** All bytes in the order in which they are drawn. */
function codewords(bytes, version) {
  const [ecc, blocks, total] = VERSIONS[version - 1];
  const bits = [];
  const put = (value, length) => { for (let i = length - 1; i >= 0; i -= 1) bits.push((value >> i) & 1); };
  put(4, 4);
  put(bytes.length, version < 10 ? 8 : 16);
  bytes.forEach((byte) => put(byte, 8));
  put(0, Math.min(4, total * 8 - bits.length));
  put(0, (8 - (bits.length % 8)) % 8);
  for (let pad = 0xec; bits.length < total * 8; pad ^= 0xec ^ 0x11) put(pad, 8);
  const data = bits.join('').match(/.{8}/g).map((byte) => parseInt(byte, 2)), short = Math.floor(total / blocks);
  const longFrom = blocks - (total % blocks); // the last blocks hold a byte more
  const parts = Array.from({ length: blocks }, (_, i) => data.splice(0, short + (i >= longFrom ? 1 : 0)));
  const out = [], fixes = parts.map((part) => correction(part, ecc));
  for (let i = 0; i <= short; i += 1) parts.forEach((part) => i < part.length && out.push(part[i]));
  for (let i = 0; i < ecc; i += 1) fixes.forEach((part) => out.push(part[i]));
  return out;
}

// -- Drawing --

/** `value`, then the remainder of its division: how format and version are protected. */
function guarded(value, length, divisor) {
  let rest = value;
  for (let i = 0; i < length; i += 1) rest = (rest << 1) ^ ((rest >> (length - 1)) * divisor);
  return (value << length) | rest;
}

/** Modules that are the same whatever is said; undefined where data goes. */
function frame(version, mask) {
  const size = 17 + 4 * version;
  const grid = Array.from({ length: size }, () => new Array(size));
  const set = (x, y, dark) => { if (x >= 0 && y >= 0 && x < size && y < size) grid[y][x] = Boolean(dark); };
  for (let i = 0; i < size; i += 1) { set(6, i, i % 2 === 0); set(i, 6, i % 2 === 0); }
  const square = (cx, cy, radius, light) => {
    for (let i = 0, width = 2 * radius + 1; i < width ** 2; i += 1) {
      const dx = (i % width) - radius, dy = Math.floor(i / width) - radius;
      set(cx + dx, cy + dy, !light.includes(Math.max(Math.abs(dx), Math.abs(dy))));
    }
  };
  [[3, 3], [size - 4, 3], [3, size - 4]].forEach(([x, y]) => square(x, y, 4, [2, 4]));
  const places = VERSIONS[version - 1][3], last = places.at(-1), corners = ['6,6', `6,${last}`, `${last},6`];
  for (const x of places) for (const y of places) if (!corners.includes(`${x},${y}`)) square(x, y, 2, [1]);
  const format = guarded(mask, 10, 0x537) ^ 0x5412; // level M is 00
  for (let i = 0; i < 15; i += 1) {
    const dark = (format >> i) & 1;
    if (i < 8) set(size - 1 - i, 8, dark); else set(8, size - 15 + i, dark);
    if (i < 8) set(8, i + (i > 5 ? 1 : 0), dark); else set(i < 9 ? 7 : 14 - i, 8, dark);
  }
  set(8, size - 8, true);
  for (let i = 0, bits = guarded(version, 12, 0x1f25); version > 6 && i < 18; i += 1) {
    const far = size - 11 + (i % 3), near = Math.floor(i / 3);
    set(far, near, (bits >> i) & 1);
    set(near, far, (bits >> i) & 1);
  }
  return grid;
}

/** How hard a grid is to read (7.8.3.1 of the standard): runs, squares, what looks like a finder, imbalance. */
function penalty(grid) {
  const rows = grid.map((row) => row.map(Number).join(''));
  const columns = rows.map((_, x) => rows.map((row) => row[x]).join(''));
  const runs = [...rows, ...columns].map((line) => (line.match(/0{5,}|1{5,}/g) ?? []).map((run) => run.length - 2)
    .concat([...line.matchAll(/(?=00001011101|10111010000)/g)].map(() => 40)));
  const squares = rows.slice(1).map((row, y) => [...row.slice(1)].map((_, x) => (
    /^(0+|1+)$/.test(row.slice(x, x + 2) + rows[y].slice(x, x + 2)) ? 3 : 0)));
  const dark = rows.join('').replaceAll('0', '').length / rows.length ** 2;
  return [...runs, ...squares].flat().reduce((sum, one) => sum + one, 10 * Math.floor(Math.abs(dark * 20 - 10)));
}

/** The modules, true where dark. `mask` (0 to 7) is chosen by the penalty unless it is given. @throws {RangeError} */
export function qrGrid(text, mask) {
  const bytes = [...new TextEncoder().encode(text)];
  const version = VERSIONS.findIndex(([,, total], at) => bytes.length <= total - (at < 9 ? 2 : 3)) + 1;
  if (!version) throw new RangeError('too long for a QR code');
  const bits = codewords(bytes, version).flatMap((byte) => [7, 6, 5, 4, 3, 2, 1, 0].map((i) => (byte >> i) & 1));
  const drawn = (mask === undefined ? MASKS.map((_, i) => i) : [mask]).map((chosen) => {
    const grid = frame(version, chosen), size = grid.length;
    let at = 0;
    for (let right = size - 1; right > 0; right -= right === 8 ? 3 : 2) { // column 6 is a timing pattern
      const up = ((right + 1) & 2) === 0;
      for (let i = 0; i < size * 2; i += 1) {
        const x = right - (i % 2), y = up ? size - 1 - (i >> 1) : i >> 1;
        if (grid[y][x] === undefined) grid[y][x] = Boolean((bits[at++] ?? 0) ^ (MASKS[chosen](x, y) ? 0 : 1));
      }
    }
    return grid;
  });
  const points = drawn.map(penalty);
  return drawn[points.indexOf(Math.min(...points))];
}

/** For an SVG: the width of the square with its quiet zone of four modules, and the dark modules as one path. */
export function qrPath(text) {
  const grid = qrGrid(text);
  const runs = grid.flatMap((row, y) => [...row.map((dark) => (dark ? '1' : '0')).join('').matchAll(/1+/g)]
    .map((run) => `M${run.index + 4} ${y + 4}h${run[0].length}v1h-${run[0].length}z`));
  return { width: grid.length + 8, path: runs.join('') };
}
