//! The data directory: whose it is, in which format, and that one process alone has it open.
//!
//! ```text
//! DIR/lock           held (flock) by the process that has the store open
//! DIR/marker.json    format, cluster, the store's own id, and whether the database was made completely
//! DIR/db/            the database
//! ```

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

/// The layout that this code reads and writes.
pub const FORMAT: u32 = 1;

const LOCK: &str = "lock";
const MARKER: &str = "marker.json";
const DB: &str = "db";

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    #[error("{path}: cannot {action}: {source}")]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    #[error("{0} holds other files and no saver store: refusing to use it")]
    Foreign(PathBuf),
    #[error("{path} belongs to cluster {found:?}, not to {expected:?}")]
    OtherCluster { path: PathBuf, found: String, expected: String },
    #[error("{path} is in format {found}; this version reads format {FORMAT}")]
    OtherFormat { path: PathBuf, found: u32 },
    #[error("{path} is damaged: {detail}")]
    Corrupt { path: PathBuf, detail: String },
}

#[derive(Serialize, Deserialize)]
struct Marker {
    store: String,
    format: u32,
    cluster: String,
    ready: bool,
    /// Which store it is, of all that there are. Older versions gave none.
    #[serde(default)]
    id: String,
    /// The keeper has taken it for the cluster's saver.
    #[serde(default)]
    claimed: bool,
}

/// An opened, locked directory. Dropping it lets go of the lock.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    cluster: String,
    // Held for the lock on it.
    _lock: File,
    fresh: bool,
    id: String,
    claimed: AtomicBool,
}

impl Directory {
    /// Opens or makes the directory.
    pub fn open(root: &Path, cluster: &str) -> Result<Self, DirectoryError> {
        let io = |action| move |source| DirectoryError::Io { path: root.to_owned(), action, source };
        std::fs::create_dir_all(root).map_err(io("create the directory"))?;
        let marker = root.join(MARKER);
        if !marker.exists() {
            // Nothing of ours, and something else: do not even put a lock file in there.
            for entry in std::fs::read_dir(root).map_err(io("list the directory"))? {
                let name = entry.map_err(io("list the directory"))?.file_name();
                if name != LOCK && name != "marker.tmp" {
                    return Err(DirectoryError::Foreign(root.to_owned()));
                }
            }
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(root.join(LOCK))
            .map_err(io("open the lock file"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DirectoryError::InUse(root.to_owned())),
            Err(TryLockError::Error(source)) => return Err(io("lock the directory")(source)),
        }
        let mut directory = Directory {
            root: root.to_owned(),
            cluster: cluster.to_owned(),
            _lock: lock,
            fresh: false,
            id: uuid::Uuid::new_v4().to_string(),
            claimed: AtomicBool::new(false),
        };
        match std::fs::read(&marker) {
            Ok(bytes) => directory.check(&bytes)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                directory.fresh = true;
                directory.write_marker(false)?;
            }
            Err(source) => return Err(io("read marker.json")(source)),
        }
        if directory.fresh && directory.db().exists() {
            // Its making was cut short, before anything was acknowledged.
            std::fs::remove_dir_all(directory.db()).map_err(io("remove an unfinished database"))?;
        }
        Ok(directory)
    }

    fn check(&mut self, bytes: &[u8]) -> Result<(), DirectoryError> {
        let corrupt = |detail: String| DirectoryError::Corrupt { path: self.root.clone(), detail };
        let marker: Marker =
            serde_json::from_slice(bytes).map_err(|error| corrupt(format!("marker.json: {error}")))?;
        if marker.store != "saver" {
            return Err(DirectoryError::Foreign(self.root.clone()));
        }
        if marker.format != FORMAT {
            return Err(DirectoryError::OtherFormat { path: self.root.clone(), found: marker.format });
        }
        if marker.cluster != self.cluster {
            return Err(DirectoryError::OtherCluster {
                path: self.root.clone(),
                found: marker.cluster,
                expected: self.cluster.clone(),
            });
        }
        if marker.ready && !self.db().is_dir() {
            return Err(corrupt("the folder db is missing".to_owned()));
        }
        self.fresh = !marker.ready;
        match marker.id.is_empty() {
            false => (self.id, self.claimed) = (marker.id, marker.claimed.into()),
            // One of before there were ids: what is there was the saver.
            true => {
                self.claimed = marker.ready.into();
                self.write_marker(marker.ready)?;
            }
        }
        Ok(())
    }

    /// Which store it is, wherever the directory is moved to.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Was it the cluster's saver, as the keeper said last?
    pub fn is_claimed(&self) -> bool {
        self.claimed.load(Ordering::Relaxed)
    }

    /// The keeper has said whether it is; durable when this returns.
    pub fn set_claimed(&self, claimed: bool) -> Result<(), DirectoryError> {
        if self.claimed.swap(claimed, Ordering::Relaxed) == claimed {
            return Ok(());
        }
        self.write_marker(!self.fresh)
    }

    /// The database's folder.
    pub fn db(&self) -> PathBuf {
        self.root.join(DB)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Is the database still to be made?
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// The database has been made and is durable.
    pub fn made(&mut self) -> Result<(), DirectoryError> {
        self.write_marker(true)?;
        self.fresh = false;
        Ok(())
    }

    fn write_marker(&self, ready: bool) -> Result<(), DirectoryError> {
        let marker = Marker {
            store: "saver".to_owned(),
            format: FORMAT,
            cluster: self.cluster.clone(),
            ready,
            id: self.id.clone(),
            claimed: self.is_claimed(),
        };
        let write = || -> std::io::Result<()> {
            let temporary = self.root.join("marker.tmp");
            let mut file = File::create(&temporary)?;
            serde_json::to_writer_pretty(&mut file, &marker)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            std::fs::rename(&temporary, self.root.join(MARKER))?;
            File::open(&self.root)?.sync_all()
        };
        write().map_err(|source| DirectoryError::Io {
            path: self.root.clone(),
            action: "write marker.json",
            source,
        })
    }
}
