//! What `carillon dev` says once it serves: a page for people, or one line of JSON.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use serde_json::json;

use crate::args::{DEFAULT_DATA_DIR, OutputFormat};
use crate::connect_file::Connect;

/// Prints it to stdout.
pub fn print(output: OutputFormat, connect: &Connect, data_dir: &Path) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match output {
        OutputFormat::Json => {
            let line = json!({
                "endpoint": connect.endpoint, "mqtt": connect.mqtt, "ws": connect.ws,
                "mqtts": connect.mqtts, "wss": connect.wss, "ops": connect.ops,
                "keeper": connect.keeper, "console": console(connect), "app": connect.app,
                "api_key": connect.api_key, "pid": connect.pid,
            });
            writeln!(stdout, "{line}")?;
        }
        OutputFormat::Text => {
            let page = page(connect, &program(), data_dir, io::stdout().is_terminal());
            stdout.write_all(page.as_bytes())?;
        }
    }
    stdout.flush()
}

/// The console's address; the key is in the fragment, which no server sees.
fn console(connect: &Connect) -> String {
    format!("{}/#key={}", connect.endpoint, connect.api_key)
}

/// How this program is called from here: by its name if the shell finds it so, else by its path.
fn program() -> String {
    let Ok(program) = std::env::current_exe() else { return "carillon".to_owned() };
    let on_path = std::env::var_os("PATH").is_some_and(|path| {
        let mut found = std::env::split_paths(&path).map(|dir| dir.join("carillon"));
        found
            .find(|path| path.is_file())
            .is_some_and(|path| path.canonicalize().is_ok_and(|path| path == program))
    });
    if on_path {
        return "carillon".to_owned();
    }
    let here = std::env::current_dir().ok();
    let relative = here.and_then(|here| program.strip_prefix(here).ok().map(Path::to_owned));
    relative.unwrap_or(program).display().to_string()
}

fn page(connect: &Connect, program: &str, data_dir: &Path, colour: bool) -> String {
    let (bold, dim, reset) = if colour { ("\x1b[1m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
    let address = connect.mqtt.trim_start_matches("mqtt://");
    let (host, port) = address.rsplit_once(':').unwrap_or((address, "1883"));
    let Connect { endpoint, mqtt, ws, ops, app, api_key, .. } = connect;
    let console = console(connect);
    let over_tls =
        [connect.mqtts.as_deref(), connect.wss.as_deref()].into_iter().flatten().collect::<Vec<_>>();
    let over_tls = match over_tls.join(", ") {
        none if none.is_empty() => none,
        some => format!("\n  {bold}TLS{reset}       {some}"),
    };
    // The command line finds address and key in the data directory, if it is told which.
    let elsewhere = match data_dir == Path::new(DEFAULT_DATA_DIR) {
        true => String::new(),
        false => format!(" --data-dir {}", data_dir.display()),
    };
    format!(
        "
{bold}Carillon {version}{reset} is running; Ctrl-C stops it.

  {bold}Console{reset}   {console}
  {bold}API{reset}       {endpoint}/v1   {dim}described at {endpoint}/v1/openapi.json{reset}
  {bold}MQTT{reset}      {mqtt}   {dim}WebSocket {ws}{reset}{over_tls}
  {bold}Metrics{reset}   {ops}/metrics
  {bold}API key{reset}   {api_key}   {dim}of the app {app}{reset}

{bold}Receive{reset} as alice, in another terminal (either one):

  mosquitto_sub -h {host} -p {port} -u alice -t {app}/u/alice -q 1 -v
  {program} listen --user alice{elsewhere}

{bold}Push{reset} to her (either one):

  curl {endpoint}/v1/apps/{app}/users/alice/messages \\
    -H 'authorization: Bearer {api_key}' \\
    -H 'content-type: application/json' -d '{{\"payload\": \"hello\"}}'
  {program} push alice hello{elsewhere}

",
        version = env!("CARGO_PKG_VERSION"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_what_can_be_copied() {
        let connect = Connect {
            endpoint: "http://127.0.0.1:8080".to_owned(),
            mqtt: "mqtt://127.0.0.1:1883".to_owned(),
            ws: "ws://127.0.0.1:8083/mqtt".to_owned(),
            mqtts: None,
            wss: Some("wss://127.0.0.1:8084/mqtt".to_owned()),
            ops: "http://127.0.0.1:9090".to_owned(),
            keeper: "http://127.0.0.1:7400".to_owned(),
            app: "demo".to_owned(),
            api_key: "k3y".to_owned(),
            pid: 1,
        };
        let page = page(&connect, "target/debug/carillon", Path::new("./other"), false);
        for expected in [
            "http://127.0.0.1:8080/#key=k3y",
            "mosquitto_sub -h 127.0.0.1 -p 1883 -u alice -t demo/u/alice -q 1 -v\n",
            "curl http://127.0.0.1:8080/v1/apps/demo/users/alice/messages \\\n",
            "-d '{\"payload\": \"hello\"}'\n",
            "  TLS       wss://127.0.0.1:8084/mqtt\n",
            "  target/debug/carillon push alice hello --data-dir ./other\n",
        ] {
            assert!(page.contains(expected), "{expected} in {page}");
        }
        assert!(!page.contains('\x1b'));
    }
}
