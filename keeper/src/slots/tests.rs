//! Balance, least movement, epochs that only grow, and owners that are told first, over arbitrary histories.

use proptest::prelude::*;

use super::*;

/// What owners would have, had they given up all at once.
fn assign(previous: &Assignment, instances: &[Owner]) -> Assignment {
    let present = Present { living: instances.to_vec(), candidates: instances.to_vec() };
    super::assign(previous, &present, |_, _| true)
}

/// Nobody drains, and nobody is late.
fn told(previous: &Assignment, instances: &[Owner]) -> Assignment {
    let present = Present { living: instances.to_vec(), candidates: instances.to_vec() };
    super::assign(previous, &present, |_, _| false)
}

/// Everyone gives up what he is told to.
fn given_up(mut assignment: Assignment, living: &[Owner]) -> Assignment {
    for owner in living {
        let own = |slot: &Slot| slot.owner.as_ref() == Some(owner);
        let slots = assignment.slots.iter().enumerate().filter(|(_, slot)| own(slot));
        let slots: Vec<(u32, u64)> = slots.map(|(number, slot)| (number as u32, slot.epoch)).collect();
        assignment.yielded(owner, &slots, living);
    }
    assignment
}

fn owner(id: usize, incarnation: u64) -> Owner {
    Owner { instance: format!("hub-{id}"), incarnation }
}

fn counts(assignment: &Assignment) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for slot in &assignment.slots {
        if let Some(owner) = &slot.owner {
            *counts.entry(owner.instance.clone()).or_default() += 1;
        }
    }
    counts
}

#[test]
fn the_first_instance_gets_all_slots_with_epoch_one() {
    let next = assign(&Assignment::default(), &[owner(1, 7)]);
    assert!(next.slots.iter().all(|slot| (slot.owner.as_ref(), slot.epoch) == (Some(&owner(1, 7)), 1)));
}

#[test]
fn a_new_incarnation_keeps_its_slots_with_new_epochs() {
    let before = assign(&Assignment::default(), &[owner(1, 1), owner(2, 1)]);
    let after = assign(&before, &[owner(1, 2), owner(2, 1)]);
    // Its former process is gone: there is nobody to be told.
    assert_eq!(after, told(&before, &[owner(1, 2), owner(2, 1)]));
    for (before, after) in before.slots.iter().zip(&after.slots) {
        assert_eq!(before.owner.as_ref().map(|o| &o.instance), after.owner.as_ref().map(|o| &o.instance));
        let restarted = before.owner.as_ref().is_some_and(|o| o.instance == "hub-1");
        assert_eq!(after.epoch, before.epoch + u64::from(restarted));
    }
}

#[test]
fn a_second_instance_takes_half_and_gives_it_back() {
    let one = assign(&Assignment::default(), &[owner(1, 1)]);
    let two = assign(&one, &[owner(1, 1), owner(2, 1)]);
    assert_eq!(counts(&two), BTreeMap::from([("hub-1".to_owned(), 512), ("hub-2".to_owned(), 512)]));
    let back = assign(&two, &[owner(1, 1)]);
    assert_eq!(counts(&back), BTreeMap::from([("hub-1".to_owned(), 1024)]));
    let nobody = assign(&back, &[]);
    assert!(nobody.slots.iter().zip(&back.slots).all(|(n, b)| n.owner.is_none() && n.epoch == b.epoch + 1));
}

#[test]
fn an_assignment_survives_being_written() {
    let assignment = assign(&Assignment::default(), &[owner(1, 3), owner(2, 4), owner(3, 5)]);
    assert_eq!(Assignment::from_record(&assignment.to_record()), assignment);
    let nobody = assign(&assignment, &[]);
    assert_eq!(Assignment::from_record(&nobody.to_record()), nobody);
    let moving = told(&assignment, &[owner(1, 3), owner(2, 4), owner(3, 5), owner(4, 6)]);
    assert_eq!(moving.moving().count(), 256);
    assert_eq!(Assignment::from_record(&moving.to_record()), moving);
    // As an older agent reads it, and as an older keeper has written it.
    let older = v1::SlotRecord { moving_to: Vec::new(), ..moving.to_record() };
    assert_eq!(Assignment::from_record(&older), assignment);
    assert_eq!(assignment.to_record().moving_to, [0; 0]);
}

#[test]
fn an_owner_that_lives_is_told_first_and_keeps_its_epoch_until_it_has_given_up() {
    let both = [owner(1, 1), owner(2, 1)];
    let one = assign(&Assignment::default(), &both[..1]);
    let moving = told(&one, &both);
    assert_eq!(counts(&moving), BTreeMap::from([("hub-1".to_owned(), 1024)]));
    assert!(moving.slots.iter().all(|slot| slot.epoch == 1));
    assert_eq!(moving.moving().count(), 512);
    assert_eq!(told(&moving, &both), moving, "nothing more to do");

    let mut after = moving.clone();
    let number = moving.moving().next().unwrap().0 as u32;
    let stays = (0..1024).find(|number| moving.slots[*number as usize].moving_to.is_none()).unwrap();
    assert_eq!(after.yielded(&owner(2, 1), &[(number, 1)], &both), 0, "it is not its own");
    assert_eq!(after.yielded(&owner(1, 2), &[(number, 1)], &both), 0, "in another life");
    assert_eq!(after.yielded(&owner(1, 1), &[(number, 2), (stays, 1), (9999, 1)], &both), 0);
    assert_eq!(after.yielded(&owner(1, 1), &[(number, 1)], &both[..1]), 0, "who gets it has gone");
    assert_eq!(after, moving);
    assert_eq!(after.yielded(&owner(1, 1), &[(number, 1)], &both), 1);
    assert_eq!(after.slots[number as usize], Slot { owner: Some(owner(2, 1)), epoch: 2, moving_to: None });
    assert_eq!(after.yielded(&owner(1, 1), &[(number, 1)], &both), 0, "once");
    assert_eq!(after.moving().count(), 511);
    assert_eq!(told(&after, &both), after);
}

#[test]
fn an_owner_that_is_late_or_gone_is_not_waited_for() {
    let both = [owner(1, 1), owner(2, 1)];
    let moving = told(&assign(&Assignment::default(), &both[..1]), &both);
    let late = moving.moving().next().unwrap().0;
    let present = Present { living: both.to_vec(), candidates: both.to_vec() };
    let next = super::assign(&moving, &present, |number, _| number == late);
    assert_eq!(next.slots[late], Slot { owner: Some(owner(2, 1)), epoch: 2, moving_to: None });
    assert_eq!(next.moving().count(), 511);
    // In the middle of it the old owner dies, or begins another life.
    let gone = told(&moving, &both[1..]);
    assert!(
        gone.slots.iter().all(|slot| *slot == Slot { owner: Some(owner(2, 1)), epoch: 2, moving_to: None })
    );
    let again = told(&moving, &[owner(1, 2), owner(2, 1)]);
    assert!(again.slots.iter().all(|slot| slot.epoch == 2 && slot.moving_to.is_none()));
    assert_eq!(counts(&again), BTreeMap::from([("hub-1".to_owned(), 512), ("hub-2".to_owned(), 512)]));
}

#[test]
fn a_move_that_has_lost_its_end_is_taken_back_or_goes_elsewhere() {
    let (one, two, three) = (owner(1, 1), owner(2, 1), owner(3, 1));
    let begun = assign(&Assignment::default(), std::slice::from_ref(&one));
    let moving = told(&begun, &[one.clone(), two.clone()]);
    assert_eq!(told(&moving, std::slice::from_ref(&one)), begun, "no epoch has changed");
    let other = told(&moving, &[one.clone(), three.clone()]);
    assert_eq!(other.moving().count(), 512);
    assert!(other.slots.iter().all(|slot| slot.moving_to.as_ref().is_none_or(|to| *to == three)));
    // Another life of it: the same slots, to that one.
    let again = told(&moving, &[one.clone(), owner(2, 2)]);
    assert!(again.moving().eq(moving.moving()));
    assert!(again.slots.iter().all(|slot| slot.moving_to.as_ref().is_none_or(|to| *to == owner(2, 2))));
    // A third one comes in the middle: it gets its part, and nothing that has not left yet goes two ways.
    let all = [one, two, three];
    let more = told(&moving, &all);
    let to = |id: &str| {
        more.slots.iter().filter(|s| s.moving_to.as_ref().is_some_and(|to| to.instance == id)).count()
    };
    assert_eq!((to("hub-1"), to("hub-2"), to("hub-3")), (0, 341, 341));
    let done = given_up(more, &all);
    assert!(done.slots.iter().all(|slot| slot.epoch <= 2));
    assert_eq!(told(&done, &all), done);
}

#[test]
fn who_drains_is_told_and_the_last_ones_go_on() {
    let (one, two) = (owner(1, 1), owner(2, 1));
    let both = vec![one.clone(), two.clone()];
    let begun = assign(&Assignment::default(), &both);
    let draining = Present { living: both.clone(), candidates: vec![two.clone()] };
    let moving = super::assign(&begun, &draining, |_, _| false);
    assert_eq!(moving.moving().count(), 512);
    assert!(moving.slots.iter().all(|slot| slot.epoch == 1));
    let done = given_up(moving.clone(), &both);
    assert_eq!(counts(&done), BTreeMap::from([("hub-2".to_owned(), 1024)]));
    // Now both drain: that of the first is not taken back, and nothing else moves.
    assert_eq!(told(&done, &both).moving().count(), 512);
    assert_eq!(
        super::assign(&done, &Present { living: vec![two.clone()], candidates: vec![two] }, |_, _| false),
        done
    );
}

/// Which of eight instances are alive, each with its incarnation.
fn alive() -> impl Strategy<Value = Vec<Owner>> {
    proptest::collection::vec(proptest::option::weighted(0.6, 1u64..4), 8).prop_map(|chosen| {
        let present = chosen.into_iter().enumerate();
        present.filter_map(|(id, incarnation)| Some(owner(id, incarnation?))).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn histories(steps in proptest::collection::vec(alive(), 1..8)) {
        let mut before = Assignment::default();
        for instances in steps {
            let next = assign(&before, &instances);
            prop_assert_eq!(next.slots.len(), SLOTS as usize);
            // Every slot has a living owner, or there is none.
            let owned = |owner: &Option<Owner>| owner.as_ref().map_or(instances.is_empty(), |o| instances.contains(o));
            prop_assert!(next.slots.iter().all(|slot| owned(&slot.owner) && slot.moving_to.is_none()));
            // Even to within one.
            let held = counts(&next);
            if !instances.is_empty() {
                prop_assert_eq!(held.len(), instances.len());
                let (most, least) = (held.values().max().unwrap(), held.values().min().unwrap());
                prop_assert!(most - least <= 1);
            }
            // Epochs grow exactly with changes.
            for (after, before) in next.slots.iter().zip(&before.slots) {
                prop_assert_eq!(after.epoch, before.epoch + u64::from(after.owner != before.owner));
            }
            // No slot of somebody who is still there and has not more than the larger share moves away; so what moves
            // is what the dead held, and what the others had too much.
            if !instances.is_empty() {
                let floor = SLOTS as usize / instances.len();
                let odd = SLOTS as usize % instances.len();
                let mut had: Vec<usize> = instances.iter().map(|i| {
                    before.slots.iter().filter(|s| s.owner.as_ref().is_some_and(|o| o.instance == i.instance)).count()
                }).collect();
                had.sort_unstable_by(|a, b| b.cmp(a));
                let least: usize = had.iter().enumerate()
                    .map(|(place, had)| had.saturating_sub(floor + usize::from(place < odd))).sum::<usize>()
                    + (SLOTS as usize - had.iter().sum::<usize>());
                let moved = next.slots.iter().zip(&before.slots)
                    .filter(|(a, b)| a.owner.as_ref().map(|o| &o.instance) != b.owner.as_ref().map(|o| &o.instance)).count();
                prop_assert_eq!(moved, least);
            }
            // Nothing more to do.
            prop_assert_eq!(&assign(&next, &instances), &next);
            before = next;
        }
    }

    /// Everyone is there, drains, gives up, is late: at any time.
    #[test]
    fn told_histories(steps in proptest::collection::vec((alive(), any::<u8>(), 0usize..4), 1..10)) {
        let mut before = Assignment::default();
        for (living, draining, then) in steps {
            let candidates: Vec<Owner> = living.iter().enumerate()
                .filter(|(place, _)| draining >> place & 1 == 0).map(|(_, owner)| owner.clone()).collect();
            let candidates = if candidates.is_empty() { living.clone() } else { candidates };
            let present = Present { living: living.clone(), candidates: candidates.clone() };
            let next = super::assign(&before, &present, |number, _| then == 3 && number % 3 == 0);
            prop_assert_eq!(&super::assign(&next, &present, |_, _| false), &next, "nothing more to do");
            for (number, (after, before)) in next.slots.iter().zip(&before.slots).enumerate() {
                prop_assert_eq!(after.epoch, before.epoch + u64::from(after.owner != before.owner));
                let lives = before.owner.as_ref().is_some_and(|owner| living.contains(owner));
                prop_assert!(
                    after.owner == before.owner || !lives || (then == 3 && number % 3 == 0),
                    "an owner that lives is told first"
                );
                if let Some(to) = &after.moving_to {
                    prop_assert!(candidates.contains(to) && Some(to) != after.owner.as_ref());
                }
            }
            // Given up all at once, it is as even as if nobody had been told, and nobody has got more than he should.
            let done = given_up(next.clone(), &living);
            prop_assert_eq!(done.moving().count(), 0);
            let held = counts(&done);
            if !candidates.is_empty() {
                prop_assert_eq!(held.len(), candidates.len());
                prop_assert!(held.values().max().unwrap() - held.values().min().unwrap() <= 1);
            }
            prop_assert_eq!(&super::assign(&done, &present, |_, _| false), &done);
            before = if then == 0 { next } else { done };
        }
    }
}
