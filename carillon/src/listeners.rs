//! The listeners that the command line gives a gateway, and what to say when one cannot be opened.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;
use carillon_gateway::GatewayError;
use carillon_gateway::listeners::config::{
    CertificateConfig, ClientAuth, ListenerConfig, Protocol, TlsConfig, TlsVersion,
};
use carillon_gateway::listeners::{ListenError, ListenerError};

use crate::args::TlsArgs;
use crate::process::cannot_listen;

/// Each is named by its protocol.
pub fn of_flags(
    mqtt: Option<SocketAddr>,
    ws: Option<SocketAddr>,
    tls: &TlsArgs,
) -> anyhow::Result<Vec<ListenerConfig>> {
    let listener = |protocol: Protocol, address: SocketAddr, tls: Option<TlsConfig>| ListenerConfig {
        name: protocol.to_string(),
        protocol,
        address: address.to_string(),
        advertise: None,
        proxy_protocol: false,
        tls,
    };
    let plain = [(Protocol::Mqtt, mqtt), (Protocol::Ws, ws)];
    let plain = plain.into_iter().filter_map(|(protocol, address)| Some(listener(protocol, address?, None)));
    let mut listeners: Vec<ListenerConfig> = plain.collect();
    for (protocol, address) in [(Protocol::Mqtts, tls.mqtts), (Protocol::Wss, tls.wss)] {
        if let (Some(address), Some(certificate), Some(key)) = (address, &tls.tls_certificate, &tls.tls_key) {
            let tls = TlsConfig {
                certificates: vec![CertificateConfig {
                    certificate: path(certificate, "--tls-certificate")?,
                    key: path(key, "--tls-key")?,
                    names: Vec::new(),
                }],
                min_version: TlsVersion::default(),
                client_auth: if tls.tls_client_ca.is_some() {
                    ClientAuth::Required
                } else {
                    ClientAuth::None
                },
                client_ca: tls.tls_client_ca.as_deref().map(|ca| path(ca, "--tls-client-ca")).transpose()?,
                client_certificate_user: None,
            };
            listeners.push(listener(protocol, address, Some(tls)));
        }
    }
    Ok(listeners)
}

fn path(path: &Path, flag: &str) -> anyhow::Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{flag}: {} is not UTF-8", path.display()))
}

/// A listener's address, the flag that changes it, and what it is for.
pub fn named(listener: &ListenerConfig) -> anyhow::Result<(SocketAddr, String, &'static str)> {
    let purpose = match listener.protocol {
        Protocol::Mqtt => "MQTT",
        Protocol::Mqtts => "MQTT over TLS",
        Protocol::Ws => "MQTT over WebSocket",
        Protocol::Wss => "MQTT over WebSocket over TLS",
    };
    Ok((listener.address.parse()?, format!("--{}", listener.protocol), purpose))
}

/// Says which flag changes what is in the way.
pub fn gateway_error(error: GatewayError) -> anyhow::Error {
    let GatewayError::Listener { listener, error } = error else {
        return anyhow::Error::new(error).context("the gateway does not start");
    };
    let (address, error) = match error {
        ListenerError::Listen(ListenError::InUse(address)) => (address, std::io::ErrorKind::AddrInUse.into()),
        ListenerError::Listen(ListenError::Other { address, error }) => (address, error),
        error => {
            return anyhow::Error::new(error).context(format!("--{} cannot be served", listener.protocol));
        }
    };
    match named(&listener) {
        Ok((_, flag, purpose)) => cannot_listen(address, &flag, purpose, &error),
        Err(error) => error,
    }
}
