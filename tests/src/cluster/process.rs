//! One process of a cluster: started, watched, ended, and started again on its own data.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::process::Child;

use crate::eventually;
use crate::server::carillon;

/// Dropping it kills it.
pub struct Process {
    arguments: Vec<String>,
    /// Its data directory.
    dir: PathBuf,
    ops: SocketAddr,
    client: reqwest::Client,
    child: Child,
}

impl Process {
    /// Runs a role, with its data in `dir/name` and its log beside that.
    pub fn start(
        dir: &Path,
        name: &str,
        role: &[&str],
        ops: SocketAddr,
        client: &reqwest::Client,
    ) -> Process {
        let dir = dir.join(name);
        let level = std::env::var("CARILLON_TEST_LOG").unwrap_or_else(|_| "info".to_owned());
        let data = dir.to_str().expect("a path of UTF-8");
        let (ops_text, log) = (ops.to_string(), ["--log-format", "text", "--log-level", &level]);
        let all = [role, &["--data-dir", data, "--ops", &ops_text], &log].concat();
        let child = launch(&all, &log_path(&dir));
        Process {
            arguments: all.into_iter().map(str::to_owned).collect(),
            dir,
            ops,
            client: client.clone(),
            child,
        }
    }

    /// The same process again, after its end: the same data, the same addresses.
    pub(super) fn again(&mut self) {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        self.child = launch(&arguments, &log_path(&self.dir));
    }

    /// Returns when it is ready.
    pub async fn ready(&self) {
        eventually(&format!("{} is ready", self.arguments[0]), || self.is_ready()).await;
    }

    /// Is it, as its orchestrator sees it? If not: what it says.
    pub(super) async fn is_ready(&self) -> Result<(), String> {
        let answer = self.client.get(format!("http://{}/readyz", self.ops)).send().await;
        let answer = answer.map_err(|error| error.to_string())?;
        if answer.status().is_success() { Ok(()) } else { Err(answer.text().await.unwrap_or_default()) }
    }

    /// A metric, summed over its labels; 0 if it is not there.
    pub(super) async fn metric(&self, name: &str) -> f64 {
        let answer = self.client.get(format!("http://{}/metrics", self.ops)).send().await.expect("an answer");
        let text = answer.text().await.expect("a body");
        let value = |line: &str| line.rsplit(' ').next()?.parse::<f64>().ok();
        let of = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
        text.lines().filter(of).filter_map(value).sum()
    }

    /// The instance id that it has given itself.
    pub fn instance(&self) -> String {
        let marker = std::fs::read_to_string(self.dir.join("carillon.json")).expect("its data directory");
        let marker: Value = serde_json::from_str(&marker).expect("JSON");
        marker["instance"].as_str().expect("an id").to_owned()
    }

    /// SIGKILL: it has no chance to do anything. Returns when it is gone.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("it ran");
    }

    pub fn signal(&self, signal: libc::c_int) {
        let pid = self.child.id().expect("it runs") as libc::pid_t;
        // SAFETY: kill has no memory effects; the child is not reaped yet, so the id is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits for the end of a process that was told to end.
    pub async fn gone(&mut self) -> ExitStatus {
        tokio::time::timeout(Duration::from_secs(60), self.child.wait())
            .await
            .expect("ends in time")
            .expect("can be waited for")
    }

    /// Its data directory.
    pub fn data(&self) -> &Path {
        &self.dir
    }

    /// What it has logged in all its lives.
    pub fn logs(&self) -> String {
        std::fs::read_to_string(log_path(&self.dir)).unwrap_or_default()
    }

    /// For a test that fails.
    pub fn show_last_logs(&self) {
        let logs = self.logs();
        let lines: Vec<&str> = logs.lines().collect();
        let last = lines[lines.len().saturating_sub(40)..].join("\n");
        eprintln!("--- the last of {} ---\n{last}\n---", self.dir.display());
    }
}

fn log_path(dir: &Path) -> PathBuf {
    dir.with_extension("log")
}

fn launch(arguments: &[&str], log: &Path) -> Child {
    let log = File::options().create(true).append(true).open(log).expect("a log");
    carillon(arguments).stdout(Stdio::null()).stderr(log).spawn().expect("the binary can be run")
}

/// Addresses that nobody listens on. All sockets are open at the same time, so that they differ.
pub fn addresses<const N: usize>(ip: Ipv4Addr) -> [SocketAddr; N] {
    let sockets: [TcpListener; N] =
        std::array::from_fn(|_| TcpListener::bind((ip, 0)).expect("a port of the loopback network"));
    sockets.map(|socket| socket.local_addr().expect("its address"))
}
