// What stands beside the pictures: rules, one layer, one rule, faults.
import { useMemo, useState } from "preact/hooks";
import { bytesText, folded, thousands, type Overlay, type Plan } from "./document";
import { bitsOf, choiceOf, placeOf, summaryOf, type Edit, type Fault, type Scope, type State } from "./edits";
import { short } from "./scale";

export type Selection = { layer: number } | { rule: number } | null;

export interface RuleStats { decides: number; matches: number; bytes: number; first: number }

export function ruleStats(state: State): RuleStats[] {
  const { plan } = state;
  const stats = plan.doc.rules.map(() => ({ decides: 0, matches: 0, bytes: 0, first: -1 }));
  for (let i = 0; i < plan.size; i++) {
    const matches = plan.matchesOf(i);
    for (const rule of matches) stats[rule].matches++;
    if (!matches.length) continue;
    const own = stats[matches[matches.length - 1]];
    own.decides++;
    own.bytes += state.bytes[i];
    if (own.first < 0) own.first = i;
  }
  return stats;
}

const fileOf = (where: string) => where.split("/").pop();

export function Rules({ state, stats, selected, onHover, onSelect }: {
  state: State; stats: RuleStats[]; selected: number;
  onHover: (rule: number | null) => void; onSelect: (rule: number) => void;
}) {
  const { rules, schemes, choices } = state.plan.doc;
  // hundreds of rows: made again only when they change
  return useMemo(() => {
    const { problems } = state.plan.doc;
    const faulty = (severity: string) => new Set(problems.filter((p) => p.severity === severity).flatMap((p) => p.rules));
    const [errors, warnings] = [faulty("error"), faulty("warning")];
    const edited = new Map(state.edits.flatMap((e) => (e.kind === "rule" ? [[e.rule, e.method] as const] : [])));
    return (
      <ol class="rules" onMouseLeave={() => onHover(null)}>
        {rules.map((rule, index) => {
          const { decides, matches } = stats[index];
          const scheme = schemes[rule.scheme];
          const method = edited.has(index) ? choices.methods[edited.get(index)!].summary : scheme.summary;
          return (
            <li key={index}>
              <button type="button" aria-pressed={selected === index} onMouseEnter={() => onHover(index)}
                onFocus={() => onHover(index)} onBlur={() => onHover(null)} onClick={() => onSelect(index)}>
                <span class="index">{index}</span>
                <span class="pattern">{errors.has(index) ? <b class="error">error </b> : warnings.has(index) ? <b class="warning">warning </b> : ""}{rule.patterns.join("  ")}</span>
                <span class="method">{edited.has(index) ? "✎ " : ""}{scheme.label !== scheme.method && !edited.has(index) ? `${scheme.label}: ` : ""}{method}</span>
                <span class="count">{decides === matches ? thousands(decides) : `${thousands(decides)} of ${thousands(matches)}`} layers</span>
                <span class="where">{fileOf(rule.where)}</span>
              </button>
            </li>
          );
        })}
      </ol>
    );
  }, [state, stats, selected, onHover, onSelect]);
}

function Pairs({ rows }: { rows: (readonly [string, preact.ComponentChildren] | false | null | "")[] }) {
  return <dl>{rows.map((row) => row && <div key={row[0]}><dt>{row[0]}</dt><dd>{row[1]}</dd></div>)}</dl>;
}

/** Every method with what the layers would take in it. */
function Methods({ state, layers, now, onChoose }: { state: State; layers: number[]; now: string; onChoose: (method: number) => void }) {
  const { methods, lists } = state.plan.doc.choices;
  const offered = useMemo(() => methods.map((method, k) => {
    let [bytes, cannot, why] = [0, 0, ""];
    for (const i of layers) {
      const { choices } = state.plan.formOf(i);
      if (choices === null) continue;
      const choice = lists[choices][k];
      bytes += choice[0];
      if (choice[2]) { cannot++; why ||= choice[2]; }
    }
    return { k, method, bytes, cannot, why };
  }).sort((a, b) => a.bytes - b.bytes), [state.plan, layers]);
  return (
    <select aria-label="method" value="" onChange={(e) => { const { value } = e.currentTarget; if (value) onChoose(Number(value)); }}>
      <option value="">now {now || "as stored"}; change to …</option>
      {offered.map(({ k, method, bytes, cannot, why }) => (
        <option key={k} value={k} disabled={cannot === layers.length} title={why}>
          {method.summary} — {bytesText(bytes)}{cannot ? (cannot === layers.length ? `, cannot: ${why.slice(0, 60)}` : `, ${thousands(cannot)} layers cannot`) : ""}
        </option>
      ))}
    </select>
  );
}

export function LayerPanel({ state, other, index, layer, overlays, onRule, onEdit }: {
  state: State; other: State | null; index: Int32Array | null; layer: number; overlays: Overlay[];
  onRule: (rule: number) => void; onEdit: (edit: Edit) => void;
}) {
  const { plan } = state;
  const { doc } = plan;
  const form = plan.formOf(layer);
  const choice = choiceOf(state, layer);
  const chosen = state.chosen[layer];
  const matches = plan.matchesOf(layer);
  const [scope, setScope] = useState<Scope>("unit");
  const { place, patterns } = placeOf(plan, layer, scope);
  const reach = useMemo(() => {
    const found: number[] = [];
    for (let i = 0; i < plan.size; i++)
      if (doc.layers[plan.template[i]].module === place.module && plan.formOf(i).choices !== null
        && (place.block === null || plan.block[i] === place.block) && (place.expert === null || plan.expert[i] === place.expert)) found.push(i);
    return found;
  }, [plan, layer, scope]);
  const scheme = form.scheme === null ? null : doc.schemes[form.scheme];
  const there = other && index && index[layer] >= 0 ? index[layer] : -1;
  const action = choice?.[1] ?? form.action;
  const kernel = choice ? choice[3] : form.kernel;
  const isFaulty = choice ? Boolean(choice[2]) : form.problems.some((p) => doc.problems[p].severity === "error");
  const isExpert = plan.expert[layer] >= 0;
  const deciding = matches[matches.length - 1];
  return (
    <section class="panel" aria-labelledby="layer-name">
      <h2 id="layer-name" class="mono">{plan.name(layer)}</h2>
      {chosen < 0 && [...form.problems].map((p) => doc.problems[p]).map((p, k) => (
        <p key={k} class={`fault ${p.severity}`}><b>{p.severity}</b> {p.what}{p.remedy && <> <i>{p.remedy}</i></>}</p>
      ))}
      {choice?.[2] && <p class="fault error"><b>cannot</b> {choice[2]}</p>}
      <Pairs rows={[
        ["served as", <><b>{summaryOf(state, layer) || "as stored"}</b>{scheme && choice === null && scheme.label !== scheme.method && scheme.label !== summaryOf(state, layer) ? `, scheme ${scheme.label}` : ""}</>],
        ["bytes", <>{bytesText(state.bytes[layer])}{form.bytes_before !== state.bytes[layer] && `, stored in ${bytesText(form.bytes_before)}`}</>],
        form.shape && form.shape[0] > 0 && ["bits", `${bitsOf(state, layer).toFixed(2)} a weight of ${thousands(form.shape[0])} × ${thousands(form.shape[1])}`],
        ["source", <>{form.source}<span class="muted"> {doc.sources[form.source]}</span></>],
        ["stored → action", `${form.stored || Object.values(form.tensors).map((t) => t[0]).join(", ")} → ${action}`],
        form.note && ["note", form.note],
        ["module", <span class="mono">{doc.layers[plan.template[layer]].sglang.replace("{}", String(plan.block[layer]))}</span>],
        doc.target.gpu !== null && ["kernel", kernel ? `${kernel} on ${doc.target.gpu.name}` : isFaulty ? "none" : scheme ? "SGLang's choice" : "SGLang's unquantized layer"],
        !choice && form.class && ["class", <span class="mono">{form.class.split(":")[1]}</span>],
        doc.target.tp_size > 1 && ["ranks", form.parts > 1 ? `split over ${form.parts}, ${bytesText(Math.ceil(state.bytes[layer] / form.parts))} each` : "whole on each"],
        !choice && ["tensors", <ul class="tensors">{Object.entries(form.tensors).map(([name, [dtype, ...shape]]) => <li key={name} class="mono">{name} <span class="muted">{dtype} [{shape.join(", ")}]</span></li>)}</ul>],
        ...overlays.map((o) => [o.name, `${short(o.values[layer] ?? NaN)} ${o.unit}`] as const),
        there >= 0 && ["other preset", `${summaryOf(other!, there) || "as stored"}, ${bytesText(other!.bytes[there])}`],
      ]} />
      <h3>Rules that match it</h3>
      {matches.length ? (
        <ol class="matches">
          {matches.map((rule) => (
            <li key={rule} class={rule === deciding ? "" : "shadowed"}>
              <button type="button" class="link" onClick={() => onRule(rule)}>rule {rule}</button>{" "}
              <span class="mono">{doc.rules[rule].patterns.join("  ")}</span> {doc.schemes[doc.rules[rule].scheme].summary}
              <div class="muted">{rule === deciding ? "decides" : `shadowed by rule ${deciding}`} · <span class="mono">{doc.rules[rule].where}</span></div>
            </li>
          ))}
        </ol>
      ) : <p class="muted">None: it is served as it is stored.</p>}
      {form.choices !== null ? (
        <>
          <h3>Try another method</h3>
          <div class="row">
            <select aria-label="of which layers" value={scope} onChange={(e) => setScope(e.currentTarget.value as Scope)}>
              <option value="unit">{isExpert ? `expert ${plan.expert[layer]} of block ${plan.block[layer]}` : "this module"}</option>
              {isExpert && <option value="experts">all experts of block {plan.block[layer]}</option>}
              {plan.block[layer] >= 0 && <option value="everywhere">{isExpert ? "all experts of all blocks" : "this module in all blocks"}</option>}
            </select>
            <Methods state={state} layers={reach} now={summaryOf(state, layer)}
              onChoose={(method) => onEdit({ kind: "add", patterns, layers: place, method })} />
          </div>
          <p class="muted">{thousands(reach.length)} layers: <span class="mono">{patterns.join("  ")}</span></p>
        </>
      ) : <p class="muted">SGLang never quantizes it.</p>}
    </section>
  );
}

export function RulePanel({ state, stats, rule, onLayer, onEdit }: {
  state: State; stats: RuleStats[]; rule: number; onLayer: (layer: number) => void; onEdit: (edit: Edit) => void;
}) {
  const { plan } = state;
  const { doc } = plan;
  const scheme = doc.schemes[doc.rules[rule].scheme];
  const problems = doc.problems.filter((p) => p.rules.includes(rule));
  const { decided, blocks, shadows } = useMemo(() => {
    const found: number[] = [];
    const later = new Map<number, number>();
    for (let i = 0; i < plan.size; i++) {
      const matches = plan.matchesOf(i);
      if (!matches.includes(rule)) continue;
      const last = matches[matches.length - 1];
      if (last === rule) found.push(i);
      else later.set(last, (later.get(last) ?? 0) + 1);
    }
    return { decided: found, blocks: folded(found.map((i) => plan.block[i]).filter((b) => b >= 0)), shadows: [...later] };
  }, [plan, rule]);
  const changeable = decided.filter((i) => plan.formOf(i).choices !== null);
  return (
    <section class="panel" aria-labelledby="rule-name">
      <h2 id="rule-name">Rule {rule}</h2>
      {problems.map((p, k) => <p key={k} class={`fault ${p.severity}`}><b>{p.severity}</b> {p.what}{p.remedy && <> <i>{p.remedy}</i></>}</p>)}
      <Pairs rows={[
        ["match", <span class="mono">{doc.rules[rule].patterns.join("  ")}</span>],
        ["written in", <span class="mono">{doc.rules[rule].where}</span>],
        ["scheme", <><b>{scheme.summary}</b>{scheme.label !== scheme.method ? ` (${scheme.label})` : ""}{scheme.source !== "model" ? `, from ${scheme.source}` : ""}{scheme.requantize ? ", may round again" : ""}</>],
        ["decides", `${thousands(stats[rule].decides)} layers, ${bytesText(stats[rule].bytes)}`],
        blocks && ["blocks", blocks],
        stats[rule].matches > stats[rule].decides && ["shadowed in", `${thousands(stats[rule].matches - stats[rule].decides)} layers, by ${shadows.slice(0, 6).map(([r, n]) => `rule ${r} (${thousands(n)})`).join(", ")}${shadows.length > 6 ? ` and ${shadows.length - 6} more` : ""}`],
        decided.length > 0 && ["first layer", <button type="button" class="link mono" onClick={() => onLayer(decided[0])}>{plan.name(decided[0])}</button>],
      ]} />
      {changeable.length > 0 && (
        <>
          <h3>Try another method</h3>
          <Methods state={state} layers={changeable} now={summaryOf(state, changeable[0])} onChoose={(method) => onEdit({ kind: "rule", rule, method })} />
        </>
      )}
    </section>
  );
}

/** How many layers with each of the plan's problems are still as planned. */
export function leftOf(state: State): number[] {
  const left = state.plan.doc.problems.map(() => 0);
  for (let i = 0; i < state.plan.size; i++)
    if (state.chosen[i] < 0) for (const p of state.plan.formOf(i).problems) left[p]++;
  return left;
}

export function Faults({ plan, left, faults, onRule, onLayer }: { plan: Plan; left: number[]; faults: Fault[]; onRule: (rule: number) => void; onLayer: (layer: number) => void }) {
  const { problems } = plan.doc;
  const first = useMemo(() => problems.map((_, p) => {
    const form = plan.doc.forms.findIndex((f) => f.problems.includes(p));
    return form < 0 ? -1 : plan.form.indexOf(form);
  }), [plan]);
  if (!problems.length && !faults.length) return <p class="muted">None: everything in the preset fits this checkpoint{plan.doc.target.gpu ? ` and ${plan.doc.target.gpu.name}` : ""}.</p>;
  return (
    <ul class="faults">
      {faults.map((f, k) => (
        <li key={`c${k}`} class="fault error"><b>your change</b> {f.text}{" "}
          <button type="button" class="link" onClick={() => onLayer(f.layers[0])}>{thousands(f.layers.length)} layers</button></li>
      ))}
      {problems.map((p, k) => [p, k] as const).sort(([a], [b]) => a.severity.localeCompare(b.severity)).map(([p, k]) => (
        <li key={k} class={`fault ${p.layers > 0 && !left[k] ? "gone" : p.severity}`}>
          <b>{p.severity}</b> {p.layers > 0 && !left[k] && <b class="gone">before your changes </b>}<span class="mono where">{p.where}</span> {p.what}{p.remedy && <> <i>{p.remedy}</i></>}{" "}
          {p.rules.map((rule) => <button key={rule} type="button" class="link" onClick={() => onRule(rule)}>rule {rule}</button>)}
          {first[k] >= 0 && <button type="button" class="link" onClick={() => onLayer(first[k])}>{p.layers === 1 ? "its layer" : `${thousands(p.layers)} layers`}</button>}
        </li>
      ))}
    </ul>
  );
}
