//! `carillon dev`: keeper, hub with all its roles and gateway in one process, speaking over loopback as they would in a
//! cluster.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use carillon_agent::admin::{Admin, AdminError, ChangeOptions};
use carillon_agent::app::{ApiKey, App};
use carillon_agent::{Agent, Role};
use carillon_gateway::listeners::config::Protocol;
use carillon_gateway::{Gateway, GatewayOptions};
use carillon_hub::{Hub, HubOptions};
use tokio::time::Instant;

use crate::args::DevArgs;
use crate::connect_file::Connect;
use crate::data_dir::DataDir;
use crate::logs::LogHandle;
use crate::process::{Running, SharedKeeper, listen, loopback};
use crate::{banner, cluster, commands, console, listeners, ops, roles};

/// The app that a fresh `carillon dev` has.
const DEMO: &str = "demo";
/// How long the parts may take to find each other.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Starts everything; returns once it serves.
pub async fn start(args: DevArgs, logs: LogHandle) -> anyhow::Result<Running> {
    let data_dir = DataDir::open(&args.data_dir, "dev")?;
    let http = listen(args.http, "--http", "the API and the console").await?;
    let ops_listener = listen(args.ops, "--ops", "metrics and health").await?;
    // The gateway listens for itself, but last: what is in its way had better be said first.
    let listeners = listeners::of_flags(Some(args.mqtt), Some(args.ws), &args.tls)?;
    for listener in &listeners {
        let (address, flag, purpose) = listeners::named(listener)?;
        drop(listen(address, &flag, purpose).await?);
    }
    let internal = || listen(loopback(), "--data-dir", "between the parts of this process");
    let (keeper_grpc, hub_grpc) = (internal().await?, internal().await?);
    let http_address = http.local_addr()?;
    let ops_address = ops_listener.local_addr()?;
    let keeper_url = format!("http://{}", keeper_grpc.local_addr()?);

    let metrics = prometheus::Registry::new();
    ops::register_process(&metrics, "dev")?;
    let mut keeper = cluster::keeper_options(&data_dir, keeper_grpc, &metrics);
    keeper.cluster_id = Some(data_dir.cluster().to_owned());
    let keeper = SharedKeeper::new(cluster::start_keeper(keeper).await?);
    let agent = Agent::start(carillon_agent::Options::new(vec![keeper_url.clone()]));
    let api_key = demo_app(&Admin::new(vec![keeper_url.clone()]), data_dir.first_api_key()).await?;

    let hub_roles: Vec<Role> = Role::ALL.into_iter().filter(|&role| role != Role::Gateway).collect();
    let hub = Hub::start(
        HubOptions {
            instance_id: data_dir.instance("hub"),
            incarnation: data_dir.incarnation(),
            cluster: data_dir.cluster().to_owned(),
            roles: hub_roles,
            grpc: hub_grpc,
            http: Some(http),
            data_dir: data_dir.path().to_owned(),
            // All of it is in one directory, keeper and store: what is missing there was taken away.
            take_over_saver: Some("*".to_owned()),
            advertise: BTreeMap::new(),
            labels: BTreeMap::new(),
            console: console::router(),
            metrics: metrics.clone(),
        },
        agent.clone(),
    );
    let hub = Box::pin(hub).await.context("the hub does not start")?;
    // After a crash the keeper still knows the former hub for a while: a device that came in now would wait for that one.
    if tokio::time::timeout(READY_WITHIN, hub.ready()).await.is_err() {
        bail!(
            "the hub is not ready within {} s: {}",
            READY_WITHIN.as_secs(),
            roles::unmet(&hub.instance().roles, &agent).join("; ")
        );
    }
    let gateway = Box::pin(Gateway::start(
        GatewayOptions {
            instance_id: data_dir.instance("gateway"),
            incarnation: data_dir.incarnation(),
            labels: BTreeMap::new(),
            listeners,
            shards: args.shards,
            metrics: metrics.clone(),
        },
        agent.clone(),
    ))
    .await
    .map_err(listeners::gateway_error)?;

    let gateway_ready = gateway.readiness();
    let watched = agent.clone();
    let readiness: ops::Readiness = Arc::new(move || {
        let mut reasons = roles::unmet(&Role::ALL, &watched);
        reasons.extend(gateway_ready.reasons());
        reasons
    });
    let alive = keeper.clone();
    let ops = ops::serve(ops_listener, metrics, readiness.clone(), Arc::new(move || alive.failure()));
    let served = agent.clone();
    let mover = gateway.mover();
    let commands = tokio::spawn(async move { commands::serve(&served, logs, Some(mover)).await });
    until_ready(&readiness).await?;

    let shown = |protocol| gateway.address(protocol).map(reachable);
    let always = |protocol| shown(protocol).unwrap_or_else(loopback);
    let connect = Connect {
        endpoint: format!("http://{}", reachable(http_address)),
        mqtt: format!("mqtt://{}", always(Protocol::Mqtt)),
        ws: format!("ws://{}/mqtt", always(Protocol::Ws)),
        mqtts: shown(Protocol::Mqtts).map(|address| format!("mqtts://{address}")),
        wss: shown(Protocol::Wss).map(|address| format!("wss://{address}/mqtt")),
        ops: format!("http://{}", reachable(ops_address)),
        keeper: keeper_url,
        app: DEMO.to_owned(),
        api_key,
        pid: std::process::id(),
    };
    connect.write(data_dir.path()).context("cannot write connect.json into the data directory")?;
    // A closed stdout is no reason not to serve.
    if let Err(error) = banner::print(args.output, &connect, &args.data_dir) {
        tracing::warn!(%error, "cannot print the addresses");
    }
    Ok(Running {
        drain_within: Duration::from_secs(args.drain_seconds.max(1)),
        gateway: Some(gateway),
        // The gateway of a developer's machine has nowhere to send devices to.
        drains: false,
        hub: Some(hub),
        agent: Some(agent),
        keeper: Some(keeper),
        ops,
        commands: Some(commands),
        operator: None,
        data_dir: Some(data_dir),
    })
}

/// Publishes the demo app when there is none; gives a key of it. What was changed since the first start stays.
async fn demo_app(admin: &Admin, first_key: &str) -> anyhow::Result<String> {
    let document = format!("{DEMO_KIND}/{DEMO}");
    let app = App {
        root: true,
        anonymous_devices: true,
        api_keys: vec![ApiKey { name: "first".to_owned(), key: first_key.to_owned() }],
        // Everything below the app: it is there to be played with.
        device_publish: vec!["#".to_owned()],
        device_subscribe: vec!["#".to_owned()],
        ..App::default()
    };
    let began = Instant::now();
    loop {
        match admin.get(&document, None).await {
            Ok(found) => {
                let key = found.effective["api_keys"][0]["key"].as_str().unwrap_or_default();
                return Ok(key.to_owned());
            }
            Err(AdminError::NotFound(_)) => {
                let yaml = serde_yaml::to_string(&app).context("the demo app cannot be written as YAML")?;
                let options = ChangeOptions {
                    author: "carillon dev".to_owned(),
                    comment: "the app to begin with".to_owned(),
                    expected_revision: Some(0),
                    dry_run: false,
                    release_to: None,
                };
                match admin.publish(&document, &yaml, options).await {
                    Ok(_) | Err(AdminError::Conflict { .. }) => {}
                    Err(error) => bail!("the demo app is not accepted: {error}"),
                }
            }
            Err(error) if began.elapsed() < READY_WITHIN => {
                tracing::debug!(%error, "the keeper is not ready yet");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => bail!("the keeper does not answer: {error}"),
        }
    }
}

const DEMO_KIND: &str = <App as carillon_agent::document::ConfigDocument>::KIND;

async fn until_ready(readiness: &ops::Readiness) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let reasons = readiness();
        if reasons.is_empty() {
            return Ok(());
        }
        if began.elapsed() > READY_WITHIN {
            bail!("not ready within {} s: {}", READY_WITHIN.as_secs(), reasons.join("; "));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// How a program on this machine reaches an address that is listened on: "every interface" is no place to connect to.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
