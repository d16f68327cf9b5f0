// The page's sections besides the pictures: figures, card, changes, the preset and the table.
import { useMemo, useState } from "preact/hooks";
import { bytesText, gigabytes, thousands, type Card, type Plan } from "./document";
import { presetText, totalsOf, type Edit, type State, type Totals } from "./edits";
import { noneColor, type Measure } from "./scale";
import { changesOf, groupsOf } from "./words";

export function Head({ plan, totals, planned, other, isEdited, numErrors }: {
  plan: Plan; totals: Totals; planned: Totals; other: State | null; isEdited: boolean; numErrors: number;
}) {
  const { preset, model, target } = plan.doc;
  const numWarnings = plan.doc.problems.length;
  const there = other && totalsOf(other);
  const where = [target.gpu ? target.gpu.name : target.device === "cpu" ? "the CPU platform" : "any GPU", target.tp_size > 1 && `tensor parallel ${target.tp_size}`, target.dtype === "BF16" ? "bfloat16" : "float16"];
  const figure = (title: string, now: string, was: string, against: string | null, exact?: number) => (
    <div><dt>{title}</dt><dd title={exact === undefined ? undefined : `${thousands(exact)} bytes`}>{now}{was !== now && <span class="was"> was {was}</span>}{against && <span class="against">{against}</span>}</dd></div>
  );
  const saved = (t: Totals) => `${Math.round(100 * (1 - t.bytes / t.unquantized))} %`;
  const was = isEdited ? planned : totals;
  return (
    <header>
      <h1>{preset.path.split("/").pop()} <span class="muted">over</span> {model.path.split("/").pop()}</h1>
      <p class="muted">{[preset.description, model.architecture, where.filter(Boolean).join(", ")].filter(Boolean).join(" · ")}</p>
      {there && <p class="legend-against">beside it: <b>{other.plan.doc.preset.path.split("/").pop()}</b></p>}
      <dl class="figures">
        {figure("served", bytesText(totals.bytes), bytesText(was.bytes), there && bytesText(there.bytes), totals.bytes)}
        {figure("bits a weight of linear layers", totals.linear.toFixed(2), was.linear.toFixed(2), there && there.linear.toFixed(2))}
        {figure("bits a weight of all", totals.bits.toFixed(2), was.bits.toFixed(2), there && there.bits.toFixed(2))}
        {figure("saved against unquantized", saved(totals), saved(was), there && saved(there))}
        {figure("stored", bytesText(totals.before), bytesText(was.before), null)}
        {figure("layers", thousands(plan.size), thousands(plan.size), null)}
        <div class={numErrors ? "error" : ""}><dt>faults</dt><dd><a href="#faults-title">{numErrors ? thousands(numErrors) : numWarnings ? `${numWarnings} warning${numWarnings > 1 ? "s" : ""}` : "none"}</a></dd></div>
      </dl>
    </header>
  );
}

export function CardBar({ card, plan, totals }: { card: Card | null; plan: Plan; totals: Totals }) {
  const { gpu, tp_size } = plan.doc.target;
  if (!card || !gpu) return <p class="muted">No card is named: <code>--gpu H100</code> adds what it holds and which kernels run on it.</p>;
  if (card.unknown) return <p class="muted">{bytesText(totals.rank)} of weights a rank; {card.unknown}.</p>;
  const taken = card.taken.reduce((sum, line) => sum + line.num_bytes, 0);
  const left = card.memory - taken - totals.rank;
  const tokens = Math.floor(left / card.token_bytes);
  const parts: [string, string, number, string][] = [
    ["weights", "weights", totals.rank, ""],
    ["cache", "KV cache", Math.max(0, left), card.token_formula],
    ...card.taken.map((line) => ["taken", line.title, line.num_bytes, line.formula] as [string, string, number, string]),
  ];
  const whole = Math.max(card.memory, totals.rank + taken);
  return (
    <section class={`card ${left < 0 ? "over" : ""}`} aria-labelledby="card-title">
      <h2 id="card-title">{gpu.name}, {gigabytes(card.memory)}{tp_size > 1 ? `, each of ${tp_size} ranks` : ""}</h2>
      <div class="bar" role="img" aria-label={parts.map(([, title, n]) => `${title} ${gigabytes(n)}`).join(", ")}>
        {parts.map(([kind, title, n]) => n > 0 && <div key={title} class={kind} style={{ flexGrow: n / whole }} />)}
      </div>
      <ul>
        {parts.map(([kind, title, n, formula]) => (
          <li key={title} title={formula}><span class={`swatch ${kind}`} />{title} <b>{gigabytes(n)}</b>
            {kind === "cache" && left >= 0 && <> = {thousands(tokens)} tokens</>}</li>
        ))}
      </ul>
      {left < 0 && <p class="fault error"><b>does not fit</b> the weights are {gigabytes(-left)} more than SGLang leaves for them: use methods of fewer bits, or more ranks</p>}
    </section>
  );
}

export function Legend({ measure }: { measure: Measure }) {
  return (
    <div class="legend" aria-label={`colours: ${measure.name}`}>
      <span class="muted">{measure.unit}</span>
      {measure.ticks.map(({ value, text }) => (
        <span key={text} class="tick"><i style={{ background: measure.color(value) }} />{text}</span>
      ))}
      <span class="tick"><i style={{ background: noneColor() }} />{measure.unit === "bits" ? "no matrix, or not served" : "not known"}</span>
    </div>
  );
}

export function Result({ state, setEdits, totals, planned }: { state: State; setEdits: (edits: Edit[]) => void; totals: Totals; planned: Totals }) {
  const { doc } = state.plan;
  const yaml = useMemo(() => presetText(state), [state]);
  const isEdited = state.edits.length > 0;
  const name = isEdited ? "edited.yaml" : doc.preset.path;
  const quoted = (word: string) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
  const line = [
    "sglang serve --model-path", quoted(doc.model.path), "--load-format mixedprec --mixedprec-config", quoted(name),
    doc.target.tp_size > 1 ? `--tp ${doc.target.tp_size}` : "", doc.target.gpu && doc.target.gpu.name && doc.target.dtype === "F16" ? "--dtype float16" : "",
  ].filter(Boolean).join(" ");
  const download = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([yaml], { type: "text/yaml" }));
    link.download = name.split("/").pop()!;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  const change = totals.bytes - planned.bytes;
  return (
    <section aria-labelledby="result-title">
      <h2 id="result-title">Preset {isEdited && <span class="muted">with {state.edits.length} change{state.edits.length > 1 ? "s" : ""}, {change < 0 ? "−" : "+"}{bytesText(Math.abs(change))}</span>}</h2>
      {isEdited && (
        <p class="row">
          <button type="button" onClick={() => setEdits(state.edits.slice(0, -1))}>undo</button>
          <button type="button" onClick={() => setEdits([])}>as planned</button>
          <span class="muted">mixedprec plan holds the new file against the checkpoint, and so does the server</span>
        </p>
      )}
      <div class="copied"><code id="serve">{line}</code><Copy text={line} /></div>
      <details open={isEdited}>
        <summary>YAML{isEdited ? "" : ", its parents merged in"}</summary>
        <p class="row"><button type="button" onClick={download}>download</button><Copy text={yaml} /></p>
        <textarea id="yaml" readOnly rows={Math.min(24, yaml.split("\n").length)} value={yaml} aria-label="the preset as YAML" spellcheck={false} />
      </details>
    </section>
  );
}

function Copy({ text }: { text: string }) {
  const [said, setSaid] = useState("copy");
  return <button type="button" aria-live="polite" onClick={() => navigator.clipboard.writeText(text).then(
    () => { setSaid("copied"); setTimeout(() => setSaid("copy"), 1500); }, () => setSaid("select it by hand"))}>{said}</button>;
}

/** What the preset beside it does otherwise, the largest change first. */
export function Changes({ state, other, index, onLayer }: { state: State; other: State; index: Int32Array; onLayer: (layer: number) => void }) {
  const rows = useMemo(() => changesOf(state, other, index), [state]);
  const name = other.plan.doc.preset.path.split("/").pop();
  return (
    <section aria-labelledby="changes-title">
      <h2 id="changes-title">What {name} does otherwise</h2>
      {!rows.length ? <p class="muted">Nothing: every layer runs in the same method.</p> : (
        <div class="table"><table>
          <thead><tr><th>layers</th><th class="number">count</th><th>here</th><th>{name}</th><th class="number">here</th><th class="number">{name}</th><th class="number">change</th></tr></thead>
          <tbody>{rows.map((r) => (
            <tr key={`${r.name}/${r.here}/${r.there}`}>
              <td><button type="button" class="link" onClick={() => onLayer(r.first)}>{r.name}</button></td>
              <td class="number">{thousands(r.count)}</td><td>{r.here || "as stored"}</td><td>{r.there || "as stored"}</td>
              <td class="number">{bytesText(r.bytes)}</td><td class="number">{bytesText(r.other)}</td>
              <td class="number">{r.other < r.bytes ? "−" : "+"}{bytesText(Math.abs(r.other - r.bytes))}</td>
            </tr>
          ))}</tbody>
        </table></div>
      )}
    </section>
  );
}

export function Table({ state, lit, layer, onLayer }: { state: State; lit: Uint8Array | null; layer: number; onLayer: (layer: number) => void }) {
  const groups = useMemo(() => groupsOf(state), [state]);
  const shown = lit ? groups.filter((g) => g.layers.some((i) => lit[i])) : groups;
  if (!shown.length) return <p class="muted">No layer has this name.</p>;
  return (
    <div class="table">
      <table>
        <thead><tr><th>layers</th><th class="number">count</th><th>method</th><th>stored → action</th><th class="number">before</th><th class="number">after</th><th class="number">bits</th></tr></thead>
        <tbody>
          {shown.map((g) => (
            <tr key={g.layers[0]} class={layer >= 0 && g.layers.includes(layer) ? "here" : ""}>
              <td><button type="button" class="link mono" onClick={() => onLayer(g.layers.find((i) => !lit || lit[i])!)}>{g.name}</button></td>
              <td class="number">{thousands(g.layers.length)}</td><td>{g.method || <span class="muted">—</span>}</td>
              <td>{g.form.stored || Object.values(g.form.tensors)[0]?.[0]} → {g.action}</td>
              <td class="number">{bytesText(g.before)}</td><td class="number">{bytesText(g.bytes)}</td>
              <td class="number">{Number.isFinite(g.bits) ? g.bits.toFixed(2) : ""}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
