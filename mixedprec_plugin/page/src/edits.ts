// Other methods for layers, chosen in the page: what they become, and the preset that says so.
import { folded, Plan } from "./document";

/** Of a rule that is there, or of layers that a rule behind all others names. */
export type Edit =
  | { kind: "rule"; rule: number; method: number }
  | { kind: "add"; patterns: string[]; layers: Place; method: number };
export interface Place { module: string; block: number | null; expert: number | null }
export type Scope = "unit" | "experts" | "everywhere";

export interface State {
  plan: Plan;
  /** Number of the method that was chosen for each layer; -1 where it is as planned. */
  chosen: Int16Array;
  bytes: Float64Array;
  edits: Edit[];
}

export function applied(plan: Plan, edits: Edit[]): State {
  const { forms, layers } = plan.doc;
  const chosen = new Int16Array(plan.size).fill(-1);
  const byRule = new Map<number, number>();
  const added: Extract<Edit, { kind: "add" }>[] = [];
  for (const edit of edits) edit.kind === "rule" ? byRule.set(edit.rule, edit.method) : added.push(edit);
  if (byRule.size)
    for (let i = 0; i < plan.size; i++) {
      const method = byRule.get(plan.ruleOf(i));
      if (method !== undefined && forms[plan.form[i]].choices !== null) chosen[i] = method;
    }
  for (const { layers: at, method } of added)
    for (let i = 0; i < plan.size; i++)
      if (
        layers[plan.template[i]].module === at.module &&
        (at.block === null || plan.block[i] === at.block) &&
        (at.expert === null || plan.expert[i] === at.expert) &&
        forms[plan.form[i]].choices !== null
      )
        chosen[i] = method;
  const bytes = new Float64Array(plan.size);
  const state = { plan, chosen, bytes, edits };
  for (let i = 0; i < plan.size; i++) bytes[i] = choiceOf(state, i)?.[0] ?? forms[plan.form[i]].bytes;
  return state;
}

export function choiceOf({ plan, chosen }: State, i: number) {
  return chosen[i] < 0 ? null : plan.doc.choices.lists[plan.formOf(i).choices!][chosen[i]];
}

/** Method and its main arguments, `gptq 4-bit g128`; empty for what is never quantized. */
export function summaryOf({ plan, chosen }: State, i: number): string {
  if (chosen[i] >= 0) return plan.doc.choices.methods[chosen[i]].summary;
  const { scheme } = plan.formOf(i);
  return scheme === null ? "" : plan.doc.schemes[scheme].summary;
}

export function bitsOf(state: State, i: number): number {
  const { shape } = state.plan.formOf(i);
  // what is left to a draft model is not served
  return shape && shape[0] * shape[1] && state.bytes[i] ? (8 * state.bytes[i]) / (shape[0] * shape[1]) : NaN;
}

export interface Totals { bytes: number; before: number; unquantized: number; bits: number; linear: number; rank: number }

export function totalsOf(state: State): Totals {
  const { plan, bytes } = state;
  let [sum, before, weights, served, linearWeights, linear, rank] = [0, 0, 0, 0, 0, 0, 0];
  for (let i = 0; i < plan.size; i++) {
    const form = plan.formOf(i);
    sum += bytes[i];
    before += form.bytes_before;
    if (form.kind === "draft") continue;
    rank += Math.ceil(bytes[i] / form.parts);
    if (form.shape && form.shape[0]) {
      weights += form.shape[0] * form.shape[1];
      served += bytes[i];
      if (form.kind === "linear" || form.kind === "expert") {
        linearWeights += form.shape[0] * form.shape[1];
        linear += bytes[i];
      }
    }
  }
  const bits = (bytes: number, of: number) => (of ? (8 * bytes) / of : 0);
  return { bytes: sum, before, unquantized: sum - served + 2 * weights, bits: bits(served, weights), linear: bits(linear, linearWeights), rank };
}

export interface Fault { text: string; layers: number[] }

/** What the choices cannot be, and modules whose parts they drove apart. */
export function faultsOf(state: State): Fault[] {
  const { plan, chosen } = state;
  if (!state.edits.length) return [];
  const found = new Map<string, number[]>();
  const add = (text: string, i: number) => {
    const layers = found.get(text);
    layers ? layers.push(i) : found.set(text, [i]);
  };
  const units = new Map<string, number>();
  const identity = (i: number) => {
    const { scheme } = plan.formOf(i);
    if (chosen[i] >= 0) return plan.doc.choices.methods[chosen[i]].identity;
    return scheme === null ? null : plan.doc.schemes[scheme].identity;
  };
  for (let i = 0; i < plan.size; i++) {
    const choice = choiceOf(state, i);
    if (choice?.[2]) add(choice[2], i);
    const own = identity(i);
    if (own === null) continue;
    const unit = `${plan.doc.layers[plan.template[i]].module}/${plan.block[i]}/${plan.expert[i]}`;
    const first = units.get(unit);
    if (first === undefined) units.set(unit, i);
    else if (identity(first) !== own && (chosen[i] >= 0 || chosen[first] >= 0))
      add("the parts of one module need one method: choose it for all of them", i);
  }
  return [...found].map(([text, layers]) => ({ text, layers }));
}

/** Where an edit of a layer reaches, and the globs that a preset writes for it. */
export function placeOf(plan: Plan, i: number, scope: Scope): { place: Place; patterns: string[] } {
  const { module } = plan.doc.layers[plan.template[i]];
  const templates = plan.doc.layers.filter((t) => t.module === module);
  const isExpert = plan.expert[i] >= 0;
  const place = {
    module,
    block: scope === "everywhere" || plan.block[i] < 0 ? null : plan.block[i],
    expert: scope === "unit" && isExpert ? plan.expert[i] : null,
  };
  const blocks = templates[0].rows
    .filter((r) => plan.doc.forms[plan.form[plan.rowOf(plan.doc.layers.indexOf(templates[0]), r[0])!.first]].choices !== null)
    .map((r) => r[0]);
  const block = place.block ?? braces(blocks);
  const patterns = isExpert
    ? [`${module.replace("{}", String(block))}.${place.expert ?? "*"}.*`]
    : templates.map((t) => t.name.replace("{}", String(block)));
  return { place, patterns };
}

function braces(blocks: number[]): string {
  const text = folded(blocks, "..", ",").split(",");
  const parts = text.map((part) => (part.includes("..") ? `{${part}}` : part));
  return parts.length === 1 ? parts[0] : `{${parts.map((p) => p.replace(/^\{(.*)\}$/, "{$1}")).join(",")}}`;
}

/** The preset with the edits in it, as YAML. */
export function presetText(state: State): string {
  const { doc } = state.plan;
  const { rules = [], ...rest } = doc.preset.resolved as { rules?: Record<string, unknown>[] };
  const edited = new Map(state.edits.flatMap((e) => (e.kind === "rule" ? [[e.rule, e.method] as const] : [])));
  const written = rules.map((rule, index) => {
    const method = edited.get(index);
    if (method === undefined) return rule;
    const { source } = doc.schemes[doc.rules[index].scheme];
    return {
      match: rule.match, ...doc.choices.methods[method].given,
      ...(source === "model" ? {} : { source }),
      ...(isRequantized(state, (i) => state.plan.ruleOf(i) === index, method) ? { requantize: true } : {}),
      ...(rule.optional ? { optional: true } : {}),
    };
  });
  for (const edit of state.edits) {
    if (edit.kind !== "add") continue;
    const { module, block, expert } = edit.layers;
    const reaches = (i: number) =>
      doc.layers[state.plan.template[i]].module === module &&
      (block === null || state.plan.block[i] === block) && (expert === null || state.plan.expert[i] === expert);
    const sources = new Set<string>();
    for (let i = 0; i < state.plan.size; i++) if (reaches(i)) sources.add(state.plan.formOf(i).source);
    const [source] = sources;
    written.push({
      match: edit.patterns.length === 1 ? edit.patterns[0] : edit.patterns,
      ...doc.choices.methods[edit.method].given,
      ...(sources.size === 1 && source !== "model" ? { source } : {}),
      ...(isRequantized(state, reaches, edit.method) ? { requantize: true } : {}),
    });
  }
  const head = Object.entries(rest).map(([key, value]) => section(key, value));
  return `${head.join("")}rules:\n${written.map((rule) => `  - ${flow(rule)}\n`).join("")}`;
}

function isRequantized({ plan }: State, reaches: (i: number) => boolean, method: number): boolean {
  for (let i = 0; i < plan.size; i++) {
    const { choices } = plan.formOf(i);
    if (choices !== null && reaches(i) && plan.doc.choices.lists[choices][method][1] === "requantize") return true;
  }
  return false;
}

function section(key: string, value: unknown): string {
  const isMap = typeof value === "object" && value !== null && !Array.isArray(value);
  if (!isMap) return `${key}: ${flow(value)}\n`;
  const lines = Object.entries(value).map(([name, each]) => `  ${scalar(name)}: ${flow(each)}\n`);
  return `${key}:\n${lines.join("")}`;
}

function flow(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(flow).join(", ")}]`;
  if (typeof value === "object" && value !== null)
    return `{${Object.entries(value).map(([k, v]) => `${scalar(k)}: ${flow(v)}`).join(", ")}}`;
  return typeof value === "string" ? scalar(value) : JSON.stringify(value);
}

// a word that YAML reads as itself; all else is quoted as JSON, which YAML reads too
const PLAIN = /^[A-Za-z_][\w.-]*$/;
const RESERVED = /^(true|false|null|yes|no|on|off|y|n)$/i;
const scalar = (text: string) => (PLAIN.test(text) && !RESERVED.test(text) ? text : JSON.stringify(text));
