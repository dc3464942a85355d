//! From the fields of a resource to the keeper's document, and back to them when something is wrong with it.

use std::collections::BTreeMap;

use carillon_agent::app::{self, App as Document};
use carillon_agent::document::Violation;
use carillon_operator_api::{AppLimits, AppSpec, SecretKey, TokenAlgorithm};

/// What is in a Secret, by key.
pub type SecretData = BTreeMap<String, Vec<u8>>;

/// The document that the resource asks for, or which keys are not there. `secrets`: those that are there, by name.
pub fn build(
    spec: &AppSpec,
    is_root: bool,
    secrets: &BTreeMap<String, SecretData>,
) -> Result<Document, Vec<Violation>> {
    let mut missing = Vec::new();
    let mut key = |path: String, from: &SecretKey| match read(from, secrets) {
        Ok(key) => key,
        Err(what) => {
            missing.push(Violation::new(path, what));
            String::new()
        }
    };
    let api_keys = spec.api_keys.iter().enumerate().map(|(i, one)| app::ApiKey {
        name: one.name.clone(),
        key: key(format!("spec.apiKeys[{i}].secretRef"), &one.secret_ref),
    });
    let api_keys = api_keys.collect();
    let token_keys = spec.token_keys.iter().enumerate().map(|(i, one)| app::TokenKey {
        id: one.id.clone(),
        algorithm: algorithm(one.algorithm),
        key: key(format!("spec.tokenKeys[{i}].secretRef"), &one.secret_ref),
    });
    let token_keys = token_keys.collect();
    let webhook = spec.webhook.as_ref().map(|webhook| app::Webhook {
        url: webhook.url.clone(),
        secret: webhook.secret_ref.as_ref().map(|secret| key("spec.webhook.secretRef".to_owned(), secret)),
        presence: webhook.presence,
        timeout_ms: large(webhook.timeout_ms.into()),
    });
    let topics = spec.topics.iter().map(|rule| app::TopicRule {
        filter: rule.filter.clone(),
        store: rule.store,
        max_age_seconds: large(rule.max_age_seconds),
        max_count: large(rule.max_count),
        max_bytes: large(rule.max_bytes),
    });
    let document = Document {
        root: is_root,
        anonymous_devices: spec.anonymous_devices,
        api_keys,
        token_keys,
        device_publish: spec.device_publish.clone(),
        device_subscribe: spec.device_subscribe.clone(),
        topics: topics.collect(),
        webhook,
        limits: limits(&spec.limits),
    };
    if missing.is_empty() { Ok(document) } else { Err(missing) }
}

fn limits(limits: &AppLimits) -> app::AppLimits {
    app::AppLimits {
        max_payload_bytes: small(limits.max_payload_bytes),
        broadcast_rate_per_second: limits.broadcast_rate_per_second as f64,
        push_rate_per_second: small(limits.push_rate_per_second),
        max_connections_per_gateway: small(limits.max_connections_per_gateway),
        publish_messages_per_second: limits.publish_messages_per_second.map(small),
        publish_bytes_per_second: limits.publish_bytes_per_second.map(small),
    }
}

fn read(from: &SecretKey, secrets: &BTreeMap<String, SecretData>) -> Result<String, String> {
    let secret = secrets.get(&from.name).ok_or_else(|| format!("there is no Secret {}", from.name))?;
    let key = secret.get(&from.key).ok_or_else(|| format!("Secret {} has no key {}", from.name, from.key))?;
    let text = std::str::from_utf8(key)
        .map_err(|_| format!("key {} of Secret {} is not text (UTF-8)", from.key, from.name))?;
    // Whoever makes a Secret from a file has the end of the line in it.
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

fn algorithm(algorithm: TokenAlgorithm) -> app::TokenAlgorithm {
    match algorithm {
        TokenAlgorithm::HS256 => app::TokenAlgorithm::HS256,
        TokenAlgorithm::RS256 => app::TokenAlgorithm::RS256,
        TokenAlgorithm::ES256 => app::TokenAlgorithm::ES256,
        TokenAlgorithm::EdDSA => app::TokenAlgorithm::EdDSA,
    }
}

/// The schema has no negative ones.
fn large(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn small(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

/// What is wrong with the document, at the field of the resource that it comes from.
pub fn in_spec(violation: &Violation) -> Violation {
    let mut path = "spec".to_owned();
    for segment in violation.path.split('.').filter(|segment| !segment.is_empty()) {
        path.push('.');
        match segment {
            "key" | "secret" => path.push_str("secretRef"),
            segment => camel_case(segment, &mut path),
        }
    }
    // Which app is the root one is said by the cluster.
    if violation.path == "root" {
        path = "PushCluster's spec.rootApp".to_owned();
    }
    Violation::new(path, violation.message.clone())
}

fn camel_case(segment: &str, path: &mut String) {
    for (i, word) in segment.split('_').enumerate() {
        let mut letters = word.chars();
        match letters.next() {
            Some(first) if i > 0 => path.push(first.to_ascii_uppercase()),
            Some(first) => path.push(first),
            None => {}
        }
        path.push_str(letters.as_str());
    }
}

#[cfg(test)]
mod tests {
    use carillon_agent::document::ConfigDocument;
    use carillon_operator_api::{AppApiKey, AppTokenKey, AppWebhook};

    use super::*;

    fn secret(name: &str, key: &str) -> SecretKey {
        SecretKey { name: name.to_owned(), key: key.to_owned() }
    }

    fn with_keys() -> AppSpec {
        let mut spec = AppSpec::of("main");
        spec.api_keys = vec![AppApiKey { name: "shop".to_owned(), secret_ref: secret("keys", "api") }];
        spec.token_keys = vec![AppTokenKey {
            id: "one".to_owned(),
            algorithm: TokenAlgorithm::HS256,
            secret_ref: secret("keys", "token"),
        }];
        spec.webhook = Some(AppWebhook {
            url: "https://example.com".to_owned(),
            secret_ref: Some(secret("hook", "secret")),
            presence: true,
            timeout_ms: 5000,
        });
        spec
    }

    #[test]
    fn a_resource_that_says_nothing_is_a_document_that_says_nothing() {
        assert_eq!(build(&AppSpec::of("main"), false, &BTreeMap::new()), Ok(Document::default()));
        assert!(build(&AppSpec::of("main"), true, &BTreeMap::new()).unwrap().root);
    }

    #[test]
    fn keys_come_from_secrets_without_the_end_of_the_line() {
        let keys = SecretData::from([
            ("api".to_owned(), b"0123456789abcdef\n".to_vec()),
            ("token".to_owned(), b"0123456789abcdef0123456789abcdef".to_vec()),
        ]);
        let hook = SecretData::from([("secret".to_owned(), b"sign".to_vec())]);
        let secrets = BTreeMap::from([("keys".to_owned(), keys), ("hook".to_owned(), hook)]);
        let document = build(&with_keys(), false, &secrets).unwrap();
        assert_eq!(document.api_keys[0].key, "0123456789abcdef");
        assert_eq!(document.token_keys[0].key.len(), 32);
        let webhook = document.webhook.as_ref().unwrap();
        assert_eq!((webhook.secret.as_deref(), webhook.timeout_ms), (Some("sign"), 5000));
        assert_eq!(document.check(Some("shop")), []);
    }

    #[test]
    fn every_key_that_is_missing_is_told_with_its_path() {
        let keys = SecretData::from([("api".to_owned(), vec![0xff])]);
        let secrets = BTreeMap::from([("keys".to_owned(), keys)]);
        let missing = build(&with_keys(), false, &secrets).unwrap_err();
        let told: Vec<String> = missing.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "spec.apiKeys[0].secretRef: key api of Secret keys is not text (UTF-8)",
                "spec.tokenKeys[0].secretRef: Secret keys has no key token",
                "spec.webhook.secretRef: there is no Secret hook",
            ]
        );
    }

    #[test]
    fn paths_are_those_of_the_resource() {
        for (document, spec) in [
            ("api_keys[0].key", "spec.apiKeys[0].secretRef"),
            ("webhook.secret", "spec.webhook.secretRef"),
            ("webhook.timeout_ms", "spec.webhook.timeoutMs"),
            ("limits.max_payload_bytes", "spec.limits.maxPayloadBytes"),
            ("device_publish[3]", "spec.devicePublish[3]"),
            ("root", "PushCluster's spec.rootApp"),
            ("", "spec"),
        ] {
            assert_eq!(in_spec(&Violation::new(document, "x")).path, spec);
        }
    }
}
