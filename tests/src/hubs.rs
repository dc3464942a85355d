//! A cluster of processes in which hubs come and go: a keeper, a hub, further registries and gateways, each of its own,
//! on ports from the kernel.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};

use serde_json::json;
use tokio::process::Child;

use crate::{carillon, eventually, within};

const API_KEY: &str = "a-key-of-the-demo-app";

/// A keeper, a hub with all its roles, and gateways. App `demo` is the root app and takes anonymous devices, which may
/// publish and subscribe to everything. Dropping it kills them all.
pub struct Cluster {
    dir: tempfile::TempDir,
    ip: Ipv4Addr,
    keeper: Process,
    hub: Process,
    /// HTTP of the hub.
    api: SocketAddr,
    gateways: Vec<Gateway>,
    /// Further registries.
    registries: Vec<Process>,
    http: reqwest::Client,
}

struct Gateway {
    process: Process,
    mqtt: SocketAddr,
}

struct Process {
    arguments: Vec<String>,
    log: std::path::PathBuf,
    ops: SocketAddr,
    child: Child,
}

impl Process {
    fn start(dir: &Path, name: &str, arguments: &[&str], ops: SocketAddr) -> Process {
        let data = dir.join(name);
        let level = std::env::var("CARILLON_TEST_LOG").unwrap_or_else(|_| "info".to_owned());
        let mut all: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        let data = data.to_str().expect("a path of UTF-8").to_owned();
        all.extend(["--data-dir".to_owned(), data, "--ops".to_owned(), ops.to_string()]);
        all.extend(["--log-format", "text", "--log-level", &level].map(str::to_owned));
        let log = dir.join(format!("{name}.log"));
        let child = launch(&all, &log);
        Process { arguments: all, log, ops, child }
    }

    async fn kill(&mut self) {
        self.child.kill().await.expect("it ran");
    }

    /// The same process again, after its end.
    fn again(&mut self) {
        self.child = launch(&self.arguments, &self.log);
    }

    async fn ready(&self) {
        eventually(&format!("{} is ready", self.arguments[0]), || async {
            let url = format!("http://{}/readyz", self.ops);
            let answer = reqwest::get(url).await.map_err(|error| error.to_string())?;
            let ready = answer.status().is_success();
            let text = answer.text().await.map_err(|error| error.to_string())?;
            if ready { Ok(()) } else { Err(text) }
        })
        .await;
    }
}

fn launch(arguments: &[String], log: &Path) -> Child {
    let log = File::options().create(true).append(true).open(log).expect("a log");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    carillon(&arguments).stderr(log).spawn().expect("it starts")
}

/// A loopback address of its own: no client's own port is ever in the way there.
fn own_ip() -> Ipv4Addr {
    static CLUSTERS: AtomicU8 = AtomicU8::new(1);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 1 + high % 200, low, CLUSTERS.fetch_add(1, Ordering::Relaxed).clamp(1, 254))
}

/// Ports that the kernel has just given and taken back: nobody else gets them so soon.
fn addresses<const N: usize>(ip: Ipv4Addr) -> [SocketAddr; N] {
    let sockets = [(); N].map(|()| TcpListener::bind((ip, 0)).expect("a port"));
    sockets.map(|socket| socket.local_addr().expect("its address"))
}

impl Cluster {
    /// With so many gateways; returns when all are ready.
    pub async fn start(gateways: usize) -> Cluster {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let ip = own_ip();
        let [keeper_grpc, keeper_ops, hub_grpc, api, hub_ops] = addresses(ip);
        let url = format!("http://{keeper_grpc}");
        let keeper =
            Process::start(dir.path(), "keeper", &["keeper", "--grpc", &keeper_grpc.to_string()], keeper_ops);
        let (grpc, http) = (hub_grpc.to_string(), api.to_string());
        let hub = ["hub", "--keeper", &url, "--grpc", &grpc, "--http", &http];
        let hub = Process::start(dir.path(), "hub", &hub, hub_ops);
        let gateways = (0..gateways).map(|number| {
            let [mqtt, ws, ops] = addresses(ip);
            let (mqtt_text, ws) = (mqtt.to_string(), ws.to_string());
            let arguments = ["gateway", "--keeper", &url, "--mqtt", &mqtt_text, "--ws", &ws];
            let process = Process::start(dir.path(), &format!("gateway-{number}"), &arguments, ops);
            Gateway { process, mqtt }
        });
        let gateways = gateways.collect();
        let http = reqwest::Client::builder().timeout(crate::PATIENCE).build().expect("an HTTP client");
        let cluster = Cluster { dir, ip, keeper, hub, api, gateways, registries: Vec::new(), http };
        cluster.keeper.ready().await;
        cluster.ready().await;
        let keys = format!("api_keys=[{{name: test, key: {API_KEY}}}]");
        let app = ["root=true", "anonymous_devices=true", "device_publish=['#']", "device_subscribe=['#']"];
        cluster.configure(&[&["app/demo", &keys], &app[..]].concat()).await;
        cluster.key_is_known().await;
        cluster
    }

    async fn ready(&self) {
        self.hub.ready().await;
        for gateway in &self.gateways {
            gateway.process.ready().await;
        }
    }

    /// `carillon config set`.
    pub async fn configure(&self, arguments: &[&str]) {
        let keeper = format!("http://{}", self.keeper.arguments[2]);
        let arguments = [&["config", "set"], arguments, &["--keeper", &keeper]].concat();
        let output = within("the command ends", carillon(&arguments).output()).await.expect("it runs");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Everyone knows the app by now: the hub takes its key, and each gateway its devices.
    async fn key_is_known(&self) {
        eventually("the app is known", || async {
            self.try_publish("known", "known").await?;
            for gateway in &self.gateways {
                let mut raw = crate::mqtt::Raw::connect(gateway.mqtt).await;
                raw.send(&crate::mqtt::connect(5, "known", 60)).await;
                match raw.answer().await {
                    crate::mqtt::Answer::Packet(0x20, body) if body[1] == 0 => {}
                    other => return Err(format!("no CONNACK but {other:02x?}")),
                }
            }
            Ok(())
        })
        .await;
    }

    /// Where the devices of a gateway connect.
    pub fn mqtt(&self, gateway: usize) -> SocketAddr {
        self.gateways[gateway].mqtt
    }

    /// Publishes to a topic of the app, stored; accepted when this returns. Tries again while the hub is away.
    pub async fn publish(&self, topic: &str, text: &str) {
        eventually("a message is accepted", || self.try_publish(topic, text)).await;
    }

    async fn try_publish(&self, topic: &str, text: &str) -> Result<(), String> {
        let request =
            self.http.post(format!("http://{}/v1/apps/demo/messages", self.api)).bearer_auth(API_KEY);
        let answer = request
            .json(&json!({ "topic": topic, "payload": text, "id": format!("{topic}:{text}") }))
            .send()
            .await;
        let answer = answer.map_err(|error| error.to_string())?;
        if answer.status().is_success() { Ok(()) } else { Err(answer.text().await.unwrap_or_default()) }
    }

    /// SIGKILL: the gateway has no chance to do anything. Returns when it is gone.
    pub async fn kill_gateway(&mut self, gateway: usize) {
        self.gateways[gateway].process.kill().await;
    }

    /// The same for the hub.
    pub async fn kill_hub(&mut self) {
        self.hub.kill().await;
    }

    /// One more hub, a registry alone: it gets its part of the slots. Returns when it is ready.
    pub async fn add_registry(&mut self) {
        let [grpc, http, ops] = addresses(self.ip);
        let keeper = format!("http://{}", self.keeper.arguments[2]);
        let (grpc, http) = (grpc.to_string(), http.to_string());
        let hub = ["hub", "--roles", "registry", "--keeper", &keeper, "--grpc", &grpc, "--http", &http];
        let name = format!("registry-{}", self.registries.len());
        let process = Process::start(self.dir.path(), &name, &hub, ops);
        process.ready().await;
        self.registries.push(process);
    }

    /// SIGKILL to the last of them.
    pub async fn kill_registry(&mut self) {
        self.registries.pop().expect("one was added").kill().await;
    }

    /// SIGTERM to the last of them: it hands its slots over. Returns when it has ended.
    pub async fn stop_registry(&mut self) {
        let mut registry = self.registries.pop().expect("one was added");
        let pid = registry.child.id().expect("it runs") as libc::pid_t;
        // SAFETY: kill has no memory effects; the child is not reaped yet, so the id is its own.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
        within("it ends", registry.child.wait()).await.expect("can be waited for");
    }

    /// The hub again, on the same data; returns when all are ready.
    pub async fn restart_hub(&mut self) {
        self.hub.again();
        self.ready().await;
    }

    /// What a metric is at the hub and at each further registry, all labels added up.
    pub async fn metric(&self, name: &str) -> Vec<f64> {
        let mut all = Vec::new();
        for process in [&self.hub].into_iter().chain(&self.registries) {
            let url = format!("http://{}/metrics", process.ops);
            let text = reqwest::get(url).await.expect("metrics").text().await.expect("text");
            let is_it =
                |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
            let values = text.lines().filter(is_it);
            all.push(values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum());
        }
        all
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let processes = [&self.hub]
                .into_iter()
                .chain(&self.registries)
                .chain(self.gateways.iter().map(|gateway| &gateway.process));
            for process in processes {
                let logs = std::fs::read_to_string(&process.log).unwrap_or_default();
                let lines: Vec<&str> = logs.lines().collect();
                let last = lines[lines.len().saturating_sub(40)..].join("\n");
                eprintln!(
                    "--- the last of {} in {} ---\n{last}\n---",
                    process.log.display(),
                    self.dir.path().display()
                );
            }
        }
    }
}
