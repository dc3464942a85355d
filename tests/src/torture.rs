//! A cluster of keepers under all that can go wrong around it, and clients that watch whether it ever contradicts itself.

pub mod checker;
pub mod clients;
pub mod history;
mod nemesis;
pub mod revisions;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::keepers::client::{Client, Failure};
use crate::keepers::fault::Faults;
use crate::keepers::net::Net;
use crate::keepers::{KeeperProcess, patiently};
use clients::Workload;
use history::Operation;

/// Keepers at most.
pub const NODES: usize = 5;
const CLIENTS: usize = 16;
/// After all faults are over, the cluster must work again within this.
const HEAL: Duration = Duration::from_secs(60);
/// A slow machine has so long to do what is asked of it after that.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a run is.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    /// How long clients and faults go on.
    pub lasts: Duration,
    /// Clients go on until they have done so many, [`PATIENCE`] at most.
    pub operations: usize,
    /// Entries between snapshots: few, so that they are made, sent and installed all the time.
    pub snapshot_every: u64,
}

impl Plan {
    pub fn new(seed: u64, lasts: Duration) -> Plan {
        Plan { seed, lasts, operations: 0, snapshot_every: 100 }
    }
}

/// What a run was.
#[derive(Debug)]
pub struct Report {
    pub operations: Vec<Operation>,
    pub done: usize,
    pub not_done: usize,
    pub unknown: usize,
    /// How often each fault was made.
    pub faults: BTreeMap<&'static str, usize>,
    pub term: u64,
    pub snapshot_index: u64,
    /// How long the cluster took to work again.
    pub healed_ms: u128,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} done, {} not done, {} not known; term {}, snapshot at {}, healed in {} ms; {:?}",
            self.done,
            self.not_done,
            self.unknown,
            self.term,
            self.snapshot_index,
            self.healed_ms,
            self.faults
        )
    }
}

impl Report {
    /// Both checkers.
    pub fn check(&self) -> Result<(), String> {
        revisions::check(&self.operations)?;
        checker::check(&self.operations).map_err(|fault| fault.to_string())
    }
}

/// The keepers and their network. The processes end before the network does.
pub struct Cluster {
    pub nodes: Vec<KeeperProcess>,
    pub clients: Vec<Client>,
    pub net: Net,
    _dir: tempfile::TempDir,
}

impl Cluster {
    /// Nothing runs yet.
    pub fn plan(count: usize, snapshot_every: u64) -> anyhow::Result<Cluster> {
        let net = Net::new(count)?;
        let dir = tempfile::tempdir()?;
        let addresses: Vec<SocketAddr> =
            (0..count).map(|host| SocketAddr::new(net.address(host).into(), 7400)).collect();
        let mut nodes = Vec::new();
        for (host, &address) in addresses.iter().enumerate() {
            let mut node = KeeperProcess::new(address, dir.path().join(host.to_string()));
            node.peers = addresses[..=host].iter().map(ToString::to_string).collect();
            node.space = Some(net.namespace(host));
            node.flags = vec!["--snapshot-every".to_owned(), snapshot_every.to_string()];
            node.faults = Faults::new(&node.dir);
            nodes.push(node);
        }
        let clients = nodes.iter().map(|node| Client::new(&node.endpoint())).collect();
        Ok(Cluster { nodes, clients, net, _dir: dir })
    }

    /// Starts the first so many and waits until all of them have a vote.
    pub async fn grow(&mut self, to: usize) -> Result<(), String> {
        for host in 0..to {
            if !self.nodes[host].runs() {
                self.nodes[host].start();
                self.settled(host + 1).await?;
            }
        }
        Ok(())
    }

    /// Waits until there are so many voters and nobody else.
    pub async fn settled(&self, voters: usize) -> Result<(), String> {
        let ask = async || {
            let mut error = Failure::NotDone("no keeper runs".to_owned());
            for (node, client) in self.nodes.iter().zip(&self.clients).filter(|(node, _)| node.runs()) {
                match client.members().await {
                    Ok(list) if list.leader_id == 0 => error = Failure::NotDone("nobody leads".to_owned()),
                    Ok(list) => {
                        let found = list.members.iter().filter(|member| member.voter).count();
                        if found == voters && list.members.len() == voters {
                            return Ok(());
                        }
                        let text = format!("{found} voters of {}", list.members.len());
                        error = Failure::NotDone(text);
                    }
                    Err(failed) => error = Failure::NotDone(format!("{}: {failed}", node.grpc)),
                }
            }
            Err(error)
        };
        patiently(&format!("{voters} voters"), HEAL, ask).await
    }

    /// The place of the node that leads, as the nodes say at present: the one of the highest term.
    pub async fn leader(&self) -> Option<usize> {
        let mut best = None;
        for (host, client) in self.clients.iter().enumerate().filter(|(host, _)| self.nodes[*host].runs()) {
            let asked = tokio::time::timeout(Duration::from_millis(400), client.status()).await;
            if let Ok(Ok(status)) = asked
                && status.leader_id == status.node_id
                && best.is_none_or(|(term, _)| status.term > term)
            {
                best = Some((status.term, host));
            }
        }
        best.map(|(_, host)| host)
    }

    /// Every way is open, everyone runs.
    fn heal(&mut self, members: usize) -> anyhow::Result<()> {
        self.net.heal()?;
        for node in &mut self.nodes[..members] {
            node.signal(libc::SIGCONT);
            if let Some(status) = node.has_ended() {
                anyhow::bail!("{} has ended by itself: {status}", node.grpc);
            }
            if !node.runs() {
                node.start();
            }
        }
        Ok(())
    }

    /// Something can be written through every node.
    async fn works(&self, members: usize) -> Result<(), String> {
        for host in 0..members {
            let (client, key) = (&self.clients[host], format!("healed/{host}"));
            patiently(&format!("a write through keeper {host}"), HEAL, async || client.put(&key, "1").await)
                .await?;
        }
        Ok(())
    }

    /// Now that nobody writes any more, all of them hold the same.
    async fn agrees(&self, members: usize) -> Result<(), String> {
        let ask = async || {
            let first = self.clients[0].list("").await.map_err(|error| error.to_string())?;
            for host in 1..members {
                if self.clients[host].list("").await.map_err(|error| error.to_string())? != first {
                    return Err(format!("keeper {host} holds another state than keeper 0"));
                }
            }
            Ok(())
        };
        patiently("all hold the same", Duration::from_secs(20), ask).await
    }
}

/// Runs clients and faults against a new cluster, and then waits until it works again.
pub async fn run(plan: &Plan) -> Result<Report, String> {
    let mut cluster = Cluster::plan(NODES, plan.snapshot_every).map_err(|error| format!("{error:#}"))?;
    cluster.grow(1).await?;
    let load = Arc::new(Workload::default());
    let nodes = Arc::new(Mutex::new(vec![cluster.clients[0].clone()]));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let seed = plan.seed.wrapping_mul(1000).wrapping_add(number as u64);
            tokio::spawn(clients::client(load.clone(), number, nodes.clone(), seed))
        })
        .collect();
    let mut nemesis = nemesis::Nemesis::new(plan.seed, nodes);
    let outcome = nemesis.run(&mut cluster, plan.lasts).await;
    let began = Instant::now();
    let mut healed = match outcome {
        Ok(()) => heal(&mut cluster, &nemesis).await,
        Err(error) => Err(error),
    };
    let healed_ms = began.elapsed().as_millis();
    let enough = Instant::now() + PATIENCE;
    while healed.is_ok() && load.done.load(Ordering::Relaxed) < plan.operations && Instant::now() < enough {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    load.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.map_err(|error| error.to_string())?;
    }
    if healed.is_ok() {
        healed = cluster.agrees(nemesis.members).await;
    }
    let context = |error: String| {
        let faults: Vec<_> = nemesis.told.iter().rev().take(12).rev().cloned().collect();
        format!("seed {}: {error}\nfaults: {}", plan.seed, faults.join("; "))
    };
    healed.map_err(|error| {
        keep_logs(&cluster, plan.seed);
        context(error)
    })?;
    if let Some(refused) = load.refused.lock().first() {
        return Err(context(format!("a keeper refused what is in order: {refused}")));
    }
    let status = cluster.clients[0].status().await.map_err(|error| error.to_string())?;
    let report = Report {
        operations: load.history.take(),
        done: load.done.load(Ordering::Relaxed),
        not_done: load.not_done.load(Ordering::Relaxed),
        unknown: load.unknown.load(Ordering::Relaxed),
        faults: nemesis.made.clone(),
        term: status.term,
        snapshot_index: status.snapshot_index,
        healed_ms,
    };
    report.check().map_err(|error| {
        keep_logs(&cluster, plan.seed);
        context(error)
    })?;
    Ok(report)
}

async fn heal(cluster: &mut Cluster, nemesis: &nemesis::Nemesis) -> Result<(), String> {
    cluster.heal(nemesis.members).map_err(|error| format!("{error:#}"))?;
    cluster.settled(nemesis.members).await?;
    cluster.works(nemesis.members).await
}

/// What a run that failed leaves to be read.
fn keep_logs(cluster: &Cluster, seed: u64) {
    let directory = std::env::temp_dir().join(format!("keeper-torture-{seed}"));
    if std::fs::create_dir_all(&directory).is_err() {
        return;
    }
    for (host, node) in cluster.nodes.iter().enumerate() {
        let _ = std::fs::write(directory.join(format!("{host}.log")), node.logs());
    }
    eprintln!("the keepers' logs are in {}", directory.display());
}
