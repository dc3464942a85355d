//! A message as it reaches the application, and the dropping of those that came before.

/** What the application gets for each message. */
export interface Delivery {
  /** Full topic name; its first level is the app: `demo/u/alice`. */
  readonly topic: string;
  readonly payload: Uint8Array;
  /** The payload as UTF-8 text. */
  readonly text: string;
  /** QoS it was delivered with. */
  readonly qos: 0 | 1 | 2;
  /** It answers a subscription with what the topic had retained, rather than being new. */
  readonly retained: boolean;
  /** It is in the topic's log: it can be pulled, and its seq identifies it. */
  readonly stored: boolean;
  /** Ownership under which it was sequenced; 0 if the server does not say. */
  readonly epoch: number;
  /** Its place in the topic: of two messages on one topic the larger is the later. 0 if the server does not say. */
  readonly seq: number;
  /** Unique within the app; empty if the server does not say. */
  readonly id: string;
  readonly contentType: string | undefined;
  /** The other MQTT 5 user properties. A name that came several times has several values. */
  readonly properties: Readonly<Record<string, string | string[]>>;
}

/** The part of an MQTT PUBLISH packet that is read. */
export interface DeliveryPacket {
  qos: 0 | 1 | 2;
  retain: boolean;
  properties?: {
    contentType?: string;
    userProperties?: Record<string, string | string[]> | undefined;
  };
}

const decoder = new TextDecoder();

/** Reads a PUBLISH. The gateway's own user properties are `epoch`, `seq`, `id` and, when it is not in the log, `stored` = 0. */
export function decodeDelivery(topic: string, payload: Uint8Array, packet: DeliveryPacket): Delivery {
  const { epoch, seq, id, stored, ...properties } = packet.properties?.userProperties ?? {};
  let text: string | undefined;
  return {
    topic,
    payload,
    get text() {
      text ??= decoder.decode(payload);
      return text;
    },
    qos: packet.qos,
    retained: packet.retain,
    stored: packet.qos > 0 && first(stored) !== '0' && number(seq) > 0,
    epoch: number(epoch),
    seq: number(seq),
    id: first(id) ?? '',
    contentType: packet.properties?.contentType,
    properties,
  };
}

/** The gateway's value comes first: a publisher may have used the same name. */
function first(value: string | string[] | undefined): string | undefined {
  return Array.isArray(value) ? value[0] : value;
}

function number(value: string | string[] | undefined): number {
  const read = Number(first(value) ?? 0);
  return Number.isSafeInteger(read) && read > 0 ? read : 0;
}

interface Seen {
  /** Seq and id of the last stored message. */
  seq: number;
  id: string;
  /** Seq of the last retained answer: it must not hide the messages before it that are still to come. */
  retained: number;
}

const NOTHING_SEEN: Seen = { seq: 0, id: '', retained: 0 };

/**
 * Tells new messages from redelivered ones. Delivery is at least once; stored messages of one topic come in the order
 * of their seqs, so what is not beyond the last one has been seen.
 */
export class Deduplicator {
  readonly #topics = new Map<string, Seen>();
  readonly #maxTopics: number;

  /** @param maxTopics topics remembered; past it the one silent for longest is forgotten. */
  constructor(maxTopics = 10_000) {
    this.#maxTopics = maxTopics;
  }

  /** Is this message new? Remembers it. Messages that are not stored always are. */
  accept(message: Pick<Delivery, 'topic' | 'seq' | 'id' | 'stored' | 'retained'>): boolean {
    if (!message.stored || message.seq === 0) return true;
    let seen = this.#topics.get(message.topic) ?? NOTHING_SEEN;
    // Another message in the place of the last one: the topic's log was lost and begins anew.
    if (message.seq === seen.seq && message.id !== seen.id) seen = NOTHING_SEEN;
    if (message.seq <= seen.seq) return false;
    if (message.retained) {
      if (message.seq === seen.retained) return false;
      this.#remember(message.topic, { ...seen, retained: message.seq });
      return true;
    }
    this.#remember(message.topic, { ...seen, seq: message.seq, id: message.id });
    return message.seq !== seen.retained;
  }

  /** Forgets everything: the server knows nothing of the session any more. */
  clear(): void {
    this.#topics.clear();
  }

  #remember(topic: string, seen: Seen): void {
    this.#topics.delete(topic);
    this.#topics.set(topic, seen);
    if (this.#topics.size > this.#maxTopics) {
      const oldest = this.#topics.keys().next();
      if (!oldest.done) this.#topics.delete(oldest.value);
    }
  }
}
