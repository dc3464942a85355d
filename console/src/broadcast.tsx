//! A message to everyone, at a rate, with its progress.

import { useState } from 'preact/hooks';

import { api, ApiError } from './api';
import type { Job } from './api';
import { credentials } from './credentials';
import { count, duration, moment, rate } from './format';
import { hashOf } from './route';
import { useStore } from './store';
import { Card, ConfirmButton, Empty, Field, Icon, Notice, onText, usePoll } from './ui';

/** Jobs that this tab remembers; the server has no list of them. */
const MAX_REMEMBERED = 10;

interface Remembered {
  id: string;
  text: string;
}

export function BroadcastView() {
  const { app } = useStore(credentials);
  const [jobs, setJobs] = useState<Remembered[]>(() => recall(app));
  const started = (job: Job, text: string) => {
    const next = [{ id: job.id, text }, ...jobs.filter((known) => known.id !== job.id)].slice(0, MAX_REMEMBERED);
    setJobs(next);
    remember(app, next);
  };
  return (
    <div class="columns form-first">
      <div class="stack">
        {jobs.length === 0 && (
          <Card>
            <Empty icon="broadcast" title="No broadcast yet">
              It reaches everyone who is subscribed to <code>{app}/all</code>, at the rate you set. Whoever is in the{' '}
              <a href={hashOf('chat')}>chat room</a> is.
            </Empty>
          </Card>
        )}
        {jobs.map((job) => (
          <JobCard key={job.id} id={job.id} text={job.text} />
        ))}
      </div>
      <Start onStarted={started} />
    </div>
  );
}

function Start(props: { onStarted: (job: Job, text: string) => void }) {
  const [text, setText] = useState('');
  const [perSecond, setPerSecond] = useState('');
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<{ text: string; field?: string | undefined } | undefined>(undefined);
  const start = async (event: Event) => {
    event.preventDefault();
    setBusy(true);
    setError(undefined);
    try {
      const job = await api.startBroadcast({
        payload: text,
        ...(perSecond && { rate_per_second: Number(perSecond) }),
        id: crypto.randomUUID(),
      });
      props.onStarted(job, text);
      setText('');
    } catch (cause) {
      setError({ text: (cause as Error).message, field: cause instanceof ApiError ? cause.field : undefined });
    }
    setBusy(false);
  };
  return (
    <Card title="To everyone">
      <form class="form" onSubmit={start}>
        <Field label="Message" error={error?.field === 'payload' ? error.text : undefined}>
          <textarea rows={4} value={text} onInput={onText(setText)} data-testid="broadcast-text" placeholder="Text or JSON" required />
        </Field>
        <Field
          label="Rate"
          hint="Sends over all gateways together. A slower one is kinder to what devices call next."
          error={error?.field === 'rate_per_second' ? error.text : undefined}
        >
          <span class="with-unit">
            <input
              type="number"
              min="0"
              max="1000000000"
              step="any"
              value={perSecond}
              onInput={onText(setPerSecond)}
              placeholder="the app’s default"
              data-testid="broadcast-rate"
            />
            <span>per second</span>
          </span>
        </Field>
        <button class="button primary" disabled={busy || !text} data-testid="broadcast-start">
          <Icon name="broadcast" />
          Start
        </button>
        {error && !['payload', 'rate_per_second'].includes(error.field ?? '') && <Notice kind="bad">{error.text}</Notice>}
      </form>
    </Card>
  );
}

const STATES: Record<Job['state'], { text: string; kind: string }> = {
  running: { text: 'Running', kind: 'live' },
  paused: { text: 'Paused', kind: 'waiting' },
  cancelled: { text: 'Cancelled', kind: '' },
  finished: { text: 'Finished', kind: 'good' },
  interrupted: { text: 'Interrupted', kind: 'waiting' },
};

function JobCard({ id, text }: { id: string; text: string }) {
  const { app } = useStore(credentials);
  const [job, setJob] = useState<Job | undefined>(undefined);
  const [error, setError] = useState('');
  const [gone, setGone] = useState(false);
  const ended = gone || (job !== undefined && job.state !== 'running' && job.state !== 'paused');
  usePoll(
    async (signal) => {
      if (ended) return;
      try {
        setJob(await api.broadcast(id, signal));
        setError('');
      } catch (cause) {
        if (!(cause instanceof ApiError)) return;
        if (cause.status === 404) setGone(true);
        else if (!cause.away) setError(cause.message);
      }
    },
    400,
    id,
  );
  const control = async (what: 'pause' | 'resume' | 'cancel') => {
    try {
      setJob(await api.control(id, what));
    } catch (cause) {
      setError((cause as Error).message);
    }
  };
  if (gone) return null;
  const state = STATES[job?.state ?? 'running'];
  const share = job ? (job.total > 0 ? Math.min(1, job.done / job.total) : job.state === 'finished' ? 1 : 0) : 0;
  const tookMs = job ? (job.ended_at ? Date.parse(job.ended_at) : Date.now()) - Date.parse(job.started_at) : 0;
  return (
    <section class="card job" data-testid="broadcast-job" data-state={job?.state ?? 'unknown'}>
      <header class="card-head">
        <p class="job-text">{text}</p>
        <span class={`chip ${state.kind}`} data-testid="broadcast-state">
          {state.text}
        </span>
      </header>
      <div
        class={`progress ${state.kind}`}
        role="progressbar"
        aria-label="Progress"
        aria-valuemin={0}
        aria-valuemax={100}
        aria-valuenow={Math.round(share * 100)}
        data-testid="broadcast-progress"
      >
        <span style={{ width: `${share * 100}%` }} />
      </div>
      <p class="facts" data-testid="broadcast-count">
        {job ? (
          <>
            <span>
              <b>{count(job.done)}</b> of <b>{count(job.total)}</b> sent
            </span>
            <span>{job.rate_per_second > 0 ? `${rate(job.rate_per_second)} per second` : 'as fast as possible'}</span>
            <span>{ended ? `took ${duration(tookMs)}` : `for ${duration(tookMs)}`}</span>
            {job.state === 'running' && job.rate_per_second > 0 && job.total > job.done && (
              <span>about {duration(((job.total - job.done) / job.rate_per_second) * 1000)} left</span>
            )}
            <span>started {moment(Date.parse(job.started_at))}</span>
          </>
        ) : (
          'Looking it up'
        )}
      </p>
      {job?.state === 'finished' && job.total === 0 && (
        <Notice kind="info">
          Nobody was subscribed to <code>{app}/all</code>. Devices with a kept session get it when they come back.
        </Notice>
      )}
      {job?.state === 'interrupted' && (
        <Notice kind="info">The server that ran it was lost. Who missed the message gets it when reconnecting.</Notice>
      )}
      {error && <Notice kind="bad">{error}</Notice>}
      {job && !ended && (
        <div class="row">
          {job.state === 'running' ? (
            <button type="button" class="button" onClick={() => void control('pause')} data-testid="broadcast-pause">
              Pause
            </button>
          ) : (
            <button type="button" class="button primary" onClick={() => void control('resume')} data-testid="broadcast-resume">
              Resume
            </button>
          )}
          <ConfirmButton label="Cancel" confirm="Really cancel?" onConfirm={() => void control('cancel')} testid="broadcast-cancel" />
        </div>
      )}
    </section>
  );
}

function recall(app: string): Remembered[] {
  try {
    return JSON.parse(sessionStorage.getItem(`carillon.broadcasts.${app}`) ?? '[]') as Remembered[];
  } catch {
    return [];
  }
}

function remember(app: string, jobs: Remembered[]): void {
  try {
    sessionStorage.setItem(`carillon.broadcasts.${app}`, JSON.stringify(jobs));
  } catch {
    // Then a reload forgets them.
  }
}
