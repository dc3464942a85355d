//! One user: is anyone there, what is waiting in the inbox, and a push by hand.

import { pullHistory } from '@carillon/client';
import type { HistoryMessage } from '@carillon/client';
import { useEffect, useState } from 'preact/hooks';

import { api, ApiError, base } from './api';
import type { User } from './api';
import { credentials } from './credentials';
import { duration, moment } from './format';
import { hashOf } from './route';
import { useStore } from './store';
import { Card, ConfirmButton, Empty, Field, Icon, Notice, onText, usePoll } from './ui';

export function UsersView(props: { params: URLSearchParams }) {
  const user = props.params.get('name') ?? '';
  const [text, setText] = useState(user);
  useEffect(() => setText(user), [user]);
  const find = (event: Event) => {
    event.preventDefault();
    if (text.trim()) location.hash = hashOf('users', { name: text.trim() });
  };
  return (
    <div class="stack">
      <Card>
        <form class="row" onSubmit={find} role="search">
          <Field label="User">
            <input
              value={text}
              onInput={onText(setText)}
              placeholder="alice"
              data-testid="user-find"
              autocomplete="off"
              autocapitalize="off"
              spellcheck={false}
              required
            />
          </Field>
          <button class="button primary" data-testid="user-find-submit">
            Find
          </button>
        </form>
      </Card>
      {user ? (
        <UserDetail key={user} user={user} />
      ) : (
        <Card>
          <Empty icon="users" title="Look a user up">
            See which devices are connected and where, what is waiting in the inbox, and push a message.
          </Empty>
        </Card>
      )}
    </div>
  );
}

function UserDetail({ user }: { user: string }) {
  const { app } = useStore(credentials);
  const [found, setFound] = useState<User | undefined>(undefined);
  const [error, setError] = useState('');
  const [pushes, setPushes] = useState(0);
  usePoll(
    async (signal) => {
      try {
        setFound(await api.user(user, signal));
        setError('');
      } catch (cause) {
        // That the server is away is on the page already; the last answer stays.
        if (cause instanceof ApiError && !cause.away) setError(cause.message);
      }
    },
    1500,
    `${app}/${user}`,
  );
  if (error) return <Notice kind="bad">{error}</Notice>;
  return (
    <div class="columns">
      <div class="stack">
        <Sessions user={user} found={found} />
        <Inbox user={user} again={pushes} />
      </div>
      <Push user={user} online={found?.online ?? false} onPushed={() => setPushes((n) => n + 1)} />
    </div>
  );
}

function Sessions({ user, found }: { user: string; found: User | undefined }) {
  const [said, setSaid] = useState('');
  const kick = async (device?: string) => {
    try {
      const { kicked } = await api.kick(user, device);
      setSaid(kicked === 1 ? 'One connection was ended.' : `${kicked} connections were ended.`);
    } catch (error) {
      setSaid((error as Error).message);
    }
    setTimeout(() => setSaid(''), 4000);
  };
  const sessions = found?.sessions ?? [];
  const state = found === undefined ? 'unknown' : found.online ? 'online' : 'offline';
  return (
    <Card
      testid="user-sessions"
      title={user}
      aside={
        <>
          <span class={`chip ${found?.online ? 'good' : ''}`} data-testid="user-state" data-state={state}>
            <span class={`dot ${found?.online ? 'good' : 'idle'}`} />
            {found === undefined ? 'Looking' : found.online ? 'Online' : 'Offline'}
          </span>
          <span class="grow" />
          {sessions.length > 0 && (
            <ConfirmButton label="Kick" confirm="Disconnect all?" onConfirm={() => void kick()} testid="user-kick" />
          )}
        </>
      }
    >
      {said && <Notice kind="info">{said}</Notice>}
      {found && sessions.length === 0 ? (
        <Empty icon="plug" title="No device is connected">
          Pushes are kept, and delivered when one comes back.
        </Empty>
      ) : (
        <ul class="sessions">
          {sessions.map((session) => (
            <li key={session.device} data-testid="user-session">
              <span class="name" title={session.device}>
                {session.device}
              </span>
              <span class="facts">
                <span>{session.address}</span>
                <span>
                  on <b>{session.gateway}</b>
                </span>
                <span title={moment(Date.parse(session.since))}>for {duration(Date.now() - Date.parse(session.since))}</span>
              </span>
              {sessions.length > 1 && (
                <button type="button" class="button quiet small" onClick={() => void kick(session.device)} aria-label={`Kick ${session.device}`}>
                  Kick
                </button>
              )}
            </li>
          ))}
        </ul>
      )}
    </Card>
  );
}

function Push(props: { user: string; online: boolean; onPushed: () => void }) {
  const [text, setText] = useState('');
  const [qos, setQos] = useState('1');
  const [ttl, setTtl] = useState('');
  const [busy, setBusy] = useState(false);
  const [result, setResult] = useState<{ kind: 'good' | 'bad'; text: string } | undefined>(undefined);
  const [wrong, setWrong] = useState<string | undefined>(undefined);
  const push = async (event: Event) => {
    event.preventDefault();
    setBusy(true);
    setWrong(undefined);
    try {
      const accepted = await api.push(props.user, {
        payload: text,
        qos: qos === '0' ? 0 : 1,
        ...(ttl && { ttl_seconds: Number(ttl) }),
        // One id for this press of the button: should the browser repeat the request, it is still one message.
        id: crypto.randomUUID(),
      });
      setText('');
      setResult({ kind: 'good', text: `Accepted as number ${accepted.seq} of ${accepted.topic}.` });
      props.onPushed();
    } catch (error) {
      if (error instanceof ApiError && error.field) setWrong(error.field);
      setResult({ kind: 'bad', text: (error as Error).message });
    }
    setBusy(false);
  };
  return (
    <Card title="Push">
      <form class="form" onSubmit={push}>
        <Field label="To">
          <input value={props.user} readOnly data-testid="push-user" />
        </Field>
        <Field label="Message" error={wrong === 'payload' ? result?.text : undefined}>
          <textarea rows={4} value={text} onInput={onText(setText)} data-testid="push-text" placeholder="Text or JSON" required />
        </Field>
        <div class="row">
          <Field label="Delivery">
            <select value={qos} onInput={onText(setQos)} data-testid="push-qos">
              <option value="1">At least once</option>
              <option value="0">At most once</option>
            </select>
          </Field>
          <Field label="Expires after" error={wrong === 'ttl_seconds' ? result?.text : undefined}>
            <span class="with-unit">
              <input type="number" min="1" max="4294967295" value={ttl} onInput={onText(setTtl)} placeholder="never" data-testid="push-ttl" />
              <span>s</span>
            </span>
          </Field>
        </div>
        <button class="button primary" disabled={busy || !text} data-testid="push-send">
          <Icon name="send" />
          {props.online ? 'Push now' : 'Push, for later'}
        </button>
        {result && !wrong && (
          <Notice kind={result.kind} testid="push-result">
            {result.text}
          </Notice>
        )}
      </form>
    </Card>
  );
}

/** The saver trims what was acknowledged; what remains is what somebody still has to get. */
function Inbox({ user, again }: { user: string; again: number }) {
  const { app, key } = useStore(credentials);
  const [messages, setMessages] = useState<HistoryMessage[] | undefined>(undefined);
  const [next, setNext] = useState('');
  const [more, setMore] = useState(false);
  const [error, setError] = useState('');
  /** Pages beyond the first are shown: then it does not change under the reader's eyes. */
  const [extended, setExtended] = useState(false);
  useEffect(() => setExtended(false), [again]);
  const load = async (after: string, signal?: AbortSignal) => {
    try {
      const page = await pullHistory({ http: base, app, apiKey: key, topic: `${app}/u/${user}`, after, limit: 100, ...(signal && { signal }) });
      setMessages((shown) => (after ? [...(shown ?? []), ...page.messages] : page.messages));
      setNext(page.next);
      setMore(page.more);
      setError('');
    } catch (cause) {
      if (!signal?.aborted) setError((cause as Error).message);
    }
  };
  usePoll((signal) => (extended ? Promise.resolve() : load('', signal)), 5000, `${app}/${user}/${again}`);
  const showMore = () => {
    setExtended(true);
    void load(next);
  };
  return (
    <Card title="Inbox" aside={<span class="muted">waiting to be acknowledged</span>} testid="user-inbox">
      {error && <Notice kind="bad">{error}</Notice>}
      {messages?.length === 0 && (
        <Empty icon="inbox" title="Nothing is waiting">
          What every device of the user has acknowledged is gone from here.
        </Empty>
      )}
      {messages && messages.length > 0 && (
        <ol class="inbox">
          {messages.map((message) => (
            <li key={message.seq} data-testid="inbox-message">
              <span class="seq" title={`epoch ${message.epoch}, id ${message.id}`}>
                {message.seq}
              </span>
              <pre>{pretty(message.text)}</pre>
              <time dateTime={new Date(message.publishedMs).toISOString()}>{moment(message.publishedMs)}</time>
            </li>
          ))}
        </ol>
      )}
      {more && (
        <button type="button" class="button quiet" onClick={showMore} data-testid="inbox-more">
          Show more
        </button>
      )}
    </Card>
  );
}

function pretty(text: string): string {
  if (!/^\s*[[{]/.test(text)) return text;
  try {
    return JSON.stringify(JSON.parse(text), undefined, 2);
  } catch {
    return text;
  }
}
