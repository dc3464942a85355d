//! Sessions: who is online, take-over, kick.

use carillon_proto::v1::{self, attach_up, kick_session::Reason};

use crate::harness::{Cluster, eventually, online};

async fn sessions(cluster: &Cluster, user: &str) -> Vec<String> {
    let request = v1::SessionsRequest { app: "demo".into(), user: user.into() };
    let reply = cluster.registry().await.sessions(request).await.unwrap().into_inner();
    let mut sessions: Vec<_> = reply
        .sessions
        .into_iter()
        .map(|one| format!("{}@{} {}", one.session.unwrap().client_id, one.gateway, one.address))
        .collect();
    sessions.sort();
    sessions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sessions_are_shown_taken_over_and_kicked() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let mut one = cluster.attach("g1").await;
    let mut two = cluster.attach("g2").await;
    one.session(online("alice", "phone", 5)).await;
    one.session(online("alice", "tablet", 6)).await;
    eventually("both are shown", async || {
        (sessions(&cluster, "alice").await == ["phone@g1 192.0.2.1:4000", "tablet@g1 192.0.2.1:4000"])
            .then_some(())
    })
    .await;
    two.session(online("alice", "phone", 1)).await;
    let kick = one.kicked().await;
    assert_eq!((kick.reason(), kick.connection), (Reason::TakenOver, 5));
    assert_eq!(kick.session.unwrap().client_id, "phone");

    let kick_all = v1::KickRequest { app: "demo".into(), user: "alice".into(), client_id: String::new() };
    let kicked = cluster.registry().await.kick(kick_all).await.unwrap().into_inner().kicked;
    assert_eq!(kicked, 2);
    let (first, second) = (one.kicked().await, two.kicked().await);
    assert_eq!((first.reason(), first.connection), (Reason::Administrative, 6));
    assert_eq!((second.reason(), second.connection), (Reason::Administrative, 1));
    two.session(v1::SessionChange { online: false, reason: "kicked".into(), ..online("alice", "phone", 1) })
        .await;
    drop(one);
    eventually("nobody is left", async || sessions(&cluster, "alice").await.is_empty().then_some(())).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn reports_of_gateways_are_shown() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let gateway = cluster.attach("g1").await;
    let report = v1::GatewayReport { connections: 17, ..v1::GatewayReport::default() };
    gateway.send(attach_up::Body::Report(report)).await;
    let owners = cluster.owners();
    let shown = eventually("the report is shown", async || {
        let shown = owners.overview().await.unwrap();
        (!shown.is_empty()).then_some(shown)
    })
    .await;
    assert_eq!((shown.len(), shown[0].instance.as_str()), (1, "g1"));
    assert_eq!(shown[0].report.as_ref().unwrap().connections, 17);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn names_that_cannot_be_are_refused() {
    let cluster = Cluster::start(&[("demo", "")]).await;
    let request = v1::SessionsRequest { app: "demo".into(), user: "a/b".into() };
    let status = cluster.registry().await.sessions(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    let request = v1::KickRequest { app: "de/mo".into(), user: "a".into(), client_id: String::new() };
    let status = cluster.registry().await.kick(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    cluster.stop().await;
}
