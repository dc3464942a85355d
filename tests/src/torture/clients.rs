//! Clients that read and write a few keys through any node, as fast as they are answered, and write down what they see.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use carillon_proto::v1;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::history::{Action, History, NEVER, Operation};
use crate::keepers::client::{Client, Failure, put};

/// Keys at a time.
const KEYS: usize = 4;
/// Operations after which a key is left for a new one: the search of the checker stays small.
const OPERATIONS_OF_KEY: usize = 160;
/// Between two calls of a client.
const PAUSE: Duration = Duration::from_millis(2);

/// What the clients share.
#[derive(Default)]
pub struct Workload {
    pub history: History,
    pub done: AtomicUsize,
    pub not_done: AtomicUsize,
    pub unknown: AtomicUsize,
    /// Answers that no healthy keeper gives.
    pub refused: Mutex<Vec<String>>,
    /// So many were begun on each key in turn.
    begun: [AtomicUsize; KEYS],
    pub stop: AtomicBool,
}

impl Workload {
    fn key(&self, random: &mut StdRng) -> String {
        let place = random.random_range(0..KEYS);
        let begun = self.begun[place].fetch_add(1, Ordering::Relaxed);
        format!("torture/{place}/{}", begun / OPERATIONS_OF_KEY)
    }
}

/// Runs until it is told to stop.
pub async fn client(load: Arc<Workload>, number: usize, nodes: Arc<Mutex<Vec<Client>>>, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut seen: Option<(String, u64)> = None;
    while !load.stop.load(Ordering::Relaxed) {
        let node = {
            let nodes = nodes.lock();
            nodes[random.random_range(0..nodes.len())].clone()
        };
        let fresh = load.key(&mut random);
        let (key, planned) = match (random.random_range(0..100), &seen) {
            (0..45, _) => (fresh, Action::Read(None)),
            (45..50, _) => (fresh, Action::Write(None)),
            (50..75, Some((key, from))) => (key.clone(), Action::Swap(*from, load.history.value(), false)),
            _ => (fresh, Action::Write(Some(load.history.value()))),
        };
        let call = load.history.now();
        let outcome = carry_out(&node, &key, planned).await;
        let end = load.history.now();
        let mut operation =
            Operation { client: number, key, action: planned, call, end, revision: 0, written: 0 };
        match outcome {
            Ok((action, revision, written)) => {
                load.done.fetch_add(1, Ordering::Relaxed);
                match action {
                    Action::Read(Some(value)) | Action::Write(Some(value)) | Action::Swap(_, value, true) => {
                        seen = Some((operation.key.clone(), value));
                    }
                    _ => {}
                }
                operation = Operation { action, revision, written, ..operation };
                load.history.add(operation);
            }
            Err(Failure::Unknown(_)) => {
                load.unknown.fetch_add(1, Ordering::Relaxed);
                // A read without an answer says nothing.
                if !matches!(planned, Action::Read(_)) {
                    load.history.add(Operation { end: NEVER, ..operation });
                }
            }
            Err(Failure::NotDone(_)) => {
                load.not_done.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(refused) => {
                load.refused.lock().push(format!("{planned:?}: {refused}"));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What was done, the store's revision, and when a key that was read had been written.
async fn carry_out(node: &Client, key: &str, action: Action) -> Result<(Action, u64, u64), Failure> {
    let txn = |compare: Vec<v1::Compare>, op: v1::Op| v1::TxnRequest {
        compare,
        then: vec![op],
        ..Default::default()
    };
    match action {
        Action::Read(_) => {
            let found = node.read(key).await?;
            let value = found.value.map(|value| {
                value.parse().map_err(|_| Failure::Refused(format!("{key} has value {value:?}")))
            });
            Ok((Action::Read(value.transpose()?), found.revision, found.written))
        }
        Action::Write(Some(value)) => {
            let answer = node.txn(txn(Vec::new(), put(key, &value.to_string(), 0))).await?;
            Ok((action, answer.revision, 0))
        }
        Action::Write(None) => {
            let delete = v1::Op { op: Some(v1::op::Op::Delete(key.to_owned())) };
            let answer = node.txn(txn(Vec::new(), delete)).await?;
            Ok((action, answer.revision, 0))
        }
        Action::Swap(from, to, _) => {
            let target = v1::compare::Target::Value(from.to_string().into());
            let compare = v1::Compare { key: key.to_owned(), target: Some(target) };
            let answer = node.txn(txn(vec![compare], put(key, &to.to_string(), 0))).await?;
            Ok((Action::Swap(from, to, answer.succeeded), answer.revision, 0))
        }
    }
}
