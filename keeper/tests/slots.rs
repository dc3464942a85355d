//! Slots between owners that live, come and go, over several keepers.

use std::time::{Duration, Instant};

use carillon_agent::admin::Admin;
use carillon_agent::document::DocumentKind;
use carillon_agent::revoked::Revoked;
use carillon_agent::{Agent, Instance, Live, Options, Role, SlotMap};
use carillon_keeper::{Keeper, KeeperHandle, KeeperOptions};
use tempfile::TempDir;
use tokio::net::TcpListener;

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(40);
/// An owner that does not answer is waited for so long.
const LIMIT: Duration = Duration::from_secs(6);

async fn keepers(directory: &TempDir, count: usize) -> Vec<KeeperHandle> {
    let mut listeners = Vec::new();
    for place in 0..count {
        listeners.push(TcpListener::bind((format!("127.0.8.{}", place + 1), 0)).await.unwrap());
    }
    let peers: Vec<String> = listeners.iter().map(|one| one.local_addr().unwrap().to_string()).collect();
    let mut keepers = Vec::new();
    for (place, listener) in listeners.into_iter().enumerate() {
        let path = directory.path().join(place.to_string());
        let mut options = KeeperOptions::new(path, listener, vec![DocumentKind::of::<Revoked>()]);
        options.peers = if count > 1 { peers.clone() } else { Vec::new() };
        options.limits.slot_hand_over = LIMIT;
        keepers.push(Keeper::start(options).await.unwrap());
    }
    keepers
}

fn endpoints(keepers: &[KeeperHandle]) -> Vec<String> {
    keepers.iter().map(KeeperHandle::endpoint).collect()
}

/// A registry in name only.
async fn registry(keepers: &[KeeperHandle], id: &str) -> (Agent, Live<SlotMap>) {
    let agent = Agent::start(Options::new(endpoints(keepers)));
    agent.register(Instance { incarnation: 1, roles: vec![Role::Registry], ..Instance::new(id) });
    tokio::time::timeout(PATIENCE, agent.ready()).await.unwrap();
    let slots = agent.slots();
    (agent, slots)
}

async fn until(what: &str, slots: &mut Live<SlotMap>, is_so: impl FnMut(&std::sync::Arc<SlotMap>) -> bool) {
    let is_so = tokio::time::timeout(PATIENCE, slots.wait_for(is_so)).await.is_ok();
    assert!(is_so, "{what}: {} are on their way", slots.borrow().moving_to.len());
}

fn owned(map: &SlotMap, id: &str) -> Vec<(u32, u64)> {
    (0..).zip(&map.slots).filter(|(_, slot)| *slot.instance == *id).map(|(n, slot)| (n, slot.epoch)).collect()
}

fn moving(map: &SlotMap) -> Vec<(u32, u64)> {
    map.moving_to.keys().map(|&slot| (slot, map.slots[slot as usize].epoch)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_is_told_first_over_a_change_of_the_lead_and_taken_from_in_the_end() {
    let directory = TempDir::new().unwrap();
    let mut keepers = keepers(&directory, 3).await;
    let (_first, mut slots) = registry(&keepers, "hub-1").await;
    until("it owns all", &mut slots, |map| owned(map, "hub-1").len() == 1024).await;
    let (second, _) = registry(&keepers, "hub-2").await;
    until("half are to go", &mut slots, |map| map.moving_to.len() == 512).await;
    let map = slots.borrow().clone();
    assert_eq!(owned(&map, "hub-1").len(), 1024, "it owns them until it has given them up");
    assert!(map.slots.iter().all(|slot| slot.epoch == 1));
    assert!(map.moving_to.values().all(|to| **to == *"hub-2"));

    // The leader goes in the middle: what was said stays said, and nothing moves by that.
    let leader = keepers.iter().position(|keeper| keeper.status().leads).unwrap();
    keepers.remove(leader).stop().await;
    let admin = Admin::new(endpoints(&keepers));
    let leaving = moving(&map);
    let (now, later) = leaving.split_at(500);
    let begun = Instant::now();
    loop {
        match admin.yield_slots("hub-1", 1, now).await {
            Ok(moved) => break assert_eq!(moved, 500),
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    until("they have gone", &mut slots, |map| owned(map, "hub-2").len() >= 500).await;
    let map = slots.borrow().clone();
    assert!(now.iter().all(|&(slot, _)| map.slots[slot as usize].epoch == 2));
    // Said again, by somebody else, under another epoch, of what is not to go: nothing happens.
    for (instance, incarnation, slots) in
        [("hub-1", 1, now), ("hub-2", 1, later), ("hub-1", 2, later), ("hub-1", 1, &[(later[0].0, 2)])]
    {
        assert_eq!(admin.yield_slots(instance, incarnation, slots).await.unwrap(), 0, "{instance} {slots:?}");
    }
    let stays = owned(&slots.borrow(), "hub-1");
    let stays: Vec<_> = stays.into_iter().filter(|(slot, _)| !map.moving_to.contains_key(slot)).collect();
    assert_eq!(admin.yield_slots("hub-1", 1, &stays).await.unwrap(), 0);
    let too_many = vec![(0, 1); 1025];
    let refused = admin.yield_slots("hub-1", 1, &too_many).await.unwrap_err().to_string();
    assert!(refused.contains("1025 slots are given up, there are 1024"), "{refused}");

    // The rest is taken when its time is over.
    until("all have gone", &mut slots, |map| owned(map, "hub-2").len() == 512).await;
    let map = slots.borrow().clone();
    assert!(map.moving_to.is_empty() && map.slots.iter().all(|slot| slot.epoch <= 2));

    // It leaves in order: they go back, told first, and when it has gone before that, nobody waits for it.
    second.register(Instance {
        incarnation: 1,
        roles: vec![Role::Registry],
        draining: true,
        ..Instance::new("hub-2")
    });
    until("they are to go back", &mut slots, |map| map.moving_to.len() == 512).await;
    let begun = Instant::now();
    second.stop().await;
    until("they are back", &mut slots, |map| owned(map, "hub-1").len() == 1024).await;
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    for keeper in keepers {
        keeper.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_whose_end_goes_away_is_taken_back() {
    let directory = TempDir::new().unwrap();
    let keepers = keepers(&directory, 1).await;
    let (_first, mut slots) = registry(&keepers, "hub-1").await;
    until("it owns all", &mut slots, |map| owned(map, "hub-1").len() == 1024).await;
    let (second, _) = registry(&keepers, "hub-2").await;
    until("half are to go", &mut slots, |map| map.moving_to.len() == 512).await;
    second.stop().await;
    until("none are", &mut slots, |map| map.moving_to.is_empty()).await;
    let map = slots.borrow().clone();
    assert_eq!(owned(&map, "hub-1").len(), 1024);
    assert!(map.slots.iter().all(|slot| slot.epoch == 1), "the epoch is as before");
    for keeper in keepers {
        keeper.stop().await;
    }
}
