// @ts-check
// What the nodes need in the browser: old workflows restored by name, and errors that say what to do.

// @ts-ignore: served by the frontend
import { app } from "../../../scripts/app.js";
// @ts-ignore: served by the frontend
import { api } from "../../../scripts/api.js";

const PREFIX = "VidGen";
const WIDGET_TYPES = new Set(["INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"]);
const SEEDS = new Set(["seed", "noise_seed"]);
const TOAST_MS = 30000;

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
    `Node ${error.node_id}; its help is under "i" in the node's toolbox.`,
  ];
  const detail = lines.filter(Boolean).join("\n");
  app.extensionManager.toast.add({ severity: "error", summary: parts.what, detail, life: TOAST_MS });
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
