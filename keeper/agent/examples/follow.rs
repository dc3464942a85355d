//! Follows a keeper: prints the instances that come and go, and the apps as they change.
//!
//! `cargo run -p carillon-agent --example follow -- http://127.0.0.1:7400`

#![allow(clippy::print_stdout, reason = "an example for a terminal")]

use carillon_agent::app::App;
use carillon_agent::{Agent, Instance, Options, Role};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let keepers: Vec<String> = std::env::args().skip(1).collect();
    anyhow::ensure!(!keepers.is_empty(), "usage: follow http://HOST:PORT …");

    let agent = Agent::start(Options::new(keepers));
    agent.ready().await;
    agent.register(Instance {
        id: format!("follower-{}", std::process::id()),
        incarnation: carillon_proto::now_ms(),
        roles: Vec::new(),
        addresses: Default::default(),
        labels: Default::default(),
        draining: false,
    });

    let (mut gateways, mut apps) = (agent.instances(Role::Gateway), agent.configs::<App>());
    loop {
        let names: Vec<String> =
            gateways.borrow_and_update().iter().map(|gateway| gateway.id.clone()).collect();
        let known: Vec<String> = apps.borrow_and_update().keys().cloned().collect();
        println!("gateways: {names:?}  apps: {known:?}");
        tokio::select! {
            changed = gateways.changed() => changed?,
            changed = apps.changed() => changed?,
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    agent.stop().await;
    Ok(())
}
