//! What is in a pod.

use super::*;

fn around() -> Surroundings {
    Surroundings {
        namespace: "push".to_owned(),
        keeper_url: "https://chat-keeper.push.svc:7400".to_owned(),
        keeper_secret: "chat-gateway-tls".to_owned(),
        image: "carillon:1".to_owned(),
        image_pull_policy: Some("Never".to_owned()),
    }
}

fn make(pool: &GatewayPoolSpec, cluster: &PushClusterSpec) -> Pod {
    let owner = OwnerReference { name: "edge".to_owned(), controller: Some(true), ..Default::default() };
    pod("edge", "x7k2p", pool, cluster, &around(), owner)
}

fn container_of(pod: &Pod) -> &Container {
    &pod.spec.as_ref().unwrap().containers[0]
}

fn arguments_of(pod: &Pod) -> &[String] {
    container_of(pod).args.as_ref().unwrap()
}

fn has(pod: &Pod, argument: &str) -> bool {
    arguments_of(pod).iter().any(|given| given == argument)
}

fn listener(name: &str, protocol: Protocol, port: i32, secret: Option<&str>) -> Listener {
    Listener {
        name: name.to_owned(),
        protocol,
        port,
        tls_secret_name: secret.map(str::to_owned),
        proxy_protocol: false,
    }
}

#[test]
fn a_pod_of_defaults() {
    let pod = make(&GatewayPoolSpec::of("chat"), &PushClusterSpec::default());
    assert_eq!(pod.metadata.name.as_deref(), Some("edge-x7k2p"));
    let labels = pod.metadata.labels.as_ref().unwrap();
    assert_eq!(labels[POOL_LABEL], "edge");
    assert_eq!(labels[CLUSTER_LABEL], "chat");
    assert_eq!(labels[REVISION_LABEL].len(), 10);
    let spec = pod.spec.as_ref().unwrap();
    assert_eq!(spec.readiness_gates.as_ref().unwrap()[0].condition_type, "carillon.dev/serving");
    assert_eq!(spec.automount_service_account_token, Some(false));
    let container = container_of(&pod);
    assert_eq!(container.image.as_deref(), Some("carillon:1"));
    assert_eq!(container.image_pull_policy.as_deref(), Some("Never"));
    for argument in [
        "--instance=$(POD_NAME)",
        "--pool=edge",
        "--mqtt=0.0.0.0:1883",
        "--advertise-mqtt=$(POD_IP):1883",
        "--ws=0.0.0.0:8083",
        "--keeper=https://chat-keeper.push.svc:7400",
        "--keeper-ca=/etc/carillon/tls/ca.crt",
    ] {
        assert!(has(&pod, argument), "{argument}: {:?}", arguments_of(&pod));
    }
    assert!(further_listeners(&GatewayPoolSpec::of("chat")).is_empty());
}

/// What the restricted standard of Kubernetes asks for, and a root file system that cannot be written.
#[test]
fn it_may_do_nothing_that_it_need_not() {
    let pod = make(&GatewayPoolSpec::of("chat"), &PushClusterSpec::default());
    let of_pod = pod.spec.as_ref().unwrap().security_context.as_ref().unwrap();
    assert_eq!(of_pod.run_as_non_root, Some(true));
    assert_eq!(of_pod.seccomp_profile.as_ref().unwrap().type_, "RuntimeDefault");
    let own = container_of(&pod).security_context.as_ref().unwrap();
    assert_eq!(own.allow_privilege_escalation, Some(false));
    assert_eq!(own.read_only_root_filesystem, Some(true));
    assert_eq!(own.capabilities.as_ref().unwrap().drop, Some(vec!["ALL".to_owned()]));
    // So all that is written to is mounted.
    let mounts = container_of(&pod).volume_mounts.as_ref().unwrap();
    let writable = mounts.iter().filter(|mount| mount.read_only != Some(true));
    assert_eq!(
        writable.map(|mount| mount.mount_path.as_str()).collect::<Vec<_>>(),
        ["/var/lib/carillon", "/tmp"]
    );
}

#[test]
fn it_has_time_to_drain_when_it_is_told_to_terminate() {
    let mut pool = GatewayPoolSpec::of("chat");
    pool.drain.deadline_seconds = 900;
    let pod = make(&pool, &PushClusterSpec::default());
    assert!(has(&pod, "--drain-seconds=915"));
    assert_eq!(pod.spec.unwrap().termination_grace_period_seconds, Some(930));
}

#[test]
fn the_nearest_image_counts() {
    let mut pool = GatewayPoolSpec::of("chat");
    let mut cluster = PushClusterSpec { image: Some("carillon:2".to_owned()), ..Default::default() };
    let pod = make(&pool, &cluster);
    assert_eq!(container_of(&pod).image.as_deref(), Some("carillon:2"));
    assert_eq!(container_of(&pod).image_pull_policy, None, "the operator's policy is for its own image");
    pool.template.image = Some("carillon:3".to_owned());
    assert_eq!(container_of(&make(&pool, &cluster)).image.as_deref(), Some("carillon:3"));
    cluster.image = None;
    assert_eq!(container_of(&make(&pool, &cluster)).image.as_deref(), Some("carillon:3"));
}

#[test]
fn labels_and_variables_of_people_do_not_replace_its_own() {
    let mut pool = GatewayPoolSpec::of("chat");
    pool.template.labels.insert(POOL_LABEL.to_owned(), "other".to_owned());
    pool.template.labels.insert("team".to_owned(), "push".to_owned());
    let variable =
        |name: &str| EnvVar { name: name.to_owned(), value: Some("x".to_owned()), ..Default::default() };
    pool.template.env = vec![variable("POD_NAME"), variable("CARILLON_SHARDS")];
    let pod = make(&pool, &PushClusterSpec::default());
    let labels = pod.metadata.labels.as_ref().unwrap();
    assert_eq!((labels[POOL_LABEL].as_str(), labels["team"].as_str()), ("edge", "push"));
    let environment = container_of(&pod).env.as_ref().unwrap();
    assert_eq!(environment.iter().filter(|one| one.name == "POD_NAME").count(), 1);
    assert!(environment.iter().any(|one| one.name == "CARILLON_SHARDS"));
}

#[test]
fn listeners_are_flags_as_far_as_flags_can_say_them() {
    let mut pool = GatewayPoolSpec::of("chat");
    let mut proxied = listener("proxied", Protocol::Mqtt, 1993, None);
    proxied.proxy_protocol = true;
    pool.listeners = vec![
        listener("wss", Protocol::Wss, 443, Some("edge")),
        listener("mqtts", Protocol::Mqtts, 8883, Some("edge")),
        listener("other", Protocol::Wss, 444, Some("another")),
        proxied,
    ];
    let pod = make(&pool, &PushClusterSpec::default());
    for argument in [
        "--mqtt=none",
        "--ws=none",
        "--mqtts=0.0.0.0:8883",
        "--tls-certificate=/etc/carillon/listeners/edge/tls.crt",
    ] {
        assert!(has(&pod, argument), "{argument}: {:?}", arguments_of(&pod));
    }
    // Of two of a protocol the first by name is a flag, if it has the certificate that the flags have.
    assert!(has(&pod, "--wss=0.0.0.0:443"));
    let further = further_listeners(&pool);
    let names: Vec<_> = further.iter().map(|listener| listener["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["other", "proxied"]);
    assert_eq!(
        further[0]["tls"]["certificates"][0]["certificate"],
        "/etc/carillon/listeners/another/tls.crt"
    );
    assert_eq!(further[1]["proxy_protocol"], true);
    let volumes = pod.spec.as_ref().unwrap().volumes.as_ref().unwrap();
    let secrets: Vec<_> =
        volumes.iter().filter_map(|volume| volume.secret.as_ref()?.secret_name.as_deref()).collect();
    assert_eq!(secrets, ["chat-gateway-tls", "another", "edge"]);
}

#[test]
fn devices_are_told_what_they_can_reach() {
    let mut pool = GatewayPoolSpec::of("chat");
    pool.exposure.kind = ExposureType::HostPort;
    let pod = make(&pool, &PushClusterSpec::default());
    assert!(has(&pod, "--advertise-mqtt=$(HOST_IP):1883"));
    let ports = container_of(&pod).ports.as_ref().unwrap();
    assert_eq!(ports.iter().map(|port| port.host_port).collect::<Vec<_>>(), [None, Some(1883), Some(8083)]);
    for (host, expected) in [("edge.example.com", "edge.example.com"), ("2001:db8::1", "[2001:db8::1]")] {
        pool.exposure.advertised_host = Some(host.to_owned());
        let pod = make(&pool, &PushClusterSpec::default());
        assert!(has(&pod, &format!("--advertise-mqtt={expected}:1883")));
    }
}
