//! The live numbers: asked for once a second for as long as the page is open, so that the charts have no holes when
//! another view is shown.

import { api, ApiError } from './api';
import type { Overview } from './api';
import { credentials } from './credentials';
import { createStore } from './store';

/** Samples kept: two minutes. */
export const WINDOW = 120;
const PERIOD_MS = 1000;

export interface History {
  now: Overview;
  connections: number[];
  delivered: number[];
  published: number[];
  /** Deliveries a second of each gateway. */
  gateways: Map<string, number[]>;
}

export const overview = createStore<History | undefined>(undefined);

export function startOverview(): () => void {
  let stopped = false;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const stopWatching = credentials.watch(() => {
    overview.set(undefined);
    clearTimeout(timer);
    void tick();
  });
  async function tick(): Promise<void> {
    const asked = credentials.get();
    try {
      const now = await api.overview();
      if (asked === credentials.get()) overview.set(append(overview.get(), now));
    } catch (error) {
      // Told by `reach`. Without a valid key, asking again cannot help: a new key starts it again.
      const denied = error instanceof ApiError && (error.status === 401 || error.status === 403 || error.status === 404);
      if (denied) return;
    }
    if (!stopped && asked === credentials.get()) timer = setTimeout(() => void tick(), PERIOD_MS);
  }
  void tick();
  return () => {
    stopped = true;
    clearTimeout(timer);
    stopWatching();
  };
}

function append(before: History | undefined, now: Overview): History {
  const push = (list: number[] | undefined, value: number | null) => [...(list ?? []), value ?? 0].slice(-WINDOW);
  return {
    now,
    connections: push(before?.connections, now.connections),
    delivered: push(before?.delivered, now.delivered_per_second),
    published: push(before?.published, now.published_per_second),
    gateways: new Map(
      now.gateways.map((g) => [g.gateway, push(before?.gateways.get(g.gateway), g.delivered_per_second)]),
    ),
  };
}
