//! A budget that no single caller can spend: so much for all, and so much of it for each.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

#[derive(Default)]
struct Taken {
    all: usize,
    /// Only of those who have something.
    by: HashMap<Arc<str>, usize>,
}

/// So many parts of something that can be given back.
pub(crate) struct Budget {
    most: usize,
    each: usize,
    taken: Arc<Mutex<Taken>>,
}

/// Nothing is left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Spent {
    /// For nobody: so many are taken.
    All(usize),
    /// For this caller, who has so many.
    Own(usize),
}

impl Budget {
    pub(crate) fn new(most: usize, each: usize) -> Self {
        Budget { most, each, taken: Arc::default() }
    }

    /// One part for a caller; dropping it gives it back.
    pub(crate) fn take(&self, who: &str) -> Result<Part, Spent> {
        let mut taken = self.taken.lock();
        let own = taken.by.get(who).copied().unwrap_or(0);
        // Its own bound first: that is the one it can do something about.
        if own >= self.each {
            return Err(Spent::Own(own));
        }
        if taken.all >= self.most {
            return Err(Spent::All(taken.all));
        }
        let who: Arc<str> = who.into();
        taken.all += 1;
        taken.by.insert(who.clone(), own + 1);
        Ok(Part { who, taken: self.taken.clone() })
    }
}

/// What a caller holds of a [`Budget`].
pub(crate) struct Part {
    who: Arc<str>,
    taken: Arc<Mutex<Taken>>,
}

impl Drop for Part {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
        taken.all -= 1;
        match taken.by.get_mut(&self.who) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(taken.by.remove(&self.who)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_what_is_for_others() {
        let budget = Budget::new(3, 2);
        let mut held = vec![budget.take("a").ok().unwrap(), budget.take("a").ok().unwrap()];
        assert_eq!(budget.take("a").err(), Some(Spent::Own(2)));
        held.push(budget.take("b").ok().unwrap());
        assert_eq!(budget.take("b").err(), Some(Spent::All(3)));
        assert_eq!(budget.take("a").err(), Some(Spent::Own(2)), "told of its own bound");
        held.remove(0);
        held.push(budget.take("b").ok().unwrap());
        assert_eq!(budget.take("b").err(), Some(Spent::Own(2)));
        held.clear();
        let taken = budget.taken.lock();
        assert_eq!((taken.all, taken.by.len()), (0, 0), "nothing is kept of who has nothing");
    }
}
