//! Messages as they are decoded, and which of them are dropped as seen before.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Deduplicator, decodeDelivery } from '../dist/index.js';

const stored = (seq, more = {}) => ({ topic: 'demo/g/a', seq, id: `m${seq}`, stored: true, retained: false, ...more });

test('a delivery carries what the gateway says about it, and the publisher’s own properties', () => {
  const message = decodeDelivery('demo/u/alice', new TextEncoder().encode('grüße'), {
    qos: 1,
    retain: false,
    properties: { contentType: 'text/plain', userProperties: { epoch: '3', seq: '17', id: 'm-1', trace: 'x' } },
  });
  assert.equal(message.text, 'grüße');
  assert.deepEqual([message.epoch, message.seq, message.id, message.stored], [3, 17, 'm-1', true]);
  assert.deepEqual(message.properties, { trace: 'x' });
  assert.equal(message.contentType, 'text/plain');
});

test('not stored: QoS 0, stored = 0, or a server that numbers nothing', () => {
  const packet = (qos, userProperties) => ({ qos, retain: false, properties: { userProperties } });
  const decode = (p) => decodeDelivery('a', new Uint8Array(), p).stored;
  assert.equal(decode(packet(1, { seq: '1' })), true);
  assert.equal(decode(packet(0, { seq: '1' })), false);
  assert.equal(decode(packet(1, { seq: '1', stored: '0' })), false);
  assert.equal(decode(packet(1, undefined)), false);
});

test('a property that the publisher used as well does not hide the gateway’s, nor does nonsense break it', () => {
  const read = (seq) =>
    decodeDelivery('a', new Uint8Array(), { qos: 1, retain: false, properties: { userProperties: { seq } } }).seq;
  assert.equal(read(['42', '7']), 42);
  assert.equal(read('-3'), 0);
  assert.equal(read('1e400'), 0);
  assert.equal(read('many'), 0);
});

test('redelivered messages are dropped, per topic', () => {
  const seen = new Deduplicator();
  const accepted = [1, 2, 5, 2, 5, 6].map((seq) => seen.accept(stored(seq)));
  assert.deepEqual(accepted, [true, true, true, false, false, true]);
  assert.equal(seen.accept(stored(1, { topic: 'demo/g/b' })), true);
});

test('messages that are not stored always pass', () => {
  const seen = new Deduplicator();
  seen.accept(stored(9));
  assert.equal(seen.accept(stored(3, { stored: false })), true);
  assert.equal(seen.accept(stored(3, { stored: false })), true);
});

test('a retained answer comes once, and hides nothing that is still to come before it', () => {
  const seen = new Deduplicator();
  assert.equal(seen.accept(stored(10, { retained: true })), true);
  assert.deepEqual([8, 9, 10, 11].map((seq) => seen.accept(stored(seq))), [true, true, false, true]);
  assert.equal(seen.accept(stored(10, { retained: true })), false);
});

test('a log that begins anew is not taken for repetition', () => {
  const seen = new Deduplicator();
  seen.accept(stored(1));
  assert.equal(seen.accept(stored(1, { id: 'another' })), true);
  assert.equal(seen.accept(stored(1, { id: 'another' })), false);
});

test('memory is bounded: the topic silent for longest is forgotten', () => {
  const seen = new Deduplicator(2);
  seen.accept(stored(1, { topic: 'a' }));
  seen.accept(stored(1, { topic: 'b' }));
  seen.accept(stored(2, { topic: 'a' }));
  seen.accept(stored(1, { topic: 'c' }));
  assert.equal(seen.accept(stored(2, { topic: 'a' })), false);
  assert.equal(seen.accept(stored(1, { topic: 'b' })), true);
});
