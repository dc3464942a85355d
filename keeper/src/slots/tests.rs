//! Balance, least movement, and epochs that only grow, over arbitrary histories.

use proptest::prelude::*;

use super::*;

fn owner(id: usize, incarnation: u64) -> Owner {
    Owner { instance: format!("hub-{id}"), incarnation }
}

fn counts(assignment: &Assignment) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (owner, _) in &assignment.slots {
        if let Some(owner) = owner {
            *counts.entry(owner.instance.clone()).or_default() += 1;
        }
    }
    counts
}

#[test]
fn the_first_instance_gets_all_slots_with_epoch_one() {
    let next = assign(&Assignment::default(), &[owner(1, 7)]);
    assert!(next.slots.iter().all(|slot| *slot == (Some(owner(1, 7)), 1)));
}

#[test]
fn a_new_incarnation_keeps_its_slots_with_new_epochs() {
    let before = assign(&Assignment::default(), &[owner(1, 1), owner(2, 1)]);
    let after = assign(&before, &[owner(1, 2), owner(2, 1)]);
    for ((before, epoch), (after, next)) in before.slots.iter().zip(&after.slots) {
        assert_eq!(before.as_ref().map(|o| &o.instance), after.as_ref().map(|o| &o.instance));
        let restarted = before.as_ref().is_some_and(|o| o.instance == "hub-1");
        assert_eq!(*next, epoch + u64::from(restarted));
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
    assert!(nobody.slots.iter().zip(&back.slots).all(|(n, b)| n.0.is_none() && n.1 == b.1 + 1));
}

#[test]
fn an_assignment_survives_being_written() {
    let assignment = assign(&Assignment::default(), &[owner(1, 3), owner(2, 4), owner(3, 5)]);
    assert_eq!(Assignment::from_record(&assignment.to_record()), assignment);
    let nobody = assign(&assignment, &[]);
    assert_eq!(Assignment::from_record(&nobody.to_record()), nobody);
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
            prop_assert!(next.slots.iter().all(|(owner, _)| owned(owner)));
            // Even to within one.
            let held = counts(&next);
            if !instances.is_empty() {
                prop_assert_eq!(held.len(), instances.len());
                let (most, least) = (held.values().max().unwrap(), held.values().min().unwrap());
                prop_assert!(most - least <= 1);
            }
            // Epochs grow exactly with changes.
            for ((after, next_epoch), (owner, epoch)) in next.slots.iter().zip(&before.slots) {
                prop_assert_eq!(*next_epoch, epoch + u64::from(after != owner));
            }
            // No slot of somebody who is still there and has not more than the larger share moves away; so what moves
            // is what the dead held, and what the others had too much.
            if !instances.is_empty() {
                let floor = SLOTS as usize / instances.len();
                let odd = SLOTS as usize % instances.len();
                let mut had: Vec<usize> = instances.iter().map(|i| {
                    before.slots.iter().filter(|(o, _)| o.as_ref().is_some_and(|o| o.instance == i.instance)).count()
                }).collect();
                had.sort_unstable_by(|a, b| b.cmp(a));
                let least: usize = had.iter().enumerate()
                    .map(|(place, had)| had.saturating_sub(floor + usize::from(place < odd))).sum::<usize>()
                    + (SLOTS as usize - had.iter().sum::<usize>());
                let moved = next.slots.iter().zip(&before.slots)
                    .filter(|((a, _), (b, _))| a.as_ref().map(|o| &o.instance) != b.as_ref().map(|o| &o.instance)).count();
                prop_assert_eq!(moved, least);
            }
            // Nothing more to do.
            prop_assert_eq!(&assign(&next, &instances), &next);
            before = next;
        }
    }
}
