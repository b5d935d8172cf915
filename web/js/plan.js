// @ts-check
// The plan badge: what a render will take, on the loader, the sampler and the decoder, while widgets change.
//
// The server plans (POST /vidgen/plan); this asks it again when the graph has changed and then rested for a moment.

// @ts-ignore: served by the frontend
import { app } from "../../../scripts/app.js";
// @ts-ignore: served by the frontend
import { api } from "../../../scripts/api.js";
import { addStyle, amount, duration, element, filled, inLanguage, nodeOf } from "./dom.js";

const SAMPLER = "VidGenSampler";
const WIDGET = "$$vidgen_plan";
const LOOK_MS = 400;
const REST_MS = 500;
/** the graph has not changed for so long before the server is asked */
const ADVICE_REST_MS = 1200;
/** sizes that fit take the server longer to find */
const MARGIN_PX = 6;
const EVERYTHING = "all";

const ENGLISH = {
  costs: "{peak} of {budget} · about {time}",
  stage: "{peak} · about {time}",
  size: "{frames} frames · {width} × {height} px · {steps} steps",
  wrong: "Does not fit: {peak} of {budget}",
  advice: "Use fewer frames or a smaller size.",
  nearest: "What fits: {sizes}",
  shape: "{frames} frames of {width} × {height} px",
  or: ", or ",
  label: "Plan",
};

const TEXTS = {
  en: ENGLISH,
  zh: {
    costs: "{peak} / {budget} · 约 {time}",
    stage: "{peak} · 约 {time}",
    size: "{frames} 帧 · {width} × {height} px · {steps} 步",
    wrong: "内存不足:{peak} / {budget}",
    advice: "请减少帧数或缩小尺寸。",
    nearest: "可行:{sizes}",
    shape: "{width} × {height} px,{frames} 帧",
    or: ",或 ",
    label: "预估",
  },
};

const STYLE = `
.vidgen-plan { overflow: hidden; font: 11px/1.45 Inter, Arial, sans-serif; }
.vidgen-plan > div { display: grid; gap: 1px; padding: 5px 8px 6px; border-radius: 6px; color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); user-select: text; }
.vidgen-plan .cost { font-weight: 600; font-variant-numeric: tabular-nums; }
.vidgen-plan .size, .vidgen-plan .advice { color: var(--descrip-text, #999); }
.vidgen-plan .bar { height: 3px; margin-top: 4px; border-radius: 2px; overflow: hidden;
  background: color-mix(in srgb, var(--descrip-text, #999) 30%, transparent); }
.vidgen-plan .bar > div { height: 100%; border-radius: 2px; background: #3fa66a; }
.vidgen-plan .tight .bar > div { background: #d9a13b; }
.vidgen-plan > .wrong { color: #fff; background: #a3262a; border-color: #e5484d; }
.vidgen-plan > .wrong .size, .vidgen-plan > .wrong .advice { color: #ffdcdc; }
.vidgen-plan > .wrong .bar { display: none; }
.vidgen-plan :empty:not(.bar > div) { display: none; }
`;

/**
 * @typedef {{name: string, way: string, why: string, peak_bytes: number, seconds: number}} Stage
 * @typedef {{frames: number, width: number, height: number}} Shape
 * @typedef {Shape & {steps: number}} Subject
 * @typedef {{what: string, given?: string, expected?: string, do?: string}} Problem
 * @typedef {{badges: Record<string, string>, problem?: Problem, fits: boolean, peak_bytes: number,
 *   budget_bytes: number, seconds: number, subject: Subject, stages: Stage[], nearest: Shape[]}} Plan
 * @typedef {{state: "fits" | "tight" | "wrong", cost: string, size?: string, advice?: string, share?: number,
 *   more: string}} Face what a badge shows
 */

/** What is drawn on a node. */
class Badge {
  /** @param {any} node */
  constructor(node) {
    this.node = node;
    this.height = 0;
    this.inner = element("div");
    this.root = element("div", { class: "vidgen-plan", role: "status" }, this.inner);
    this.widget = node.addDOMWidget(WIDGET, "vidgen_plan", this.root, {
      serialize: false, // not in the prompt
      hideOnZoom: true,
      margin: MARGIN_PX,
      getValue: () => "",
      getMinHeight: () => this.height && this.height + 2 * MARGIN_PX,
      getMaxHeight: () => this.height && this.height + 2 * MARGIN_PX,
    });
    this.widget.serialize = false; // nor in the workflow
    new ResizeObserver(() => this.fit()).observe(this.inner);
  }

  /** @param {Face} face */
  show(face) {
    const texts = inLanguage(TEXTS);
    const bar = element("div", { class: "bar" });
    if (face.share !== undefined) {
      const filledPart = element("div");
      filledPart.style.width = `${Math.min(100, Math.max(2, 100 * face.share))}%`;
      bar.append(filledPart);
    }
    this.inner.className = face.state;
    this.inner.title = face.more;
    this.inner.setAttribute("aria-label", texts.label);
    this.inner.replaceChildren(
      element("span", { class: "cost" }, face.cost),
      element("span", { class: "size" }, face.size ?? ""),
      element("span", { class: "advice" }, face.advice ?? ""),
      bar,
    );
    this.root.hidden = false;
    requestAnimationFrame(() => this.fit());
  }

  hide() {
    this.root.hidden = true;
    this.height = 0;
    this.node.setDirtyCanvas?.(true, true);
  }

  /** Room on the node for what is shown. */
  fit() {
    const height = this.root.hidden ? 0 : this.inner.offsetHeight;
    if (!height || height === this.height) return; // not on the page: as it was
    this.height = height;
    const [, least] = this.node.computeSize();
    if (this.node.size[1] < least) this.node.setSize([this.node.size[0], least]);
    this.node.setDirtyCanvas?.(true, true);
  }
}

/** @type {WeakMap<any, Badge>} */
const badges = new WeakMap();

/**
 * @param {Plan} plan
 * @param {string} stage
 * @returns {Face | null} null: nothing to say there
 */
export function faceOf(plan, stage) {
  const texts = inLanguage(TEXTS);
  if (plan.problem) {
    const { what, given, expected } = plan.problem;
    const advice = [plan.problem.do, expected].filter(Boolean).join("; ");
    const more = [what, given, expected].filter(Boolean).join("\n");
    return stage === EVERYTHING ? { state: "wrong", cost: what, advice, more } : null;
  }
  const shown = stage === EVERYTHING ? plan : plan.stages.find((one) => one.name === stage);
  if (!shown) return null;
  const figures = {
    peak: amount(shown.peak_bytes),
    budget: amount(plan.budget_bytes),
    time: duration(shown.seconds),
  };
  const lines = plan.stages.map((one) => {
    const cost = filled(texts.stage, { peak: amount(one.peak_bytes), time: duration(one.seconds) });
    return `${one.name}: ${cost}\n    ${one.way}: ${one.why}`;
  });
  const face = { more: lines.join("\n"), size: filled(texts.size, plan.subject) };
  if (shown.peak_bytes > plan.budget_bytes) {
    const sizes = plan.nearest.map((size) => filled(texts.shape, size)).join(texts.or);
    const advice = sizes ? filled(texts.nearest, { sizes }) : texts.advice;
    return { ...face, state: "wrong", cost: filled(texts.wrong, figures), advice };
  }
  const share = shown.peak_bytes / plan.budget_bytes;
  const state = share > 0.9 ? "tight" : "fits";
  if (stage === EVERYTHING) return { ...face, state, cost: filled(texts.costs, figures), share };
  const { way } = /** @type {Stage} */ (shown);
  return { ...face, state, cost: filled(texts.stage, figures), size: way, share };
}

/**
 * Which plan a node shows that is in several: one that cannot be, else the one that takes most.
 * @param {Plan[]} plans
 * @returns {Map<string, Face>} node id -> what it shows
 */
export function facesOf(plans) {
  const weight = (/** @type {Plan} */ plan) => (plan.problem ? Infinity : plan.peak_bytes / plan.budget_bytes);
  /** @type {Map<string, Face>} */
  const faces = new Map();
  for (const plan of [...plans].sort((a, b) => weight(a) - weight(b))) {
    for (const [id, stage] of Object.entries(plan.badges)) {
      const face = faceOf(plan, stage);
      if (face) faces.set(id, face);
    }
  }
  return faces;
}

/** @type {Set<Badge>} */
let shown = new Set();

/** @param {Plan[]} plans */
function draw(plans) {
  const before = shown;
  shown = new Set();
  for (const [id, face] of facesOf(plans)) {
    const node = nodeOf(id);
    if (!node) continue;
    const badge = badges.get(node) ?? new Badge(node);
    badges.set(node, badge);
    badge.show(face);
    shown.add(badge);
  }
  for (const badge of before) if (!shown.has(badge)) badge.hide();
}

// --- when to ask -----------------------------------------------------------------------------------------------------

/**
 * @param {any} graph
 * @returns {Generator<any>} its nodes, and those of its subgraphs
 */
function* nodesIn(graph) {
  for (const node of graph?._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* nodesIn(node.subgraph);
  }
}

/** Everything that a plan may depend on, as one text; empty where there is nothing to plan. */
function fingerprint() {
  const parts = [];
  let isOurs = false;
  for (const node of nodesIn(app.rootGraph ?? app.graph)) {
    isOurs ||= node.type === SAMPLER;
    const links = (node.inputs ?? []).map((/** @type {any} */ one) => one.link);
    const widgets = (node.widgets ?? []).filter((/** @type {any} */ one) => one.serialize !== false);
    const values = widgets.map((/** @type {any} */ one) => one.value);
    parts.push([node.id, node.type, node.mode, ...links, ...values].join("\u0001"));
  }
  return isOurs ? parts.join("\u0002") : "";
}

const seen = { fingerprint: "", at: 0, answered: "", advised: "" };
let isAsking = false;
let isOffered = true;

/**
 * @param {boolean} nearest whether to look for sizes that fit
 * @returns {Promise<Plan[] | null>} null: the server has no plans
 */
async function ask(nearest) {
  const { output } = await app.graphToPrompt();
  const body = JSON.stringify({ prompt: output, nearest });
  const headers = { "Content-Type": "application/json" };
  const response = await api.fetchApi("/vidgen/plan", { method: "POST", body, headers });
  if (response.status === 404 || response.status === 405) isOffered = false;
  return response.ok ? (await response.json()).plans : null;
}

async function look() {
  if (isAsking || !isOffered || document.hidden) return;
  const now = performance.now();
  const found = fingerprint();
  if (found !== seen.fingerprint) {
    seen.fingerprint = found;
    seen.at = now;
  }
  const rested = now - seen.at;
  const isNew = seen.answered !== found && rested >= REST_MS;
  const isAdvising = !isNew && seen.answered === found && seen.advised === found && rested >= ADVICE_REST_MS;
  if (!isNew && !isAdvising) return;
  isAsking = true;
  try {
    const plans = found ? await ask(isAdvising) : [];
    seen.answered = found;
    const isOpen = !isAdvising && plans?.some((plan) => !plan.problem && !plan.fits);
    seen.advised = isOpen ? found : "";
    if (plans && fingerprint() === found) draw(plans);
  } catch (error) {
    // A server that is away, or a node of somebody that cannot tell its values: there is no plan then.
    console.warn("VidGen: no plan", error);
    seen.answered = found;
  } finally {
    isAsking = false;
  }
}

app.registerExtension({
  name: "vidgen.plan",
  setup() {
    addStyle(STYLE);
    setInterval(look, LOOK_MS);
  },
});
