//! `carillon keeper status`, `member` and `snapshot`.

use std::io::Write as _;
use std::path::Path;

use carillon_agent::admin::{Admin, AdminError, KeeperStatus, Member, Protection};
use carillon_agent::tls::scheme;
use carillon_keeper::snapshot::{self, SnapshotInfo};
use serde::Serialize;

use super::config::{admin, tls};
use super::{CliError, print};
use crate::args::KeeperClientArgs;
use crate::args::keeper::{KeeperCommand, MemberCommand, SnapshotCommand};
use crate::data_dir::DataDir;

pub async fn run(command: KeeperCommand) -> Result<(), CliError> {
    match command {
        KeeperCommand::Status { keeper } => status(&keeper).await,
        KeeperCommand::Member(command) => member(command).await,
        KeeperCommand::Snapshot(command) => snapshot(command).await,
    }
}

/// A member, and what it says of itself.
#[derive(Serialize)]
struct Reported {
    #[serde(flatten)]
    member: Member,
    /// None: it does not answer.
    status: Option<KeeperStatus>,
    error: Option<String>,
}

async fn status(keeper: &KeeperClientArgs) -> Result<(), CliError> {
    let (members, tls) = (admin(keeper)?.members().await?, tls(keeper)?);
    let asked = members.into_iter().map(async |member| {
        let url = format!("{}://{}", scheme(tls.as_ref()), member.address);
        let answer = Admin::secured(vec![url], tls.clone()).status().await;
        match answer {
            Ok(status) => Reported { member, status: Some(status), error: None },
            Err(error) => {
                let error = match error {
                    AdminError::Unreachable { reason, .. } => reason,
                    other => other.to_string(),
                };
                Reported { member, status: None, error: Some(error) }
            }
        }
    });
    let reported = futures::future::join_all(asked).await;
    print(keeper.people.output, &reported, |reported| {
        let mut lines = Vec::new();
        if let Some(status) = reported.iter().find_map(|one| one.status.as_ref()) {
            lines.push(format!("cluster   {}", status.cluster_id));
            lines.push(format!("revision  {}", status.revision));
            lines.push(format!(
                "store     {} keys, {} of {} bytes, {} leases",
                status.keys, status.bytes, status.quota_bytes, status.leases
            ));
        }
        for one in reported {
            let role = role(&one.member);
            let text = match (&one.status, &one.error) {
                (Some(status), _) => format!(
                    "term {}  log {}  committed {}  applied {}  snapshot {}  pending {}  on disk {} kB  fsync {:.1} ms  {} watches{}  {}{}",
                    status.term,
                    status.last_log_index,
                    status.committed_index,
                    status.applied_index,
                    status.snapshot_index,
                    status.proposals_pending,
                    (status.log_bytes + status.snapshot_bytes) / 1024,
                    status.fsync_us as f64 / 1000.0 / status.fsyncs.max(1) as f64,
                    status.watches,
                    one.member
                        .round_trip_us
                        .map_or_else(String::new, |us| format!("  round trip {:.1} ms", us as f64 / 1000.0)),
                    protection(status.protection),
                    if status.in_touch { "" } else { "  OUT OF TOUCH" },
                ),
                (None, error) => format!("DOES NOT ANSWER: {}", error.as_deref().unwrap_or_default()),
            };
            lines.push(format!("{}  {:<8}  {:<21}  {text}", one.member.node, role, one.member.address));
        }
        lines.join("\n")
    })
}

/// How it is reached.
fn protection(protection: Protection) -> &'static str {
    match protection {
        Protection::Tls => "TLS",
        Protection::Loopback => "no TLS (this machine alone)",
        Protection::Open => "NO TLS: WHOEVER REACHES IT MAY CHANGE EVERYTHING",
        Protection::Unknown => "of a version that does not say whether it has TLS",
    }
}

fn role(member: &Member) -> &'static str {
    match (member.leads, member.voter) {
        (true, _) => "leader",
        (false, true) => "follower",
        (false, false) => "learner",
    }
}

async fn member(command: MemberCommand) -> Result<(), CliError> {
    match command {
        MemberCommand::List { keeper } => {
            let members = admin(&keeper)?.members().await?;
            print(keeper.people.output, &members, |members| {
                let line = |member: &Member| {
                    let heard = match member.heard_ms {
                        Some(0) => "here".to_owned(),
                        Some(ms) => format!("heard {ms} ms ago"),
                        None => "not heard".to_owned(),
                    };
                    let (node, address, at) = (&member.node, &member.address, member.matched_index);
                    format!("{node}  {:<8}  {address:<21}  on disk {at}  {heard}", role(member))
                };
                members.iter().map(line).collect::<Vec<_>>().join("\n")
            })
        }
        MemberCommand::Add { address, keeper } => {
            let node = admin(&keeper)?.add_member(&address).await?;
            print(keeper.people.output, &node, |node| {
                format!("keeper {node} at {address} is taken in; it gets a vote when it has caught up")
            })
        }
        MemberCommand::Remove { node, keeper } => {
            admin(&keeper)?.remove_member(node).await?;
            print(keeper.people.output, &format!("{node:016x}"), |node| format!("keeper {node} is taken out"))
        }
        MemberCommand::Transfer { node, keeper } => {
            let leader = admin(&keeper)?.transfer_lead(node).await?;
            print(keeper.people.output, &leader, |leader| format!("keeper {leader} leads"))
        }
    }
}

async fn snapshot(command: SnapshotCommand) -> Result<(), CliError> {
    let failed = |error: snapshot::SnapshotError| CliError::Failed(error.to_string());
    match command {
        SnapshotCommand::Save { file, keeper } => {
            let admin = admin(&keeper)?;
            let cluster = admin.status().await?.cluster_id;
            let bytes = admin.save_snapshot().await?;
            save(&file, &bytes)?;
            let info = snapshot::inspect(&file).map_err(failed)?;
            print(keeper.people.output, &info, |info| {
                format!("cluster    {cluster}\n{}\nsaved to {}", describe(info), file.display())
            })
        }
        SnapshotCommand::Inspect { file, output } => {
            print(output, &snapshot::inspect(&file).map_err(failed)?, describe)
        }
        SnapshotCommand::Restore { file, data_dir, cluster, advertise_grpc, output } => {
            // Looked at first, so that nothing is made for a file that is of no use.
            snapshot::inspect(&file).map_err(failed)?;
            let data_dir =
                DataDir::open(&data_dir, "keeper").map_err(|error| CliError::Failed(error.to_string()))?;
            let into = data_dir.path().join("keeper");
            let info = snapshot::restore(&file, &into, &cluster, &advertise_grpc).await.map_err(failed)?;
            print(output, &info, |info| {
                format!(
                    "{}\nrestored: start it with\n  carillon keeper --data-dir {} --grpc ADDRESS --advertise-grpc {}\n\
                     others join with an empty data directory, when they name it among their --peers",
                    describe(info),
                    data_dir.path().display(),
                    advertise_grpc,
                )
            })
        }
    }
}

/// Under another name first: a file of that name is always a whole one.
fn save(file: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let failed =
        |error: std::io::Error| CliError::Failed(format!("cannot write {}: {error}", file.display()));
    let mut new = file.as_os_str().to_owned();
    new.push(".new");
    let mut out = std::fs::File::create(&new).map_err(failed)?;
    out.write_all(bytes).and_then(|()| out.sync_all()).map_err(failed)?;
    std::fs::rename(&new, file).map_err(failed)
}

fn describe(info: &SnapshotInfo) -> String {
    let members: Vec<String> =
        info.members.iter().map(|(node, address)| format!("{node} at {address}")).collect();
    format!(
        "revision   {} (changes are kept after {})\nentry      {} of term {}\nkeys       {}, {} bytes, {} leases\n\
         documents  {}\ninstances  {}\nmembers    {}",
        info.revision,
        info.compacted_revision,
        info.index,
        info.term,
        info.keys,
        info.bytes,
        info.leases,
        if info.documents.is_empty() { "none".to_owned() } else { info.documents.join(", ") },
        info.instances.len(),
        members.join(", "),
    )
}
