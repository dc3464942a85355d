//! Whose a certificate is among keepers and those who speak with them: a role and perhaps a name, in a URI among its subject
//! alternative names, `carillon://ROLE[/NAME][?cluster=CLUSTER]`. See docs/adr/0015-roles-by-certificate.md.

use std::fmt;
use std::str::FromStr;

use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

const SCHEME: &str = "carillon://";
/// Longest name, bytes.
const MAX_NAME_BYTES: usize = 128;

/// What the holder of a certificate is. A closed set; what each may do is the keeper's to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CertificateRole {
    Keeper,
    Operator,
    Gateway,
    Hub,
    Viewer,
}

impl CertificateRole {
    pub const ALL: [CertificateRole; 5] = [
        CertificateRole::Keeper,
        CertificateRole::Operator,
        CertificateRole::Gateway,
        CertificateRole::Hub,
        CertificateRole::Viewer,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            CertificateRole::Keeper => "keeper",
            CertificateRole::Operator => "operator",
            CertificateRole::Gateway => "gateway",
            CertificateRole::Hub => "hub",
            CertificateRole::Viewer => "viewer",
        }
    }
}

impl fmt::Display for CertificateRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a certificate is nobody's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubjectError {
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    #[error(
        "the certificate has no role: it needs a URI {SCHEME}ROLE or {SCHEME}ROLE/NAME among its subject alternative names"
    )]
    NoRole,
    #[error("the certificate has more than one role: {0}")]
    SeveralRoles(String),
    #[error("{0:?} in the certificate names no role: the roles are keeper, operator, gateway, hub, viewer")]
    UnknownRole(String),
    #[error(
        "{0:?} in the certificate has a name that cannot be used: 1 to {MAX_NAME_BYTES} letters, digits and any of - _ . @ +"
    )]
    BadName(String),
    #[error(
        "{0:?} in the certificate names no cluster after the '?': ?cluster= and 1 to {MAX_NAME_BYTES} letters, digits and any of - _ . @ +"
    )]
    BadCluster(String),
    #[error("the certificate is for cluster {found}, and this is cluster {expected}")]
    OtherCluster { found: String, expected: String },
}

/// Whose a certificate is, and until when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    pub role: CertificateRole,
    /// Of a process its instance id, of a person who it is; None: the certificate is for all of that role.
    pub name: Option<String>,
    /// The cluster that it is for; None: all whose authority it is of.
    pub cluster: Option<String>,
    /// Unix seconds.
    pub not_before: i64,
    pub not_after: i64,
}

/// `operator/alice`, `viewer`.
impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{}/{name}", self.role),
            None => self.role.fmt(f),
        }
    }
}

impl Subject {
    /// Of a certificate, DER. Whether it is to be trusted is another question.
    pub fn of(der: &[u8]) -> Result<Subject, SubjectError> {
        let certificate = match X509Certificate::from_der(der) {
            Ok((_, certificate)) => certificate,
            Err(error) => return Err(SubjectError::Unreadable(error.to_string())),
        };
        // Twice the extension is as good as none (RFC 5280 §4.2).
        let names = certificate.subject_alternative_name().ok().flatten();
        let names = names.iter().flat_map(|names| &names.value.general_names);
        let uris = names.filter_map(|name| match name {
            GeneralName::URI(uri) if uri.starts_with(SCHEME) => Some(*uri),
            _ => None,
        });
        let uris: Vec<&str> = uris.collect();
        let uri = match uris.as_slice() {
            [] => return Err(SubjectError::NoRole),
            [uri] => *uri,
            several => return Err(SubjectError::SeveralRoles(several.join(", "))),
        };
        let Uri { role, name, cluster } = parse(uri)?;
        let validity = certificate.validity();
        let (not_before, not_after) = (validity.not_before.timestamp(), validity.not_after.timestamp());
        Ok(Subject { role, name, cluster, not_before, not_after })
    }

    /// Do the holders belong together? They do unless both certificates name a cluster, and not the same.
    pub fn check_cluster(&self, other: &Subject) -> Result<(), SubjectError> {
        match (&self.cluster, &other.cluster) {
            (Some(expected), Some(found)) if expected != found => {
                Err(SubjectError::OtherCluster { found: found.clone(), expected: expected.clone() })
            }
            _ => Ok(()),
        }
    }
}

/// What a URI says.
struct Uri {
    role: CertificateRole,
    name: Option<String>,
    cluster: Option<String>,
}

fn parse(uri: &str) -> Result<Uri, SubjectError> {
    let rest = uri.strip_prefix(SCHEME).unwrap_or(uri);
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (role, name) = match rest.split_once('/') {
        Some((role, name)) => (role, Some(name)),
        None => (rest, None),
    };
    let role = CertificateRole::from_str(role).map_err(|()| SubjectError::UnknownRole(uri.to_owned()))?;
    let fits = |name: &str| {
        (1..=MAX_NAME_BYTES).contains(&name.len())
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'@' | b'+'))
    };
    if name.is_some_and(|name| !fits(name)) {
        return Err(SubjectError::BadName(uri.to_owned()));
    }
    let cluster = match query.map(|query| query.strip_prefix("cluster=").filter(|cluster| fits(cluster))) {
        Some(None) => return Err(SubjectError::BadCluster(uri.to_owned())),
        cluster => cluster.flatten().map(str::to_owned),
    };
    Ok(Uri { role, name: name.map(str::to_owned), cluster })
}

impl FromStr for CertificateRole {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        CertificateRole::ALL.into_iter().find(|role| role.as_str() == text).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn of(uris: &[&str]) -> Result<Subject, SubjectError> {
        let mut params = CertificateParams::new(vec!["keeper-0".to_owned()]).unwrap();
        let uris = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
        params.subject_alt_names.extend(uris);
        params.not_after = rcgen::date_time_ymd(2031, 5, 1);
        Subject::of(params.self_signed(&KeyPair::generate().unwrap()).unwrap().der())
    }

    #[test]
    fn a_uri_says_role_and_name() {
        for (uri, expected) in [
            ("carillon://keeper", "keeper"),
            ("carillon://gateway/edge-1.eu", "gateway/edge-1.eu"),
            ("carillon://operator/alice@example.com", "operator/alice@example.com"),
        ] {
            // What others put into certificates is in nobody's way.
            let subject = of(&["spiffe://example/x", uri]).unwrap();
            assert_eq!((subject.to_string().as_str(), subject.not_after), (expected, 1_935_360_000), "{uri}");
        }
    }

    #[test]
    fn a_certificate_may_be_for_one_cluster() {
        let [a, also_a, b, any] = ["gateway/edge-1?cluster=a", "keeper?cluster=a", "hub?cluster=b", "viewer"]
            .map(|uri| of(&[&format!("carillon://{uri}")]).unwrap());
        assert_eq!((a.to_string().as_str(), a.cluster.as_deref()), ("gateway/edge-1", Some("a")));
        assert_eq!(any.cluster, None);
        for other in [&also_a, &any] {
            assert_eq!((a.check_cluster(other), other.check_cluster(&a)), (Ok(()), Ok(())));
        }
        let refused = a.check_cluster(&b).unwrap_err().to_string();
        assert_eq!(refused, "the certificate is for cluster b, and this is cluster a");
        for query in ["", "a", "cluster=", "cluster=a&x=1", "cluster=a/b", "name=x"] {
            let uri = format!("carillon://gateway?{query}");
            assert_eq!(of(&[&uri]), Err(SubjectError::BadCluster(uri.clone())));
        }
    }

    #[test]
    fn what_names_no_role_is_refused_with_the_reason() {
        for (uris, expected) in [
            (&[][..], "needs a URI carillon://ROLE"),
            (&["https://operator"], "needs a URI"),
            (
                &["carillon://operator", "carillon://viewer"],
                "more than one role: carillon://operator, carill",
            ),
            (&["carillon://root"], "\"carillon://root\" in the certificate names no role"),
            (&["carillon://Operator"], "names no role"),
            (&["carillon:///x"], "names no role"),
            (&["carillon://operator/"], "has a name that cannot be used"),
            (&["carillon://operator/a/b"], "has a name that cannot be used"),
            (&["carillon://operator/a b"], "has a name that cannot be used"),
        ] {
            let error = of(uris).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} should say {expected:?}");
        }
        let long = format!("carillon://hub/{}", "x".repeat(129));
        assert_eq!(of(&[&long]), Err(SubjectError::BadName(long.clone())));
        assert!(matches!(Subject::of(b"no certificate"), Err(SubjectError::Unreadable(_))));
    }
}
