use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn an_address_has_so_many_connections_and_no_entry_without_one() {
    let config = GatewayConfig { max_connections_per_ip: 2, ..GatewayConfig::default() };
    let now = Instant::now();
    let admission = Admission::new(&config, now);
    let enter = |address: &str| admission.enter(ip(address), now, &config);
    let (first, second) = (enter("192.0.2.1").unwrap(), enter("::ffff:192.0.2.1").unwrap());
    assert_eq!(first, second, "one address, however it is written");
    assert_eq!(enter("192.0.2.1"), Err(Turned::Full));
    let other = enter("192.0.2.2").unwrap();
    // A /64 is one.
    let six = enter("2001:db8::1").unwrap();
    assert_eq!(enter("2001:db8::2:1"), Ok(six));
    assert_eq!(enter("2001:db8::3"), Err(Turned::Full));
    assert!(enter("2001:db8:0:1::3").is_ok());
    assert_eq!(admission.sizes(now).0, 4);
    admission.leave(first);
    assert_eq!(enter("192.0.2.1"), Ok(second), "there is room again");
    for id in [second, second, other] {
        admission.leave(id);
    }
    assert_eq!(admission.sizes(now).0, 2);
}

#[test]
fn lists_are_followed_and_failures_are_remembered_beyond_the_connection() {
    let config = GatewayConfig { max_auth_failures: 1, ..GatewayConfig::default() };
    let now = Instant::now();
    let admission = Admission::new(&config, now);
    let id = admission.enter(ip("192.0.2.1"), now, &config).unwrap();
    assert_eq!(admission.failed(id, now, &config), Guessed::Enough);
    admission.leave(id);
    assert_eq!(admission.enter(ip("192.0.2.1"), now, &config), Err(Turned::Failures));
    assert_eq!(admission.sizes(now), (0, 1));
    assert!(admission.enter(ip("192.0.2.1"), now + Duration::from_secs(60), &config).is_ok());
    let denying = GatewayConfig { deny: vec!["192.0.2.0/24".into()], ..config };
    admission.follow(&denying);
    assert_eq!(admission.enter(ip("192.0.2.9"), now, &denying), Err(Turned::Denied));
    assert!(admission.enter(ip("192.0.3.9"), now, &denying).is_ok());
}

#[test]
fn connects_come_at_once_up_to_the_burst_then_at_the_rate() {
    let config = GatewayConfig { connect_rate_per_second: 100, connect_burst: 5, ..GatewayConfig::default() };
    let begin = Instant::now();
    let admission = Admission::new(&config, begin);
    let accept = |now: Instant| {
        let waits = admission.wait(now, &config);
        if waits.is_none() {
            admission.enter(ip("192.0.2.1"), now, &config).unwrap();
        }
        waits
    };
    for _ in 0..5 {
        assert_eq!(accept(begin), None);
    }
    let wait = accept(begin).expect("the burst is used up");
    assert_eq!(wait, Duration::from_millis(10));
    assert_eq!(accept(begin + wait), None);
    assert!(accept(begin + wait).is_some());
    // A second gives the rate, not more, and no more than the burst is saved up.
    let mut now = begin + wait;
    let until = now + Duration::from_secs(1);
    let mut accepted = 0;
    while now < until {
        match accept(now) {
            None => accepted += 1,
            Some(wait) => now += wait,
        }
    }
    assert!((99..=101).contains(&accepted), "{accepted}");
    let later = until + Duration::from_secs(100);
    assert_eq!((0..10).filter(|_| accept(later).is_none()).count(), 5);
    // 0 is no limit.
    let free = GatewayConfig { connect_rate_per_second: 0, ..config.clone() };
    assert_eq!(admission.wait(later, &free), None);
}

#[test]
fn an_app_has_so_many_connections() {
    let config = GatewayConfig::default();
    let admission = Admission::new(&config, Instant::now());
    let (shop, demo): (Arc<str>, Arc<str>) = ("shop".into(), "demo".into());
    assert!(admission.enter_app(&shop, 2) && admission.enter_app(&shop, 2) && !admission.enter_app(&shop, 2));
    assert!(admission.enter_app(&demo, 0));
    admission.leave_app("shop");
    assert!(admission.enter_app(&shop, 2));
}
