//! The certificates by which the cluster's processes know each other: one for each role, in a Secret that pods mount. Pods read
//! files again by themselves, so that nothing is restarted when they are renewed.

pub mod authority;
pub mod cert_manager;

use std::collections::BTreeMap;

use carillon_agent::subject::{CertificateRole, Subject};
use carillon_operator_api::{CertManagerTls, ClusterTlsSpec};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt as _;

use self::authority::{Authority, AuthorityError, Pair};
use super::applying::{ApplyError, Objects, failed};
use super::names::Names;

/// Who has one.
pub const ROLES: [CertificateRole; 4] =
    [CertificateRole::Keeper, CertificateRole::Hub, CertificateRole::Gateway, CertificateRole::Operator];

/// The keys in a role's Secret, as cert-manager has them, too.
pub const CERTIFICATE: &str = "tls.crt";
pub const KEY: &str = "tls.key";
pub const AUTHORITIES: &str = "ca.crt";

/// Are there certificates for everyone?
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Certificates {
    Ready,
    Waiting { reason: &'static str, message: String },
}

#[derive(Debug, thiserror::Error)]
pub enum CertificatesError {
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error("certificates cannot be made: {0}")]
    Authority(#[from] AuthorityError),
}

/// The DNS names in a role's certificate: only keepers are connected to with TLS.
fn dns_names(names: &Names, role: CertificateRole) -> Vec<String> {
    match role {
        CertificateRole::Keeper => names.keeper_names(),
        _ => Vec::new(),
    }
}

/// Sees to it that there are certificates, as of `now` (Unix seconds).
pub async fn ensure(
    objects: &Objects,
    names: &Names,
    tls: Option<&ClusterTlsSpec>,
    now: i64,
) -> Result<Certificates, CertificatesError> {
    match tls.and_then(|tls| tls.cert_manager.as_ref()) {
        Some(tls) => Ok(from_cert_manager(objects, names, tls).await?),
        None => managed(objects, names, now).await,
    }
}

async fn managed(objects: &Objects, names: &Names, now: i64) -> Result<Certificates, CertificatesError> {
    let found: Option<Secret> = objects.live(&names.authority()).await?;
    let before = found.as_ref().and_then(|secret| Authority::read(&texts(secret)));
    let mut leaves = Vec::new();
    for role in ROLES {
        leaves.push((role, objects.live::<Secret>(&names.certificate(role)).await?));
    }
    // Whoever has the certificates of an authority that was lost is trusted until all have new ones.
    let lost = leaves.iter().filter_map(|(_, leaf)| texts(leaf.as_ref()?).remove(AUTHORITIES)).next();
    let authority = Authority::as_of(before, lost, &names.cluster, now)?;
    let secret = secret(names, names.authority(), "Opaque", "authority", authority.write());
    // Before anything that it has signed, or that would be lost with its key.
    objects.apply_over(secret, found).await?;
    for (role, live) in leaves {
        let held = live.as_ref().map(texts).unwrap_or_default();
        let pair = Pair::of(&held, CERTIFICATE, KEY);
        let pair = authority.certificate(role, &dns_names(names, role), pair, now)?;
        let texts = BTreeMap::from([
            (CERTIFICATE.to_owned(), pair.certificate),
            (KEY.to_owned(), pair.key),
            (AUTHORITIES.to_owned(), authority.bundle()),
        ]);
        let wanted = secret_of(names, role, texts);
        objects.apply_over(wanted, live).await?;
    }
    Ok(Certificates::Ready)
}

fn secret_of(names: &Names, role: CertificateRole, texts: BTreeMap<String, String>) -> Secret {
    secret(names, names.certificate(role), "kubernetes.io/tls", role.as_str(), texts)
}

fn secret(
    names: &Names,
    name: String,
    type_: &str,
    component: &str,
    texts: BTreeMap<String, String>,
) -> Secret {
    Secret {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(names.namespace.clone()),
            labels: Some(names.labels(component)),
            ..Default::default()
        },
        type_: Some(type_.to_owned()),
        data: Some(texts.into_iter().map(|(key, text)| (key, ByteString(text.into_bytes()))).collect()),
        ..Default::default()
    }
}

/// What a Secret holds that is text.
pub fn texts(secret: &Secret) -> BTreeMap<String, String> {
    let data = secret.data.iter().flatten();
    data.filter_map(|(key, value)| Some((key.clone(), String::from_utf8(value.0.clone()).ok()?))).collect()
}

async fn from_cert_manager(
    objects: &Objects,
    names: &Names,
    tls: &CertManagerTls,
) -> Result<Certificates, ApplyError> {
    for role in ROLES {
        let wanted =
            cert_manager::certificate(names, role, &dns_names(names, role), &tls.issuer_ref, objects.owner());
        if !cert_manager::apply(objects, wanted).await? {
            return Ok(Certificates::Waiting {
                reason: "CertManagerNotInstalled",
                message:
                    "spec.tls.certManager is given, but Kubernetes knows no certificates.cert-manager.io: install cert-manager"
                        .to_owned(),
            });
        }
    }
    let mut problems = Vec::new();
    for role in ROLES {
        let name = names.certificate(role);
        let found = objects.api::<Secret>().get_opt(&name).await;
        let found = found.map_err(|source| failed::<Secret>(&name, source))?;
        if let Err(problem) = usable(role, found.as_ref()) {
            problems.push(format!("{name}: {problem}"));
        }
    }
    if problems.is_empty() {
        return Ok(Certificates::Ready);
    }
    Ok(Certificates::Waiting {
        reason: "WaitingForCertManager",
        message: format!("Secrets that cert-manager is to fill: {}", problems.join("; ")),
    })
}

/// Is a Secret's certificate one for the role?
fn usable(role: CertificateRole, secret: Option<&Secret>) -> Result<(), String> {
    let Some(secret) = secret else { return Err("is not there yet".to_owned()) };
    let held = texts(secret);
    let missing = |key: &&str| held.get(*key).is_none_or(String::is_empty);
    if let Some(key) = [CERTIFICATE, KEY, AUTHORITIES].into_iter().find(missing) {
        return Err(format!("has no {key}"));
    }
    let subject = authority::first_der(&held[CERTIFICATE]).map(|der| Subject::of(&der));
    match subject {
        Some(Ok(subject)) if subject.role == role => Ok(()),
        Some(Ok(subject)) => Err(format!("is the certificate of {subject}")),
        Some(Err(error)) => Err(error.to_string()),
        None => Err(format!("{CERTIFICATE} of {} is not PEM", secret.name_any())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_usable_only_with_all_of_it_and_for_its_role() {
        let names = Names::new("push", "chat");
        let authority = Authority::as_of(None, None, "chat", 1_800_000_000).unwrap();
        let pair = authority.certificate(CertificateRole::Hub, &[], None, 1_800_000_000).unwrap();
        let all = BTreeMap::from([
            (CERTIFICATE.to_owned(), pair.certificate),
            (KEY.to_owned(), pair.key),
            (AUTHORITIES.to_owned(), authority.bundle()),
        ]);
        let hub = CertificateRole::Hub;
        assert_eq!(usable(hub, Some(&secret_of(&names, hub, all.clone()))), Ok(()));
        let refused = |role, texts| usable(role, Some(&secret_of(&names, role, texts))).unwrap_err();
        assert_eq!(refused(CertificateRole::Gateway, all.clone()), "is the certificate of hub");
        let mut without = all.clone();
        without.insert(AUTHORITIES.to_owned(), String::new());
        assert_eq!(refused(hub, without), "has no ca.crt");
        let mut no_pem = all;
        no_pem.insert(CERTIFICATE.to_owned(), "x".to_owned());
        assert_eq!(refused(hub, no_pem), "tls.crt of chat-hub-tls is not PEM");
        assert_eq!(usable(hub, None).unwrap_err(), "is not there yet");
    }
}
