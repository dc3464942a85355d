//! Commands that the keeper passes on to this process.

use carillon_agent::{Agent, Command};
use carillon_proto::now_ms;
use tokio::sync::mpsc;

use crate::logs::LogHandle;

/// Carries out commands for as long as the agent lives.
pub async fn serve(agent: &Agent, logs: LogHandle) {
    let mut commands: mpsc::Receiver<Command> = agent.commands();
    while let Some(command) = commands.recv().await {
        let result = if now_ms() > command.deadline_ms {
            Err("it came after its deadline".to_owned())
        } else {
            carry_out(&command, &logs)
        };
        tracing::info!(id = command.id, name = command.name, ok = result.is_ok(), "command carried out");
        // Nobody waits any more when this fails.
        let _ = command.answer.send(result);
    }
}

fn carry_out(command: &Command, logs: &LogHandle) -> Result<String, String> {
    match command.name.as_str() {
        "log-level" => {
            let level = command.arguments.get("level").ok_or("the argument \"level\" is missing")?;
            logs.set(level).map_err(|error| format!("{error:#}"))?;
            Ok(format!("the log level is {level}"))
        }
        other => Err(format!("this process knows no command {other:?}; it knows: log-level")),
    }
}
