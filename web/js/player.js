// @ts-check
// The result player: a saved video in a loop or frame by frame, beside another one with a wipe between them.
//
// A button on the node that saved it opens it, or the command "Open the last video in the player".

// @ts-ignore: served by the frontend
import { app } from "../../../scripts/app.js";
// @ts-ignore: served by the frontend
import { api } from "../../../scripts/api.js";
import { addStyle, element, filled, inLanguage, nodeOf } from "./dom.js";
import { frameRate } from "./frames.js";

const BUTTON = "$$vidgen_player";
const PLAYS = /\.(mp4|m4v|mov|webm)$/i;
const COMMAND = "VidGen: open the last video in the player";
const USUAL_FPS = 24;
/** where a file does not say */
const MAX_RESULTS = 50;
const FAR = 10;
/** frames at once, with Shift */
const WIPE_STEP = 5;

const ENGLISH = {
  open: "Open in player",
  nothing: "There is no video yet",
  title: "Player",
  close: "Close",
  play: "Play",
  pause: "Pause",
  back: "One frame back",
  on: "One frame on",
  loop: "Loop",
  frame: "Frame",
  at: "frame {frame} of {frames} · {time} s · {fps} fps",
  compare: "Compare with",
  alone: "nothing",
  wipe: "Wipe",
  keys: "Space play · ← → frame · Shift ten · Home End · L loop · [ ] wipe · Esc close",
};

const TEXTS = {
  en: ENGLISH,
  zh: {
    open: "在播放器中打开",
    nothing: "还没有视频",
    title: "播放器",
    close: "关闭",
    play: "播放",
    pause: "暂停",
    back: "后退一帧",
    on: "前进一帧",
    loop: "循环",
    frame: "帧",
    at: "第 {frame} / {frames} 帧 · {time} 秒 · {fps} fps",
    compare: "对比",
    alone: "无",
    wipe: "擦除",
    keys: "空格 播放 · ← → 逐帧 · Shift 十帧 · Home End · L 循环 · [ ] 擦除 · Esc 关闭",
  },
};

const STYLE = `
.vidgen-player { width: min(960px, 92vw); max-width: none; max-height: 94vh; padding: 0; border-radius: 12px;
  border: 1px solid var(--border-color, #4e4e4e); color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #202020);
  font: 13px/1.4 Inter, Arial, sans-serif; box-shadow: 0 16px 60px rgb(0 0 0 / 50%); }
.vidgen-player::backdrop { background: rgb(0 0 0 / 55%); }
.vidgen-player .body { display: grid; gap: 10px; padding: 12px 16px 14px; }
.vidgen-player header, .vidgen-player .row { display: flex; align-items: center; gap: 8px; min-width: 0; }
.vidgen-player header h2 { flex: 1; margin: 0; font-size: 14px; font-weight: 600; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.vidgen-player .stage { position: relative; justify-self: center; overflow: hidden; border-radius: 8px; background: #000;
  width: min(100%, calc(62vh * var(--ratio, 1.7778))); aspect-ratio: var(--ratio, 1.7778); touch-action: none; }
.vidgen-player video { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.vidgen-player .stage.compares { cursor: ew-resize; }
.vidgen-player .stage .line { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 5px rgb(0 0 0 / 80%); pointer-events: none; }
.vidgen-player .stage .line::after { content: "◂ ▸"; position: absolute; top: 50%; left: 1px; padding: 5px 6px;
  border-radius: 14px; transform: translate(-50%, -50%); color: #111; background: #fff; font-size: 11px;
  letter-spacing: 1px; white-space: nowrap; }
.vidgen-player .stage .tag { position: absolute; top: 8px; max-width: 46%; padding: 2px 8px; border-radius: 5px;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: #fff; background: rgb(0 0 0 / 60%);
  font-size: 11px; pointer-events: none; }
.vidgen-player .stage .tag.left { left: 8px; }
.vidgen-player .stage .tag.right { right: 8px; }
.vidgen-player button, .vidgen-player select { height: 30px; min-width: 34px; padding: 0 10px; border-radius: 6px;
  border: 1px solid var(--border-color, #4e4e4e); color: inherit; background: var(--comfy-input-bg, #333); font: inherit;
  cursor: pointer; }
.vidgen-player button:hover, .vidgen-player select:hover { border-color: var(--descrip-text, #999); }
.vidgen-player button[aria-pressed="true"] { color: #fff; background: #2b6cb0; border-color: #2b6cb0; }
.vidgen-player :focus-visible { outline: 2px solid #4a9eff; outline-offset: 1px; }
.vidgen-player input:focus-visible { outline-offset: 2px; border-radius: 8px; }
.vidgen-player select { max-width: 240px; }
.vidgen-player option { color: var(--input-text, #ddd); background: var(--comfy-input-bg, #333); }
.vidgen-player input[type="range"] { flex: 1; min-width: 60px; margin: 0; height: 20px; accent-color: #4a9eff;
  cursor: pointer; }
.vidgen-player .at { flex: 1; font-variant-numeric: tabular-nums; color: var(--descrip-text, #999); white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; }
.vidgen-player .keys { color: var(--descrip-text, #999); font-size: 11px; }
.vidgen-player [hidden] { display: none; }
`;

/**
 * @typedef {{filename: string, subfolder?: string, type?: string}} File as the server tells of an output
 * @typedef {{url: string, name: string, fps?: number}} Result
 */

/**
 * @param {File} file
 * @returns {Result}
 */
function resultOf({ filename, subfolder = "", type = "output" }) {
  const url = api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
  return { url, name: subfolder ? `${subfolder}/${filename}` : filename };
}

/**
 * @param {any} output what a node shows
 * @returns {Result[]} its videos
 */
function videosOf(output) {
  const files = Array.isArray(output?.images) ? output.images : [];
  return files.filter((/** @type {any} */ one) => PLAYS.test(one?.filename ?? "")).map(resultOf);
}

/** @returns {Promise<Result[]>} what was made before, the newest first */
async function madeBefore() {
  const response = await api.fetchApi(`/history?max_items=${MAX_RESULTS}`);
  if (!response.ok) return [];
  const runs = Object.values(await response.json());
  return runs.reverse().flatMap((run) => Object.values(/** @type {any} */ (run).outputs ?? {}).flatMap(videosOf));
}

/** One dialog for the page. */
class Player {
  constructor() {
    const texts = inLanguage(TEXTS);
    this.texts = texts;
    this.fps = USUAL_FPS;
    this.frames = 1;
    /** @type {number | null} the frame to go to when the video has arrived at the one before */
    this.next = null;
    /** @type {Result[]} */
    this.others = [];
    this.shown = "";
    this.first = element("video", { muted: true, loop: true, playsInline: true, preload: "auto" });
    this.second = element("video", { muted: true, playsInline: true, preload: "auto", hidden: true });
    this.line = element("div", { class: "line", hidden: true });
    this.left = element("span", { class: "tag left", hidden: true });
    this.right = element("span", { class: "tag right", hidden: true });
    this.stage = element("div", { class: "stage" }, this.first, this.second, this.line, this.left, this.right);
    this.name = element("h2");
    this.slider = element("input", { type: "range", min: "0", step: "1", value: "0", "aria-label": texts.frame });
    this.at = element("span", { class: "at", "aria-live": "off" });
    const button = (/** @type {string} */ sign, /** @type {string} */ label, /** @type {() => void} */ act) =>
      element("button", { type: "button", title: label, "aria-label": label, onclick: act }, sign);
    this.play = button("▶", texts.play, () => this.toggle());
    this.loop = button("⟳", texts.loop, () => this.toggleLoop());
    this.loop.setAttribute("aria-pressed", "true");
    this.compare = element("select", { "aria-label": texts.compare });
    this.wipe = element("input", { type: "range", min: "0", max: "100", value: "50", "aria-label": texts.wipe });
    this.wipeRow = element("div", { class: "row", hidden: true }, element("span", {}, texts.wipe), this.wipe);
    this.dialog = element(
      "dialog",
      { class: "vidgen-player", "aria-label": texts.title },
      element(
        "div",
        { class: "body" },
        element("header", {}, this.name, button("✕", texts.close, () => this.dialog.close())),
        this.stage,
        element("div", { class: "row" }, this.slider),
        element(
          "div",
          { class: "row" },
          button("‹", texts.back, () => this.step(-1)),
          this.play,
          button("›", texts.on, () => this.step(1)),
          this.loop,
          this.at,
          element("label", { class: "row" }, element("span", {}, texts.compare), this.compare),
        ),
        this.wipeRow,
        element("div", { class: "keys" }, texts.keys),
      ),
    );
    this.listen();
    document.body.append(this.dialog);
  }

  listen() {
    const { first, dialog, slider, stage } = this;
    first.addEventListener("loadedmetadata", () => this.measure());
    first.addEventListener("play", () => this.follow());
    for (const event of ["play", "pause", "ended"]) first.addEventListener(event, () => this.tellState());
    first.addEventListener("seeked", () => this.arrived());
    this.second.addEventListener("loadeddata", () => this.align(true));
    slider.addEventListener("input", () => this.goTo(Number(slider.value)));
    this.compare.addEventListener("change", () => this.compareWith(this.others[Number(this.compare.value)]));
    this.wipe.addEventListener("input", () => this.tellWipe());
    stage.addEventListener("pointerdown", (event) => {
      if (this.second.hidden) return this.toggle();
      stage.setPointerCapture(event.pointerId);
      this.drag(event);
    });
    stage.addEventListener("pointermove", (event) => {
      if (stage.hasPointerCapture(event.pointerId)) this.drag(event);
    });
    // The graph behind must not hear of it: there, keys delete nodes.
    for (const kind of ["keydown", "keyup", "keypress", "paste", "copy", "wheel"]) {
      dialog.addEventListener(kind, (event) => event.stopPropagation());
    }
    dialog.addEventListener("keydown", (event) => this.onKey(event));
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(); // beside it
    });
    dialog.addEventListener("close", () => {
      first.pause();
      this.second.pause();
    });
  }

  /** @param {Result} result */
  async open(result) {
    this.compareWith(undefined);
    this.name.textContent = this.left.textContent = result.name;
    this.name.title = result.name;
    this.shown = result.url;
    this.fps = USUAL_FPS;
    this.first.src = result.url;
    if (!this.dialog.open) this.dialog.showModal();
    this.slider.focus();
    const [rate, others] = await Promise.all([frameRate(result.url), madeBefore()]);
    if (this.shown !== result.url) return; // another was opened meanwhile
    this.fps = rate ?? USUAL_FPS;
    this.offer(others.filter((one) => one.url !== result.url));
    this.measure();
    await this.first.play().catch(() => this.tellState()); // a browser may forbid it
  }

  /** @param {Result[]} others what can be compared with */
  offer(others) {
    this.others = others;
    const options = others.map((one, index) => element("option", { value: String(index) }, one.name));
    this.compare.replaceChildren(element("option", { value: "" }, this.texts.alone), ...options);
    this.compare.disabled = others.length === 0;
  }

  /** @param {Result | undefined} result undefined: with nothing */
  compareWith(result) {
    const is = result !== undefined;
    for (const one of [this.second, this.line, this.left, this.right, this.wipeRow]) one.hidden = !is;
    this.stage.classList.toggle("compares", is);
    if (!is) {
      this.compare.value = "";
      this.second.removeAttribute("src");
      return;
    }
    this.right.textContent = result.name;
    this.second.src = result.url;
    this.tellWipe();
  }

  // --- time ---

  measure() {
    const { first } = this;
    if (!first.videoWidth) return;
    this.stage.style.setProperty("--ratio", String(first.videoWidth / first.videoHeight));
    this.frames = Math.max(1, Math.round(first.duration * this.fps));
    this.slider.max = String(this.frames - 1);
    this.tellTime(first.currentTime);
  }

  /** @param {number} time in s */
  frameAt(time) {
    return Math.min(this.frames - 1, Math.max(0, Math.floor(time * this.fps + 0.01)));
  }

  /** @param {number} time in s */
  tellTime(time) {
    const frame = this.frameAt(time);
    const values = {
      frame: frame + 1,
      frames: this.frames,
      time: (frame / this.fps).toFixed(2),
      fps: Number(this.fps.toFixed(3)),
    };
    this.at.textContent = filled(this.texts.at, values);
    this.slider.value = String(frame);
    this.slider.setAttribute("aria-valuetext", this.at.textContent);
  }

  /** @param {number} frame counted from 0 */
  goTo(frame) {
    const { first } = this;
    first.pause();
    const wanted = Math.min(this.frames - 1, Math.max(0, frame));
    this.slider.value = String(wanted);
    if (first.seeking) {
      this.next = wanted;
      return;
    }
    // The middle of a frame: its edges belong to two.
    first.currentTime = (wanted + 0.5) / this.fps;
    this.tellTime(first.currentTime);
    this.align(true);
  }

  arrived() {
    const { next } = this;
    this.next = null;
    if (next !== null) this.goTo(next);
    else this.tellTime(this.first.currentTime);
  }

  /** @param {number} frames */
  step(frames) {
    this.goTo((this.next ?? this.frameAt(this.first.currentTime)) + frames);
  }

  /** While it plays. */
  follow() {
    const each = (/** @type {number} */ time) => {
      this.tellTime(time);
      this.align(false);
      if (!this.first.paused && this.dialog.open) wait();
    };
    const wait = () => {
      if ("requestVideoFrameCallback" in this.first) {
        this.first.requestVideoFrameCallback((_, about) => each(about.mediaTime));
      } else {
        requestAnimationFrame(() => each(/** @type {HTMLVideoElement} */ (this.first).currentTime));
      }
    };
    wait();
  }

  /** @param {boolean} exactly bring the second video to the time of the first, also if it is only a little off */
  align(exactly) {
    const { first, second } = this;
    if (second.hidden || !second.duration) return;
    if (first.paused !== second.paused) {
      if (first.paused) second.pause();
      else second.play().catch(() => {});
    }
    const wanted = Math.min(first.currentTime, second.duration - 0.5 / this.fps);
    if (exactly || Math.abs(second.currentTime - wanted) > 1.5 / this.fps) second.currentTime = wanted;
  }

  toggle() {
    if (this.first.paused) this.first.play().catch(() => {});
    else this.first.pause();
  }

  toggleLoop() {
    this.first.loop = !this.first.loop;
    this.loop.setAttribute("aria-pressed", String(this.first.loop));
  }

  tellState() {
    const { paused } = this.first;
    this.play.textContent = paused ? "▶" : "⏸";
    this.play.title = paused ? this.texts.play : this.texts.pause;
    this.play.setAttribute("aria-label", this.play.title);
    this.align(paused);
  }

  // --- the wipe ---

  tellWipe() {
    const share = `${this.wipe.value}%`;
    this.second.style.clipPath = `inset(0 0 0 ${share})`;
    this.line.style.left = share;
  }

  /** @param {PointerEvent} event */
  drag(event) {
    const { left, width } = this.stage.getBoundingClientRect();
    this.wipe.value = String((100 * (event.clientX - left)) / width);
    this.tellWipe();
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const on = event.target;
    if (on === this.compare) return;
    if (on === this.wipe && event.key.startsWith("Arrow")) return;
    const far = event.shiftKey ? FAR : 1;
    /** @type {Record<string, () => void>} */
    const acts = {
      ArrowLeft: () => this.step(-far),
      ArrowRight: () => this.step(far),
      Home: () => this.goTo(0),
      End: () => this.goTo(this.frames - 1),
      l: () => this.toggleLoop(),
      "[": () => this.moveWipe(-WIPE_STEP),
      "]": () => this.moveWipe(WIPE_STEP),
    };
    if (!(on instanceof HTMLButtonElement)) acts[" "] = () => this.toggle(); // there, Space presses it
    const act = acts[event.key] ?? acts[event.key.toLowerCase()];
    if (!act) return;
    event.preventDefault();
    act();
  }

  /** @param {number} by in % */
  moveWipe(by) {
    this.wipe.value = String(Number(this.wipe.value) + by);
    this.tellWipe();
  }
}

/** @type {Player | undefined} */
let player;

/** @param {Result} result */
function open(result) {
  player ??= new Player();
  player.open(result);
}

async function openLast() {
  const [last] = await madeBefore();
  if (last) open(last);
  else app.extensionManager.toast.add({ severity: "info", summary: inLanguage(TEXTS).nothing, life: 3000 });
}

/** @type {WeakMap<any, Result>} node -> what its button opens */
const latest = new WeakMap();

/** @param {any} detail of `executed` */
function onExecuted(detail) {
  const [result] = videosOf(detail.output);
  const node = nodeOf(detail.display_node ?? detail.node);
  if (!result || !node) return;
  latest.set(node, result);
  if (node.widgets?.some((/** @type {any} */ one) => one.name === BUTTON)) return;
  const act = () => open(/** @type {Result} */ (latest.get(node)));
  const widget = node.addWidget("button", BUTTON, null, act, { serialize: false });
  widget.label = inLanguage(TEXTS).open;
  widget.serialize = false;
  const [, least] = node.computeSize();
  if (node.size[1] < least) node.setSize([node.size[0], least]);
}

app.registerExtension({
  name: "vidgen.player",
  commands: [{ id: "vidgen.player", label: COMMAND, icon: "pi pi-play", function: openLast }],
  setup() {
    addStyle(STYLE);
    api.addEventListener("executed", (/** @type {CustomEvent} */ event) => onExecuted(event.detail));
  },
});
