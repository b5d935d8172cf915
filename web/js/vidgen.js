// @ts-check
// What the nodes need in the browser: old workflows restored by name, and errors that say what to do.

// @ts-ignore: served by the frontend
import { app } from "../../../scripts/app.js";
// @ts-ignore: served by the frontend
import { api } from "../../../scripts/api.js";
import { nodeOf } from "./dom.js";

const PREFIX = "VidGen";
const WIDGET_TYPES = new Set(["INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"]);
const SEEDS = new Set(["seed", "noise_seed"]);
const TOAST_MS = 30000;
const INFO_BUTTON = '[data-testid="info-button"]';
const LOOKS = 10;
const LOOK_MS = 100;

/**
 * The widgets of a node in the order of a workflow's `widgets_values`. Widgets are only ever appended, so today's order
 * reads every older file.
 * @param {any} nodeData what the server says of the node
 * @returns {string[]}
 */
export function widgetNames(nodeData) {
  const names = [];
  for (const group of ["required", "optional"]) {
    for (const [name, spec] of Object.entries(nodeData.input?.[group] ?? {})) {
      const [type, options = {}] = /** @type {[any, any]} */ (spec);
      if (!(Array.isArray(type) || WIDGET_TYPES.has(type)) || options.forceInput) continue;
      names.push(name);
      if (options.control_after_generate ?? (type === "INT" && SEEDS.has(name))) names.push("control_after_generate");
    }
  }
  return names;
}

/**
 * A message of ours in its parts. Inside ComfyUI only the text arrives.
 * @param {any} error the data of `execution_error`
 * @returns {{what: string, given?: string, expected?: string, do?: string} | null} null: not one of our messages
 */
export function partsOf(error) {
  if (error.vidgen) return error.vidgen;
  if (!error.node_type?.startsWith(PREFIX) || !error.exception_type?.endsWith("Error")) return null;
  const text = String(error.exception_message ?? "").trim();
  const found = /^(?<what>.*?)(?:\s+Given: (?<given>.*?)\.)?(?:\s+Expected: (?<expected>.*?)\.)?(?:\s+What to do: (?<do>.*?)\.)?$/s.exec(text);
  return /** @type {any} */ (found?.groups ?? { what: text });
}

/** @param {any} error the data of `execution_error` */
function showError(error) {
  const parts = partsOf(error);
  if (!parts) return;
  const lines = [
    parts.given && `Given: ${parts.given}`,
    parts.expected && `Expected: ${parts.expected}`,
    parts.do && `What to do: ${parts.do}`,
  ];
  const { toast } = app.extensionManager;
  if (!toast.error) {
    // A frontend whose toasts have no buttons.
    const detail = [...lines, `Node ${error.node_id}; its help is under "i" in the node's toolbox.`];
    toast.add({ severity: "error", summary: parts.what, detail: detail.filter(Boolean).join("\n"), life: TOAST_MS });
    return;
  }
  const action = { label: `Help on node ${error.node_id}`, onClick: () => showHelp(error.node_id, error.node_type) };
  toast.error(parts.what, { description: lines.filter(Boolean).join("\n"), duration: TOAST_MS, action });
}

/**
 * The node's page: in the frontend's own panel if it has one, else on a page of its own.
 * @param {string} id
 * @param {string} type
 */
async function showHelp(id, type) {
  const node = nodeOf(id);
  if (node?.graph && node.graph === app.canvas.graph) {
    app.canvas.selectNode(node);
    app.canvas.centerOnNode?.(node);
    for (let look = 0; look < LOOKS; look++) {
      const button = document.querySelector(INFO_BUTTON);
      if (button instanceof HTMLElement) return button.click();
      await new Promise((done) => setTimeout(done, LOOK_MS)); // the toolbox comes with the selection
    }
  }
  window.open(new URL(`../docs/${type}.md`, import.meta.url), "_blank", "noopener");
}

app.registerExtension({
  name: "vidgen.nodes",
  /**
   * @param {any} _nodeType
   * @param {any} nodeData
   */
  beforeRegisterNodeDef(_nodeType, nodeData) {
    if (nodeData.name?.startsWith(PREFIX)) nodeData.fallbackWidgetsValuesNames ??= widgetNames(nodeData);
  },
  setup() {
    api.addEventListener("execution_error", (/** @type {CustomEvent} */ event) => showError(event.detail));
  },
});
