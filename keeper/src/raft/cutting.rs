//! When the log is cut by its size: entries may be large, and then there is too much of it long before there are many.

use super::{Node, Progress, Unavailable};

/// A file of the log that is written no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LogFile {
    pub bytes: u64,
    /// Index of the last entry in it and in those before it.
    pub last: u64,
}

/// What makes the log smaller.
#[derive(Debug, PartialEq, Eq)]
enum Cut {
    /// Give up the entries up to this one.
    Purge(u64),
    /// Nothing that can go is in a snapshot yet: make one.
    Snapshot,
}

/// Files go as a whole, the oldest first, and only those without which `keep` bytes are left. `written`: size of the file that
/// is being written, which stays.
fn cut(files: &[LogFile], written: u64, keep: u64, progress: &Progress) -> Option<Cut> {
    let mut left = written;
    let mut can_go = None;
    for file in files.iter().rev() {
        if left >= keep {
            if file.last <= progress.snapshot {
                return Some(Cut::Purge(file.last));
            }
            // What is not applied is in no snapshot, however new it is.
            if file.last <= progress.applied {
                can_go = Some(Cut::Snapshot);
            }
        }
        left += file.bytes;
    }
    can_go
}

impl Node {
    /// Makes the log smaller by a step, in the background, as long as about `keep` bytes of it stay. `may_snapshot`: there is
    /// room for a snapshot.
    pub(crate) async fn cut_log(&self, keep: u64, may_snapshot: bool) -> Result<(), Unavailable> {
        let (files, written) = self.log.files();
        let done = match cut(&files, written, keep, &self.progress()) {
            Some(Cut::Purge(upto)) => {
                tracing::info!(upto, log_bytes = self.log_bytes(), "the log is cut");
                self.raft.trigger().purge_log(upto).await
            }
            Some(Cut::Snapshot) if may_snapshot => self.raft.trigger().snapshot().await,
            Some(Cut::Snapshot) | None => Ok(()),
        };
        done.map_err(|error| Unavailable::Failed(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(last: &[u64]) -> Vec<LogFile> {
        last.iter().map(|&last| LogFile { bytes: 16, last }).collect()
    }

    fn at(snapshot: u64, applied: u64) -> Progress {
        Progress { snapshot, applied, ..Progress::default() }
    }

    #[test]
    fn what_is_in_a_snapshot_goes_first_and_what_is_to_be_kept_stays() {
        let log = files(&[10, 20, 30]);
        // 4 + 16 + 16 bytes are left without the first file.
        assert_eq!(cut(&log, 4, 36, &at(25, 40)), Some(Cut::Purge(10)));
        assert_eq!(cut(&log, 4, 37, &at(25, 40)), None);
        assert_eq!(cut(&log, 4, 20, &at(25, 40)), Some(Cut::Purge(20)));
        assert_eq!(cut(&log, 4, 0, &at(25, 40)), Some(Cut::Purge(20)));
        assert_eq!(cut(&log, 4, 0, &at(30, 40)), Some(Cut::Purge(30)));
    }

    #[test]
    fn a_snapshot_is_made_only_if_something_could_go_then() {
        let log = files(&[10, 20, 30]);
        assert_eq!(cut(&log, 4, 0, &at(0, 40)), Some(Cut::Snapshot));
        assert_eq!(cut(&log, 4, 0, &at(0, 10)), Some(Cut::Snapshot));
        assert_eq!(cut(&log, 4, 0, &at(0, 9)), None, "nothing of it is applied");
        assert_eq!(cut(&log, 4, 36, &at(0, 9)), None);
        assert_eq!(cut(&log, 4, 37, &at(0, 40)), None, "that much is to be kept");
        assert_eq!(cut(&[], 900, 0, &at(0, 40)), None, "the file that is written stays");
    }
}
