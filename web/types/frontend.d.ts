// What our modules use of ComfyUI's frontend, which serves these modules itself and publishes no types for them.
// Read by the type checker only (jsconfig.json), never by a browser.

declare module "*/scripts/app.js" {
  export const app: any;
}

declare module "*/scripts/api.js" {
  export const api: any;
}

interface FrontendWidget {
  name: string;
  value: any;
  options: Record<string, any>;
  callback?: (value: any) => void;
  serialize?: boolean;
}

interface FrontendInput {
  name: string;
  type: string;
  link: number | null;
  widget?: { name: string };
}

interface FrontendNode {
  id: number | string;
  type: string;
  comfyClass?: string;
  title: string;
  /** 0 runs, 2 is muted, 4 is bypassed */
  mode: number;
  size: [number, number];
  graph: any;
  inputs?: FrontendInput[];
  widgets?: FrontendWidget[];
  /** pictures that the node shows of itself, if it does so already */
  imgs?: HTMLImageElement[];
  onRemoved?: () => void;
  getInputNode(slot: number): FrontendNode | null;
  setSize(size: [number, number]): void;
  addDOMWidget(name: string, type: string, element: HTMLElement, options: Record<string, any>): FrontendWidget;
}
