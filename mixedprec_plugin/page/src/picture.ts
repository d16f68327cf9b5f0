// What treemap and grid share: cells of layers in rectangles, marks on them, and the canvas below.
import type { Plan } from "./document";
import type { Measure } from "./scale";

/** Layers in one rectangle, CSS pixels. */
export interface Cell { x: number; y: number; w: number; h: number; layers: number[] }

/** What a picture draws and answers, whatever is in it. */
export interface Picture {
  width: number;
  height: number;
  draw: (context: CanvasRenderingContext2D, look: Look) => void;
  /** The cell at a place, or none. */
  at: (x: number, y: number) => Cell | null;
  /** The cell of a layer, or none. */
  of: (layer: number) => Cell | null;
  /** The cell that an arrow key leads to. */
  next: (cell: Cell, key: string, isFar: boolean) => Cell | null;
  first: () => Cell | null;
}

export interface Look {
  plan: Plan;
  measure: Measure;
  /** The colour of each layer's value. */
  colors: string[];
  /** 1 for each layer that is shown at its full strength; null for all. */
  lit: Uint8Array | null;
  selected: number;
  faulty: Uint8Array;
  ink: string; muted: string; surface: string; error: string; warning: string;
}

/** The mean of what is known of the layers. */
export function meanOf(layers: number[], value: (i: number) => number): number {
  let [sum, count] = [0, 0];
  for (const i of layers) {
    const v = value(i);
    if (Number.isFinite(v)) { sum += v; count++; }
  }
  return count ? sum / count : NaN;
}

export const DIM = 0.13;

export function outline(context: CanvasRenderingContext2D, cell: Cell, look: Look): void {
  const place = [cell.x - 1, cell.y - 1, cell.w + 2, cell.h + 2] as const;
  context.lineWidth = 4;
  context.strokeStyle = look.surface;
  context.strokeRect(...place);
  context.lineWidth = 2;
  context.strokeStyle = look.ink;
  context.strokeRect(...place);
}

export function clipped(context: CanvasRenderingContext2D, text: string, width: number): string {
  if (context.measureText(text).width <= width) return text;
  let low = 0;
  for (let high = text.length; low < high; ) {
    const middle = (low + high + 1) >> 1;
    if (context.measureText(`${text.slice(0, middle)}…`).width <= width) low = middle;
    else high = middle - 1;
  }
  return low > 1 ? `${text.slice(0, low)}…` : "";
}
