//! mqtt.js, the client that browsers use, over WebSocket: `mqttjs.mjs URL VERSION` (5, or 4 for 3.1.1).

import assert from 'node:assert/strict';
import { createRequire } from 'node:module';

const mqtt = createRequire(new URL('../../client/js/package.json', import.meta.url))('mqtt');
const [url, version] = process.argv.slice(2);
const protocolVersion = Number(version);
const five = protocolVersion === 5;

const connect = (clientId, more = {}) =>
  mqtt.connectAsync(url, { clientId, protocolVersion, connectTimeout: 10_000, reconnectPeriod: 0, ...more });

/** The next `n` messages of a client, from now on. */
function messages(client, n) {
  return new Promise((resolve, reject) => {
    const got = [];
    const late = setTimeout(() => reject(new Error(`only ${got.length} of ${n} messages: ${JSON.stringify(got)}`)), 15_000);
    const take = (topic, payload, packet) => {
      got.push([topic, payload.toString(), packet.qos, packet.retain]);
      if (got.length < n) return;
      clearTimeout(late);
      client.off('message', take);
      resolve(got);
    };
    client.on('message', take);
  });
}

const [reader, writer] = await Promise.all([connect(`reader-${version}`), connect(`writer-${version}`)]);
const topic = `js/${version}`;
const granted = await reader.subscribeAsync({ [`${topic}/+`]: { qos: 1 } });
assert.equal(granted[0].qos, 1);

let next = messages(reader, 3);
await writer.publishAsync(`${topic}/a`, 'at most once', { qos: 0 });
await writer.publishAsync(`${topic}/b`, 'at least once', { qos: 1 });
await writer.publishAsync(`${topic}/c`, 'ünïcode ☃ 🔔', { qos: 1 });
assert.deepEqual(await next, [
  [`${topic}/a`, 'at most once', 0, false],
  [`${topic}/b`, 'at least once', 1, false],
  [`${topic}/c`, 'ünïcode ☃ 🔔', 1, false],
]);

// Large messages come in many WebSocket frames.
next = messages(reader, 1);
const large = 'x'.repeat(200_000);
await writer.publishAsync(`${topic}/large`, large, { qos: 1 });
assert.equal((await next)[0][1], large);

// Retained.
await writer.publishAsync(`${topic}-kept`, 'kept', { qos: 1, retain: true });
next = messages(reader, 1);
await reader.subscribeAsync(`${topic}-kept`, { qos: 1 });
assert.deepEqual(await next, [[`${topic}-kept`, 'kept', 1, true]]);

// A session that is kept gets what it missed.
const kept = five ? { clean: false, properties: { sessionExpiryInterval: 3600 } } : { clean: false };
const first = await connect(`kept-${version}`, kept);
await first.subscribeAsync(`${topic}-missed`, { qos: 1 });
await first.endAsync();
for (const text of ['one', 'two', 'three']) await writer.publishAsync(`${topic}-missed`, text, { qos: 1 });
const second = mqtt.connect(url, { clientId: `kept-${version}`, protocolVersion, reconnectPeriod: 0, ...kept });
const missed = await messages(second, 3);
assert.deepEqual(missed.map(([, text]) => text), ['one', 'two', 'three']);

await Promise.all([reader, writer, second].map((client) => client.endAsync()));
console.log(`ok, version ${version}`);
