//! A round trip through a running server: `CARILLON_WS` (or `CARILLON_MQTT`), `CARILLON_HTTP`, `CARILLON_KEY`, and
//! `CARILLON_APP` if it is not `demo`. The server must take anonymous devices in the app.

import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { after, test } from 'node:test';

import { connect, findEndpoints } from '../dist/index.js';

const app = process.env.CARILLON_APP ?? 'demo';
const http = required('CARILLON_HTTP').replace(/\/$/, '');
const key = required('CARILLON_KEY');
const gateways = [process.env.CARILLON_WS, process.env.CARILLON_MQTT].filter(Boolean);
if (gateways.length === 0) throw new Error('CARILLON_WS is not set: the address of a gateway, ws://host:port');

const open = new Set();
after(() => Promise.all([...open].map((client) => client.close())));

function required(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
}

function device(endpoint, user, clientId = `js-${randomUUID()}`) {
  const client = connect({ endpoint, app, user, clientId, http, apiKey: key, retryMs: { min: 50, max: 500 }, sessionExpirySeconds: 300 });
  open.add(client);
  const messages = [];
  client.onMessage((message) => messages.push(message));
  return { client, messages };
}

async function call(method, path, body) {
  const response = await fetch(`${http}/v1/apps/${app}/${path}`, {
    method,
    headers: { authorization: `Bearer ${key}`, ...(body && { 'content-type': 'application/json' }) },
    ...(body && { body: JSON.stringify(body) }),
  });
  const answer = await response.json();
  assert.ok(response.ok, JSON.stringify(answer));
  return answer;
}

function push(user, payload) {
  return call('POST', `users/${user}/messages`, { payload });
}

async function eventually(check, what) {
  const end = Date.now() + 15_000;
  while (Date.now() < end) {
    if (await check()) return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  assert.fail(`never came true: ${what}`);
}

for (const gateway of gateways) {
  const over = new URL(gateway).protocol.replace(':', '');

  test(`${over}: pushes to an inbox arrive in order, with their place in the topic`, async () => {
    const user = `js-${randomUUID()}`;
    const { client, messages } = device(gateway, user);
    await client.subscribe(client.inbox);
    const accepted = [];
    for (let i = 0; i < 20; i++) accepted.push(await push(user, `push ${i}`));
    await eventually(() => messages.length >= 20, '20 messages');
    assert.deepEqual(messages.map((m) => m.text), accepted.map((_, i) => `push ${i}`));
    assert.deepEqual(messages.map((m) => [m.topic, m.epoch, m.seq, m.id]), accepted.map((a) => [a.topic, a.epoch, a.seq, a.id]));
    assert.ok(messages.every((m) => m.stored && m.qos === 1));
  });

  test(`${over}: what a kept session missed comes once, in order, when it is back`, async () => {
    const user = `js-${randomUUID()}`;
    const clientId = `js-${randomUUID()}`;
    const first = device(gateway, user, clientId);
    await first.client.subscribe(inboxOf(user));
    await push(user, 'before');
    await eventually(() => first.messages.length === 1, 'the first message');
    await first.client.close();

    for (let i = 0; i < 10; i++) await push(user, `missed ${i}`);
    const second = device(gateway, user, clientId);
    await second.client.subscribe(inboxOf(user));
    await eventually(() => second.messages.length >= 10, '10 missed messages');
    await push(user, 'after');
    await eventually(() => second.messages.at(-1)?.text === 'after', 'the message after them');
    assert.equal(second.client.status.resumed, true);
    assert.deepEqual(
      second.messages.map((m) => m.text),
      [...Array.from({ length: 10 }, (_, i) => `missed ${i}`), 'after'],
    );
  });

  test(`${over}: devices talk in a group; its log can be pulled`, async () => {
    const group = `g/chat-${randomUUID()}`;
    const alice = device(gateway, `alice-${randomUUID()}`);
    const bob = device(gateway, `bob-${randomUUID()}`);
    await alice.client.subscribe(group);
    await bob.client.subscribe(group);
    for (let i = 0; i < 10; i++) await (i % 2 ? alice : bob).client.publish(group, `line ${i} – grüße`);
    const lines = Array.from({ length: 10 }, (_, i) => `line ${i} – grüße`);
    await eventually(() => alice.messages.length >= 10 && bob.messages.length >= 10, '10 lines at both');
    assert.deepEqual(alice.messages.map((m) => m.text), lines);
    assert.deepEqual(bob.messages.map((m) => m.text), lines);

    const page = await alice.client.history(group, { limit: 4 });
    assert.deepEqual(page.messages.map((m) => m.text), lines.slice(0, 4));
    assert.equal(page.more, true);
    const rest = await alice.client.history(group, { after: page.next });
    assert.deepEqual(rest.messages.map((m) => m.text), lines.slice(4));
    assert.deepEqual(rest.messages.map((m) => m.seq), alice.messages.slice(4).map((m) => m.seq));
  });

  test(`${over}: bytes that are not text go through unaltered; so do properties`, async () => {
    const { client, messages } = device(gateway, `js-${randomUUID()}`);
    const group = `g/chat-${randomUUID()}`;
    await client.subscribe(group);
    const bytes = Uint8Array.from({ length: 256 }, (_, i) => i);
    await client.publish(group, bytes, { contentType: 'application/octet-stream', properties: { trace: 'abc' } });
    await eventually(() => messages.length === 1, 'the message');
    assert.deepEqual([...messages[0].payload], [...bytes]);
    assert.equal(messages[0].contentType, 'application/octet-stream');
    assert.equal(messages[0].properties.trace, 'abc');
  });

  test(`${over}: upstream messages are accepted and kept for the backend`, async () => {
    const kind = `seen-${randomUUID()}`;
    const { client } = device(gateway, `js-${randomUUID()}`);
    await client.publishUp(kind, '{"page":1}');
    const { messages } = await client.history(`up/${kind}`);
    assert.deepEqual(messages.map((m) => [m.text, m.publisher]), [['{"page":1}', client.user]]);
  });

  test(`${over}: a kicked device learns it, and stays away`, async () => {
    const { client } = device(gateway, `js-${randomUUID()}`);
    await client.ready();
    const ended = new Promise((resolve) => client.onState((status) => status.state === 'closed' && resolve(status)));
    await eventually(async () => (await call('GET', `users/${client.user}`)).online, 'the user is online');
    assert.equal((await call('DELETE', `users/${client.user}/sessions`)).kicked, 1);
    assert.equal((await ended).error.code, 'kicked');
  });
}

test('the dispatcher names gateways, and a client finds its way through it', async () => {
  const addresses = await findEndpoints(http, 'js');
  assert.ok(addresses.length > 0);
  const { client } = device(http, `js-${randomUUID()}`);
  await client.ready();
  assert.equal(client.status.state, 'online');
});

function inboxOf(user) {
  return `${app}/u/${user}`;
}
