//! Keepers whose disk or process fails at the worst moment: what was acknowledged is there afterwards, in order, and nothing
//! else; what is damaged is never used.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use carillon_tests::keepers::client::{Client, Failure};
use carillon_tests::keepers::fault::{Call, Faults, How};
use carillon_tests::keepers::{KeeperProcess, patiently, settled, three};
use carillon_tests::tools;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// A keeper that is alone, and all that was ever asked of it.
struct Alone {
    keeper: KeeperProcess,
    client: Client,
    /// Values that were acknowledged: 1, 2, 3 … each at its own key.
    acked: Vec<u64>,
    /// The last one that was asked for.
    asked: u64,
    /// Of every value: large enough that a log's file is soon full.
    size: usize,
    _dir: TempDir,
}

impl Alone {
    fn new() -> Option<Alone> {
        let dir = TempDir::new().unwrap();
        let mut keeper = KeeperProcess::alone(dir.path());
        keeper.flags = vec!["--snapshot-every".to_owned(), "20".to_owned()];
        keeper.faults = Some(Faults::new(&keeper.dir)?);
        let client = Client::new(&keeper.endpoint());
        Some(Alone { keeper, client, acked: Vec::new(), asked: 0, size: 100, _dir: dir })
    }

    fn faults(&self) -> &Faults {
        self.keeper.faults.as_ref().unwrap()
    }

    async fn started(&mut self) {
        self.keeper.start();
        patiently("the keeper serves", PATIENCE, async || self.client.read("0").await).await.unwrap();
    }

    fn value(&self, number: u64) -> String {
        format!("{number} {}", "x".repeat(self.size))
    }

    /// Writes one value after the other until so many are acknowledged, or the keeper has ended; true: it has.
    async fn write(&mut self, count: usize) -> bool {
        let until = self.acked.len() + count;
        let begun = Instant::now();
        while self.acked.len() < until {
            assert!(begun.elapsed() < PATIENCE, "it neither writes nor ends");
            if self.keeper.has_ended().is_some() {
                return true;
            }
            let number = self.asked + 1;
            match self.client.put(&format!("n/{number:06}"), &self.value(number)).await {
                Ok(_) => {
                    self.asked = number;
                    self.acked.push(number);
                }
                Err(Failure::NotDone(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                // It may be there.
                Err(Failure::Unknown(_)) => self.asked = number,
                Err(refused) => panic!("{refused}"),
            }
        }
        false
    }

    /// Everything that was acknowledged is there, in order, and nothing that was not asked for.
    async fn check(&self) {
        let found = patiently("a list", PATIENCE, async || self.client.list("n/").await).await.unwrap();
        let mut revision = 0;
        let mut numbers = Vec::new();
        for item in &found.1 {
            let number: u64 = item.key["n/".len()..].parse().unwrap();
            assert_eq!(item.value, self.value(number).into_bytes(), "{number} has another value");
            assert!(number <= self.asked, "{number} was never asked for");
            assert_eq!(
                (item.version, item.create_revision),
                (1, item.mod_revision),
                "{number} was written twice"
            );
            assert!(item.mod_revision > revision, "{number} is out of order");
            revision = item.mod_revision;
            numbers.push(number);
        }
        let lost: Vec<&u64> =
            self.acked.iter().filter(|number| numbers.binary_search(number).is_err()).collect();
        assert!(lost.is_empty(), "acknowledged and lost: {lost:?}; {} are there", numbers.len());
    }

    /// Kills it at that call, starts it again, and looks. Armed before the start, it is the start itself that is killed.
    async fn crash(&mut self, at_start: bool, call: Call, part: &str, nth: i64, how: How) {
        let what =
            format!("{how:?} at {call:?} {nth} of {part}, {}", if at_start { "at start" } else { "later" });
        if at_start {
            self.keeper.kill().await;
            self.faults().arm(call, part, nth, how);
            self.keeper.start();
        } else {
            self.faults().arm(call, part, nth, how);
        }
        let ended = self.write(400).await;
        assert!(ended && self.faults().struck() == 1, "{what}: it was not killed");
        self.faults().disarm();
        self.started().await;
        self.check().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_step_of_writing_it_loses_nothing() {
    let Some(mut alone) = Alone::new() else { return };
    alone.started().await;
    // Appending: before, in the middle of, and after a write; before and after it is on the disk.
    for nth in [1, 2, 7] {
        for how in [How::KillBefore, How::KillHalf, How::KillAfter] {
            alone.crash(false, Call::Write, "/log/", nth, how).await;
        }
        for how in [How::KillBefore, How::KillAfter] {
            alone.crash(false, Call::Sync, "/log/", nth, how).await;
        }
    }
    // A snapshot: while it is written, synced, renamed, and the directory is synced.
    for how in [How::KillBefore, How::KillHalf, How::KillAfter] {
        for nth in [1, 3] {
            alone.crash(false, Call::Write, "/snapshot/new", nth, how).await;
        }
    }
    for how in [How::KillBefore, How::KillAfter] {
        alone.crash(false, Call::Sync, "/snapshot/new", 1, how).await;
        alone.crash(false, Call::Rename, "/snapshot/current", 1, how).await;
        alone.crash(false, Call::Sync, "/snapshot", 2, how).await;
    }
    // A start: the first that is written is the vote.
    for nth in [1, 2, 3] {
        for how in [How::KillBefore, How::KillHalf, How::KillAfter] {
            alone.crash(true, Call::Write, "/log/", nth, how).await;
        }
        alone.crash(true, Call::Sync, "/log/", nth, How::KillBefore).await;
    }
    eprintln!("{} values acknowledged of {}", alone.acked.len(), alone.asked);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_it_gives_up_old_log_files_it_loses_nothing() {
    let Some(mut alone) = Alone::new() else { return };
    // A file of the log is closed at 16 MB.
    alone.size = 600_000;
    alone.started().await;
    for how in [How::KillBefore, How::KillAfter] {
        alone.crash(false, Call::Unlink, "/log/", 1, how).await;
    }
    eprintln!("{} values acknowledged of {}", alone.acked.len(), alone.asked);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_ends_the_process() {
    let Some(mut alone) = Alone::new() else { return };
    alone.started().await;
    alone.write(30).await;
    for (call, part) in [(Call::Sync, "/log/"), (Call::Write, "/log/"), (Call::Sync, "/snapshot/")] {
        alone.faults().arm(call, part, 3, How::Fail);
        assert!(alone.write(400).await, "{call:?} on {part} fails, and it goes on");
        let logs = alone.keeper.logs();
        let last: Vec<&str> = logs.lines().rev().take(3).collect();
        assert!(last.iter().any(|line| line.contains("the keeper cannot go on")), "{last:?}");
        alone.faults().disarm();
        alone.started().await;
        alone.check().await;
    }
    eprintln!("{} values acknowledged of {}", alone.acked.len(), alone.asked);
}

/// The newest file in a directory of the keeper's.
fn last_file(directory: &Path) -> PathBuf {
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file() && path.metadata().unwrap().len() > 0)
        .collect();
    files.sort();
    files.pop().expect("a file")
}

fn flip(path: &Path, at: impl FnOnce(usize) -> usize) -> Vec<u8> {
    let before = std::fs::read(path).unwrap();
    let mut bytes = before.clone();
    let at = at(bytes.len());
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
    before
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alone_it_refuses_what_is_damaged() {
    let Some(mut alone) = Alone::new() else { return };
    alone.started().await;
    alone.write(30).await;
    alone.keeper.kill().await;
    let data = alone.keeper.dir.join("keeper");
    let (log, snapshot) = (last_file(&data.join("log")), data.join("snapshot/current"));
    // Everywhere: what is in the middle as well as heads and lengths.
    let mut places: Vec<(PathBuf, usize)> =
        (0..6).map(|i| (log.clone(), i * 97)).chain([(snapshot, 50)]).collect();
    places[0].1 = 3;
    for (path, at) in places {
        let before = flip(&path, |length| at.min(length - 1));
        alone.keeper.start();
        let ended = alone.keeper.ended(PATIENCE).await.expect("it refuses");
        assert_eq!(ended.code(), Some(1), "{} at {at}", path.display());
        let logs = alone.keeper.logs();
        let last = logs.lines().last().unwrap_or_default();
        assert!(last.contains("it is alone, so that nobody has another copy"), "{last}");
        std::fs::write(&path, before).unwrap();
    }
    // Half of a last record is what a crash leaves: it was never acknowledged.
    let mut bytes = std::fs::read(&log).unwrap();
    bytes.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0]);
    std::fs::write(&log, bytes).unwrap();
    alone.started().await;
    alone.check().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_cluster_what_is_damaged_is_replaced_from_the_others() {
    let dir = TempDir::new().unwrap();
    let mut keepers = three(dir.path()).await;
    let mut number = 0;
    for damaged in [0, 1] {
        let part = ["log", "snapshot"][damaged];
        for _ in 0..30 {
            number += 1;
            let (client, value) = (keepers[2].1.clone(), number.to_string());
            let write = async || client.put(&format!("n/{value}"), &value).await;
            patiently("a write", PATIENCE, write).await.unwrap();
        }
        let former = keepers[damaged].1.status().await.unwrap().node_id;
        keepers[damaged].0.kill().await;
        flip(&last_file(&keepers[damaged].0.dir.join("keeper").join(part)), |length| length / 2);
        keepers[damaged].0.start();
        // The member under the former id is taken out, and a new one takes its place.
        let client = keepers[damaged].1.clone();
        let another = async || match client.status().await {
            Ok(status) if status.node_id != former && status.applied_index > 0 => Ok(()),
            Ok(status) => Err(format!("{status:?}")),
            Err(error) => Err(error.to_string()),
        };
        patiently("it is another node", PATIENCE, another).await.unwrap();
        settled(&keepers).await;
        let (_, items) = patiently("a list", PATIENCE, async || client.list("n/").await).await.unwrap();
        assert_eq!(items.len(), number, "through the node that was damaged");
        assert!(keepers[damaged].0.logs().contains("this disk is damaged: the node starts over"));
        let kept = keepers[damaged].0.dir.join("keeper/former").join(part);
        assert!(kept.exists(), "what was damaged is kept");
    }
    // Two of three at once: nobody can say what was decided.
    for (keeper, _) in &mut keepers[..2] {
        keeper.kill().await;
        flip(&last_file(&keeper.dir.join("keeper/log")), |length| length / 2);
    }
    keepers[0].0.start();
    let ended = keepers[0].0.ended(PATIENCE).await.expect("it refuses");
    assert_eq!(ended.code(), Some(1));
    let logs = keepers[0].0.logs();
    let last = logs.lines().last().unwrap_or_default();
    assert!(last.contains("as soon as the others have a leader"), "{last}");
}

/// A small disk of memory; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(directory: PathBuf, megabytes: u64) -> Option<SmallDisk> {
        std::fs::create_dir_all(&directory).unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "tmpfs"])
            .arg(&directory)
            .status();
        mounted.is_ok_and(|status| status.success()).then_some(SmallDisk(directory))
    }

    /// Takes all room but this much.
    fn fill(&self, leave: u64) {
        let path = std::ffi::CString::new(self.0.to_str().unwrap()).unwrap();
        // SAFETY: a zeroed statvfs is a valid one, and it is only written by the call.
        let room = unsafe {
            let mut found: libc::statvfs = std::mem::zeroed();
            assert_eq!(libc::statvfs(path.as_ptr(), &mut found), 0);
            found.f_bavail * found.f_frsize
        };
        let ballast = std::fs::File::create(self.0.join("ballast")).unwrap();
        let mut left = room.saturating_sub(leave);
        let block = vec![1u8; 1 << 20];
        while left > 0 {
            use std::io::Write as _;
            let size = left.min(block.len() as u64) as usize;
            if (&ballast).write_all(&block[..size]).is_err() {
                break;
            }
            left -= size as u64;
        }
    }

    fn clear(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_it_refuses_writes_and_recovers_by_itself() {
    let Some(mut alone) = Alone::new() else { return };
    let Some(disk) = SmallDisk::mount(alone.keeper.dir.parent().unwrap().join("disk"), 160) else {
        return tools::missing("the right to mount a small disk");
    };
    alone.keeper.dir = disk.0.join("keeper");
    alone.keeper.faults = Faults::new(&alone.keeper.dir);
    alone.started().await;
    alone.write(30).await;
    let lease = alone.client.grant(Duration::from_secs(2)).await.unwrap();
    disk.fill(30 << 20);
    let refused = async || match alone.client.put("full", "1").await {
        Err(Failure::Refused(text)) => Ok(text),
        other => Err(format!("{other:?}")),
    };
    let text = patiently("writes are refused", PATIENCE, refused).await.unwrap();
    assert!(text.contains("the keeper's disk is full") && text.contains("kept in reserve"), "{text}");
    // Reading goes on, and so does what is needed: the lease ends.
    alone.check().await;
    let gone = async || match alone.client.keep_alive(lease).await {
        Err(Failure::Refused(_)) => Ok(()),
        other => {
            tokio::time::sleep(Duration::from_secs(4)).await;
            Err(format!("{other:?}"))
        }
    };
    patiently("the lease ends", PATIENCE, gone).await.unwrap();
    disk.clear();
    patiently("writes are taken again", PATIENCE, async || alone.client.put("full", "2").await)
        .await
        .unwrap();
    assert!(!alone.write(5).await, "the process is the same");

    // With no room at all, even for what is needed, it ends, and says why.
    disk.fill(0);
    let begun = Instant::now();
    let ended = loop {
        let _ = alone.client.grant(Duration::from_secs(1)).await;
        if let Some(ended) = alone.keeper.has_ended() {
            break ended;
        }
        assert!(begun.elapsed() < PATIENCE, "it goes on without room");
    };
    assert_eq!(ended.code(), Some(1));
    assert!(alone.keeper.logs().contains("No space left on device"), "it says why");
    disk.clear();
    alone.started().await;
    alone.check().await;
    assert!(!alone.write(5).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_its_own_log_fills_it_makes_room_on_by_itself() {
    let Some(mut alone) = Alone::new() else { return };
    let Some(disk) = SmallDisk::mount(alone.keeper.dir.parent().unwrap().join("disk"), 160) else {
        return tools::missing("the right to mount a small disk");
    };
    alone.keeper.dir = disk.0.join("keeper");
    alone.keeper.faults = None;
    // By their number no entry would ever go.
    alone.keeper.flags.clear();
    alone.started().await;
    let value = "x".repeat(600_000);
    let mut refused = 0;
    // More than twice what the disk has.
    for i in 0..600 {
        let begun = Instant::now();
        loop {
            match alone.client.put(&format!("big/{}", i % 4), &format!("{i} {value}")).await {
                Ok(_) => break,
                Err(Failure::Refused(text)) => {
                    assert!(text.contains("the keeper's disk is full"), "{text}");
                    assert!(begun.elapsed() < PATIENCE, "it makes no room: {text}");
                    refused += 1;
                }
                Err(other) => panic!("{other}, after {i}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert!(refused > 0, "the disk was never full");
    assert!(alone.keeper.logs().contains("the log is cut"));
    alone.keeper.kill().await;
    alone.started().await;
    let found = patiently("a read", PATIENCE, async || alone.client.read("big/3").await).await.unwrap();
    assert!(found.value.unwrap().starts_with("599 x"));
}
