//! What the saver must hear of a session, told until it is answered: that it was closed, with what its next gateway has
//! to know, or that nothing is to be kept of it.
//!
//! Of one session things are told one after another, and its opening waits for what was to be told before: else the saver
//! would give the device a state that is not the last. What comes late all the same ends no later session: a CloseSession
//! has the attachment that it is of, a forgetting the time at which its device connected; the saver refuses older ones.
//! Bounded by number, bytes and time; what is given up is counted.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use carillon_proto::exchange::CallError;
use carillon_proto::v1::saver_error::Code;
use carillon_proto::v1::saver_reply::Result as Reply;
use carillon_proto::v1::saver_request::Op;
use carillon_proto::v1::{self, SaverReply, SaverRequest};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::time::Instant;

use super::{Link, OWNER_WAIT};

/// Things untold at a time; beyond it they are told once.
const UNTOLD_MAX: usize = 100_000;
/// And their bytes.
const UNTOLD_BYTES: usize = 128 * 1024 * 1024;
/// As much as the opening of a session takes while it waits, more or less.
const OPEN_BYTES: usize = 512;
/// How long a thing is told again: longer than a saver takes to be replaced.
const TELL_WITHIN: Duration = Duration::from_secs(300);
/// Between two tries: grows from the first to the second, jittered.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// By session key; the first of each is on its way, or waits to be tried again. Whoever puts in the first of a session sees to
/// it, and to what comes behind it, until nothing is left: one at a time for each session.
#[derive(Default)]
pub(super) struct Untold {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    sessions: HashMap<u128, VecDeque<Next>>,
    count: usize,
    bytes: usize,
}

enum Next {
    Tell {
        op: Arc<Op>,
        bytes: usize,
        until: Instant,
    },
    /// The opening of the session, unless it has waited too long.
    Open(Arc<Mutex<Option<Open>>>),
}

/// Called with whether it may be asked for now, or is given up.
type Open = Box<dyn FnOnce(&Link, bool) + Send>;

impl Next {
    fn bytes(&self) -> usize {
        match self {
            Next::Tell { bytes, .. } => *bytes,
            Next::Open(_) => OPEN_BYTES,
        }
    }
}

/// What becomes of a thing that was tried.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Heard,
    Again,
    GivenUp,
}

fn outcome(answer: &Result<SaverReply, CallError>, until: Instant, now: Instant) -> Outcome {
    let is_heard = match answer {
        // Refused for good, as by a session that is another gateway's, is heard as well.
        Ok(reply) => !matches!(&reply.result, Some(Reply::Error(error)) if error.code() == Code::Unavailable),
        Err(_) => false,
    };
    match is_heard {
        true => Outcome::Heard,
        false if now + BACKOFF.0 >= until => Outcome::GivenUp,
        false => Outcome::Again,
    }
}

impl Untold {
    pub fn is_empty(&self) -> bool {
        self.state.lock().sessions.is_empty()
    }

    /// Queues a thing. Ok(true): it is the first of its session. Err: there is no room for it.
    fn push(&self, key: u128, next: Next) -> Result<bool, Next> {
        let mut state = self.state.lock();
        let bytes = next.bytes();
        if state.count >= UNTOLD_MAX || state.bytes + bytes > UNTOLD_BYTES {
            return Err(next);
        }
        state.count += 1;
        state.bytes += bytes;
        let queue = state.sessions.entry(key).or_default();
        queue.push_back(next);
        Ok(queue.len() == 1)
    }

    /// The first is done with. False: it was the last, and what comes next is seen to by whoever brings it.
    fn pop(&self, key: u128) -> bool {
        let mut state = self.state.lock();
        let Some(queue) = state.sessions.get_mut(&key) else { return false };
        let popped = queue.pop_front();
        let has_more = !queue.is_empty();
        if !has_more {
            state.sessions.remove(&key);
        }
        if let Some(popped) = popped {
            state.count -= 1;
            state.bytes -= popped.bytes();
        }
        if state.sessions.is_empty() && state.sessions.capacity() > 1024 {
            state.sessions = HashMap::new();
        }
        has_more
    }
}

impl Link {
    pub fn close_session(&self, key: u128, close: v1::CloseSession) {
        self.tell_surely(key, Op::CloseSession(close));
    }

    /// Nothing is to be kept for this session any more.
    pub fn forget_session(&self, key: u128, open: v1::OpenSession) {
        self.tell_surely(key, Op::OpenSession(open));
    }

    fn tell_surely(&self, key: u128, op: Op) {
        let bytes = match &op {
            Op::CloseSession(close) => close.encoded_len(),
            Op::OpenSession(open) => open.encoded_len(),
            _ => 0,
        };
        let next = Next::Tell { op: Arc::new(op), bytes: bytes + 256, until: Instant::now() + TELL_WITHIN };
        self.inner.metrics.saver_untold.inc();
        match self.inner.untold.push(key, next) {
            Ok(true) => self.tell_first(key, BACKOFF.0),
            Ok(false) => {}
            Err(next) => {
                self.inner.metrics.saver_untold.dec();
                self.inner.metrics.saver_given_up.inc();
                if let Next::Tell { op, .. } = next {
                    self.tell(Arc::unwrap_or_clone(op));
                }
            }
        }
    }

    /// Calls back when everything before is told, at once if nothing is; or with false, when that takes too long or too many
    /// wait.
    pub(super) fn after_told(&self, key: u128, open: impl FnOnce(&Link, bool) + Send + 'static) {
        if !self.inner.untold.state.lock().sessions.contains_key(&key) {
            return open(self, true);
        }
        let open: Arc<Mutex<Option<Open>>> = Arc::new(Mutex::new(Some(Box::new(open))));
        let too_late = |link: &Link, open: &Mutex<Option<Open>>| {
            let late = open.lock().take();
            if let Some(open) = late {
                open(link, false);
            }
        };
        match self.inner.untold.push(key, Next::Open(open.clone())) {
            // It was told meanwhile.
            Ok(true) => return self.tell_first(key, BACKOFF.0),
            Ok(false) => {}
            Err(_) => return too_late(self, &open),
        }
        let link = self.clone();
        self.inner.runtime.spawn(async move {
            tokio::time::sleep(OWNER_WAIT).await;
            too_late(&link, &open);
        });
    }

    /// Goes on with what is first of this session, as far as it goes without waiting. `retry`: after what time, if it fails.
    fn tell_first(&self, key: u128, retry: Duration) {
        loop {
            let (op, until) = {
                let state = self.inner.untold.state.lock();
                match state.sessions.get(&key).and_then(VecDeque::front) {
                    None => return,
                    Some(Next::Tell { op, until, .. }) => (op.clone(), *until),
                    Some(Next::Open(open)) => {
                        let open = open.clone();
                        drop(state);
                        // It asks here and now: what is to be told after it goes after it.
                        let due = open.lock().take();
                        if let Some(open) = due {
                            open(self, true);
                        }
                        if self.inner.untold.pop(key) {
                            continue;
                        }
                        return;
                    }
                }
            };
            let link = self.clone();
            let answered = move |answer| link.told(key, until, retry, &answer);
            return match self.inner.saver.load().as_ref() {
                Some(saver) => {
                    let request = SaverRequest { correlation: 0, op: Some(Op::clone(&op)) };
                    saver.call_then(request, answered);
                }
                None => answered(Err(CallError::Disconnected("a saver".to_owned()))),
            };
        }
    }

    fn told(&self, key: u128, until: Instant, retry: Duration, answer: &Result<SaverReply, CallError>) {
        let outcome = outcome(answer, until, Instant::now());
        let link = self.clone();
        if outcome == Outcome::Again {
            // A task only for what needs another try.
            self.inner.runtime.spawn(async move {
                tokio::time::sleep(retry.mul_f64(rand::random_range(0.5..1.5))).await;
                link.tell_first(key, (retry * 2).min(BACKOFF.1));
            });
            return;
        }
        if outcome == Outcome::GivenUp {
            self.inner.metrics.saver_given_up.inc();
            tracing::warn!(within = ?TELL_WITHIN, "the saver could not be told how a session stands");
        }
        self.inner.metrics.saver_untold.dec();
        if !self.inner.untold.pop(key) {
            return;
        }
        if outcome == Outcome::Heard {
            self.tell_first(key, BACKOFF.0);
        } else {
            // It may have failed here and now, and so may all that is behind it: not one within the other.
            self.inner.runtime.spawn(async move { link.tell_first(key, BACKOFF.0) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tell(bytes: usize) -> Next {
        let op = Op::CloseSession(v1::CloseSession::default());
        Next::Tell { op: Arc::new(op), bytes, until: Instant::now() }
    }

    fn sizes(untold: &Untold) -> (usize, usize) {
        let state = untold.state.lock();
        (state.count, state.bytes)
    }

    #[test]
    fn a_thing_is_told_until_it_is_answered_or_its_time_is_over() {
        let error = |code: Code| {
            let error = v1::SaverError { code: code.into(), text: String::new() };
            Ok(SaverReply { correlation: 1, result: Some(Reply::Error(error)) })
        };
        let now = Instant::now();
        let until = now + TELL_WITHIN;
        let done = Ok(SaverReply { correlation: 1, result: Some(Reply::Done(v1::Done {})) });
        assert_eq!(outcome(&done, until, now), Outcome::Heard);
        assert_eq!(outcome(&error(Code::SessionMoved), until, now), Outcome::Heard, "another has it");
        assert_eq!(outcome(&error(Code::Invalid), until, now), Outcome::Heard);
        assert_eq!(outcome(&error(Code::Unavailable), until, now), Outcome::Again);
        let errors = [CallError::Disconnected, CallError::TimedOut, CallError::Overloaded];
        for error in errors.map(|error| error("saver".to_owned())) {
            assert_eq!(outcome(&Err(error.clone()), until, now), Outcome::Again);
            assert_eq!(outcome(&Err(error), until, until), Outcome::GivenUp);
        }
    }

    #[test]
    fn one_thing_of_a_session_is_on_its_way_at_a_time() {
        let untold = Untold::default();
        assert!(matches!(untold.push(1, tell(10)), Ok(true)));
        assert!(matches!(untold.push(1, tell(20)), Ok(false)));
        assert!(matches!(untold.push(2, tell(30)), Ok(true)), "another session's");
        assert!(untold.pop(1), "there is more");
        assert_eq!(sizes(&untold), (2, 50));
        for key in [1, 2] {
            assert!(!untold.pop(key), "and now nobody sees to this session");
        }
        assert!(matches!(untold.push(1, tell(10)), Ok(true)), "but who brings the next");
        assert!(!untold.pop(1));
        assert!(!untold.pop(1));
        assert!(untold.is_empty());
        assert_eq!(sizes(&untold), (0, 0));
    }

    #[test]
    fn there_is_an_end_to_what_waits() {
        let untold = Untold::default();
        assert!(untold.push(1, tell(UNTOLD_BYTES)).is_ok());
        assert!(untold.push(2, tell(1)).is_err());
        untold.pop(1);
        for key in 0..UNTOLD_MAX as u128 {
            assert!(untold.push(key, tell(1)).is_ok());
        }
        assert!(untold.push(u128::MAX, tell(1)).is_err());
        let open = Next::Open(Arc::new(Mutex::new(None)));
        assert!(untold.push(0, open).is_err(), "what waits to be opened counts as well");
    }
}
