//! The state machine as openraft drives it: the state in memory, snapshots of it on disk.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::{Stream, TryStreamExt as _};
use openraft::OptionalSend;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use prometheus::Histogram;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

use super::types::{Applied, LogId, Payload, Snapshot, SnapshotMeta, StoredMembership, TypeConfig, Vote};
use crate::interests::Interests;
use crate::metrics;
use crate::state::State;

/// Begins every snapshot file; then the checksum (XXH3, 8 bytes, big-endian) of the rest; then the state.
const MAGIC: &[u8; 8] = b"CARKSNP1";

/// The state, and how far it has come.
#[derive(Debug, Clone, Default)]
struct Machinery {
    state: State,
    applied: Option<LogId>,
    membership: StoredMembership,
}

/// What openraft needs back from a snapshot.
#[derive(Serialize, Deserialize)]
struct RaftMeta {
    applied: Option<LogId>,
    membership: StoredMembership,
}

/// A cheap handle.
#[derive(Clone)]
pub(crate) struct Machine {
    inner: Arc<Inner>,
}

struct Inner {
    machinery: RwLock<Machinery>,
    /// The state's revision, for whoever waits for any change …
    revision: watch::Sender<u64>,
    /// … and for whoever waits for some: these are told first.
    interests: Interests,
    /// Index of the last entry that the state holds.
    applied: watch::Sender<u64>,
    directory: PathBuf,
    /// Of the snapshot on disk; the lock is held while the file is replaced.
    on_disk: Mutex<Option<SnapshotMeta>>,
    /// How long snapshots take.
    seconds: Histogram,
}

impl Machine {
    /// Loads the snapshot in `directory`, if there is one.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        // Left behind by a crash in the middle of writing; never of use.
        match fs::remove_file(directory.join("new")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let (machinery, on_disk) = match read_snapshot(directory)? {
            Some(body) => {
                let machinery = decode(&body)?;
                let meta = machinery.meta();
                (machinery, Some(meta))
            }
            None => (Machinery::default(), None),
        };
        Ok(Machine {
            inner: Arc::new(Inner {
                revision: watch::Sender::new(machinery.state.revision()),
                interests: Interests::default(),
                applied: watch::Sender::new(machinery.applied_index()),
                machinery: RwLock::new(machinery),
                directory: directory.to_owned(),
                on_disk: Mutex::new(on_disk),
                seconds: Histogram::with_opts(metrics::seconds(metrics::SNAPSHOT_SECONDS))
                    .map_err(io::Error::other)?,
            }),
        })
    }

    pub(crate) fn state(&self) -> impl std::ops::Deref<Target = State> {
        RwLockReadGuard::map(self.inner.machinery.read(), |machinery| &machinery.state)
    }

    pub(crate) fn revision(&self) -> watch::Receiver<u64> {
        self.inner.revision.subscribe()
    }

    /// Who waits for which changes.
    pub(crate) fn interests(&self) -> &Interests {
        &self.inner.interests
    }

    /// Wakes those who wait for changes.
    pub(crate) fn wake(&self) {
        self.inner.interests.touch_all();
        self.inner.revision.send_modify(|_| ());
    }

    /// Index of the last entry that the state holds, as it grows.
    pub(crate) fn applied(&self) -> watch::Receiver<u64> {
        self.inner.applied.subscribe()
    }

    pub(super) fn applied_id(&self) -> Option<LogId> {
        self.inner.machinery.read().applied
    }

    /// How long snapshots take.
    pub(super) fn seconds(&self) -> &Histogram {
        &self.inner.seconds
    }

    /// Size of the snapshot's file; 0: there is none.
    pub(super) fn disk_bytes(&self) -> u64 {
        fs::metadata(self.inner.directory.join("current")).map_or(0, |file| file.len())
    }

    /// The state as it is now, as a snapshot's file.
    pub(crate) fn file(&self) -> io::Result<Vec<u8>> {
        let body = self.inner.machinery.read().clone().encode()?;
        let mut file = Vec::with_capacity(body.len() + 16);
        file.extend_from_slice(MAGIC);
        file.extend_from_slice(&xxh3_64(&body).to_be_bytes());
        file.extend_from_slice(&body);
        Ok(file)
    }

    /// Writes a snapshot, unless a newer one is there already.
    fn store(&self, meta: &SnapshotMeta, body: &[u8]) -> io::Result<()> {
        let mut on_disk = self.inner.on_disk.lock();
        if on_disk.as_ref().is_some_and(|present| present.last_log_id > meta.last_log_id) {
            return Ok(());
        }
        write_snapshot(&self.inner.directory, body)?;
        *on_disk = Some(meta.clone());
        Ok(())
    }
}

impl Machinery {
    fn applied_index(&self) -> u64 {
        self.applied.map_or(0, |id| id.index)
    }

    fn meta(&self) -> SnapshotMeta {
        SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() }
    }

    fn encode(&self) -> io::Result<Vec<u8>> {
        let meta = RaftMeta { applied: self.applied, membership: self.membership.clone() };
        Ok(self.state.encode(serde_json::to_vec(&meta)?))
    }
}

fn decode(body: &[u8]) -> io::Result<Machinery> {
    let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidData, format!("the snapshot {error}"));
    let (state, meta) = State::decode(body).map_err(|error| invalid(error.to_string()))?;
    let meta: RaftMeta =
        serde_json::from_slice(&meta).map_err(|error| invalid(format!("has a broken head: {error}")))?;
    Ok(Machinery { state, applied: meta.applied, membership: meta.membership })
}

fn read_snapshot(directory: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(directory.join("current")) {
        Ok(bytes) => checked(bytes).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The body of a snapshot's file.
fn checked(mut bytes: Vec<u8>) -> io::Result<Vec<u8>> {
    let invalid =
        |text: &str| Err(io::Error::new(io::ErrorKind::InvalidData, format!("the snapshot {text}")));
    if bytes.len() < 16 || &bytes[..8] != MAGIC {
        return invalid("is not one of this version");
    }
    if bytes[8..16] != xxh3_64(&bytes[16..]).to_be_bytes() {
        return invalid("is damaged: its checksum does not match");
    }
    bytes.drain(..16);
    Ok(bytes)
}

/// A snapshot's file that was read, outside of a running node.
pub(crate) struct SnapshotFile {
    machinery: Machinery,
}

impl SnapshotFile {
    pub(crate) fn parse(bytes: Vec<u8>) -> io::Result<Self> {
        Ok(SnapshotFile { machinery: decode(&checked(bytes)?)? })
    }

    /// What is sent from node to node: no head, no checksum.
    pub(crate) fn of_body(body: &[u8]) -> io::Result<Self> {
        Ok(SnapshotFile { machinery: decode(body)? })
    }

    pub(crate) fn state(&self) -> &State {
        &self.machinery.state
    }

    pub(crate) fn state_mut(&mut self) -> &mut State {
        &mut self.machinery.state
    }

    /// Term and index of its last entry.
    pub(crate) fn place(&self) -> (u64, u64) {
        self.machinery.applied.map_or((0, 0), |id| (id.leader_id.term, id.index))
    }

    /// Id and address of each member.
    pub(crate) fn members(&self) -> Vec<(u64, String)> {
        let nodes = self.machinery.membership.membership().nodes();
        nodes.map(|(&id, node)| (id, node.addr.clone())).collect()
    }

    /// Writes it as the snapshot of a node that is its only member. Returns the vote that goes with it.
    pub(super) fn write_alone(mut self, directory: &Path, node: u64, address: &str) -> io::Result<Vote> {
        let nodes = std::collections::BTreeMap::from([(node, openraft::BasicNode::new(address))]);
        let membership = openraft::Membership::new(vec![[node].into()], nodes).map_err(io::Error::other)?;
        let applied = self.machinery.applied.ok_or_else(|| io::Error::other("the snapshot is empty"))?;
        self.machinery.membership = StoredMembership::new(Some(applied), membership);
        fs::create_dir_all(directory)?;
        write_snapshot(directory, &self.machinery.encode()?)?;
        Ok(Vote { leader_id: super::types::leader_id(applied.leader_id.term, node), committed: false })
    }
}

/// On disk under another name, then renamed: there is always one whole snapshot.
fn write_snapshot(directory: &Path, body: &[u8]) -> io::Result<()> {
    let new = directory.join("new");
    let mut file = File::create(&new)?;
    file.write_all(MAGIC)?;
    file.write_all(&xxh3_64(body).to_be_bytes())?;
    file.write_all(body)?;
    file.sync_all()?;
    fs::rename(&new, directory.join("current"))?;
    File::open(directory)?.sync_all()
}

/// Tells those who wait for changes how far it has come.
struct Changed<'a> {
    inner: &'a Inner,
    /// The revision before it.
    before: u64,
    /// Index of the last entry, and the revision after it.
    applied: Option<(u64, u64)>,
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        let Some((index, revision)) = self.applied else { return };
        self.inner.applied.send_replace(index);
        match self.inner.machinery.read().state.changed_after(self.before) {
            Some(changes) => self.inner.interests.touch(changes),
            None => self.inner.interests.touch_all(),
        }
        self.inner.revision.send_if_modified(|present| std::mem::replace(present, revision) != revision);
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Machine {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        // The clone shares the values; encoding and writing them needs no lock.
        let machinery = self.inner.machinery.read().clone();
        let machine = self.clone();
        let work = move || {
            let begun = Instant::now();
            let (meta, body) = (machinery.meta(), machinery.encode()?);
            machine.store(&meta, &body)?;
            machine.inner.seconds.observe(begun.elapsed().as_secs_f64());
            tracing::debug!(
                index = meta.last_log_id.map(|id| id.index),
                bytes = body.len(),
                "snapshot written"
            );
            Ok(Snapshot { meta, snapshot: body })
        };
        crate::blocking::run(work).await.map_err(io::Error::other)?
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let machinery = self.inner.machinery.read();
        Ok((machinery.applied, machinery.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        // Told once for all of them, and if reading the log fails in between, for those before.
        let before = self.inner.machinery.read().state.revision();
        let mut changed = Changed { inner: &self.inner, before, applied: None };
        while let Some((entry, responder)) = entries.try_next().await? {
            let applied = {
                let mut machinery = self.inner.machinery.write();
                machinery.applied = Some(entry.log_id);
                let applied = match entry.payload {
                    Payload::Blank => Applied::default(),
                    Payload::Normal(content) => Applied(machinery.state.apply(&content.0)),
                    Payload::Membership(membership) => {
                        machinery.membership = StoredMembership::new(Some(entry.log_id), membership);
                        Applied::default()
                    }
                };
                changed.applied = Some((entry.log_id.index, machinery.state.revision()));
                applied
            };
            if let Some(responder) = responder {
                responder.send(applied);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Vec<u8>) -> Result<(), io::Error> {
        let machine = self.clone();
        let meta = meta.clone();
        let work = move || {
            let machinery = decode(&snapshot)?;
            machine.store(&meta, &snapshot)?;
            let revision = machinery.state.revision();
            *machine.inner.machinery.write() = Machinery {
                state: machinery.state,
                applied: meta.last_log_id,
                membership: meta.last_membership,
            };
            machine.inner.applied.send_replace(meta.last_log_id.map_or(0, |id| id.index));
            machine.inner.interests.touch_all();
            machine.inner.revision.send_replace(revision);
            Ok(())
        };
        crate::blocking::run(work).await.map_err(io::Error::other)?
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let machine = self.clone();
        let work = move || {
            let on_disk = machine.inner.on_disk.lock();
            let Some(meta) = on_disk.clone() else { return Ok(None) };
            let body = read_snapshot(&machine.inner.directory)?;
            Ok(body.map(|snapshot| Snapshot { meta, snapshot }))
        };
        crate::blocking::run(work).await.map_err(io::Error::other)?
    }
}
