//! Where a gateway is: `mqtt://host:port` or `ws://host:port/path`, given or asked of the dispatcher.

use std::fmt;

use super::DeviceError;

/// The address of a gateway's listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// MQTT over TCP.
    Tcp { host: String, port: u16 },
    /// MQTT over WebSocket; the whole URL.
    WebSocket { url: String },
}

impl Endpoint {
    /// Reads `mqtt://host[:1883]`, `tcp://host:port`, `host:port`, or `ws://host[:port][/path]`.
    pub fn parse(text: &str) -> Result<Self, DeviceError> {
        let wrong = |problem: &'static str| DeviceError::Address { address: text.to_owned(), problem };
        if let Some(rest) = text.strip_prefix("ws://") {
            if rest.is_empty() {
                return Err(wrong("has no host"));
            }
            let url = if rest.contains('/') { text.to_owned() } else { format!("{text}/mqtt") };
            return Ok(Endpoint::WebSocket { url });
        }
        let rest = match text.split_once("://") {
            None | Some(("mqtt" | "tcp", _)) => text.split_once("://").map_or(text, |(_, rest)| rest),
            Some(("mqtts" | "wss" | "ssl" | "tls", _)) => {
                return Err(wrong("asks for TLS, which this version of the SDK does not speak"));
            }
            Some(_) => return Err(wrong("has a scheme other than mqtt:// and ws://")),
        };
        let rest = rest.trim_end_matches('/');
        let (host, port) = match rest.rsplit_once(':') {
            // "[::1]" without a port also holds colons.
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| wrong("has a port that is not a number up to 65535"))?)
            }
            _ => (rest, 1883),
        };
        if host.is_empty() {
            return Err(wrong("has no host"));
        }
        Ok(Endpoint::Tcp { host: host.to_owned(), port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp { host, port } => write!(f, "mqtt://{host}:{port}"),
            Endpoint::WebSocket { url } => f.write_str(url),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let tcp = |host: &str, port| Endpoint::Tcp { host: host.to_owned(), port };
        for (text, expected) in [
            ("mqtt://127.0.0.1:1884", tcp("127.0.0.1", 1884)),
            ("mqtt://push.example", tcp("push.example", 1883)),
            ("localhost:99", tcp("localhost", 99)),
            ("tcp://[::1]:1883", tcp("[::1]", 1883)),
            ("mqtt://[::1]", tcp("[::1]", 1883)),
            ("ws://h:80/x", Endpoint::WebSocket { url: "ws://h:80/x".to_owned() }),
            ("ws://h:80", Endpoint::WebSocket { url: "ws://h:80/mqtt".to_owned() }),
        ] {
            assert_eq!(Endpoint::parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_with_an_address_is_said() {
        for (text, expected) in [
            ("", "has no host"),
            ("mqtt://:1883", "has no host"),
            ("mqtt://h:x", "port"),
            ("mqtt://h:70000", "port"),
            ("mqtts://h", "TLS"),
            ("http://h", "scheme"),
            ("ws://", "no host"),
        ] {
            let error = Endpoint::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
