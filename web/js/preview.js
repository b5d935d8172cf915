// @ts-check
// The live preview moves: our samplers send a contact sheet through the ordinary preview channel, and its pictures are
// shown one after the other in its place. Where this file is not loaded, the sheet itself is shown.

// @ts-ignore: served by the frontend
import { app } from "../../../scripts/app.js";
// @ts-ignore: served by the frontend
import { api } from "../../../scripts/api.js";
import { nodeOf } from "./dom.js";

const EVENT = "b_preview_with_metadata";
const PREFIX = "VidGen";
const FRAME_MS = 140;
const ENDS = ["execution_start", "execution_success", "execution_error", "execution_interrupted"];

/** @typedef {{columns: number, frames: number}} Sheet how its pictures lie, from left to right and downwards */

/**
 * The note that a host leaves in a JPEG's comment.
 * @param {DataView} jpeg
 * @returns {Sheet | null}
 */
export function sheetOf(jpeg) {
  let at = 2;
  while (at + 4 <= jpeg.byteLength && jpeg.getUint8(at) === 0xff) {
    const kind = jpeg.getUint8(at + 1);
    const length = jpeg.getUint16(at + 2);
    if (kind === 0xda) return null; // the picture begins
    if (kind === 0xfe) {
      const bytes = new Uint8Array(jpeg.buffer, jpeg.byteOffset + at + 4, length - 2);
      try {
        const { columns, frames } = JSON.parse(new TextDecoder().decode(bytes)).vidgen;
        return columns > 0 && frames > 0 ? { columns, frames } : null;
      } catch {
        return null; // somebody else's comment
      }
    }
    at += 2 + length;
  }
  return null;
}

/**
 * @param {Blob} blob a contact sheet, or any picture
 * @returns {Promise<Blob[]>} its pictures
 */
async function pictures(blob) {
  const sheet = sheetOf(new DataView(await blob.arrayBuffer()));
  if (!sheet) return [blob];
  const { columns, frames } = sheet;
  const whole = await createImageBitmap(blob);
  const width = Math.round(whole.width / columns);
  const height = Math.round(whole.height / Math.ceil(frames / columns));
  const made = [];
  for (let index = 0; index < frames; index++) {
    const canvas = new OffscreenCanvas(width, height);
    const x = (index % columns) * width;
    const y = Math.floor(index / columns) * height;
    canvas.getContext("2d")?.drawImage(whole, x, y, width, height, 0, 0, width, height);
    made.push(canvas.convertToBlob({ type: "image/jpeg", quality: 0.9 }));
  }
  whole.close();
  return Promise.all(made);
}

/** The frontend's own way to tell of an event; set when the page is set up. @type {(detail: any) => void} */
let send = () => {};

const playing = { blobs: /** @type {Blob[]} */ ([]), detail: /** @type {any} */ (null), frame: 0, timer: 0 };
/** The preview that waits while the one before it is taken apart. @type {any} */
let waiting = null;
let isBusy = false;

function stop() {
  waiting = null;
  playing.detail = null;
  clearInterval(playing.timer);
}

function next() {
  const { blobs, detail } = playing;
  if (detail) send({ ...detail, blob: blobs[playing.frame++ % blobs.length] });
}

/** @param {any} detail of a preview; those that come too fast are left out */
async function play(detail) {
  waiting = detail;
  if (isBusy) return;
  isBusy = true;
  try {
    while (waiting) {
      const taken = waiting;
      const blobs = await pictures(taken.blob);
      if (!waiting) return; // the run is over
      if (waiting === taken) waiting = null;
      playing.blobs = blobs;
      playing.detail = taken;
      clearInterval(playing.timer);
      next();
      if (blobs.length > 1) playing.timer = window.setInterval(next, FRAME_MS);
    }
  } finally {
    isBusy = false;
  }
}

app.registerExtension({
  name: "vidgen.preview",
  setup() {
    // The frontend listens before any extension can, so the sheet is taken where it is told of.
    const tell = api.dispatchCustomEvent?.bind(api);
    if (!tell) return;
    send = (detail) => tell(EVENT, detail);
    api.dispatchCustomEvent = (/** @type {string} */ kind, /** @type {any} */ detail) => {
      const isOurs = kind === EVENT && nodeOf(detail?.displayNodeId ?? detail?.nodeId)?.type?.startsWith(PREFIX);
      if (!isOurs) return tell(kind, detail);
      play(detail).catch(() => send(detail)); // a picture that cannot be taken apart, as it is
      return true;
    };
    api.addEventListener("executing", stop);
    for (const end of ENDS) api.addEventListener(end, stop);
  },
});
