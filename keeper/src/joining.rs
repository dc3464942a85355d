//! How a node comes to its cluster: a blank one founds one or asks to be taken in, one that was away finds out whether it
//! is still what it was.
//!
//! A cluster is founded by the first of the configured peers (in the order of their names), alone, and only when every
//! other peer has answered that it is blank: a founder that has lost its disk finds the others initialized, and joins
//! them like everyone else.

use std::time::Duration;

use carillon_proto::v1;
use tokio::time::{Instant, sleep};
use tonic::Status;

use crate::KeeperError;
use crate::core::Core;
use crate::home::Home;
use crate::identity::node_text;
use crate::raft::Found;
use crate::raft::network::{Network, within};

const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Taking a node in may mean taking its predecessor out first.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two rounds of asking.
const PAUSE: Duration = Duration::from_millis(300);
/// What is waited for is said again after this.
const REMIND: Duration = Duration::from_secs(10);
/// A node that was away asks the others for so long about itself; then it goes on with what it knows.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(3);

/// A node whose disk is damaged waits so long for the others to have a leader.
const LEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// What has become of a node while it was away.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Nothing that is known.
    AsBefore,
    /// It was taken out.
    Removed,
    /// Its disk is older than what it has confirmed to the leader.
    Stale { confirmed: u64, found: u64 },
}

async fn identify(network: &Network, address: &str, confirm: bool) -> Result<v1::IdentifyResponse, Status> {
    let mut client = network.stranger(address)?;
    let answer = client.identify(within(ASK_TIMEOUT, v1::IdentifyRequest { confirm })).await?;
    Ok(answer.into_inner())
}

/// Asks the leader about this node, before it takes part again.
pub(crate) async fn standing(
    network: &Network,
    own: u64,
    cluster: &str,
    found: &Found,
    addresses: &[String],
) -> Standing {
    let deadline = Instant::now() + VERIFY_TIMEOUT;
    loop {
        let asked = addresses.iter().map(|address| identify(network, address, true));
        let answers = futures::future::join_all(asked).await;
        for answer in answers.into_iter().flatten() {
            if answer.cluster_id != cluster || !answer.confirmed {
                continue;
            }
            let last = found.last_log.unwrap_or((0, 0));
            return match answer.members.iter().find(|member| member.node_id == own) {
                None => Standing::Removed,
                Some(member) if (member.matched_term, member.matched_index) > last => {
                    Standing::Stale { confirmed: member.matched_index, found: last.1 }
                }
                Some(_) => Standing::AsBefore,
            };
        }
        // Nobody leads, or nobody is up yet: everything may be starting at once.
        if Instant::now() + PAUSE >= deadline {
            return Standing::AsBefore;
        }
        sleep(PAUSE).await;
    }
}

/// Does the cluster go on without this node, which does not run? Only then is it certain that it can be replaced.
pub(crate) async fn goes_on(network: &Network, cluster: &str, others: &[String]) -> bool {
    let deadline = Instant::now() + LEADER_TIMEOUT;
    loop {
        let asked = others.iter().map(|address| identify(network, address, true));
        let mut answers = futures::future::join_all(asked).await.into_iter().flatten();
        if answers.any(|answer| answer.confirmed && answer.cluster_id == cluster) {
            return true;
        }
        if Instant::now() + PAUSE >= deadline {
            return false;
        }
        sleep(PAUSE).await;
    }
}

/// Brings a blank node into a cluster: one that it founds, or one that takes it in. Returns when it belongs to one.
pub(crate) async fn join(
    core: &Core,
    home: &Home,
    own: &str,
    peers: &[String],
    cluster: Option<&str>,
) -> Result<(), KeeperError> {
    let others: Vec<&String> = peers.iter().filter(|peer| *peer != own).collect();
    // Whatever the order in which each was told of them.
    let first = peers.iter().min();
    let may_found = first.is_none_or(|first| first == own);
    let mut reminded: Option<Instant> = None;
    while !core.node.is_initialized().await.map_err(|error| KeeperError::Node(error.to_string()))? {
        let asked = others.iter().map(|address| identify(core.node.network(), address, false));
        let answers = futures::future::join_all(asked).await;
        let (mut missing, mut members) = (Vec::new(), Vec::new());
        for (address, answer) in others.iter().zip(answers) {
            match answer {
                // One that belongs to a cluster is not blank, whatever it has.
                Ok(answer) if answer.initialized || !answer.cluster_id.is_empty() => {
                    members.push((*address, answer));
                }
                Ok(_) => {}
                Err(status) => missing.push(format!("{address} ({})", status.message())),
            }
        }
        let known = core.node.identity().cluster();
        let expected = known.as_deref().or(cluster);
        if let Some((address, answer)) =
            members.iter().find(|(_, answer)| expected.is_some_and(|expected| *expected != answer.cluster_id))
        {
            return Err(KeeperError::OtherCluster {
                peer: (*address).clone(),
                found: answer.cluster_id.clone(),
                expected: expected.unwrap_or_default().to_owned(),
            });
        }
        let waits_for = match members.first() {
            Some((_, first)) => {
                let mut outcome = Ok(());
                for (address, answer) in &members {
                    if answer.cluster_id != first.cluster_id {
                        return Err(KeeperError::OtherCluster {
                            peer: (*address).clone(),
                            found: answer.cluster_id.clone(),
                            expected: first.cluster_id.clone(),
                        });
                    }
                    outcome = tokio::select! {
                        outcome = ask_to_be_taken_in(core, address, &answer.cluster_id, own) => outcome,
                        () = core.stop.cancelled() => return Ok(()),
                    };
                    if outcome.is_ok() {
                        break;
                    }
                }
                match outcome {
                    Ok(()) => "the first entries of the cluster".to_owned(),
                    Err(status) => format!("a keeper that takes this one in ({})", status.message()),
                }
            }
            // An id that is there already is from a founding that was interrupted: who took this node in would be a member.
            None if may_found && missing.is_empty() => {
                let new = uuid::Uuid::new_v4().to_string();
                home.settle(expected.unwrap_or(&new))?;
                core.node.found(own).await?;
                tracing::info!(
                    cluster = core.node.identity().cluster().as_deref(),
                    node = node_text(core.node.id()),
                    "new cluster founded"
                );
                continue;
            }
            None if may_found => {
                format!("all peers to answer before founding a cluster: {}", missing.join(", "))
            }
            None => format!("{} to found the cluster", first.map_or("", String::as_str)),
        };
        if reminded.is_none_or(|reminded| reminded.elapsed() > REMIND) {
            tracing::info!("waiting for {waits_for}");
            reminded = Some(Instant::now());
        }
        tokio::select! {
            () = sleep(PAUSE) => {}
            () = core.stop.cancelled() => return Ok(()),
        }
    }
    Ok(())
}

/// Asks a member to have the leader take in the node at `own`.
async fn ask_to_be_taken_in(core: &Core, member: &str, cluster: &str, own: &str) -> Result<(), Status> {
    let mut client = core.node.network().stranger(member)?;
    let join = v1::JoinRequest { address: own.to_owned(), node_id: core.node.id() };
    let mut request = within(JOIN_TIMEOUT, join);
    // This node is of no cluster yet, so that it has to be said here.
    let cluster = cluster.parse().map_err(|_| Status::internal("a cluster id that is not ASCII"))?;
    request.metadata_mut().insert(crate::identity::CLUSTER_METADATA, cluster);
    client.join(request).await.map(drop)
}
