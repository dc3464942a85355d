//! The opening handshake (RFC 6455 §4.2), which a server answers with 101 or with a refusal in plain words.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

/// The longest request, headers included, that is waited for.
pub const MAX_HANDSHAKE_BYTES: usize = 8 * 1024;
/// The most headers of a request.
const MAX_HEADERS: usize = 64;
/// Where MQTT is served; a query is ignored.
const PATHS: [&str; 2] = ["/mqtt", "/"];
/// Subprotocols, the preferred one first. `mqtt` is that of MQTT 3.1.1 and 5.0 [MQTT-6.0.0-3]; `mqttv3.1` is what some
/// clients of old offer, whichever version they then speak.
const SUBPROTOCOLS: [&str; 2] = ["mqtt", "mqttv3.1"];
/// RFC 6455 §1.3.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// What the start of a connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handshake {
    /// More bytes are needed; never said of [`MAX_HANDSHAKE_BYTES`] or more.
    Incomplete,
    /// Send `response`; from `consumed` on the input is frames.
    Accept { consumed: usize, response: Vec<u8> },
    /// Send `response` and close.
    Refuse { response: Vec<u8>, error: HandshakeError },
}

/// Why a request is not a handshake that can be accepted; the text is also the body of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    #[error("not an HTTP/1.1 request")]
    NotHttp,
    #[error("the request is longer than {MAX_HANDSHAKE_BYTES} bytes or has more than {MAX_HEADERS} headers")]
    TooLarge,
    #[error("only GET opens a WebSocket")]
    Method,
    #[error("HTTP/1.1 is needed for a WebSocket")]
    HttpVersion,
    #[error("nothing is here; MQTT over WebSocket is at /mqtt")]
    Path,
    #[error("this is MQTT over WebSocket: connect with a WebSocket client and subprotocol \"mqtt\"")]
    NotUpgrade,
    #[error("the request has no Host")]
    Host,
    #[error("only version 13 of WebSocket is supported")]
    Version,
    #[error("Sec-WebSocket-Key is not 16 bytes in base64")]
    Key,
    #[error("the client must offer the subprotocol \"mqtt\" (Sec-WebSocket-Protocol)")]
    Subprotocol,
}

impl HandshakeError {
    fn status(self) -> &'static str {
        match self {
            HandshakeError::NotHttp
            | HandshakeError::HttpVersion
            | HandshakeError::Host
            | HandshakeError::Key
            | HandshakeError::Subprotocol => "400 Bad Request",
            HandshakeError::TooLarge => "431 Request Header Fields Too Large",
            HandshakeError::Method => "405 Method Not Allowed",
            HandshakeError::Path => "404 Not Found",
            HandshakeError::NotUpgrade | HandshakeError::Version => "426 Upgrade Required",
        }
    }

    /// What the status demands to be said besides (RFC 6455 §4.2.2, RFC 9110 §15.5.6, §15.5.22).
    fn headers(self) -> &'static str {
        match self {
            HandshakeError::Method => "Allow: GET\r\n",
            HandshakeError::NotUpgrade | HandshakeError::Version => {
                "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            }
            _ => "",
        }
    }

    fn response(self) -> Vec<u8> {
        let body = format!("{self}\n");
        let upgrade = if self.headers().starts_with("Upgrade") { "Upgrade, " } else { "" };
        format!(
            "HTTP/1.1 {}\r\n{}Content-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: {upgrade}close\r\n\r\n{body}",
            self.status(),
            self.headers(),
            body.len(),
        )
        .into_bytes()
    }
}

/// Looks at all that a connection has sent so far.
pub fn handshake(input: &[u8]) -> Handshake {
    // What is after the limit is not looked at, so that the answer does not depend on how the bytes came in.
    let request = &input[..input.len().min(MAX_HANDSHAKE_BYTES)];
    match check(request) {
        Ok(Some(accepted)) => accepted,
        Ok(None) if request.len() < MAX_HANDSHAKE_BYTES => Handshake::Incomplete,
        Ok(None) => refuse(HandshakeError::TooLarge),
        Err(error) => refuse(error),
    }
}

fn refuse(error: HandshakeError) -> Handshake {
    Handshake::Refuse { response: error.response(), error }
}

fn check(input: &[u8]) -> Result<Option<Handshake>, HandshakeError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let consumed = match request.parse(input) {
        Ok(httparse::Status::Complete(consumed)) => consumed,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(HandshakeError::TooLarge),
        Err(_) => return Err(HandshakeError::NotHttp),
    };
    if request.method != Some("GET") {
        return Err(HandshakeError::Method);
    }
    let path = request.path.unwrap_or_default();
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    if !PATHS.contains(&path) {
        return Err(HandshakeError::Path);
    }
    let headers = Headers(request.headers);
    if !headers.has_token("upgrade", "websocket") || !headers.has_token("connection", "upgrade") {
        return Err(HandshakeError::NotUpgrade);
    }
    if request.version != Some(1) {
        return Err(HandshakeError::HttpVersion);
    }
    headers.single("host").ok_or(HandshakeError::Host)?;
    if headers.single("sec-websocket-version") != Some(b"13") {
        return Err(HandshakeError::Version);
    }
    let key = headers.single("sec-websocket-key").ok_or(HandshakeError::Key)?;
    let mut nonce = [0; 18]; // what the decoder wants for 24 characters
    if STANDARD.decode_slice(key, &mut nonce) != Ok(16) {
        return Err(HandshakeError::Key);
    }
    let subprotocol = SUBPROTOCOLS
        .into_iter()
        .find(|subprotocol| headers.has_token("sec-websocket-protocol", subprotocol))
        .ok_or(HandshakeError::Subprotocol)?;
    let accept = STANDARD.encode(Sha1::new().chain_update(key).chain_update(GUID).finalize());
    let response = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: {subprotocol}\r\n\r\n"
    )
    .into_bytes();
    Ok(Some(Handshake::Accept { consumed, response }))
}

struct Headers<'h, 'b>(&'h [httparse::Header<'b>]);

impl<'b> Headers<'_, 'b> {
    fn named(&self, name: &str) -> impl Iterator<Item = &'b [u8]> {
        self.0.iter().filter(move |header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
    }

    /// The value of a header that must be there once.
    fn single(&self, name: &str) -> Option<&'b [u8]> {
        let mut values = self.named(name);
        values.next().filter(|_| values.next().is_none()).map(<[u8]>::trim_ascii)
    }

    /// Whether a list header, which may be there several times, has the token.
    fn has_token(&self, name: &str, token: &str) -> bool {
        self.named(name)
            .flat_map(|value| value.split(|&byte| byte == b','))
            .any(|item| item.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
    }
}
