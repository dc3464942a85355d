//! What a listener is, in the `gateway` document; what is wrong with it as far as the document alone tells.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;

use carillon_agent::document::Violation;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Listeners of one gateway, those of its command line aside.
pub const MAX_LISTENERS: usize = 64;
/// Certificates of one listener.
pub const MAX_CERTIFICATES: usize = 256;

/// What is spoken at a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// MQTT over TCP.
    Mqtt,
    /// MQTT over TLS.
    Mqtts,
    /// MQTT over WebSocket.
    Ws,
    /// MQTT over WebSocket over TLS.
    Wss,
}

impl Protocol {
    pub const ALL: [Protocol; 4] = [Protocol::Mqtt, Protocol::Mqtts, Protocol::Ws, Protocol::Wss];

    /// Its name in configuration, in metrics, in discovery, and as the scheme of a URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Mqtt => "mqtt",
            Protocol::Mqtts => "mqtts",
            Protocol::Ws => "ws",
            Protocol::Wss => "wss",
        }
    }

    pub fn is_tls(self) -> bool {
        matches!(self, Protocol::Mqtts | Protocol::Wss)
    }

    pub fn is_websocket(self) -> bool {
        matches!(self, Protocol::Ws | Protocol::Wss)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An address that devices connect to, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListenerConfig {
    /// Its name in logs and metrics; `mqtt`, `mqtts`, `ws` and `wss` are those of the command line.
    pub name: String,
    pub protocol: Protocol,
    /// `ip:port` or `[ip]:port`; `0.0.0.0` is every IPv4 address, `[::]` every one of IPv6 and IPv4; port 0 lets the kernel
    /// choose.
    pub address: String,
    /// What devices are told to connect to (`host:port`), when it is not the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// Every connection must begin with a header of PROXY protocol version 2, and comes from where that says. To be used
    /// where nobody but the proxy can connect.
    #[serde(default)]
    pub proxy_protocol: bool,
    /// Needed by, and only allowed for, `mqtts` and `wss`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// A device gets the first one that has the name it asks for (SNI), or the first of all if there is none.
    pub certificates: Vec<CertificateConfig>,
    #[serde(default)]
    pub min_version: TlsVersion,
    #[serde(default)]
    pub client_auth: ClientAuth,
    /// PEM file of the authorities that devices' certificates are signed by. Needed unless `client_auth` is `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<String>,
    /// A device without a token is the user that its certificate names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_certificate_user: Option<CertificateUserConfig>,
}

/// PEM files on the gateway's disk, read again when they change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CertificateConfig {
    /// The certificate, and after it those between it and the root.
    pub certificate: String,
    pub key: String,
    /// DNS names it is for, also `*.example.com`; empty = those in the certificate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
}

/// The oldest version of TLS that is spoken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TlsVersion {
    #[default]
    #[serde(rename = "1.2")]
    V12,
    #[serde(rename = "1.3")]
    V13,
}

/// Must devices show a certificate?
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ClientAuth {
    #[default]
    None,
    /// One that is shown must be valid.
    Optional,
    Required,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CertificateUserConfig {
    pub app: String,
    #[serde(default)]
    pub from: CertificateName,
}

/// Where in a device's certificate its user is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CertificateName {
    /// The subject's common name.
    #[default]
    CommonName,
    /// The first DNS name among the subject's alternative names.
    DnsName,
    /// The first e-mail address among them.
    Email,
    /// The first URI among them.
    Uri,
}

/// What is wrong with the `listeners` of a document.
pub fn check(listeners: &[ListenerConfig]) -> Vec<Violation> {
    let mut wrong = Vec::new();
    if listeners.len() > MAX_LISTENERS {
        wrong.push(Violation::new("listeners", format!("are more than {MAX_LISTENERS}")));
    }
    let (mut names, mut addresses) = (BTreeMap::new(), BTreeMap::new());
    for (index, listener) in listeners.iter().enumerate() {
        let mut say = |field: &str, message: String| {
            wrong.push(Violation::new(format!("listeners[{index}].{field}"), message));
        };
        let name = listener.name.as_str();
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 63 || !name.chars().all(is_name) {
            say("name", format!("{name:?} must be 1 to 63 of a-z, 0-9 and -"));
        } else if Protocol::ALL.iter().any(|protocol| protocol.as_str() == name) {
            say("name", format!("{name:?} is the name of the listener that the command line gives"));
        } else if let Some(other) = names.insert(name, index) {
            say("name", format!("is that of listeners[{other}]"));
        }
        match listener.address.parse::<SocketAddr>() {
            Err(_) => say("address", format!("{:?} must be ip:port or [ip]:port", listener.address)),
            Ok(address) if address.port() == 0 => {}
            Ok(address) => {
                if let Some(other) = addresses.insert(address, index) {
                    say("address", format!("is that of listeners[{other}]"));
                }
            }
        }
        if let Some(advertise) = &listener.advertise
            && !is_host_and_port(advertise)
        {
            say("advertise", format!("{advertise:?} must be host:port"));
        }
        match &listener.tls {
            Some(_) if !listener.protocol.is_tls() => {
                say("tls", format!("{} is not over TLS", listener.protocol))
            }
            None if listener.protocol.is_tls() => {
                say("tls", format!("is missing, which {} needs", listener.protocol))
            }
            None => {}
            Some(tls) => check_tls(tls, &mut |field, message| say(&format!("tls.{field}"), message)),
        }
    }
    wrong
}

fn check_tls(tls: &TlsConfig, say: &mut dyn FnMut(&str, String)) {
    let path = |field: &str, path: &str, say: &mut dyn FnMut(&str, String)| {
        if !Path::new(path).is_absolute() {
            say(field, format!("{path:?} must be an absolute path"));
        }
    };
    if tls.certificates.is_empty() || tls.certificates.len() > MAX_CERTIFICATES {
        say("certificates", format!("must be 1 to {MAX_CERTIFICATES}"));
    }
    for (index, certificate) in tls.certificates.iter().enumerate() {
        path(&format!("certificates[{index}].certificate"), &certificate.certificate, say);
        path(&format!("certificates[{index}].key"), &certificate.key, say);
        for (at, name) in certificate.names.iter().enumerate() {
            if !is_dns_name(name.strip_prefix("*.").unwrap_or(name)) {
                say(&format!("certificates[{index}].names[{at}]"), format!("{name:?} is no DNS name"));
            }
        }
    }
    if let Some(ca) = &tls.client_ca {
        path("client_ca", ca, say);
    }
    match (tls.client_auth, &tls.client_ca) {
        (ClientAuth::None, Some(_)) => {
            say("client_auth", "is none, so client_ca says nothing: optional or required".to_owned());
        }
        (ClientAuth::Optional | ClientAuth::Required, None) => {
            say("client_ca", "is missing, which client_auth needs".to_owned());
        }
        _ => {}
    }
    if let Some(user) = &tls.client_certificate_user {
        if tls.client_auth == ClientAuth::None {
            say("client_certificate_user", "needs client_auth: optional or required".to_owned());
        }
        if user.app.is_empty() {
            say("client_certificate_user.app", "is empty".to_owned());
        }
    }
}

fn is_host_and_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|p| p > 0)
    })
}

fn is_dns_name(name: &str) -> bool {
    rustls::pki_types::DnsName::try_from(name).is_ok()
}
