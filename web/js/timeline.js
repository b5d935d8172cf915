// @ts-check
// The timeline of Keyframes to Video: the connected pictures on the axis of frames, moved by mouse and by keyboard.
//
// It keeps nothing itself. What it shows are the widgets of the connected Keyframe nodes, and what it changes are the
// same widgets, so a workflow is saved, restored and queued as if it were not there.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addStyle, element, filled, inLanguage } from "./dom.js";

const HOST = "VidGenKeyframesToVideo";
const KEY = "VidGenKeyframe";
const REROUTE = "Reroute";
const VUE_NODE = ".lg-node"; // around a node that Vue draws
const MUTED = 2;
const BYPASSED = 4;

const LAST = -1; // a picture there stays the last one when the video gets longer
const BIG = 4; // how many steps Shift takes at once
const STRENGTH_STEP = 0.05;
const LOOK_MS = 200;
const HEIGHT_PX = 196;
const WIDTH_PX = 360;
const MAX_CHAIN = 250;
const MIN_LABEL_PX = 34; // between numbers on the axis
const MIN_TICK_PX = 4;

const ENGLISH = {
  timeline: "Keyframe timeline, frames 0 to {last}",
  empty: "Connect a Keyframe node to place its picture here. Keyframe nodes in a row make several.",
  key: "Keyframe {number}: {title}",
  at: "frame {frame}, strength {strength}, release {until}",
  last: "last",
  frame: "Frame",
  strength: "Strength",
  strengthHelp: "How closely the video shows this picture: 1 exactly, 0 not at all",
  until: "Release",
  untilHelp: "When the picture lets go: 0 never, 0.3 for the last part of the run, 1 at once",
  linked: "its frame comes from a link",
  outside: "frame {frame} is outside of the video",
  shared: "another picture is at this place",
  keys: "← → move · Shift further · ↑ ↓ strength · Del reset",
};

const TEXTS = {
  en: ENGLISH,
  zh: {
    timeline: "关键帧时间轴,第 0 至 {last} 帧",
    empty: "连接一个“关键帧”节点,图像就会出现在这里。多个节点首尾相连即可放置多张。",
    key: "关键帧 {number}:{title}",
    at: "第 {frame} 帧,强度 {strength},释放 {until}",
    last: "末帧",
    frame: "帧",
    strength: "强度",
    strengthHelp: "视频与图像的接近程度:1 完全一致,0 不起作用",
    until: "释放",
    untilHelp: "图像何时放手:0 从不,0.3 在最后一段,1 立即",
    linked: "帧数来自连线",
    outside: "第 {frame} 帧在视频之外",
    shared: "此处已有另一张图像",
    keys: "← → 移动 · Shift 加快 · ↑ ↓ 强度 · Del 重置",
  },
};

const STYLE = `
.vidgen-timeline {
  --vg-surface: var(--comfy-input-bg, #222);
  --vg-text: var(--input-text, #ddd);
  --vg-quiet: var(--descrip-text, #999);
  --vg-line: var(--border-color, #4e4e4e);
  --vg-accent: var(--primary-background, #3b82f6);
  --vg-wrong: var(--error-text, #ff4444);
  box-sizing: border-box; width: 100%; height: 100%; min-height: ${HEIGHT_PX - 20}px; padding: 10px 12px 8px;
  display: flex; flex-direction: column; gap: 6px; overflow: hidden; user-select: none;
  border-radius: 8px; background: var(--vg-surface); color: var(--vg-text);
  font: 12px/1.3 Inter, system-ui, sans-serif; text-align: left;
}
${VUE_NODE} .vidgen-timeline { --vg-surface: var(--component-node-widget-background, var(--comfy-input-bg, #222)); }
.vidgen-timeline * { box-sizing: border-box; }
.vidgen-timeline .track { position: relative; height: 92px; flex: none; margin: 0 24px; }
.vidgen-timeline .axis { position: absolute; left: 0; right: 0; top: 68px; height: 24px; }
.vidgen-timeline .axis::before {
  content: ""; position: absolute; left: -14px; right: -14px; top: 0; height: 2px; border-radius: 1px;
  background: var(--vg-line);
}
.vidgen-timeline .tick { position: absolute; top: 0; width: 1px; height: 5px; margin-left: -0.5px; background: var(--vg-line); }
.vidgen-timeline .tick.named { height: 7px; background: var(--vg-quiet); }
.vidgen-timeline .tick span {
  position: absolute; top: 8px; left: 50%; transform: translateX(-50%); color: var(--vg-quiet);
  font-size: 10px; font-variant-numeric: tabular-nums; white-space: nowrap;
}
.vidgen-timeline .key {
  position: absolute; top: 0; width: 50px; height: 69px; margin-left: -25px; padding: 0; border: 0; outline: none;
  background: none; color: inherit; font: inherit; cursor: grab; touch-action: none;
}
.vidgen-timeline .key::after {
  content: ""; position: absolute; left: 50%; bottom: 0; width: 2px; height: 13px; margin-left: -1px;
  background: var(--vg-quiet);
}
.vidgen-timeline .card {
  position: absolute; inset: 0 0 13px; overflow: hidden; border: 2px solid var(--vg-line); border-radius: 7px;
  background: color-mix(in srgb, var(--vg-text) 12%, var(--vg-surface)); box-shadow: 0 1px 4px rgb(0 0 0 / 35%);
  transition: border-color 80ms, transform 80ms;
}
.vidgen-timeline .card img { display: block; width: 100%; height: 100%; object-fit: cover; pointer-events: none; }
.vidgen-timeline .number {
  position: absolute; left: 3px; top: 3px; min-width: 14px; padding: 0 3px; border-radius: 4px;
  background: rgb(0 0 0 / 62%); color: #fff; font-size: 10px; line-height: 14px; text-align: center;
}
.vidgen-timeline .hold { position: absolute; left: 3px; right: 3px; bottom: 3px; height: 4px; border-radius: 2px; background: rgb(0 0 0 / 55%); }
.vidgen-timeline .hold i { display: block; height: 100%; border-radius: 2px; background: #fff; }
.vidgen-timeline .key:hover { z-index: 2; }
.vidgen-timeline .key:hover .card { border-color: var(--vg-quiet); }
.vidgen-timeline .key.chosen { z-index: 3; }
.vidgen-timeline .key.chosen .card { border-color: var(--vg-accent); }
.vidgen-timeline .key.chosen::after { background: var(--vg-accent); }
.vidgen-timeline .key:focus-visible .card { box-shadow: 0 0 0 2px var(--vg-surface), 0 0 0 4px var(--vg-accent); }
.vidgen-timeline .key.dragged { cursor: grabbing; }
.vidgen-timeline .key.dragged .card { transform: translateY(-2px); }
.vidgen-timeline .key.linked { cursor: not-allowed; }
.vidgen-timeline .key.wrong .card { border-color: var(--vg-wrong); border-style: dashed; }
.vidgen-timeline .detail { display: grid; grid-template-columns: auto 1fr 1fr; gap: 2px 14px; align-items: center; }
.vidgen-timeline label { display: grid; gap: 2px; min-width: 0; color: var(--vg-quiet); font-size: 11px; }
.vidgen-timeline label b { display: flex; justify-content: space-between; font-weight: 400; }
.vidgen-timeline output { color: var(--vg-text); font-variant-numeric: tabular-nums; }
.vidgen-timeline input[type="number"] {
  width: 58px; height: 22px; padding: 0 4px; border: 1px solid var(--vg-line); border-radius: 5px; background: transparent;
  color: var(--vg-text); font: inherit; font-size: 12px; font-variant-numeric: tabular-nums;
}
.vidgen-timeline input[type="range"] { width: 100%; height: 22px; margin: 0; accent-color: var(--vg-accent); cursor: pointer; }
.vidgen-timeline input:focus-visible { outline: 2px solid var(--vg-accent); outline-offset: 1px; border-radius: 5px; }
.vidgen-timeline .note { min-height: 14px; margin: 0; color: var(--vg-quiet); font-size: 10px; line-height: 14px; text-align: center; }
.vidgen-timeline .note.wrong { color: var(--vg-wrong); font-size: 11px; }
.vidgen-timeline .empty { margin: auto; padding: 0 12px; color: var(--vg-quiet); text-align: center; line-height: 1.5; }
.vidgen-timeline [hidden] { display: none !important; }
`;

/**
 * @typedef {object} Key a connected Keyframe node
 * @property {FrontendNode} node
 * @property {string} title of what brings the picture
 * @property {string | null} picture its address
 * @property {number} frame as the widget says it; negative numbers count from the end
 * @property {number} strength
 * @property {number} until
 * @property {boolean} linked whether the frame comes from a link, and so cannot be changed here
 */

/**
 * @typedef {object} View everything that is shown
 * @property {number} last the last frame of the video
 * @property {number} step frames from one latent to the next
 * @property {Key[]} keys
 */

// --- the graph --------------------------------------------------------------------------------------------------------

/**
 * @param {FrontendNode} node
 * @param {string} name
 */
function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

/**
 * @param {FrontendNode} node
 * @param {(input: FrontendInput) => boolean} which
 * @returns {FrontendNode | null} what feeds the input, past reroutes
 */
function sourceOf(node, which) {
  let from = node;
  let slot = (node.graph && node.inputs?.findIndex(which)) ?? -1; // a new node is in no graph yet
  for (let steps = 0; slot >= 0 && steps < MAX_CHAIN; steps++) {
    const source = from.getInputNode(slot);
    if (source?.type !== REROUTE) return source ?? null;
    [from, slot] = [source, 0];
  }
  return null;
}

/**
 * @param {FrontendNode} node
 * @returns {FrontendNode[]} the Keyframe nodes in a row before it, the farthest first
 */
function keyNodesOf(node) {
  const found = [];
  let source = sourceOf(node, (input) => input.name === "keyframes");
  while (source && source.type === KEY && source.mode !== MUTED && found.length < MAX_CHAIN) {
    if (source.mode !== BYPASSED) found.unshift(source);
    source = sourceOf(source, (input) => input.name === "keyframes");
  }
  return found;
}

/**
 * @param {string} file as the widget of Load Image says it: `folder/name.png [output]`
 * @returns {string}
 */
function addressOf(file) {
  const parts = /^(?:(?<subfolder>.*)\/)?(?<filename>[^/]+?)(?: \[(?<type>input|output|temp)\])?$/.exec(file)?.groups;
  const { subfolder = "", filename = file, type = "input" } = parts ?? {};
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

/**
 * @param {FrontendNode} key
 * @returns {[string, string | null]} title and picture of the nearest node before it that has a picture to show
 */
function pictureOf(key) {
  const first = sourceOf(key, (input) => input.name === "image");
  for (let source = first, steps = 0; source && steps < MAX_CHAIN; steps++) {
    const file = widgetOf(source, "image")?.value;
    const shown = source.imgs?.[0]?.src ?? (typeof file === "string" && file ? addressOf(file) : null);
    if (shown) return [source.title, shown];
    source = sourceOf(source, (input) => input.type === "IMAGE" && input.link != null);
  }
  return [first?.title ?? key.title, null];
}

/**
 * @param {FrontendNode} node Keyframes to Video
 * @returns {View}
 */
function viewOf(node) {
  const length = widgetOf(node, "num_frames");
  const keys = keyNodesOf(node).map((key) => {
    const [title, picture] = pictureOf(key);
    const number = (/** @type {string} */ name) => Number(widgetOf(key, name)?.value ?? 0);
    const linked = key.inputs?.some((input) => input.widget?.name === "frame" && input.link != null) ?? false;
    return { node: key, title, picture, frame: number("frame"), strength: number("strength"), until: number("until"), linked };
  });
  // The step of the length is that of the VAE: so many frames are one latent.
  return { last: Math.max(0, Number(length?.value ?? 1) - 1), step: Number(length?.options.step2 ?? 4), keys };
}

/**
 * @param {FrontendNode} node
 * @param {string} name
 * @param {number} value
 */
function write(node, name, value) {
  const widget = widgetOf(node, name);
  if (!widget || widget.value === value) return;
  widget.value = value;
  widget.callback?.(value);
  node.graph?.setDirtyCanvas(true, true);
}

/** What was changed becomes a step of undo. */
function remember() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  if (tracker?.captureCanvasState) tracker.captureCanvasState();
  else tracker?.checkState?.();
}

// --- frames -----------------------------------------------------------------------------------------------------------

/**
 * @param {View} view
 * @param {Key} key
 * @returns {number} the frame counted from 0, outside of the video too
 */
function indexOf(view, key) {
  return key.frame < 0 ? key.frame + view.last + 1 : key.frame;
}

/**
 * @param {View} view
 * @param {number} frame
 * @returns {number} the last frame of its latent: the first frame has a latent of its own, the others come in groups
 */
function placeOf(view, frame) {
  return Math.ceil(frame / view.step) * view.step;
}

/**
 * The place nearest to a frame that no other picture has.
 * @param {View} view
 * @param {Key} key
 * @param {number} wanted
 * @param {number} [direction] -1 or 1: not on the other side
 * @returns {number} where it is now, if there is none
 */
export function freePlace(view, key, wanted, direction = 0) {
  const now = indexOf(view, key);
  const taken = new Set(view.keys.filter((other) => other !== key).map((other) => placeOf(view, indexOf(view, other))));
  const end = Math.floor(view.last / view.step);
  const middle = Math.min(end, Math.max(0, Math.round(wanted / view.step)));
  for (let away = 0; away <= end; away++) {
    for (const side of direction ? [direction] : [1, -1]) {
      const place = (middle + side * away) * view.step;
      if (place >= 0 && place <= view.last && !taken.has(place)) return place;
    }
  }
  return now;
}

// --- the widget -------------------------------------------------------------------------------------------------------

/**
 * @param {keyof typeof ENGLISH} name
 * @param {Record<string, string | number>} [values]
 */
function text(name, values = {}) {
  return filled(inLanguage(TEXTS)[name], values);
}

class Timeline {
  /** @type {View} */
  view = { last: 0, step: 4, keys: [] };
  /** the number of the key whose settings are shown */
  chosen = 0;
  /** what was drawn, to tell whether anything has changed */
  drawn = "";
  /** @type {HTMLButtonElement[]} */
  buttons = [];

  /** @param {FrontendNode} node */
  constructor(node) {
    this.node = node;
    this.axis = element("div", { class: "axis", "aria-hidden": "true" });
    this.track = element("div", { class: "track" }, this.axis);
    this.frame = element("input", { type: "number" });
    const share = { type: "range", min: "0", max: "1", step: String(STRENGTH_STEP) };
    this.strength = element("input", share);
    this.until = element("input", share);
    this.said = { strength: element("output"), until: element("output") };
    this.detail = element(
      "div",
      { class: "detail", role: "group" },
      element("label", {}, element("b", {}, text("frame")), this.frame),
      element("label", { title: text("strengthHelp") }, element("b", {}, text("strength"), this.said.strength), this.strength),
      element("label", { title: text("untilHelp") }, element("b", {}, text("until"), this.said.until), this.until),
    );
    this.note = element("p", { class: "note" });
    this.empty = element("p", { class: "empty" }, text("empty"));
    this.root = element("div", { class: "vidgen-timeline", role: "group" }, this.track, this.detail, this.note, this.empty);
    this.listen();
    this.look();
  }

  listen() {
    this.frame.addEventListener("change", () => this.move(this.chosen, Number(this.frame.value)));
    this.strength.addEventListener("input", () => this.change("strength", Number(this.strength.value)));
    this.until.addEventListener("input", () => this.change("until", Number(this.until.value)));
    this.detail.addEventListener("change", remember);
    // A node is moved by what happens on it, and the canvas has keys of its own.
    this.root.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
    // On the canvas this lies beside the graph and not in it.
    this.root.addEventListener("wheel", (event) => {
      if (!this.root.closest(VUE_NODE)) app.canvas.processMouseWheel(event);
    });
    this.detail.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey && event.key !== "Tab" && event.key !== "Escape") event.stopPropagation();
    });
  }

  /** Shows what the graph says now. */
  look() {
    this.view = viewOf(this.node);
    const { keys, ...axis } = this.view;
    const now = JSON.stringify([axis, this.chosen, this.track.clientWidth, keys.map(({ node, ...key }) => [node.id, key])]);
    if (now === this.drawn) return;
    this.drawn = now;
    this.chosen = Math.max(0, Math.min(this.chosen, keys.length - 1));
    this.root.setAttribute("aria-label", text("timeline", { last: this.view.last }));
    for (const part of [this.track, this.detail, this.note]) part.hidden = keys.length === 0;
    this.empty.hidden = keys.length > 0;
    this.drawAxis();
    this.drawKeys();
    this.drawDetail();
  }

  /** @param {number} frame */
  share(frame) {
    return this.view.last ? Math.min(1, Math.max(0, frame / this.view.last)) : 0;
  }

  drawAxis() {
    const { last, step } = this.view;
    const width = this.track.clientWidth || WIDTH_PX;
    const perStep = (width * step) / Math.max(1, last);
    const every = (/** @type {number} */ px) => {
      let steps = 1;
      while (perStep * steps < px) steps *= 2;
      return step * steps;
    };
    const [ticks, names] = [every(MIN_TICK_PX), every(MIN_LABEL_PX)];
    const marks = [];
    for (let frame = 0; frame <= last; frame += ticks) {
      const named = frame === last || (frame % names === 0 && ((last - frame) / step) * perStep >= MIN_LABEL_PX);
      marks.push(this.tick(frame, named));
    }
    if (last % ticks) marks.push(this.tick(last, true));
    this.axis.replaceChildren(...marks);
  }

  /**
   * @param {number} frame
   * @param {boolean} named
   */
  tick(frame, named) {
    const mark = element("div", { class: named ? "tick named" : "tick" }, ...(named ? [element("span", {}, String(frame))] : []));
    mark.style.left = `${100 * this.share(frame)}%`;
    return mark;
  }

  drawKeys() {
    while (this.buttons.length > this.view.keys.length) this.buttons.pop()?.remove();
    while (this.buttons.length < this.view.keys.length) this.buttons.push(this.button(this.buttons.length));
    this.view.keys.forEach((key, number) => {
      const button = this.buttons[number];
      const index = indexOf(this.view, key);
      const problem = this.problemOf(key);
      button.classList.toggle("chosen", number === this.chosen);
      button.classList.toggle("linked", key.linked);
      button.classList.toggle("wrong", problem !== null);
      button.style.left = `${100 * this.share(placeOf(this.view, index))}%`;
      const settings = { frame: index, strength: key.strength, until: key.until };
      const said = [text("at", settings), key.linked && text("linked"), problem].filter(Boolean).join("; ");
      const label = text("key", { number: number + 1, title: key.title });
      const states = {
        "aria-label": label,
        "aria-valuemin": 0,
        "aria-valuemax": this.view.last,
        "aria-valuenow": index,
        "aria-valuetext": said,
        "aria-disabled": key.linked,
        "aria-invalid": problem !== null,
      };
      for (const [name, value] of Object.entries(states)) button.setAttribute(name, String(value));
      button.title = `${label}\n${said}`;
      const [picture, hold] = [button.querySelector("img"), /** @type {HTMLElement | null} */ (button.querySelector(".hold i"))];
      if (picture && picture.getAttribute("src") !== key.picture) {
        if (key.picture === null) picture.removeAttribute("src");
        else picture.src = key.picture;
        picture.hidden = key.picture === null;
      }
      if (hold) {
        hold.style.width = `${100 * (1 - key.until)}%`;
        hold.style.opacity = String(key.strength);
      }
    });
  }

  /**
   * @param {Key} key
   * @returns {string | null} why the run would refuse it
   */
  problemOf(key) {
    const index = indexOf(this.view, key);
    if (index < 0 || index > this.view.last) return text("outside", { frame: key.frame });
    const place = placeOf(this.view, index);
    const shared = this.view.keys.some((other) => other !== key && placeOf(this.view, indexOf(this.view, other)) === place);
    return shared ? text("shared") : null;
  }

  drawDetail() {
    const key = this.view.keys[this.chosen];
    if (!key) return;
    const label = text("key", { number: this.chosen + 1, title: key.title });
    this.detail.setAttribute("aria-label", label);
    const frame = { min: 0, max: this.view.last, step: this.view.step, "aria-label": `${label}, ${text("frame")}` };
    for (const [name, value] of Object.entries(frame)) this.frame.setAttribute(name, String(value));
    this.frame.value = String(indexOf(this.view, key));
    this.frame.disabled = key.linked;
    for (const name of /** @type {const} */ (["strength", "until"])) {
      this[name].value = String(key[name]);
      this[name].setAttribute("aria-label", `${label}, ${text(name)}`);
      this.said[name].textContent = key[name].toFixed(2);
    }
    const problem = this.problemOf(key);
    this.note.textContent = problem ?? text("keys");
    this.note.classList.toggle("wrong", problem !== null);
  }

  /**
   * @param {number} number
   * @returns {HTMLButtonElement}
   */
  button(number) {
    const picture = element("img", { alt: "", draggable: false, hidden: true });
    picture.addEventListener("error", () => (picture.hidden = true));
    const card = element(
      "span",
      { class: "card" },
      picture,
      element("span", { class: "number" }, String(number + 1)),
      element("span", { class: "hold" }, element("i")),
    );
    const button = element("button", { type: "button", class: "key", role: "slider", "aria-orientation": "horizontal" }, card);
    button.addEventListener("focus", () => this.choose(number));
    button.addEventListener("keydown", (event) => this.onKey(event, number));
    button.addEventListener("pointerdown", (event) => this.onGrab(event, number));
    this.track.append(button);
    return button;
  }

  /** @param {number} number */
  choose(number) {
    this.chosen = number;
    this.look();
  }

  /**
   * @param {PointerEvent} event
   * @param {number} number
   */
  onGrab(event, number) {
    if (event.button !== 0) return;
    event.stopPropagation();
    const button = this.buttons[number];
    button.focus({ preventScroll: true });
    this.choose(number);
    const grip = event.clientX - (button.getBoundingClientRect().left + button.getBoundingClientRect().right) / 2;
    const ended = new AbortController();
    button.setPointerCapture(event.pointerId);
    button.classList.add("dragged");
    /** @param {PointerEvent} moved */
    const onMove = (moved) => {
      const track = this.track.getBoundingClientRect(); // in px of the screen: the canvas may be zoomed
      this.move(number, ((moved.clientX - grip - track.left) / track.width) * this.view.last);
    };
    const onEnd = () => {
      ended.abort();
      button.classList.remove("dragged");
      remember();
    };
    button.addEventListener("pointermove", onMove, { signal: ended.signal });
    for (const end of ["pointerup", "pointercancel"]) button.addEventListener(end, onEnd, { signal: ended.signal });
  }

  /**
   * @param {KeyboardEvent} event
   * @param {number} number
   */
  onKey(event, number) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = this.view.keys[number];
    const now = placeOf(this.view, indexOf(this.view, key));
    const far = this.view.step * (event.shiftKey ? BIG : 1);
    const actions = /** @type {Record<string, () => void>} */ ({
      ArrowLeft: () => this.move(number, now - far, -1),
      ArrowRight: () => this.move(number, now + far, 1),
      PageDown: () => this.move(number, now - this.view.step * BIG, -1),
      PageUp: () => this.move(number, now + this.view.step * BIG, 1),
      Home: () => this.move(number, 0, 1),
      End: () => this.move(number, this.view.last, -1),
      ArrowUp: () => this.change("strength", key.strength + STRENGTH_STEP),
      ArrowDown: () => this.change("strength", key.strength - STRENGTH_STEP),
      Delete: () => this.reset(number),
      Backspace: () => this.reset(number),
    });
    if (!(event.key in actions)) return;
    event.preventDefault();
    event.stopPropagation();
    actions[event.key]();
    remember();
  }

  /**
   * @param {number} number
   * @param {number} wanted a frame
   * @param {number} [direction] see freePlace
   */
  move(number, wanted, direction) {
    const key = this.view.keys[number];
    if (!key || key.linked) return;
    const place = freePlace(this.view, key, wanted, direction);
    if (place !== indexOf(this.view, key)) write(key.node, "frame", place === this.view.last ? LAST : place);
    this.look();
  }

  /**
   * @param {"strength" | "until"} name
   * @param {number} value
   */
  change(name, value) {
    const key = this.view.keys[this.chosen];
    if (key) write(key.node, name, Math.round(1000 * Math.min(1, Math.max(0, value))) / 1000);
    this.look();
  }

  /**
   * Everything as a new Keyframe has it; the picture stays connected.
   * @param {number} number
   */
  reset(number) {
    const { node, linked } = this.view.keys[number];
    write(node, "strength", 1);
    write(node, "until", 0);
    if (!linked) this.move(number, 0);
    this.look();
  }
}

/** @param {FrontendNode} node */
function addTimeline(node) {
  const timeline = new Timeline(node);
  const height = () => HEIGHT_PX;
  const options = { serialize: false, getValue: () => "", setValue: () => {}, getMinHeight: height, getMaxHeight: height };
  const widget = node.addDOMWidget("timeline", "vidgen_timeline", timeline.root, options);
  widget.serialize = false;
  node.setSize([Math.max(node.size[0], WIDTH_PX), node.size[1]]);
  let removed = false;
  const onRemoved = node.onRemoved;
  node.onRemoved = function () {
    removed = true;
    onRemoved?.call(this);
  };
  // What it shows belongs to other nodes, which tell nobody when they change; looking is cheap, drawing is not.
  const looking = setInterval(() => {
    if (!timeline.root.isConnected) {
      if (removed) clearInterval(looking);
      return;
    }
    // Undo makes all nodes anew, but Vue leaves the old one's element on the page.
    if (removed) timeline.node = app.canvas.graph?.getNodeById(node.id) ?? node;
    timeline.look();
  }, LOOK_MS);
}

app.registerExtension({
  name: "vidgen.timeline",
  setup() {
    addStyle(STYLE);
  },
  /** @param {FrontendNode} node */
  nodeCreated(node) {
    if (node.comfyClass === HOST) addTimeline(node);
  },
});
