//! A process of a cluster: starts its parts, serves until it is told to stop, and stops them in order and in time.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use carillon_agent::Agent;
use carillon_gateway::GatewayHandle;
use carillon_hub::HubHandle;
use carillon_keeper::KeeperHandle;
use carillon_operator::OperatorHandle;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;

use crate::args::LogFormat;
use crate::data_dir::DataDir;
use crate::logs::{self, LogHandle};
use crate::ops::Ops;

/// What is told by a shell when a process ends by the second Ctrl-C: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

/// What is left of the time for stopping when a drain has to be over.
const DRAIN_REST: Duration = Duration::from_secs(5);

/// Logs, runtime, build, serve, drain.
pub fn run<F>(level: &str, format: LogFormat, start: impl FnOnce(LogHandle) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<Running>>,
{
    let logs = logs::start(level, format)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("carillon")
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let running = tokio::select! {
            running = Box::pin(start(logs)) => running?,
            // Told to stop before it served: nothing was promised to anybody yet.
            () = signals.next() => return Ok(()),
        };
        let failure = running.failure();
        let failed = tokio::select! {
            () = signals.next() => None,
            reason = failure => Some(reason),
        };
        let drained = tokio::select! {
            result = Box::pin(running.drain()) => result,
            () = signals.next() => std::process::exit(INTERRUPTED),
        };
        match failed {
            Some(reason) => bail!(reason),
            None => drained,
        }
    });
    // What still runs was given up by `drain`.
    runtime.shutdown_background();
    result
}

/// Ctrl-C and SIGTERM, which mean the same.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Signals {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// The parts of a running process; which there are is the command's choice.
pub struct Running {
    /// How long stopping may take.
    pub drain_within: Duration,
    pub gateway: Option<GatewayHandle>,
    /// The gateway sends its devices to others before it ends.
    pub drains: bool,
    pub hub: Option<HubHandle>,
    pub agent: Option<Agent>,
    pub keeper: Option<SharedKeeper>,
    pub operator: Option<OperatorHandle>,
    pub ops: Ops,
    /// Carries out commands; ends with the agent.
    pub commands: Option<JoinHandle<()>>,
    /// Given back last.
    pub data_dir: Option<DataDir>,
}

/// The end of a part that may not be there.
async fn of(failed: Option<impl Future<Output = String>>) -> String {
    match failed {
        Some(failed) => failed.await,
        None => std::future::pending().await,
    }
}

/// A keeper that its readiness probe looks at while the process owns it.
#[derive(Clone)]
pub struct SharedKeeper {
    /// None: it is being stopped.
    handle: Arc<Mutex<Option<KeeperHandle>>>,
    /// Why it cannot go on, once it has failed.
    failure: Arc<OnceLock<String>>,
}

impl SharedKeeper {
    pub fn new(keeper: KeeperHandle) -> Self {
        SharedKeeper { handle: Arc::new(Mutex::new(Some(keeper))), failure: Arc::default() }
    }

    /// Why only a restart helps, if that is so.
    pub fn failure(&self) -> Option<String> {
        self.failure.get().cloned()
    }

    /// Resolves when it cannot go on, with the reason.
    fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = handle.as_ref().map(KeeperHandle::failed);
        let failure = self.failure.clone();
        async move {
            match failed {
                Some(failed) => {
                    let reason = failed.await;
                    failure.get_or_init(|| reason).clone()
                }
                None => std::future::pending().await,
            }
        }
    }

    /// Why it cannot do its work at present.
    pub fn unmet(&self) -> Vec<String> {
        let keeper = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(status) = keeper.as_ref().map(KeeperHandle::status) else {
            return vec!["the keeper is stopping".to_owned()];
        };
        match status.failure {
            Some(failure) => vec![failure],
            None if status.cluster_id.is_empty() => vec!["the keeper is of no cluster yet".to_owned()],
            None if !status.in_touch => {
                vec!["the keeper hears no leader, or as the leader no majority".to_owned()]
            }
            None => Vec::new(),
        }
    }

    fn take(&self) -> Option<KeeperHandle> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Running {
    /// Resolves when a part cannot go on, with the reason; never when all can.
    fn failure(&self) -> impl Future<Output = String> + Send + 'static {
        let keeper = self.keeper.as_ref().map(SharedKeeper::failed);
        let hub = self.hub.as_ref().map(HubHandle::failed);
        let operator = self.operator.as_ref().map(OperatorHandle::failed);
        async move {
            tokio::select! {
                reason = of(keeper) => format!("the keeper cannot go on: {reason}"),
                reason = of(hub) => format!("the hub cannot go on: {reason}"),
                reason = of(operator) => format!("the operator cannot go on: {reason}"),
            }
        }
    }

    /// Stops the parts in the order in which they depend on each other: devices first, the keeper last.
    async fn drain(self) -> anyhow::Result<()> {
        let within = self.drain_within;
        tracing::info!(within_seconds = within.as_secs(), "stopping");
        let Running { gateway, drains, hub, agent, keeper, operator, ops, commands, data_dir, .. } = self;
        let stop = async {
            if let Some(gateway) = gateway {
                // Those who are left, and the other parts, need some of the time too.
                let rest = if drains { (within / 4).min(DRAIN_REST) } else { within };
                if drains {
                    gateway.drain(within - rest).await;
                }
                gateway.stop(rest / 2).await;
            }
            if let Some(operator) = operator {
                operator.stop().await;
            }
            if let Some(hub) = hub {
                hub.stop().await;
            }
            if let Some(commands) = commands {
                commands.abort();
            }
            if let Some(agent) = agent {
                agent.stop().await;
            }
            if let Some(keeper) = keeper.and_then(|keeper| keeper.take()) {
                keeper.stop().await;
            }
            ops.stop().await;
        };
        let stopped = tokio::time::timeout(within, Box::pin(stop)).await;
        drop(data_dir);
        if stopped.is_err() {
            bail!(
                "not everything could be stopped within {} s; what was accepted is stored",
                within.as_secs()
            );
        }
        tracing::info!("stopped");
        Ok(())
    }
}

/// Listens; an error says which flag can change it.
pub async fn listen(address: SocketAddr, flag: &str, purpose: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| cannot_listen(address, flag, purpose, &error))
}

/// One sentence about an address that cannot be listened on.
pub fn cannot_listen(
    address: SocketAddr,
    flag: &str,
    purpose: &str,
    error: &std::io::Error,
) -> anyhow::Error {
    if error.kind() == std::io::ErrorKind::AddrInUse {
        anyhow::anyhow!(
            "the port of {address} ({purpose}) is in use by another process: stop that one, or choose another with \
             {flag} (port 0 takes a free one)"
        )
    } else {
        anyhow::anyhow!("cannot listen on {address} ({purpose}): {error}; choose another with {flag}")
    }
}

/// An address on this machine alone, at a port that the kernel chooses.
pub fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}
