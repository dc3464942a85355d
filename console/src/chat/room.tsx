//! A room as it is seen.

import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';

import { credentials } from '../credentials';
import { clock, moment } from '../format';
import { hashOf } from '../route';
import { useStore } from '../store';
import { Icon, onText } from '../ui';
import { useChat } from './connection';
import type { Chat } from './connection';
import type { Line } from './timeline';

/** Messages of one person this close together are one block. */
const BLOCK_MS = 120_000;

export function Room(props: { room: string; name: string }) {
  const { app } = useStore(credentials);
  const chat = useChat(app, props.room, props.name);
  const { state } = chat.status;
  return (
    <section class="card chat" aria-label={`Room ${props.room}`}>
      <header class="chat-head">
        <Avatar name={props.name} />
        <div class="chat-title">
          <b>{props.room}</b>
          <small class="muted">as {props.name}</small>
        </div>
        <span class={`chip ${PRESENCE[state].kind}`} data-testid="chat-state" data-state={state} role="status" title={chat.status.reason}>
          <span class={`dot ${PRESENCE[state].dot}`} />
          {PRESENCE[state].text}
        </span>
        <button type="button" class="button quiet wide-only" onClick={() => window.open(hashOf('chat', { room: props.room }), '_blank')}>
          <Icon name="tab" />
          Second tab
        </button>
        <a class="button quiet" href={hashOf('chat', { room: props.room })} data-testid="chat-leave">
          Leave
        </a>
      </header>
      <Lines chat={chat} name={props.name} />
      <Interruption chat={chat} name={props.name} />
      <Composer disabled={state === 'closed'} onSend={chat.send} room={props.room} />
    </section>
  );
}

const PRESENCE = {
  connecting: { text: 'Connecting', kind: '', dot: 'waiting' },
  online: { text: 'Online', kind: 'good', dot: 'good' },
  away: { text: 'Away', kind: 'waiting', dot: 'waiting' },
  closed: { text: 'Disconnected', kind: '', dot: 'bad' },
} as const;

/** What stands between this room and its messages, and what to do about it. */
function Interruption({ chat, name }: { chat: Chat; name: string }) {
  const { status, error } = chat;
  if (status.state === 'away') {
    return (
      <div class="banner" role="status" data-testid="chat-away">
        <span class="spinner" aria-hidden="true" />
        <span>Reconnecting: {status.reason}. What you write is sent when the connection is back.</span>
      </div>
    );
  }
  if (status.state === 'closed' && status.error) {
    const text = {
      'taken-over': `${name} is in this room in another tab now.`,
      kicked: 'An administrator ended this session. What is written meanwhile is kept for you.',
    }[status.error.code as string];
    return (
      <div class="banner bad" role="alert" data-testid="chat-closed">
        <span>{text ?? `The server refuses this connection: ${status.error.message}.`}</span>
        <button type="button" class="button small" onClick={chat.rejoin} data-testid="chat-rejoin">
          {status.error.code === 'taken-over' ? 'Use it here' : 'Rejoin'}
        </button>
      </div>
    );
  }
  if (error) {
    return (
      <div class="banner bad" role="alert">
        <span>The room cannot be entered: {error.message}.</span>
      </div>
    );
  }
  return null;
}

function Lines({ chat, name }: { chat: Chat; name: string }) {
  const box = useRef<HTMLDivElement>(null);
  const atEnd = useRef(true);
  useLayoutEffect(() => {
    const element = box.current;
    if (element && atEnd.current) element.scrollTop = element.scrollHeight;
  }, [chat.lines, chat.outgoing]);
  useEffect(() => {
    const element = box.current;
    if (!element) return undefined;
    const watch = () => {
      if (atEnd.current) element.scrollTop = element.scrollHeight;
    };
    const observer = new ResizeObserver(watch);
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  const scrolled = () => {
    const element = box.current;
    if (element) atEnd.current = element.scrollHeight - element.scrollTop - element.clientHeight < 40;
  };
  // Its own echo may be here before the acknowledgement.
  const sent = new Set(chat.lines.filter((line) => line.from === name).map((line) => `${line.at} ${line.text}`));
  const outgoing = chat.outgoing.filter(({ payload }) => !sent.has(`${payload.at} ${payload.text}`));
  const gap = (index: number) => chat.lines[index]?.missed && !chat.lines[index - 1]?.missed;
  return (
    <div class="lines" ref={box} onScroll={scrolled} role="log" aria-live="polite" aria-label="Messages" tabIndex={0} data-testid="chat-lines">
      {chat.lines.length === 0 && outgoing.length === 0 && (
        <p class="lines-empty">
          {chat.status.state === 'online' ? 'Nobody has said anything yet. Say hello, or join from a second tab.' : 'One moment…'}
        </p>
      )}
      {chat.lines.map((line, index) => (
        <div key={line.key} class="line-slot">
          {gap(index) && (
            <p class="divider" data-testid="chat-missed">
              <span>While you were away</span>
            </p>
          )}
          {line.kind === 'message' ? (
            <Bubble line={line} own={line.from === name} follows={!gap(index) && follows(chat.lines[index - 1], line)} />
          ) : (
            <Arrival line={line} />
          )}
        </div>
      ))}
      {outgoing.map((entry) => (
        <div key={`out ${entry.payload.at} ${entry.payload.text}`} class="line-slot">
          <div class={`bubble own ${entry.error ? 'failed' : 'sending'}`} data-testid="chat-outgoing">
            <p>{entry.payload.text}</p>
            <small>
              {entry.error ? (
                <>
                  Not sent: {entry.error}.{' '}
                  <button type="button" class="link" onClick={() => chat.retry(entry)}>
                    Try again
                  </button>
                </>
              ) : (
                'Sending'
              )}
            </small>
          </div>
        </div>
      ))}
    </div>
  );
}

function follows(before: Line | undefined, line: Line): boolean {
  return before?.kind === 'message' && before.from === line.from && line.at - before.at < BLOCK_MS;
}

function Bubble({ line, own, follows }: { line: Line; own: boolean; follows: boolean }) {
  const from = line.from || 'backend';
  return (
    <article
      class={`message ${own ? 'mine' : ''} ${follows ? 'follows' : ''}`}
      data-testid="chat-message"
      data-seq={Math.floor(line.order)}
      data-from={line.from}
      data-missed={line.missed}
    >
      {!own && !follows && <Avatar name={from} />}
      <div class={own ? 'bubble own' : 'bubble'}>
        {!own && !follows && (
          <b class="from" style={{ '--hue': hue(from) }}>
            {from}
          </b>
        )}
        <p data-testid="chat-text">{line.text}</p>
        <small title={moment(line.at)}>{clock(line.at)}</small>
      </div>
    </article>
  );
}

/** Something that reached the user, but not through the room. */
function Arrival({ line }: { line: Line }) {
  return (
    <div class="arrival" data-testid={`chat-${line.kind}`}>
      <Icon name={line.kind === 'push' ? 'inbox' : 'broadcast'} />
      <span>
        <small>{line.kind === 'push' ? 'Pushed to you' : 'Broadcast'}</small>
        <p data-testid="chat-text">{line.text}</p>
      </span>
      <small>{clock(line.at)}</small>
    </div>
  );
}

function Composer(props: { disabled: boolean; onSend: (text: string) => void; room: string }) {
  const [text, setText] = useState('');
  const send = (event: Event) => {
    event.preventDefault();
    if (!text.trim() || props.disabled) return;
    props.onSend(text.trim());
    setText('');
  };
  const key = (event: KeyboardEvent) => {
    // Enter that ends a composition (Japanese, Chinese …) belongs to it.
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) send(event);
  };
  return (
    <form class="composer" onSubmit={send}>
      <textarea
        rows={1}
        value={text}
        onInput={onText(setText)}
        onKeyDown={key}
        placeholder={`Write to ${props.room}`}
        aria-label="Message"
        maxLength={8000}
        disabled={props.disabled}
        data-testid="chat-input"
        autofocus
      />
      <button class="button primary round" aria-label="Send" disabled={props.disabled || !text.trim()} data-testid="chat-send">
        <Icon name="send" />
      </button>
    </form>
  );
}

function Avatar({ name }: { name: string }) {
  return (
    <span class="avatar" style={{ '--hue': hue(name) }} aria-hidden="true">
      {[...name][0]?.toUpperCase()}
    </span>
  );
}

/** A colour for a name, the same in every browser. */
function hue(name: string): number {
  let hash = 0;
  for (const char of name) hash = (hash * 31 + (char.codePointAt(0) ?? 0)) >>> 0;
  return (hash * 137) % 360;
}
