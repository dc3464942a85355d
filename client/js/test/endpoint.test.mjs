//! Addresses: taken apart, chosen, referred to; client ids that stay.

import assert from 'node:assert/strict';
import { createServer } from 'node:http';
import { test } from 'node:test';

import { CarillonError, chooseAddress, findEndpoints, parseAddress, pullHistory, stableClientId } from '../dist/index.js';
import { referredAddress } from '../dist/endpoint.js';

test('addresses are taken apart, with the ports that their schemes have', () => {
  const parts = (url) => Object.values(parseAddress(url)).join(' ');
  assert.equal(parts('ws://127.0.0.1:8083'), 'ws 127.0.0.1 8083 /');
  assert.equal(parts('wss://push.example.com/mqtt?x=1'), 'wss push.example.com 443 /mqtt?x=1');
  assert.equal(parts('ws://host:80/'), 'ws host 80 /');
  assert.equal(parts('wss://host:80'), 'wss host 80 /');
  assert.equal(parts('tcp://host'), 'mqtt host 1883 ');
  assert.equal(parts('ssl://[::1]:8884'), 'mqtts [::1] 8884 ');
});

test('what is not an address is refused by name', () => {
  for (const url of ['', 'host:1883', 'ftp://host', 'ws://']) {
    assert.throws(() => parseAddress(url), (error) => error instanceof CarillonError && error.code === 'invalid', url);
  }
});

test('a browser gets WebSockets, from a page over https encrypted ones; Node plain MQTT; in turn', () => {
  const list = ['mqtt://a', 'ws://a', 'mqtt://b', 'ws://b', 'wss://c'].map(parseAddress);
  const chosen = (browser) =>
    [0, 1, 2].map((n) => chooseAddress(list, n, browser)).map(({ scheme, host }) => `${scheme}:${host}`).join(' ');
  assert.equal(chosen({ securePage: false }), 'ws:a ws:b wss:c');
  assert.equal(chosen({ securePage: true }), 'wss:c wss:c wss:c');
  assert.equal(chosen(undefined), 'mqtt:a mqtt:b mqtt:a');
  assert.equal(chooseAddress([parseAddress('mqtt://a')], 0, { securePage: false }), undefined);
  assert.equal(chooseAddress([parseAddress('ws://a')], 0, undefined)?.scheme, 'ws');
  assert.equal(chooseAddress([], 0, undefined), undefined);
});

test('the dispatcher lists gateways by what they speak', async () => {
  const endpoints = [
    { gateway: 'g-1', mqtt: 'mqtt://127.0.0.1:1883', ws: 'ws://127.0.0.1:8083/mqtt', quic: 'quic://127.0.0.1:1' },
    { gateway: 'g-2', wss: 'wss://push.example.com/mqtt' },
  ];
  await withServer({ body: { endpoints, ttl_seconds: 60 } }, async (http, requests) => {
    const found = await findEndpoints(`${http}/`, 'a device');
    assert.deepEqual(found.map(({ scheme, port, path }) => `${scheme}:${port}${path}`), ['mqtt:1883', 'ws:8083/mqtt', 'wss:443/mqtt']);
    assert.equal(requests[0].url, '/v1/endpoints?device=a%20device');
  });
});

test('a Server Reference is a host, a host and port, or a URL', () => {
  const current = parseAddress('wss://old:8443/mqtt');
  assert.deepEqual(referredAddress('new', current), { scheme: 'wss', host: 'new', port: 8443, path: '/mqtt' });
  assert.deepEqual(referredAddress('new:9 other:9', current), { scheme: 'wss', host: 'new', port: 9, path: '/mqtt' });
  assert.deepEqual(referredAddress('ws://new:1/x', current), { scheme: 'ws', host: 'new', port: 1, path: '/x' });
  assert.equal(referredAddress(' ', current), undefined);
  assert.equal(referredAddress('ftp://x', current), undefined);
});

test('a client id stays where there is storage, and differs from browser to browser', () => {
  const storage = () => {
    const kept = new Map();
    return { getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => kept.set(key, value) };
  };
  const one = storage();
  assert.equal(stableClientId('chat', one), stableClientId('chat', one));
  assert.notEqual(stableClientId('chat', one), stableClientId('other', one));
  assert.notEqual(stableClientId('chat', one), stableClientId('chat', storage()));
  const broken = { getItem: () => { throw new Error('off'); }, setItem: () => { throw new Error('off'); } };
  assert.match(stableClientId('chat', broken), /^chat-[0-9a-v]{12}$/);
});

async function withServer(answer, use) {
  const requests = [];
  const server = createServer((request, response) => {
    requests.push({ url: request.url, authorization: request.headers.authorization });
    const { status = 200, body } = answer;
    response.writeHead(status, { 'content-type': 'application/json' }).end(typeof body === 'string' ? body : JSON.stringify(body));
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  try {
    await use(`http://127.0.0.1:${server.address().port}`, requests);
  } finally {
    server.close();
  }
}

test('history: pages, text and bytes', async () => {
  const message = (seq, payload) => ({
    id: `m${seq}`, topic: 'demo/g/a', epoch: 2, seq, qos: 1, published_at: '2026-01-02T03:04:05.678Z', ...payload,
  });
  const body = { messages: [message(4, { payload: 'hi' }), message(6, { payload_base64: '/wA=' })], next: '2:6', more: true };
  await withServer({ body }, async (http, requests) => {
    const page = await pullHistory({ http: `${http}/`, app: 'demo', topic: 'demo/g/a', apiKey: 'k', after: '2:3', limit: 2 });
    assert.deepEqual(requests, [
      { url: '/v1/apps/demo/topics/demo%2Fg%2Fa/messages?after=2%3A3&limit=2', authorization: 'Bearer k' },
    ]);
    assert.deepEqual(page.messages.map((m) => [m.seq, m.text]), [[4, 'hi'], [6, '\ufffd\0']]);
    assert.deepEqual([...page.messages[1].payload], [255, 0]);
    assert.equal(page.messages[0].publishedMs, Date.UTC(2026, 0, 2, 3, 4, 5, 678));
    assert.deepEqual([page.next, page.more], ['2:6', true]);
  });
});

test('an error of the server is told in its own words', async () => {
  const body = { type: 'https://carillon.dev/problems/unauthorised', title: 'A valid API key is needed', status: 401, detail: 'the API key is not one that is in force' };
  await withServer({ status: 401, body }, async (http) => {
    await assert.rejects(pullHistory({ http, app: 'demo', topic: 'x', apiKey: 'k' }), (error) => {
      assert.equal(error.code, 'http');
      assert.equal(error.status, 401);
      assert.match(error.message, /not one that is in force/);
      assert.equal(error.retryable, false);
      return true;
    });
  });
  await withServer({ body: '<html>' }, async (http) => {
    await assert.rejects(findEndpoints(http, 'd'), /other than JSON/);
  });
});
