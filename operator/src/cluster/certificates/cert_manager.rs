//! Certificates that cert-manager makes. Its types are its own and may not be there, so that they are plain JSON here.

use carillon_agent::subject::CertificateRole;
use carillon_operator_api::IssuerRef;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use serde_json::{Value, json};

use crate::FIELD_MANAGER;
use crate::cluster::applying::{ApplyError, Objects, contained};
use crate::cluster::names::Names;

fn resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("cert-manager.io", "v1", "Certificate"),
        "certificates",
    )
}

/// What is asked of cert-manager for a role. Times as those of the managed authority: 90 days, renewed after 60.
pub fn certificate(
    names: &Names,
    role: CertificateRole,
    dns_names: &[String],
    issuer: &IssuerRef,
    owner: &OwnerReference,
) -> Value {
    let name = names.certificate(role);
    let mut spec = json!({
        "secretName": name,
        "secretTemplate": {"labels": names.labels(role.as_str())},
        "commonName": format!("carillon {role}"),
        "duration": "2160h0m0s",
        "renewBefore": "720h0m0s",
        "privateKey": {"algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always"},
        "usages": ["digital signature", "server auth", "client auth"],
        "uris": [format!("carillon://{role}")],
        "issuerRef": {"name": issuer.name, "kind": issuer.kind, "group": issuer.group},
    });
    if !dns_names.is_empty() {
        spec["dnsNames"] = json!(dns_names);
    }
    json!({
        "apiVersion": "cert-manager.io/v1",
        "kind": "Certificate",
        "metadata": {
            "name": name,
            "namespace": names.namespace,
            "labels": names.labels(role.as_str()),
            "ownerReferences": [owner],
        },
        "spec": spec,
    })
}

/// Makes it so. False: Kubernetes does not know such certificates.
pub async fn apply(objects: &Objects, wanted: Value) -> Result<bool, ApplyError> {
    let name = wanted["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let api: Api<DynamicObject> = objects.dynamic(&resource());
    let failed = |source| ApplyError::Kubernetes {
        kind: "Certificate".to_owned(),
        name: name.clone(),
        source: Box::new(source),
    };
    let live = api.get_opt(&name).await.map_err(failed)?;
    if let Some(live) = live {
        if !objects.owns(&live.metadata) {
            return Err(ApplyError::Foreign { kind: "Certificate".to_owned(), name });
        }
        let live = serde_json::to_value(&live).map_err(|error| failed(kube::Error::SerdeError(error)))?;
        if contained(&wanted, &live) {
            return Ok(true);
        }
    }
    let params = PatchParams::apply(FIELD_MANAGER).force();
    match api.patch(&name, &params, &Patch::Apply(&wanted)).await {
        Ok(_) => {
            objects.wrote();
            Ok(true)
        }
        // An apply makes what is not there: it is the kind that is not known.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(source) => Err(failed(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_its_uri_and_only_keepers_have_names() {
        let names = Names::new("push", "chat");
        let issuer = IssuerRef {
            name: "inner".to_owned(),
            kind: "ClusterIssuer".to_owned(),
            group: "cert-manager.io".to_owned(),
        };
        let owner = OwnerReference { uid: "u".to_owned(), ..Default::default() };
        let of = |role, dns: &[String]| certificate(&names, role, dns, &issuer, &owner);
        let keeper = of(CertificateRole::Keeper, &names.keeper_names());
        assert_eq!(keeper["spec"]["uris"], json!(["carillon://keeper"]));
        assert_eq!(
            keeper["spec"]["dnsNames"],
            json!(["chat-keeper.push.svc", "*.chat-keeper-peers.push.svc", "localhost"])
        );
        assert_eq!(keeper["spec"]["secretName"], "chat-keeper-tls");
        assert_eq!(keeper["spec"]["issuerRef"]["kind"], "ClusterIssuer");
        assert_eq!(of(CertificateRole::Gateway, &[])["spec"].get("dnsNames"), None);
    }
}
