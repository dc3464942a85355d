//! Steps by table; and whole changes, with a keeper that is played, an operator that is killed anywhere, and nodes that die.

use super::*;

fn member(place: u32) -> Member {
    Member {
        node: format!("{place:016x}"),
        address: format!("k{place}"),
        place: Some(place),
        voter: true,
        leads: place == 0,
        alive: true,
        caught_up: true,
    }
}

fn members(count: u32) -> Vec<Member> {
    (0..count).map(member).collect()
}

fn waits(step: &Step) -> &str {
    match step {
        Step::Wait(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_next_comes_when_the_last_one_votes() {
    let mut three = members(3);
    assert_eq!(next(3, 3, Some(&three)), Step::Steady);
    assert_eq!(next(5, 3, Some(&three)), Step::Places(4));
    assert_eq!(waits(&next(5, 4, Some(&three))), "the keeper at place 3 is not taken in yet");
    three.push(Member { voter: false, caught_up: false, ..member(3) });
    assert_eq!(waits(&next(5, 4, Some(&three))), "the keeper at place 3 has no vote yet");
    three[3].voter = true;
    assert_eq!(waits(&next(5, 4, Some(&three))), "the keeper at place 3 has not caught up yet");
    three[3].caught_up = true;
    assert_eq!(next(5, 4, Some(&three)), Step::Places(5));
    three[1].alive = false;
    assert_eq!(waits(&next(5, 4, Some(&three))), "the keeper at place 1 does not answer its leader");
    assert_eq!(waits(&next(5, 3, None)), "the keeper does not answer, or nobody leads it");
}

#[test]
fn the_last_goes_after_it_has_given_the_lead_and_its_vote_up() {
    let mut five = members(5);
    (five[0].leads, five[4].leads) = (false, true);
    five[0].caught_up = false;
    let (to, from) = (five[1].node.clone(), five[4].node.clone());
    assert_eq!(next(3, 5, Some(&five)), Step::HandOver { to, from });
    (five[1].leads, five[4].leads) = (true, false);
    let (node, address) = (five[4].node.clone(), five[4].address.clone());
    assert_eq!(next(3, 5, Some(&five)), Step::TakeOut { node, address });
    five.pop();
    assert_eq!(
        next(3, 5, Some(&five)),
        Step::Places(4),
        "the place goes when its keeper is no member any more"
    );
    // The lead does not go to one that is to go as well.
    let mut four = members(4);
    (four[0].leads, four[3].leads) = (false, true);
    for place in [0, 1] {
        four[place].alive = false;
    }
    four[2].voter = false;
    assert!(waits(&next(3, 4, Some(&four))).contains("k3 leads and is to go"));
}

#[test]
fn who_is_at_no_place_is_taken_out_first() {
    let mut some = members(3);
    some.push(Member { place: None, node: "f".to_owned(), address: "elsewhere".to_owned(), ..member(9) });
    let out = Step::TakeOut { node: "f".to_owned(), address: "elsewhere".to_owned() };
    for wanted in [1, 3, 5] {
        assert_eq!(next(wanted, 3, Some(&some)), out);
    }
    some[3].place = Some(3);
    assert_eq!(next(3, 3, Some(&some)), out, "beyond the places that there are");
}

#[test]
fn the_lead_waits_where_the_restart_comes_last() {
    let mut three = members(3);
    assert_eq!(heir_for_update(&three), None, "it has it");
    (three[0].leads, three[2].leads) = (false, true);
    assert_eq!(heir_for_update(&three).map(|heir| heir.place), Some(Some(0)));
    three[0].alive = false;
    assert_eq!(heir_for_update(&three), None);
    assert_eq!(heir_for_update(&[]), None);
}

#[test]
fn what_the_keeper_says_is_put_in_place() {
    let names = Names::new("push", "chat");
    let said = |node: &str, address: String, leads| admin::Member {
        node: node.to_owned(),
        address,
        leads,
        voter: true,
        matched_index: if leads { 1_000 } else { 899 },
        heard_ms: leads.then_some(0).or(Some(2_999)),
        round_trip_us: None,
    };
    let said = vec![
        said("b", names.keeper_address(1), true),
        said("c", "elsewhere:7400".to_owned(), false),
        said("a", names.keeper_address(0), false),
    ];
    let found = super::members(&names, &said).unwrap();
    let places: Vec<_> = found.iter().map(|m| (m.node.as_str(), m.place, m.alive, m.caught_up)).collect();
    assert_eq!(places, [("c", None, true, false), ("a", Some(0), true, false), ("b", Some(1), true, true)]);
    assert_eq!(super::members(&names, &said[1..]), None, "nobody leads");
}

/// A keeper that is played: it does what it is told, refuses what would leave too few, and its nodes die and come back.
struct Played {
    members: Vec<Member>,
    /// Places whose pods run.
    pods: u32,
    /// Places that keepers are told of when they start.
    peers: u32,
    /// Places whose keepers were taken out and run on.
    out: Vec<u32>,
    fresh: u32,
    random: u64,
}

impl Played {
    fn chance(&mut self, one_in: u64) -> bool {
        // xorshift: the same seeds give the same changes.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.is_multiple_of(one_in)
    }

    fn voters(&self) -> usize {
        self.members.iter().filter(|m| m.voter).count()
    }

    fn alive(&self) -> usize {
        self.members.iter().filter(|m| m.voter && m.alive).count()
    }

    fn has_quorum(&self) -> bool {
        self.alive() > self.voters() / 2
    }

    /// What happens by itself.
    fn tick(&mut self) {
        for place in 0..self.pods {
            if self.members.iter().any(|m| m.place == Some(place)) || !self.has_quorum() {
                continue;
            }
            // Such a one does not join again before its pod is restarted, nor when it is not among the peers.
            if place >= self.peers || (self.out.contains(&place) && !self.chance(8)) {
                continue;
            }
            self.out.retain(|out| *out != place);
            self.fresh += 1;
            let node = format!("{:016x}", 1000 + self.fresh);
            self.members.push(Member { node, voter: false, leads: false, caught_up: false, ..member(place) });
        }
        if let Some(learner) = self.members.iter_mut().find(|m| !m.voter && m.alive) {
            (learner.caught_up, learner.voter) = (true, true);
        }
        let (pods, some) = (self.pods, self.chance(3));
        for member in &mut self.members {
            let runs = member.place.is_some_and(|place| place < pods);
            member.alive = runs && (member.alive || some);
            member.leads &= member.alive;
        }
        if self.has_quorum()
            && !self.members.iter().any(|m| m.leads)
            && let Some(heir) = self.members.iter_mut().rfind(|m| m.voter && m.alive)
        {
            heir.leads = true;
        }
    }

    fn harm(&mut self) {
        if self.alive() < self.members.len() || !self.chance(6) {
            return;
        }
        let victim = usize::try_from(self.random % self.members.len() as u64).unwrap();
        if self.members.len() > 2 {
            (self.members[victim].alive, self.members[victim].leads) = (false, false);
        }
    }

    fn take_out(&mut self, node: &str) {
        let left = self.members.iter().filter(|m| m.voter && m.node != node);
        let alive = left.clone().filter(|m| m.alive).count();
        if alive > left.count() / 2 {
            self.out.extend(self.members.iter().filter(|m| m.node == node).filter_map(|m| m.place));
            self.members.retain(|m| m.node != node);
        }
    }
}

#[test]
fn every_change_ends_whatever_dies_and_whenever_the_operator_is_killed() {
    for seed in 1..=200_u64 {
        let mut keeper = Played {
            members: members(3),
            pods: 3,
            peers: 3,
            out: Vec::new(),
            fresh: 0,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        };
        let mut places = 3;
        for wanted in [5, 3, 1, 3, 5, 1] {
            let mut steps = 0;
            loop {
                steps += 1;
                assert!(steps < 2_000, "seed {seed}: not at {wanted}: {:?}", keeper.members);
                keeper.tick();
                if keeper.has_quorum() && keeper.members.len() > 1 && steps < 200 {
                    keeper.harm();
                }
                // Killed: what it would have done is done by the next one, from what that one finds.
                if keeper.chance(4) {
                    continue;
                }
                let leads = keeper.members.iter().any(|m| m.leads);
                let seen = leads.then(|| keeper.members.clone());
                match next(wanted, places, seen.as_deref()) {
                    Step::Steady => break,
                    Step::Wait(_) => {}
                    Step::Places(to) => {
                        assert_eq!(to.abs_diff(places), 1, "one by one");
                        (places, keeper.peers) = (to, to);
                    }
                    Step::HandOver { to, .. } => {
                        for member in &mut keeper.members {
                            member.leads = member.node == to;
                        }
                    }
                    Step::TakeOut { node, .. } => {
                        let going = keeper.members.iter().find(|m| m.node == node).unwrap();
                        assert!(!going.leads, "seed {seed}: a leader is taken out");
                        keeper.take_out(&node);
                    }
                }
                if !keeper.chance(4) {
                    // The pods follow; those of members never go.
                    let falls =
                        keeper.members.iter().filter_map(|m| m.place).filter(|&place| place >= places);
                    assert_eq!(falls.count(), 0, "seed {seed}: a member's pod goes");
                    keeper.pods = places;
                    keeper.out.retain(|place| *place < places);
                }
            }
            assert_eq!((places, keeper.voters()), (wanted, wanted as usize), "seed {seed}");
        }
    }
}
