//! What `@carillon/client` exports: a device's connection, and the pieces that are useful on their own.

export { connect, CarillonClient } from './client.js';
export type {
  ConnectOptions,
  ConnectionState,
  MessageHandler,
  PublishOptions,
  StateHandler,
  Status,
} from './client.js';
export { Deduplicator, decodeDelivery } from './delivery.js';
export type { Delivery, DeliveryPacket } from './delivery.js';
export { chooseAddress, findEndpoints, parseAddress } from './endpoint.js';
export type { Address } from './endpoint.js';
export { CarillonError } from './error.js';
export type { ErrorCode } from './error.js';
export { pullHistory } from './history.js';
export type { HistoryMessage, HistoryPage, HistoryQuery } from './history.js';
export { stableClientId } from './identity.js';
