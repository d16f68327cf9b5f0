// The document of plan/document.py, and its layers as columns of numbers: 70,000 stay small.

export interface Scheme {
  label: string; method: string; summary: string; arguments: Record<string, unknown>;
  source: string; requantize: boolean; identity: string;
}
export interface Form {
  kind: string; scheme: number | null; source: string; stored: string; action: string; note: string;
  shape: [number, number] | null; tensors: Record<string, (string | number)[]>;
  bytes_before: number; bytes: number; parts: number; class: string; kernel: string;
  choices: number | null; problems: number[];
}
export interface Rule { patterns: string[]; scheme: number; where: string; optional: boolean }
export interface Problem {
  where: string; what: string; remedy: string; rule: string; severity: "error" | "warning";
  rules: number[]; layers: number;
}
// bytes, action, why not, kernel
export type Choice = [number, string, string, string];
export interface Method { summary: string; given: Record<string, unknown>; identity: string; rank: number }
export interface Template {
  name: string; module: string; sglang: string; kind: string;
  rows: [block: number, experts: number | number[], forms: number, matches: number][];
}
export interface Line { title: string; num_bytes: number; formula: string }
export interface Card {
  weights: number; unknown?: string; memory: number; taken: Line[]; token_bytes: number; token_formula: string;
}
export interface PlanDocument {
  format: number;
  model: { path: string; architecture: string };
  preset: { path: string; description: string; on_fused_conflict: string; resolved: Record<string, unknown> };
  target: { device: string; tp_size: number; dtype: string; gpu: { name: string; memory_bytes: number } | null };
  totals: Record<string, number>;
  card: Card | null;
  rules: Rule[]; sources: Record<string, string>; tied: Record<string, string>;
  schemes: Scheme[]; forms: Form[];
  choices: { methods: Method[]; lists: Choice[][] };
  matches: number[][]; runs: number[][]; layers: Template[]; problems: Problem[];
}
// of every template and row, a number for each layer, in the document's order; null where there is none
export interface Overlay { name: string; unit: string; file: string; values: (number | null)[] }
export interface PageData { plan: PlanDocument; against: PlanDocument | null; overlays: Overlay[] }

export interface Row { template: number; block: number; first: number; count: number }

/** A plan with its layers as columns; a row is one template in one block, its experts in order. */
export class Plan {
  readonly size: number;
  readonly template: Uint16Array;
  readonly block: Int32Array;
  readonly expert: Int32Array;
  readonly form: Int32Array;
  readonly match: Int32Array;
  readonly row: Int32Array;
  readonly rows: Row[] = [];
  private rowAt = new Map<string, Row>();

  constructor(readonly doc: PlanDocument) {
    const counts = doc.layers.flatMap((t) => t.rows.map((r) => runLength(doc.runs[r[2]])));
    this.size = counts.reduce((a, b) => a + b, 0);
    this.template = new Uint16Array(this.size);
    [this.block, this.expert, this.form, this.match, this.row] =
      Array.from({ length: 5 }, () => new Int32Array(this.size)) as [Int32Array, Int32Array, Int32Array, Int32Array, Int32Array];
    let at = 0;
    doc.layers.forEach((t, template) => {
      for (const [block, experts, forms, matches] of t.rows) {
        const count = runLength(doc.runs[forms]);
        const row = { template, block, first: at, count };
        this.rowAt.set(`${template}/${block}`, row);
        this.template.fill(template, at, at + count);
        this.block.fill(block, at, at + count);
        this.row.fill(this.rows.length, at, at + count);
        this.rows.push(row);
        spread(doc.runs[forms], this.form, at);
        spread(doc.runs[matches], this.match, at);
        for (let i = 0; i < count; i++)
          this.expert[at + i] = experts === 0 ? -1 : typeof experts === "number" ? i : experts[i];
        at += count;
      }
    });
  }

  rowOf(template: number, block: number): Row | undefined { return this.rowAt.get(`${template}/${block}`); }

  name(i: number): string { return filled(this.doc.layers[this.template[i]].name, this.block[i], this.expert[i]); }

  module(i: number): string { return filled(this.doc.layers[this.template[i]].module, this.block[i], -1); }

  formOf(i: number): Form { return this.doc.forms[this.form[i]]; }

  /** The rules that match a layer, in order; the last one decides. */
  matchesOf(i: number): number[] { return this.doc.matches[this.match[i]]; }

  ruleOf(i: number): number { const all = this.matchesOf(i); return all.length ? all[all.length - 1] : -1; }

  #names: string[] | null = null;
  get names(): string[] {
    if (!this.#names) {
      const pieces = this.doc.layers.map((t) => t.name.split("{}"));
      this.#names = Array.from({ length: this.size }, (_, i) => {
        const [start, middle, end] = pieces[this.template[i]];
        if (middle === undefined) return start;
        return end === undefined ? `${start}${this.block[i]}${middle}` : `${start}${this.block[i]}${middle}${this.expert[i]}${end}`;
      });
    }
    return this.#names;
  }
}

function filled(template: string, block: number, expert: number): string {
  const named = block < 0 ? template : template.replace("{}", String(block));
  return expert < 0 ? named : named.replace("{}", String(expert));
}

function runLength(runs: number[]): number {
  let total = 0;
  for (let k = 1; k < runs.length; k += 2) total += runs[k];
  return total;
}

function spread(runs: number[], into: Int32Array, at: number): void {
  for (let k = 0; k < runs.length; k += 2) {
    into.fill(runs[k], at, at + runs[k + 1]);
    at += runs[k + 1];
  }
}

/** `[0, 1, 2, 5]` -> `0–2, 5`. */
export function folded(numbers: number[], dash = "–", comma = ", "): string {
  const ranges: [number, number][] = [];
  for (const n of [...new Set(numbers)].sort((a, b) => a - b)) {
    const last = ranges[ranges.length - 1];
    if (last && n === last[1] + 1) last[1] = n;
    else ranges.push([n, n]);
  }
  return ranges.map(([a, b]) => (a === b ? `${a}` : `${a}${dash}${b}`)).join(comma);
}

/** What of a name's template tells it from others: `model.layers.{}.mlp.experts.{}.up_proj` -> `mlp.experts.up_proj`. */
export function shortName(template: string): string {
  const at = template.indexOf(".{}.");
  return (at < 0 ? template.replace(/^model\./, "") : template.slice(at + 4)).replaceAll(".{}", "");
}

/** The numbered tower that a template stands in, `model.layers`; empty outside of one. */
export function towerOf(template: string): string {
  const at = template.indexOf(".{}");
  return at < 0 ? "" : template.slice(0, at);
}

export function bytesText(n: number): string {
  let size = n;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(size) < 1024) return unit === "B" ? `${size} B` : `${size.toFixed(1)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(2)} TiB`;
}

export const gigabytes = (n: number): string => `${(n / 1e9).toFixed(1).replace(/\.0$/, "")} GB`;
export const thousands = (n: number): string => n.toLocaleString("en-US");
