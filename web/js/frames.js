// @ts-check
// How many frames a second a video file has, read from its first bytes: a <video> element does not tell.

/** The tables of an mp4 lie in front (`faststart`), those of a webm always do. */
const HEAD_BYTES = 1 << 20;

/** EBML ids of webm: what lies in what, down to the nanoseconds that a frame lasts. */
const SEGMENT = 0x18538067;
const TRACKS = 0x1654ae6b;
const TRACK = 0xae;
const FRAME_NS = 0x23e383;

/**
 * @param {string} url
 * @returns {Promise<number | null>} frames a second; null where the file does not say
 */
export async function frameRate(url) {
  const response = await fetch(url, { headers: { Range: `bytes=0-${HEAD_BYTES - 1}` } });
  if (!response.ok) return null;
  return rateOf(new DataView((await response.arrayBuffer()).slice(0, HEAD_BYTES)));
}

/**
 * @param {DataView} file its beginning
 * @returns {number | null}
 */
export function rateOf(file) {
  try {
    const rate = file.getUint32(0) === 0x1a45dfa3 ? webmRate(file) : mp4Rate(file);
    return rate !== null && Number.isFinite(rate) && rate > 0 ? rate : null;
  } catch (error) {
    if (error instanceof RangeError) return null; // it ends before its tables do
    throw error;
  }
}

// --- mp4: boxes of a size, four letters and what is in them ---

/**
 * @param {DataView} file
 * @param {number} start
 * @param {number} end
 * @returns {Generator<{name: string, start: number, end: number}>}
 */
function* boxes(file, start, end) {
  while (start + 8 <= end) {
    let size = file.getUint32(start);
    let head = 8;
    const letters = [4, 5, 6, 7].map((place) => String.fromCharCode(file.getUint8(start + place)));
    if (size === 1) {
      size = Number(file.getBigUint64(start + 8));
      head = 16;
    }
    if (size === 0) size = end - start;
    if (size < head) return;
    yield { name: letters.join(""), start: start + head, end: Math.min(start + size, end) };
    start += size;
  }
}

/**
 * @param {DataView} file
 * @param {{start: number, end: number}} box
 * @param {...string} path names of boxes in each other
 * @returns {{start: number, end: number} | undefined}
 */
function inside(file, box, ...path) {
  /** @type {{start: number, end: number} | undefined} */
  let found = box;
  for (const name of path) {
    if (!found) return undefined;
    found = [...boxes(file, found.start, found.end)].find((one) => one.name === name);
  }
  return found;
}

/** @param {DataView} file */
function mp4Rate(file) {
  const whole = { start: 0, end: file.byteLength };
  const movie = inside(file, whole, "moov");
  if (!movie) return null;
  for (const track of boxes(file, movie.start, movie.end)) {
    if (track.name !== "trak") continue;
    const media = inside(file, track, "mdia");
    const header = media && inside(file, media, "mdhd");
    const kind = media && inside(file, media, "hdlr");
    const times = media && inside(file, media, "minf", "stbl", "stts");
    if (!header || !kind || !times || file.getUint32(kind.start + 8) !== 0x76696465 /* vide */) continue;
    const isLong = file.getUint8(header.start) === 1; // version 1 has times of 8 bytes
    const ticksPerSecond = file.getUint32(header.start + (isLong ? 20 : 12));
    let frames = 0;
    let ticks = 0;
    const rows = file.getUint32(times.start + 4);
    for (let row = 0; row < rows; row++) {
      const count = file.getUint32(times.start + 8 + 8 * row);
      frames += count;
      ticks += count * file.getUint32(times.start + 12 + 8 * row);
    }
    return (frames * ticksPerSecond) / ticks;
  }
  return null;
}

// --- webm: elements of an id, a size and what is in them; both numbers say their own length ---

/**
 * @param {DataView} file
 * @param {number} at
 * @param {boolean} keepsMark an id keeps the bit that says its length
 */
function variable(file, at, keepsMark) {
  const first = file.getUint8(at);
  const length = Math.clz32(first) - 23;
  if (length > 8) throw new RangeError("no number of EBML");
  let value = BigInt(keepsMark ? first : first & ((1 << (8 - length)) - 1));
  for (let place = 1; place < length; place++) value = (value << 8n) | BigInt(file.getUint8(at + place));
  const isOpen = !keepsMark && value === (1n << BigInt(7 * length)) - 1n; // of a stream: to the end
  return { value: isOpen ? file.byteLength : Number(value), next: at + length };
}

/**
 * @param {DataView} file
 * @param {number} start
 * @param {number} end
 * @param {number} wanted an id
 * @returns {{start: number, end: number} | null}
 */
function part(file, start, end, wanted) {
  while (start < end) {
    const id = variable(file, start, true);
    const size = variable(file, id.next, false);
    const stop = Math.min(end, size.next + size.value);
    if (id.value === wanted) return { start: size.next, end: stop };
    start = stop;
  }
  return null;
}

/** @param {DataView} file */
function webmRate(file) {
  /** @type {{start: number, end: number} | null} */
  let found = { start: 0, end: file.byteLength };
  for (const id of [SEGMENT, TRACKS, TRACK, FRAME_NS]) {
    found = part(file, found.start, found.end, id);
    if (!found) return null;
  }
  let nanoseconds = 0;
  for (let at = found.start; at < found.end; at++) nanoseconds = nanoseconds * 256 + file.getUint8(at);
  return 1e9 / nanoseconds;
}
