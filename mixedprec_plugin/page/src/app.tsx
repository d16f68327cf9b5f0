// The page: one plan as a map of bytes and a grid of layers, its rules, and what may be changed in it.
import { render } from "preact";
import { useCallback, useEffect, useMemo, useState } from "preact/hooks";
import { Canvas } from "./canvas";
import { bytesText, gigabytes, Plan, shortName, thousands, type Card, type PageData } from "./document";
import { applied, faultsOf, presetText, totalsOf, type Edit, type State, type Totals } from "./edits";
import { gridPicture } from "./grid";
import { Faults, LayerPanel, leftOf, RulePanel, Rules, ruleStats, type Selection } from "./panels";
import type { Cell, Look } from "./picture";
import { bitsMeasure, changeMeasure, matched, noneColor, overlayMeasure, type Measure } from "./scale";
import { partOf, towersOf, treemapPicture, type Focus } from "./treemap";
import { changesOf, describe, filtered, groupsOf } from "./words";

function useDark(): boolean {
  const query = useMemo(() => matchMedia("(prefers-color-scheme: dark)"), []);
  const [isDark, setDark] = useState(query.matches);
  useEffect(() => {
    const change = () => setDark(query.matches);
    query.addEventListener("change", change);
    return () => query.removeEventListener("change", change);
  }, []);
  return isDark;
}

function Page({ data }: { data: PageData }) {
  const isDark = useDark();
  const plan = useMemo(() => new Plan(data.plan), []);
  const other = useMemo(() => (data.against ? applied(new Plan(data.against), []) : null), []);
  const index = useMemo(() => (other ? matched(plan, other.plan) : null), []);
  const [edits, setEdits] = useState<Edit[]>([]);
  const [text, setText] = useState("");
  const [hovered, setHovered] = useState<number | null>(null);
  const [selection, setSelection] = useState<Selection>(null);
  const [focus, setFocus] = useState<Focus>({});
  const [shown, setShown] = useState("bits");

  const state = useMemo(() => applied(plan, edits), [edits]);
  const totals = useMemo(() => totalsOf(state), [state]);
  const planned = useMemo(() => totalsOf(applied(plan, [])), []);
  const faults = useMemo(() => faultsOf(state), [state]);
  const stats = useMemo(() => ruleStats(state), [state]);
  const measures = useMemo(() => {
    const all = new Map<string, Measure>([["bits", bitsMeasure(state)]]);
    if (other && index) all.set("change", changeMeasure(state, other, index));
    data.overlays.forEach((overlay, k) => all.set(`overlay${k}`, overlayMeasure(overlay)));
    return all;
  }, [state, isDark]);
  const measure = measures.get(shown)!;
  const byText = useMemo(() => filtered(state, text), [state, text]);
  const lit = useMemo(() => {
    const rule = hovered ?? (selection && "rule" in selection ? selection.rule : null);
    if (rule === null) return byText;
    return Uint8Array.from({ length: plan.size }, (_, i) => Number(plan.ruleOf(i) === rule));
  }, [byText, hovered, selection]);
  const faulty = useMemo(() => {
    const worst = plan.doc.forms.map((f) => Math.max(0, ...f.problems.map((p) => (plan.doc.problems[p].severity === "error" ? 2 : 1))));
    const marks = Uint8Array.from(plan.form, (form) => worst[form]);
    // an error of the plan's is mended or not where a method was changed; what was found now is shown
    for (let i = 0; i < plan.size; i++) if (state.chosen[i] >= 0) marks[i] = 0;
    for (const fault of faults) for (const i of fault.layers) marks[i] = 2;
    return marks;
  }, [state, faults]);
  const colors = useMemo(() => Array.from({ length: plan.size }, (_, i) => measure.color(measure.value(i))), [measure]);
  const layer = selection && "layer" in selection ? selection.layer : -1;
  const look = useMemo<Look>(() => {
    const style = getComputedStyle(document.documentElement);
    const color = (name: string) => style.getPropertyValue(`--${name}`).trim();
    return { plan, measure, colors, lit, selected: layer, faulty, ink: color("ink"), muted: color("muted"), surface: color("surface"), error: color("error"), warning: color("warning") };
  }, [measure, lit, layer, faulty, isDark]);

  const makeMap = useCallback((width: number) => treemapPicture(state, focus, width, Math.round(Math.max(300, Math.min(480, width * 0.5)))), [state, focus]);
  const makeGrid = useCallback((width: number) => gridPicture(plan, width), [plan]);
  const words = useCallback((cell: Cell) => describe(state, cell.layers, measure), [state, measure]);
  const select = useCallback((cell: Cell) => setSelection({ layer: cell.layers[0] }), []);
  const onRule = useCallback((rule: number) => setSelection({ rule }), []);
  const onLayer = useCallback((i: number) => setSelection({ layer: i }), []);
  const onEdit = useCallback((edit: Edit) => setEdits((all) => [
    ...all.filter((e) => !(e.kind === "rule" && edit.kind === "rule" && e.rule === edit.rule)), edit,
  ]), []);
  const zoom = useCallback((cell: Cell) => setFocus((now) => deeper(plan, now, cell.layers[0])), []);
  const back = useCallback(() => setFocus(shallower), []);
  const left = useMemo(() => leftOf(state), [state]);
  const numErrors = plan.doc.problems.filter((p, k) => p.severity === "error" && (!p.layers || left[k])).length + faults.length;
  // the first filter needs them
  useEffect(() => void setTimeout(() => plan.names, 200), []);
  useEffect(() => {
    // on a phone the panel is below the pictures
    if (selection && matchMedia("(max-width: 1000px)").matches) document.querySelector(".selected")!.scrollIntoView({ block: "nearest" });
  }, [selection]);

  return (
    <>
      <Head plan={plan} totals={totals} planned={planned} other={other} isEdited={edits.length > 0} numErrors={numErrors} />
      <CardBar card={plan.doc.card} plan={plan} totals={totals} />
      <div class="tools" role="search">
        <label class="filter"><span class="unseen">Filter layers</span>
          <input id="filter" type="search" value={text} onInput={(e) => setText(e.currentTarget.value)} spellcheck={false} autocomplete="off"
            placeholder="filter: name, *.glob, method:awq, rule:3, bits<5, fault" /></label>
        {measures.size > 1 && (
          <label>colour <select id="measure" value={shown} onChange={(e) => setShown(e.currentTarget.value)}>
            {[...measures].map(([key, m]) => <option key={key} value={key}>{m.name}</option>)}
          </select></label>
        )}
        <Legend measure={measure} />
        <span class="muted" aria-live="polite" id="found">{lit ? foundText(state, lit) : ""}</span>
      </div>
      <div class="columns">
        <div class="pictures">
          <section aria-labelledby="map-title">
            <h2 id="map-title">Bytes served</h2>
            <Crumbs plan={plan} focus={focus} layer={layer} setFocus={setFocus} />
            <Canvas id="map" label={`Map of the bytes served, ${bytesText(totals.bytes)} in ${thousands(plan.size)} layers; arrow keys move, enter selects, plus and minus zoom. The table below says the same.`}
              make={makeMap} look={look} describe={words} onSelect={select} onOpen={zoom} onBack={back} />
          </section>
          <section aria-labelledby="grid-title">
            <h2 id="grid-title">Blocks and layers</h2>
            <Canvas id="grid" label="Grid of blocks by layers, experts as columns; arrow keys move, enter selects. The table below says the same." make={makeGrid} look={look} describe={words} onSelect={select} />
          </section>
        </div>
        <aside>
          {selection && (
            <div class="selected">
              <button type="button" class="close" aria-label="close" onClick={() => setSelection(null)}>×</button>
              {"layer" in selection
                ? <LayerPanel state={state} other={other} index={index} layer={selection.layer} overlays={data.overlays} onRule={onRule} onEdit={onEdit} />
                : <RulePanel state={state} stats={stats} rule={selection.rule} onLayer={onLayer} onEdit={onEdit} />}
            </div>
          )}
          {!selection && <p class="muted hint">Choose a layer in a picture, or a rule, to see what decides about it, and to try another method.</p>}
          <section aria-labelledby="rules-title">
            <h2 id="rules-title">Rules <span class="muted">the last one that matches a layer wins</span></h2>
            <Rules state={state} stats={stats} selected={selection && "rule" in selection ? selection.rule : -1} onHover={setHovered} onSelect={onRule} />
          </section>
        </aside>
      </div>
      <section aria-labelledby="faults-title">
        <h2 id="faults-title">Faults</h2>
        <Faults plan={plan} left={left} faults={faults} onRule={onRule} onLayer={onLayer} />
      </section>
      {other && index && <Changes state={state} other={other} index={index} onLayer={onLayer} />}
      <Result state={state} setEdits={setEdits} totals={totals} planned={planned} />
      <section aria-labelledby="table-title">
        <h2 id="table-title">All layers</h2>
        <Table state={state} lit={byText} layer={layer} onLayer={onLayer} />
      </section>
    </>
  );
}

function deeper(plan: Plan, now: Focus, i: number): Focus {
  const template = plan.template[i];
  const part = partOf(plan.doc.layers[template].name, towersOf(plan));
  if (now.part === undefined) return { part };
  if (now.template === undefined) return { part, template };
  return plan.block[i] < 0 ? now : { part, template, block: plan.block[i] };
}

function shallower({ part, template, block }: Focus): Focus {
  if (block !== undefined) return { part, template };
  return template !== undefined ? { part } : {};
}

function foundText(state: State, lit: Uint8Array): string {
  let [count, bytes] = [0, 0];
  for (let i = 0; i < lit.length; i++) if (lit[i]) { count++; bytes += state.bytes[i]; }
  return count ? `${thousands(count)} layers, ${bytesText(bytes)}` : "no layer";
}

function Crumbs({ plan, focus, layer, setFocus }: { plan: Plan; focus: Focus; layer: number; setFocus: (focus: Focus) => void }) {
  const whole = layer < 0 ? focus : (() => {
    let all: Focus = {};
    for (let k = 0; k < 3; k++) all = deeper(plan, all, layer);
    return all;
  })();
  const levels: [string, Focus, boolean][] = [["everything", {}, focus.part === undefined]];
  if (whole.part !== undefined) levels.push([whole.part, { part: whole.part }, focus.part === whole.part && focus.template === undefined]);
  if (whole.template !== undefined)
    levels.push([shortName(plan.doc.layers[whole.template].name).split(".").pop()!, { part: whole.part, template: whole.template }, focus.template === whole.template && focus.block === undefined]);
  if (whole.block !== undefined && whole.block >= 0) levels.push([`block ${whole.block}`, whole, focus.template === whole.template && focus.block === whole.block]);
  return (
    <nav class="crumbs" aria-label="zoom of the map">
      {levels.map(([name, to, isHere]) => (
        <button type="button" key={name} class="link" aria-current={isHere ? "true" : undefined} onClick={() => setFocus(to)}>{name}</button>
      ))}
      {layer < 0 && <span class="muted">double click zooms in</span>}
    </nav>
  );
}

function Head({ plan, totals, planned, other, isEdited, numErrors }: {
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
        {figure("bits a weight", totals.bits.toFixed(2), was.bits.toFixed(2), there && there.bits.toFixed(2))}
        {figure("saved of unquantized", saved(totals), saved(was), there && saved(there))}
        {figure("stored", bytesText(totals.before), bytesText(was.before), null)}
        {figure("layers", thousands(plan.size), thousands(plan.size), null)}
        <div class={numErrors ? "error" : ""}><dt>faults</dt><dd><a href="#faults-title">{numErrors ? thousands(numErrors) : numWarnings ? `${numWarnings} warning${numWarnings > 1 ? "s" : ""}` : "none"}</a></dd></div>
      </dl>
    </header>
  );
}

function CardBar({ card, plan, totals }: { card: Card | null; plan: Plan; totals: Totals }) {
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

function Legend({ measure }: { measure: Measure }) {
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

function Result({ state, setEdits, totals, planned }: { state: State; setEdits: (edits: Edit[]) => void; totals: Totals; planned: Totals }) {
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
function Changes({ state, other, index, onLayer }: { state: State; other: State; index: Int32Array; onLayer: (layer: number) => void }) {
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

function Table({ state, lit, layer, onLayer }: { state: State; lit: Uint8Array | null; layer: number; onLayer: (layer: number) => void }) {
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

const page = document.getElementById("page")!;
const data = JSON.parse(document.getElementById("data")!.textContent!) as PageData;
document.title = `${data.plan.preset.path.split("/").pop()} over ${data.plan.model.path.split("/").pop()}`;
page.textContent = "";
render(<Page data={data} />, page);
