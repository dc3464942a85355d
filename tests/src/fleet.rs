//! A cluster of processes of one role each, with the swarms that load it: keeper, hub, any number of gateways.
//!
//! Everything has fixed ports on addresses below 127.{net}.0.0, where `net` comes from this process's id, so that runs do
//! not meet. Every process is killed when its [`Member`] is dropped, and by the kernel if this process is killed.

use std::fs::File;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::time::Instant;

pub mod fit;
pub mod machine;
pub mod snapshot;
pub mod swarms;

/// How long a process may take until it is ready; many start at once.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// How long a process may take to be gone once it is killed: it has thousands of sockets to close.
const END_WITHIN: Duration = Duration::from_secs(20);
/// Gateways that start at the same time.
const STARTING: usize = 4;
const MQTT_PORT: u16 = 18_830;
const WEBSOCKET_PORT: u16 = 18_831;
const OPS_PORT: u16 = 18_832;
const GRPC_PORT: u16 = 18_833;
const HTTP_PORT: u16 = 18_834;
/// The app that devices and pushes are in.
const APP: &str = "demo";

/// Limits that are there for many machines' sake, and that a single one in the role of a million devices runs into. They
/// are lifted where the gateway has them, and the report says so.
const LIFTED: [(&str, &str); 4] = [
    ("max_connections_per_ip", "0"),
    ("connect_rate_per_second", "0"),
    ("overload.loop_lag_ms", "0"),
    ("overload.memory_high_ratio", "0.99"),
];

/// A process of ours.
pub struct Member {
    pub name: String,
    child: Child,
    pid: u32,
    log: PathBuf,
}

impl Member {
    /// Starts it: in a process group of its own, so that Ctrl-C is for us alone, with its stderr in a file.
    pub fn start(name: &str, mut command: Command, log: PathBuf) -> anyhow::Result<Member> {
        let stderr = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let parent = std::process::id();
        command.stderr(stderr).kill_on_drop(true).process_group(0);
        // SAFETY: between fork and exec only two system calls are made, which allocate nothing.
        unsafe {
            command.pre_exec(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // The parent may have ended before that was in force.
                if libc::getppid() as u32 == parent {
                    Ok(())
                } else {
                    Err(std::io::ErrorKind::BrokenPipe.into())
                }
            });
        }
        let child = command.spawn().with_context(|| format!("{name} does not start ({command:?})"))?;
        let pid = child.id().context("it has just started")?;
        Ok(Member { name: name.to_owned(), child, pid, log })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Fails, with what it logged last, if the process has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} has ended: {status}\n{}", self.name, self.last_logged());
        }
        Ok(())
    }

    /// The last lines of its log.
    pub fn last_logged(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    /// Kills it; its end is waited for when it is dropped.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.start_kill();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
        let began = std::time::Instant::now();
        while began.elapsed() < END_WITHIN && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What is started.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The program `carillon`.
    pub carillon: PathBuf,
    pub gateways: u32,
    /// Threads that hold connections, of each gateway.
    pub shards: u32,
    /// Lifts the limits that one machine in the role of very many devices runs into.
    pub lift_limits: bool,
    /// `field=value` of the `gateway` document.
    pub gateway_fields: Vec<String>,
}

pub struct Fleet {
    pub keeper: Member,
    pub hub: Member,
    pub gateways: Vec<Member>,
    /// What was changed in the `gateway` document.
    pub changed: Vec<String>,
    plan: Plan,
    net: u8,
    api_key: String,
    http: reqwest::Client,
    dir: tempfile::TempDir,
}

impl Fleet {
    /// Starts keeper, hub and gateways, and waits until all of them are ready.
    pub async fn start(plan: &Plan) -> anyhow::Result<Fleet> {
        if !plan.carillon.is_file() {
            bail!("{} is not there: build it, or say where it is with --carillon", plan.carillon.display());
        }
        let net = 16 + (std::process::id() % 200) as u8;
        let dir = tempfile::tempdir().context("cannot make a temporary directory")?;
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(60)).build()?;
        let keeper_url = keeper_url(net);

        let mut command = role(plan, "keeper", &dir.path().join("keeper"), keeper_ip(net));
        command.arg("--grpc").arg(SocketAddrV4::new(keeper_ip(net), GRPC_PORT).to_string());
        let mut keeper = Member::start("keeper", command, dir.path().join("keeper.log"))?;
        ready(&http, &mut keeper, keeper_ip(net)).await?;

        let api_key = secret()?;
        let changed = configure(plan, &keeper_url, &api_key).await?;

        let mut command = role(plan, "hub", &dir.path().join("hub"), hub_ip(net));
        command.args(["--keeper", &keeper_url]);
        command.arg("--grpc").arg(SocketAddrV4::new(hub_ip(net), GRPC_PORT).to_string());
        command.arg("--http").arg(SocketAddrV4::new(hub_ip(net), HTTP_PORT).to_string());
        let mut hub = Member::start("hub", command, dir.path().join("hub.log"))?;
        ready(&http, &mut hub, hub_ip(net)).await?;

        let plan = plan.clone();
        let mut fleet = Fleet { keeper, hub, gateways: Vec::new(), changed, plan, net, api_key, http, dir };
        let indices: Vec<u32> = (0..fleet.plan.gateways).collect();
        for indices in indices.chunks(STARTING) {
            for &index in indices {
                let ip = gateway_ip(net, index);
                let name = format!("gateway-{index}");
                let mut command = role(&fleet.plan, "gateway", &fleet.dir().join(&name), ip);
                command.args(["--keeper", &keeper_url, "--shards", &fleet.plan.shards.to_string()]);
                command.arg("--mqtt").arg(SocketAddrV4::new(ip, MQTT_PORT).to_string());
                command.arg("--ws").arg(SocketAddrV4::new(ip, WEBSOCKET_PORT).to_string());
                let log = fleet.dir().join(format!("{name}.log"));
                fleet.gateways.push(Member::start(&name, command, log)?);
            }
            for &index in indices {
                ready(&fleet.http, &mut fleet.gateways[index as usize], gateway_ip(net, index)).await?;
            }
        }
        Ok(fleet)
    }

    /// Changes the `gateway` document: `field=value`. The gateways follow within a second or two.
    pub async fn set_gateway(&self, fields: &[String]) -> anyhow::Result<()> {
        let arguments: Vec<&str> =
            ["set", "gateway"].into_iter().chain(fields.iter().map(String::as_str)).collect();
        config(&self.plan, &keeper_url(self.net), &arguments, "").await.map(drop)
    }

    /// Where the devices of a gateway connect to.
    pub fn mqtt(&self, gateway: u32) -> SocketAddrV4 {
        SocketAddrV4::new(gateway_ip(self.net, gateway), MQTT_PORT)
    }

    /// The first address that the devices of a gateway come from; a few more follow it.
    pub fn source(&self, gateway: u32) -> Ipv4Addr {
        let [high, low] = (gateway as u16 * 8 + 1).to_be_bytes();
        Ipv4Addr::new(127, self.net, 128 + high, low)
    }

    /// A directory that goes when the fleet does.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Fails if one of them has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.keeper.check()?;
        self.hub.check()?;
        self.gateways.iter_mut().try_for_each(Member::check)
    }

    /// What the processes have logged (warnings and errors), the last lines of each that has logged anything.
    pub fn logged(&self) -> Vec<String> {
        [&self.keeper, &self.hub]
            .into_iter()
            .chain(&self.gateways)
            .map(|member| (member, member.last_logged()))
            .filter(|(_, lines)| !lines.is_empty())
            .map(|(member, lines)| format!("{} logged last:\n{lines}", member.name))
            .collect()
    }

    /// A POST to the API below the app that must be accepted.
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let request = self.http.post(self.api(path)).bearer_auth(&self.api_key).json(body);
        answer(request).await.with_context(|| format!("POST {path}"))
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        answer(self.http.get(self.api(path)).bearer_auth(&self.api_key))
            .await
            .with_context(|| format!("GET {path}"))
    }

    fn api(&self, path: &str) -> String {
        format!("http://{}/v1/apps/{APP}/{path}", SocketAddrV4::new(hub_ip(self.net), HTTP_PORT))
    }

    /// A number among a gateway's metrics; all with the same name are added up.
    pub async fn gateway_metric(&self, gateway: u32, name: &str) -> anyhow::Result<f64> {
        let url = format!("http://{}/metrics", SocketAddrV4::new(gateway_ip(self.net, gateway), OPS_PORT));
        let text = self.http.get(&url).send().await?.error_for_status()?.text().await?;
        let values: Vec<f64> = text
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))
            .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
            .collect();
        if values.is_empty() {
            bail!("the gateway has no metric {name}");
        }
        Ok(values.iter().sum())
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // All at once; they are waited for one by one.
        self.gateways.iter_mut().chain([&mut self.hub, &mut self.keeper]).for_each(Member::kill);
    }
}

fn keeper_url(net: u8) -> String {
    format!("http://{}", SocketAddrV4::new(keeper_ip(net), GRPC_PORT))
}

fn keeper_ip(net: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, net, 0, 1)
}

fn hub_ip(net: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, net, 0, 2)
}

fn gateway_ip(net: u8, index: u32) -> Ipv4Addr {
    let [high, low] = (index as u16 + 1).to_be_bytes();
    Ipv4Addr::new(127, net, 1 + high, low)
}

/// `carillon {role}`, with nothing of this shell's environment that it would read.
fn role(plan: &Plan, role: &str, dir: &Path, ip: Ipv4Addr) -> Command {
    let mut command = bare(&plan.carillon);
    command.arg(role).arg("--data-dir").arg(dir).args(["--log-level", "warn", "--log-format", "text"]);
    command.arg("--ops").arg(SocketAddrV4::new(ip, OPS_PORT).to_string()).stdout(Stdio::null());
    command
}

fn bare(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARILLON_") {
            command.env_remove(name);
        }
    }
    command
}

async fn ready(http: &reqwest::Client, member: &mut Member, ip: Ipv4Addr) -> anyhow::Result<()> {
    let url = format!("http://{}/readyz", SocketAddrV4::new(ip, OPS_PORT));
    let began = Instant::now();
    loop {
        member.check()?;
        let said = match http.get(&url).send().await {
            Ok(response) if response.status().is_success() => return Ok(()),
            Ok(response) => response.text().await.unwrap_or_default(),
            Err(error) => error.to_string(),
        };
        if began.elapsed() > READY_WITHIN {
            let log = member.last_logged();
            bail!("{} is not ready within {READY_WITHIN:?}: {}\n{log}", member.name, said.trim());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The app, open to devices without a token, and no pace for broadcasts; and the gateways' limits. Gives what was changed
/// of those.
async fn configure(plan: &Plan, keeper: &str, api_key: &str) -> anyhow::Result<Vec<String>> {
    let app = json!({
        "root": true,
        "anonymous_devices": true,
        "api_keys": [{ "name": "load", "key": api_key }],
        "limits": { "broadcast_rate_per_second": 0.0 },
    });
    config(plan, keeper, &["set", &format!("app/{APP}"), "--file", "-"], &app.to_string()).await?;
    let known = config(plan, keeper, &["get", "gateway"], "").await?;
    let lifted: &[(&str, &str)] = if plan.lift_limits { &LIFTED } else { &[] };
    let fields: Vec<String> = lifted
        .iter()
        // Documents are YAML: a field is a line.
        .filter(|(path, _)| {
            let field = path.rsplit('.').next().unwrap_or(path);
            known.lines().any(|line| line.trim_start().starts_with(&format!("{field}:")))
        })
        .map(|(path, value)| format!("{path}={value}"))
        .chain(plan.gateway_fields.iter().cloned())
        .collect();
    if !fields.is_empty() {
        let mut arguments = vec!["set", "gateway"];
        arguments.extend(fields.iter().map(String::as_str));
        config(plan, keeper, &arguments, "").await?;
    }
    Ok(fields)
}

/// `carillon config …`, which must succeed; gives what it prints.
async fn config(plan: &Plan, keeper: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    use tokio::io::AsyncWriteExt;
    let mut command = bare(&plan.carillon);
    command.arg("config").args(arguments).args(["--keeper", keeper]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().context("carillon config does not start")?;
    let mut stdin = child.stdin.take().context("its stdin is piped")?;
    stdin.write_all(input.as_bytes()).await?;
    drop(stdin);
    let output = tokio::time::timeout(READY_WITHIN, child.wait_with_output())
        .await
        .context("carillon config does not end")??;
    if !output.status.success() {
        bail!("carillon config {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn answer(request: reqwest::RequestBuilder) -> anyhow::Result<Value> {
    let response = request.send().await?;
    let status = response.status();
    let text = response.text().await?;
    if !status.is_success() {
        bail!("{status}: {text}");
    }
    Ok(serde_json::from_str(&text)?)
}

/// A key nobody can guess.
fn secret() -> anyhow::Result<String> {
    use std::io::Read;
    let mut bytes = [0; 16];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).context("no randomness")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Runs a program that drives a fleet, until it is done or told to end by SIGINT or SIGTERM; what it has started has ended
/// by then.
pub fn drive(run: impl Future<Output = anyhow::Result<()>>) -> ExitCode {
    let result = (|| {
        // One thread: what it starts shall end with it, and the kernel sees to that by thread.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            tokio::select! {
                result = run => result,
                signal = interrupted() => bail!("ended by {}", signal?),
            }
        })
    })();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// A line for people, beside what is measured.
pub fn say(line: &str) {
    // A closed stderr is no reason to stop.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// SIGINT or SIGTERM; gives its name.
async fn interrupted() -> anyhow::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => Ok("SIGINT"),
        _ = terminate.recv() => Ok("SIGTERM"),
    }
}
