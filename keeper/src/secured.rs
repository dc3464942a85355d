//! Connections over TLS: both sides show a certificate, and none outlives the one that it was made with. What the caller's
//! says of it is with every call.

mod room;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use carillon_agent::subject::{Subject, SubjectError};
use carillon_agent::tls::{ALPN, Loaded, Tls};
use futures::Stream;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::metrics::Metrics;
use crate::origin::Origin;
use crate::seldom::Seldom;
use room::Room;

/// A handshake that takes longer is given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Whoever is refused has so long to read why.
const FAREWELL: Duration = Duration::from_secs(1);
/// Before connections are accepted again when that has failed, for want of file descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A certificate's end is waited for in steps of this: clocks are set meanwhile, and timers do not reach for years.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

static REFUSED: Seldom = Seldom::new();

/// Who is at the other end of a connection. Tonic puts it to every request.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    pub subject: Result<Arc<Subject>, SubjectError>,
    pub tcp: TcpConnectInfo,
}

/// A connection that has shaken hands.
pub(crate) struct Secured {
    stream: TlsStream<TcpStream>,
    connection: Connection,
    /// Unix seconds.
    ends: i64,
    wait: Pin<Box<Sleep>>,
}

impl Secured {
    /// `own`: whose certificate was shown to it.
    fn new(stream: TlsStream<TcpStream>, address: SocketAddr, own: &Subject) -> Self {
        let (tcp, tls) = stream.get_ref();
        let tcp = TcpConnectInfo { local_addr: tcp.local_addr().ok(), remote_addr: Some(address) };
        let certificate = tls.peer_certificates().and_then(<[_]>::first);
        let subject = certificate.map_or(Err(SubjectError::NoRole), |der| Subject::of(der));
        let ends = subject.as_ref().map_or(i64::MAX, |subject| subject.not_after);
        let subject = subject.and_then(|subject| own.check_cluster(&subject).map(|()| subject));
        let connection = Connection { subject: subject.map(Arc::new), tcp };
        let wait = Box::pin(sleep(left(ends).min(LONGEST_WAIT)));
        Secured { stream, connection, ends, wait }
    }

    /// The certificate is over: so is what was allowed because of it. Whoever has a new one comes back with it.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.wait.as_mut().poll(cx).is_ready() {
            let left = left(self.ends);
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the certificate has expired"));
            }
            self.wait.as_mut().reset(tokio::time::Instant::now() + left.min(LONGEST_WAIT));
        }
        Ok(())
    }
}

/// The time until a Unix second is over, as the clock on the wall shows it.
fn left(until: i64) -> Duration {
    let now = Duration::from_millis(carillon_proto::now_ms());
    Duration::from_secs(u64::try_from(until).unwrap_or(0).saturating_add(1)).saturating_sub(now)
}

impl Connected for Secured {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The connections of a listener that have shaken hands. Dropping it closes the listener.
pub(crate) fn incoming(
    listener: TcpListener,
    tls: Arc<Tls>,
    metrics: Metrics,
) -> impl Stream<Item = io::Result<Secured>> + Send + 'static {
    let accepting = Accepting {
        listener,
        tls,
        metrics,
        room: Room::default(),
        under_way: HashMap::new(),
        handshakes: JoinSet::new(),
    };
    futures::stream::unfold(accepting, async |mut accepting| Some((Ok(accepting.next().await), accepting)))
}

struct Accepting {
    listener: TcpListener,
    tls: Arc<Tls>,
    metrics: Metrics,
    room: Room,
    under_way: HashMap<u64, (SocketAddr, AbortHandle)>,
    handshakes: JoinSet<(u64, Option<Secured>)>,
}

impl Accepting {
    async fn next(&mut self) -> Secured {
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((tcp, address)) => self.begin(tcp, address),
                    Err(error) => {
                        tracing::warn!(%error, "connections cannot be accepted");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(done) = self.handshakes.join_next() => {
                    // One that was given up has left already.
                    let Ok((number, secured)) = done else { continue };
                    self.under_way.remove(&number);
                    self.room.leave(number, secured.is_some(), Instant::now());
                    if let Some(secured) = secured {
                        return secured;
                    }
                }
            }
        }
    }

    /// Never waits: who is known is not to stand behind those who say nothing.
    fn begin(&mut self, tcp: TcpStream, address: SocketAddr) {
        match self.room.enter(Origin::from(address), Instant::now()) {
            Ok((number, out)) => {
                if let Some((address, handshake)) = out.and_then(|out| self.under_way.remove(&out)) {
                    handshake.abort();
                    refused(&self.metrics, address, &"it is slow, and others want its place");
                }
                let (tls, metrics) = (self.tls.clone(), self.metrics.clone());
                let handshake = self
                    .handshakes
                    .spawn(async move { (number, shake_hands(tcp, address, tls, metrics).await) });
                self.under_way.insert(number, (address, handshake));
            }
            Err(full) => refused(&self.metrics, address, &full),
        }
    }
}

/// Counts a connection that is refused, and says it now and then.
fn refused(metrics: &Metrics, address: SocketAddr, reason: &dyn std::fmt::Display) {
    metrics.denied.with_label_values(&["connection"]).inc();
    if let Some(withheld) = REFUSED.now() {
        tracing::warn!(%address, %reason, withheld, "connection refused");
    }
}

/// None: it was refused.
async fn shake_hands(
    tcp: TcpStream,
    address: SocketAddr,
    tls: Arc<Tls>,
    metrics: Metrics,
) -> Option<Secured> {
    let refused = |reason: &dyn std::fmt::Display| refused(&metrics, address, reason);
    let (config, own) = match server(&tls).await {
        Ok(found) => found,
        Err(error) => {
            refused(&error);
            return None;
        }
    };
    let _ = tcp.set_nodelay(true);
    let accepting = TlsAcceptor::from(config).accept(tcp).into_fallible();
    match timeout(HANDSHAKE_TIMEOUT, accepting).await {
        Ok(Ok(stream)) => Some(Secured::new(stream, address, &own.subject)),
        Ok(Err((error, mut tcp))) => {
            refused(&error);
            // What was not read when a connection is closed takes back what was written: the reason would be lost.
            let _ = tcp.shutdown().await;
            let _ = timeout(FAREWELL, async {
                let mut unread = [0; 1024];
                while matches!(tcp.read(&mut unread).await, Ok(1..)) {}
            })
            .await;
            None
        }
        Err(_) => {
            refused(&format_args!("no handshake within {} s", HANDSHAKE_TIMEOUT.as_secs()));
            None
        }
    }
}

/// What a connection is accepted with that comes now, and what that was made of.
async fn server(tls: &Arc<Tls>) -> Result<(Arc<ServerConfig>, Arc<Loaded>), String> {
    let loaded = tls.loaded().await;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(loaded.authorities.clone(), provider.clone()).build();
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(verifier.map_err(|error| error.to_string())?)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(loaded.certified.clone())));
    server.alpn_protocols = vec![ALPN.to_vec()];
    // Whoever resumes shows no certificate: every connection is to be looked at.
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    Ok((Arc::new(server), loaded))
}
