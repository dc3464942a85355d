//! Rules that hold whatever happens: a world in which much goes wrong, and then nothing any more. What must never happen
//! is looked after by the world itself, with each action (`simulation`).

use proptest::prelude::*;

use super::scenarios::pool;
use super::simulation::World;
use super::*;

#[derive(Debug, Clone)]
enum Happens {
    Replicas(u32),
    Revision(&'static str),
    Paused(bool),
    Surge(Amount, Amount),
    Rate(f64),
    Autoscaling(bool),
    Connect(usize),
    Leave(usize),
    Kill(usize),
    Terminate(usize),
    Cordon(usize),
    Uncordon,
    Lost(usize),
    Unready(usize),
    Mute(usize),
    Deaf(usize),
    Heal,
    KeeperAway,
    KeeperBack,
    OperatorDies(usize),
}

fn happens() -> impl Strategy<Value = Happens> {
    use Happens::*;
    let amount = prop_oneof![
        (0u32..3).prop_map(Amount::Count),
        prop_oneof![Just(0), Just(25), Just(100)].prop_map(Amount::Percent)
    ];
    prop_oneof![
        4 => (0u32..6).prop_map(Replicas),
        4 => prop_oneof![Just("a"), Just("b"), Just("c"), Just("broken")].prop_map(Revision),
        1 => any::<bool>().prop_map(Paused),
        1 => (amount.clone(), amount).prop_map(|(surge, unavailable)| Surge(surge, unavailable)),
        1 => (1u32..40).prop_map(|rate| Rate(f64::from(rate))),
        1 => any::<bool>().prop_map(Autoscaling),
        2 => (1usize..60).prop_map(Connect),
        1 => (1usize..60).prop_map(Leave),
        2 => (0usize..8).prop_map(Kill),
        2 => (0usize..8).prop_map(Terminate),
        2 => (0usize..8).prop_map(Cordon),
        1 => Just(Uncordon),
        1 => (0usize..8).prop_map(Lost),
        1 => (0usize..8).prop_map(Unready),
        1 => (0usize..8).prop_map(Mute),
        1 => (0usize..8).prop_map(Deaf),
        1 => Just(Heal),
        1 => Just(KeeperAway),
        2 => Just(KeeperBack),
        4 => (0usize..6).prop_map(OperatorDies),
    ]
}

fn happen(world: &mut World, event: &Happens) {
    let name = |world: &World, index: &usize| {
        let count = world.pods.len();
        (count > 0).then(|| world.pods[index % count].seen.name.clone())
    };
    match event {
        Happens::Replicas(count) => world.pool.replicas = *count,
        Happens::Revision(revision) => world.pool.revision = (*revision).to_owned(),
        Happens::Paused(paused) => world.pool.paused = *paused,
        Happens::Surge(surge, unavailable) => {
            (world.pool.max_surge, world.pool.max_unavailable) = (*surge, *unavailable);
        }
        Happens::Rate(rate) => world.pool.rate_per_second = *rate,
        Happens::Autoscaling(is_on) => {
            world.pool.autoscaling = is_on.then_some(Autoscaling {
                min: 1,
                max: 6,
                connections_per_pod: 20,
                stabilization_seconds: 40,
            });
        }
        Happens::Connect(count) => world.connect(*count),
        Happens::Leave(count) => {
            let stay = world.devices.len().saturating_sub(*count);
            world.devices.truncate(stay);
        }
        Happens::Kill(index) => _ = name(world, index).map(|name| world.kill(&name)),
        Happens::Terminate(index) => {
            if let Some(name) = name(world, index).filter(|name| !world.is_terminating(name)) {
                world.terminate(&name, 30);
            }
        }
        Happens::Cordon(index) => on_pod(world, name(world, index), |pod| pod.seen.node = Node::Cordoned),
        Happens::Uncordon => world.pods.iter_mut().for_each(|pod| pod.seen.node = Node::Ready),
        Happens::Lost(index) => on_pod(world, name(world, index), |pod| {
            pod.seen.node = Node::Lost;
            pod.is_mute = true;
        }),
        Happens::Unready(index) => on_pod(world, name(world, index), |pod| pod.is_unready = true),
        Happens::Mute(index) => on_pod(world, name(world, index), |pod| pod.is_mute = true),
        Happens::Deaf(index) => world.deaf.extend(name(world, index)),
        Happens::Heal => heal(world),
        Happens::KeeperAway => world.keeper_since = None,
        Happens::KeeperBack => world.keeper_since = world.keeper_since.or(Some(world.now)),
        Happens::OperatorDies(after) => world.dies_after = Some(*after),
    }
}

fn on_pod(world: &mut World, name: Option<String>, change: impl Fn(&mut super::simulation::Pod_)) {
    if let Some(pod) = name.and_then(|name| world.pod(&name)) {
        change(pod);
    }
}

fn heal(world: &mut World) {
    for pod in &mut world.pods {
        (pod.is_unready, pod.is_mute, pod.seen.node) = (false, false, Node::Ready);
    }
    world.deaf.clear();
}

/// All pods are of the wanted revision, as many as wanted, in the Service, without a decision, with even shares.
fn assert_as_wanted(world: &World) {
    let desired = world.memory.replicas.unwrap_or(world.pool.replicas) as usize;
    let table = || format!("{}{}", world.table(), world.trace);
    assert_eq!(world.pods.len(), desired, "{}", table());
    for pod in &world.pods {
        let is_fine = pod.seen.revision == world.pool.revision
            && pod.seen.is_serving
            && pod.state == State::Active
            && pod.seen.decision.as_ref().is_none_or(|decision| decision.what == What::Rebalance);
        assert!(is_fine, "{}:\n{}", pod.seen.name, table());
        let held: u64 = world.pods.iter().map(|pod| world.held(&pod.seen.name)).sum();
        let share = held / desired as u64;
        let off = world.held(&pod.seen.name).abs_diff(share);
        assert!(off <= 5 || off * 100 <= share * 10, "{} is off by {off}:\n{}", pod.seen.name, table());
    }
}

/// Few enough for each build; `PROPTEST_CASES` asks for more.
fn config() -> ProptestConfig {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() { config } else { ProptestConfig { cases: 60, ..config } }
}

proptest! {
    #![proptest_config(config())]

    /// Whatever has happened, when it ends the pool becomes what is wanted, and then nothing is done any more.
    #[test]
    fn it_comes_to_rest_as_wanted(
        story in prop::collection::vec((0u64..40, happens()), 0..12),
        replicas in 1u32..6,
        devices in 0usize..100,
        limit in prop_oneof![Just(None), Just(Some(60))],
    ) {
        let rebalance = Some(Rebalancing { tolerance_percent: 10, cooldown_seconds: 30 });
        let mut world = World::new(Pool { replicas, max_connections: limit, rebalance, deadline_seconds: 60, ..pool() });
        world.broken_revisions = vec!["broken".to_owned()];
        world.connect(devices);
        for (seconds, event) in &story {
            world.run(*seconds);
            happen(&mut world, event);
        }
        heal(&mut world);
        world.keeper_since = world.keeper_since.or(Some(world.now));
        world.pool.paused = false;
        if world.pool.revision == "broken" {
            world.pool.revision = "a".to_owned();
        }
        // Marks of rebalances that moved nobody stay longest: 300 s.
        let rest = world.run_until_quiet(320, 8000);
        prop_assert!(rest.is_some(), "it does not come to rest:\n{}\n{}", world.trace, world.table());
        assert_as_wanted(&world);
        let actions: usize = (0..100).map(|_| world.tick()).sum();
        prop_assert_eq!(actions, 0);
        prop_assert!(world.pods.iter().all(|pod| pod.seen.decision.is_none()), "{}", world.table());
    }

    /// An update, with an operator that dies whenever it likes: each device moves once, and the load is even afterwards.
    #[test]
    fn each_device_moves_once(
        replicas in 1u32..8,
        devices in 0usize..200,
        rate in 2u32..50,
        surge in prop_oneof![(1u32..4).prop_map(Amount::Count), (1u32..=100).prop_map(Amount::Percent)],
        unavailable in prop_oneof![Just(Amount::Count(0)), Just(Amount::Percent(25))],
        deaths in prop::collection::vec((1u64..30, 0usize..5), 0..10),
    ) {
        let rebalance = Some(Rebalancing { tolerance_percent: 10, cooldown_seconds: 30 });
        let mut world = World::new(Pool {
            replicas,
            rebalance,
            max_surge: surge,
            max_unavailable: unavailable,
            rate_per_second: f64::from(rate),
            ..pool()
        });
        prop_assert!(world.run_until_quiet(40, 100).is_some());
        world.connect(devices);
        prop_assert!(world.run_until_quiet(40, 100).is_some());
        world.forget_moves();
        world.pool.revision = "b".to_owned();
        for (seconds, after) in deaths {
            world.run(seconds);
            world.dies_after = Some(after);
        }
        // Longer than one drain may be.
        prop_assert!(world.run_until_quiet(150, 3000).is_some(), "{}\n{}", world.trace, world.table());
        assert_as_wanted(&world);
        let most = world.devices.iter().map(|device| device.moved).max().unwrap_or(0);
        prop_assert!(most <= 1, "{}", world.trace);
    }
}
