//! The frame: what is on every page, and the view in it.

import { useEffect, useState } from 'preact/hooks';

import { reach } from './api';
import type { Reach } from './api';
import { BroadcastView } from './broadcast';
import { ChatView } from './chat';
import { credentials, setCredentials } from './credentials';
import { LiveView } from './live';
import { startOverview } from './overview';
import { hashOf, useRoute, VIEWS } from './route';
import type { View } from './route';
import { useStore } from './store';
import { nextTheme, theme } from './theme';
import { Card, Command, Field, Icon, onText } from './ui';
import { UsersView } from './users';

const TITLES: Record<View, string> = { live: 'Live', users: 'Users', broadcast: 'Broadcast', chat: 'Chat room' };

const REACH: Record<Reach, { text: string; kind: string }> = {
  unknown: { text: 'Connecting', kind: 'waiting' },
  ok: { text: 'Connected', kind: 'good' },
  away: { text: 'Reconnecting', kind: 'waiting' },
  'no-key': { text: 'No API key', kind: 'idle' },
  refused: { text: 'Key refused', kind: 'bad' },
};

export function App() {
  const route = useRoute();
  const state = useStore(reach);
  const { app } = useStore(credentials);
  useEffect(startOverview, []);
  useEffect(() => {
    document.title = `${TITLES[route.view]} · Carillon`;
  }, [route.view]);
  const locked = route.view !== 'chat' && (state === 'no-key' || state === 'refused');
  return (
    <>
      <a class="skip" href="#main" onClick={skip}>
        Skip to the content
      </a>
      <div class="frame">
        <aside class="side">
          <a class="brand" href={hashOf('live')}>
            <Bell />
            <span>Carillon</span>
          </a>
          <nav aria-label="Views">
            {VIEWS.map((view) => (
              <a key={view} href={hashOf(view)} aria-current={view === route.view ? 'page' : undefined} data-testid={`nav-${view}`}>
                <Icon name={view} />
                <span>{TITLES[view]}</span>
              </a>
            ))}
          </nav>
          <div class="side-foot">
            <div class="side-status" data-testid="server-state" data-state={state}>
              <span class={`dot ${REACH[state].kind}`} />
              <span>
                <b>{app}</b>
                <small>{REACH[state].text}</small>
              </span>
            </div>
            <ThemeButton />
          </div>
        </aside>
        <main id="main" tabIndex={-1}>
          <h1>{TITLES[route.view]}</h1>
          {state === 'away' && route.view !== 'chat' && (
            <div class="banner" role="status" data-testid="server-away">
              <span class="spinner" aria-hidden="true" />
              <span>
                The server does not answer. Trying again every second; is <code>carillon dev</code> running?
              </span>
            </div>
          )}
          {locked ? (
            <KeyForm refused={state === 'refused'} />
          ) : (
            <>
              {route.view === 'live' && <LiveView />}
              {route.view === 'users' && <UsersView params={route.params} />}
              {route.view === 'broadcast' && <BroadcastView />}
              {route.view === 'chat' && <ChatView params={route.params} />}
            </>
          )}
        </main>
      </div>
    </>
  );
}

/** The fragment is the route here, so the link must not change it. */
function skip(event: MouseEvent) {
  event.preventDefault();
  document.getElementById('main')?.focus();
}

function ThemeButton() {
  const current = useStore(theme);
  const label = { system: 'Theme: as the system', light: 'Theme: light', dark: 'Theme: dark' }[current];
  return (
    <button type="button" class="icon-button" onClick={nextTheme} aria-label={label} title={label} data-testid="theme">
      <Icon name={current} />
    </button>
  );
}

function KeyForm(props: { refused: boolean }) {
  const now = useStore(credentials);
  const [key, setKey] = useState('');
  const [app, setApp] = useState(now.app);
  const submit = (event: Event) => {
    event.preventDefault();
    if (key.trim()) setCredentials({ key: key.trim(), app: app.trim() || 'demo' });
  };
  return (
    <Card testid="key-form">
      <div class="key-form">
        <span class="medal">
          <Icon name="key" />
        </span>
        <div>
          <h2>{props.refused ? `The key is not accepted for app “${now.app}”` : 'An API key is needed'}</h2>
          <p>
            {props.refused
              ? 'It may have been replaced, or belong to another app. Open the address that the server printed last, or paste a key:'
              : 'Open the address that the server printed when it started, it carries the key. Or paste one:'}
          </p>
          <form onSubmit={submit} class="row">
            <Field label="API key">
              <input type="password" autocomplete="off" value={key} onInput={onText(setKey)} data-testid="key-input" required />
            </Field>
            <Field label="App">
              <input value={app} onInput={onText(setApp)} data-testid="key-app" spellcheck={false} />
            </Field>
            <button class="button primary" data-testid="key-use">
              Use it
            </button>
          </form>
          <p class="muted">No server yet? This starts one, and prints the address to open:</p>
          <Command text="make dev" />
          <p class="muted">
            The <a href={hashOf('chat')}>chat room</a> works without a key.
          </p>
        </div>
      </div>
    </Card>
  );
}

function Bell() {
  return (
    <svg viewBox="0 0 32 32" class="bell" aria-hidden="true">
      <path d="M16 2.5a2.2 2.2 0 0 1 2.2 2.2v.6c4.3 1 7.2 4.7 7.2 9.2v4.8l2.3 3.3c.7 1-.1 2.4-1.3 2.4H5.6c-1.2 0-2-1.4-1.3-2.4l2.3-3.3v-4.8c0-4.5 2.9-8.2 7.2-9.2v-.6A2.2 2.2 0 0 1 16 2.5z" />
      <path class="clapper" d="M11.800 27h8.4a4.2 4.2 0 0 1-8.4 0z" />
    </svg>
  );
}
