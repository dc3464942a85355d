//! The data directory of a process: whose it is, that nobody else uses it, and who the process is.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Raised when a newer version writes what an older one cannot read.
const FORMAT: u32 = 1;
const MARKER: &str = "carillon.json";
const LOCK: &str = "lock";
/// Names of what `open` itself makes before the marker: a directory with only these is as good as empty.
const BEFORE_MARKER: [&str; 2] = [LOCK, "carillon.json.new"];

/// Why a directory cannot be used. Each is one sentence, for people.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("the data directory {path} cannot be used: {source}")]
    Io { path: String, source: io::Error },
    #[error(
        "the data directory {path} holds something that is not Carillon's ({found}): choose another with --data-dir"
    )]
    Foreign { path: String, found: String },
    #[error(
        "the data directory {path} is in use by another process{by}: stop that one, or choose another with --data-dir"
    )]
    InUse { path: String, by: String },
    #[error(
        "the data directory {path} is corrupt: {file} {problem}; restore it from a backup, or choose another with --data-dir"
    )]
    Corrupt { path: String, file: String, problem: String },
    #[error(
        "the data directory {path} was written by a newer Carillon (format {found}, this one knows {FORMAT})"
    )]
    Newer { path: String, found: u32 },
    #[error(
        "the data directory {path} belongs to `carillon {owner}`, not to `carillon {wanted}`: choose another with --data-dir"
    )]
    OtherPurpose { path: String, owner: String, wanted: String },
}

/// What the marker file says. Written once, except for `starts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Marker {
    format: u32,
    /// The command whose it is: `dev`, `keeper`, `hub`, `gateway`.
    purpose: String,
    /// Of the cluster that `carillon dev` is; the others learn theirs from the keeper.
    cluster: String,
    /// Instance id, of all roles of the process; with `dev` a suffix tells them apart.
    instance: String,
    /// Random key that `carillon dev` gives its demo app when it makes it.
    first_api_key: String,
    /// How often a process has started here: the incarnation of the instances.
    starts: u64,
}

/// A directory that is ours for as long as this lives.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    marker: Marker,
    _lock: File,
}

impl DataDir {
    /// Takes the directory, and makes it when it is not there. The start is counted durably before this returns.
    pub fn open(path: &Path, purpose: &str) -> Result<Self, DataDirError> {
        DataDir::open_as(path, purpose, None)
    }

    /// The same; when it is new, this is the process's instance id.
    pub fn open_as(path: &Path, purpose: &str, instance: Option<&str>) -> Result<Self, DataDirError> {
        let shown = path.display().to_string();
        let io = |source| DataDirError::Io { path: shown.clone(), source };
        fs::create_dir_all(path).map_err(io)?;
        // Before the lock, so that nothing at all is left in a directory that is not ours.
        let marked = path.join(MARKER).try_exists().map_err(io)?;
        if !marked && let Some(found) = foreign(path).map_err(io)? {
            return Err(DataDirError::Foreign { path: shown, found });
        }
        let lock = lock(path, &shown)?;
        let mut marker = match fs::read(path.join(MARKER)) {
            Ok(bytes) => read_marker(&bytes, &shown)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Marker {
                format: FORMAT,
                purpose: purpose.to_owned(),
                cluster: uuid::Uuid::new_v4().to_string(),
                instance: instance
                    .map_or_else(|| format!("{purpose}-{:08x}", rand::random::<u32>()), str::to_owned),
                first_api_key: random_key(),
                starts: 0,
            },
            Err(error) => return Err(io(error)),
        };
        if marker.purpose != purpose {
            let (owner, wanted) = (marker.purpose, purpose.to_owned());
            return Err(DataDirError::OtherPurpose { path: shown, owner, wanted });
        }
        marker.starts += 1;
        write_marker(path, &marker).map_err(io)?;
        Ok(DataDir { path: path.to_owned(), marker, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The instance id of a role in this process. Stable over restarts.
    pub fn instance(&self, suffix: &str) -> String {
        if suffix.is_empty() {
            self.marker.instance.clone()
        } else {
            format!("{}-{suffix}", self.marker.instance)
        }
    }

    /// The cluster's id.
    pub fn cluster(&self) -> &str {
        &self.marker.cluster
    }

    /// Grows with each start.
    pub fn incarnation(&self) -> u64 {
        self.marker.starts
    }

    /// The key that the demo app is made with.
    pub fn first_api_key(&self) -> &str {
        &self.marker.first_api_key
    }
}

/// Something in the directory that has no business in a fresh one.
fn foreign(path: &Path) -> io::Result<Option<String>> {
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !BEFORE_MARKER.contains(&name.as_str()) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn lock(path: &Path, shown: &str) -> Result<File, DataDirError> {
    let io = |source| DataDirError::Io { path: shown.to_owned(), source };
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path.join(LOCK))
        .map_err(io)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            let by = holder.trim().parse::<u32>().map(|pid| format!(" (pid {pid})")).unwrap_or_default();
            return Err(DataDirError::InUse { path: shown.to_owned(), by });
        }
        Err(TryLockError::Error(error)) => return Err(io(error)),
    }
    // For the message above only; the lock is the kernel's, and ends with the process.
    let write = |file: &mut File| -> io::Result<()> {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut file).map_err(io)?;
    Ok(file)
}

fn read_marker(bytes: &[u8], shown: &str) -> Result<Marker, DataDirError> {
    let corrupt = |problem: String| DataDirError::Corrupt {
        path: shown.to_owned(),
        file: MARKER.to_owned(),
        problem: format!("cannot be read ({problem})"),
    };
    // The format first: a newer one may have other fields.
    let value: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
    let format = value
        .get("format")
        .and_then(serde_json::Value::as_u64)
        .ok_or_else(|| corrupt("no format".to_owned()))?;
    if format > u64::from(FORMAT) {
        let found = u32::try_from(format).unwrap_or(u32::MAX);
        return Err(DataDirError::Newer { path: shown.to_owned(), found });
    }
    serde_json::from_value(value).map_err(|error| corrupt(error.to_string()))
}

fn write_marker(path: &Path, marker: &Marker) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let unfinished = path.join(format!("{MARKER}.new"));
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    serde_json::to_writer_pretty(&mut file, marker)?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs::rename(unfinished, path.join(MARKER))?;
    File::open(path)?.sync_all()
}

/// 160 random bits in letters and digits.
fn random_key() -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let bytes: [u8; 32] = rand::random();
    bytes.iter().map(|byte| ALPHABET[usize::from(byte % 32)] as char).collect()
}

#[cfg(test)]
mod tests;
