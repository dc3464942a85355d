//! What is in a certificate that rustls does not tell: names, the time it ends, the user it stands for.

use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::config::CertificateName;

/// Why a certificate says nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    #[error("the certificate has no {0}")]
    NoName(&'static str),
}

fn read(der: &[u8]) -> Result<X509Certificate<'_>, CertificateError> {
    match X509Certificate::from_der(der) {
        Ok((_, certificate)) => Ok(certificate),
        Err(error) => Err(CertificateError::Unreadable(error.to_string())),
    }
}

/// What a server's certificate is for, and until when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// DNS names, lower case; also `*.example.com`.
    pub names: Vec<String>,
    /// Unix seconds.
    pub not_after: i64,
}

pub fn facts(der: &[u8]) -> Result<Facts, CertificateError> {
    let certificate = read(der)?;
    let names = alternative_names(&certificate, |name| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    });
    Ok(Facts { names, not_after: certificate.validity().not_after.timestamp() })
}

/// The user that a device's certificate names, and until when it does, Unix seconds.
pub fn user(der: &[u8], from: CertificateName) -> Result<(String, u64), CertificateError> {
    let certificate = read(der)?;
    let first = |wanted: for<'a> fn(&GeneralName<'a>) -> Option<String>| {
        alternative_names(&certificate, wanted).into_iter().next()
    };
    let (user, what) = match from {
        CertificateName::CommonName => {
            let name = certificate.subject().iter_common_name().next();
            (name.and_then(|name| name.as_str().ok()).map(str::to_owned), "common name")
        }
        CertificateName::DnsName => (
            first(|name| match name {
                GeneralName::DNSName(name) => Some((*name).to_owned()),
                _ => None,
            }),
            "DNS name",
        ),
        CertificateName::Email => (
            first(|name| match name {
                GeneralName::RFC822Name(name) => Some((*name).to_owned()),
                _ => None,
            }),
            "e-mail address",
        ),
        CertificateName::Uri => (
            first(|name| match name {
                GeneralName::URI(name) => Some((*name).to_owned()),
                _ => None,
            }),
            "URI",
        ),
    };
    let not_after = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    user.filter(|user| !user.is_empty()).map(|user| (user, not_after)).ok_or(CertificateError::NoName(what))
}

fn alternative_names<T>(
    certificate: &X509Certificate<'_>,
    wanted: impl Fn(&GeneralName<'_>) -> Option<T>,
) -> Vec<T> {
    // Twice the extension is as good as none (RFC 5280 §4.2).
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return Vec::new() };
    extension.value.general_names.iter().filter_map(wanted).collect()
}
