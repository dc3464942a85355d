//! Snapshots as files: what one holds, and a new cluster made of one when the old is lost as a whole. Neither needs a
//! keeper that runs.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use carillon_agent::keys;
use carillon_proto::v1;
use carillon_proto::v1::op::Put;
use prost::Message as _;

use crate::home::{Home, HomeError};
use crate::identity::node_text;
use crate::raft::{SnapshotFile, Storage};
use crate::slots::Assignment;

/// 1 January 2025, Unix time in microseconds: no clock that is right says less.
const EARLIEST_US: u64 = 1_735_689_600_000_000;

/// What a snapshot says of these is not so any more: commands, which would be carried out a second time, and whose store is the
/// saver, which may have been given up since; whoever is it by now claims it again.
const FORGOTTEN: [&str; 2] = [keys::COMMANDS, keys::SAVER];

/// Why a snapshot is of no use.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error("{} is a keeper's already: restore into an empty directory", path.display())]
    NotEmpty { path: PathBuf },
    #[error("{address:?} is not an address: it must be host:port")]
    Address { address: String },
    #[error("the slots in {} cannot be read: {error}", path.display())]
    Slots { path: PathBuf, error: prost::DecodeError },
    #[error(
        "the clock of this machine is wrong: it says {now_us} microseconds since 1970, which must be more than {newest}, the newest number of the snapshot: what is given out from now on has to be larger than all that was given out before"
    )]
    Clock { now_us: u64, newest: u64 },
}

/// What a snapshot holds.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct SnapshotInfo {
    /// Size of the file.
    pub file_bytes: u64,
    /// Index and term of the last entry in it.
    pub index: u64,
    pub term: u64,
    pub revision: u64,
    pub compacted_revision: u64,
    pub keys: usize,
    /// Keys and values.
    pub bytes: usize,
    pub leases: usize,
    /// Documents of configuration, by name.
    pub documents: Vec<String>,
    pub instances: Vec<String>,
    /// Members at that time: id and address.
    pub members: BTreeMap<String, String>,
}

fn read(path: &Path) -> Result<(u64, SnapshotFile), SnapshotError> {
    let io = |source| SnapshotError::Io { path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(io)?;
    Ok((bytes.len() as u64, SnapshotFile::parse(bytes).map_err(io)?))
}

/// Checks a snapshot, and says what it holds.
pub fn inspect(path: &Path) -> Result<SnapshotInfo, SnapshotError> {
    let (file_bytes, file) = read(path)?;
    let state = file.state();
    let below = |prefix: &'static str| -> Vec<String> {
        let keys = state.prefix(prefix).filter_map(|(key, _)| key.strip_prefix(prefix));
        keys.map(str::to_owned).collect()
    };
    let (term, index) = file.place();
    Ok(SnapshotInfo {
        file_bytes,
        index,
        term,
        revision: state.revision(),
        compacted_revision: state.compacted(),
        keys: state.len(),
        bytes: state.bytes(),
        leases: state.lease_count(),
        documents: below(keys::CONFIG),
        instances: below(keys::INSTANCES),
        members: file.members().into_iter().map(|(id, address)| (node_text(id), address)).collect(),
    })
}

/// Raises what fences: epochs of slots, tokens of leases, and revisions, to above all that the lost cluster may have given
/// out since the snapshot, or one that was restored from it before. That is the time in microseconds: none of these
/// numbers grows by a million a second, and it fits where numbers must be exact in JSON (2^53) until the year 2255.
fn raise(path: &Path, file: &mut SnapshotFile, now_us: u64) -> Result<(), SnapshotError> {
    let state = file.state_mut();
    let slots = state.get(keys::SLOTS).map(|item| v1::SlotRecord::decode(item.value.clone())).transpose();
    let slots = slots.map_err(|error| SnapshotError::Slots { path: path.to_owned(), error })?;
    let slots = slots.as_ref().map(Assignment::from_record);
    let newest = slots.as_ref().map_or(0, Assignment::newest).max(state.newest()).max(EARLIEST_US);
    if now_us <= newest {
        return Err(SnapshotError::Clock { now_us, newest });
    }
    let slots = slots.map(|slots| Put {
        key: keys::SLOTS.to_owned(),
        value: slots.under(now_us).to_record().encode_to_vec().into(),
        lease: 0,
    });
    state.raise(now_us, slots.as_slice(), &FORGOTTEN);
    Ok(())
}

/// Makes a data directory of a snapshot: that of a new node, alone in its cluster, which others can then join. The
/// cluster keeps its id, so that everything that knew it goes on; members of the old one that turn up start over.
pub async fn restore(
    path: &Path,
    data_dir: &Path,
    cluster: &str,
    address: &str,
) -> Result<SnapshotInfo, SnapshotError> {
    if address.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
        return Err(SnapshotError::Address { address: address.to_owned() });
    }
    let info = inspect(path)?;
    let io = |source| SnapshotError::Io { path: data_dir.to_owned(), source };
    if data_dir.exists()
        && fs::read_dir(data_dir)
            .map_err(io)?
            .any(|entry| entry.map_or(true, |entry| entry.file_name() != "lost+found"))
    {
        return Err(SnapshotError::NotEmpty { path: data_dir.to_owned() });
    }
    let (_, mut file) = read(path)?;
    let now_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros());
    raise(path, &mut file, u64::try_from(now_us).unwrap_or(u64::MAX))?;
    let home = Home::open(data_dir, None)?;
    let node = home.identity().node_id();
    Storage::restore(data_dir, file, node, address).await.map_err(io)?;
    // Last: a directory without it is a blank node's, and what lies in it is put away.
    home.settle(cluster)?;
    Ok(info)
}

#[cfg(test)]
mod tests;
