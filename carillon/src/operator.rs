//! `carillon operator`: the process that turns resources of Kubernetes into pods. It keeps nothing of its own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;

use crate::args::OperatorArgs;
use crate::logs::LogHandle;
use crate::ops;
use crate::process::{Running, listen};

pub async fn start(args: OperatorArgs, _logs: LogHandle) -> anyhow::Result<Running> {
    let listener = listen(args.ops, "--ops", "metrics and health").await?;
    let metrics = prometheus::Registry::new();
    ops::register_process(&metrics, "operator")?;
    let lease_duration = args.lease();
    let identity =
        args.identity.or_else(host_name).context("this process has no name: give it one with --identity")?;
    let directory = args.data_dir.unwrap_or_else(|| {
        // One that is left over is of no use to the next.
        std::env::temp_dir().join(format!("carillon-operator-{}", uuid::Uuid::new_v4()))
    });
    let operator = carillon_operator::start(carillon_operator::Options {
        namespace: args.namespace,
        identity,
        lease_namespace: args.lease_namespace,
        lease_duration,
        image: args.image,
        keeper_address: args.keeper_address,
        directory,
        metrics: metrics.clone(),
    });
    let operator = Box::pin(operator).await.context("the operator does not start")?;
    let ops = ops::serve(listener, metrics, Arc::new(operator.readiness()), Arc::new(|| None));
    tracing::info!("the operator serves");
    Ok(Running {
        drain_within: Duration::from_secs(args.drain_seconds),
        gateway: None,
        drains: false,
        hub: None,
        agent: None,
        keeper: None,
        operator: Some(operator),
        ops,
        commands: None,
        data_dir: None,
    })
}

/// In a pod it is the pod's name.
fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    let name = name.trim();
    (!name.is_empty()).then(|| name.to_owned())
}
