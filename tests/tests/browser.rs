//! What browsers speak: mqtt.js and the JavaScript SDK over WebSocket, and the console in Chromium.

use std::path::{Path, PathBuf};

use carillon_tests::Server;
use carillon_tests::tools::{find, missing, run, succeed};
use tokio::process::Command;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

/// Node, if the packages of a part of the repository are installed.
fn node(part: &str) -> Option<PathBuf> {
    let node = find("node")?;
    if !repository().join(part).join("node_modules").is_dir() {
        missing(&format!("{part}/node_modules"));
        return None;
    }
    Some(node)
}

#[tokio::test]
async fn mqtt_js_over_websocket() {
    let Some(node) = node("client/js") else { return };
    let server = Server::start().await;
    for version in ["5", "4"] {
        let mut command = Command::new(&node);
        command.arg(repository().join("tests/js/mqttjs.mjs")).kill_on_drop(true);
        command.args([&format!("ws://{}/mqtt", server.addresses().ws), version]);
        assert_eq!(succeed(command).await.trim(), format!("ok, version {version}"));
    }
}

#[tokio::test]
async fn the_javascript_sdk_makes_the_round_trip() {
    let Some(node) = node("client/js") else { return };
    if !repository().join("client/js/dist/index.js").is_file() {
        return missing("client/js/dist");
    }
    let server = Server::start().await;
    let mut command = Command::new(node);
    command
        .args(["--test", "test/integration.mjs"])
        .current_dir(repository().join("client/js"))
        .env("CARILLON_WS", format!("ws://{}", server.addresses().ws))
        .env("CARILLON_HTTP", &server.addresses().http)
        .env("CARILLON_KEY", &server.addresses().api_key)
        .kill_on_drop(true);
    succeed(command).await;
}

#[tokio::test]
async fn the_console_works_in_a_browser() {
    let Some(node) = node("console") else { return };
    let Some(chromium) = find("chromium") else { return };
    let server = Server::start().await;
    let page = reqwest::get(&server.addresses().http).await.unwrap().text().await.unwrap();
    if page.contains("built without the console") {
        return missing("the console in the binary (make console, then build)");
    }
    let pictures = std::env::var_os("CARILLON_SCREENSHOTS")
        .map_or_else(|| server.data_dir().with_extension("pictures"), PathBuf::from);
    let mut command = Command::new(node);
    command
        .arg("test/chat.mjs")
        .current_dir(repository().join("console"))
        .env("CONSOLE_URL", &server.addresses().console)
        .env("SCREENSHOTS", pictures)
        .env("CHROMIUM", chromium)
        .kill_on_drop(true);
    let output = tokio::time::timeout(std::time::Duration::from_secs(240), command.output())
        .await
        .expect("it ends")
        .unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
}

#[tokio::test]
async fn the_console_is_served_as_browsers_like_it() {
    let server = Server::start().await;
    let http = &server.addresses().http;
    let client = reqwest::Client::new();
    let page = client.get(http).send().await.unwrap();
    assert_eq!(page.status(), 200);
    assert_eq!(page.headers()["content-type"], "text/html; charset=utf-8");
    assert_ne!(page.headers()["cache-control"], "public, max-age=31536000, immutable");
    let html = page.text().await.unwrap();
    assert!(html.contains("<title>Carillon"), "{html}");
    // Every asset that the page names is there, with its type, and may be kept for ever.
    for asset in html.split('"').filter(|text| text.starts_with("./assets/")) {
        let url = format!("{http}/{}", &asset[2..]);
        let answer = client.get(&url).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{asset}");
        let kind = answer.headers()["content-type"].to_str().unwrap().to_owned();
        let expected = if asset.ends_with(".js") { "javascript" } else { "css" };
        assert!(kind.contains(expected), "{asset}: {kind}");
        assert_eq!(answer.headers()["cache-control"], "public, max-age=31536000, immutable");
        let etag = answer.headers()["etag"].clone();
        let again = client.get(&url).header("if-none-match", etag).send().await.unwrap();
        assert_eq!(again.status(), 304, "{asset}");
    }
    for (path, status) in [("/nothing.js", 404), ("/assets/../connect.json", 404), ("/v1/openapi.json", 200)]
    {
        assert_eq!(
            client.get(format!("{http}{path}")).send().await.unwrap().status().as_u16(),
            status,
            "{path}"
        );
    }
    assert_eq!(client.post(http).send().await.unwrap().status(), 405);
}

#[tokio::test]
async fn the_tools_are_what_they_should_be() {
    // So that a broken installation is not taken for a broken product.
    if let Some(node) = find("node") {
        let mut command = Command::new(node);
        command.arg("--version");
        let output = run(command).await;
        let version = String::from_utf8_lossy(&output.stdout).trim().trim_start_matches('v').to_owned();
        let major: u32 = version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
        assert!(major >= 20, "Node {version}");
    }
}
