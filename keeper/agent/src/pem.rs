//! PEM files of certificates, keys and authorities: read whole, and what is wrong with one is said with its name. Shared by
//! all that speak TLS: gateways with devices, everyone with the keepers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{Error, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

/// The longest file that is taken for certificates or a key, bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PemError {
    #[error("cannot read {}: {error}", path.display())]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{} is longer than {MAX_FILE_BYTES} bytes", .0.display())]
    TooLong(PathBuf),
    #[error("{} is not PEM: {error}", path.display())]
    Pem { path: PathBuf, error: Error },
    #[error("there is no certificate in {}", .0.display())]
    NoCertificate(PathBuf),
    #[error("there is no private key in {}", .0.display())]
    NoKey(PathBuf),
    #[error("the key in {} does not go with the certificate in {}: {error}", key.display(), certificate.display())]
    Pair { certificate: PathBuf, key: PathBuf, error: rustls::Error },
    #[error("the authorities in {} cannot be used: {error}", path.display())]
    Authorities { path: PathBuf, error: rustls::Error },
}

/// What is in a file.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<u8>, PemError> {
    let path = path.as_ref();
    let failed = |error| PemError::Read { path: path.to_owned(), error };
    if std::fs::metadata(path).map_err(failed)?.len() > MAX_FILE_BYTES {
        return Err(PemError::TooLong(path.to_owned()));
    }
    std::fs::read(path).map_err(failed)
}

/// The certificates that a file's text holds, at least one. `path` is for the error.
pub fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| PemError::Pem { path: path.to_owned(), error })?;
    if certificates.is_empty() {
        return Err(PemError::NoCertificate(path.to_owned()));
    }
    Ok(certificates)
}

/// Certificates with the key of the first of them. The paths are for the error.
pub fn certified(
    certificate_path: &Path,
    certificates: Vec<CertificateDer<'static>>,
    key_path: &Path,
    key: &[u8],
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, PemError> {
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| match error {
        Error::NoItemsFound => PemError::NoKey(key_path.to_owned()),
        error => PemError::Pem { path: key_path.to_owned(), error },
    })?;
    let certified = CertifiedKey::from_der(certificates, key, provider).map_err(|error| PemError::Pair {
        certificate: certificate_path.to_owned(),
        key: key_path.to_owned(),
        error,
    })?;
    Ok(Arc::new(certified))
}

/// Who is trusted to sign.
pub fn authorities(path: &Path, pem: &[u8]) -> Result<Arc<RootCertStore>, PemError> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(path, pem)? {
        roots.add(authority).map_err(|error| PemError::Authorities { path: path.to_owned(), error })?;
    }
    Ok(Arc::new(roots))
}
