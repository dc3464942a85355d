//! `carillon keeper`, `hub` and `gateway`: one process of a cluster each, from the same parts as `carillon dev`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use carillon_agent::app::App;
use carillon_agent::document::DocumentKind;
use carillon_agent::revoked::Revoked;
use carillon_agent::tls::Tls;
use carillon_agent::{Agent, Role, keys};
use carillon_gateway::config::GatewayConfig;
use carillon_gateway::drain::Mover;
use carillon_gateway::listeners::config::Protocol;
use carillon_gateway::{Gateway, GatewayOptions};
use carillon_hub::config::HubConfig;
use carillon_hub::{Hub, HubOptions};
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::args::{GatewayArgs, HubArgs, KeeperArgs, ProcessArgs};
use crate::data_dir::DataDir;
use crate::logs::LogHandle;
use crate::process::{Running, SharedKeeper, listen};
use crate::{commands, console, listeners, ops, roles};

/// How long a hub waits at its start for the keeper to name the cluster, before it says so in the log.
const KEEPER_PATIENCE: Duration = Duration::from_secs(5);

/// Name of the file in the data directory from which a process starts while no keeper can be reached.
const AGENT_CACHE: &str = "agent-cache";

/// Every kind of document that there is.
fn document_kinds() -> Vec<DocumentKind> {
    vec![
        DocumentKind::of::<GatewayConfig>(),
        DocumentKind::of::<HubConfig>(),
        DocumentKind::of::<App>(),
        DocumentKind::of::<Revoked>(),
    ]
}

/// What a keeper on a listener needs; its data is in `keeper` below the data directory.
pub fn keeper_options(
    data_dir: &DataDir,
    grpc: TcpListener,
    metrics: &prometheus::Registry,
) -> KeeperOptions {
    let mut options = KeeperOptions::new(data_dir.path().join("keeper"), grpc, document_kinds());
    options.registry = Some(metrics.clone());
    options
}

pub async fn start_keeper(options: KeeperOptions) -> anyhow::Result<KeeperHandle> {
    Box::pin(Keeper::start(options)).await.context("the keeper does not start")
}

/// `carillon keeper`.
pub async fn keeper(args: KeeperArgs, _logs: LogHandle) -> anyhow::Result<Running> {
    let process = Process::open(&args.process, "keeper", None, None).await?;
    let grpc = listen(args.grpc, "--grpc", "gRPC for all other processes").await?;
    let address = grpc.local_addr()?;
    let mut options = keeper_options(&process.data_dir, grpc, &process.metrics);
    options.cluster_id = args.cluster;
    options.advertise = args.advertise_grpc;
    options.peers = args.peers;
    options.tls = args.tls.open()?;
    options.limits.snapshot_every = args.snapshot_every.unwrap_or(options.limits.snapshot_every);
    let keeper = start_keeper(options).await?;
    let keeper = SharedKeeper::new(keeper);
    let (watched, alive) = (keeper.clone(), keeper.clone());
    let readiness = Arc::new(move || watched.unmet());
    let running = process.running(readiness, Arc::new(move || alive.failure()), args.process.drain());
    tracing::info!(%address, "the keeper serves");
    Ok(Running { keeper: Some(keeper), ..running })
}

/// `carillon hub`.
pub async fn hub(args: HubArgs, logs: LogHandle) -> anyhow::Result<Running> {
    let tls = args.access.open(&args.keeper)?;
    let process = Process::open(&args.process, "hub", args.labels.instance.as_deref(), tls.as_ref()).await?;
    let grpc = listen(args.grpc, "--grpc", "gRPC for other processes").await?;
    let http = listen(args.http, "--http", "the API and the console").await?;
    let labels = args.labels.labels();
    let agent = process.agent(args.keeper, tls, &args.roles, &labels);
    let cluster = cluster_of(&agent).await;
    let mut advertise = BTreeMap::new();
    advertise.extend(args.advertise_grpc.map(|address| ("grpc".to_owned(), address)));
    let hub = Hub::start(
        HubOptions {
            instance_id: process.data_dir.instance(""),
            incarnation: process.data_dir.incarnation(),
            cluster,
            roles: args.roles.clone(),
            grpc,
            http: Some(http),
            data_dir: process.data_dir.path().to_owned(),
            take_over_saver: args.take_over_saver,
            advertise,
            labels,
            console: console::router(),
            metrics: process.metrics.clone(),
        },
        agent.clone(),
    );
    let hub = Box::pin(hub).await.context("the hub does not start")?;
    let (watched, own) = (agent.clone(), args.roles);
    let readiness = Arc::new(move || roles::unmet(&own, &watched));
    let commands = carry_out_commands(&agent, logs, None);
    let running = process.running(readiness, Arc::new(|| None), args.process.drain());
    Ok(Running { hub: Some(hub), agent: Some(agent), commands: Some(commands), ..running })
}

/// `carillon gateway`.
pub async fn gateway(args: GatewayArgs, logs: LogHandle) -> anyhow::Result<Running> {
    let tls = args.access.open(&args.keeper)?;
    let process =
        Process::open(&args.process, "gateway", args.labels.instance.as_deref(), tls.as_ref()).await?;
    let labels = args.labels.labels();
    let agent = process.agent(args.keeper, tls, &[Role::Gateway], &labels);
    let mut listeners = listeners::of_flags(args.mqtt.0, args.ws.0, &args.tls)?;
    for listener in &mut listeners {
        listener.advertise = match listener.protocol {
            Protocol::Mqtt => args.advertise_mqtt.clone(),
            Protocol::Mqtts => args.advertise_mqtts.clone(),
            Protocol::Ws => args.advertise_ws.clone(),
            Protocol::Wss => args.advertise_wss.clone(),
        };
    }
    let gateway = Box::pin(Gateway::start(
        GatewayOptions {
            instance_id: process.data_dir.instance(""),
            incarnation: process.data_dir.incarnation(),
            labels,
            listeners,
            shards: args.shards,
            metrics: process.metrics.clone(),
        },
        agent.clone(),
    ))
    .await
    .map_err(listeners::gateway_error)?;
    let (watched, ready) = (agent.clone(), gateway.readiness());
    let readiness = Arc::new(move || {
        let mut reasons = roles::unmet(&[Role::Gateway], &watched);
        reasons.extend(ready.reasons());
        reasons
    });
    let commands = carry_out_commands(&agent, logs, Some(gateway.mover()));
    tracing::info!("the gateway serves");
    let running = process.running(readiness, Arc::new(|| None), args.process.drain());
    Ok(Running {
        gateway: Some(gateway),
        drains: true,
        agent: Some(agent),
        commands: Some(commands),
        ..running
    })
}

fn carry_out_commands(agent: &Agent, logs: LogHandle, mover: Option<Mover>) -> JoinHandle<()> {
    let agent = agent.clone();
    tokio::spawn(async move { commands::serve(&agent, logs, mover).await })
}

/// The cluster's id, which only the keeper knows, or the last state that it told; waits for it as long as it takes.
async fn cluster_of(agent: &Agent) -> String {
    let known = async {
        agent.ready().await;
        agent.cluster_id().unwrap_or_default()
    };
    tokio::pin!(known);
    match tokio::time::timeout(KEEPER_PATIENCE, &mut known).await {
        Ok(cluster) => cluster,
        Err(_) => {
            tracing::warn!("waiting for the keeper");
            known.await
        }
    }
}

/// What every process of a cluster begins with.
struct Process {
    data_dir: DataDir,
    ops: TcpListener,
    metrics: prometheus::Registry,
}

impl Process {
    /// A new one is called `instance`, or what its certificate calls it.
    async fn open(
        args: &ProcessArgs,
        command: &str,
        instance: Option<&str>,
        tls: Option<&Arc<Tls>>,
    ) -> anyhow::Result<Self> {
        let name = tls.and_then(|tls| tls.now().subject.name.clone());
        if let Some(name) = &name {
            keys::check_instance(name).map_err(|what| {
                anyhow!("the name in the certificate, {name:?}, {what}, so that it is no instance id")
            })?;
            if let Some(instance) = instance.filter(|instance| instance != name) {
                bail!("--instance is {instance:?}, but the certificate for the keepers is {name:?}'s");
            }
        }
        let data_dir = DataDir::open_as(&args.data_dir, command, instance.or(name.as_deref()))?;
        let own = data_dir.instance("");
        if let Some(instance) = instance.filter(|instance| *instance != own) {
            let path = args.data_dir.display();
            bail!(
                "--instance is {instance:?}, but the data directory {path} is {own:?}'s: choose another with --data-dir"
            );
        }
        let ops = listen(args.ops, "--ops", "metrics and health").await?;
        let metrics = prometheus::Registry::new();
        ops::register_process(&metrics, command)?;
        Ok(Process { data_dir, ops, metrics })
    }

    /// The agent, with a cache in the data directory. It knows who it is from the start: the first configuration, also
    /// one from the cache, is what is meant for this process.
    fn agent(
        &self,
        keepers: Vec<String>,
        tls: Option<Arc<Tls>>,
        roles: &[Role],
        labels: &BTreeMap<String, String>,
    ) -> Agent {
        let cache = self.data_dir.path().join(AGENT_CACHE);
        let id = self.data_dir.instance("");
        let options = carillon_agent::Options::new(keepers).with_tls(tls);
        let agent = Agent::start(options.with_cache(cache, id.as_str()));
        agent.identify(&id, roles, labels.clone());
        agent
    }

    /// Serves its metrics and health; the parts are added by the caller.
    fn running(self, readiness: ops::Readiness, liveness: ops::Liveness, drain_within: Duration) -> Running {
        Running {
            drain_within,
            gateway: None,
            drains: false,
            hub: None,
            agent: None,
            keeper: None,
            operator: None,
            ops: ops::serve(self.ops, self.metrics, readiness, liveness),
            commands: None,
            data_dir: Some(self.data_dir),
        }
    }
}
