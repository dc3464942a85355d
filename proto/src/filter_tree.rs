//! Many topic filters, asked which of them match a topic: a tree by level, with `+` and `#` as children of their own.

use std::collections::HashMap;

/// Values kept by topic filter. A filter holds at most one value.
#[derive(Debug, Clone)]
pub struct FilterTree<T> {
    root: Node<T>,
    len: usize,
}

#[derive(Debug, Clone)]
struct Node<T> {
    children: HashMap<Box<str>, Node<T>>,
    plus: Option<Box<Node<T>>>,
    // The value of the filter that ends in `#` here.
    hash: Option<T>,
    // The value of the filter that ends here.
    here: Option<T>,
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Node { children: HashMap::new(), plus: None, hash: None, here: None }
    }
}

impl<T> Node<T> {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.plus.is_none() && self.hash.is_none() && self.here.is_none()
    }
}

impl<T> Default for FilterTree<T> {
    fn default() -> Self {
        FilterTree { root: Node::default(), len: 0 }
    }
}

impl<T> FilterTree<T> {
    /// How many filters there are.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The value of exactly this filter, made if there was none.
    pub fn entry(&mut self, filter: &str) -> &mut T
    where
        T: Default,
    {
        let mut node = &mut self.root;
        for level in filter.split('/') {
            match level {
                "#" => {
                    if node.hash.is_none() {
                        self.len += 1;
                    }
                    return node.hash.get_or_insert_with(T::default);
                }
                "+" => node = node.plus.get_or_insert_with(Box::default),
                name => {
                    // Two look-ups for a new level, none allocated for one that is there.
                    if !node.children.contains_key(name) {
                        node.children.insert(name.into(), Node::default());
                    }
                    node = node.children.get_mut(name).expect("inserted above");
                }
            }
        }
        if node.here.is_none() {
            self.len += 1;
        }
        node.here.get_or_insert_with(T::default)
    }

    /// Sets the value of exactly this filter and returns the one before.
    pub fn insert(&mut self, filter: &str, value: T) -> Option<T>
    where
        T: Default,
    {
        let before = self.len;
        let slot = self.entry(filter);
        let old = std::mem::replace(slot, value);
        (self.len == before).then_some(old)
    }

    /// The value of exactly this filter.
    pub fn get(&self, filter: &str) -> Option<&T> {
        let mut node = &self.root;
        for level in filter.split('/') {
            match level {
                "#" => return node.hash.as_ref(),
                "+" => node = node.plus.as_deref()?,
                name => node = node.children.get(name)?,
            }
        }
        node.here.as_ref()
    }

    /// As [`get`](Self::get).
    pub fn get_mut(&mut self, filter: &str) -> Option<&mut T> {
        let mut node = &mut self.root;
        for level in filter.split('/') {
            match level {
                "#" => return node.hash.as_mut(),
                "+" => node = node.plus.as_deref_mut()?,
                name => node = node.children.get_mut(name)?,
            }
        }
        node.here.as_mut()
    }

    /// Removes exactly this filter, and the levels that held nothing else.
    pub fn remove(&mut self, filter: &str) -> Option<T> {
        let removed = remove(&mut self.root, filter.split('/'));
        self.len -= usize::from(removed.is_some());
        removed
    }

    /// Calls `found` with the value of each filter that matches this topic name (MQTT 5.0 §4.7).
    pub fn matching<'a>(&'a self, topic: &str, mut found: impl FnMut(&'a T)) {
        visit(&self.root, Some(topic), 0, &mut found);
    }
}

fn visit<'a, T>(node: &'a Node<T>, rest: Option<&str>, depth: u32, found: &mut impl FnMut(&'a T)) {
    // As in `topic::matches`: on the first two levels wildcards do not match names that begin with `$`.
    let wildcards = depth >= 2 || !rest.is_some_and(|rest| rest.starts_with('$'));
    if wildcards && let Some(value) = &node.hash {
        found(value);
    }
    let Some(rest) = rest else {
        if let Some(value) = &node.here {
            found(value);
        }
        return;
    };
    let (level, rest) = match rest.split_once('/') {
        Some((level, rest)) => (level, Some(rest)),
        None => (rest, None),
    };
    if let Some(child) = node.children.get(level) {
        visit(child, rest, depth + 1, found);
    }
    if wildcards && let Some(child) = &node.plus {
        visit(child, rest, depth + 1, found);
    }
}

fn remove<'a, T>(node: &mut Node<T>, mut levels: impl Iterator<Item = &'a str>) -> Option<T> {
    let Some(level) = levels.next() else { return node.here.take() };
    match level {
        "#" => node.hash.take(),
        "+" => {
            let child = node.plus.as_deref_mut()?;
            let removed = remove(child, levels);
            if child.is_empty() {
                node.plus = None;
            }
            removed
        }
        name => {
            let child = node.children.get_mut(name)?;
            let removed = remove(child, levels);
            if child.is_empty() {
                node.children.remove(name);
            }
            removed
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn removing_leaves_nothing_behind() {
        let mut tree = FilterTree::default();
        for filter in ["a/+/c", "a/#", "a", "+/b", "#"] {
            assert_eq!(tree.insert(filter, filter.to_owned()), None);
        }
        assert_eq!(tree.len(), 5);
        assert_eq!(tree.insert("a", "again".to_owned()), Some("a".to_owned()));
        assert_eq!(tree.len(), 5);
        for filter in ["a/+/c", "a/#", "a", "+/b", "#"] {
            assert!(tree.remove(filter).is_some());
            assert!(tree.remove(filter).is_none());
        }
        assert!(tree.is_empty() && tree.root.is_empty());
    }

    fn level() -> impl Strategy<Value = String> {
        prop_oneof![Just("a"), Just("b"), Just(""), Just("$x")].prop_map(str::to_owned)
    }

    prop_compose! {
        fn filter()(levels in prop::collection::vec(prop_oneof![level(), Just("+".to_owned())], 1..4), hash in any::<bool>()) -> String {
            let mut filter = levels.join("/");
            if hash { filter.push_str("/#"); }
            filter
        }
    }

    proptest! {
        #[test]
        fn agrees_with_matching_one_by_one(
            filters in prop::collection::btree_set(filter(), 0..20),
            topic in prop::collection::vec(level(), 1..5).prop_map(|levels| levels.join("/")),
        ) {
            let mut tree = FilterTree::default();
            for filter in &filters { tree.insert(filter, filter.clone()); }
            let mut found = BTreeSet::new();
            tree.matching(&topic, |filter| { found.insert(filter.clone()); });
            let expected: BTreeSet<_> = filters.into_iter().filter(|f| crate::topic::matches(f, &topic)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
