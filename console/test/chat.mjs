//! Drives the console in a real browser against a running server: two tabs that chat, one that was away, a push, a kick,
//! broadcasts, the live numbers. `CONSOLE_URL` is the address that the server printed, with its key; `SCREENSHOTS` is a
//! directory for pictures, `CHROMIUM` the browser.

import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { chromium } from 'playwright-core';

const address = new URL(required('CONSOLE_URL'));
const screenshots = process.env.SCREENSHOTS;
const WAIT_MS = 15_000;

const suffix = Math.random().toString(36).slice(2, 6);
const room = `bells-${suffix}`;
const [ada, ben, cleo] = ['ada', 'ben', 'cleo'].map((name) => `${name}-${suffix}`);

let passed = 0;
let failed = 0;
const complaints = [];

const profile = await mkdtemp(join(tmpdir(), 'carillon-console-'));
if (screenshots) await mkdir(screenshots, { recursive: true });
const context = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  headless: true,
  viewport: { width: 1280, height: 800 },
  colorScheme: 'light',
  locale: 'en-GB',
  args: [
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
  ],
});
context.setDefaultTimeout(WAIT_MS);

try {
  await run();
} finally {
  await context.close();
  await rm(profile, { recursive: true, force: true });
}
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed === 0 ? 0 : 1);

async function run() {
  const first = await tab();
  await check('the key leaves the address bar, and the live numbers come', async () => {
    await first.goto(address.href);
    await first.getByTestId('live-connections').waitFor();
    equal(first.url().includes('key='), false, 'a key in the address bar');
    await reads(first.getByTestId('server-state'), 'data-state', 'ok');
  });

  let adas = await chat(ada);
  let bens = await chat(ben);
  await check('two tabs join a room', async () => {
    for (const page of [adas, bens]) await reads(page.getByTestId('chat-state'), 'data-state', 'online');
  });

  const before = [
    'Is anyone there?',
    'I am. Grüße aus Köln!',
    'The bells ring at noon.',
    'Then I have to go now.',
    'Go on, I will keep writing.',
    'Whatever you write, I will get it.',
  ];
  await check('what is typed in one tab is seen in the other, both ways, in order', async () => {
    for (const [i, text] of before.entries()) {
      await say(i % 2 ? bens : adas, text);
      await sees(i % 2 ? adas : bens, before.slice(0, i + 1));
    }
    for (const page of [adas, bens]) await ordered(page);
    await eventually(async () => (await adas.getByTestId('chat-outgoing').count()) === 0, 'everything was accepted');
  });

  const missed = ['The first bell has rung.', 'So has the second.', 'And the third. Are you back?'];
  await check('who was away gets what was missed: once, in order, after what was there', async () => {
    await bens.close();
    for (const text of missed) await say(adas, text);
    await sees(adas, [...before, ...missed]);
    // What was said less than half a second before somebody came is not shown as missed: clocks differ.
    await new Promise((resolve) => setTimeout(resolve, 800));
    bens = await chat(ben);
    await sees(bens, [...before, ...missed]);
    await ordered(bens);
    equal(await bens.getByTestId('chat-missed').count(), 1, 'dividers "While you were away"');
    equal(await bens.locator('[data-testid=chat-message][data-missed=true]').count(), missed.length, 'lines marked as missed');
    await settled(bens, before.length + missed.length);
  });
  await picture(bens, 'chat');

  await check('a reload repeats nothing and loses nothing', async () => {
    await bens.reload();
    await reads(bens.getByTestId('chat-state'), 'data-state', 'online');
    await say(adas, 'after the reload');
    await sees(bens, [...before, ...missed, 'after the reload']);
    await settled(bens, before.length + missed.length + 1);
  });

  await check('who comes new reads the room’s past from its log', async () => {
    const cleos = await chat(cleo);
    await sees(cleos, [...before, ...missed, 'after the reload']);
    await ordered(cleos);
    await cleos.close();
  });

  await check('the same name in a second tab takes over, and can be taken back', async () => {
    const second = await chat(ada);
    await reads(second.getByTestId('chat-state'), 'data-state', 'online');
    await adas.getByTestId('chat-closed').waitFor();
    await adas.getByTestId('chat-rejoin').click();
    await reads(adas.getByTestId('chat-state'), 'data-state', 'online');
    await second.getByTestId('chat-closed').waitFor();
    await second.close();
    await say(adas, 'back again');
    await sees(bens, [...before, ...missed, 'after the reload', 'back again']);
  });

  const users = await tab();
  await check('a user is found, with the session that is online', async () => {
    await view(users, 'users');
    await users.getByTestId('user-find').fill(ben);
    await users.getByTestId('user-find').press('Enter');
    await reads(users.getByTestId('user-state'), 'data-state', 'online');
    equal(await users.getByTestId('user-session').count(), 1, 'sessions');
    equal(users.url().endsWith(`#users&name=${ben}`), true, 'an address that can be shared');
  });

  await check('a push reaches the connected user', async () => {
    await users.getByTestId('push-text').fill('Your parcel is here.');
    await users.getByTestId('push-send').click();
    await users.getByTestId('push-result').waitFor();
    await eventually(async () => (await texts(bens, 'chat-push')).join() === 'Your parcel is here.', 'the push in the chat');
    equal((await texts(adas, 'chat-push')).length, 0, 'pushes that others see');
  });
  await picture(users, 'users');

  await check('a push to somebody who is away waits in the inbox', async () => {
    const nobody = `dora-${suffix}`;
    await users.getByTestId('user-find').fill(nobody);
    await users.getByTestId('user-find-submit').click();
    await reads(users.getByTestId('user-state'), 'data-state', 'offline');
    for (const text of ['first', '{"second":2}']) {
      await users.getByTestId('push-text').fill(text);
      await users.getByTestId('push-send').click();
      await eventually(async () => (await users.getByTestId('push-text').inputValue()) === '', 'the push was accepted');
    }
    await eventually(async () => (await users.getByTestId('inbox-message').count()) === 2, 'two messages in the inbox');
    const doras = await chat(nobody);
    await eventually(async () => (await texts(doras, 'chat-push')).join(' ') === 'first {"second":2}', 'both, in order');
    await doras.close();
  });

  await check('a kicked user is told, and can come back', async () => {
    await users.goto(`${origin()}#users&name=${ben}`);
    await users.getByTestId('user-kick').click();
    await users.getByTestId('user-kick').click();
    await bens.getByTestId('chat-closed').waitFor();
    await reads(users.getByTestId('user-state'), 'data-state', 'offline');
    await bens.getByTestId('chat-rejoin').click();
    await reads(bens.getByTestId('chat-state'), 'data-state', 'online');
    await reads(users.getByTestId('user-state'), 'data-state', 'online');
  });

  const everyone = await tab();
  await check('a broadcast reaches everyone, and is watched to its end', async () => {
    await view(everyone, 'broadcast');
    await broadcast(everyone, 'The bells ring at noon.', 100);
    for (const page of [adas, bens]) {
      await eventually(async () => (await texts(page, 'chat-broadcast')).includes('The bells ring at noon.'), 'the broadcast in the chat');
    }
    const job = everyone.getByTestId('broadcast-job').first();
    await reads(job, 'data-state', 'finished');
    await reads(job.getByTestId('broadcast-progress'), 'aria-valuenow', '100');
  });

  await check('a slow broadcast is paused, resumed and cancelled', async () => {
    await broadcast(everyone, 'Slowly, one every ten seconds.', 0.1);
    const job = everyone.getByTestId('broadcast-job').first();
    await reads(job, 'data-state', 'running');
    await job.getByTestId('broadcast-pause').click();
    await reads(job, 'data-state', 'paused');
    await picture(everyone, 'broadcast');
    await job.getByTestId('broadcast-resume').click();
    await reads(job, 'data-state', 'running');
    await job.getByTestId('broadcast-cancel').click();
    await job.getByTestId('broadcast-cancel').click();
    await reads(job, 'data-state', 'cancelled');
    await everyone.reload();
    equal(await everyone.getByTestId('broadcast-job').count(), 2, 'jobs after a reload');
  });

  await check('the live numbers count what happened', async () => {
    const number = async (id) => Number((await first.getByTestId(id).textContent()).replace(/\D/g, ''));
    await eventually(async () => (await number('live-connections')) >= 2, 'two connections');
    await eventually(async () => (await number('live-delivered-total')) >= 20, '20 deliveries');
    equal((await first.getByTestId('live-gateway').count()) >= 1, true, 'a gateway');
    for (let i = 0; i < 12; i++) {
      await say(adas, `ding ${i}`);
      await first.waitForTimeout(400);
    }
    await eventually(async () => (await number('live-delivered')) > 0, 'a rate of deliveries');
  });
  await picture(first, 'live');

  await check('a server that does not answer is said, and so is its return', async () => {
    await first.route('**/v1/**', (route) => route.abort());
    await first.getByTestId('server-away').waitFor();
    await first.unroute('**/v1/**');
    await first.getByTestId('server-away').waitFor({ state: 'detached' });
  });

  await check('a key that is refused asks for another, which is taken', async () => {
    const page = await tab();
    await page.goto(`${origin()}#key=not-the-right-key-at-all&app=${app()}`);
    await page.getByTestId('key-form').waitFor();
    await page.getByTestId('key-input').fill(key());
    await page.getByTestId('key-use').click();
    await page.getByTestId('live-connections').waitFor();
    await page.close();
  });

  await check('without a key the page says what to do, and the chat works', async () => {
    const page = await tab();
    await page.goto(`${origin()}#live`);
    await page.getByTestId('key-form').waitFor();
    await picture(page, 'key');
    await page.getByTestId('nav-chat').click();
    await page.getByTestId('chat-name').fill(cleo);
    await page.getByTestId('chat-room').fill(room);
    await page.getByTestId('chat-join').click();
    await reads(page.getByTestId('chat-state'), 'data-state', 'online');
    await page.getByTestId('chat-input').fill('no key here');
    await page.getByTestId('chat-send').click();
    await eventually(async () => (await texts(adas, 'chat-message')).includes('no key here'), 'the message of who has no key');
    await page.close();
  });

  await check('the keyboard is enough: skip link, views, join, send', async () => {
    const page = await tab();
    await page.goto(`${origin()}#chat&room=${room}`);
    await page.getByTestId('chat-name').waitFor();
    await page.getByTestId('chat-name').focus();
    await page.keyboard.type(`eve-${suffix}`);
    await page.keyboard.press('Enter');
    await reads(page.getByTestId('chat-state'), 'data-state', 'online');
    await page.getByTestId('chat-input').focus();
    await page.keyboard.type('typed');
    await page.keyboard.press('Tab');
    await page.keyboard.press('Enter');
    await eventually(async () => (await texts(page, 'chat-message')).includes('typed'), 'the message');
    await page.close();
  });

  await check('every control has a name, at every width nothing sticks out', async () => {
    for (const [name, page] of [['live', first], ['users', users], ['broadcast', everyone], ['chat', adas]]) {
      const nameless = await page.evaluate(() =>
        [...document.querySelectorAll('input, textarea, select, button, a')]
          .filter((e) => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))
          .map((e) => e.outerHTML),
      );
      equal(nameless.join('\n'), '', `controls without a name in ${name}`);
      await page.setViewportSize({ width: 360, height: 720 });
      const over = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
      equal(over <= 0, true, `${name} is ${over} pixels wider than a phone`);
      if (screenshots) await page.screenshot({ path: join(screenshots, `${name}-phone.png`) });
      await page.setViewportSize({ width: 1280, height: 800 });
    }
  });

  await check('nothing was loaded from elsewhere, and the browser complained of nothing', async () => {
    equal(complaints.join('\n'), '', 'complaints');
  });
}

/** A tab without a page yet, watched for errors and for requests that leave the server. */
async function tab() {
  const page = await context.newPage();
  page.on('pageerror', (error) => complaints.push(`error: ${error.stack ?? error}`));
  page.on('request', (request) => {
    const url = new URL(request.url());
    if (url.protocol.startsWith('http') && url.host !== address.host) complaints.push(`request to ${url.href}`);
  });
  return page;
}

function origin() {
  return `${address.origin}${address.pathname}`;
}
function fragment() {
  return new URLSearchParams(address.hash.slice(1));
}
function key() {
  return fragment().get('key') ?? '';
}
function app() {
  return fragment().get('app') ?? 'demo';
}

async function view(page, name) {
  await page.goto(`${origin()}${address.hash}`);
  await page.getByTestId(`nav-${name}`).click();
}

/** A tab in the room, joined by its address alone. */
async function chat(name) {
  const page = await tab();
  await page.goto(`${origin()}#chat&room=${room}&name=${name}&key=${key()}&app=${app()}`);
  await reads(page.getByTestId('chat-state'), 'data-state', 'online');
  return page;
}

/** Types it, and waits until the room has it. */
async function say(page, text) {
  await page.getByTestId('chat-input').fill(text);
  // Not a click: a browser draws a tab in the background so seldom that aiming takes seconds.
  await page.getByTestId('chat-input').press('Enter');
  await eventually(async () => (await texts(page, 'chat-message')).includes(text), `"${text}" in the sender's own tab`);
}

async function broadcast(page, text, perSecond) {
  await page.getByTestId('broadcast-text').fill(text);
  await page.getByTestId('broadcast-rate').fill(String(perSecond));
  await page.getByTestId('broadcast-start').click();
  await page.getByTestId('broadcast-job').filter({ hasText: text }).waitFor();
}

function texts(page, testid) {
  return page.getByTestId(testid).getByTestId('chat-text').allTextContents();
}

/** The room's lines are these, and no others. */
async function sees(page, expected) {
  let seen = [];
  await eventually(
    async () => {
      seen = await texts(page, 'chat-message');
      return JSON.stringify(seen) === JSON.stringify(expected);
    },
    () => `the lines\n      ${JSON.stringify(expected)}\n    but were\n      ${JSON.stringify(seen)}`,
  );
}

async function ordered(page) {
  const seqs = await page.getByTestId('chat-message').evaluateAll((lines) => lines.map((line) => Number(line.dataset.seq)));
  equal(seqs.every((seq, i) => seq > (seqs[i - 1] ?? 0)), true, `seqs that grow: ${seqs}`);
}

/** Nothing more comes for a while. */
async function settled(page, lines) {
  await page.waitForTimeout(1500);
  equal(await page.getByTestId('chat-message').count(), lines, 'lines a while later');
}

async function reads(locator, attribute, value) {
  let last;
  await eventually(
    async () => {
      last = await locator.getAttribute(attribute);
      return last === value;
    },
    () => `${attribute}="${value}" of ${locator}, last "${last}"`,
  );
}

async function eventually(condition, what) {
  const end = Date.now() + WAIT_MS;
  while (Date.now() < end) {
    if (await condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`never came: ${typeof what === 'function' ? what() : what}`);
}

function equal(actual, expected, what) {
  if (actual !== expected) throw new Error(`${what}: ${JSON.stringify(actual)}, expected ${JSON.stringify(expected)}`);
}

async function check(what, test) {
  const started = Date.now();
  try {
    await test();
    passed += 1;
    console.log(`ok      ${what} (${Date.now() - started} ms)`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${what}\n    ${error.message.split('\n').slice(0, 12).join('\n    ')}`);
  }
}

async function picture(page, name) {
  if (!screenshots) return;
  await page.bringToFront();
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme });
    await page.waitForTimeout(300);
    await page.screenshot({ path: join(screenshots, `${name}-${colorScheme}.png`) });
  }
  await page.emulateMedia({ colorScheme: 'light' });
}

function required(name) {
  const value = process.env[name];
  if (value) return value;
  console.error(`${name} is not set: the address that the server printed, http://127.0.0.1:8080/#key=…`);
  process.exit(2);
}
