//! The last known state on the process's own disk, so that it can start while no keeper can be reached. ADR 14.
//!
//! One file: what it is, its format, a checksum, and the state as the keeper sent it. It is only ever replaced as a whole.
//! A file that cannot be used is put aside and never in the way of a start.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carillon_proto::{now_ms, v1};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::Notify;
use tokio::time::sleep;
use xxhash_rust::xxh3::xxh3_64;

use crate::keys;

/// Begins every cache file; then the format (4 bytes), the checksum of the rest (XXH3, 8 bytes), both big-endian; then an
/// `AgentCache`.
const MAGIC: &[u8; 8] = b"CARAGENT";
/// Raised when a newer version writes what an older one cannot read.
const FORMAT: u32 = 1;
const HEAD_BYTES: usize = 8 + 4 + 8;
/// Largest file that is written or read: four times what 20,000 instances take.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// It is written so long after a change, with all others by then: what changes is often being acted upon, on the same disk …
const WRITE_AFTER: Duration = Duration::from_secs(1);
/// … and, when that has failed, tried again after this.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// Where a process keeps its cache.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// The file, in the process's data directory. It may hold secrets: only its owner can read it.
    pub path: PathBuf,
    /// Whose data directory that is: a file that was written by another process is not used.
    pub owner: String,
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it is larger than {MAX_BYTES} bytes")]
    TooLarge,
    #[error("it is not a cache, or only a part of one")]
    NotACache,
    #[error("it has format {0}, this version knows {FORMAT}")]
    Format(u32),
    #[error("its checksum does not match")]
    Checksum,
    #[error("it cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    #[error("it was written by {0:?}, another process")]
    Owner(String),
}

/// What is known, as it goes to the disk.
#[derive(Default)]
struct Kept {
    cluster_id: String,
    items: BTreeMap<String, v1::KeyValue>,
    keepers: Vec<String>,
    /// Something has changed since it was written.
    dirty: bool,
}

impl Kept {
    fn take(&mut self, event: &v1::WatchEvent) {
        let Some(item) = &event.item else { return };
        // A command is for now.
        if item.key.starts_with(keys::COMMANDS) {
            return;
        }
        self.dirty = true;
        match event.deleted {
            true => drop(self.items.remove(&item.key)),
            false => drop(self.items.insert(item.key.clone(), item.clone())),
        }
    }
}

/// The cache of a running agent.
pub(crate) struct Cache {
    options: CacheOptions,
    kept: Mutex<Kept>,
    changed: Notify,
    /// Held by whoever writes the file: a write that nobody waits for any more may still be under way.
    writing: Arc<Mutex<()>>,
}

impl Cache {
    /// Reads what a former process has left, if it can be used.
    pub(crate) fn open(options: CacheOptions) -> (Self, Option<v1::AgentCache>) {
        let found = match read(&options) {
            Ok(found) => found,
            Err(error) => {
                put_aside(&options.path, &error.to_string());
                None
            }
        };
        let mut kept = Kept::default();
        if let Some(found) = &found {
            kept.cluster_id.clone_from(&found.cluster_id);
            kept.keepers.clone_from(&found.keepers);
            kept.items = found.items.iter().map(|item| (item.key.clone(), item.clone())).collect();
        }
        let (kept, writing) = (Mutex::new(kept), Arc::default());
        (Cache { options, kept, changed: Notify::new(), writing }, found)
    }

    /// The whole state, from a keeper.
    pub(crate) fn replace(&self, cluster_id: &str, state: &[v1::WatchEvent]) {
        let mut kept = self.kept.lock();
        if !kept.cluster_id.is_empty() && kept.cluster_id != cluster_id {
            let reason = format!("it is of cluster {}, the keeper is of {cluster_id}", kept.cluster_id);
            put_aside(&self.options.path, &reason);
            kept.keepers.clear();
        }
        cluster_id.clone_into(&mut kept.cluster_id);
        kept.items.clear();
        kept.dirty = true;
        for event in state {
            kept.take(event);
        }
        self.changed.notify_one();
    }

    pub(crate) fn events(&self, events: &[v1::WatchEvent]) {
        let mut kept = self.kept.lock();
        for event in events {
            kept.take(event);
        }
        self.changed.notify_one();
    }

    pub(crate) fn keepers(&self, keepers: &[String]) {
        let mut kept = self.kept.lock();
        if kept.keepers != keepers {
            kept.keepers = keepers.to_vec();
            kept.dirty = true;
            self.changed.notify_one();
        }
    }

    /// Writes what has changed, for as long as the agent runs.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut said = false;
        // The first at once: there may be nothing to start from yet.
        let mut pause = Duration::ZERO;
        loop {
            self.changed.notified().await;
            sleep(std::mem::replace(&mut pause, WRITE_AFTER)).await;
            while let Err(error) = self.write().await {
                if !said {
                    let path = self.options.path.display().to_string();
                    tracing::warn!(path, %error, "the last known state cannot be kept on disk, trying again");
                    said = true;
                }
                sleep(RETRY_AFTER).await;
            }
            said = false;
        }
    }

    /// Writes it now, unless it is on the disk already.
    pub(crate) async fn write(&self) -> io::Result<()> {
        let cache = {
            let mut kept = self.kept.lock();
            // Before a keeper has named its cluster there is nothing to keep.
            if !std::mem::take(&mut kept.dirty) || kept.cluster_id.is_empty() {
                return Ok(());
            }
            v1::AgentCache {
                owner: self.options.owner.clone(),
                cluster_id: kept.cluster_id.clone(),
                items: kept.items.values().cloned().collect(),
                keepers: kept.keepers.clone(),
                saved_ms: now_ms(),
            }
        };
        let (path, writing) = (self.options.path.clone(), self.writing.clone());
        let written = tokio::task::spawn_blocking(move || {
            let _one = writing.lock();
            write(&path, &cache)
        });
        let written = written.await;
        let written = written.unwrap_or_else(|error| Err(io::Error::other(error)));
        if written.is_err() {
            self.kept.lock().dirty = true;
        }
        written
    }
}

fn read(options: &CacheOptions) -> Result<Option<v1::AgentCache>, CacheError> {
    let file = match File::open(&options.path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    let cache = decode(&bytes)?;
    if cache.owner != options.owner {
        return Err(CacheError::Owner(cache.owner));
    }
    Ok(Some(cache))
}

fn encode(cache: &v1::AgentCache) -> Vec<u8> {
    let body = cache.encode_to_vec();
    let mut bytes = Vec::with_capacity(HEAD_BYTES + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT.to_be_bytes());
    bytes.extend_from_slice(&xxh3_64(&body).to_be_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

fn decode(bytes: &[u8]) -> Result<v1::AgentCache, CacheError> {
    if bytes.len() > MAX_BYTES {
        return Err(CacheError::TooLarge);
    }
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or(CacheError::NotACache)?;
    let (format, rest) = rest.split_first_chunk::<4>().ok_or(CacheError::NotACache)?;
    let (checksum, body) = rest.split_first_chunk::<8>().ok_or(CacheError::NotACache)?;
    if magic != MAGIC {
        return Err(CacheError::NotACache);
    }
    let format = u32::from_be_bytes(*format);
    if format != FORMAT {
        return Err(CacheError::Format(format));
    }
    if xxh3_64(body) != u64::from_be_bytes(*checksum) {
        return Err(CacheError::Checksum);
    }
    Ok(v1::AgentCache::decode(body)?)
}

/// Beside it, flushed, and then in its place.
fn write(path: &Path, cache: &v1::AgentCache) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let bytes = encode(cache);
    if bytes.len() > MAX_BYTES {
        return Err(io::Error::other(format!(
            "it would have {} bytes, at most {MAX_BYTES} are kept",
            bytes.len()
        )));
    }
    let unfinished = beside(path, "new");
    // What a former process has left half-written may have any mode.
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => File::open(directory)?.sync_all(),
        _ => Ok(()),
    }
}

fn put_aside(path: &Path, reason: &str) {
    let aside = beside(path, "aside");
    let moved = fs::rename(path, &aside);
    let (path, aside) = (path.display().to_string(), aside.display().to_string());
    match moved {
        Ok(()) => tracing::warn!(path, aside, reason, "the kept state is not used, it is put aside"),
        Err(error) => {
            tracing::warn!(path, reason, %error, "the kept state is not used, nor can it be put aside")
        }
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests;
