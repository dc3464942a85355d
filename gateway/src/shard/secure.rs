//! The way from a socket to the bytes of the next layer: the PROXY protocol's header, the TLS handshake, TLS records.

use std::time::{Duration, Instant};

use super::Shard;
use super::close::Reason;
use super::conn::Phase;
use super::layers::{after_proxy, after_tls};
use super::tls::{self, Received, Tls};
use crate::auth::CertificateUser;
use crate::listeners::certificate;
use crate::proxy_protocol::{self, Parsed};

/// A handshake costs as much as thousands of deliveries: so long may a round be at it before all other connections get
/// their turn, one handshake aside.
const HANDSHAKE_BUDGET: Duration = Duration::from_millis(4);

impl Shard {
    /// Goes on with the handshakes that have waited longest.
    pub(super) fn shake_hands(&mut self) {
        if self.handshakes.is_empty() {
            return;
        }
        let began = Instant::now();
        while let Some((index, generation)) = self.handshakes.pop_front() {
            if self.conns.get(index as usize).is_some_and(|conn| conn.generation == generation) {
                // What came with the PROXY header is with the connection; then what the socket has.
                if let Some(mut came) = self.conns[index as usize].partial.take() {
                    self.secured(index, &mut came);
                }
                self.read(index, true);
                if began.elapsed() >= HANDSHAKE_BUDGET {
                    break;
                }
            }
        }
    }

    /// Bytes of a connection that is to begin with a PROXY header.
    pub(super) fn proxied(&mut self, index: u32, bytes: &mut [u8]) {
        let conn = &mut self.conns[index as usize];
        let mut header = conn.partial.take().map_or_else(Vec::new, |partial| *partial);
        header.extend_from_slice(bytes);
        match proxy_protocol::parse(&header) {
            Ok(Parsed::Incomplete) => conn.partial = Some(Box::new(header)),
            Ok(Parsed::Header { consumed, client }) => {
                let Some(arrival) = conn.arrival() else { return };
                arrival.client = client;
                conn.phase = after_proxy(&arrival.settings);
                if let Some(client) = client
                    && !self.enter_behind_proxy(index, client.ip())
                {
                    return self.close(index, Reason::Banned);
                }
                let conn = &mut self.conns[index as usize];
                if consumed == header.len() {
                    return;
                }
                if conn.phase == Phase::Securing {
                    conn.partial = Some(Box::new(header.split_off(consumed)));
                    return self.handshakes.push_back((index, conn.generation));
                }
                self.received(index, &mut header[consumed..]);
            }
            Err(error) => {
                tracing::debug!(proxy = %conn.peer(), %error, "connection from a proxy refused");
                self.link.metrics().proxy_errors.with_label_values(&[error.label()]).inc();
                self.close(index, Reason::Proxy);
            }
        }
    }

    /// Bytes of a connection over TLS.
    pub(super) fn secured(&mut self, index: u32, bytes: &mut [u8]) {
        let conn = &mut self.conns[index as usize];
        let was_securing = conn.phase == Phase::Securing;
        if was_securing && !conn.is_tls() && !self.begin_tls(index) {
            return self.close(index, Reason::Tls);
        }
        let now = self.now;
        let conn = &mut self.conns[index as usize];
        let Some(tls) = conn.tls() else { return };
        let mut plain = std::mem::take(&mut self.plain);
        plain.clear();
        let mut wire = Vec::new();
        let received = tls.receive(bytes, &mut plain, &mut wire);
        let is_done = was_securing && !tls.is_handshaking();
        if !wire.is_empty() {
            let sent = conn.send_wire(&wire, now);
            self.after_send(index, sent);
        }
        // What came before the failure or the end counts.
        if (!is_done || self.secure(index)) && !plain.is_empty() {
            self.counts.bytes_in += plain.len() as u64;
            self.clear(index, &mut plain);
        }
        self.plain = plain;
        let Some(conn) = self.conns.get(index as usize) else { return };
        match received {
            Received::Open => {}
            Received::PeerClosed => self.close(index, Reason::Network),
            Received::Failed(error) => {
                tracing::debug!(peer = %conn.peer(), %error, "TLS failed");
                if conn.phase == Phase::Securing {
                    self.count_handshake(tls::label(&error));
                }
                self.close(index, Reason::Tls);
            }
        }
    }

    fn begin_tls(&mut self, index: u32) -> bool {
        let Some(layers) = &mut self.conns[index as usize].layers else { return false };
        let Some(arrival) = &layers.arrival else { return false };
        match Tls::new(&arrival.settings) {
            Ok(tls) => {
                layers.tls = Some(Box::new(tls));
                true
            }
            Err(error) => {
                tracing::error!(listener = &*arrival.settings.name, %error, "TLS cannot begin");
                false
            }
        }
    }

    /// The handshake is done; false when the connection is closed for it.
    fn secure(&mut self, index: u32) -> bool {
        let conn = &mut self.conns[index as usize];
        let Some(tls) = conn.tls() else { return false };
        let result = if tls.is_resumed() { "resumed" } else { "full" };
        let Some(settings) = conn.arrival().map(|arrival| arrival.settings.clone()) else { return false };
        let certificate = conn.tls().and_then(|tls| tls.peer_certificate());
        if let (Some(wanted), Some(certificate)) = (&settings.certificate_user, certificate) {
            let named = certificate::user(certificate, wanted.from);
            match (named, conn.arrival()) {
                (Ok((user, not_after)), Some(arrival)) => {
                    arrival.user = Some(CertificateUser { app: wanted.app.clone(), user, not_after });
                }
                (Ok(_), None) => {}
                (Err(error), _) => {
                    tracing::debug!(peer = %conn.peer(), %error, "the client's certificate names no user");
                    self.count_handshake("bad_client_certificate");
                    self.close(index, Reason::Tls);
                    return false;
                }
            }
        }
        conn.phase = after_tls(&settings);
        self.count_handshake(result);
        true
    }

    pub(super) fn count_handshake(&self, result: &str) {
        self.link.metrics().tls_handshakes.with_label_values(&[result]).inc();
    }
}
