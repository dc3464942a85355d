//! The Kubernetes of the tests: `tests/cluster` starts it, once for all who ask, and it stays until `make cluster-down`.
//!
//! A test asks for [`Kubernetes::with_pods`], or for [`Kubernetes::api`] where the API server is enough, and takes a
//! [`Namespace`] of its own, which is gone with the test. What cannot be had is said, as for any other tool.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::keepers::patiently;
use crate::server::binary;
use crate::tools;

/// How long a test waits for something in the cluster: pods are started, pulled down, and put off for seconds.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Exit code of `tests/cluster/up` where what it is built with is missing.
const MISSING: i32 = 3;

/// A cluster that is up.
#[derive(Debug, Clone)]
pub struct Kubernetes {
    /// With all rights; for `kubectl`, `helm`, or the operator as a process of this machine.
    pub kubeconfig: PathBuf,
    pub kubectl: PathBuf,
    pub helm: PathBuf,
    /// Why it runs no pods, if so.
    pub without_pods: Option<String>,
}

impl Kubernetes {
    /// A cluster whose pods run. The test is left out where there is none, and fails there in CI.
    pub async fn with_pods() -> Option<Kubernetes> {
        let cluster = Kubernetes::api().await?;
        if let Some(reason) = &cluster.without_pods {
            tools::missing(&format!("a node for pods ({reason})"));
            return None;
        }
        Some(cluster)
    }

    /// The API server with its controllers; pods run, or not.
    pub async fn api() -> Option<Kubernetes> {
        static UP: OnceCell<Option<Kubernetes>> = OnceCell::const_new();
        let up = UP.get_or_init(up).await.clone();
        if up.is_none() {
            tools::missing("what a Kubernetes is built with (Go; tests/setup cluster)");
        }
        up
    }

    /// Hands the image of the binary under test to the node, under a name as `carillon:dev`. A test that changes images
    /// takes a second name.
    pub async fn load_image(&self, name: &str) {
        let mut command = Command::new(scripts().join("load-image"));
        command.arg(name).env("CARILLON", binary());
        let output = command.output().await.expect("the script runs");
        assert!(output.status.success(), "load-image {name}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A namespace that nobody else uses: its name begins with the given one.
    pub async fn namespace(&self, name: &str) -> Namespace {
        let name = format!("{name}-{:08x}", rand::random::<u32>());
        let space = Namespace { cluster: self.clone(), name };
        space.cluster.kubectl(&["create", "namespace", &space.name]).await;
        if self.without_pods.is_none() {
            // Pods are refused until the controllers have made it.
            let account = ["get", "serviceaccount", "default", "--namespace", &space.name];
            self.eventually("an account in the namespace", &account, |_| true).await;
        }
        space
    }

    /// `kubectl` that must succeed; gives what it printed.
    pub async fn kubectl(&self, arguments: &[&str]) -> String {
        let output = self.try_kubectl(arguments).await;
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(
            output.status.success(),
            "kubectl {}: {}\n{stdout}{stderr}",
            arguments.join(" "),
            output.status
        );
        stdout.into_owned()
    }

    /// `kubectl`, whatever comes of it.
    pub async fn try_kubectl(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().await.expect("kubectl runs")
    }

    /// `kubectl` for what runs on, or is given something to read.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig).stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Asks with `kubectl` until the answer is as wanted; gives it.
    pub async fn eventually(&self, what: &str, arguments: &[&str], wanted: impl Fn(&str) -> bool) -> String {
        let ask = async || {
            let output = self.try_kubectl(arguments).await;
            let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
            match output.status.success() && wanted(&stdout) {
                true => Ok(stdout),
                false => Err(format!("{stdout}{}", String::from_utf8_lossy(&output.stderr))),
            }
        };
        patiently(what, PATIENCE, ask).await.unwrap_or_else(|error| panic!("{error}"))
    }
}

/// A namespace of one test. When the test fails, it tells what went on in it. It is removed in the background.
pub struct Namespace {
    pub cluster: Kubernetes,
    pub name: String,
}

impl Namespace {
    /// `kubectl` in this namespace, which must succeed; gives what it printed.
    pub async fn kubectl(&self, arguments: &[&str]) -> String {
        self.cluster.kubectl(&self.within(arguments)).await
    }

    /// `kubectl` in this namespace, whatever comes of it.
    pub async fn try_kubectl(&self, arguments: &[&str]) -> Output {
        self.cluster.try_kubectl(&self.within(arguments)).await
    }

    /// Asks with `kubectl` in this namespace until the answer is as wanted; gives it.
    pub async fn eventually(&self, what: &str, arguments: &[&str], wanted: impl Fn(&str) -> bool) -> String {
        self.cluster.eventually(what, &self.within(arguments), wanted).await
    }

    /// Applies what stands in a YAML text; gives what `kubectl` says of it, well or not.
    pub async fn try_apply(&self, yaml: &str) -> Output {
        let mut command = self.cluster.command();
        command.args(self.within(&["apply", "--filename", "-"]));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("kubectl runs");
        let mut stdin = child.stdin.take().expect("piped");
        // One that ends before it has read all says why.
        let _ = stdin.write_all(yaml.as_bytes()).await;
        drop(stdin);
        child.wait_with_output().await.expect("kubectl runs")
    }

    /// Applies what stands in a YAML text; all of it must be accepted.
    pub async fn apply(&self, yaml: &str) {
        let output = self.try_apply(yaml).await;
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "kubectl apply: {stdout}{stderr}of:\n{yaml}");
    }

    fn within<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        // In front: what follows `--` is not kubectl's.
        ["--namespace", &self.name].into_iter().chain(arguments.iter().copied()).collect()
    }

    /// Prints what `kubectl` says, of whatever there is.
    fn tell(&self, arguments: &[&str]) -> String {
        let mut command = std::process::Command::new(&self.cluster.kubectl);
        command.arg("--kubeconfig").arg(&self.cluster.kubeconfig).args(self.within(arguments));
        let Ok(output) = command.stdin(Stdio::null()).output() else { return String::new() };
        let told =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        eprintln!("--- kubectl {} ---\n{told}", arguments.join(" "));
        told
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell(&["get", "pods,services,statefulsets,pvc", "--output", "wide"]);
            self.tell(&["get", "events", "--sort-by", ".lastTimestamp"]);
            for pod in self.tell(&["get", "pods", "--output", "name"]).lines() {
                self.tell(&["logs", pod, "--all-containers", "--tail", "40"]);
                self.tell(&["logs", pod, "--all-containers", "--tail", "40", "--previous"]);
            }
        }
        if std::env::var_os("CARILLON_KEEP_NAMESPACES").is_some() {
            eprintln!("the namespace {} is kept", self.name);
            return;
        }
        let mut command = std::process::Command::new(&self.cluster.kubectl);
        command.arg("--kubeconfig").arg(&self.cluster.kubeconfig);
        let _ = command
            .args(["delete", "namespace", &self.name, "--wait=false"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
    }
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster")
}

/// Starts the cluster, or finds it up; the script sees to it that only one does. None where it cannot be built.
async fn up() -> Option<Kubernetes> {
    let output = Command::new(scripts().join("up")).stdin(Stdio::null()).output().await.expect("bash runs");
    if output.status.code() == Some(MISSING) {
        return None;
    }
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "the cluster does not come up:\n{stdout}{stderr}");
    let kubeconfig = PathBuf::from(stdout.lines().last().expect("the path of its kubeconfig"));
    let state = kubeconfig.parent().expect("a file in its state").to_owned();
    let read = |name: &str| std::fs::read_to_string(state.join(name)).map(|text| text.trim().to_owned());
    let programs = state.join("bin");
    Some(Kubernetes {
        kubeconfig,
        kubectl: programs.join("kubectl"),
        helm: programs.join("helm"),
        without_pods: read("without-pods").ok(),
    })
}
