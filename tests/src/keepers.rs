//! Keepers as real processes, each of which can be killed, frozen, started again, and made to see faults.

pub mod client;
pub mod fault;
pub mod net;

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use crate::server::{binary, carillon};
use client::Client;
use fault::Faults;

/// How a keeper is started; a process of it can come and go.
pub struct KeeperProcess {
    pub grpc: SocketAddr,
    pub dir: PathBuf,
    pub peers: Vec<String>,
    /// Network namespace.
    pub space: Option<String>,
    pub flags: Vec<String>,
    pub faults: Option<Faults>,
    /// Where its metrics and health are, once it was started; none in a network of its own.
    pub ops: Option<SocketAddr>,
    child: Option<Child>,
}

impl KeeperProcess {
    pub fn new(grpc: SocketAddr, dir: PathBuf) -> KeeperProcess {
        KeeperProcess {
            grpc,
            dir,
            peers: Vec::new(),
            space: None,
            flags: Vec::new(),
            faults: None,
            ops: None,
            child: None,
        }
    }

    /// Alone, at an address of this machine that nobody else uses.
    pub fn alone(dir: &Path) -> KeeperProcess {
        KeeperProcess::new(free_address(), dir.join("keeper"))
    }

    pub fn start(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let log = File::options().create(true).append(true).open(self.log_path()).expect("a log file");
        let mut command = match &self.space {
            None => carillon(&[]),
            // `ip netns exec` becomes the program: the process is the keeper's.
            Some(space) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", space]).arg(binary()).kill_on_drop(true);
                for (name, _) in std::env::vars_os() {
                    if name.to_string_lossy().starts_with("CARILLON_") {
                        command.env_remove(name);
                    }
                }
                command
            }
        };
        command.arg("keeper").arg("--data-dir").arg(&self.dir);
        let any = SocketAddr::new(self.grpc.ip(), 0);
        self.ops = self.space.is_none().then(|| self.ops.unwrap_or_else(|| free_port(any)));
        let (grpc, ops) = (self.grpc.to_string(), self.ops.unwrap_or(any).to_string());
        command.args(["--grpc", &grpc, "--ops", &ops, "--log-format", "text"]);
        let level = std::env::var("CARILLON_TEST_LOG").unwrap_or_else(|_| "info".to_owned());
        command.args(["--log-level", &level]);
        if !self.peers.is_empty() {
            command.args(["--peers", &self.peers.join(",")]);
        }
        command.args(&self.flags);
        if let Some(faults) = &self.faults {
            faults.apply(&mut command);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("carillon starts"));
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.grpc)
    }

    pub fn runs(&self) -> bool {
        self.child.is_some()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.with_extension("log")
    }

    /// What it has logged in all its lives.
    pub fn logs(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub fn signal(&self, signal: libc::c_int) {
        if let Some(pid) = self.child.as_ref().and_then(Child::id) {
            // SAFETY: kill has no memory effects; the child is not reaped yet, so the id is its own.
            unsafe { libc::kill(pid as libc::pid_t, signal) };
        }
    }

    /// SIGKILL; returns when it is gone.
    pub async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().await.expect("it ran");
        }
    }

    /// Waits for the end of a process that is about to end by itself.
    pub async fn ended(&mut self, within: Duration) -> Option<ExitStatus> {
        let child = self.child.as_mut()?;
        let status = tokio::time::timeout(within, child.wait()).await.ok()?.expect("can be waited for");
        self.child = None;
        Some(status)
    }

    /// Has it ended by itself?
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.as_mut()?.try_wait().expect("can be looked at")?;
        self.child = None;
        Some(status)
    }
}

/// Three keepers that have founded a cluster; faults can be made in them if there is a `cc`.
pub async fn three(dir: &Path) -> Vec<(KeeperProcess, Client)> {
    let addresses: Vec<_> = (0..3).map(|_| free_address()).collect();
    let mut keepers = Vec::new();
    for (i, &address) in addresses.iter().enumerate() {
        let mut keeper = KeeperProcess::new(address, dir.join(i.to_string()));
        keeper.peers = addresses.iter().map(ToString::to_string).collect();
        keeper.flags = vec!["--snapshot-every".to_owned(), "20".to_owned()];
        keeper.faults = Faults::new(&keeper.dir);
        keeper.start();
        let client = Client::new(&keeper.endpoint());
        keepers.push((keeper, client));
    }
    settled(&keepers).await;
    keepers
}

/// Waits until each of three says that all three have a vote.
pub async fn settled(keepers: &[(KeeperProcess, Client)]) {
    for (keeper, client) in keepers {
        let ask = async || match client.members().await {
            Ok(list) if list.members.len() == 3 && list.members.iter().all(|member| member.voter) => Ok(()),
            Ok(list) => Err(format!("{:?}", list.members)),
            Err(error) => Err(error.to_string()),
        };
        let what = format!("{} has three voters", keeper.grpc);
        patiently(&what, Duration::from_secs(60), ask).await.unwrap_or_else(|error| panic!("{error}"));
    }
}

/// The place of the one that leads.
pub async fn leader(keepers: &[(KeeperProcess, Client)]) -> usize {
    let ask = async || {
        for (place, (_, client)) in keepers.iter().enumerate() {
            if let Ok(status) = client.status().await
                && status.leader_id == status.node_id
                && status.in_touch
            {
                return Ok(place);
            }
        }
        Err("nobody leads")
    };
    patiently("a leader", Duration::from_secs(60), ask).await.unwrap_or_else(|error| panic!("{error}"))
}

/// An address that is free, and stays so: nothing else on this machine takes ports of this address.
pub fn free_address() -> SocketAddr {
    use std::sync::atomic::{AtomicU8, Ordering};
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let pid = std::process::id();
    let ip = std::net::Ipv4Addr::new(
        127,
        192 + (pid % 32) as u8,
        (pid / 32 % 256) as u8,
        NEXT.fetch_add(1, Ordering::Relaxed),
    );
    free_port((ip, 0).into())
}

fn free_port(any: SocketAddr) -> SocketAddr {
    let listener = std::net::TcpListener::bind(any).expect("an address");
    listener.local_addr().expect("an address")
}

/// Shows the last of the logs when a test fails.
impl Drop for KeeperProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.logs();
            let lines: Vec<&str> = logs.lines().collect();
            let last = &lines[lines.len().saturating_sub(40)..];
            eprintln!("--- the last that {} logged ---\n{}\n---", self.grpc, last.join("\n"));
        }
    }
}

/// Asks again and again until it is so, or patience is out.
pub async fn patiently<T, E: std::fmt::Display>(
    what: &str,
    patience: Duration,
    mut ask: impl AsyncFnMut() -> Result<T, E>,
) -> Result<T, String> {
    let begun = Instant::now();
    loop {
        match ask().await {
            Ok(value) => return Ok(value),
            Err(error) if begun.elapsed() > patience => {
                return Err(format!("{what}: not within {patience:?}: {error}"));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}
