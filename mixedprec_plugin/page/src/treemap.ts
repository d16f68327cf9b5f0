// Bytes as areas: part of the block > layer > block > runs of experts that are alike.
import { hierarchy, treemap, treemapDice, treemapSlice, treemapSquarify, type HierarchyRectangularNode } from "d3-hierarchy";
import { bytesText, shortName, towerOf, type Plan } from "./document";
import { bitsOf, summaryOf, type State } from "./edits";
import { clipped, DIM, meanOf, outline, type Cell, type Look, type Picture } from "./picture";
import { inkOn, type Measure } from "./scale";

/** What fills the map: everything, a part, a layer of all blocks, or one of a block. */
export interface Focus { part?: string; template?: number; block?: number }

interface Node { name: string; children?: Node[]; layers?: number[]; bytes?: number; level: "root" | "part" | "template" | "block" | "leaf" }
const squarify = treemapSquarify.ratio(1.2);
type Rect = HierarchyRectangularNode<Node>;

export function partOf(template: string, hasTowers: boolean): string {
  const short = shortName(template);
  const at = short.lastIndexOf(".");
  const part = at < 0 ? (towerOf(template) ? short : "outside of blocks") : short.slice(0, at);
  return hasTowers && towerOf(template) ? `${towerOf(template)} ${part}` : part;
}

export const towersOf = (plan: Plan) => new Set(plan.doc.layers.map((t) => towerOf(t.name)).filter(Boolean)).size > 1;

function leaves(state: State, first: number, count: number, isEach: boolean): Node[] {
  const groups = new Map<string, number[]>();
  for (let i = first; i < first + count; i++) {
    if (!state.bytes[i]) continue;
    const key = isEach ? String(i) : `${state.plan.form[i]}/${state.chosen[i]}`;
    const group = groups.get(key);
    group ? group.push(i) : groups.set(key, [i]);
  }
  const alike = [...groups.values()];
  // stripes of few bits first, in every block
  if (!isEach) alike.sort((a, b) => (bitsOf(state, a[0]) || 0) - (bitsOf(state, b[0]) || 0));
  return alike.map((layers) => ({
    name: isEach ? String(state.plan.expert[layers[0]]) : "", layers, level: "leaf" as const,
    bytes: layers.reduce((sum, i) => sum + state.bytes[i], 0),
  }));
}

function tree(state: State, focus: Focus): Node {
  const { plan } = state;
  const hasTowers = towersOf(plan);
  const parts = new Map<string, Node>();
  plan.doc.layers.forEach((template, index) => {
    const part = partOf(template.name, hasTowers);
    if (focus.part !== undefined && part !== focus.part) return;
    if (focus.template !== undefined && index !== focus.template) return;
    const blocks = template.rows
      .map((r) => plan.rowOf(index, r[0])!)
      .filter((row) => focus.block === undefined || row.block === focus.block)
      .map((row) => ({ name: row.block < 0 ? "" : String(row.block), level: "block" as const,
        children: leaves(state, row.first, row.count, focus.block !== undefined) }))
      .filter((block) => block.children.length);
    if (!blocks.length) return;
    const name = shortName(template.name).split(".").pop()!;
    if (!parts.has(part)) parts.set(part, { name: part, level: "part", children: [] });
    parts.get(part)!.children!.push({ name, level: "template", children: blocks });
  });
  return { name: "", level: "root", children: [...parts.values()] };
}

export function treemapPicture(state: State, focus: Focus, width: number, height: number): Picture {
  const root = hierarchy<Node>(tree(state, focus)).sum((node) => node.bytes ?? 0);
  // parts and layers by size; blocks stay in the model's order
  root.each((node) => {
    if (node.data.level === "root" || node.data.level === "part") node.children?.sort((a, b) => (b.value ?? 0) - (a.value ?? 0));
  });
  const titled = (node: Rect, least: number) => node.x1 - node.x0 > 34 && node.y1 - node.y0 > least;
  const laid = treemap<Node>()
    .tile((node, x0, y0, x1, y1) => {
      const isStriped = node.data.level === "block" && focus.block === undefined;
      (isStriped ? (x1 - x0 > y1 - y0 ? treemapDice : treemapSlice) : squarify)(node, x0, y0, x1, y1);
    }).size([width, height]).round(true)
    .paddingInner((node) => ({ root: 4, part: 2, template: 1, block: 0, leaf: 0 })[node.data.level])
    .paddingTop((node) => (node.data.level === "part" && titled(node as Rect, 40) ? 19 : node.data.level === "template" && titled(node as Rect, 34) ? 15 : 0))(root);
  const cells: Cell[] = [];
  const cellOf = new Int32Array(state.plan.size).fill(-1);
  for (const leaf of laid.leaves()) {
    if (!leaf.data.layers || leaf.x1 <= leaf.x0 || leaf.y1 <= leaf.y0) continue;
    for (const i of leaf.data.layers) cellOf[i] = cells.length;
    cells.push({ x: leaf.x0, y: leaf.y0, w: leaf.x1 - leaf.x0, h: leaf.y1 - leaf.y0, layers: leaf.data.layers });
  }
  return {
    width, height,
    draw: (context, look) => draw(context, look, laid, cells, cellOf, state),
    at: (x, y) => cells.find((c) => x >= c.x && x < c.x + c.w && y >= c.y && y < c.y + c.h) ?? null,
    of: (layer) => cells[cellOf[layer]] ?? null,
    first: () => cells[0] ?? null,
    next: (cell, key, isFar) => nearestCell(cells, cell, key, isFar ? 4 : 1),
  };
}

/** The nearest cell to one side. */
function nearestCell(cells: Cell[], from: Cell, key: string, steps: number): Cell | null {
  const sideways = key === "ArrowLeft" || key === "ArrowRight";
  const sign = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
  let now = from;
  for (let step = 0; step < steps; step++) {
    const [x, y] = [now.x + now.w / 2, now.y + now.h / 2];
    let best: Cell | null = null;
    let least = Infinity;
    for (const cell of cells) {
      const [dx, dy] = [cell.x + cell.w / 2 - x, cell.y + cell.h / 2 - y];
      const [along, across] = sideways ? [sign * dx, Math.abs(dy)] : [sign * dy, Math.abs(dx)];
      if (along > 0.5 && along + 3 * across < least) [best, least] = [cell, along + 3 * across];
    }
    if (!best) return step ? now : null;
    now = best;
  }
  return now;
}

function draw(context: CanvasRenderingContext2D, look: Look, root: Rect, cells: Cell[], cellOf: Int32Array, state: State): void {
  const colors = colorsOf(cells, look);
  const [isLit, isFaulty] = [new Uint8Array(cells.length), new Uint8Array(cells.length)];
  for (let i = 0; i < cellOf.length; i++) {
    if (cellOf[i] < 0) continue;
    if (!look.lit || look.lit[i]) isLit[cellOf[i]] = 1;
    if (look.faulty[i] === 2) isFaulty[cellOf[i]] = 1;
  }
  for (let k = 0; k < cells.length; k++) {
    const [cell, color] = [cells[k], colors[k]];
    context.globalAlpha = isLit[k] ? 1 : DIM;
    context.fillStyle = color;
    context.fillRect(cell.x, cell.y, cell.w, cell.h);
    if (isFaulty[k] && cell.w > 3 && cell.h > 3) {
      context.strokeStyle = look.error;
      context.lineWidth = 2;
      context.strokeRect(cell.x + 1, cell.y + 1, cell.w - 2, cell.h - 2);
    }
    // a word where there is room for it, and it can be read
    if (isLit[k] && cell.w > 64 && cell.h > 30) label(context, cell, state, inkOn(color));
  }
  context.globalAlpha = 1;
  titles(context, look, root);
  const chosen = look.selected < 0 ? undefined : cells[cellOf[look.selected]];
  if (chosen) outline(context, chosen, look);
}

const known = new WeakMap<Measure, { cells: Cell[]; colors: string[] }>();

/** The colour of each cell's mean; kept until the measure or the map is another. */
function colorsOf(cells: Cell[], { measure }: Look): string[] {
  let found = known.get(measure);
  if (found?.cells !== cells) {
    found = { cells, colors: cells.map((cell) => measure.color(meanOf(cell.layers, measure.value))) };
    known.set(measure, found);
  }
  return found.colors;
}

function label(context: CanvasRenderingContext2D, cell: Cell, state: State, ink: string): void {
  const [i] = cell.layers;
  const bytes = cell.layers.reduce((sum, each) => sum + state.bytes[each], 0);
  context.fillStyle = ink;
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "top";
  const block = state.plan.block[i];
  const head = summaryOf(state, i) || "as stored";
  context.fillText(clipped(context, block < 0 ? head : `${block}  ${head}`, cell.w - 10), cell.x + 5, cell.y + 5);
  if (cell.h > 44) context.fillText(clipped(context, bytesText(bytes), cell.w - 10), cell.x + 5, cell.y + 20);
}

function titles(context: CanvasRenderingContext2D, look: Look, root: Rect): void {
  context.textBaseline = "middle";
  root.each((node) => {
    const { level, name } = node.data;
    const width = node.x1 - node.x0;
    const isPart = level === "part" && width > 34 && node.y1 - node.y0 > 40;
    if (!isPart && !(level === "template" && width > 34 && node.y1 - node.y0 > 34)) return;
    context.font = isPart ? "600 12px system-ui, sans-serif" : "11px system-ui, sans-serif";
    context.fillStyle = isPart ? look.ink : look.muted;
    const size = bytesText(node.value ?? 0);
    const whole = `${name}   ${size}`;
    const text = context.measureText(whole).width <= width - 6 ? whole : name;
    context.fillText(clipped(context, text, width - 4), node.x0 + 1, node.y0 + (isPart ? 9 : 7));
  });
}
