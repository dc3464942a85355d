//! A cluster of processes, one role each, as it runs in production: a keeper, a hub, and gateways and further registries
//! that come and go.

mod process;

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

pub use self::process::{Process, addresses};
use crate::server::carillon;
use crate::{PATIENCE, eventually};

const API_KEY: &str = "key-of-the-tests";

/// Dropping it kills all its processes.
pub struct Cluster {
    pub gateways: Vec<Gateway>,
    /// A hub with all its roles.
    hub: Process,
    /// Further hubs, registries alone.
    registries: Vec<Process>,
    keeper: Process,
    keeper_url: String,
    http: String,
    client: reqwest::Client,
    ip: Ipv4Addr,
    dir: tempfile::TempDir,
}

/// One gateway process.
pub struct Gateway {
    /// Its instance id.
    pub id: String,
    pub mqtt: SocketAddr,
    pub ws: SocketAddr,
    process: Process,
}

impl Cluster {
    /// A keeper, a hub, and so many gateways, all of them ready; anonymous devices in the root app `demo`, which may
    /// publish and subscribe to everything. `app`: further fields of its document, YAML.
    pub async fn start(gateways: usize, app: &str) -> Cluster {
        Cluster::start_with(&vec![&[] as &[&str]; gateways], app).await
    }

    /// With gateways that have these further flags each.
    pub async fn start_with(gateways: &[&[&str]], app: &str) -> Cluster {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        // An address of its own for each: nobody else's ports are in the way.
        let pid = std::process::id();
        let ip = Ipv4Addr::new(
            127,
            64 + (pid % 128) as u8,
            (pid / 128 % 256) as u8,
            NEXT.fetch_add(1, Ordering::Relaxed),
        );
        let dir = tempfile::tempdir().expect("a temporary directory");
        let [keeper, keeper_ops, hub, hub_ops, http] = addresses(ip);
        let [keeper, hub, http] = [keeper, hub, http].map(|address| address.to_string());
        let keeper_url = format!("http://{keeper}");
        let hub = ["hub", "--keeper", &keeper_url, "--grpc", &hub, "--http", &http];
        let client = reqwest::Client::builder().timeout(Duration::from_secs(60)).build();
        let client = client.expect("an HTTP client");
        let mut cluster = Cluster {
            gateways: Vec::new(),
            hub: Process::start(dir.path(), "hub", &hub, hub_ops, &client),
            registries: Vec::new(),
            keeper: Process::start(dir.path(), "keeper", &["keeper", "--grpc", &keeper], keeper_ops, &client),
            keeper_url,
            http: format!("http://{http}"),
            client,
            ip,
            dir,
        };
        let document = cluster.dir.path().join("demo.yaml");
        let yaml = format!(
            "root: true\nanonymous_devices: true\napi_keys: [{{ name: tests, key: {API_KEY} }}]\n\
             device_publish: ['#']\ndevice_subscribe: ['#']\n{app}\n"
        );
        std::fs::write(&document, yaml).expect("a file");
        cluster.keeper.ready().await;
        cluster.cli(&["config", "set", "app/demo", "--file", &document.to_string_lossy()]).await;
        for flags in gateways {
            cluster.launch_gateway(flags);
        }
        cluster.ready().await;
        eventually("the hub takes the app's key", || async {
            let answer = cluster.request(Method::GET, "users/nobody").send().await;
            let status = answer.map_err(|error| error.to_string())?.status();
            if status.is_success() { Ok(()) } else { Err(status.to_string()) }
        })
        .await;
        cluster
    }

    /// Hub and gateways are; then every gateway has its id.
    async fn ready(&mut self) {
        self.hub.ready().await;
        for gateway in &mut self.gateways {
            gateway.process.ready().await;
            gateway.id = gateway.process.instance();
        }
    }

    fn launch_gateway(&mut self, flags: &[&str]) {
        let name = format!("gateway-{}", self.gateways.len());
        let [mqtt, ws, ops] = addresses(self.ip);
        let [mqtt_text, ws_text] = [mqtt, ws].map(|address| address.to_string());
        let role = ["gateway", "--keeper", &self.keeper_url, "--mqtt", &mqtt_text, "--ws", &ws_text];
        let role = [&role[..], &["--shards", "2"], flags].concat();
        let process = Process::start(self.dir.path(), &name, &role, ops, &self.client);
        self.gateways.push(Gateway { id: String::new(), mqtt, ws, process });
    }

    /// One more hub, a registry alone: it gets its part of the slots. Returns when it is ready.
    pub async fn add_registry(&mut self) {
        let [grpc, http, ops] = addresses(self.ip);
        let [grpc, http] = [grpc, http].map(|address| address.to_string());
        let roles = ["hub", "--roles", "registry", "--keeper", &self.keeper_url];
        let role = [&roles[..], &["--grpc", &grpc, "--http", &http]].concat();
        let name = format!("registry-{}", self.registries.len());
        let process = Process::start(self.dir.path(), &name, &role, ops, &self.client);
        process.ready().await;
        self.registries.push(process);
    }

    /// One more hub process with these flags, on a data directory `name` of its own. It need not become ready.
    pub fn hub_beside(&self, name: &str, flags: &[&str]) -> Process {
        let [grpc, http, ops] = addresses(self.ip);
        let [grpc, http] = [grpc, http].map(|address| address.to_string());
        let role = ["hub", "--keeper", &self.keeper_url, "--grpc", &grpc, "--http", &http];
        Process::start(self.dir.path(), name, &[&role[..], flags].concat(), ops, &self.client)
    }

    /// SIGKILL to the last of them.
    pub async fn kill_registry(&mut self) {
        self.registries.pop().expect("one was added").kill().await;
    }

    /// SIGTERM to the last of them: it hands its slots over. Returns when it has ended.
    pub async fn stop_registry(&mut self) {
        let mut registry = self.registries.pop().expect("one was added");
        registry.signal(libc::SIGTERM);
        registry.gone().await;
    }

    /// SIGKILL.
    pub async fn kill_hub(&mut self) {
        self.hub.kill().await;
    }

    /// The hub again, on the same data; returns when all are ready.
    pub async fn restart_hub(&mut self) {
        self.hub.again();
        self.ready().await;
    }

    /// The hub again, on the same data, which is to end by itself.
    pub async fn start_hub_again(&mut self) -> std::process::ExitStatus {
        self.hub.again();
        self.hub.gone().await
    }

    /// The same for the keeper, of which there is one.
    pub async fn kill_keeper(&mut self) {
        self.keeper.kill().await;
    }

    pub async fn restart_keeper(&mut self) {
        self.keeper.again();
        self.keeper.ready().await;
    }

    /// What the keeper has logged.
    pub fn keeper_logs(&self) -> String {
        self.keeper.logs()
    }

    /// A gateway again, on the same data; it need not be ready yet.
    pub fn start_gateway(&mut self, gateway: usize) {
        self.gateways[gateway].process.again();
    }

    /// The hub, to look at.
    pub fn hub(&self) -> &Process {
        &self.hub
    }

    /// Runs a command for people against the keeper.
    pub async fn cli_output(&self, arguments: &[&str]) -> std::process::Output {
        let mut command = carillon(arguments);
        command.env("CARILLON_KEEPER", &self.keeper_url).env("CARILLON_DATA_DIR", self.dir.path());
        tokio::time::timeout(Duration::from_secs(300), command.output())
            .await
            .expect("the command ends")
            .expect("it runs")
    }

    /// The same; it must succeed. Gives its stdout.
    pub async fn cli(&self, arguments: &[&str]) -> String {
        let output = self.cli_output(arguments).await;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "carillon {}: {stderr}", arguments.join(" "));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What `drain-status` says of a gateway.
    pub async fn status(&self, gateway: usize) -> Value {
        let said = self.cli(&["command", &self.gateways[gateway].id, "drain-status"]).await;
        serde_json::from_str(&said).expect("JSON")
    }

    /// The `host:port` of a gateway that the dispatcher sends a device to.
    pub async fn dispatch(&self, device: &str) -> Option<SocketAddr> {
        self.dispatcher().ask(device).await
    }

    /// For a device that asks by itself.
    pub fn dispatcher(&self) -> Dispatcher {
        Dispatcher { client: self.client.clone(), http: self.http.clone() }
    }

    pub async fn push(&self, user: &str, text: &str) -> Value {
        self.post(&format!("users/{user}/messages"), json!({ "payload": text })).await
    }

    /// Publishes to a topic of the app, stored; accepted when this returns. Tries again while the hub is away.
    pub async fn publish(&self, topic: &str, text: &str) {
        // The same message, however often it is tried.
        let body = json!({ "topic": topic, "payload": text, "id": format!("{topic}:{text}") });
        eventually("a message is accepted", || async {
            let request = self.request(Method::POST, "messages").timeout(PATIENCE).json(&body);
            let answer = request.send().await.map_err(|error| error.to_string())?;
            if answer.status().is_success() { Ok(()) } else { Err(answer.text().await.unwrap_or_default()) }
        })
        .await;
    }

    pub async fn post(&self, path: &str, body: Value) -> Value {
        let response = self.request(Method::POST, path).json(&body).send().await.expect("an answer");
        let status = response.status();
        let text = response.text().await.expect("a body");
        assert!(status.is_success(), "{path}: {status}: {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    pub async fn get(&self, path: &str) -> Value {
        let response = self.request(Method::GET, path).send().await.expect("an answer");
        assert!(response.status().is_success(), "{path}: {}", response.status());
        response.json().await.expect("JSON")
    }

    /// A request to the API with the app's key.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}/v1/apps/demo/{path}", self.http)).bearer_auth(API_KEY)
    }

    /// A metric of a gateway, summed over its labels.
    pub async fn metric(&self, gateway: usize, name: &str) -> f64 {
        self.gateways[gateway].metric(name).await
    }

    /// A metric of the hub.
    pub async fn hub_metric(&self, name: &str) -> f64 {
        self.hub.metric(name).await
    }

    /// A metric of the hub, and of each further registry.
    pub async fn hub_metrics(&self, name: &str) -> Vec<f64> {
        let mut all = Vec::new();
        for process in [&self.hub].into_iter().chain(&self.registries) {
            all.push(process.metric(name).await);
        }
        all
    }

    /// Is a gateway ready, as its orchestrator sees it?
    pub async fn is_ready(&self, gateway: usize) -> bool {
        self.gateways[gateway].process.is_ready().await.is_ok()
    }
}

impl Deref for Gateway {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Gateway {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hubs = [&self.keeper, &self.hub].into_iter().chain(&self.registries);
            hubs.chain(self.gateways.iter().map(|gateway| &gateway.process))
                .for_each(Process::show_last_logs);
        }
    }
}

/// Asks which gateways to try, as a device does.
#[derive(Clone)]
pub struct Dispatcher {
    client: reqwest::Client,
    http: String,
}

impl Dispatcher {
    pub async fn ask(&self, device: &str) -> Option<SocketAddr> {
        let response =
            self.client.get(format!("{}/v1/endpoints?device={device}", self.http)).send().await.ok()?;
        let endpoints: Value = response.json().await.ok()?;
        endpoints["endpoints"][0]["mqtt"].as_str()?.strip_prefix("mqtt://")?.parse().ok()
    }
}
