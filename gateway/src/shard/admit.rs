//! Who is let in, and who has to go because the rules have changed: limits, lists, load, revocations.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Shard, close};
use crate::admission::{Guessed, SourceId, Turned};
use crate::auth::{Admitted, Failure, Refusal};
use crate::codec::reason;
use crate::overload::Load;

impl Shard {
    /// A connection has been accepted: may it stay? If so, it is counted for its address until it is closed.
    pub(super) fn enter(&self, address: IpAddr, is_proxy: bool) -> Option<SourceId> {
        if is_proxy {
            return Some(self.shared.admission.enter_proxy(address, Instant::now(), &self.config));
        }
        match self.shared.admission.enter(address, Instant::now(), &self.config) {
            Ok(source) => Some(source),
            Err(turned) => {
                self.note_turned(address, turned);
                None
            }
        }
    }

    /// A proxy has said whose connection this is. False: it may not stay.
    pub(super) fn enter_behind_proxy(&mut self, index: u32, client: IpAddr) -> bool {
        let conn = &mut self.conns[index as usize];
        match self.shared.admission.move_to(conn.source, client, Instant::now(), &self.config) {
            Ok(source) => {
                conn.source = source;
                true
            }
            Err(turned) => {
                self.note_turned(client, turned);
                false
            }
        }
    }

    fn note_turned(&self, address: IpAddr, turned: Turned) {
        tracing::debug!(peer = %address, reason = turned.label(), "connection turned away");
        self.link.metrics().accepts_refused.with_label_values(&[turned.label()]).inc();
    }

    /// A connection waits for its CONNECT. Of too many the oldest goes: a device sends its CONNECT at once.
    pub(super) fn note_pending(&mut self, index: u32, generation: u32) {
        self.pending.push_back((index, generation));
        self.pending_count += 1;
        self.link.metrics().pending_connects.inc();
        // Each shard has its share, for none knows what the others have.
        let most = (self.config.max_pending_connects as usize).div_ceil(self.link.shards_count());
        loop {
            let Some(&(index, generation)) = self.pending.front() else { return };
            let is_pending = self
                .conns
                .get(index as usize)
                .is_some_and(|conn| conn.generation == generation && conn.session.is_none());
            if is_pending && self.pending_count <= most {
                return;
            }
            self.pending.pop_front();
            if is_pending {
                self.close(index, close::Reason::PendingOverflow);
            }
        }
    }

    /// Its CONNECT has come, or it has gone without one.
    pub(super) fn not_pending(&mut self) {
        self.pending_count -= 1;
        self.link.metrics().pending_connects.dec();
    }

    /// Why nobody new is served at present.
    pub(super) fn is_busy(&self) -> Result<(), Refusal> {
        // Where another gateway is known to have room, this is the place to name it: 0x9C with a Server Reference.
        let busy = |text: String| Err(Refusal { reason: reason::SERVER_BUSY, text, failure: None });
        match self.shared.overload.load() {
            Load::Normal => {}
            Load::Memory => return busy("the gateway is short of memory, try again later".to_owned()),
            Load::Cpu => return busy("the gateway is short of CPU, try again later".to_owned()),
        }
        if self.shared.connections.load(Ordering::Relaxed) > self.config.max_connections as usize {
            return busy(format!(
                "the gateway holds its {} connections already",
                self.config.max_connections
            ));
        }
        Ok(())
    }

    /// Counts a device for its app, if that has room. One that comes back while its former connection is still there
    /// takes that one's place.
    pub(super) fn enter_app(&self, admitted: &Admitted) -> Result<(), Refusal> {
        let apps = self.shared.apps.load();
        let max = apps.get(&*admitted.app).map_or(0, |app| app.limits.max_connections_per_gateway);
        let is_back = || {
            let key = crate::delivery::session_key(&admitted.app, &admitted.user, &admitted.client_id);
            self.link.sessions().find(key).is_some()
        };
        let max = if max > 0 && is_back() { 0 } else { max };
        if self.shared.admission.enter_app(&admitted.app, max) {
            return Ok(());
        }
        let text = format!("the app has its {max} connections at this gateway already");
        Err(Refusal { reason: reason::QUOTA_EXCEEDED, text, failure: None })
    }

    /// Counts credentials that were refused; guesses are held against the address. True: it is refused for them.
    pub(super) fn note_failure(&self, index: u32, failure: Failure) -> bool {
        self.link.metrics().auth_failures.with_label_values(&[failure.label()]).inc();
        let source = self.conns[index as usize].source;
        if !failure.is_guess() {
            return false;
        }
        let verdict = self.shared.admission.failed(source, Instant::now(), &self.config);
        if verdict == Guessed::Enough {
            let peer = self.conns[index as usize].peer();
            tracing::warn!(
                address = %peer.ip(),
                seconds = self.config.auth_block_seconds,
                "address refused for a while: credentials from it failed too often"
            );
        }
        verdict != Guessed::Noted
    }

    /// Takes over what has changed in the documents, also for those who are connected: a network that is denied now, a
    /// token that is revoked now.
    pub(super) fn follow_documents(&mut self) {
        let config = self.shared.config.load_full();
        let lists_differ = (&config.allow, &config.deny) != (&self.config.allow, &self.config.deny);
        self.config = config;
        if lists_differ {
            self.close_where(close::Reason::Banned, |shard, index| {
                let conn = &shard.conns[index as usize];
                !shard.shared.admission.permits(conn.peer().ip())
            });
        }
        let keyring = self.shared.keyring.load_full();
        if Arc::ptr_eq(&keyring, &self.keyring) {
            return;
        }
        let before = std::mem::replace(&mut self.keyring, keyring);
        let apps: BTreeSet<String> = self.keyring.revoked_since(&before).into_iter().collect();
        if !apps.is_empty() {
            self.drop_revoked(&apps);
        }
    }

    fn drop_revoked(&mut self, apps: &BTreeSet<String>) {
        self.close_where(close::Reason::Revoked, |shard, index| {
            shard.conns[index as usize].session.as_ref().is_some_and(|session| {
                apps.contains(&*session.app)
                    && shard.keyring.is_revoked(&session.app, &session.user, session.stamp)
            })
        });
        let keyring = self.keyring.clone();
        self.drop_guests("revoked", |guest| {
            apps.contains(&*guest.app) && keyring.is_revoked(&guest.app, &guest.user, guest.stamp)
        });
    }

    fn close_where(&mut self, why: close::Reason, is_meant: impl Fn(&Shard, u32) -> bool) {
        let all: Vec<u32> = self.conns.iter().map(|(index, _)| index as u32).collect();
        for index in all {
            if self.conns.contains(index as usize) && is_meant(self, index) {
                self.close(index, why.clone());
            }
        }
    }
}
