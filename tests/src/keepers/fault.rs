//! Faults inside of a keeper's process, without anything for it in the product: a library that is loaded before all others
//! (`fault.c`, built by `cc`) stands between the keeper and the system's calls.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;

use tokio::process::Command;

/// Which calls are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Write = 1,
    Sync = 2,
    Rename = 3,
    Unlink = 4,
    /// A file is made.
    Create = 5,
}

/// What happens at the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    KillBefore = 1,
    KillAfter = 2,
    /// Of a write: when half of it is done.
    KillHalf = 3,
    /// It fails with EIO, and so does every one after it.
    Fail = 4,
    /// It takes 300 ms, and so does every one after it.
    Slow = 5,
    /// Of [`Call::Create`]: what has made the file panics right after.
    Panic = 6,
}

/// The control of one keeper's faults.
#[derive(Debug)]
pub struct Faults {
    library: &'static Path,
    control: PathBuf,
    directory: PathBuf,
}

/// Builds the library, once a process; None: there is no `cc`.
fn library() -> Option<&'static Path> {
    static LIBRARY: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        let cc = crate::tools::find("cc")?;
        let directory = std::env::temp_dir().join(format!("carillon-fault-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let (source, library) = (directory.join("fault.c"), directory.join("fault.so"));
        let mut file = File::create(&source).expect("a file");
        file.write_all(include_bytes!("fault.c")).expect("written");
        let built = std::process::Command::new(cc)
            .args(["-O1", "-shared", "-fPIC", "-w", "-o"])
            .args([&library, &source])
            .args(["-ldl"])
            .stdin(Stdio::null())
            .status();
        assert!(built.expect("cc runs").success(), "the library of faults does not build");
        Some(library)
    };
    LIBRARY.get_or_init(build).as_deref()
}

impl Faults {
    /// For a keeper with this data directory; nothing happens until it is told to. None: there is no `cc`.
    pub fn new(data_dir: &Path) -> Option<Faults> {
        let library = library()?;
        let control = data_dir.with_extension("faults");
        std::fs::write(&control, [0; 40 + 64]).expect("a file");
        Some(Faults { library, control, directory: data_dir.to_owned() })
    }

    pub(super) fn apply(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", self.library)
            .env("CARILLON_FAULT", &self.control)
            .env("CARILLON_FAULT_DIR", &self.directory);
    }

    fn set(&self, at: u64, value: i64) {
        let file = File::options().write(true).open(&self.control).expect("the control file");
        file.write_all_at(&value.to_ne_bytes(), at).expect("written");
    }

    /// From now on: at the `nth` call (from 1) on a file whose path has `part` in it.
    pub fn arm(&self, call: Call, part: &str, nth: i64, how: How) {
        self.disarm();
        let mut text = [0; 64];
        text[..part.len()].copy_from_slice(part.as_bytes());
        let file = File::options().write(true).open(&self.control).expect("the control file");
        file.write_all_at(&text, 40).expect("written");
        self.set(8, nth);
        self.set(16, 0);
        self.set(24, call as i64);
        self.set(32, how as i64);
    }

    pub fn disarm(&self) {
        self.set(32, 0);
    }

    /// How often the fault has struck.
    pub fn struck(&self) -> i64 {
        let file = File::open(&self.control).expect("the control file");
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 16).expect("read");
        i64::from_ne_bytes(bytes)
    }

    /// Sets the time of day, as the keeper sees it, forward or back.
    pub fn set_clock_offset(&self, seconds: i64) {
        self.set(0, seconds);
    }
}
