//! The keeper's data directory: whose it is, which format it has, and that only one process uses it.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::RngExt as _;
use serde::{Deserialize, Serialize};

use crate::identity::{Identity, node_text};

/// Of everything in the directory; a keeper refuses any other.
const FORMAT: u32 = 1;
const IDENTITY: &str = "keeper.json";
const LOCK: &str = "lock";
/// What a node holds besides: consensus' own.
const PARTS: [&str; 2] = ["log", "snapshot"];
/// Where it is put when the node starts over; what was there from an earlier time is deleted.
const FORMER: &str = "former";

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    #[error("the keeper's data directory {} is in use by another process", path.display())]
    InUse { path: PathBuf },
    #[error("{} is not a keeper's data directory: it holds {found:?} but no {IDENTITY}", path.display())]
    Foreign { path: PathBuf, found: String },
    #[error("{} is damaged: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("{} has format {found}, this version knows format {FORMAT}: use the version that wrote it", path.display())]
    Format { path: PathBuf, found: u32 },
    #[error("{} belongs to cluster {found}, not to {expected}", path.display())]
    OtherCluster { path: PathBuf, found: String, expected: String },
    #[error("a cluster that exists has claimed this keeper: none is founded with it")]
    Claimed,
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Who this node is, as it is written; before anything else, and again when the cluster is known.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    format: u32,
    /// Empty: of none yet.
    cluster_id: String,
    /// Random: never an ordinal, so that a node which has lost its disk is another node.
    node_id: u64,
    /// A cluster that exists has taken it in, or had the node that was here before: this one never founds one. A second of
    /// the same id would come of it, if the first lost sight of the node before it was a member.
    #[serde(default)]
    claimed: bool,
}

impl Record {
    fn new(claimed: bool) -> Self {
        let node_id = rand::rng().random_range(1..=u64::MAX);
        Record { format: FORMAT, cluster_id: String::new(), node_id, claimed }
    }

    fn identity(&self) -> Arc<Identity> {
        let cluster = (!self.cluster_id.is_empty()).then_some(self.cluster_id.as_str());
        Arc::new(Identity::new(self.node_id, cluster))
    }
}

/// An opened data directory. The lock is held until this is dropped.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
    identity: Arc<Identity>,
    claimed: AtomicBool,
    /// Held while the identity is written.
    settling: parking_lot::Mutex<()>,
    /// Held while this node founds a cluster, and while another claims it.
    founding: Arc<tokio::sync::Mutex<()>>,
    /// Kept open for its lock.
    _lock: File,
}

impl Home {
    /// Opens the directory; one that is empty or missing becomes a blank node's.
    pub(crate) fn open(path: &Path, expected_cluster: Option<&str>) -> Result<Home, HomeError> {
        let io = |source| HomeError::Io { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(io)?;
        // Looked at before the lock file is put there: a foreign directory is left as it is.
        let identity_path = path.join(IDENTITY);
        if !identity_path.exists() {
            refuse_foreign(path)?;
        }
        let lock =
            File::options().create(true).truncate(false).write(true).open(path.join(LOCK)).map_err(io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(HomeError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(io(error)),
        }
        let record = if identity_path.exists() {
            read(&identity_path)?
        } else {
            let record = Record::new(false);
            write(path, &record).map_err(io)?;
            tracing::info!(node = node_text(record.node_id), "a new keeper node");
            record
        };
        if record.cluster_id.is_empty() {
            // A node of no cluster has decided nothing: what lies there is empty, or was being put aside.
            set_aside(path).map_err(io)?;
        }
        match expected_cluster {
            Some(expected) if !record.cluster_id.is_empty() && expected != record.cluster_id => {
                Err(HomeError::OtherCluster {
                    path: path.to_owned(),
                    found: record.cluster_id,
                    expected: expected.to_owned(),
                })
            }
            _ => Ok(Home {
                path: path.to_owned(),
                identity: record.identity(),
                claimed: AtomicBool::new(record.claimed),
                settling: parking_lot::Mutex::new(()),
                founding: Arc::default(),
                _lock: lock,
            }),
        }
    }

    pub(crate) fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// Has a cluster that exists claimed this node, or the one that was here before?
    pub(crate) fn is_claimed(&self) -> bool {
        self.claimed.load(Ordering::SeqCst)
    }

    pub(crate) fn founding(&self) -> &Arc<tokio::sync::Mutex<()>> {
        &self.founding
    }

    /// Writes down which cluster is founded with this node. It never changes after that.
    pub(crate) fn settle(&self, cluster: &str) -> Result<(), HomeError> {
        self.write_cluster(cluster, false)
    }

    /// Writes down which cluster has claimed this node: it is founded already.
    pub(crate) fn claim(&self, cluster: &str) -> Result<(), HomeError> {
        self.write_cluster(cluster, true)
    }

    fn write_cluster(&self, cluster: &str, claim: bool) -> Result<(), HomeError> {
        let _one_at_a_time = self.settling.lock();
        let claimed = self.is_claimed();
        if claimed && !claim {
            return Err(HomeError::Claimed);
        }
        match self.identity.cluster() {
            Some(present) if *present == *cluster && claimed == claim => return Ok(()),
            Some(present) if *present != *cluster => {
                return Err(HomeError::OtherCluster {
                    path: self.path.clone(),
                    found: present.to_string(),
                    expected: cluster.to_owned(),
                });
            }
            _ => {}
        }
        let record = Record {
            format: FORMAT,
            cluster_id: cluster.to_owned(),
            node_id: self.identity.node_id(),
            claimed: claim,
        };
        write(&self.path, &record).map_err(|source| HomeError::Io { path: self.path.clone(), source })?;
        self.claimed.store(record.claimed, Ordering::SeqCst);
        self.identity.set_cluster(cluster);
        Ok(())
    }

    /// Makes this a blank node with a new id, which joins the cluster that goes on without the former one. What that one
    /// held is put aside, in `former`.
    pub(crate) fn start_over(&mut self) -> Result<(), HomeError> {
        let start_over = || -> io::Result<Record> {
            let former = self.path.join(FORMER);
            if former.exists() {
                fs::remove_dir_all(&former)?;
            }
            fs::create_dir(&former)?;
            fs::copy(self.path.join(IDENTITY), former.join(IDENTITY))?;
            // The new identity first: after a crash in between, a log is found with an identity that is of no cluster,
            // and put aside as well.
            let record = Record::new(true);
            write(&self.path, &record)?;
            set_aside(&self.path)?;
            Ok(record)
        };
        let record = start_over().map_err(|source| HomeError::Io { path: self.path.clone(), source })?;
        self.identity = record.identity();
        self.claimed = AtomicBool::new(record.claimed);
        Ok(())
    }
}

/// Puts log and snapshot into `former`, if there is one that has none yet; or else away.
fn set_aside(path: &Path) -> io::Result<()> {
    for part in PARTS.map(|part| path.join(part)) {
        let former = path.join(FORMER).join(part.file_name().unwrap_or_default());
        if !part.exists() {
            continue;
        }
        if path.join(FORMER).exists() && !former.exists() {
            fs::rename(part, former)?;
        } else {
            fs::remove_dir_all(part)?;
        }
    }
    File::open(path)?.sync_all()
}

/// Nothing but what a crash while founding leaves may be in a directory without an identity.
fn refuse_foreign(path: &Path) -> Result<(), HomeError> {
    let io = |source| HomeError::Io { path: path.to_owned(), source };
    for entry in fs::read_dir(path).map_err(io)? {
        let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        if name != LOCK && name != format!("{IDENTITY}.new") && name != "lost+found" {
            return Err(HomeError::Foreign { path: path.to_owned(), found: name });
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Record, HomeError> {
    let text = fs::read(path).map_err(|source| HomeError::Io { path: path.to_owned(), source })?;
    let damaged = |reason: String| HomeError::Damaged { path: path.to_owned(), reason };
    // The format first: a later one may look different in the rest.
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(format) if format == u64::from(FORMAT) => {}
        Some(format) => {
            let found = u32::try_from(format).unwrap_or(u32::MAX);
            return Err(HomeError::Format { path: path.to_owned(), found });
        }
        None => return Err(damaged("it does not say its format".to_owned())),
    }
    let record: Record = serde_json::from_value(value).map_err(|error| damaged(error.to_string()))?;
    if record.node_id == 0 {
        return Err(damaged("it names no node".to_owned()));
    }
    Ok(record)
}

fn write(directory: &Path, record: &Record) -> io::Result<()> {
    let new = directory.join(format!("{IDENTITY}.new"));
    let mut file = File::create(&new)?;
    file.write_all(&serde_json::to_vec_pretty(record)?)?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs::rename(&new, directory.join(IDENTITY))?;
    File::open(directory)?.sync_all()
}
