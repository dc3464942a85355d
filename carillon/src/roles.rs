//! The roles and what each needs of the others: one table, from which readiness is judged.

use std::collections::BTreeSet;

use carillon_agent::{Agent, Role};

/// What a role needs to be of use.
pub struct Needs {
    pub role: Role,
    /// Roles of which an instance must be alive somewhere.
    pub roles: &'static [Role],
    /// Every slot must have an owner.
    pub slots: bool,
}

/// By role, in the order of [`Role::ALL`]. Everyone needs the keeper besides.
pub static NEEDS: [Needs; 6] = [
    Needs { role: Role::Gateway, roles: &[Role::Registry, Role::Saver], slots: true },
    Needs { role: Role::Registry, roles: &[Role::Saver], slots: true },
    Needs { role: Role::Center, roles: &[Role::Registry, Role::Saver], slots: true },
    Needs { role: Role::Saver, roles: &[], slots: false },
    Needs { role: Role::Coordinator, roles: &[Role::Registry, Role::Saver], slots: true },
    // It can say that there is no gateway.
    Needs { role: Role::Dispatcher, roles: &[], slots: false },
];

/// Why these roles cannot do their work at present, as sentences for people; empty when they can.
pub fn unmet(roles: &[Role], agent: &Agent) -> Vec<String> {
    let mut reasons = Vec::new();
    // One that goes away is no reason: the last known stays in force, and this process serves by it.
    if !agent.is_ready() {
        reasons.push("no keeper has answered yet, and nothing is known from a former start".to_owned());
    }
    let needs: Vec<&Needs> = NEEDS.iter().filter(|needs| roles.contains(&needs.role)).collect();
    let needed: BTreeSet<Role> = needs.iter().flat_map(|needs| needs.roles.iter().copied()).collect();
    for role in needed {
        if agent.instances(role).borrow().is_empty() {
            reasons.push(format!("no {role} is alive"));
        }
    }
    if needs.iter().any(|needs| needs.slots) {
        let slots = agent.slots().borrow().clone();
        let orphans = slots.slots.iter().filter(|slot| slot.instance.is_empty()).count();
        if slots.slots.is_empty() {
            reasons.push("the slots are not assigned yet".to_owned());
        } else if orphans > 0 {
            reasons.push(format!("{orphans} slots have no owner"));
        }
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_role_once_and_in_order() {
        assert_eq!(NEEDS.each_ref().map(|needs| needs.role), Role::ALL);
    }

    #[test]
    fn no_role_waits_for_itself() {
        fn reaches(from: Role, to: Role) -> bool {
            let needs = NEEDS.iter().find(|needs| needs.role == from).unwrap();
            needs.roles.iter().any(|&next| next == to || reaches(next, to))
        }
        for role in Role::ALL {
            assert!(!reaches(role, role), "{role}");
        }
    }
}
