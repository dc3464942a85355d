//! What a room shows, in order: the room's messages by their seq, each once, and between them what else reached the user.

import type { Delivery, HistoryMessage } from '@carillon/client';

/** Lines kept, here and in the browser's storage. */
const MAX_LINES = 300;

export interface Line {
  /** Place in the room: its seq, or for what has none a fraction more than the line before it. */
  order: number;
  /** What makes it the same line as another. */
  key: string;
  kind: 'message' | 'push' | 'broadcast';
  from: string;
  text: string;
  /** Unix time in milliseconds. */
  at: number;
  /** It was sent while this user was away. */
  missed: boolean;
}

/** What goes over the wire. */
export interface ChatPayload {
  from: string;
  text: string;
  at: number;
}

/** The lines with this one in its place; the same array if it is there already. */
export function insert(lines: readonly Line[], line: Line): readonly Line[] {
  if (lines.some((other) => other.key === line.key)) return lines;
  let at = lines.length;
  while (at > 0 && (lines[at - 1]?.order ?? 0) > line.order) at -= 1;
  return [...lines.slice(0, at), line, ...lines.slice(at)].slice(-MAX_LINES);
}

export function lineOf(message: Delivery, kind: Line['kind'], lines: readonly Line[], missed: boolean): Line {
  const { from, text, at } = readPayload(message.text);
  const last = lines.at(-1)?.order ?? 0;
  const placed = kind === 'message' && message.seq > 0;
  return {
    order: placed ? message.seq : last + 1e-6,
    key: message.seq > 0 ? keyOf(message) : `${message.topic} ${Date.now()} ${Math.random()}`,
    kind,
    from,
    text,
    at: at || Date.now(),
    missed: missed && kind === 'message',
  };
}

export function lineOfHistory(message: HistoryMessage): Line {
  const { from, text, at } = readPayload(message.text);
  return { order: message.seq, key: keyOf(message), kind: 'message', from: from || (message.publisher ?? ''), text, at: at || message.publishedMs, missed: false };
}

function keyOf(message: { topic: string; seq: number; id: string }): string {
  return `${message.topic} ${message.seq} ${message.id}`;
}

/** A backend may have pushed to the room, in words of its own: then that is the text. */
function readPayload(payload: string): ChatPayload {
  try {
    const read = JSON.parse(payload) as Partial<ChatPayload> | null;
    if (read && typeof read === 'object' && typeof read.text === 'string') {
      return {
        from: typeof read.from === 'string' ? read.from : '',
        text: read.text,
        at: typeof read.at === 'number' && Number.isFinite(read.at) && Math.abs(read.at) < 8.64e15 ? read.at : 0,
      };
    }
  } catch {
    // Not JSON.
  }
  return { from: '', text: payload, at: 0 };
}

/** Lines that were shown when the room was last open here; what came since is the session's to deliver. */
export function recall(key: string): Line[] {
  try {
    const kept = JSON.parse(localStorage.getItem(key) ?? '[]') as unknown;
    if (!Array.isArray(kept)) return [];
    return (kept as Line[]).filter((line) => typeof line?.key === 'string').map((line) => ({ ...line, missed: false }));
  } catch {
    return [];
  }
}

export function remember(key: string, lines: readonly Line[]): void {
  try {
    if (lines.length > 0) localStorage.setItem(key, JSON.stringify(lines));
    else localStorage.removeItem(key);
  } catch {
    // Full or switched off: then the room opens empty.
  }
}
