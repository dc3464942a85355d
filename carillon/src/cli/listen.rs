//! `carillon listen`: a device in the terminal.

use std::io::Write;

use carillon_client::{Device, DeviceOptions, Event, Message};
use serde::Serialize;

use super::{CliError, endpoint, left_behind, print};
use crate::args::{ListenArgs, OutputFormat};

/// How a message is printed with `--output json`.
#[derive(Serialize)]
struct Line<'a> {
    topic: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_hex: Option<String>,
    qos: u8,
    retain: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
}

pub async fn run(args: ListenArgs) -> Result<(), CliError> {
    let left = left_behind(&args.client.people.data_dir);
    let endpoint = endpoint(&args.client, left.as_ref());
    let mut options =
        DeviceOptions::new(&args.client.app, &args.user).session_expiry_seconds(args.session_expiry);
    options = match &args.gateway {
        Some(address) => options.address(address),
        None => options.dispatcher(&endpoint),
    };
    if let Some(device) = &args.device {
        options = options.client_id(device);
    }
    if let Some(token) = &args.token {
        options = options.token(token);
    }
    if args.topic.is_empty() {
        options = options.no_subscriptions();
        options = options.subscribe(carillon_proto::topic::inbox(&args.client.app, &args.user), args.qos);
        options = options.subscribe(carillon_proto::topic::everyone(&args.client.app), args.qos);
    } else {
        options = options.no_subscriptions();
        for filter in &args.topic {
            options = options.subscribe(filter, args.qos);
        }
    }
    for group in &args.group {
        options = options.subscribe(carillon_proto::topic::group(&args.client.app, group), args.qos);
    }
    let mut device = Device::start(options).map_err(|error| CliError::Usage(error.to_string()))?;
    let result = receive(&mut device, &args, &endpoint).await;
    device.stop().await;
    result
}

async fn receive(device: &mut Device, args: &ListenArgs, endpoint: &str) -> Result<(), CliError> {
    let mut messages = 0;
    let mut reached = false;
    let mut ended = std::pin::pin!(stopped());
    loop {
        let event = tokio::select! {
            event = device.next() => event,
            result = &mut ended => return result,
        };
        match event {
            Some(Event::Message(message)) => {
                show(args.client.people.output, &message)?;
                messages += 1;
                if args.count == Some(messages) {
                    return Ok(());
                }
            }
            Some(Event::Online { endpoint, session_present }) => {
                reached = true;
                let kept = if session_present { ", its session was kept" } else { "" };
                eprintln!("{} is online at {endpoint}{kept}; Ctrl-C ends", args.user);
            }
            Some(Event::Offline { reason, .. }) if !reached => {
                let place = args.gateway.as_deref().unwrap_or(endpoint);
                return Err(CliError::Unreachable(format!(
                    "cannot connect by way of {place}: {reason}\nstart it with `make dev` or `carillon dev`, or say \
                     with --endpoint or --gateway where it is"
                )));
            }
            Some(Event::Offline { reason, retry_in }) => {
                eprintln!("offline ({reason}); trying again in {:.1} s", retry_in.as_secs_f64());
            }
            Some(Event::SubscriptionRefused { filter, reason }) => {
                eprintln!("the subscription to {filter} was refused: {reason}");
            }
            Some(Event::Refused { reason }) => return Err(CliError::Failed(reason)),
            None => return Ok(()),
        }
    }
}

/// Ends with Ctrl-C or SIGTERM, both a good end.
async fn stopped() -> Result<(), CliError> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => Ok(result?),
        _ = terminate.recv() => Ok(()),
    }
}

fn show(output: OutputFormat, message: &Message) -> Result<(), CliError> {
    let text = std::str::from_utf8(&message.payload).ok();
    let hex = || message.payload.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    let line = Line {
        topic: &message.topic,
        payload: text,
        payload_hex: text.is_none().then(hex),
        qos: message.qos,
        retain: message.retain,
        id: message.id.as_deref(),
        epoch: message.position.map(|(epoch, _)| epoch),
        seq: message.position.map(|(_, seq)| seq),
    };
    print(output, &line, |line| match (&line.payload, &line.payload_hex) {
        (Some(text), _) => format!("{}  {text}", line.topic),
        (None, hex) => {
            format!("{}  ({} bytes) {}", line.topic, message.payload.len(), hex.as_deref().unwrap_or(""))
        }
    })?;
    Ok(std::io::stdout().flush()?)
}
