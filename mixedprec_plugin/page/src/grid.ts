// Blocks downwards, layers across, experts as thin columns whose projections lie below each other.
import { shortName, towerOf, type Plan } from "./document";
import { clipped, DIM, meanOf, outline, type Cell, type Look, type Picture } from "./picture";

interface Column { title: string; x: number; w: number; templates: number[]; bins: number; experts: number }
/** First layer and how many. */
type Range = [first: number, count: number];
/** The layers of each bin of a column in a block and a projection. */
type LayersAt = (s: Section, c: Column, b: number, part: number) => (bin: number) => Range | null;
interface Section { tower: string; y: number; head: number; rowHeight: number; blocks: number[]; columns: Column[] }

const LEFT = 30;
const GAP = 14;

/** Templates that are worth a column: with a matrix, or with a fault. */
function shown(plan: Plan): number[] {
  const useful = new Set<number>();
  for (const row of plan.rows)
    for (let i = row.first; i < row.first + row.count && plan.doc.layers[row.template].kind !== "draft"; i++) {
      const form = plan.formOf(i);
      if (form.shape?.[0] || form.problems.length) { useful.add(row.template); break; }
    }
  const rank = (k: number) => {
    const name = shortName(plan.doc.layers[k].name);
    return (/attn|attention|mixer/.test(name) ? 0 : /experts/.test(name) ? 4 : 2) + (/(^|[._])(o_proj|out_proj|down_proj|w2)$/.test(name) ? 1 : 0);
  };
  const order = (k: number) => ["q_proj", "k_proj", "v_proj"].indexOf(shortName(plan.doc.layers[k].name).split(".").pop()!);
  // as a token passes them, as far as names tell
  return plan.doc.layers.map((_, k) => k).filter((k) => useful.has(k)).sort((a, b) => rank(a) - rank(b) || order(a) - order(b) || a - b);
}

/** Columns of a tower, experts' projections as one; as wide as there is room. */
function columnsOf(plan: Plan, templates: number[], width: number): Column[] {
  const groups = new Map<string, { templates: number[]; experts: number }>();
  for (const k of templates) {
    const { name, module, rows } = plan.doc.layers[k];
    const experts = Math.max(...rows.map((r) => (typeof r[1] === "number" ? r[1] : Math.max(...r[1]) + 1)));
    const key = experts ? module : name;
    const group = groups.get(key) ?? { templates: [], experts };
    group.templates.push(k);
    groups.set(key, group);
  }
  const all = [...groups];
  const single = all.filter(([, g]) => !g.experts).length;
  const wide = all.length - single;
  const narrow = wide ? (width < 600 ? 9 : 20) : Math.min(112, (width - LEFT) / Math.max(single, 1) - 2);
  const room = width - LEFT - single * (narrow + 2) - wide * 12;
  let x = LEFT;
  return all.map(([name, { templates: own, experts }]) => {
    const bins = experts ? Math.max(1, Math.min(experts, Math.floor(room / wide))) : 1;
    const w = experts ? Math.min(room / wide, experts * 14) : narrow;
    if (experts && x > LEFT) x += 4;
    const column = { title: shortName(name), x, w, templates: own, bins, experts };
    x += w + (experts ? 8 : 2);
    return column;
  });
}

/** Whether titles stand on end, as columns are too narrow for them. */
const isUpright = (columns: Column[]) => columns.some((c) => !c.experts && c.w < 6 * c.title.length);

function layout(plan: Plan, width: number): { sections: Section[]; height: number } {
  const use = shown(plan);
  const towers = [...new Set(use.map((k) => towerOf(plan.doc.layers[k].name)))];
  const sections: Section[] = [];
  let y = 0;
  for (const tower of towers.sort((a, b) => Number(!b) - Number(!a))) {
    const templates = use.filter((k) => towerOf(plan.doc.layers[k].name) === tower);
    const blocks = [...new Set(templates.flatMap((k) => plan.doc.layers[k].rows.map((r) => r[0])))].sort((a, b) => a - b);
    if (!tower) {
      // embedding and head: a cell each, with its name in it
      const w = Math.min(180, (width - LEFT) / templates.length - 4);
      const columns = templates.map((k, n) => ({
        title: shortName(plan.doc.layers[k].name), x: LEFT + n * (w + 4), w, templates: [k], bins: 1, experts: 0,
      }));
      sections.push({ tower, y: y + 2, head: 0, rowHeight: 22, blocks, columns });
      y += 24 + GAP;
      continue;
    }
    const columns = columnsOf(plan, templates, width);
    const parts = Math.max(...columns.map((c) => (c.experts ? c.templates.length : 1)));
    const rowHeight = Math.max(blocks.length > 40 ? 11 : 14, parts * 4);
    const longest = Math.max(0, ...columns.filter((c) => !c.experts).map((c) => c.title.length));
    const head = isUpright(columns) ? Math.min(170, 16 + 6.2 * longest) : 34;
    sections.push({ tower, y: y + head, head, rowHeight, blocks, columns });
    y += head + blocks.length * (rowHeight + 1) + GAP;
  }
  return { sections, height: y };
}

export function gridPicture(plan: Plan, width: number): Picture {
  const { sections, height } = layout(plan, width);
  const layersAt: LayersAt = (s, c, b, part) => {
    const row = plan.rowOf(c.templates[part], s.blocks[b]);
    if (!row) return () => null;
    if (!c.experts) return () => [row.first, 1];
    // some models have experts in some places only
    const whole = row.count === c.experts;
    const experts = whole ? null : plan.expert.subarray(row.first, row.first + row.count);
    return (bin) => {
      const [low, high] = [Math.ceil((bin * c.experts) / c.bins), Math.ceil(((bin + 1) * c.experts) / c.bins)];
      if (!experts) return [row.first + low, high - low];
      const [first, end] = [experts.findIndex((e) => e >= low), experts.findIndex((e) => e >= high)];
      const count = (end < 0 ? experts.length : end) - first;
      return first < 0 || count <= 0 ? null : [row.first + first, count];
    };
  };
  // the cell of a column, its block and its bin of experts; its part is the projection
  const cell = (s: Section, c: Column, b: number, bin: number, part: number): Cell | null => {
    const layers = layersAt(s, c, b, part)(bin);
    if (!layers) return null;
    const [w, h] = [c.w / c.bins, s.rowHeight / c.templates.length];
    const y = s.y + b * (s.rowHeight + 1) + part * h;
    const [x, end] = [Math.round(c.x + bin * w), Math.round(c.x + (bin + 1) * w)];
    return { x, y, w: end - x, h, layers: Array.from({ length: layers[1] }, (_, k) => layers[0] + k) };
  };
  const at = (x: number, y: number): Cell | null => {
    for (const s of sections) {
      const b = Math.floor((y - s.y) / (s.rowHeight + 1));
      if (b < 0 || b >= s.blocks.length) continue;
      const c = s.columns.find((each) => x >= each.x && x < each.x + each.w);
      if (!c) return null;
      const part = Math.min(c.templates.length - 1, Math.floor(((y - s.y - b * (s.rowHeight + 1)) * c.templates.length) / s.rowHeight));
      return cell(s, c, b, Math.floor(((x - c.x) * c.bins) / c.w), part);
    }
    return null;
  };
  const of = (layer: number): Cell | null => {
    for (const s of sections)
      for (const c of s.columns) {
        const part = c.templates.indexOf(plan.template[layer]);
        if (part < 0) continue;
        const bin = c.experts ? Math.floor((plan.expert[layer] * c.bins) / c.experts) : 0;
        return cell(s, c, s.blocks.indexOf(plan.block[layer]), bin, part);
      }
    return null;
  };
  const next = (from: Cell, key: string, isFar: boolean): Cell | null => {
    const sign = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
    const sideways = key === "ArrowLeft" || key === "ArrowRight";
    let [x, y] = [from.x + from.w / 2, from.y + from.h / 2];
    let now: Cell | null = null;
    for (let left = isFar ? 8 : 1; left > 0; ) {
      if (sideways) x += sign * Math.max(1, (now ?? from).w / 2);
      else y += sign * Math.max(1, (now ?? from).h / 2);
      if (x < 0 || y < 0 || x > width || y > height) break;
      const found = at(x, y);
      if (found && found.layers[0] !== (now ?? from).layers[0]) { now = found; left--; [x, y] = [found.x + found.w / 2, found.y + found.h / 2]; }
    }
    return now;
  };
  return {
    width, height, at, of, next,
    first: () => { const s = sections[sections.length - 1]; return s ? cell(s, s.columns[0], 0, 0, 0) : null; },
    draw: (context, look) => draw(context, look, sections, layersAt, of),
  };
}

function draw(context: CanvasRenderingContext2D, look: Look, sections: Section[], layersAt: LayersAt, of: (layer: number) => Cell | null): void {
  for (const s of sections) {
    heads(context, look, s);
    for (const c of s.columns) (c.experts ? experts : single)(context, look, s, c, layersAt);
  }
  context.globalAlpha = 1;
  const chosen = look.selected < 0 ? null : of(look.selected);
  if (chosen) outline(context, chosen, look);
}

/** A column of one layer in each block. */
function single(context: CanvasRenderingContext2D, look: Look, s: Section, c: Column, layersAt: LayersAt): void {
  s.blocks.forEach((_, b) => {
    const layers = layersAt(s, c, b, 0)(0);
    if (!layers) return;
    const y = s.y + b * (s.rowHeight + 1);
    context.globalAlpha = !look.lit || look.lit[layers[0]] ? 1 : DIM;
    context.fillStyle = look.colors[layers[0]];
    context.fillRect(c.x, y, c.w, s.rowHeight);
    if (look.faulty[layers[0]] !== 2) return;
    context.strokeStyle = look.error;
    context.lineWidth = 2;
    context.strokeRect(c.x + 1, y + 1, c.w - 2, s.rowHeight - 2);
  });
  context.globalAlpha = 1;
}

/** A column of experts: a pixel for each, in an image that is stretched; tens of thousands are drawn at once. */
function experts(context: CanvasRenderingContext2D, look: Look, s: Section, c: Column, layersAt: LayersAt): void {
  const parts = c.templates.length;
  const image = new ImageData(c.bins, s.blocks.length * parts);
  const pixels = new DataView(image.data.buffer);
  const error = rgb(look.error);
  const of = new Map<string, number>();
  s.blocks.forEach((_, b) => {
    for (let part = 0; part < parts; part++) {
      const at = layersAt(s, c, b, part);
      for (let bin = 0; bin < c.bins; bin++) {
        const layers = at(bin);
        if (!layers) continue;
        const [first, count] = layers;
        let [numLit, isFaulty] = [0, false];
        for (let i = first; i < first + count; i++) {
          if (!look.lit || look.lit[i]) numLit++;
          if (look.faulty[i] === 2) isFaulty = true;
        }
        const color = count === 1 ? look.colors[first] : look.measure.color(meanOf(Array.from({ length: count }, (_x, k) => first + k), look.measure.value));
        let value = of.get(color);
        if (value === undefined) of.set(color, (value = rgb(color)));
        const strength = numLit ? Math.max(numLit / count, 0.4) : DIM;
        pixels.setUint32(4 * ((b * parts + part) * c.bins + bin), ((isFaulty ? error : value) << 8 | Math.round(255 * strength)) >>> 0);
      }
    }
  });
  const small = new OffscreenCanvas(image.width, image.height);
  small.getContext("2d")!.putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  s.blocks.forEach((_, b) => {
    context.drawImage(small, 0, b * parts, c.bins, parts, c.x, s.y + b * (s.rowHeight + 1), c.w, s.rowHeight);
  });
}

const rgb = (color: string) => parseInt(color.slice(1), 16);

function heads(context: CanvasRenderingContext2D, look: Look, s: Section): void {
  context.globalAlpha = 1;
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = look.muted;
  if (!s.tower) {
    context.textBaseline = "middle";
    for (const c of s.columns) {
      const found = clipped(context, c.title, c.w - 8);
      // below the cell, so that it needs no second ink
      context.fillText(found, c.x, s.y + s.rowHeight + 8);
    }
    return;
  }
  context.textBaseline = "middle";
  context.textAlign = "right";
  const step = s.rowHeight < 14 ? 5 : s.blocks.length > 20 ? 5 : 1;
  s.blocks.forEach((block, b) => {
    if (b % step === 0) context.fillText(String(block), LEFT - 6, s.y + b * (s.rowHeight + 1) + s.rowHeight / 2);
  });
  context.textAlign = "left";
  for (const c of s.columns) {
    if (c.experts) {
      context.fillStyle = look.ink;
      context.fillText(clipped(context, `${c.title}, 0 to ${c.experts - 1}`, c.w), c.x, s.y - 22);
      context.fillStyle = look.muted;
      const parts = c.templates.map((k) => shortName(look.plan.doc.layers[k].name).split(".").pop()).join(", ");
      context.fillText(clipped(context, c.templates.length > 1 ? `from above: ${parts}` : parts, c.w), c.x, s.y - 8);
      continue;
    }
    context.save();
    context.translate(c.x + c.w / 2, s.y - 6);
    if (isUpright(s.columns)) context.rotate(-Math.PI / 2);
    else context.textAlign = "center";
    context.fillText(clipped(context, c.title, isUpright(s.columns) ? s.head - 8 : c.w), 0, isUpright(s.columns) ? 0 : -6);
    context.restore();
  }
}
