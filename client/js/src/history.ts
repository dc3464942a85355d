//! Pull: reading a topic's log over HTTP.

import { getJson } from './http.js';
import { trimSlash } from './endpoint.js';

export interface HistoryQuery {
  /** Address of the HTTP API: `https://push.example.com`. */
  http: string;
  app: string;
  /** Full topic name, or without the app's level. */
  topic: string;
  /** API key of the app. */
  apiKey: string;
  /** Only what came after this one: `{epoch}:{seq}`, as in a page's `next`. From the log's beginning if not given. */
  after?: string;
  /** Most messages in the answer. */
  limit?: number;
  signal?: AbortSignal;
}

export interface HistoryMessage {
  topic: string;
  payload: Uint8Array;
  text: string;
  epoch: number;
  seq: number;
  id: string;
  /** Unix time in milliseconds at which it was accepted. */
  publishedMs: number;
  contentType: string | undefined;
  properties: Readonly<Record<string, string>>;
  /** The user whose device published it; undefined for a backend. */
  publisher: string | undefined;
}

export interface HistoryPage {
  /** In the order of their seqs. */
  messages: HistoryMessage[];
  /** `after` of the next page. */
  next: string;
  more: boolean;
}

/** `GET /v1/apps/{app}/topics/{topic}/messages?after=&limit=`. */
export async function pullHistory(query: HistoryQuery): Promise<HistoryPage> {
  const url = new URL(
    `${trimSlash(query.http)}/v1/apps/${encodeURIComponent(query.app)}/topics/${encodeURIComponent(query.topic)}/messages`,
  );
  if (query.after) url.searchParams.set('after', query.after);
  if (query.limit !== undefined) url.searchParams.set('limit', String(query.limit));
  const answer = (await getJson(url.href, {
    bearer: query.apiKey,
    ...(query.signal && { signal: query.signal }),
  })) as WirePage;
  return {
    messages: (answer.messages ?? []).map(readMessage),
    next: answer.next ?? '',
    more: answer.more ?? false,
  };
}

interface WirePage {
  messages?: WireMessage[];
  next?: string;
  more?: boolean;
}

/** One of `payload` (text) and `payload_base64` is there. */
interface WireMessage {
  topic: string;
  payload?: string;
  payload_base64?: string;
  epoch: number;
  seq: number;
  id: string;
  published_at: string;
  content_type?: string;
  properties?: Record<string, string>;
  publisher?: string;
}

function readMessage(wire: WireMessage): HistoryMessage {
  const payload =
    wire.payload_base64 === undefined
      ? new TextEncoder().encode(wire.payload ?? '')
      : Uint8Array.from(atob(wire.payload_base64), (char) => char.charCodeAt(0));
  return {
    topic: wire.topic,
    payload,
    text: wire.payload ?? new TextDecoder().decode(payload),
    epoch: wire.epoch,
    seq: wire.seq,
    id: wire.id,
    publishedMs: Date.parse(wire.published_at),
    contentType: wire.content_type,
    properties: wire.properties ?? {},
    publisher: wire.publisher,
  };
}
