// @ts-check
// What our modules share: elements, styles, the user's language, and figures as a person writes them.

// @ts-ignore: served by the frontend
import { app } from "../../../scripts/app.js";

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, any>} [properties] `class` and names with a dash are attributes, all others are properties
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class" || name.includes("-")) made.setAttribute(name, value);
    else /** @type {any} */ (made)[name] = value;
  }
  made.append(...children);
  return made;
}

/** @param {string} css put into the page once */
export function addStyle(css) {
  document.head.append(element("style", {}, css));
}

/**
 * The texts of the user's language, else the English ones.
 * @template T
 * @param {{en: T} & Record<string, T>} texts
 * @returns {T}
 */
export function inLanguage(texts) {
  const chosen = String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");
  return texts[chosen] ?? texts[chosen.split("-")[0]] ?? texts.en;
}

/**
 * @param {string} text with `{name}` where a value goes
 * @param {Record<string, any>} values
 */
export function filled(text, values) {
  return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** @param {number} bytes */
export function amount(bytes) {
  if (bytes < 1e9) return `${Math.round(bytes / 1e6)} MB`;
  return `${(bytes / 1e9).toFixed(bytes < 1e10 ? 1 : 0)} GB`;
}

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

/**
 * The node of an id in a prompt; those of nodes in subgraphs are `12:3`.
 * @param {string} id
 * @returns {any} undefined where it is gone
 */
export function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(/^\d+$/.test(part) ? Number(part) : part);
    graph = node?.subgraph;
  }
  return node ?? undefined;
}
