//! From PEM files to what rustls needs: certificates by name, who may connect, tickets for resumption.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use carillon_agent::pem::{self, PemError};
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ProducesTickets, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;

use super::certificate::{self, CertificateError};
use super::config::{ClientAuth, Protocol, TlsConfig, TlsVersion};

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error(transparent)]
    Pem(#[from] PemError),
    #[error("{}: {error}", path.display())]
    Certificate { path: PathBuf, error: CertificateError },
    #[error("the certificate in {} names no DNS name: list them as `names`", .0.display())]
    NoNames(PathBuf),
    #[error("the authorities in {} cannot be used: {error}", path.display())]
    ClientCa { path: PathBuf, error: rustls::server::VerifierBuilderError },
    #[error("{0}")]
    Rustls(#[from] rustls::Error),
}

/// The files of a listener as they were read.
#[derive(Clone, PartialEq, Eq)]
pub struct Material {
    /// Certificates and key, for each that is configured.
    pairs: Vec<(Vec<u8>, Vec<u8>)>,
    client_ca: Option<Vec<u8>>,
}

impl Material {
    pub fn read(config: &TlsConfig) -> Result<Material, TlsError> {
        let pairs = config
            .certificates
            .iter()
            .map(|pair| Ok((pem::read(&pair.certificate)?, pem::read(&pair.key)?)))
            .collect::<Result<_, TlsError>>()?;
        let client_ca = config.client_ca.as_ref().map(pem::read).transpose()?;
        Ok(Material { pairs, client_ca })
    }
}

/// What the shards use.
#[derive(Clone)]
pub struct Loaded {
    pub server: Arc<ServerConfig>,
    /// When the first of the certificates ends, Unix seconds.
    pub not_after: i64,
    /// What the tickets that devices hold stand for: they are good for as long as the authorities are the same.
    tickets: Tickets,
}

#[derive(Clone)]
struct Tickets {
    ticketer: Arc<dyn ProducesTickets>,
    client_auth: ClientAuth,
    client_ca: Option<Vec<u8>>,
}

/// Makes of the files what the shards use. `before`: what they have used until now.
pub fn load(
    config: &TlsConfig,
    protocol: Protocol,
    material: &Material,
    before: Option<&Loaded>,
) -> Result<Loaded, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut resolver = Resolver::default();
    let mut not_after = i64::MAX;
    for (pair, (certificates, key)) in config.certificates.iter().zip(&material.pairs) {
        let path = PathBuf::from(&pair.certificate);
        let (certified, facts) = certified(&path, Path::new(&pair.key), certificates, key, &provider)?;
        not_after = not_after.min(facts.not_after);
        let mut names = if pair.names.is_empty() { facts.names } else { pair.names.clone() };
        names.iter_mut().for_each(|name| name.make_ascii_lowercase());
        if names.is_empty() && config.certificates.len() > 1 {
            return Err(TlsError::NoNames(path));
        }
        resolver.add(names, certified);
    }
    let versions: &[_] = match config.min_version {
        TlsVersion::V12 => &[&rustls::version::TLS13, &rustls::version::TLS12],
        TlsVersion::V13 => &[&rustls::version::TLS13],
    };
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions)?;
    let builder = match (config.client_auth, &config.client_ca, &material.client_ca) {
        (ClientAuth::None, ..) | (_, None, _) | (_, _, None) => builder.with_no_client_auth(),
        (auth, Some(path), Some(pem)) => {
            let path = PathBuf::from(path);
            let roots = pem::authorities(&path, pem)?;
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            let verifier = match auth {
                ClientAuth::Optional => verifier.allow_unauthenticated(),
                _ => verifier,
            };
            let failed = |error| TlsError::ClientCa { path, error };
            builder.with_client_cert_verifier(verifier.build().map_err(failed)?)
        }
    };
    let mut server = builder.with_cert_resolver(Arc::new(resolver));
    let (client_auth, client_ca) = (config.client_auth, material.client_ca.clone());
    let tickets = match before {
        Some(before)
            if before.tickets.client_auth == client_auth && before.tickets.client_ca == client_ca =>
        {
            before.tickets.clone()
        }
        _ => Tickets { ticketer: aws_lc_rs::Ticketer::new()?, client_auth, client_ca },
    };
    // What resumption needs is with the device: nothing is kept here for it.
    server.ticketer = tickets.ticketer.clone();
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 1;
    server.alpn_protocols =
        vec![if protocol.is_websocket() { b"http/1.1".to_vec() } else { b"mqtt".to_vec() }];
    Ok(Loaded { server: Arc::new(server), not_after, tickets })
}

fn certified(
    path: &Path,
    key_path: &Path,
    certificates: &[u8],
    key: &[u8],
    provider: &CryptoProvider,
) -> Result<(Arc<CertifiedKey>, certificate::Facts), TlsError> {
    let certificates = pem::certificates(path, certificates)?;
    let facts = certificate::facts(&certificates[0])
        .map_err(|error| TlsError::Certificate { path: path.to_owned(), error })?;
    let certified = pem::certified(path, certificates, key_path, key, provider)?;
    Ok((certified, facts))
}

/// Certificates by the name that a device asks for.
#[derive(Debug, Default)]
struct Resolver {
    /// Exact names, and `*.example.com` as it is written; of several the first that the device can check.
    by_name: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// For who asks for no name, or for one that is not known.
    all: Vec<Arc<CertifiedKey>>,
}

impl Resolver {
    fn add(&mut self, names: Vec<String>, certified: Arc<CertifiedKey>) {
        for name in names {
            self.by_name.entry(name).or_default().push(certified.clone());
        }
        self.all.push(certified);
    }

    /// The certificates for a name, best first: its own, then those with a wildcard for its first label (RFC 6125
    /// §6.4.3), then all, for the device to refuse.
    fn named(&self, name: Option<&str>) -> impl Iterator<Item = &Arc<CertifiedKey>> {
        let exact = name.and_then(|name| self.by_name.get(name));
        let wildcard = name
            .and_then(|name| name.split_once('.'))
            .and_then(|(_, parent)| self.by_name.get(&format!("*.{parent}")));
        exact.into_iter().flatten().chain(wildcard.into_iter().flatten()).chain(&self.all)
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(str::to_ascii_lowercase);
        self.named(name.as_deref())
            .find(|certified| certified.key.choose_scheme(hello.signature_schemes()).is_some())
            .cloned()
    }
}

#[cfg(test)]
mod tests;
