//! What lies between a connection's socket and its MQTT packets: PROXY protocol, TLS, WebSocket. A plain TCP connection
//! has none of it, and pays a null pointer for it.

use std::net::SocketAddr;
use std::sync::Arc;

use super::conn::{Conn, Phase};
use super::tls::Tls;
use crate::auth::CertificateUser;
use crate::listeners::Settings;
use crate::websocket;

#[derive(Default)]
pub struct Layers {
    pub tls: Option<Box<Tls>>,
    pub websocket: Option<websocket::Decoder>,
    pub arrival: Option<Box<Arrival>>,
}

/// What is known of a connection before its CONNECT, and not needed after it.
pub struct Arrival {
    pub settings: Arc<Settings>,
    /// Where the client is, as its proxy says.
    pub client: Option<SocketAddr>,
    /// Who its certificate says it is.
    pub user: Option<CertificateUser>,
}

/// Where a connection begins.
pub fn first_phase(settings: &Settings) -> Phase {
    if settings.proxy_protocol { Phase::Proxied } else { after_proxy(settings) }
}

pub fn after_proxy(settings: &Settings) -> Phase {
    if settings.tls.is_some() { Phase::Securing } else { after_tls(settings) }
}

pub fn after_tls(settings: &Settings) -> Phase {
    if settings.protocol.is_websocket() { Phase::Upgrading } else { Phase::Connecting }
}

impl Layers {
    /// None where nothing needs to be known.
    pub fn on_arrival(settings: &Arc<Settings>) -> Option<Box<Layers>> {
        if !settings.proxy_protocol && settings.tls.is_none() {
            return None;
        }
        let arrival = Arrival { settings: settings.clone(), client: None, user: None };
        Some(Box::new(Layers { arrival: Some(Box::new(arrival)), ..Layers::default() }))
    }
}

impl Conn {
    /// Where the client is: as the proxy says at listeners that are behind one, else as the socket says. IPv4 addresses
    /// are IPv4 addresses, also at a socket of IPv6. Unspecified when the socket is on its way out.
    pub fn peer(&self) -> SocketAddr {
        if let Some(session) = &self.session {
            return session.address;
        }
        let proxied = self.layers.as_ref().and_then(|layers| layers.arrival.as_ref()?.client);
        let address = proxied.or_else(|| self.stream.peer_addr().ok());
        let address = address.unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
        SocketAddr::new(address.ip().to_canonical(), address.port())
    }

    pub fn is_websocket(&self) -> bool {
        self.layers.as_ref().is_some_and(|layers| layers.websocket.is_some())
    }

    pub fn is_tls(&self) -> bool {
        self.layers.as_ref().is_some_and(|layers| layers.tls.is_some())
    }

    pub fn websocket(&mut self) -> Option<&mut websocket::Decoder> {
        self.layers.as_mut()?.websocket.as_mut()
    }

    pub fn tls(&mut self) -> Option<&mut Tls> {
        self.layers.as_mut()?.tls.as_deref_mut()
    }

    pub fn arrival(&mut self) -> Option<&mut Arrival> {
        self.layers.as_mut()?.arrival.as_deref_mut()
    }

    /// The CONNECT is there: what was only needed up to it goes. Gives the user that a certificate has named.
    pub fn take_certificate_user(&mut self) -> Option<CertificateUser> {
        self.arrival()?.user.take()
    }

    /// Forgets what is only needed before the session is there.
    pub fn forget_arrival(&mut self) {
        let Some(layers) = &mut self.layers else { return };
        layers.arrival = None;
        if layers.tls.is_none() && layers.websocket.is_none() {
            self.layers = None;
        }
    }
}
