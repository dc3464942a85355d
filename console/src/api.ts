//! The center's HTTP API, as far as the console uses it.

import { credentials } from './credentials';
import { createStore } from './store';

/** Where the API is: next to the page. */
export const base = new URL('.', location.href.split('#', 1)[0]).href;
const TIMEOUT_MS = 15_000;

export interface Numbers {
  connections: number;
  delivered: number;
  published: number;
  dropped: number;
  /** null until the server has two reports. */
  delivered_per_second: number | null;
  published_per_second: number | null;
}

export interface GatewayNumbers extends Numbers {
  gateway: string;
  age_seconds: number;
}

export interface Overview extends Numbers {
  app: string;
  gateways: GatewayNumbers[];
}

export interface Session {
  device: string;
  gateway: string;
  since: string;
  address: string;
}

export interface User {
  online: boolean;
  sessions: Session[];
}

export interface Accepted {
  id: string;
  topic: string;
  epoch: number;
  seq: number;
  duplicate?: boolean;
}

export interface Job {
  id: string;
  topic: string;
  epoch: number;
  seq: number;
  state: 'running' | 'paused' | 'cancelled' | 'finished' | 'interrupted';
  total: number;
  done: number;
  rate_per_second: number;
  started_at: string;
  ended_at?: string;
}

export interface PushBody {
  payload: string;
  qos?: 0 | 1;
  ttl_seconds?: number;
  store?: boolean;
  id?: string;
}

/** How the last call went. `away`: nobody answered, or with a server error. */
export type Reach = 'unknown' | 'ok' | 'away' | 'no-key' | 'refused';
export const reach = createStore<Reach>('unknown');
credentials.watch(() => reach.set('unknown'));

export class ApiError extends Error {
  readonly status: number;
  /** Which field of the request is wrong. */
  readonly field: string | undefined;

  constructor(status: number, message: string, field?: string) {
    super(message);
    this.name = 'ApiError';
    this.status = status;
    this.field = field;
  }

  /** Nobody answered. */
  get away(): boolean {
    return this.status === 0;
  }
}

export const api = {
  overview: (signal?: AbortSignal) => call<Overview>('GET', 'overview', undefined, signal),
  user: (user: string, signal?: AbortSignal) => call<User>('GET', `users/${seg(user)}`, undefined, signal),
  kick: (user: string, device?: string) =>
    call<{ kicked: number }>('DELETE', `users/${seg(user)}/sessions${device ? `?device=${seg(device)}` : ''}`),
  push: (user: string, body: PushBody) => call<Accepted>('POST', `users/${seg(user)}/messages`, body),
  startBroadcast: (body: PushBody & { rate_per_second?: number }) => call<Job>('POST', 'broadcasts', body),
  broadcast: (id: string, signal?: AbortSignal) => call<Job>('GET', `broadcasts/${seg(id)}`, undefined, signal),
  control: (id: string, what: 'pause' | 'resume' | 'cancel') => call<Job>('POST', `broadcasts/${seg(id)}:${what}`),
};

async function call<T>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
  const { key, app } = credentials.get();
  if (!key) {
    reach.set('no-key');
    throw new ApiError(401, 'This page has no API key.');
  }
  const timeout = AbortSignal.timeout(TIMEOUT_MS);
  let response: Response;
  try {
    response = await fetch(new URL(`v1/apps/${seg(app)}/${path}`, base), {
      method,
      headers: {
        authorization: `Bearer ${key}`,
        accept: 'application/json',
        ...(body !== undefined && { 'content-type': 'application/json' }),
      },
      body: body === undefined ? null : JSON.stringify(body),
      signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
    });
  } catch (cause) {
    if (signal?.aborted) throw cause;
    reach.set('away');
    throw new ApiError(0, 'The server does not answer.');
  }
  const answer = (await response.json().catch(() => undefined)) as Record<string, unknown> | undefined;
  if (response.ok && answer) {
    reach.set('ok');
    return answer as T;
  }
  if (response.status === 401 || response.status === 403 || isUnknownApp(answer)) reach.set('refused');
  else reach.set(response.status >= 502 ? 'away' : 'ok');
  const says = answer?.['detail'] ?? answer?.['title'] ?? `The server answered ${response.status}.`;
  throw new ApiError(response.status, String(says), answer?.['field'] as string | undefined);
}

function isUnknownApp(answer: Record<string, unknown> | undefined): boolean {
  return String(answer?.['type'] ?? '').endsWith('/unknown-app');
}

function seg(text: string): string {
  return encodeURIComponent(text);
}
