//! A process in few lines: five callbacks, and [`run`] that calls them, one at a time, in the order in which things happen.
//! `examples/process.rs` is a whole one.
//!
//! It is made of what [`Agent`] offers to everyone ([`Agent::config`], [`Agent::register`], [`Agent::commands`]): a process
//! that needs several documents, or must go on while it carries out a command, uses that.

use std::collections::BTreeMap;
use std::error::Error;
use std::future::Future;
use std::sync::Arc;

use carillon_proto::now_ms;

use crate::document::ConfigDocument;
use crate::{Agent, Instance};

/// What a process says when it cannot go on.
pub type Failure = Box<dyn Error + Send + Sync>;

/// What a process does when it is told to.
pub trait Process: Send {
    /// The document that it is configured by.
    type Config: ConfigDocument;

    /// Begin. The configuration is the keeper's, or the last known when no keeper can be reached. What is returned says
    /// who the process is; it is discoverable from then on. What is meant for some processes only, this one among them,
    /// comes with [`configure`](Self::configure) then; it is there from the start if [`Agent::identify`] was called before
    /// [`run`].
    fn start(
        &mut self,
        agent: &Agent,
        config: Arc<Self::Config>,
    ) -> impl Future<Output = Result<Instance, Failure>> + Send;

    /// The document has changed. An error is told to the keeper as why this instance refuses the revision; the process
    /// stays as it was.
    fn configure(&mut self, config: Arc<Self::Config>) -> impl Future<Output = Result<(), String>> + Send;

    /// A command other than `drain` and `stop`. The answer is for people, and so is an error.
    fn command(
        &mut self,
        name: &str,
        arguments: &BTreeMap<String, String>,
    ) -> impl Future<Output = Result<String, String>> + Send {
        let (name, _) = (name.to_owned(), arguments);
        async move { Err(format!("this process knows no command {name:?}; it knows: drain, stop")) }
    }

    /// Finish what has been begun; others have been told that nothing new should come here. At the command `drain`, and
    /// before [`stop`](Self::stop). It is called once.
    fn drain(&mut self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// End. The process is not discoverable any more.
    fn stop(&mut self) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// Runs a process until `stop` resolves (a signal, say) or a command `stop` comes; then drains and stops it, and the agent.
/// An error is that of [`Process::start`].
pub async fn run<P: Process>(
    agent: Agent,
    mut process: P,
    stop: impl Future<Output = ()>,
) -> Result<(), Failure> {
    tokio::pin!(stop);
    let mut commands = agent.commands();
    let mut configs = agent.config::<P::Config>();
    tokio::select! {
        () = agent.ready() => {}
        () = &mut stop => {
            agent.stop().await;
            return Ok(());
        }
    }
    let config = configs.borrow_and_update().clone();
    let mut instance = match process.start(&agent, config).await {
        Ok(instance) => instance,
        Err(failure) => {
            agent.stop().await;
            return Err(failure);
        }
    };
    agent.register(instance.clone());
    let mut stopped_by = None;
    loop {
        tokio::select! {
            () = &mut stop => break,
            Ok(()) = configs.changed() => {
                let config = configs.borrow_and_update().clone();
                let refused = process.configure(config).await.err();
                agent.report_problem(<P::Config as ConfigDocument>::KIND, refused);
            }
            Some(command) = commands.recv() => {
                let result = match command.name.as_str() {
                    _ if now_ms() > command.deadline_ms => Err("it came after its deadline".to_owned()),
                    "stop" => {
                        stopped_by = Some(command);
                        break;
                    }
                    "drain" => {
                        drain(&agent, &mut process, &mut instance).await;
                        Ok("drained".to_owned())
                    }
                    name => process.command(name, &command.arguments).await,
                };
                // Nobody waits any more when this fails.
                let _ = command.answer.send(result);
            }
        }
    }
    drain(&agent, &mut process, &mut instance).await;
    if let Some(command) = stopped_by {
        let _ = command.answer.send(Ok("stopping".to_owned()));
        // Those that wait are not carried out any more, and are answered so.
        drop(commands);
        agent.told().await;
    }
    agent.stop().await;
    process.stop().await;
    Ok(())
}

async fn drain<P: Process>(agent: &Agent, process: &mut P, instance: &mut Instance) {
    if !instance.draining {
        instance.draining = true;
        agent.register(instance.clone());
        process.drain().await;
    }
}
