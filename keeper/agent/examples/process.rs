//! A whole process: typed configuration that changes live, discoverable, obeys commands.
//!
//! `cargo run -p carillon-agent --example process -- greeter-1 http://127.0.0.1:7400`

#![allow(clippy::print_stdout, reason = "an example for a terminal")]

use std::sync::Arc;

use carillon_agent::document::{ConfigDocument, Violation};
use carillon_agent::process::{Failure, Process, run};
use carillon_agent::{Agent, Instance, Options};

#[derive(Default, Clone, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Greeting {
    text: String,
}

impl ConfigDocument for Greeting {
    const KIND: &'static str = "greeting";
    fn check(&self, _name: Option<&str>) -> Vec<Violation> {
        let long = self.text.len() > 80;
        long.then(|| Violation::new("text", "is longer than 80 bytes")).into_iter().collect()
    }
}

struct Greeter(String, Arc<Greeting>);

impl Process for Greeter {
    type Config = Greeting;
    async fn start(&mut self, _: &Agent, config: Arc<Greeting>) -> Result<Instance, Failure> {
        self.1 = config;
        println!("started with {:?}", self.1.text);
        Ok(Instance::new(&self.0).with_address("http", "127.0.0.1:8000"))
    }
    async fn configure(&mut self, config: Arc<Greeting>) -> Result<(), String> {
        self.1 = config;
        println!("configured with {:?}", self.1.text);
        Ok(())
    }
    async fn command(&mut self, name: &str, arguments: &Arguments) -> Result<String, String> {
        match (name, arguments.get("name")) {
            ("greet", Some(who)) => Ok(format!("{}, {who}", self.1.text)),
            _ => Err("it knows: greet name=NAME, drain, stop".to_owned()),
        }
    }
    async fn drain(&mut self) {
        println!("drained");
    }
    async fn stop(&mut self) {
        println!("stopped");
    }
}

type Arguments = std::collections::BTreeMap<String, String>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let id = arguments.next().ok_or("usage: process ID http://HOST:PORT …")?;
    let agent = Agent::start(Options::new(arguments.collect()));
    let interrupted = async { drop(tokio::signal::ctrl_c().await) };
    run(agent, Greeter(id, Arc::default()), interrupted).await
}
