//! The keeper's data directory: whose it is, which format it has, and that only one process uses it.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rand::RngExt as _;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Of everything in the directory; a keeper refuses any other.
const FORMAT: u32 = 1;
const IDENTITY: &str = "keeper.json";
const LOCK: &str = "lock";

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
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Who this node is; written once, before anything else.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Identity {
    format: u32,
    cluster_id: String,
    /// Random: never an ordinal, so that a node which has lost its disk is another node.
    node_id: u64,
}

/// An opened data directory. The lock is held until this is dropped.
#[derive(Debug)]
pub(crate) struct Home {
    pub cluster_id: String,
    pub node_id: u64,
    /// Kept open for its lock.
    _lock: File,
}

impl Home {
    /// Opens the directory, or makes it one of a new cluster when it is empty or missing.
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
        let identity = if identity_path.exists() {
            read(&identity_path)?
        } else {
            let cluster_id = expected_cluster.map_or_else(|| Uuid::new_v4().to_string(), str::to_owned);
            let identity =
                Identity { format: FORMAT, cluster_id, node_id: rand::rng().random_range(1..=u64::MAX) };
            write(path, &identity).map_err(io)?;
            tracing::info!(cluster = identity.cluster_id, node = identity.node_id, "new keeper founded");
            identity
        };
        match expected_cluster {
            Some(expected) if expected != identity.cluster_id => Err(HomeError::OtherCluster {
                path: path.to_owned(),
                found: identity.cluster_id,
                expected: expected.to_owned(),
            }),
            _ => Ok(Home { cluster_id: identity.cluster_id, node_id: identity.node_id, _lock: lock }),
        }
    }
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

fn read(path: &Path) -> Result<Identity, HomeError> {
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
    let identity: Identity = serde_json::from_value(value).map_err(|error| damaged(error.to_string()))?;
    if identity.node_id == 0 || identity.cluster_id.is_empty() {
        return Err(damaged("it names no node or no cluster".to_owned()));
    }
    Ok(identity)
}

fn write(directory: &Path, identity: &Identity) -> io::Result<()> {
    let new = directory.join(format!("{IDENTITY}.new"));
    let mut file = File::create(&new)?;
    file.write_all(&serde_json::to_vec_pretty(identity)?)?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs::rename(&new, directory.join(IDENTITY))?;
    File::open(directory)?.sync_all()
}
