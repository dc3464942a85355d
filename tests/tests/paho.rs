//! paho-mqtt, the Python client, against a real process: `tests/python/paho_checks.py`, a test for each check.

use carillon_tests::Server;
use carillon_tests::tools::{python, succeed};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/python/paho_checks.py");

async fn check(name: &str) {
    let Some(python) = python() else { return };
    let server = Server::start().await;
    let mqtt = server.addresses().mqtt;
    let mut command = tokio::process::Command::new(python);
    command.args([SCRIPT, name, &mqtt.ip().to_string(), &mqtt.port().to_string()]).kill_on_drop(true);
    assert_eq!(succeed(command).await.trim(), format!("ok {name}"));
}

macro_rules! checks {
    ($($name:ident)*) => {
        $(#[tokio::test]
        async fn $name() {
            check(stringify!($name)).await;
        })*

        /// The script and this list are the same.
        #[tokio::test]
        async fn every_check_is_a_test() {
            let Some(python) = python() else { return };
            let mut command = tokio::process::Command::new(python);
            command.args([SCRIPT, "list", "-", "0"]);
            let listed = succeed(command).await;
            assert_eq!(listed.split_whitespace().collect::<Vec<_>>(), [$(stringify!($name)),*]);
        }
    };
}

checks! {
    properties_travel
    sequence_numbers_are_there
    request_and_response
    sessions_are_kept
    sessions_expire
    taken_over
    reason_codes
    bad_token_is_refused
    unsubscribed_is_silent
    subscription_options
    subscription_identifiers
    slow_receiver_gets_all
    large_payloads_travel
    shared_subscriptions_have_their_options
    wills_are_sent
    exactly_once
    lower_quality_of_service
    aliases_both_ways
    many_devices_at_once
}
