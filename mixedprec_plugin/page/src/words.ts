// Layers in words: tips, filters, groups of the table.
import { bytesText, folded, shortName, thousands, type Form } from "./document";
import { bitsOf, choiceOf, summaryOf, type State } from "./edits";
import { short, type Measure } from "./scale";

export function describe(state: State, layers: number[], measure: Measure): string[] {
  const { plan } = state;
  const [i] = layers;
  const one = layers.length === 1;
  const bytes = layers.reduce((sum, each) => sum + state.bytes[each], 0);
  const experts = layers.map((each) => plan.expert[each]);
  const template = plan.doc.layers[plan.template[i]].name;
  const name = one ? plan.name(i)
    : `${template.replace("{}", String(plan.block[i])).replace("{}", shortened(folded(experts)))}`;
  const bits = bitsOf(state, i);
  const kinds = new Set(layers.map((each) => summaryOf(state, each)));
  const rules = new Set(layers.map((each) => plan.ruleOf(each)));
  const [rule] = rules;
  const words = [
    name,
    [[...kinds].map((k) => k || "as stored").slice(0, 3).join(" and "),
      kinds.size === 1 && Number.isFinite(bits) ? `${bits.toFixed(2)} bits` : "",
      `${bytesText(bytes)}${one ? "" : ` in ${thousands(layers.length)} layers`}`].filter(Boolean).join(" · "),
    rules.size > 1 ? `${rules.size} rules` : rule < 0 ? "no rule: as it is stored" : `rule ${rule}, ${plan.doc.rules[rule].where.split("/").pop()}`,
  ];
  if (measure.name !== "bits a weight") {
    const known = layers.map(measure.value).filter(Number.isFinite);
    words.push(known.length ? `${measure.name} ${short(known.reduce((a, b) => a + b, 0) / known.length)}` : `${measure.name}: not known`);
  }
  const problem = layers.flatMap((each) => plan.formOf(each).problems).map((p) => plan.doc.problems[p]).find((p) => p.severity === "error");
  if (problem) words.push(`error: ${problem.what}`);
  return words;
}

const shortened = (text: string) => (text.length > 40 ? `${text.slice(0, 40)}…` : text);

/** Layers that a text names: parts of names, globs, `method:awq`, `rule:3`, `bits<5`, `fault`, `source:x`. */
export function filtered(state: State, text: string): Uint8Array | null {
  const terms = text.trim().split(/\s+/).filter(Boolean);
  if (!terms.length) return null;
  const { plan } = state;
  const tests = terms.map((term) => test(state, term));
  const lit = new Uint8Array(plan.size);
  for (let i = 0; i < plan.size; i++) lit[i] = tests.every((t) => t(i)) ? 1 : 0;
  return lit;
}

function test(state: State, term: string): (i: number) => boolean {
  const { plan } = state;
  const ofForm = (found: (form: Form) => boolean) => {
    const known = plan.doc.forms.map(found);
    return (i: number) => known[plan.form[i]];
  };
  const [, key, value = ""] = /^(\w+):(.*)$/.exec(term) ?? [];
  if (key === "rule") return (i) => plan.ruleOf(i) === Number(value);
  if (key === "method") return (i) => summaryOf(state, i).startsWith(value);
  if (key === "source") return ofForm((form) => form.source === value);
  if (key === "action") return ofForm((form) => form.action.startsWith(value));
  if (term === "fault") return ofForm((form) => form.problems.length > 0);
  const bits = /^bits([<>]=?|=)([\d.]+)$/.exec(term);
  if (bits) {
    const limit = Number(bits[2]);
    const compare: Record<string, (x: number) => boolean> = {
      "<": (x) => x < limit, ">": (x) => x > limit, "<=": (x) => x <= limit, ">=": (x) => x >= limit, "=": (x) => Math.round(x) === limit,
    };
    return (i) => compare[bits[1]](bitsOf(state, i));
  }
  const names = plan.names;
  if (!/[*?[{]/.test(term)) return (i) => names[i].includes(term);
  const pattern = globExpression(term);
  return (i) => pattern.test(names[i]);
}

/** A preset's glob as a regular expression; what is not finished yet matches as it stands. */
export function globExpression(glob: string): RegExp {
  const ranges = /\{(-?\d+)\.\.(-?\d+)\}/g;
  const listed = glob.replace(ranges, (_, a, b) => {
    const [low, high] = [Math.min(+a, +b), Math.min(Math.max(+a, +b), Math.min(+a, +b) + 10000)];
    return `{${Array.from({ length: high - low + 1 }, (_x, k) => low + k).join(",")}}`;
  });
  const source = listed
    .replace(/[.+^$()|\\]/g, "\\$&").replace(/\[!/g, "[^").replace(/\*+/g, ".*").replace(/\?/g, ".")
    .replace(/\{([^{}]*)\}/g, (_, words: string) => `(?:${words.replaceAll(",", "|")})`);
  try {
    return new RegExp(`^${source}$`);
  } catch {
    return new RegExp(glob.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  }
}

export interface Group { name: string; layers: number[]; form: Form; method: string; action: string; bytes: number; before: number; bits: number }

/** Layers of one template that are alike, in the model's order. */
export function groupsOf(state: State): Group[] {
  const { plan } = state;
  const found = new Map<string, number[]>();
  for (let i = 0; i < plan.size; i++) {
    const key = `${plan.template[i]}/${plan.form[i]}/${state.chosen[i]}`;
    const group = found.get(key);
    group ? group.push(i) : found.set(key, [i]);
  }
  return [...found.values()].map((layers) => {
    const [i] = layers;
    const form = plan.formOf(i);
    const blocks = folded(layers.map((each) => plan.block[each]));
    const name = plan.doc.layers[plan.template[i]].name;
    return {
      name: plan.block[i] < 0 ? name : name.replace("{}", blocks).replace("{}", `${new Set(layers.map((e) => plan.expert[e])).size} experts`),
      layers, form, method: summaryOf(state, i),
      action: choiceOf(state, i)?.[1] ?? form.action,
      bytes: layers.reduce((sum, each) => sum + state.bytes[each], 0),
      before: layers.length * form.bytes_before,
      bits: bitsOf(state, i),
    };
  });
}

export interface Change { name: string; here: string; there: string; first: number; count: number; bytes: number; other: number }

/** Layers that another plan serves in another method, by what they are. */
export function changesOf(state: State, other: State, index: Int32Array): Change[] {
  const { plan } = state;
  const found = new Map<string, Change>();
  for (let i = 0; i < plan.size; i++) {
    if (index[i] < 0) continue;
    const [here, there] = [summaryOf(state, i), summaryOf(other, index[i])];
    if (here === there) continue;
    const name = shortName(plan.doc.layers[plan.template[i]].name);
    const key = `${name}/${here}/${there}`;
    const change = found.get(key) ?? { name, here, there, first: i, count: 0, bytes: 0, other: 0 };
    change.count++;
    change.bytes += state.bytes[i];
    change.other += other.bytes[index[i]];
    found.set(key, change);
  }
  return [...found.values()].sort((a, b) => Math.abs(b.other - b.bytes) - Math.abs(a.other - a.bytes));
}
