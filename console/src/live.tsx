//! Live numbers of the app, in all and of each gateway.

import { findEndpoints } from '@carillon/client';
import type { Address } from '@carillon/client';
import { useEffect, useState } from 'preact/hooks';

import { base } from './api';
import { count, rate } from './format';
import { overview } from './overview';
import type { History } from './overview';
import { hashOf } from './route';
import { Sparkline } from './sparkline';
import { useStore } from './store';
import { Card, Command, Empty } from './ui';

export function LiveView() {
  const history = useStore(overview);
  if (!history) return <Skeleton />;
  const { now } = history;
  return (
    <div class="stack">
      <div class="tiles">
        <Tile label="Connections" value={count(now.connections)} values={history.connections} format={count} testid="live-connections" />
        <Tile
          label="Deliveries per second"
          value={rate(now.delivered_per_second ?? 0)}
          values={history.delivered}
          format={rate}
          testid="live-delivered"
        />
        <Tile
          label="Publishes per second"
          value={rate(now.published_per_second ?? 0)}
          values={history.published}
          format={rate}
          testid="live-published"
        />
      </div>
      <dl class="totals">
        <Total label="Delivered" value={now.delivered} testid="live-delivered-total" />
        <Total label="Published by devices" value={now.published} testid="live-published-total" />
        <Total label="Dropped" value={now.dropped} testid="live-dropped-total" bad={now.dropped > 0} />
        <Total label="Gateways" value={now.gateways.length} testid="live-gateways-total" />
      </dl>
      <Gateways history={history} />
      {now.connections === 0 && <FirstSteps app={now.app} />}
    </div>
  );
}

/** How to connect something, with the addresses that this server has. */
function FirstSteps({ app }: { app: string }) {
  const [address, setAddress] = useState<Address | undefined>(undefined);
  useEffect(() => {
    findEndpoints(base, 'console').then(
      (list) => setAddress(list.find((candidate) => candidate.scheme === 'mqtt')),
      // Then the command is shown with the usual address.
      () => {},
    );
  }, []);
  const { host, port } = address ?? { host: '127.0.0.1', port: 1883 };
  return (
    <Card title="Nothing is connected yet">
      <p class="muted">
        Open the <a href={hashOf('chat')}>chat room</a> in two tabs, or connect any MQTT client:
      </p>
      <Command text={`mosquitto_sub -V 5 -h ${host} -p ${port} -u alice -q 1 -t ${app}/u/alice`} />
      <p class="muted">Then push something to it:</p>
      <Command text={`carillon push alice "Hello"${app === 'demo' ? '' : ` --app ${app}`}`} />
    </Card>
  );
}

function Tile(props: { label: string; value: string; values: number[]; format: (value: number) => string; testid: string }) {
  return (
    <section class="card tile">
      <h2>{props.label}</h2>
      <p class="figure" data-testid={props.testid}>
        {props.value}
      </p>
      <Sparkline values={props.values} label={props.label} format={props.format} />
    </section>
  );
}

function Total(props: { label: string; value: number; testid: string; bad?: boolean }) {
  return (
    <div>
      <dt>{props.label}</dt>
      <dd data-testid={props.testid} class={props.bad ? 'bad' : ''}>
        {count(props.value)}
      </dd>
    </div>
  );
}

/** A gateway reports each second; one that has been silent for longer is likely in trouble. */
const STALE_SECONDS = 5;

function Gateways({ history }: { history: History }) {
  const { gateways } = history.now;
  return (
    <Card title="Gateways">
      {gateways.length === 0 ? (
        <Empty icon="plug" title="No gateway has reported">
          Devices cannot connect without one. It shows up here within seconds of its start.
        </Empty>
      ) : (
        <div class="scroll">
          <table>
            <thead>
              <tr>
                <th scope="col">Gateway</th>
                <th scope="col" class="number">
                  Connections
                </th>
                <th scope="col" class="number">
                  Deliveries/s
                </th>
                <th scope="col" class="number">
                  Publishes/s
                </th>
                <th scope="col" class="number">
                  Delivered
                </th>
                <th scope="col" class="number">
                  Dropped
                </th>
                <th scope="col" class="spark-cell">
                  Last two minutes
                </th>
              </tr>
            </thead>
            <tbody>
              {gateways.map((g) => (
                <tr key={g.gateway} data-testid="live-gateway">
                  <th scope="row">
                    <span class={`dot ${g.age_seconds > STALE_SECONDS ? 'waiting' : 'good'}`} />
                    <span class="name" title={g.gateway}>
                      {g.gateway}
                    </span>
                    {g.age_seconds > STALE_SECONDS && <small class="muted"> silent for {Math.round(g.age_seconds)} s</small>}
                  </th>
                  <td class="number">{count(g.connections)}</td>
                  <td class="number">{rate(g.delivered_per_second ?? 0)}</td>
                  <td class="number">{rate(g.published_per_second ?? 0)}</td>
                  <td class="number">{count(g.delivered)}</td>
                  <td class="number">{count(g.dropped)}</td>
                  <td class="spark-cell">
                    <Sparkline small values={history.gateways.get(g.gateway) ?? []} label={`Deliveries of ${g.gateway}`} format={rate} />
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </Card>
  );
}

function Skeleton() {
  return (
    <div class="tiles" aria-busy="true" aria-label="Loading">
      {[0, 1, 2].map((key) => (
        <div key={key} class="card tile skeleton" />
      ))}
    </div>
  );
}
