//! The client against a server that says one packet at a time: what a real gateway does only when things go wrong.

import assert from 'node:assert/strict';
import { once } from 'node:events';
import { createServer } from 'node:net';
import { after, test } from 'node:test';
import mqttPacket from 'mqtt-packet';

import { connect } from '../dist/index.js';

const V5 = { protocolVersion: 5 };
const open = [];
after(() => open.forEach((close) => close()));

/** A server that calls `serve(connection, number)` for each CONNECT; `connection.send` writes a packet. */
async function gateway(serve) {
  const connects = [];
  const sockets = new Set();
  const server = createServer((socket) => {
    sockets.add(socket);
    socket.on('close', () => sockets.delete(socket));
    socket.on('error', () => {});
    const parser = mqttPacket.parser(V5);
    const received = [];
    const waiting = [];
    const connection = {
      socket,
      send: (packet) => socket.write(mqttPacket.generate(packet, V5)),
      packet: async (cmd) => {
        for (;;) {
          const at = received.findIndex((packet) => packet.cmd === cmd);
          if (at >= 0) return received.splice(at, 1)[0];
          await new Promise((resolve) => waiting.push(resolve));
        }
      },
    };
    parser.on('packet', (packet) => {
      if (packet.cmd === 'connect') {
        connects.push(packet);
        serve(connection, connects.length, packet);
        return;
      }
      received.push(packet);
      waiting.splice(0).forEach((resolve) => resolve());
    });
    socket.on('data', (data) => parser.parse(data));
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  open.push(() => {
    server.close();
    sockets.forEach((socket) => socket.destroy());
  });
  return { url: `mqtt://127.0.0.1:${server.address().port}`, connects };
}

function device(options) {
  const client = connect({ app: 'demo', user: 'alice', clientId: 'd-1', retryMs: { min: 10, max: 40 }, ...options });
  open.push(() => client.close());
  const states = [];
  client.onState((status) => states.push(status.state));
  return { client, states, messages: collect(client) };
}

function collect(client) {
  const messages = [];
  client.onMessage((message) => messages.push(message));
  return messages;
}

const accept = (connection, sessionPresent = false) =>
  connection.send({ cmd: 'connack', reasonCode: 0, sessionPresent, properties: {} });

const publish = (messageId, seq, payload, dup = false) => ({
  cmd: 'publish', topic: 'demo/u/alice', payload, qos: 1, dup, retain: false, messageId,
  properties: { userProperties: { epoch: '1', seq: String(seq), id: `m${seq}` } },
});

async function eventually(check, what) {
  for (let i = 0; i < 300; i++) {
    if (check()) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  assert.fail(`never came true: ${what}`);
}

test('the session is kept, its user and token are sent, and a redelivered message is handed out once', async () => {
  const server = await gateway(async (connection, number) => {
    accept(connection, number > 1);
    if (number === 1) {
      connection.send(publish(1, 1, 'one'));
      connection.send(publish(2, 2, 'two'));
      await connection.packet('puback');
      connection.socket.destroy();
    } else {
      connection.send(publish(2, 2, 'two', true));
      connection.send(publish(3, 3, 'three'));
    }
  });
  const { client, states, messages } = device({ endpoint: server.url, token: async () => `token-${server.connects.length}` });
  await eventually(() => messages.length >= 3, 'three messages');
  assert.deepEqual(messages.map((m) => [m.seq, m.text]), [[1, 'one'], [2, 'two'], [3, 'three']]);
  const [first, second] = server.connects;
  assert.deepEqual([first.clientId, first.clean, first.properties.sessionExpiryInterval], ['d-1', false, 604800]);
  assert.deepEqual([first.username, first.password.toString(), second.password.toString()], ['alice', 'token-0', 'token-1']);
  assert.deepEqual(states, ['connecting', 'online', 'away', 'online']);
  assert.equal(client.status.resumed, true);
});

test('a session that the server has lost begins anew: the same seqs are new messages', async () => {
  const server = await gateway((connection, number) => {
    accept(connection, false);
    connection.send(publish(1, 1, `from log ${number}`));
    if (number === 1) setTimeout(() => connection.socket.destroy(), 20);
  });
  const { messages } = device({ endpoint: server.url });
  await eventually(() => messages.length >= 2, 'the message of either log');
  assert.deepEqual(messages.map((m) => m.text), ['from log 1', 'from log 2']);
});

test('a refused device stops, and says why', async () => {
  const server = await gateway((connection) => connection.send({ cmd: 'connack', reasonCode: 0x86, sessionPresent: false }));
  const { client, states } = device({ endpoint: server.url, token: 'bad' });
  await assert.rejects(client.ready(), (error) => error.code === 'refused' && error.reasonCode === 0x86);
  await new Promise((resolve) => setTimeout(resolve, 150));
  assert.equal(server.connects.length, 1);
  assert.equal(states.at(-1), 'closed');
  await assert.rejects(client.publish('up/x', 'late'));
});

test('a token that expired is fetched anew, once', async () => {
  const server = await gateway((connection, number) =>
    number === 1 ? connection.send({ cmd: 'connack', reasonCode: 0x87, sessionPresent: false }) : accept(connection),
  );
  let asked = 0;
  const { client } = device({ endpoint: server.url, token: () => `token-${++asked}` });
  await client.ready();
  assert.equal(server.connects[1].password.toString(), 'token-2');

  const never = await gateway((connection) => connection.send({ cmd: 'connack', reasonCode: 0x87, sessionPresent: false }));
  const refused = device({ endpoint: never.url, token: () => 'always bad' });
  await assert.rejects(refused.client.ready(), (error) => error.code === 'refused');
  assert.equal(never.connects.length, 2);
});

test('a busy server is tried again', async () => {
  const server = await gateway((connection, number) =>
    number < 3 ? connection.send({ cmd: 'connack', reasonCode: 0x89, sessionPresent: false }) : accept(connection),
  );
  const { client, states } = device({ endpoint: server.url });
  await client.ready();
  assert.equal(server.connects.length, 3);
  assert.ok(states.includes('away'));
});

test('taken over or kicked: it does not come back by itself', async () => {
  for (const [reasonCode, code] of [[0x8e, 'taken-over'], [0x98, 'kicked']]) {
    const server = await gateway((connection) => {
      accept(connection);
      setTimeout(() => connection.send({ cmd: 'disconnect', reasonCode }), 20);
    });
    const { client } = device({ endpoint: server.url });
    await eventually(() => client.status.state === 'closed', code);
    assert.equal(client.status.error.code, code);
    await new Promise((resolve) => setTimeout(resolve, 150));
    assert.equal(server.connects.length, 1, code);
  }
});

test('sent elsewhere, it goes there', async () => {
  const there = await gateway((connection) => accept(connection, true));
  const here = await gateway((connection) => {
    accept(connection);
    const serverReference = there.url.replace('mqtt://', '');
    setTimeout(() => {
      connection.send({ cmd: 'disconnect', reasonCode: 0x9c, properties: { serverReference } });
      connection.socket.end();
    }, 20);
  });
  const { client } = device({ endpoint: here.url });
  await eventually(() => there.connects.length === 1, 'a connection to the other gateway');
  await eventually(() => client.status.address === `${there.url}`, 'the address in the status');
  assert.equal(here.connects.length, 1);
});

test('a lost connection goes back to where it was, a gateway that does not answer is passed over', async () => {
  const first = await gateway((connection, number) => {
    if (number === 2) connection.socket.destroy();
    else accept(connection, number > 1);
    if (number === 1) setTimeout(() => connection.socket.destroy(), 20);
  });
  const second = await gateway((connection) => accept(connection, true));
  const { client } = device({ endpoint: [first.url, second.url] });
  await eventually(() => second.connects.length === 1, 'the second gateway');
  assert.equal(first.connects.length, 2);
  await eventually(() => client.status.address === second.url, 'the address in the status');
});

test('publish: reason codes, names below the app, and a bound on what waits', async () => {
  const server = await gateway(async (connection) => {
    accept(connection);
    for (const reasonCode of [0, 0x10, 0x87]) {
      const packet = await connection.packet('publish');
      connection.send({ cmd: 'puback', messageId: packet.messageId, reasonCode });
      if (reasonCode === 0) assert.equal(packet.topic, 'demo/up/order');
    }
  });
  const { client } = device({ endpoint: server.url, maxPending: 1 });
  const first = client.publishUp('order', '{}');
  await assert.rejects(client.publish('g/x', 'too many'), /waiting already/);
  await first;
  await client.publish('demo/g/x', 'nobody there');
  await assert.rejects(client.publish('g/x', 'forbidden'), (error) => error.code === 'refused' && error.reasonCode === 0x87);
});

test('a subscription that is refused rejects', async () => {
  const server = await gateway(async (connection) => {
    accept(connection);
    for (const granted of [1, 0x87]) {
      const packet = await connection.packet('subscribe');
      assert.ok(packet.subscriptions[0].topic.startsWith('demo/'));
      connection.send({ cmd: 'suback', messageId: packet.messageId, granted: [granted] });
    }
  });
  const { client } = device({ endpoint: server.url });
  assert.equal(await client.subscribe('g/news'), 1);
  await assert.rejects(client.subscribe('other/g/news'), (error) => error.code === 'refused');
});

test('arguments that cannot work are refused at once', async () => {
  assert.throws(() => connect({ endpoint: 'ws://x', app: '', clientId: 'x' }), /app/);
  assert.throws(() => connect({ endpoint: 'ws://x', app: 'demo', clientId: '' }), /clientId/);
  const { client } = device({ endpoint: 'nowhere' });
  await assert.rejects(client.ready(), (error) => error.code === 'invalid');
});
