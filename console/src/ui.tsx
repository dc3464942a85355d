//! The small parts that the views are made of.

import type { ComponentChildren, TargetedEvent } from 'preact';
import { useEffect, useRef, useState } from 'preact/hooks';

export function Card(props: { title?: string; aside?: ComponentChildren; children: ComponentChildren; testid?: string }) {
  return (
    <section class="card" data-testid={props.testid}>
      {(props.title || props.aside) && (
        <header class="card-head">
          {props.title && <h2>{props.title}</h2>}
          {props.aside}
        </header>
      )}
      {props.children}
    </section>
  );
}

/** A label over its control. `hint` is read out with it. */
export function Field(props: { label: string; hint?: ComponentChildren; error?: string | undefined; children: ComponentChildren }) {
  return (
    <label class={`field${props.error ? ' wrong' : ''}`}>
      <span class="field-label">{props.label}</span>
      {props.children}
      {props.error ? <span class="field-error">{props.error}</span> : props.hint && <span class="field-hint">{props.hint}</span>}
    </label>
  );
}

export function Notice(props: { kind: 'info' | 'good' | 'bad'; children: ComponentChildren; testid?: string }) {
  return (
    <div class={`notice ${props.kind}`} role={props.kind === 'bad' ? 'alert' : 'status'} data-testid={props.testid}>
      {props.children}
    </div>
  );
}

export function Empty(props: { icon: IconName; title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      <Icon name={props.icon} />
      <strong>{props.title}</strong>
      {props.children && <div>{props.children}</div>}
    </div>
  );
}

/** A command to type, and a button that copies it. */
export function Command(props: { text: string }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(props.text);
      setCopied(true);
      setTimeout(() => setCopied(false), 1500);
    } catch {
      // No clipboard on plain http from elsewhere: the text can be selected.
    }
  };
  return (
    <div class="command">
      <code>{props.text}</code>
      <button type="button" class="icon-button" onClick={copy} aria-label={`Copy: ${props.text}`}>
        <Icon name={copied ? 'check' : 'copy'} />
      </button>
    </div>
  );
}

/** Asks once more before it acts. */
export function ConfirmButton(props: {
  label: string;
  confirm: string;
  onConfirm: () => void;
  testid?: string;
  disabled?: boolean;
}) {
  const [asking, setAsking] = useState(false);
  useEffect(() => {
    if (!asking) return undefined;
    const timer = setTimeout(() => setAsking(false), 4000);
    return () => clearTimeout(timer);
  }, [asking]);
  const click = () => {
    if (asking) props.onConfirm();
    setAsking(!asking);
  };
  return (
    <button type="button" class={asking ? 'button danger' : 'button quiet'} onClick={click} data-testid={props.testid} disabled={props.disabled}>
      {asking ? props.confirm : props.label}
    </button>
  );
}

/** The value of an input, as an event handler. */
export function onText(set: (value: string) => void) {
  return (event: TargetedEvent<HTMLInputElement | HTMLTextAreaElement | HTMLSelectElement>) => set(event.currentTarget.value);
}

/** Calls `tick` every `periodMs`, beginning now, one at a time, until it is unmounted or `key` changes. */
export function usePoll(tick: (signal: AbortSignal) => Promise<void>, periodMs: number, key: string): void {
  const latest = useRef(tick);
  latest.current = tick;
  useEffect(() => {
    const stop = new AbortController();
    let timer: ReturnType<typeof setTimeout> | undefined;
    const run = async () => {
      await latest.current(stop.signal).catch(() => {});
      if (!stop.signal.aborted) timer = setTimeout(run, periodMs);
    };
    void run();
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [periodMs, key]);
}

const ICONS = {
  live: 'M3 12h4l3-8 4 16 3-8h4',
  users: 'M12 12a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM4.5 20c.8-3.4 3.8-5.5 7.5-5.5s6.7 2.1 7.5 5.5',
  broadcast: 'M12 13a1.5 1.5 0 1 0 0-3 1.5 1.5 0 0 0 0 3zM8 7.5a6 6 0 0 0 0 8M16 7.5a6 6 0 0 1 0 8M5 4.5a10.5 10.5 0 0 0 0 14M19 4.5a10.5 10.5 0 0 1 0 14',
  chat: 'M4 5h16v11H10l-5 4v-4H4z',
  copy: 'M9 9h10v11H9zM5 15V4h10',
  check: 'M5 13l4.5 4.5L19 7',
  send: 'M4 12l16-8-5 17-4-7z',
  key: 'M15 4a5 5 0 1 0-3.9 8.1L4 19v2h4v-2h2v-2h2l1.6-1.7A5 5 0 0 0 15 4zM16 8h.01',
  plug: 'M9 3v5M15 3v5M6 8h12v3a6 6 0 0 1-12 0zM12 17v4',
  inbox: 'M4 13l3-8h10l3 8v6H4zM4 13h5l1.5 2.5h3L15 13h5',
  system: 'M4 5h16v11H4zM9 20h6M12 16v4',
  light: 'M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6L7 7M17 17l1.4 1.4M18.4 5.6L17 7M7 17l-1.4 1.4',
  dark: 'M20 14.5A8 8 0 0 1 9.5 4 8 8 0 1 0 20 14.5z',
  tab: 'M4 9h16M4 5h16v14H4zM10 5v4',
} as const;
export type IconName = keyof typeof ICONS;

export function Icon(props: { name: IconName }) {
  return (
    <svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false">
      <path d={ICONS[props.name]} />
    </svg>
  );
}
