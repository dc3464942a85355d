//! Tests of the parent module.

use std::collections::BTreeMap;

use carillon_agent::Role;

use super::*;

fn gateway(id: &str) -> Instance {
    Instance {
        id: id.to_owned(),
        incarnation: 1,
        roles: vec![Role::Gateway],
        addresses: BTreeMap::from([
            ("grpc".to_owned(), "10.0.0.1:7000".to_owned()),
            ("mqtt".to_owned(), format!("{id}:1883")),
            ("ws".to_owned(), format!("{id}:8083")),
        ]),
        labels: BTreeMap::new(),
        draining: false,
    }
}

fn first(gateways: &[Instance], device: &str) -> String {
    rank(gateways, device, 8)[0].gateway.clone()
}

#[test]
fn devices_spread_evenly_and_only_those_of_a_gateway_that_goes_move() {
    let gateways: Vec<_> = (0..5).map(|i| gateway(&format!("gateway-{i}"))).collect();
    let mut counts = BTreeMap::<String, usize>::new();
    let mut moved = 0;
    for i in 0..10_000 {
        let device = format!("device-{i}");
        let before = first(&gateways, &device);
        let after = first(&gateways[..4], &device);
        if before != "gateway-4" {
            assert_eq!(before, after, "{device} moved though its gateway stayed");
        } else {
            moved += 1;
            // It goes where it was told to go next.
            assert_eq!(after, rank(&gateways, &device, 8)[1].gateway);
        }
        *counts.entry(before).or_default() += 1;
    }
    assert_eq!(counts.len(), 5);
    assert!(counts.values().all(|&count| (1800..2200).contains(&count)), "{counts:?}");
    assert!(moved > 1800);
}

#[test]
fn the_order_does_not_depend_on_the_order_of_discovery() {
    let mut gateways: Vec<_> = (0..5).map(|i| gateway(&format!("gateway-{i}"))).collect();
    let ranked = rank(&gateways, "phone-1", 8);
    gateways.reverse();
    assert_eq!(rank(&gateways, "phone-1", 8), ranked);
    assert_eq!(rank(&gateways, "phone-1", 2), ranked[..2]);
}

#[test]
fn draining_gateways_and_those_without_an_address_for_devices_are_left_out() {
    let draining = Instance { draining: true, ..gateway("draining") };
    let mut inner = gateway("inner");
    inner.addresses.retain(|name, _| name == "grpc");
    let gateways = [draining, inner, gateway("open")];
    let expected = Endpoint {
        gateway: "open".to_owned(),
        mqtt: Some("mqtt://open:1883".to_owned()),
        ws: Some("ws://open:8083/mqtt".to_owned()),
        ..Endpoint::default()
    };
    assert_eq!(rank(&gateways, "phone-1", 8), [expected]);
}
