//! TLS with the keepers: who we are, and whom we trust, from files that are read again when they change.
//!
//! Both sides show a certificate, always. A connection keeps what it began with; every further one is made with what the
//! files hold by then.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::ServerName;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::link::describe;
use crate::pem::{self, PemError};
use crate::subject::{CertificateRole, Subject, SubjectError};

/// Files are looked at again at most so often.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// HTTP/2, which is all that is spoken.
pub const ALPN: &[u8] = b"h2";

/// PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authorities that sign whom we speak with.
    pub authorities: PathBuf,
    /// Our certificate, and after it those between it and the root.
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Why files are of no use.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error(transparent)]
    Pem(#[from] PemError),
    #[error("{}: {error}", path.display())]
    Subject { path: PathBuf, error: SubjectError },
    #[error("TLS cannot be used: {0}")]
    Rustls(#[from] rustls::Error),
    #[error("{}: the certificate is that of {found}, not of {expected}", path.display())]
    AnotherRole { path: PathBuf, found: CertificateRole, expected: CertificateRole },
    #[error("{}: the certificate is not valid now", path.display())]
    NotNow { path: PathBuf },
}

/// What the files held when they were last read.
pub struct Loaded {
    /// As they were read: certificate, key, authorities.
    material: [Vec<u8>; 3],
    /// Our certificate and its key.
    pub certified: Arc<CertifiedKey>,
    pub authorities: Arc<RootCertStore>,
    /// Who we are.
    pub subject: Subject,
    client: Arc<ClientConfig>,
}

struct Held {
    loaded: Arc<Loaded>,
    looked: Instant,
    /// Why what is in the files now is not used, as it was last said.
    problem: Option<String>,
}

/// Our side of every connection. Shared.
pub struct Tls {
    files: TlsFiles,
    held: Mutex<Held>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files.
    pub fn open(files: TlsFiles) -> Result<Arc<Tls>, TlsError> {
        let loaded = Arc::new(load(&files, read(&files)?)?);
        let held = Held { loaded, looked: Instant::now(), problem: None };
        Ok(Arc::new(Tls { files, held: Mutex::new(held) }))
    }

    pub fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// Looks whether the files have changed. What cannot be used is reported once, and what was good stays in force: files
    /// are replaced one after the other.
    pub fn look(&self) {
        let before = self.held.lock().loaded.clone();
        let found = read(&self.files).and_then(|material| {
            if material == before.material {
                return Ok(None);
            }
            let loaded = load(&self.files, material)?;
            check_renewed(&self.files, &before.subject, &loaded.subject, unix_seconds())?;
            Ok(Some(loaded))
        });
        let mut held = self.held.lock();
        held.looked = Instant::now();
        match found {
            Ok(None) => held.problem = None,
            Ok(Some(loaded)) => {
                let (subject, not_after) = (loaded.subject.to_string(), loaded.subject.not_after);
                tracing::info!(subject, not_after, "certificates loaded");
                held.loaded = Arc::new(loaded);
                held.problem = None;
            }
            Err(error) => {
                let problem = error.to_string();
                if held.problem.as_ref() != Some(&problem) {
                    tracing::error!(problem, "certificates cannot be used, those from before stay in force");
                    held.problem = Some(problem);
                }
            }
        }
    }

    /// What the files hold, as of at most [`CHECK_INTERVAL`] ago.
    pub async fn loaded(self: &Arc<Self>) -> Arc<Loaded> {
        if self.held.lock().looked.elapsed() >= CHECK_INTERVAL {
            let own = self.clone();
            // It does not panic; if it did, what is known would do.
            let _ = tokio::task::spawn_blocking(move || own.look()).await;
        }
        self.now()
    }

    /// What was last read.
    pub fn now(&self) -> Arc<Loaded> {
        self.held.lock().loaded.clone()
    }

    /// A connection to a keeper: it is one, and it takes us.
    async fn connect(self: Arc<Self>, uri: Uri) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
        let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
        let host = uri.host().ok_or_else(|| invalid(format!("{uri} has no host")))?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().ok_or_else(|| invalid(format!("{uri} has no port")))?;
        let name = ServerName::try_from(host.to_owned()).map_err(|error| invalid(error.to_string()))?;
        let loaded = self.loaded().await;
        let tcp = TcpStream::connect((host, port)).await?;
        tcp.set_nodelay(true)?;
        let mut stream = TlsConnector::from(loaded.client.clone()).connect(name, tcp).await?;
        check_keeper(&stream, &loaded.subject)?;
        heard(&mut stream).await?;
        Ok(TokioIo::new(stream))
    }
}

fn refused(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

/// Others have certificates of the same authority, and perhaps a name that leads to them; and so have other clusters' keepers.
fn check_keeper(stream: &TlsStream<TcpStream>, own: &Subject) -> io::Result<()> {
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let subject = certificates.first().map(|certificate| Subject::of(certificate));
    match subject {
        Some(Ok(subject)) if subject.role == CertificateRole::Keeper => own
            .check_cluster(&subject)
            .map_err(|error| refused(format!("it is a keeper of another cluster: {error}"))),
        Some(Ok(subject)) => Err(refused(format!("it is no keeper: its certificate is that of {subject}"))),
        Some(Err(error)) => Err(refused(format!("it is no keeper: {error}"))),
        None => Err(refused("it is no keeper: it has no certificate".to_owned())),
    }
}

/// Waits for the keeper's first words. In TLS 1.3 a client is done before the server has looked at its certificate: one that is
/// refused learns that only by reading, and whoever writes at once may not learn it at all. A server of HTTP/2 speaks first.
async fn heard(stream: &mut TlsStream<TcpStream>) -> io::Result<()> {
    let (tcp, tls) = stream.get_mut();
    loop {
        let state = tls.process_new_packets().map_err(|error| match error {
            rustls::Error::AlertReceived(alert) => {
                refused(format!("it does not take the certificate shown here: {alert:?}"))
            }
            error => io::Error::new(io::ErrorKind::InvalidData, error),
        })?;
        if state.plaintext_bytes_to_read() > 0 {
            return Ok(());
        }
        if state.peer_has_closed() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        tcp.readable().await?;
        match tls.read_tls(&mut WhatIsThere(tcp)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

struct WhatIsThere<'a>(&'a TcpStream);

impl io::Read for WhatIsThere<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

fn read(files: &TlsFiles) -> Result<[Vec<u8>; 3], TlsError> {
    Ok([pem::read(&files.certificate)?, pem::read(&files.key)?, pem::read(&files.authorities)?])
}

fn load(files: &TlsFiles, material: [Vec<u8>; 3]) -> Result<Loaded, TlsError> {
    let [certificate, key, authorities] = &material;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let certificates = pem::certificates(&files.certificate, certificate)?;
    let subject = Subject::of(&certificates[0])
        .map_err(|error| TlsError::Subject { path: files.certificate.clone(), error })?;
    let certified = pem::certified(&files.certificate, certificates, &files.key, key, &provider)?;
    let authorities = pem::authorities(&files.authorities, authorities)?;
    // Both ends are of this house: nothing older is spoken.
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(authorities.clone());
    let mut client = builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified.clone())));
    client.alpn_protocols = vec![ALPN.to_vec()];
    // Whoever resumes shows no certificate: every connection is to be looked at.
    client.resumption = Resumption::disabled();
    Ok(Loaded { certified, authorities, subject, client: Arc::new(client), material })
}

/// What is wrong with a new certificate beside what there is.
fn check_renewed(files: &TlsFiles, before: &Subject, new: &Subject, now: i64) -> Result<(), TlsError> {
    let path = files.certificate.clone();
    if new.role != before.role {
        return Err(TlsError::AnotherRole { path, found: new.role, expected: before.role });
    }
    let is_valid = |subject: &Subject| (subject.not_before..=subject.not_after).contains(&now);
    if is_valid(before) && !is_valid(new) {
        return Err(TlsError::NotNow { path });
    }
    Ok(())
}

fn unix_seconds() -> i64 {
    i64::try_from(carillon_proto::now_ms() / 1000).unwrap_or(i64::MAX)
}

/// The scheme of keepers' addresses.
pub fn scheme(tls: Option<&Arc<Tls>>) -> &'static str {
    if tls.is_some() { "https" } else { "http" }
}

/// An address whose scheme says something else than that there are certificates, or that there are none.
fn check(endpoint: &Endpoint, tls: Option<&Arc<Tls>>) -> Result<(), String> {
    let uri = endpoint.uri();
    match (uri.scheme_str(), tls) {
        (Some("https"), None) => Err(format!("{uri} needs certificates, and none were given")),
        (Some("http"), Some(_)) => {
            Err(format!("{uri} is without TLS, and certificates were given: https:// is meant"))
        }
        _ => Ok(()),
    }
}

/// Connects to a keeper; what is wrong is said with its causes.
pub async fn connect(endpoint: &Endpoint, tls: Option<&Arc<Tls>>) -> Result<Channel, String> {
    check(endpoint, tls)?;
    let connected = match tls {
        None => endpoint.connect().await,
        Some(tls) => endpoint.connect_with_connector(connector(tls)).await,
    };
    connected.map_err(|error| describe(&error))
}

/// A channel that connects with TLS when it is first used, and again when it is broken.
pub fn connect_lazy(endpoint: &Endpoint, tls: &Arc<Tls>) -> Channel {
    endpoint.connect_with_connector_lazy(connector(tls))
}

fn connector(
    tls: &Arc<Tls>,
) -> impl tower::Service<Uri, Response = TokioIo<TlsStream<TcpStream>>, Error = io::Error, Future: Send>
+ Send
+ 'static {
    let tls = tls.clone();
    tower::service_fn(move |uri| tls.clone().connect(uri))
}
