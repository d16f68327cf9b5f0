// The page: one plan as a map of bytes and a grid of layers, its rules, and what may be changed in it.
import { render } from "preact";
import { useCallback, useEffect, useMemo, useState } from "preact/hooks";
import { Canvas } from "./canvas";
import { bytesText, Plan, shortName, thousands, type PageData } from "./document";
import { applied, faultsOf, totalsOf, type Edit, type State } from "./edits";
import { gridPicture } from "./grid";
import { Faults, LayerPanel, leftOf, RulePanel, Rules, ruleStats, type Selection } from "./panels";
import type { Cell, Look } from "./picture";
import { bitsMeasure, changeMeasure, matched, overlayMeasure, type Measure } from "./scale";
import { CardBar, Changes, Head, Legend, Result, Table } from "./sections";
import { partOf, towersOf, treemapPicture, type Focus } from "./treemap";
import { describe, filtered } from "./words";

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
      {layer < 0 && <span class="muted">a double click or tap zooms in</span>}
    </nav>
  );
}

const page = document.getElementById("page")!;
const data = JSON.parse(document.getElementById("data")!.textContent!) as PageData;
document.title = `${data.plan.preset.path.split("/").pop()} over ${data.plan.model.path.split("/").pop()}`;
page.textContent = "";
render(<Page data={data} />, page);
