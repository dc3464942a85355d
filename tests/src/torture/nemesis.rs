//! What goes wrong, in an order that a seed decides.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::Cluster;
use crate::keepers::client::Client;

/// Kinds of fault, chosen with equal chance.
const FAULTS: [&str; 14] = [
    "leader alone",
    "leader alone",
    "halves",
    "leader mute",
    "leader deaf",
    "one way",
    "bridge",
    "leader frozen",
    "leader killed",
    "follower killed",
    "all killed",
    "lead moved",
    "clock jump",
    "disk lost",
];

pub(super) struct Nemesis {
    random: StdRng,
    /// So many of the first nodes belong to the cluster.
    pub members: usize,
    pub made: BTreeMap<&'static str, usize>,
    /// What was done, for whoever reads of a failure.
    pub told: Vec<String>,
    /// Those that the clients ask.
    clients: Arc<Mutex<Vec<Client>>>,
    begun: Instant,
}

impl Nemesis {
    pub(super) fn new(seed: u64, clients: Arc<Mutex<Vec<Client>>>) -> Nemesis {
        Nemesis {
            random: StdRng::seed_from_u64(seed),
            members: 1,
            made: BTreeMap::new(),
            told: Vec::new(),
            clients,
            begun: Instant::now(),
        }
    }

    /// One member becomes three, then five, then three again; in between everything else.
    pub(super) async fn run(&mut self, cluster: &mut Cluster, lasts: Duration) -> Result<(), String> {
        let begun = Instant::now();
        self.resize(cluster, 3).await?;
        self.faults(cluster, begun + lasts.mul_f64(0.4)).await?;
        self.resize(cluster, 5).await?;
        self.faults(cluster, begun + lasts.mul_f64(0.7)).await?;
        self.resize(cluster, 3).await?;
        self.faults(cluster, begun + lasts).await
    }

    fn tell(&mut self, text: String) {
        let text = format!("{:.1} s {text}", self.begun.elapsed().as_secs_f64());
        if std::env::var_os("CARILLON_TORTURE_TELL").is_some() {
            eprintln!("{text}");
        }
        self.told.push(text);
    }

    async fn pause(&mut self, from_ms: u64, to_ms: u64) {
        tokio::time::sleep(Duration::from_millis(self.random.random_range(from_ms..to_ms))).await;
    }

    /// Grows by the next nodes, or takes out the last ones, one after the other, under load.
    async fn resize(&mut self, cluster: &mut Cluster, to: usize) -> Result<(), String> {
        *self.made.entry("members").or_default() += 1;
        self.tell(format!("members {} to {to}", self.members));
        if to > self.members {
            cluster.grow(to).await?;
            self.members = to;
            *self.clients.lock() = cluster.clients[..to].to_vec();
            return Ok(());
        }
        cluster.settled(self.members).await?;
        *self.clients.lock() = cluster.clients[..to].to_vec();
        while self.members > to {
            let last = self.members - 1;
            let remove = async || -> Result<(), String> {
                // Until it is out: an answer may have been lost, and the lead may be moving.
                let address = cluster.nodes[last].grpc.to_string();
                let list = cluster.clients[0].members().await.map_err(|error| error.to_string())?;
                let Some(member) = list.members.iter().find(|member| member.address == address) else {
                    return Ok(());
                };
                let id = member.node_id;
                cluster.clients[0].remove_member(id).await.map_err(|error| error.to_string())?;
                Err("it is looked at again".to_owned())
            };
            crate::keepers::patiently(&format!("keeper {last} is taken out"), super::HEAL, remove).await?;
            cluster.nodes[last].kill().await;
            self.members = last;
        }
        cluster.settled(to).await
    }

    async fn faults(&mut self, cluster: &mut Cluster, until: Instant) -> Result<(), String> {
        while Instant::now() < until {
            let fault = FAULTS[self.random.random_range(0..FAULTS.len())];
            *self.made.entry(fault).or_default() += 1;
            self.fault(cluster, fault).await.map_err(|error| format!("{fault}: {error:#}"))?;
            cluster.heal(self.members).map_err(|error| format!("after {fault}: {error:#}"))?;
            self.tell("healed".to_owned());
            self.pause(300, 2_500).await;
        }
        Ok(())
    }

    fn anyone(&mut self) -> usize {
        self.random.random_range(0..self.members)
    }

    fn others(&self, one: usize) -> impl Iterator<Item = usize> + use<> {
        (0..self.members).filter(move |&host| host != one)
    }

    async fn fault(&mut self, cluster: &mut Cluster, fault: &str) -> anyhow::Result<()> {
        let leader = match cluster.leader().await {
            Some(leader) if leader < self.members => leader,
            _ => self.anyone(),
        };
        self.tell(format!("{fault}, leader {leader}"));
        let net = &cluster.net;
        match fault {
            "leader alone" => {
                for other in self.others(leader) {
                    net.cut(leader, other)?;
                    net.cut(other, leader)?;
                }
                self.pause(1_500, 5_000).await;
            }
            "halves" => {
                let side: Vec<bool> = (0..self.members).map(|_| self.random.random()).collect();
                for from in 0..self.members {
                    for to in (0..self.members).filter(|&to| side[to] != side[from]) {
                        net.cut(from, to)?;
                    }
                }
                self.pause(1_500, 5_000).await;
            }
            "leader mute" => {
                for other in self.others(leader) {
                    net.cut(leader, other)?;
                }
                self.pause(1_500, 5_000).await;
            }
            "leader deaf" => {
                for other in self.others(leader) {
                    net.cut(other, leader)?;
                }
                self.pause(1_500, 5_000).await;
            }
            "one way" => {
                for _ in 0..self.members {
                    let (from, to) = (self.anyone(), self.anyone());
                    if from != to {
                        net.cut(from, to)?;
                    }
                }
                self.pause(1_500, 5_000).await;
            }
            // Two that only a third one reaches both of.
            "bridge" => {
                let (one, other) = (leader, (leader + 1) % self.members);
                net.cut(one, other)?;
                net.cut(other, one)?;
                self.pause(1_500, 5_000).await;
            }
            "leader frozen" => {
                cluster.nodes[leader].signal(libc::SIGSTOP);
                self.pause(1_000, 6_000).await;
            }
            "leader killed" => {
                cluster.nodes[leader].kill().await;
                self.pause(0, 3_000).await;
            }
            "follower killed" => {
                let follower = (leader + 1) % self.members;
                cluster.nodes[follower].kill().await;
                // Long enough that it needs a snapshot.
                self.pause(0, 4_000).await;
            }
            "all killed" => {
                for host in 0..self.members {
                    cluster.nodes[host].kill().await;
                }
                self.pause(0, 500).await;
            }
            "lead moved" => {
                let through = self.anyone();
                // It may fail: nobody may be fit.
                let moved = cluster.clients[through].transfer().await;
                self.tell(format!("moved: {moved:?}"));
            }
            "clock jump" => {
                for host in 0..self.members {
                    let seconds = self.random.random_range(-100_000..100_000);
                    if let Some(faults) = &cluster.nodes[host].faults {
                        faults.set_clock_offset(seconds);
                    }
                }
                self.pause(300, 1_000).await;
            }
            "disk lost" => {
                let follower = (leader + 1) % self.members;
                cluster.nodes[follower].kill().await;
                std::fs::remove_dir_all(&cluster.nodes[follower].dir)?;
                // Told of itself alone, as the first node was at its beginning, it would found a cluster of its own.
                let members =
                    cluster.nodes[..self.members].iter().map(|node| node.grpc.to_string()).collect();
                cluster.nodes[follower].peers = members;
                cluster.nodes[follower].start();
                // It is replaced only while a majority is there: nothing else happens until it is.
                cluster.settled(self.members).await.map_err(anyhow::Error::msg)?;
            }
            other => anyhow::bail!("no such fault: {other}"),
        }
        Ok(())
    }
}
