//! Which keepers there are: from what is wanted and what the keeper says of its members to one next step. Pure; nothing is
//! remembered but how many places there are (the ConfigMap of peers), so that an operator killed anywhere goes on from what it
//! finds.
//!
//! Growing: one place more, once all that are there have their votes and have caught up; the keeper there asks by itself to be
//! taken in, and gets its vote by itself. Shrinking: the lead leaves the last place, its keeper is taken out, and only then does
//! the place go. One that has lost its volume is replaced by the keeper itself, at its address; who is at no place is taken out.

use carillon_agent::admin;

use super::names::Names;

/// Who has been heard this recently is alive; the keeper itself counts so, too.
const ALIVE_MS: u64 = 3_000;
/// Who lacks at most so many entries has caught up.
const LAG: u64 = 100;

/// One of the keeper's nodes, as its leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub node: String,
    pub address: String,
    /// Where its pod is, from 0; None: it is nobody's.
    pub place: Option<u32>,
    pub voter: bool,
    pub leads: bool,
    pub alive: bool,
    pub caught_up: bool,
}

/// What the keeper says, with places. None: nobody leads, so that what it says is not worth much.
pub fn members(names: &Names, said: &[admin::Member]) -> Option<Vec<Member>> {
    let leader = said.iter().find(|member| member.leads)?;
    let last = leader.matched_index;
    let of = |member: &admin::Member| Member {
        node: member.node.clone(),
        address: member.address.clone(),
        place: names.keeper_place(&member.address),
        voter: member.voter,
        leads: member.leads,
        alive: member.leads || member.heard_ms.is_some_and(|ago| ago < ALIVE_MS),
        caught_up: member.leads || (member.matched_index > 0 && member.matched_index + LAG >= last),
    };
    let mut members: Vec<Member> = said.iter().map(of).collect();
    members.sort_by(|one, other| (one.place, &one.node).cmp(&(other.place, &other.node)));
    Some(members)
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing: all is as it is wanted.
    Steady,
    /// Nothing yet.
    Wait(String),
    /// There are to be so many places.
    Places(u32),
    /// The lead goes to this node, because the one that has it is to go.
    HandOver { to: String, from: String },
    /// This node is no member any more.
    TakeOut { node: String, address: String },
}

/// `wanted`: how many there are to be in the end; `places`: at present.
pub fn next(wanted: u32, places: u32, members: Option<&[Member]>) -> Step {
    let Some(members) = members else {
        return Step::Wait("the keeper does not answer, or nobody leads it".to_owned());
    };
    let at = |place: u32| members.iter().find(|member| member.place == Some(place));
    // Who is to go: those at no place, then the last place.
    let homeless = members.iter().find(|member| member.place.is_none_or(|place| place >= places));
    let last = (places > wanted).then(|| at(places - 1)).flatten();
    if let Some(going) = homeless.or(last) {
        if !going.leads {
            return Step::TakeOut { node: going.node.clone(), address: going.address.clone() };
        }
        let stays = |member: &&Member| member.place.is_some_and(|place| place < places.min(wanted));
        let heir = members.iter().filter(stays).find(|m| m.voter && m.alive && m.caught_up);
        return match heir {
            Some(heir) => Step::HandOver { to: heir.node.clone(), from: going.node.clone() },
            None => Step::Wait(format!(
                "keeper {} leads and is to go: no other that stays has a vote, is alive and has caught up",
                going.address
            )),
        };
    }
    if places > wanted {
        return Step::Places(places - 1);
    }
    for place in 0..places {
        let missing = match at(place) {
            None => "is not taken in yet",
            Some(member) if !member.alive => "does not answer its leader",
            Some(member) if !member.voter => "has no vote yet",
            Some(member) if !member.caught_up => "has not caught up yet",
            Some(_) => continue,
        };
        return Step::Wait(format!("the keeper at place {place} {missing}"));
    }
    if places < wanted { Step::Places(places + 1) } else { Step::Steady }
}

/// Whom the lead goes to before all are restarted one after the other, from the last place to the first: the one whose turn is
/// last, so that the lead moves as seldom as it can. None: it has it, or cannot.
pub fn heir_for_update(members: &[Member]) -> Option<&Member> {
    let first = members.iter().find(|member| member.place == Some(0))?;
    (!first.leads && first.voter && first.alive && first.caught_up).then_some(first)
}

#[cfg(test)]
mod tests;
