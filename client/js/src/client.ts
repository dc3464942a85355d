//! A device: one MQTT 5 connection that finds its gateway, comes back when it is lost, and hands out each stored message once.

import mqtt from 'mqtt';
import type { IClientOptions, IPublishPacket, MqttClient, Packet } from 'mqtt';

import { Deduplicator, decodeDelivery } from './delivery.js';
import type { Delivery } from './delivery.js';
import { chooseAddress, findEndpoints, parseAddress, referredAddress, thisBrowser } from './endpoint.js';
import type { Address } from './endpoint.js';
import { CarillonError } from './error.js';
import { pullHistory } from './history.js';
import type { HistoryPage, HistoryQuery } from './history.js';
import { isFatal, reasonText, Reason } from './reason.js';

const WEEK_SECONDS = 7 * 24 * 3600;
/** A connection that held this long was a good one: the next retry begins with the shortest wait again. */
const GOOD_CONNECTION_MS = 5_000;

export interface ConnectOptions {
  /**
   * Where to connect: the address of a dispatcher (`https://push.example.com`), which is asked anew before each
   * attempt, or of gateways (`wss://…`, `mqtts://…`), tried in turn.
   */
  endpoint: string | readonly string[];
  /** The app that topics are in. */
  app: string;
  /** The user; with a token, the token's. A device without either is its client id's user. */
  user?: string;
  /** A device token (JWT), or a function that gets one: it is asked before each attempt, so the token may expire. */
  token?: string | (() => string | Promise<string>);
  /** Names the session: the same each time for what was missed to arrive. See `stableClientId`. */
  clientId: string;
  /** How long the server keeps the session while this device is away, seconds; 0 = not at all. Default 7 days. */
  sessionExpirySeconds?: number;
  /** Default 60; the gateway may ask for another (MQTT 5.0 §3.2.2.3.14). */
  keepAliveSeconds?: number;
  /** Time for one attempt to connect. Default 15 s. */
  connectTimeoutMs?: number;
  /** Waits between attempts: doubled from the first to the last, and drawn at random below that. Default 0.5–30 s. */
  retryMs?: { min: number; max: number };
  /** Most messages waiting for a connection or for their acknowledgement; past it `publish` fails. Default 1000. */
  maxPending?: number;
  /** Address of the HTTP API for `history`. Default: `endpoint`, if that is a dispatcher. */
  http?: string;
  /** An API key of the app, which `history` needs. Not for devices that others can take apart. */
  apiKey?: string;
  /** Further options for mqtt.js: certificates, a will. */
  mqtt?: Partial<IClientOptions>;
}

/** `away`: the connection is lost, and another attempt will follow. `closed`: none will. */
export type ConnectionState = 'connecting' | 'online' | 'away' | 'closed';

export interface Status {
  readonly state: ConnectionState;
  /** For `away` and `closed`: why, in words for people. */
  readonly reason?: string;
  /** For `closed`, if it was not asked for. */
  readonly error?: CarillonError;
  /** For `online`: the server knew the session, so what was missed follows. */
  readonly resumed?: boolean;
  /** For `online`: the gateway's address. */
  readonly address?: string;
}

export type MessageHandler = (message: Delivery) => void;
export type StateHandler = (status: Status) => void;

export interface PublishOptions {
  /** Default 1: resolved once the server has accepted (and, for a stored topic, stored) it. */
  qos?: 0 | 1;
  retain?: boolean;
  contentType?: string;
  /** Not delivered after this time. */
  expirySeconds?: number;
  properties?: Record<string, string>;
}

/** Connects in the background: register `onMessage` right after this call, and what a kept session missed is not lost. */
export function connect(options: ConnectOptions): CarillonClient {
  return new CarillonClient(options);
}

export class CarillonClient {
  readonly app: string;
  readonly user: string | undefined;
  readonly clientId: string;

  readonly #options: ConnectOptions;
  readonly #messageHandlers = new Set<MessageHandler>();
  readonly #stateHandlers = new Set<StateHandler>();
  readonly #duplicates = new Deduplicator();
  readonly #stop = new AbortController();
  readonly #opened: Promise<MqttClient>;
  readonly #ready: Promise<void>;
  #resolveReady!: () => void;
  #rejectReady!: (error: CarillonError) => void;

  #mqtt: MqttClient | undefined;
  #status: Status = { state: 'connecting' };
  #address: Address | undefined;
  /** Where a Server Reference sent this device; for the next attempt only. */
  #referred: Address | undefined;
  /** Waits since the last good connection: they grow with it. */
  #attempt = 0;
  /** Attempts since the last connection that failed: each goes to the next gateway of the list. */
  #misses = 0;
  #failures = 0;
  #connectedAt = 0;
  #lostBecause = '';
  #pending = 0;

  constructor(options: ConnectOptions) {
    if (!options.app) throw new CarillonError('invalid', 'app is missing');
    if (!options.clientId) throw new CarillonError('invalid', 'clientId is missing: it names the session');
    this.#options = options;
    this.app = options.app;
    this.user = options.user;
    this.clientId = options.clientId;
    this.#ready = new Promise((resolve, reject) => {
      this.#resolveReady = resolve;
      this.#rejectReady = reject;
    });
    // Nobody has to wait for it.
    this.#ready.catch(() => {});
    this.#opened = this.#open();
    this.#opened.catch((error: unknown) => this.#end(asError(error)));
  }

  get status(): Status {
    return this.#status;
  }

  /** The user's own topic, `{app}/u/{user}`. */
  get inbox(): string {
    return `${this.app}/u/${this.user ?? this.clientId}`;
  }

  /** Resolves with the first connection; rejects if there never will be one. */
  ready(): Promise<void> {
    return this.#ready;
  }

  /**
   * Calls `handler` for each message, in the order of each topic. The message is acknowledged when it returns.
   * @returns a function that ends it.
   */
  onMessage(handler: MessageHandler): () => void {
    this.#messageHandlers.add(handler);
    return () => this.#messageHandlers.delete(handler);
  }

  /** Calls `handler` with each change of the connection, and with the present state at once. */
  onState(handler: StateHandler): () => void {
    this.#stateHandlers.add(handler);
    handler(this.#status);
    return () => this.#stateHandlers.delete(handler);
  }

  /**
   * Subscribes to a topic or filter, named in full or below the app's level. Kept over reconnects.
   * @returns the QoS that was granted. Rejects with `refused` when the device may not.
   */
  async subscribe(filter: string, options: { qos?: 0 | 1 } = {}): Promise<number> {
    const topic = this.fullTopic(filter);
    const client = await this.#opened;
    for (;;) {
      try {
        const [granted] = await client.subscribeAsync(topic, { qos: options.qos ?? 1 });
        return granted?.qos ?? 0;
      } catch (cause) {
        const error = asError(cause, `cannot subscribe to ${topic}`);
        // The connection was lost before the answer; asked again, it goes out with the next one.
        if (!error.retryable || this.#stop.signal.aborted) throw error;
        await sleep(100, this.#stop.signal);
      }
    }
  }

  async unsubscribe(filter: string): Promise<void> {
    const client = await this.#opened;
    await client.unsubscribeAsync(this.fullTopic(filter));
  }

  /** Publishes to a topic, named in full or below the app's level. Waits for a connection if there is none. */
  async publish(topic: string, payload: string | Uint8Array, options: PublishOptions = {}): Promise<void> {
    const full = this.fullTopic(topic);
    const max = this.#options.maxPending ?? 1000;
    if (this.#pending >= max) {
      throw new CarillonError('unreachable', `cannot publish to ${full}: ${max} messages are waiting already`);
    }
    this.#pending += 1;
    try {
      const client = await this.#opened;
      await client.publishAsync(full, payload as string | Buffer, {
        qos: options.qos ?? 1,
        retain: options.retain ?? false,
        properties: {
          ...(options.contentType !== undefined && { contentType: options.contentType }),
          ...(options.expirySeconds !== undefined && { messageExpiryInterval: options.expirySeconds }),
          ...(options.properties && { userProperties: options.properties }),
          ...(typeof payload === 'string' && { payloadFormatIndicator: true }),
        },
      });
    } catch (cause) {
      throw asError(cause, `cannot publish to ${full}`);
    } finally {
      this.#pending -= 1;
    }
  }

  /** Publishes to the app's backend: topic `{app}/up/{kind}`. */
  publishUp(kind: string, payload: string | Uint8Array, options?: PublishOptions): Promise<void> {
    return this.publish(`${this.app}/up/${kind}`, payload, options);
  }

  /** Reads a topic's log: what is older than this session, or what a notice said is there. */
  async history(topic: string, query: Pick<HistoryQuery, 'after' | 'limit' | 'signal'> = {}): Promise<HistoryPage> {
    const { endpoint, apiKey } = this.#options;
    const http = this.#options.http ?? (typeof endpoint === 'string' && isHttp(endpoint) ? endpoint : undefined);
    if (!http) throw new CarillonError('invalid', 'history needs the option http: the address of the HTTP API');
    if (!apiKey) throw new CarillonError('invalid', 'history needs the option apiKey');
    return pullHistory({ ...query, http, app: this.app, topic: this.fullTopic(topic), apiKey });
  }

  /** Says goodbye. The session stays on the server until it expires. */
  async close(): Promise<void> {
    if (this.#status.state === 'closed') return;
    const error = new CarillonError('closed', 'this client was closed');
    this.#stop.abort(error);
    this.#setStatus({ state: 'closed', reason: 'closed' });
    this.#rejectReady(error);
    await this.#mqtt?.endAsync();
  }

  /** `g/news` → `demo/g/news`. */
  fullTopic(topic: string): string {
    if (!topic) throw new CarillonError('invalid', 'the topic is empty');
    const [first] = topic.split('/', 1);
    return first === this.app || first === '$share' ? topic : `${this.app}/${topic}`;
  }

  /** Finds a gateway, however long that takes, and starts mqtt.js, which from then on reconnects by itself. */
  async #open(): Promise<MqttClient> {
    // Handlers registered right after the constructor must not miss a change.
    await Promise.resolve();
    for (;;) {
      try {
        const { address, password } = await this.#prepare();
        this.#stop.signal.throwIfAborted();
        return this.#start(address, password);
      } catch (cause) {
        this.#stop.signal.throwIfAborted();
        const error = asError(cause);
        if (!error.retryable) throw error;
        this.#setStatus({ state: 'away', reason: error.message });
        await sleep(this.#nextWait(), this.#stop.signal);
      }
    }
  }

  #start(address: Address, password: string | undefined): MqttClient {
    const options = this.#options;
    const sessionExpiryInterval = options.sessionExpirySeconds ?? WEEK_SECONDS;
    const client = mqtt.connect({
      ...options.mqtt,
      ...mqttAddress(address),
      protocolVersion: 5,
      clientId: this.clientId,
      clean: sessionExpiryInterval === 0,
      keepalive: options.keepAliveSeconds ?? 60,
      connectTimeout: options.connectTimeoutMs ?? 15_000,
      reconnectPeriod: this.#nextWait(),
      reconnectOnConnackError: true,
      ...(this.user !== undefined && { username: this.user }),
      ...(password !== undefined && { password }),
      properties: { ...options.mqtt?.properties, sessionExpiryInterval },
    });
    this.#mqtt = client;
    client.handleMessage = (packet, done) => {
      this.#deliver(packet);
      done();
    };
    client.on('packetreceive', (packet) => this.#notePacket(packet));
    client.on('connect', (connack) => {
      this.#connectedAt = Date.now();
      this.#lostBecause = '';
      this.#misses = 0;
      const resumed = connack.sessionPresent;
      // The server does not know the session: nothing that it sends from now on was sent before.
      if (!resumed) this.#duplicates.clear();
      this.#resolveReady();
      this.#setStatus({ state: 'online', resumed, address: addressText(this.#address ?? address) });
    });
    // Before mqtt.js's own listener, which starts the timer for the next attempt.
    client.prependListener('close', () => this.#lost(client));
    client.on('error', (error) => {
      this.#lostBecause ||= error.message || 'the gateway cannot be reached';
    });
    return client;
  }

  #deliver(packet: Packet): void {
    const publish = packet as IPublishPacket;
    const payload = typeof publish.payload === 'string' ? new TextEncoder().encode(publish.payload) : publish.payload;
    const message = decodeDelivery(publish.topic, payload, publish as never);
    if (!this.#duplicates.accept(message)) return;
    for (const handler of this.#messageHandlers) {
      try {
        handler(message);
      } catch (error) {
        // A fault of the application must not stop the connection: reported as an uncaught one is.
        queueMicrotask(() => {
          throw error;
        });
      }
    }
  }

  /** What the server says about this connection: refused, moved, ended. */
  #notePacket(packet: Packet): void {
    if (packet.cmd !== 'connack' && packet.cmd !== 'disconnect') return;
    const code = packet.reasonCode ?? 0;
    if (packet.cmd === 'connack' && code === 0) {
      this.#failures = 0;
      return;
    }
    const said = packet.properties?.reasonString;
    this.#lostBecause = said ?? reasonText(code);
    if (code === Reason.UseAnotherServer || code === Reason.ServerMoved) {
      const reference = packet.properties?.serverReference;
      this.#referred = reference && this.#address ? referredAddress(reference, this.#address) : undefined;
    }
    if (code === Reason.SessionTakenOver) {
      this.#end(new CarillonError('taken-over', 'the same client id has connected elsewhere', { reasonCode: code }));
    } else if (code === Reason.AdministrativeAction) {
      this.#end(new CarillonError('kicked', said ?? 'an administrator ended this session', { reasonCode: code }));
    } else if (isFatal(code) && !this.#mayRenewToken(code)) {
      this.#end(new CarillonError('refused', this.#lostBecause, { reasonCode: code }));
    }
  }

  /** A token from a function may just have expired: a new one gets one more try. */
  #mayRenewToken(code: number): boolean {
    if (typeof this.#options.token !== 'function') return false;
    if (code !== Reason.NotAuthorized && code !== Reason.BadUserNameOrPassword) return false;
    this.#failures += 1;
    return this.#failures === 1;
  }

  #lost(client: MqttClient): void {
    if (this.#stop.signal.aborted) return;
    if (this.#status.state !== 'online') this.#misses += 1;
    else if (Date.now() - this.#connectedAt > GOOD_CONNECTION_MS) this.#attempt = 0;
    this.#setStatus({ state: 'away', reason: this.#lostBecause || 'the connection was lost' });
    this.#lostBecause = '';
    client.options.reconnectPeriod = this.#nextWait();
    // While mqtt.js waits: another address, a fresh token. If that fails, it tries with what it has.
    this.#prepare().then(
      ({ address, password }) => {
        Object.assign(client.options, mqttAddress(address), password !== undefined && { password });
      },
      (error: unknown) => {
        if (!asError(error).retryable) this.#end(asError(error));
      },
    );
  }

  async #prepare(): Promise<{ address: Address; password: string | undefined }> {
    const referred = this.#referred;
    this.#referred = undefined;
    const address = referred ?? (await this.#nextAddress());
    this.#address = address;
    return { address, password: await this.#token() };
  }

  async #nextAddress(): Promise<Address> {
    const { endpoint } = this.#options;
    const given = typeof endpoint === 'string' ? [endpoint] : endpoint;
    const dispatcher = given.find(isHttp);
    const list = dispatcher
      ? await findEndpoints(dispatcher, this.clientId, this.#stop.signal)
      : given.map((url) => parseAddress(url));
    const address = chooseAddress(list, this.#misses);
    if (address) return address;
    const wanted = thisBrowser() ? 'a WebSocket address for this page' : 'an address';
    if (!dispatcher) throw new CarillonError('invalid', `endpoint holds no gateway with ${wanted}`);
    throw new CarillonError('unreachable', `no gateway with ${wanted} is there at the moment`);
  }

  async #token(): Promise<string | undefined> {
    const { token } = this.#options;
    if (typeof token !== 'function') return token;
    try {
      return await token();
    } catch (cause) {
      throw new CarillonError('unreachable', 'the token function failed', { cause });
    }
  }

  /** Full jitter: after a gateway is gone, its devices must not come back in step. */
  #nextWait(): number {
    const { min, max } = this.#options.retryMs ?? { min: 500, max: 30_000 };
    const ceiling = Math.min(max, min * 2 ** Math.min(this.#attempt, 16));
    this.#attempt += 1;
    return Math.round(min / 2 + Math.random() * (ceiling - min / 2));
  }

  /** Ends for a reason that trying again cannot mend. */
  #end(error: CarillonError): void {
    if (this.#status.state === 'closed') return;
    this.#stop.abort(error);
    this.#rejectReady(error);
    this.#setStatus({ state: 'closed', reason: error.message, error });
    this.#mqtt?.end(true);
  }

  #setStatus(status: Status): void {
    this.#status = status;
    for (const handler of this.#stateHandlers) handler(status);
  }
}

function mqttAddress(address: Address): Pick<IClientOptions, 'protocol' | 'host' | 'hostname' | 'port' | 'path'> {
  return {
    protocol: address.scheme,
    host: address.host,
    hostname: address.host,
    port: address.port,
    ...(address.path && { path: address.path }),
  };
}

function addressText(address: Address): string {
  return `${address.scheme}://${address.host}:${address.port}${address.path}`;
}

function isHttp(url: string): boolean {
  return /^https?:\/\//.test(url);
}

function asError(cause: unknown, what?: string): CarillonError {
  if (cause instanceof CarillonError) return cause;
  const prefix = what ? `${what}: ` : '';
  // mqtt.js gives a PUBACK's code as `code`, a SUBACK's as part of the packet.
  const { code: own, packet } = (cause ?? {}) as { code?: unknown; packet?: { granted?: unknown[] } };
  const code = own ?? packet?.granted?.find((granted) => Number(granted) >= 0x80);
  if (typeof code === 'number' && code >= 0x80) {
    return new CarillonError('refused', `${prefix}${reasonText(code)}`, { reasonCode: code, cause });
  }
  const text = cause instanceof Error ? cause.message : String(cause);
  return new CarillonError('unreachable', `${prefix}${text}`, { cause });
}

function sleep(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const abort = () => {
      clearTimeout(timer);
      reject(signal.reason as Error);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener('abort', abort);
      resolve();
    }, ms);
    signal.addEventListener('abort', abort, { once: true });
  });
}
