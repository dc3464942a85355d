//! The chat room: a group topic that everyone in it publishes to and keeps a session for. It shows what the platform is
//! for: who is away misses nothing, and gets it in order, once.

import { useState } from 'preact/hooks';

import { Room } from './chat/room';
import { hashOf } from './route';
import { Card, Field, onText } from './ui';

const NAME = 'carillon.chat.name';
/** Of a name and of a room: both are part of the client id, which has its limit. */
const MAX_CHARS = 32;

export function ChatView(props: { params: URLSearchParams }) {
  const room = props.params.get('room') ?? '';
  const name = props.params.get('name') ?? '';
  if (room && name && !invalid(room) && !invalid(name)) return <Room key={`${room}/${name}`} room={room} name={name} />;
  return <Join room={room} name={name} />;
}

function Join(props: { room: string; name: string }) {
  const [name, setName] = useState(props.name || lastName());
  const [room, setRoom] = useState(props.room || 'lobby');
  const join = (event: Event) => {
    event.preventDefault();
    if (invalid(name.trim()) || invalid(room.trim())) return;
    try {
      sessionStorage.setItem(NAME, name.trim());
    } catch {
      // Then it is asked again.
    }
    location.hash = hashOf('chat', { room: room.trim(), name: name.trim() });
  };
  return (
    <div class="join">
      <Card>
        <form class="form" onSubmit={join}>
          <p class="lead">
            Join under one name here and another in a second tab. Close one, write in the other, and come back: what you
            missed is waiting, in order.
          </p>
          <Field label="Your name" error={name && invalid(name.trim())}>
            <input
              value={name}
              onInput={onText(setName)}
              placeholder="alice"
              data-testid="chat-name"
              maxLength={MAX_CHARS}
              autocomplete="off"
              spellcheck={false}
              autofocus
              required
            />
          </Field>
          <Field label="Room" error={room && invalid(room.trim())}>
            <input value={room} onInput={onText(setRoom)} data-testid="chat-room" maxLength={MAX_CHARS} autocomplete="off" spellcheck={false} required />
          </Field>
          <button class="button primary" data-testid="chat-join">
            Join
          </button>
        </form>
      </Card>
    </div>
  );
}

/** Why this cannot be one level of a topic; empty if it can. */
function invalid(text: string): string {
  if (!text.trim()) return 'This is empty.';
  if (/[/+#]/.test(text)) return 'It may not contain / + or #.';
  if (/[\u0000-\u001f\u007f-\u009f]/.test(text)) return 'It contains a control character.';
  return text.length > MAX_CHARS ? `It is longer than ${MAX_CHARS} characters.` : '';
}

function lastName(): string {
  try {
    return sessionStorage.getItem(NAME) ?? '';
  } catch {
    return '';
  }
}
