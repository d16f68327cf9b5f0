// Colours of values: perceptually even ramps (scale.json, made in OKLCH), for a light and a dark page.
import scales from "../scale.json";
import type { Overlay, Plan } from "./document";
import { bitsOf, type State } from "./edits";

/** What the pictures show of each layer, and how. */
export interface Measure {
  name: string;
  unit: string;
  value: (i: number) => number;
  color: (value: number) => string;
  ticks: { value: number; text: string }[];
}

const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const mode = () => (isDark() ? "dark" : "light");

export const noneColor = () => scales.none[mode()];

function ramp(stops: string[], t: number): string {
  const at = Math.min(1, Math.max(0, t)) * (stops.length - 1);
  const [low, high] = [stops[Math.floor(at)], stops[Math.ceil(at)]];
  const part = (k: number) => {
    const [a, b] = [parseInt(low.slice(k, k + 2), 16), parseInt(high.slice(k, k + 2), 16)];
    return Math.round(a + (b - a) * (at % 1));
  };
  return `#${[1, 3, 5].map((k) => part(k).toString(16).padStart(2, "0")).join("")}`;
}

function remembered(color: (value: number) => string): (value: number) => string {
  const known = new Map<number, string>();
  return (value) => {
    const key = Math.round(value * 256);
    let found = known.get(key);
    if (found === undefined) known.set(key, (found = Number.isFinite(value) ? color(value) : noneColor()));
    return found;
  };
}

export function bitsMeasure(state: State): Measure {
  const { from, to } = scales.bits;
  const stops = scales.bits[mode()];
  return {
    name: "bits a weight", unit: "bits",
    value: (i) => bitsOf(state, i),
    color: remembered((bits) => ramp(stops, Math.log2(bits / from) / Math.log2(to / from))),
    ticks: [2, 3, 4, 5, 6, 8, 12, 16].map((value) => ({ value, text: String(value) })),
  };
}

export function overlayMeasure(overlay: Overlay): Measure {
  const known = overlay.values.filter((v): v is number => v !== null && v > 0).sort((a, b) => a - b);
  const [low, high] = [known[0] ?? 0, known[known.length - 1] ?? 1];
  // losses span decades, and so may errors
  const isLog = low > 0 && high / low > 30;
  const scaled = (v: number) =>
    isLog ? (v <= 0 ? 0 : Math.log(v / low) / Math.log(high / low)) : high ? v / high : 0;
  const color = new Map<number, string>();
  const stops = scales.error[mode()];
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((t) => (isLog ? low * (high / low) ** t : high * t));
  return {
    name: overlay.name, unit: overlay.unit,
    value: (i) => overlay.values[i] ?? NaN,
    color: (value) => {
      if (!Number.isFinite(value)) return noneColor();
      const t = Math.round(scaled(value) * 200);
      let found = color.get(t);
      if (!found) color.set(t, (found = ramp(stops, t / 200)));
      return found;
    },
    ticks: ticks.map((value) => ({ value, text: short(value) })),
  };
}

export function changeMeasure(state: State, other: State, index: Int32Array): Measure {
  const stops = scales.change[mode()];
  return {
    name: "change of bits", unit: "bits",
    value: (i) => (index[i] < 0 ? NaN : bitsOf(other, index[i]) - bitsOf(state, i)),
    color: remembered((change) => ramp(stops, 0.5 + (Math.sign(change) * Math.log2(1 + Math.abs(change))) / (2 * Math.log2(13)))),
    ticks: [-12, -8, -4, -1, 0, 1, 4, 8, 12].map((value) => ({ value, text: value > 0 ? `+${value}` : String(value).replace("-", "−") })),
  };
}

/** The layers of another plan by their names: for each of ours its number there, -1 where it has none. */
export function matched(plan: Plan, other: Plan): Int32Array {
  const templates = new Map(other.doc.layers.map((t, k) => [t.name, k]));
  const index = new Int32Array(plan.size).fill(-1);
  for (const row of plan.rows) {
    const template = templates.get(plan.doc.layers[row.template].name);
    const there = template === undefined ? undefined : other.rowOf(template, row.block);
    if (!there) continue;
    const experts = new Map<number, number>();
    for (let k = 0; k < there.count; k++) experts.set(other.expert[there.first + k], there.first + k);
    for (let k = row.first; k < row.first + row.count; k++) index[k] = experts.get(plan.expert[k]) ?? -1;
  }
  return index;
}

/** The better of black and white on a colour: a contrast of 4.58 or more, by WCAG's relative luminance. */
export function inkOn(color: string): string {
  const [r, g, b] = [1, 3, 5].map((k) => {
    const part = parseInt(color.slice(k, k + 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

export function short(value: number): string {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  return Math.abs(value) < 0.001 ? value.toExponential(1) : String(+value.toPrecision(3));
}
