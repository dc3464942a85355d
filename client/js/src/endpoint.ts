//! Where to connect: what the dispatcher answers, and which of it this device can use.

import { CarillonError } from './error.js';
import { getJson } from './http.js';

export type Scheme = 'mqtt' | 'mqtts' | 'ws' | 'wss';

/** A gateway's address, as mqtt.js wants it. */
export interface Address {
  readonly scheme: Scheme;
  readonly host: string;
  readonly port: number;
  /** WebSocket only. */
  readonly path: string;
}

const DEFAULT_PORT: Record<Scheme, number> = { mqtt: 1883, mqtts: 8883, ws: 80, wss: 443 };

/** `ws://host:port/path`, `wss://…`, `mqtt://host:port` (also `tcp://`), `mqtts://…` (also `ssl://`, `tls://`). */
export function parseAddress(url: string): Address {
  const colon = url.indexOf('://');
  const scheme = SCHEMES.get(url.slice(0, colon));
  if (colon < 0 || !scheme) {
    throw new CarillonError('invalid', `"${url}" is not a gateway address: it must begin with ws://, wss://, mqtt:// or mqtts://`);
  }
  let parsed: URL;
  try {
    // As http, because URL knows how to take only special schemes apart in every engine.
    parsed = new URL(`http${url.slice(colon)}`);
  } catch (cause) {
    throw new CarillonError('invalid', `"${url}" is not a valid URL`, { cause });
  }
  const webSocket = scheme === 'ws' || scheme === 'wss';
  // http's own default, 80, is not shown by URL: look for it in the text.
  const port = parsed.port ? Number(parsed.port) : /:80(\/|\?|$)/.test(url) ? 80 : DEFAULT_PORT[scheme];
  return { scheme, host: parsed.hostname, port, path: webSocket ? parsed.pathname + parsed.search : '' };
}

const SCHEMES = new Map<string, Scheme>([
  ['mqtt', 'mqtt'],
  ['tcp', 'mqtt'],
  ['mqtts', 'mqtts'],
  ['ssl', 'mqtts'],
  ['tls', 'mqtts'],
  ['ws', 'ws'],
  ['wss', 'wss'],
]);

/** Asks the dispatcher for gateways, best first. */
export async function findEndpoints(http: string, device: string, signal?: AbortSignal): Promise<Address[]> {
  const answer = await getJson(`${trimSlash(http)}/v1/endpoints?device=${encodeURIComponent(device)}`, {
    ...(signal && { signal }),
  });
  const listed = (answer as { endpoints?: unknown }).endpoints;
  if (!Array.isArray(listed)) {
    throw new CarillonError('http', `${http} answered without a list of endpoints: is it a Carillon server?`);
  }
  return listed.flatMap((entry) => addresses(entry));
}

const PREFERENCE: readonly Scheme[] = ['mqtts', 'mqtt', 'wss', 'ws'];

/** An entry: a gateway's addresses by scheme, those it has. What is not understood is left out: it may be newer than this. */
function addresses(entry: unknown): Address[] {
  const byScheme = (entry ?? {}) as Record<string, unknown>;
  return PREFERENCE.flatMap((scheme) => {
    const url = byScheme[scheme];
    if (typeof url !== 'string') return [];
    try {
      return [parseAddress(url)];
    } catch {
      return [];
    }
  });
}

/**
 * The address for attempt number `attempt` (0, 1, …). In a browser only WebSockets can be used, and from a page over
 * https only encrypted ones; elsewhere plain MQTT is preferred, because it is the smaller of the two.
 */
export function chooseAddress(
  addresses: readonly Address[],
  attempt: number,
  browser: { securePage: boolean } | undefined = thisBrowser(),
): Address | undefined {
  const of = (...schemes: Scheme[]) => addresses.filter((address) => schemes.includes(address.scheme));
  const usable = browser ? (browser.securePage ? of('wss') : of('ws', 'wss')) : of('mqtt', 'mqtts');
  if (usable.length > 0 || browser) return usable[attempt % usable.length];
  return addresses[attempt % addresses.length];
}

/** The address that a Server Reference (MQTT 5.0 §4.11) names: a URL, or `host[:port]` reached as `current` was. */
export function referredAddress(reference: string, current: Address): Address | undefined {
  const first = reference.trim().split(/\s+/)[0];
  if (!first) return undefined;
  try {
    if (first.includes('://')) return parseAddress(first);
    const hasPort = /:\d+$/.test(first);
    return parseAddress(`${current.scheme}://${first}${hasPort ? '' : `:${current.port}`}${current.path}`);
  } catch {
    return undefined;
  }
}

/** Undefined outside browsers. */
export function thisBrowser(): { securePage: boolean } | undefined {
  if (typeof window === 'undefined' || typeof document === 'undefined') return undefined;
  return { securePage: window.location.protocol === 'https:' };
}

export function trimSlash(url: string): string {
  return url.replace(/\/+$/, '');
}
