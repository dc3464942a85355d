//! Shared subscriptions: this gateway's members of shares, joined where each share is at home (`shares.proto`).
//!
//! One task holds the table of members, and a stream to each registry instance that is home to a share with a member
//! here: none while there are none. A member whose home is lost joins again, wherever that is then.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use carillon_agent::SlotOwner;
use carillon_proto::MAX_GRPC_MESSAGE_BYTES;
use carillon_proto::v1::{self, settlement::Outcome, shares_down, shares_up};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use super::publish::QUOTA_EXCEEDED;
use super::{Inner, Link, endpoint};
use crate::delivery::Delivery;
use crate::event::{ConnId, Event};

/// Between two tries to join a share.
const RETRY: Duration = Duration::from_millis(50);
/// What came in and waits for the table's task: then the streams are not read.
const QUEUE: usize = 1024;
/// Commands taken at a time.
const TURN: usize = 256;

/// A member of a share, unique in this process.
pub type Member = u64;

pub(super) enum Command {
    Join { conn: ConnId, share: Arc<str>, who: ShareMember, joined: OnJoined },
    Leave { member: Member, kept_seconds: u32 },
    Settle { member: Member, token: u64, outcome: Outcome },
    Ready { member: Member },
}

/// Who is to be a member of a share.
#[derive(Debug, Clone, Copy)]
pub struct ShareMember {
    pub member: Member,
    /// It was one already: nothing is to be waited for.
    pub is_new: bool,
    /// Messages that it may have unsettled.
    pub window: u16,
    /// Of its session, if that is kept.
    pub expiry_seconds: u32,
}

/// Told once whether a member has joined; an error is the reason code.
pub type OnJoined = Box<dyn FnOnce(Result<(), u8>) + Send>;

impl Link {
    /// A number that no other member has.
    pub fn next_member(&self) -> Member {
        self.inner.next_member.fetch_add(1, Ordering::Relaxed)
    }

    /// A connection is to be a member of a share; `joined` is told when the share's home has it.
    pub(super) fn join_share(&self, conn: ConnId, share: &Arc<str>, who: ShareMember, joined: OnJoined) {
        self.to_shares(Command::Join { conn, share: share.clone(), who, joined });
    }

    /// It is not any more; what it has not settled goes to others. `kept_seconds`: its session is kept for so long.
    pub fn leave_share(&self, member: Member, kept_seconds: u32) {
        self.to_shares(Command::Leave { member, kept_seconds });
    }

    /// The device has acknowledged a message, or there was nothing to acknowledge.
    pub fn share_done(&self, member: Member, token: u64) {
        self.to_shares(Command::Settle { member, token, outcome: Outcome::Done });
    }

    /// The device has no room for a message, nor for others until [`share_ready`](Self::share_ready).
    pub fn share_busy(&self, member: Member, token: u64) {
        self.to_shares(Command::Settle { member, token, outcome: Outcome::Busy });
    }

    pub fn share_ready(&self, member: Member) {
        self.to_shares(Command::Ready { member });
    }

    fn to_shares(&self, command: Command) {
        // An error means that the gateway ends.
        let _ = self.inner.shares.send(command);
    }
}

struct Membership {
    conn: ConnId,
    share: Arc<str>,
    who: ShareMember,
    /// The stream on which it has joined; none: it is to join.
    stream: Option<u64>,
    /// Not told yet.
    joined: Option<OnJoined>,
}

struct Stream {
    registry: Arc<str>,
    incarnation: u64,
    up: mpsc::UnboundedSender<v1::SharesUp>,
    stop: CancellationToken,
    members: usize,
    /// Sent at the end of the turn, or before what else is to be said.
    settled: Vec<v1::Settlement>,
}

impl Stream {
    fn send(&mut self, body: shares_up::Body) {
        self.flush();
        // One that has ended says so itself; its members join again then.
        let _ = self.up.send(v1::SharesUp { body: Some(body) });
    }

    fn flush(&mut self) {
        if !self.settled.is_empty() {
            let settlements = std::mem::take(&mut self.settled);
            let body = shares_up::Body::Settlements(v1::Settlements { settlements });
            let _ = self.up.send(v1::SharesUp { body: Some(body) });
        }
    }
}

/// What a stream has to say; None: it has ended.
type Said = Option<shares_down::Body>;

struct Table {
    inner: Arc<Inner>,
    members: HashMap<Member, Membership>,
    /// How many of them are to join.
    unplaced: usize,
    streams: HashMap<u64, Stream>,
    next_stream: u64,
    said: mpsc::Sender<(u64, Said)>,
}

pub(super) async fn run(inner: Arc<Inner>, mut commands: mpsc::UnboundedReceiver<Command>) {
    let (said, mut heard) = mpsc::channel(QUEUE);
    let mut table =
        Table { inner, members: HashMap::new(), unplaced: 0, streams: HashMap::new(), next_stream: 1, said };
    let mut taken = Vec::with_capacity(TURN);
    let mut retry = tokio::time::interval(RETRY);
    retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let stop = table.inner.stop.clone();
    loop {
        tokio::select! {
            count = commands.recv_many(&mut taken, TURN) => {
                if count == 0 {
                    return;
                }
                for command in taken.drain(..) {
                    table.command(command);
                }
                table.streams.values_mut().for_each(Stream::flush);
            }
            Some((stream, said)) = heard.recv() => table.heard(stream, said),
            _ = retry.tick(), if table.unplaced > 0 => table.place_all(),
            () = stop.cancelled() => return,
        }
    }
}

impl Table {
    fn command(&mut self, command: Command) {
        match command {
            Command::Join { conn, share, who, joined } => {
                let joined = Some(joined);
                self.members.insert(who.member, Membership { conn, share, who, stream: None, joined });
                self.unplaced += 1;
                self.place(who.member);
            }
            Command::Leave { member, kept_seconds } => {
                let Some(membership) = self.members.remove(&member) else { return };
                let Some(stream) = membership.stream else {
                    self.unplaced -= 1;
                    return;
                };
                let leave = v1::LeaveShare { member, kept_seconds };
                self.send(stream, shares_up::Body::Leave(leave));
                self.vacate(stream);
            }
            Command::Settle { member, token, outcome } => {
                if let Some(stream) = self.members.get(&member).and_then(|membership| membership.stream)
                    && let Some(stream) = self.streams.get_mut(&stream)
                {
                    stream.settled.push(v1::Settlement { member, token, outcome: outcome.into() });
                }
            }
            Command::Ready { member } => {
                if let Some(stream) = self.members.get(&member).and_then(|membership| membership.stream) {
                    self.send(stream, shares_up::Body::Ready(v1::MemberReady { member }));
                }
            }
        }
    }

    fn send(&mut self, stream: u64, body: shares_up::Body) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.send(body);
        }
    }

    /// A stream without members is not needed.
    fn vacate(&mut self, stream: u64) {
        if let Some(found) = self.streams.get_mut(&stream) {
            found.members -= 1;
            if found.members == 0
                && let Some(stream) = self.streams.remove(&stream)
            {
                // Ends when what is queued has been sent.
                drop(stream.up);
            }
        }
    }

    fn place_all(&mut self) {
        let unplaced: Vec<Member> = self
            .members
            .iter()
            .filter(|(_, membership)| membership.stream.is_none())
            .map(|(&member, _)| member)
            .collect();
        for member in unplaced {
            self.place(member);
        }
    }

    /// Joins a member's share where it is at home, if that is known.
    fn place(&mut self, member: Member) {
        let Some(membership) = self.members.get(&member) else { return };
        let slots = self.inner.slots.load_full();
        let Some((_, owner)) = slots.owner_of(&membership.share) else { return };
        let known = self
            .streams
            .iter()
            .find(|(_, stream)| stream.registry == owner.instance && stream.incarnation == owner.incarnation);
        let stream = match known.map(|(&stream, _)| stream).or_else(|| self.open(owner)) {
            Some(stream) => stream,
            None => return,
        };
        let Some(membership) = self.members.get_mut(&member) else { return };
        membership.stream = Some(stream);
        self.unplaced -= 1;
        let join = v1::JoinShare {
            member,
            share: membership.share.to_string(),
            window: membership.who.window.into(),
            expiry_seconds: membership.who.expiry_seconds,
        };
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.members += 1;
        }
        self.send(stream, shares_up::Body::Join(join));
    }

    fn open(&mut self, owner: &SlotOwner) -> Option<u64> {
        let (registry, incarnation) = (&owner.instance, owner.incarnation);
        let address = {
            let registries = self.inner.registries.read();
            registries.get(registry).filter(|known| known.incarnation == incarnation)?.address.clone()
        };
        let endpoint = endpoint(&address)?;
        let id = self.next_stream;
        self.next_stream += 1;
        let (up, outbound) = mpsc::unbounded_channel();
        let hello =
            v1::SharesHello { instance: self.inner.instance.clone(), incarnation: self.inner.incarnation };
        let _ = up.send(v1::SharesUp { body: Some(shares_up::Body::Hello(hello)) });
        let stop = self.inner.stop.child_token();
        let (said, stopped, registry) = (self.said.clone(), stop.clone(), registry.clone());
        let name = registry.clone();
        let stream = Stream { registry, incarnation, up, stop, members: 0, settled: Vec::new() };
        self.streams.insert(id, stream);
        tokio::spawn(async move {
            let talk = converse(id, endpoint, outbound, &said);
            if let Some(reason) = stopped.run_until_cancelled(talk).await {
                tracing::debug!(registry = %name, reason, "a stream for shared subscriptions has ended");
            }
            let _ = said.send((id, None)).await;
        });
        Some(id)
    }

    fn heard(&mut self, stream: u64, said: Said) {
        match said {
            Some(shares_down::Body::Joined(v1::Joined { member })) => {
                if let Some(membership) = self.members.get_mut(&member)
                    && let Some(joined) = membership.joined.take()
                {
                    joined(Ok(()));
                }
            }
            Some(shares_down::Body::Assignments(v1::Assignments { assignments })) => {
                assignments.into_iter().for_each(|assignment| self.assigned(assignment));
            }
            Some(shares_down::Body::Lost(v1::MemberLost { member })) => {
                if let Some(membership) = self.members.get_mut(&member)
                    && membership.stream == Some(stream)
                {
                    membership.stream = None;
                    self.unplaced += 1;
                    self.vacate(stream);
                }
            }
            Some(shares_down::Body::Refused(v1::MemberRefused { member, text })) => {
                let Some(membership) = self.members.get_mut(&member) else { return };
                tracing::debug!(share = %membership.share, text, "a shared subscription is refused");
                match membership.joined.take() {
                    // Whoever waits for it lets the member leave.
                    Some(joined) => joined(Err(QUOTA_EXCEEDED)),
                    // It was one before the share's home moved: it tries on.
                    None => {
                        membership.stream = None;
                        self.unplaced += 1;
                        self.vacate(stream);
                    }
                }
            }
            None => {
                if let Some(stream) = self.streams.remove(&stream) {
                    stream.stop.cancel();
                }
                for membership in self.members.values_mut().filter(|m| m.stream == Some(stream)) {
                    membership.stream = None;
                    self.unplaced += 1;
                }
            }
        }
    }

    fn assigned(&self, assignment: v1::Assignment) {
        let v1::Assignment { member, token, message: Some(message) } = assignment else { return };
        // One that has left has said so: what it had is given to others.
        let Some(membership) = self.members.get(&member) else { return };
        if let Some(shard) = self.inner.shards().get(usize::from(membership.conn.shard)) {
            let delivery = Arc::new(Delivery::new(message));
            shard.post(Event::Share { conn: membership.conn, member, token, delivery });
        }
    }
}

/// Speaks until the stream ends; gives the reason.
async fn converse(
    id: u64,
    endpoint: Endpoint,
    outbound: mpsc::UnboundedReceiver<v1::SharesUp>,
    said: &mpsc::Sender<(u64, Said)>,
) -> String {
    let channel = match endpoint.connect().await {
        Ok(channel) => channel,
        Err(error) => return error.to_string(),
    };
    let mut client = v1::shares_client::SharesClient::new(channel)
        .max_decoding_message_size(MAX_GRPC_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_GRPC_MESSAGE_BYTES);
    let mut down = match client.serve(UnboundedReceiverStream::new(outbound)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status.to_string(),
    };
    loop {
        match down.message().await {
            Ok(Some(v1::SharesDown { body: Some(body) })) => {
                if said.send((id, Some(body))).await.is_err() {
                    return "the gateway ends".to_owned();
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => return "the registry ended it".to_owned(),
            Err(status) => return status.to_string(),
        }
    }
}
