//! A line over the last two minutes, drawn as SVG.

import { useState } from 'preact/hooks';

import { WINDOW } from './overview';

const WIDTH = 240;
const HEIGHT = 64;

export function Sparkline(props: { values: number[]; label: string; format: (value: number) => string; small?: boolean }) {
  const [at, setAt] = useState<number | undefined>(undefined);
  const { values } = props;
  const top = niceCeiling(Math.max(...values, 1));
  // The newest value is at the right edge; the line grows in from there.
  const x = (index: number) => ((WINDOW - values.length + index) / (WINDOW - 1)) * WIDTH;
  const y = (value: number) => HEIGHT - 2 - (value / top) * (HEIGHT - 6);
  const line = values.map((value, index) => `${index ? 'L' : 'M'}${x(index).toFixed(1)} ${y(value).toFixed(1)}`).join('');
  const hovered = at === undefined ? undefined : values[at];
  const point = (event: PointerEvent) => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const slot = Math.round(((event.clientX - box.left) / box.width) * (WINDOW - 1));
    const index = slot - (WINDOW - values.length);
    setAt(index >= 0 && index < values.length ? index : undefined);
  };
  const last = values.at(-1) ?? 0;
  return (
    <div class={props.small ? 'spark small' : 'spark'} onPointerMove={point} onPointerLeave={() => setAt(undefined)}>
      <svg
        viewBox={`0 0 ${WIDTH} ${HEIGHT}`}
        preserveAspectRatio="none"
        role="img"
        aria-label={`${props.label}, last two minutes: now ${props.format(last)}, highest ${props.format(Math.max(...values, 0))}`}
      >
        {values.length > 1 && (
          <>
            <path class="area" d={`${line}L${WIDTH} ${HEIGHT}L${x(0).toFixed(1)} ${HEIGHT}Z`} />
            <path class="line" d={line} />
          </>
        )}
        {at !== undefined && <line class="cursor" x1={x(at)} x2={x(at)} y1="0" y2={HEIGHT} />}
      </svg>
      {!props.small && (
        <span class="spark-note" aria-hidden="true">
          {hovered === undefined ? `max ${props.format(Math.max(...values, 0))}` : `${props.format(hovered)} · ${values.length - 1 - (at ?? 0)} s ago`}
        </span>
      )}
    </div>
  );
}

/** 1, 2 or 5 times a power of ten: a scale that does not move with every sample. */
function niceCeiling(value: number): number {
  const power = 10 ** Math.floor(Math.log10(value));
  const step = [1, 2, 5, 10].find((candidate) => candidate * power >= value) ?? 10;
  return step * power;
}
