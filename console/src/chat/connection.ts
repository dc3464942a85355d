//! A room's connection: the lines that were there, those that come, and those that are on their way out.

import { connect, stableClientId } from '@carillon/client';
import type { CarillonClient, CarillonError, Delivery, Status } from '@carillon/client';
import { useCallback, useEffect, useRef, useState } from 'preact/hooks';

import { base } from '../api';
import { credentials } from '../credentials';
import { insert, lineOf, lineOfHistory, recall, remember } from './timeline';
import type { ChatPayload, Line } from './timeline';

/** A session outlives its tab by this time. */
const SESSION_SECONDS = 24 * 3600;
/** Pages of history read at most when there is no session to go on with. */
const MAX_HISTORY_PAGES = 10;

/** A message that the server has not accepted yet. */
export interface Outgoing {
  payload: ChatPayload;
  error: string;
}

export interface Chat {
  status: Status;
  error: CarillonError | undefined;
  lines: readonly Line[];
  outgoing: readonly Outgoing[];
  send: (text: string) => void;
  retry: (outgoing: Outgoing) => void;
  rejoin: () => void;
}

export function useChat(app: string, room: string, name: string): Chat {
  const cache = `carillon.chat.${app}.${room}.${name}`;
  const [status, setStatus] = useState<Status>({ state: 'connecting' });
  const [error, setError] = useState<CarillonError | undefined>(undefined);
  const [lines, setLines] = useState<readonly Line[]>(() => recall(cache));
  const [outgoing, setOutgoing] = useState<readonly Outgoing[]>([]);
  const [generation, setGeneration] = useState(0);
  const client = useRef<CarillonClient | undefined>(undefined);
  const topic = `${app}/g/chat-${room}`;

  const change = useCallback(
    (edit: (lines: readonly Line[]) => readonly Line[]) =>
      setLines((before) => {
        const after = edit(before);
        if (after !== before) remember(cache, after);
        return after;
      }),
    [cache],
  );

  useEffect(() => {
    setError(undefined);
    const joined = connect({
      endpoint: base,
      app,
      user: name,
      clientId: stableClientId(`chat-${room}-${name}`),
      sessionExpirySeconds: SESSION_SECONDS,
      keepAliveSeconds: 30,
      connectTimeoutMs: 5_000,
      retryMs: { min: 300, max: 4_000 },
      apiKey: credentials.get().key,
    });
    client.current = joined;
    let onlineSince = Number.POSITIVE_INFINITY;
    const receive = (message: Delivery) => {
      const kind = message.topic === topic ? 'message' : message.topic === joined.inbox ? 'push' : 'broadcast';
      change((before) => {
        const line = lineOf(message, kind, before, false);
        return insert(before, { ...line, missed: kind === 'message' && line.at < onlineSince - 500 && line.from !== name });
      });
    };
    const stopMessages = joined.onMessage(receive);
    const stopState = joined.onState((next) => {
      setStatus(next);
      if (next.state !== 'online') return;
      onlineSince = Date.now();
      // Without a session there is no "since then": what was shown may be of another life of the server.
      if (!next.resumed) {
        change(() => []);
        if (credentials.get().key) void readHistory(joined, topic, change);
      }
    });
    for (const filter of [topic, joined.inbox, `${app}/all`]) {
      joined.subscribe(filter).catch((cause: CarillonError) => {
        if (cause.code === 'refused') setError(cause);
      });
    }
    return () => {
      stopMessages();
      stopState();
      client.current = undefined;
      void joined.close();
    };
  }, [app, room, name, generation, topic, change]);

  const publish = useCallback(
    async (entry: Outgoing) => {
      try {
        await client.current?.publish(topic, JSON.stringify(entry.payload), { contentType: 'application/json' });
        setOutgoing((list) => list.filter((other) => other.payload !== entry.payload));
      } catch (cause) {
        const text = (cause as Error).message;
        setOutgoing((list) => list.map((other) => (other.payload === entry.payload ? { ...other, error: text } : other)));
      }
    },
    [topic],
  );
  const send = useCallback(
    (text: string) => {
      const entry = { payload: { from: name, text, at: Date.now() }, error: '' };
      setOutgoing((list) => [...list, entry]);
      void publish(entry);
    },
    [name, publish],
  );
  const retry = useCallback(
    (entry: Outgoing) => {
      setOutgoing((list) => list.map((other) => (other.payload === entry.payload ? { ...other, error: '' } : other)));
      void publish(entry);
    },
    [publish],
  );
  const rejoin = useCallback(() => setGeneration((n) => n + 1), []);
  return { status, error, lines, outgoing, send, retry, rejoin };
}

async function readHistory(
  client: CarillonClient,
  topic: string,
  change: (edit: (lines: readonly Line[]) => readonly Line[]) => void,
): Promise<void> {
  let after = '';
  for (let page = 0; page < MAX_HISTORY_PAGES; page++) {
    try {
      const { messages, next, more } = await client.history(topic, { limit: 1000, ...(after && { after }) });
      change((before) => messages.reduce((lines, message) => insert(lines, lineOfHistory(message)), before));
      if (!more || !next) return;
      after = next;
    } catch {
      // The room works without its past.
      return;
    }
  }
}
