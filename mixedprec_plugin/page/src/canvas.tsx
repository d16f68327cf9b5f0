// A picture on a canvas: pointer, arrow keys, and words for those who do not see it.
import { useCallback, useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { Cell, Look, Picture } from "./picture";

interface Props {
  id: string;
  label: string;
  make: (width: number) => Picture;
  look: Look;
  /** A cell in words, the first line its name. */
  describe: (cell: Cell) => string[];
  onSelect: (cell: Cell) => void;
  onOpen?: (cell: Cell) => void;
  onBack?: () => void;
}

export function Canvas({ id, label, make, look, describe, onSelect, onOpen, onBack }: Props) {
  const frame = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const picture = useRef<Picture | null>(null);
  const [width, setWidth] = useState(0);
  const [cursor, setCursor] = useState<Cell | null>(null);
  const [isKeyed, setKeyed] = useState(false);

  useEffect(() => {
    const seen = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    seen.observe(frame.current!);
    return () => seen.disconnect();
  }, []);

  useLayoutEffect(() => {
    if (!width) return;
    picture.current = make(width);
    setCursor(null);
  }, [width, make]);

  useLayoutEffect(() => {
    const [element, shown] = [canvas.current!, picture.current];
    if (!width || !shown) return;
    const scale = devicePixelRatio || 1;
    element.width = shown.width * scale;
    element.height = shown.height * scale;
    element.style.height = `${shown.height}px`;
    const context = element.getContext("2d")!;
    context.scale(scale, scale);
    shown.draw(context, look);
  }, [width, make, look]);

  const cellAt = useCallback((event: MouseEvent) => picture.current?.at(event.offsetX, event.offsetY) ?? null, []);
  const same = (a: Cell | null, b: Cell | null) => a?.layers[0] === b?.layers[0] && a?.layers.length === b?.layers.length;
  const onMove = (event: MouseEvent) => {
    const found = cellAt(event);
    setKeyed(false);
    if (!same(found, cursor)) setCursor(found);
  };
  const onKey = (event: KeyboardEvent) => {
    const shown = picture.current;
    if (!shown) return;
    if (event.key.startsWith("Arrow")) {
      const from = cursor ?? (look.selected >= 0 ? shown.of(look.selected) : null);
      const to = from ? shown.next(from, event.key, event.shiftKey) : shown.first();
      setKeyed(true);
      if (to) setCursor(to);
    } else if ((event.key === "Enter" || event.key === " ") && cursor) onSelect(cursor);
    else if (event.key === "+" && cursor) onOpen?.(cursor);
    else if ((event.key === "-" || event.key === "Escape") && onBack) onBack();
    else return;
    event.preventDefault();
  };
  const words = cursor ? describe(cursor) : [];
  const right = cursor && cursor.x > width * 0.55;
  return (
    <div class="picture" ref={frame}>
      <canvas
        ref={canvas} id={id} tabIndex={0} role="application" aria-roledescription="picture" aria-label={label}
        onPointerMove={onMove} onPointerLeave={() => !isKeyed && setCursor(null)} onKeyDown={onKey}
        onFocus={(e) => {
          const shown = picture.current;
          if (!shown || cursor || !(e.currentTarget as HTMLElement).matches(":focus-visible")) return;
          setKeyed(true);
          setCursor((look.selected >= 0 && shown.of(look.selected)) || shown.first());
        }}
        onBlur={() => setCursor(null)}
        onClick={(e) => { const cell = cellAt(e); if (cell) onSelect(cell); }}
        onDblClick={(e) => { const cell = cellAt(e); if (cell) onOpen?.(cell); }}
      />
      {cursor && (
        <>
          <div class="cursor" style={{ left: cursor.x, top: cursor.y, width: cursor.w, height: cursor.h }} />
          <div class="tip" aria-hidden="true"
            style={{ [right ? "right" : "left"]: right ? width - cursor.x + 6 : cursor.x + cursor.w + 6, top: cursor.y + Math.min(cursor.h, 60) / 2 }}>
            {words.map((line, k) => <div key={k} class={k ? "" : "name"}>{line}</div>)}
          </div>
        </>
      )}
      <div class="unseen" aria-live="polite">{isKeyed ? words.join(", ") : ""}</div>
    </div>
  );
}
