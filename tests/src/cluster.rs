//! A cluster of processes, one role each, as it runs in production: a keeper, a hub, and gateways that come and go.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Child;

use crate::server::carillon;
use crate::{eventually, within};

const API_KEY: &str = "key-of-the-tests";

/// Dropping it kills all its processes.
pub struct Cluster {
    pub gateways: Vec<Gateway>,
    ip: Ipv4Addr,
    dir: tempfile::TempDir,
    keeper: String,
    http: String,
    hub_ops: String,
    client: reqwest::Client,
    _keeper: Child,
    _hub: Child,
}

/// One gateway process.
pub struct Gateway {
    /// Its instance id.
    pub id: String,
    pub mqtt: SocketAddr,
    pub ws: SocketAddr,
    ops: String,
    dir: PathBuf,
    child: Child,
}

impl Cluster {
    /// A keeper, a hub, and so many gateways, all of them ready; anonymous devices in the root app `demo`. `app`: further
    /// fields of its document, YAML.
    pub async fn start(gateways: usize, app: &str) -> Cluster {
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
        let [keeper, hub, http, keeper_ops, hub_ops] = addresses(ip);
        let keeper_url = format!("http://{keeper}");
        let keeper = launch(
            dir.path(),
            "keeper",
            &["keeper", "--grpc", &keeper.to_string(), "--ops", &keeper_ops.to_string()],
        );
        let hub = launch(
            dir.path(),
            "hub",
            &[
                "hub",
                "--keeper",
                &keeper_url,
                "--grpc",
                &hub.to_string(),
                "--http",
                &http.to_string(),
                "--ops",
                &hub_ops.to_string(),
            ],
        );
        let client =
            reqwest::Client::builder().timeout(Duration::from_secs(60)).build().expect("an HTTP client");
        let mut cluster = Cluster {
            gateways: Vec::new(),
            ip,
            dir,
            keeper: keeper_url,
            http: format!("http://{http}"),
            hub_ops: format!("http://{hub_ops}"),
            client,
            _keeper: keeper,
            _hub: hub,
        };
        let document = cluster.dir.path().join("demo.yaml");
        let yaml = format!(
            "root: true\nanonymous_devices: true\napi_keys: [{{ name: tests, key: {API_KEY} }}]\n\
             device_publish: ['#']\ndevice_subscribe: ['#']\n{app}\n"
        );
        std::fs::write(&document, yaml).expect("a file");
        eventually("the keeper takes the app", || async {
            let output = cluster
                .cli_output(&["config", "set", "app/demo", "--file", &document.to_string_lossy()])
                .await;
            if output.status.success() {
                Ok(())
            } else {
                Err(String::from_utf8_lossy(&output.stderr).into_owned())
            }
        })
        .await;
        for _ in 0..gateways {
            cluster.add_gateway().await;
        }
        cluster
    }

    /// Starts another gateway; returns when it is ready.
    pub async fn add_gateway(&mut self) -> usize {
        let name = format!("gateway-{}", self.gateways.len());
        let [mqtt, ws, ops] = addresses(self.ip);
        let (mqtt_text, ws_text, ops_text) = (mqtt.to_string(), ws.to_string(), ops.to_string());
        let flags = [
            "gateway",
            "--keeper",
            &self.keeper,
            "--mqtt",
            &mqtt_text,
            "--ws",
            &ws_text,
            "--ops",
            &ops_text,
            "--shards",
            "2",
        ];
        let child = launch(self.dir.path(), &name, &flags);
        let dir = self.dir.path().join(&name);
        let mut gateway = Gateway { id: String::new(), mqtt, ws, ops: format!("http://{ops}"), dir, child };
        eventually("the gateway is ready", || async {
            let response = self.client.get(format!("{}/readyz", gateway.ops)).send().await;
            let response = response.map_err(|error| error.to_string())?;
            if response.status().is_success() {
                Ok(())
            } else {
                Err(response.text().await.unwrap_or_default())
            }
        })
        .await;
        let marker = std::fs::read_to_string(gateway.dir.join("carillon.json")).expect("its data directory");
        let marker: Value = serde_json::from_str(&marker).expect("JSON");
        gateway.id = marker["instance"].as_str().expect("an id").to_owned();
        self.gateways.push(gateway);
        self.gateways.len() - 1
    }

    /// Runs a command for people against the keeper.
    pub async fn cli_output(&self, arguments: &[&str]) -> std::process::Output {
        let mut command = carillon(arguments);
        command.env("CARILLON_KEEPER", &self.keeper).env("CARILLON_DATA_DIR", self.dir.path());
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
        dispatch(&self.client, &self.http, device).await
    }

    /// For a device that asks by itself.
    pub fn dispatcher(&self) -> Dispatcher {
        Dispatcher { client: self.client.clone(), http: self.http.clone() }
    }

    pub async fn push(&self, user: &str, text: &str) -> Value {
        self.post(&format!("users/{user}/messages"), json!({ "payload": text })).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Value {
        let request = self.client.post(self.url(path)).bearer_auth(API_KEY).json(&body);
        let response = request.send().await.expect("an answer");
        let status = response.status();
        let text = response.text().await.expect("a body");
        assert!(status.is_success(), "{path}: {status}: {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    /// A request to the API with the app's key.
    pub fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, self.url(path)).bearer_auth(API_KEY)
    }

    pub async fn get(&self, path: &str) -> Value {
        let response = self.request(reqwest::Method::GET, path).send().await.expect("an answer");
        assert!(response.status().is_success(), "{path}: {}", response.status());
        response.json().await.expect("JSON")
    }

    fn url(&self, path: &str) -> String {
        format!("{}/v1/apps/demo/{path}", self.http)
    }

    /// A metric of a gateway, summed over its labels.
    pub async fn metric(&self, gateway: usize, name: &str) -> f64 {
        self.metric_of(&self.gateways[gateway].ops, name).await
    }

    /// A metric of the hub.
    pub async fn hub_metric(&self, name: &str) -> f64 {
        self.metric_of(&self.hub_ops, name).await
    }

    async fn metric_of(&self, ops: &str, name: &str) -> f64 {
        let url = format!("{ops}/metrics");
        let text = self.client.get(url).send().await.expect("an answer").text().await.expect("a body");
        let value = |line: &str| line.rsplit(' ').next()?.parse::<f64>().ok();
        let of = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
        text.lines().filter(of).filter_map(value).sum()
    }

    /// Is a gateway ready, as its orchestrator sees it?
    pub async fn is_ready(&self, gateway: usize) -> bool {
        let response = self.client.get(format!("{}/readyz", self.gateways[gateway].ops)).send().await;
        response.is_ok_and(|response| response.status().is_success())
    }
}

impl Gateway {
    /// SIGKILL; returns when it is gone.
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

    pub fn logs(&self) -> String {
        std::fs::read_to_string(self.dir.with_extension("log")).unwrap_or_default()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in std::fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
                if name.path().extension().is_some_and(|extension| extension == "log") {
                    let log = std::fs::read_to_string(name.path()).unwrap_or_default();
                    let lines: Vec<&str> = log.lines().collect();
                    let last = lines[lines.len().saturating_sub(30)..].join("\n");
                    eprintln!("--- the last of {} ---\n{last}", name.path().display());
                }
            }
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
        dispatch(&self.client, &self.http, device).await
    }
}

async fn dispatch(client: &reqwest::Client, http: &str, device: &str) -> Option<SocketAddr> {
    let response = client.get(format!("{http}/v1/endpoints?device={device}")).send().await.ok()?;
    let endpoints: Value = response.json().await.ok()?;
    endpoints["endpoints"][0]["mqtt"].as_str()?.strip_prefix("mqtt://")?.parse().ok()
}

/// Addresses that nobody listens on. All sockets are open at the same time, so that they differ.
fn addresses<const N: usize>(ip: Ipv4Addr) -> [SocketAddr; N] {
    let sockets: [TcpListener; N] =
        std::array::from_fn(|_| TcpListener::bind((ip, 0)).expect("a port of the loopback network"));
    sockets.map(|socket| socket.local_addr().expect("its address"))
}

fn launch(dir: &Path, name: &str, arguments: &[&str]) -> Child {
    let log = File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).expect("a log");
    let level = std::env::var("CARILLON_TEST_LOG").unwrap_or_else(|_| "info".to_owned());
    let mut command = carillon(arguments);
    command.arg("--data-dir").arg(dir.join(name)).args(["--log-format", "text", "--log-level", &level]);
    command.stdout(std::process::Stdio::null()).stderr(log);
    command.spawn().expect("the binary can be run")
}

/// For tests that wait for a command in the background.
pub async fn ended<T>(what: &str, task: tokio::task::JoinHandle<T>) -> T {
    within(what, task).await.expect("no panic")
}
