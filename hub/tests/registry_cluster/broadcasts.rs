//! Broadcast jobs: shares of the rate, pause, resume, cancel, and what is left of a job when its owner restarts.

use carillon_proto::v1::{self, attach_down, attach_up, broadcast_control, broadcast_job};
use tonic::Code;

use crate::harness::{Cluster, Gateway, eventually, message};

async fn start(cluster: &Cluster, id: &str, rate_per_second: f64) -> Result<v1::BroadcastJob, tonic::Status> {
    let request = v1::StartBroadcastRequest {
        message: Some(v1::Message { id: id.into(), ..message("demo/all", "hear, hear", 1) }),
        store: None,
        idempotent: true,
        rate_per_second,
    };
    Ok(cluster.registry().await.start_broadcast(request).await?.into_inner())
}

async fn get(cluster: &Cluster, id: &str) -> Result<v1::BroadcastJob, tonic::Status> {
    let request = v1::GetBroadcastRequest { app: "demo".into(), job: id.into() };
    Ok(cluster.registry().await.get_broadcast(request).await?.into_inner())
}

async fn control(
    cluster: &Cluster,
    id: &str,
    state: broadcast_control::State,
) -> Result<v1::BroadcastJob, tonic::Status> {
    let request = v1::ControlBroadcastRequest { app: "demo".into(), job: id.into(), state: state.into() };
    Ok(cluster.registry().await.control_broadcast(request).await?.into_inner())
}

async fn progress(gateway: &Gateway, job: &str, total: u64, done: u64) {
    let progress = v1::BroadcastProgress { job: format!("demo/{job}"), total, done, finished: done == total };
    gateway.send(attach_up::Body::Progress(progress)).await;
}

async fn gateways(cluster: &Cluster) -> (Gateway, Gateway) {
    let mut one = cluster.attach("g1").await;
    let mut two = cluster.attach("g2").await;
    one.announce(&["demo/all"]).await;
    two.announce(&["demo/all"]).await;
    (one, two)
}

/// The message first, then the share.
async fn receive(gateway: &mut Gateway, job: &str) -> f64 {
    loop {
        match gateway.next().await {
            attach_down::Body::Deliver(deliver) => {
                assert_eq!((deliver.broadcast.as_str(), deliver.messages.len()), (job, 1));
                break;
            }
            // Of a job that it took part in before it was attached anew.
            attach_down::Body::Control(control) if control.job != job => {}
            other => panic!("not the message: {other:?}"),
        }
    }
    let control = gateway.control().await;
    assert_eq!((control.job.as_str(), control.state()), (job, broadcast_control::State::Run));
    control.rate_per_second
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_broadcast_is_shared_out_paused_resumed_and_finishes() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let (mut one, mut two) = gateways(&cluster).await;
    let job = start(&cluster, "job-1", 100.0).await.unwrap();
    assert_eq!((job.id.as_str(), job.seq, job.state()), ("job-1", 1, broadcast_job::State::Running));
    assert_eq!(receive(&mut one, "demo/job-1").await, 50.0);
    assert_eq!(receive(&mut two, "demo/job-1").await, 50.0);
    // The same id is the same job.
    assert_eq!(start(&cluster, "job-1", 7.0).await.unwrap().rate_per_second, 100.0);

    progress(&one, "job-1", 900, 10).await;
    progress(&two, "job-1", 100, 10).await;
    assert_eq!(one.control().await.rate_per_second, 90.0);
    assert_eq!(two.control().await.rate_per_second, 10.0);
    let job = get(&cluster, "job-1").await.unwrap();
    assert_eq!((job.total, job.done), (1000, 20));

    let job = control(&cluster, "job-1", broadcast_control::State::Pause).await.unwrap();
    assert_eq!(job.state(), broadcast_job::State::Paused);
    assert_eq!(one.control().await.state(), broadcast_control::State::Pause);
    assert_eq!(two.control().await.state(), broadcast_control::State::Pause);
    control(&cluster, "job-1", broadcast_control::State::Run).await.unwrap();
    let resumed = one.control().await;
    assert_eq!((resumed.state(), resumed.rate_per_second), (broadcast_control::State::Run, 90.0));
    assert_eq!(two.control().await.state(), broadcast_control::State::Run);

    progress(&one, "job-1", 900, 900).await;
    assert_eq!(two.control().await.rate_per_second, 100.0);
    progress(&two, "job-1", 100, 100).await;
    let job = eventually("it has finished", async || {
        let job = get(&cluster, "job-1").await.unwrap();
        (job.state() == broadcast_job::State::Finished).then_some(job)
    })
    .await;
    assert_eq!((job.total, job.done), (1000, 1000));
    assert!(job.ended_ms >= job.started_ms);
    let refused = control(&cluster, "job-1", broadcast_control::State::Pause).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(get(&cluster, "no-such-job").await.unwrap_err().code(), Code::NotFound);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn jobs_outlive_their_owner_as_records() {
    let mut cluster = Cluster::start(&[("demo", "")]).await;
    let (mut one, two) = gateways(&cluster).await;
    for job in ["cancelled", "running"] {
        start(&cluster, job, 10.0).await.unwrap();
        receive(&mut one, &format!("demo/{job}")).await;
    }
    progress(&one, "cancelled", 50, 5).await;
    eventually("progress is counted", async || {
        (get(&cluster, "cancelled").await.unwrap().done == 5).then_some(())
    })
    .await;
    control(&cluster, "cancelled", broadcast_control::State::Cancel).await.unwrap();
    assert_eq!(one.control().await.state(), broadcast_control::State::Cancel);
    drop((one, two));
    // It is what it was when its gateways went: those count as finished, so keep one attached.
    let (mut three, _four) = gateways(&cluster).await;
    start(&cluster, "left", 10.0).await.unwrap();
    receive(&mut three, "demo/left").await;
    cluster.stop_hub().await;
    cluster.start_hub().await;

    let job = get(&cluster, "cancelled").await.unwrap();
    assert_eq!((job.state(), job.done), (broadcast_job::State::Cancelled, 5));
    let job = get(&cluster, "left").await.unwrap();
    assert_eq!((job.state(), job.seq), (broadcast_job::State::Interrupted, 3));
    // Started again with the same id it is not published again.
    assert_eq!(start(&cluster, "left", 10.0).await.unwrap().state(), broadcast_job::State::Interrupted);
    let refused = control(&cluster, "left", broadcast_control::State::Run).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_no_broadcast_is_refused() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let request = |message, rate_per_second| v1::StartBroadcastRequest {
        message: Some(message),
        rate_per_second,
        ..v1::StartBroadcastRequest::default()
    };
    for (request, says) in [
        (request(message("demo/g/a", "x", 1), 0.0), "demo/all"),
        (request(message("demo/all", "x", 1), -1.0), "rate_per_second"),
        (request(message("demo/all", "x", 1), f64::NAN), "rate_per_second"),
        (request(v1::Message { id: "x".repeat(200), ..message("demo/all", "x", 1) }, 0.0), "message.id"),
    ] {
        let status = cluster.registry().await.start_broadcast(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(says), "{status}");
    }
    cluster.stop().await;
}
