//! Programs that nobody here wrote: mosquitto's clients, Python, Node, Chromium.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Output, Stdio};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::within;

/// Where a program is. One that is missing fails the test when `CI` is set; else the test is left out, loudly.
pub fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(tool)).find(|path| path.is_file());
    if found.is_none() {
        missing(tool);
    }
    found
}

/// Says that something is missing: fails in CI, notes it for the closing line of `make test` elsewhere.
pub fn missing(what: &str) {
    assert!(!is_ci(), "{what} is missing, and in CI everything is tested");
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(
        std::io::stderr(),
        "\n*** LEFT OUT: {test}: {what} is missing (make test installs it) ***\n"
    );
    if let Some(path) = std::env::var_os("CARILLON_LEFT_OUT")
        && let Ok(mut file) = std::fs::File::options().create(true).append(true).open(path)
    {
        let _ = writeln!(file, "{test}: {what} is missing");
    }
}

/// Is this a run that must not leave anything out?
pub fn is_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| !value.is_empty() && value != "false" && value != "0")
}

/// The Python with paho-mqtt that `make test` sets up: `CARILLON_PYTHON`, or the usual place of it.
pub fn python() -> Option<PathBuf> {
    let usual = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/carillon/venv/bin/python"));
    let python =
        std::env::var_os("CARILLON_PYTHON").map(PathBuf::from).or_else(usual).filter(|path| path.is_file());
    if python.is_none() {
        missing("the Python environment with paho-mqtt");
    }
    python
}

/// `mosquitto_sub` or `mosquitto_pub` for a server, with an MQTT version: `5`, `311`.
pub fn mosquitto(program: &str, server: SocketAddr, version: &str, arguments: &[&str]) -> Option<Command> {
    // Into a pipe it would print only when a block is full; stdbuf replaces itself by the program, so the pid is its own.
    let mut command = Command::new(find("stdbuf")?);
    command
        .arg("-oL")
        .arg(find(program)?)
        .args([
            "-h",
            &server.ip().to_string(),
            "-p",
            &server.port().to_string(),
            "-V",
            &format!("mqttv{version}"),
        ])
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    Some(command)
}

/// Runs a program to its end; gives what it printed. Any exit code.
pub async fn run(mut command: Command) -> Output {
    within("the program ends", command.output()).await.expect("the program runs")
}

/// Runs a program to its end; it must succeed. Gives its stdout.
pub async fn succeed(command: Command) -> String {
    let shown = format!("{:?}", command.as_std());
    let output = run(command).await;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{shown}: {}\n{stdout}{stderr}", output.status);
    stdout.into_owned()
}

/// A program that runs on, and whose lines are read one by one.
pub struct Running {
    child: Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

impl Running {
    /// Starts it.
    pub fn start(mut command: Command) -> Running {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the program starts");
        let stdout = child.stdout.take().expect("piped");
        Running { child, lines: BufReader::new(stdout).lines() }
    }

    /// Its next line.
    pub async fn line(&mut self) -> String {
        let line = within("the program prints a line", self.lines.next_line()).await;
        line.expect("its output can be read").expect("it printed less than was expected")
    }

    /// Its next line, however long that takes; none when it has ended.
    pub async fn next(&mut self) -> Option<String> {
        self.lines.next_line().await.expect("its output can be read")
    }

    /// Skips lines up to one that contains a text; gives that one.
    pub async fn line_with(&mut self, text: &str) -> String {
        loop {
            let line = self.line().await;
            if line.contains(text) {
                return line;
            }
        }
    }

    /// All lines up to its end.
    pub async fn rest(&mut self) -> Vec<String> {
        let mut rest = Vec::new();
        while let Some(line) = within("the program ends", self.lines.next_line()).await.expect("its output") {
            rest.push(line);
        }
        rest
    }

    pub fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill has no memory effects; the child is not reaped yet, so the id is still its own.
        assert_eq!(unsafe { libc::kill(self.pid() as libc::pid_t, signal) }, 0);
    }

    /// Kills it and waits for its end: to its peers, a lost connection.
    pub async fn kill(mut self) {
        let _ = self.child.kill().await;
    }

    /// Waits for its end; gives its exit code.
    pub async fn exit_code(mut self) -> Option<i32> {
        within("the program ends", self.child.wait()).await.expect("can be waited for").code()
    }
}
