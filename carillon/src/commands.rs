//! Commands that the keeper passes on to this process.

use carillon_agent::{Agent, Command};
use carillon_gateway::drain::Mover;
use carillon_proto::now_ms;
use tokio::sync::mpsc;

use crate::logs::LogHandle;
use crate::moves;

/// Carries out commands for as long as the agent lives.
pub async fn serve(agent: &Agent, logs: LogHandle, mover: Option<Mover>) {
    let mut commands: mpsc::Receiver<Command> = agent.commands();
    while let Some(command) = commands.recv().await {
        let result = if now_ms() > command.deadline_ms {
            Err("it came after its deadline".to_owned())
        } else {
            carry_out(&command, &logs, mover.as_ref()).await
        };
        tracing::info!(id = command.id, name = command.name, ok = result.is_ok(), "command carried out");
        // Nobody waits any more when this fails.
        let _ = command.answer.send(result);
    }
}

async fn carry_out(command: &Command, logs: &LogHandle, mover: Option<&Mover>) -> Result<String, String> {
    match command.name.as_str() {
        "log-level" => {
            let level = command.arguments.get("level").ok_or("the argument \"level\" is missing")?;
            logs.set(level).map_err(|error| format!("{error:#}"))?;
            Ok(format!("the log level is {level}"))
        }
        name if moves::NAMES.contains(&name) => {
            let mover = mover.ok_or("this process is no gateway: it has no devices to move")?;
            moves::carry_out(name, &command.arguments, mover).await
        }
        other => {
            let known = moves::NAMES.join(", ");
            Err(format!("this process knows no command {other:?}; it knows: log-level, {known}"))
        }
    }
}
