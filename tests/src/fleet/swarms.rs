//! Swarms as processes: started, listened to, asked, and added up.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStdin, Command};
use tokio::sync::mpsc;

use super::Member;
use crate::swarm::status::{REPORT, Report, Status};

/// How long a swarm may take to answer: it does nothing else that blocks, but the CPUs are busy.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// What a swarm is started with; the rest has the defaults of `swarm --help`.
#[derive(Debug, Clone)]
pub struct Order {
    pub gateway: SocketAddrV4,
    pub source: Ipv4Addr,
    pub count: u32,
    pub first: u64,
    /// Further arguments.
    pub arguments: Vec<String>,
}

pub struct Swarm {
    pub member: Member,
    pub count: u32,
    stdin: ChildStdin,
    latest: Arc<Mutex<Status>>,
    reports: mpsc::Receiver<Report>,
}

impl Swarm {
    /// Starts the program `swarm`, which lies beside this one.
    pub fn start(name: &str, order: &Order, dir: &Path) -> anyhow::Result<Swarm> {
        let program = std::env::current_exe()?.with_file_name("swarm");
        let mut command = Command::new(&program);
        command.arg("--gateway").arg(order.gateway.to_string());
        command.arg("--source").arg(order.source.to_string());
        command.arg("--count").arg(order.count.to_string());
        command.arg("--first").arg(order.first.to_string());
        command.args(&order.arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut member = Member::start(name, command, dir.join(format!("{name}.log")))?;
        let stdin = member.child.stdin.take().context("its stdin is piped")?;
        let stdout = member.child.stdout.take().context("its stdout is piped")?;
        let latest = Arc::new(Mutex::new(Status::default()));
        let (sender, reports) = mpsc::channel(1);
        let shared = latest.clone();
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let Ok(mut status) = serde_json::from_str::<Status>(&line) else { return };
                let report = status.report.take();
                *shared.lock().unwrap_or_else(PoisonError::into_inner) = status;
                // After the status, so that who waits for the report finds both.
                if let Some(report) = report
                    && sender.send(*report).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Swarm { member, count: order.count, stdin, latest, reports })
    }

    /// What it said last; at most a second old.
    pub fn status(&self) -> Status {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells it something of [`crate::swarm::status`].
    pub async fn tell(&mut self, command: &str) -> anyhow::Result<()> {
        self.member.check()?;
        let line = format!("{command}\n");
        self.stdin
            .write_all(line.as_bytes())
            .await
            .with_context(|| format!("{} does not listen", self.member.name))
    }

    pub async fn report(&mut self) -> anyhow::Result<Report> {
        self.tell(REPORT).await?;
        match tokio::time::timeout(ANSWER_WITHIN, self.reports.recv()).await {
            Ok(Some(report)) => Ok(report),
            Ok(None) => {
                self.member.check()?;
                bail!("{} has ended", self.member.name)
            }
            Err(_) => bail!("{} does not answer within {ANSWER_WITHIN:?}", self.member.name),
        }
    }
}

/// All of them together.
#[derive(Default)]
pub struct Swarms(pub Vec<Swarm>);

impl Swarms {
    pub fn pids(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(|swarm| swarm.member.pid())
    }

    pub fn ready(&self) -> u64 {
        self.0.iter().map(|swarm| u64::from(swarm.status().ready)).sum()
    }

    pub async fn tell(&mut self, command: &str) -> anyhow::Result<()> {
        for swarm in &mut self.0 {
            swarm.tell(command).await?;
        }
        Ok(())
    }

    pub async fn report(&mut self) -> anyhow::Result<Report> {
        let mut all = Report::default();
        for swarm in &mut self.0 {
            let report = swarm.report().await?;
            all.present += report.present;
            all.connect.add(&report.connect);
            all.back.add(&report.back);
            all.broadcast.add(&report.broadcast);
            all.unicast.add(&report.unicast);
        }
        Ok(all)
    }

    /// Connections that did not become ready, and those that were lost later, by reason.
    pub fn troubles(&self) -> (BTreeMap<String, u64>, BTreeMap<String, u64>) {
        let (mut failed, mut lost) = (BTreeMap::new(), BTreeMap::new());
        for swarm in &self.0 {
            let status = swarm.status();
            for (all, some) in [(&mut failed, status.failed), (&mut lost, status.lost)] {
                for (reason, count) in some {
                    *all.entry(reason).or_default() += count;
                }
            }
        }
        (failed, lost)
    }

    pub fn check(&mut self) -> anyhow::Result<()> {
        self.0.iter_mut().try_for_each(|swarm| swarm.member.check())
    }
}

impl Drop for Swarms {
    fn drop(&mut self) {
        // All at once; they are waited for one by one.
        self.0.iter_mut().for_each(|swarm| swarm.member.kill());
    }
}
