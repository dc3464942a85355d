//! How a node comes to its cluster: a blank one founds one or asks to be taken in, one that was away finds out whether it
//! is still what it was.
//!
//! A cluster is founded by the first of the configured peers (in the order of their names), with all of them as voters from
//! the first entry on, and only when every other peer has answered that it is blank: a founder that has lost its disk
//! finds the others with a log, and joins them like everyone else. So nothing is acknowledged that only the founder has.
//!
//! A node that a cluster has claimed (`member add`) founds none, and none is founded with it, also when nothing came of the
//! claim: it would be a second cluster of the same id. It waits until a member takes it in.

use std::collections::BTreeMap;
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
    /// Another process with its id runs at this address: its disk is a copy.
    Twice { address: String },
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
    // Where only this node itself has been there is nobody to wait for.
    let was_here = |address: &String| found.members.iter().any(|(id, at)| *id == own && at == address);
    let is_alone = addresses.iter().all(was_here);
    loop {
        let asked = addresses.iter().map(|address| identify(network, address, true));
        let answers = futures::future::join_all(asked).await;
        // This one does not serve yet: whoever says that he is this node is another process.
        let mut others = addresses.iter().zip(&answers);
        if let Some((address, _)) =
            others.find(|(_, answer)| answer.as_ref().is_ok_and(|answer| answer.node_id == own))
        {
            return Standing::Twice { address: address.clone() };
        }
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
        if is_alone || Instant::now() + PAUSE >= deadline {
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
        let (mut missing, mut members, mut blank) = (Vec::new(), Vec::new(), Vec::new());
        for (address, answer) in others.iter().zip(answers) {
            match answer {
                Ok(answer) if answer.initialized => members.push((*address, answer)),
                // It may have been told already which cluster it is to be of, by a founding that was interrupted.
                Ok(answer) => blank.push((*address, answer)),
                Err(status) => missing.push(format!("{address} ({})", status.message())),
            }
        }
        let claimed = blank.iter().find(|(_, answer)| answer.claimed).map(|(address, _)| (*address).clone());
        let known = core.node.identity().cluster();
        let told = members.iter().chain(&blank).filter(|(_, answer)| !answer.cluster_id.is_empty());
        let first_told = told.clone().next().map(|(_, answer)| answer.cluster_id.clone());
        let expected = known.as_deref().or(cluster).or(first_told.as_deref());
        for (address, answer) in told {
            if expected.is_some_and(|expected| *expected != answer.cluster_id) {
                return Err(KeeperError::OtherCluster {
                    peer: (*address).clone(),
                    found: answer.cluster_id.clone(),
                    expected: expected.unwrap_or_default().to_owned(),
                });
            }
        }
        let waits_for = match members.first() {
            Some(_) => {
                let mut outcome = Ok(());
                for (address, answer) in &members {
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
            None if home.is_claimed() => {
                let cluster = known.as_deref().map(|id| format!(" {id}")).unwrap_or_default();
                format!(
                    "cluster{cluster}, which has claimed this node: add it again (member add), or name a member in --peers; if that cluster is gone, start this node with an empty directory"
                )
            }
            None if let Some(address) = claimed => {
                format!("the cluster that has claimed the keeper at {address}: none is founded with that one")
            }
            // An id that is there already is from a founding that was interrupted: nobody has a log, so nothing was decided.
            None if may_found && missing.is_empty() => {
                let _not_claimed = home.founding().lock().await;
                if home.is_claimed() {
                    continue;
                }
                let new = uuid::Uuid::new_v4().to_string();
                let cluster = expected.unwrap_or(&new);
                home.settle(cluster)?;
                match adopt(core.node.network(), &blank, cluster).await {
                    Ok(mut members) => {
                        members.insert(core.node.id(), own.to_owned());
                        let voters = members.len();
                        if core.node.found(members).await? {
                            tracing::info!(
                                cluster,
                                node = node_text(core.node.id()),
                                voters,
                                "new cluster founded"
                            );
                            continue;
                        }
                        "the founding that this node has voted in; nothing was decided, so if its founder is lost, start this node with an empty directory".to_owned()
                    }
                    Err(status) => format!("all peers to be of the new cluster ({})", status.message()),
                }
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

/// Tells blank nodes which cluster they are of. Gives their ids and addresses.
async fn adopt(
    network: &Network,
    blank: &[(&String, v1::IdentifyResponse)],
    cluster: &str,
) -> Result<BTreeMap<u64, String>, Status> {
    let told = blank.iter().map(|(address, answer)| async move {
        let request =
            v1::AdoptRequest { cluster_id: cluster.to_owned(), node_id: answer.node_id, claim: false };
        network.stranger(address)?.adopt(within(ASK_TIMEOUT, request)).await?;
        Ok((answer.node_id, (*address).clone()))
    });
    futures::future::try_join_all(told).await.map(|members| members.into_iter().collect())
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
