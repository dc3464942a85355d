//! A cluster's own authority: what it signs, when that is renewed, and how the authority itself is replaced. Pure: PEM and a
//! clock in, PEM out.
//!
//! An authority is replaced in three steps, so that at each time everyone trusts everyone, however late files arrive in pods:
//! the next one is trusted besides the present one for an hour before it signs anything; then it signs everything anew; the
//! former one is trusted for another day.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use carillon_agent::subject::{CertificateRole, Subject};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType,
};
use x509_parser::pem::parse_x509_pem;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
use xxhash_rust::xxh3::xxh3_64;

const DAY: i64 = 24 * 3600;
/// How long what is signed is valid; it is renewed after two thirds of that.
pub const CERTIFICATE_SECONDS: i64 = 90 * DAY;
/// How long an authority is valid; it is replaced after two thirds of that.
pub const AUTHORITY_SECONDS: i64 = 3 * 365 * DAY;
/// How long the next authority is known to everyone before it signs. Kubernetes brings files to pods within two minutes.
pub const ANNOUNCED_SECONDS: i64 = 3600;
/// How long the former one is trusted after it has signed last.
pub const TRUSTED_SECONDS: i64 = DAY;
/// Clocks may differ by so much.
const SKEW_SECONDS: i64 = 300;

/// Why nothing could be signed.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error(transparent)]
    Rcgen(#[from] rcgen::Error),
    #[error("the clock says {0} s since 1970")]
    Clock(i64),
}

/// A certificate and its key, PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

impl Pair {
    /// Under these keys of a Secret.
    pub fn of(texts: &BTreeMap<String, String>, certificate: &str, key: &str) -> Option<Pair> {
        Some(Pair { certificate: texts.get(certificate)?.clone(), key: texts.get(key)?.clone() })
    }

    /// From when until when it is valid, if it is a certificate with its own key.
    fn validity(&self) -> Option<(i64, i64)> {
        let der = first_der(&self.certificate)?;
        let (_, certificate) = X509Certificate::from_der(&der).ok()?;
        let key = KeyPair::from_pem(&self.key).ok()?;
        let own = certificate.public_key().subject_public_key.data.as_ref() == key.der_bytes();
        let validity = certificate.validity();
        own.then_some((validity.not_before.timestamp(), validity.not_after.timestamp()))
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, AuthorityError> {
        Ok(Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key)?)?)
    }
}

/// The authority of a cluster, and where it is on its way to the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authority {
    /// It signs.
    current: Pair,
    /// It will; everyone trusts it already.
    next: Option<Pair>,
    /// It did; everyone trusts it still. PEM, perhaps several.
    previous: Option<String>,
    /// Unix seconds at which that was last changed.
    since: i64,
}

/// After two thirds of its time.
fn is_due((not_before, not_after): (i64, i64), now: i64) -> bool {
    now >= not_before + (not_after - not_before) / 3 * 2
}

impl Authority {
    /// As it is in its Secret; None: what is there is of no use.
    pub fn read(texts: &BTreeMap<String, String>) -> Option<Authority> {
        let authority = Authority {
            current: Pair::of(texts, "tls.crt", "tls.key")?,
            next: Pair::of(texts, "next.crt", "next.key"),
            previous: texts.get("previous.crt").cloned(),
            since: texts.get("since")?.parse().ok()?,
        };
        authority.current.validity()?;
        if let Some(next) = &authority.next {
            next.validity()?;
        }
        Some(authority)
    }

    /// For its Secret.
    pub fn write(&self) -> BTreeMap<String, String> {
        let mut texts = BTreeMap::from([
            ("tls.crt".to_owned(), self.current.certificate.clone()),
            ("tls.key".to_owned(), self.current.key.clone()),
            ("since".to_owned(), self.since.to_string()),
        ]);
        if let Some(next) = &self.next {
            texts.insert("next.crt".to_owned(), next.certificate.clone());
            texts.insert("next.key".to_owned(), next.key.clone());
        }
        if let Some(previous) = &self.previous {
            texts.insert("previous.crt".to_owned(), previous.clone());
        }
        texts
    }

    /// What it is to be now. `lost`: whom others trust, if there is no authority (any more).
    pub fn as_of(
        before: Option<Authority>,
        lost: Option<String>,
        cluster: &str,
        now: i64,
    ) -> Result<Authority, AuthorityError> {
        let Some(mut authority) = before else {
            return Ok(Authority { current: founded(cluster, now)?, next: None, previous: lost, since: now });
        };
        let rested = now - authority.since;
        let validity = authority.current.validity().unwrap_or((0, 0));
        if validity.1 <= now {
            // Nobody trusts what it has signed, so that there is nothing to wait for.
            return Ok(Authority { current: founded(cluster, now)?, next: None, previous: None, since: now });
        }
        if let Some(next) = authority.next.take_if(|_| rested >= ANNOUNCED_SECONDS) {
            authority.previous = Some(authority.current.certificate);
            authority.current = next;
            authority.since = now;
        } else if authority.previous.is_some() {
            if rested >= TRUSTED_SECONDS {
                authority.previous = None;
                authority.since = now;
            }
        } else if authority.next.is_none() && is_due(validity, now) {
            authority.next = Some(founded(cluster, now)?);
            authority.since = now;
        }
        Ok(authority)
    }

    /// Whom everyone is to trust, PEM.
    pub fn bundle(&self) -> String {
        let next = self.next.as_ref().map(|next| next.certificate.as_str());
        [Some(self.current.certificate.as_str()), next, self.previous.as_deref()]
            .into_iter()
            .flatten()
            .collect()
    }

    /// The certificate of a role with these DNS names: the one that there is, as long as it is as it should be.
    pub fn certificate(
        &self,
        role: CertificateRole,
        names: &[String],
        held: Option<Pair>,
        now: i64,
    ) -> Result<Pair, AuthorityError> {
        match held {
            Some(held) if self.is_good(role, names, &held, now) => Ok(held),
            _ => self.issue(role, names, now),
        }
    }

    fn is_good(&self, role: CertificateRole, names: &[String], held: &Pair, now: i64) -> bool {
        let Some(validity) = held.validity().filter(|(not_before, _)| *not_before <= now) else {
            return false;
        };
        let (Some(der), Some(own)) = (first_der(&held.certificate), first_der(&self.current.certificate))
        else {
            return false;
        };
        let (Ok((_, certificate)), Ok((_, own))) =
            (X509Certificate::from_der(&der), X509Certificate::from_der(&own))
        else {
            return false;
        };
        // Each authority has a name of its own.
        !is_due(validity, now)
            && certificate.issuer().as_raw() == own.subject().as_raw()
            && Subject::of(&der).is_ok_and(|subject| subject.role == role && subject.name.is_none())
            && dns_names(&certificate) == names
    }

    fn issue(&self, role: CertificateRole, names: &[String], now: i64) -> Result<Pair, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = named(&format!("carillon {role}"));
        let uri = Ia5String::try_from(format!("carillon://{role}"))?;
        params.subject_alt_names.push(SanType::URI(uri));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let (_, last) = self.current.validity().unwrap_or((0, 0));
        params.not_before = at(now - SKEW_SECONDS)?.into();
        params.not_after = at((now + CERTIFICATE_SECONDS).min(last))?.into();
        let certificate = params.signed_by(&key, &self.current.issuer()?)?;
        Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

/// A new authority.
fn founded(cluster: &str, now: i64) -> Result<Pair, AuthorityError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = named(&format!("carillon {cluster} {:016x}", xxh3_64(key.der_bytes())));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = at(now - SKEW_SECONDS)?.into();
    params.not_after = at(now + AUTHORITY_SECONDS)?.into();
    let certificate = params.self_signed(&key)?;
    Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

fn at(seconds: i64) -> Result<std::time::SystemTime, AuthorityError> {
    let since = u64::try_from(seconds).map_err(|_| AuthorityError::Clock(seconds))?;
    UNIX_EPOCH.checked_add(Duration::from_secs(since)).ok_or(AuthorityError::Clock(seconds))
}

/// The first certificate in a PEM text.
pub fn first_der(pem: &str) -> Option<Vec<u8>> {
    parse_x509_pem(pem.as_bytes()).ok().map(|(_, pem)| pem.contents)
}

fn dns_names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.iter().flat_map(|names| &names.value.general_names);
    let dns = names.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    });
    dns.collect()
}

#[cfg(test)]
mod tests;
