//! A real `carillon dev` in a directory of its own.

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// How long a process may take until it serves.
const START: Duration = Duration::from_secs(60);
/// How long it may take to stop in order.
const STOP: Duration = Duration::from_secs(30);

/// The binary under test: `CARILLON_BIN`, or the one of this build, brought up to date.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("CARILLON_BIN") {
            return path.into();
        }
        // …/target/{profile}/deps/{test} → …/target/{profile}/carillon
        let test = std::env::current_exe().expect("the path of this test");
        let profile = test.ancestors().nth(2).expect("a profile's directory");
        let mut build = std::process::Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "carillon", "--bin", "carillon"]);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        let status = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs");
        assert!(status.success(), "carillon does not build");
        profile.join("carillon")
    })
}

/// The command line, with nothing of this shell's environment that it would read.
pub fn carillon(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARILLON_") {
            command.env_remove(name);
        }
    }
    command
}

/// What the process says once it serves.
#[derive(Debug, Clone)]
pub struct Addresses {
    pub mqtt: SocketAddr,
    pub ws: SocketAddr,
    /// Over TLS, if it was started so.
    pub mqtts: Option<SocketAddr>,
    pub wss: Option<SocketAddr>,
    /// `http://…` of the API and the console.
    pub http: String,
    /// `http://…` of metrics and health.
    pub ops: String,
    /// `http://…` of the keeper.
    pub keeper: String,
    /// The console with the key in it.
    pub console: String,
    pub api_key: String,
}

/// A running `carillon dev`. Dropping it kills it.
pub struct Server {
    child: Child,
    addresses: Addresses,
    dir: PathBuf,
    extra: Vec<String>,
    /// Removed when the server is; none when somebody else owns the directory.
    _temporary: Option<tempfile::TempDir>,
    http: reqwest::Client,
}

impl Server {
    /// On ports from the kernel, in a directory of its own.
    pub async fn start() -> Server {
        Server::start_with(&[]).await
    }

    /// The same with further flags.
    pub async fn start_with(extra: &[&str]) -> Server {
        let temporary = tempfile::tempdir().expect("a temporary directory");
        let dir = temporary.path().join("data");
        let extra: Vec<String> = extra.iter().map(ToString::to_string).collect();
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let (child, addresses) =
            launch(&dir, [any; 4], &extra).await.unwrap_or_else(|error| panic!("{error}"));
        let http =
            reqwest::Client::builder().timeout(Duration::from_secs(60)).build().expect("an HTTP client");
        Server { child, addresses, dir, extra, _temporary: Some(temporary), http }
    }

    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    pub fn data_dir(&self) -> &Path {
        &self.dir
    }

    pub fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// SIGKILL: the process has no chance to do anything. Returns when it is gone.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("it ran");
    }

    /// SIGKILL by id, without waiting: for a thread that has to be fast.
    pub fn killer(&self) -> impl FnOnce() + Send + 'static {
        let pid = self.pid() as libc::pid_t;
        // SAFETY: kill has no memory effects; the child is not reaped before `gone`, so the id is still its own.
        move || assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0, "SIGKILL")
    }

    /// Waits for the end of a process that was told to end.
    pub async fn gone(&mut self) -> ExitStatus {
        tokio::time::timeout(STOP, self.child.wait()).await.expect("ends in time").expect("can be waited for")
    }

    /// Sends a signal and waits for the end.
    pub async fn stop(&mut self, signal: libc::c_int) -> ExitStatus {
        // SAFETY: as above.
        assert_eq!(unsafe { libc::kill(self.pid() as libc::pid_t, signal) }, 0);
        self.gone().await
    }

    /// Starts it again after its end: the same directory, the same addresses.
    pub async fn restart(&mut self) {
        let address = |url: &str| url.trim_start_matches("http://").parse().expect("an address");
        let a = &self.addresses;
        let same = [a.mqtt, a.ws, address(&a.http), address(&a.ops)];
        let (child, addresses) =
            launch(&self.dir, same, &self.extra).await.unwrap_or_else(|error| panic!("{error}"));
        self.child = child;
        self.addresses = addresses;
    }

    /// What it has logged in all its lives.
    pub fn logs(&self) -> String {
        std::fs::read_to_string(log_path(&self.dir)).unwrap_or_default()
    }

    /// The URL of an API path below the app.
    pub fn url(&self, path: &str) -> String {
        format!("{}/v1/apps/demo/{path}", self.addresses.http)
    }

    /// A request to the API with the app's key.
    pub fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, self.url(path)).bearer_auth(&self.addresses.api_key)
    }

    /// Pushes a text to a user; gives the answer's body.
    pub async fn push(&self, user: &str, text: &str) -> Value {
        self.post(&format!("users/{user}/messages"), json!({ "payload": text })).await
    }

    /// Publishes to a topic (with or without the app's level).
    pub async fn publish(&self, topic: &str, text: &str) -> Value {
        self.post("messages", json!({ "topic": topic, "payload": text })).await
    }

    /// POSTs a JSON body that must be accepted.
    pub async fn post(&self, path: &str, body: Value) -> Value {
        let response = self.request(reqwest::Method::POST, path).json(&body).send().await.expect("an answer");
        let status = response.status();
        let text = response.text().await.expect("a body");
        assert!(status.is_success(), "{path}: {status}: {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    /// GETs JSON that must be there.
    pub async fn get(&self, path: &str) -> Value {
        let response = self.request(reqwest::Method::GET, path).send().await.expect("an answer");
        assert!(response.status().is_success(), "{path}: {}", response.status());
        response.json().await.expect("JSON")
    }

    /// The value of a metric, with its labels as they are written: `carillon_gateway_connects_total{result="accepted"}`.
    /// 0 if it is not there.
    pub async fn metric(&self, name: &str) -> f64 {
        let url = format!("{}/metrics", self.addresses.ops);
        let text = self.http.get(url).send().await.expect("an answer").text().await.expect("a body");
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or_default()
    }

    /// Runs a command for people against this server; it must succeed. Gives its stdout.
    pub async fn cli(&self, arguments: &[&str]) -> String {
        let output = self.cli_output(arguments).await;
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(
            output.status.success(),
            "carillon {}: {}\n{stdout}{stderr}",
            arguments.join(" "),
            output.status
        );
        stdout.into_owned()
    }

    /// The same, whatever comes of it.
    pub async fn cli_output(&self, arguments: &[&str]) -> std::process::Output {
        let mut command = carillon(arguments);
        command.env("CARILLON_DATA_DIR", &self.dir);
        crate::within("the command ends", command.output()).await.expect("it runs")
    }
}

fn log_path(dir: &Path) -> PathBuf {
    dir.with_extension("log")
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.logs();
            let lines: Vec<&str> = logs.lines().collect();
            let last = &lines[lines.len().saturating_sub(100)..];
            eprintln!("--- the last the server logged ---\n{}\n---", last.join("\n"));
        }
    }
}

/// Starts a process and waits until it serves.
async fn launch(
    dir: &Path,
    [mqtt, ws, http, ops]: [SocketAddr; 4],
    extra: &[String],
) -> Result<(Child, Addresses), String> {
    let log =
        File::options().create(true).append(true).open(log_path(dir)).map_err(|error| error.to_string())?;
    let level = std::env::var("CARILLON_TEST_LOG").unwrap_or_else(|_| "info".to_owned());
    let mut command = carillon(&["dev", "--output", "json", "--log-format", "text"]);
    command
        .arg("--data-dir")
        .arg(dir)
        .args(["--mqtt", &mqtt.to_string(), "--ws", &ws.to_string()])
        .args(["--http", &http.to_string(), "--ops", &ops.to_string()])
        .args(["--log-level", &level])
        .args(extra)
        .stdout(Stdio::piped())
        .stderr(log);
    let mut child =
        command.spawn().map_err(|error| format!("{} does not start: {error}", binary().display()))?;
    let stdout = child.stdout.take().ok_or("no stdout")?;
    let mut lines = BufReader::new(stdout).lines();
    let began = Instant::now();
    let line = match tokio::time::timeout(START, lines.next_line()).await {
        Ok(Ok(Some(line))) => line,
        Ok(_) => {
            let status = child.wait().await.map_err(|error| error.to_string())?;
            let signal = status.signal().map(|signal| format!(" (signal {signal})")).unwrap_or_default();
            let log = std::fs::read_to_string(log_path(dir)).unwrap_or_default();
            return Err(format!(
                "carillon dev ended with {status}{signal} after {:?}:\n{log}",
                began.elapsed()
            ));
        }
        Err(_) => return Err(format!("carillon dev does not serve within {START:?}")),
    };
    // Nothing more is printed; the pipe is kept open by the task.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let said: Value = serde_json::from_str(&line).map_err(|error| format!("{line}: {error}"))?;
    let text =
        |name: &str| said[name].as_str().map(str::to_owned).ok_or_else(|| format!("no {name} in {line}"));
    let address = |name: &str| -> Result<SocketAddr, String> {
        let url = text(name)?;
        let rest = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
        rest.split('/').next().unwrap_or_default().parse().map_err(|error| format!("{name} {url}: {error}"))
    };
    let addresses = Addresses {
        mqtt: address("mqtt")?,
        ws: address("ws")?,
        mqtts: said["mqtts"].is_string().then(|| address("mqtts")).transpose()?,
        wss: said["wss"].is_string().then(|| address("wss")).transpose()?,
        http: text("endpoint")?,
        ops: text("ops")?,
        keeper: text("keeper")?,
        console: text("console")?,
        api_key: text("api_key")?,
    };
    Ok((child, addresses))
}
