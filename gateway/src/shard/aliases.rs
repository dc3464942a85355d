//! Topic aliases of one connection, both ways (MQTT 5.0 §3.3.2.3.4). No I/O.

use std::sync::Arc;

/// Exists only once an alias is used.
#[derive(Default)]
pub struct Aliases {
    /// By alias: what the device has set it to.
    theirs: Vec<Option<Box<str>>>,
    /// In the order of their aliases, from 1: topics that the device was told, and whether without their app's level.
    ours: Vec<(Arc<str>, bool)>,
}

impl Aliases {
    /// Sets what the device's alias stands for from now on. It is above 0, and no larger than what the device may use.
    pub fn set(&mut self, alias: u16, topic: &str) {
        let at = usize::from(alias) - 1;
        if self.theirs.len() <= at {
            self.theirs.resize(at + 1, None);
        }
        self.theirs[at] = Some(topic.into());
    }

    /// What the device's alias stands for.
    pub fn get(&self, alias: u16) -> Option<&str> {
        self.theirs.get(usize::from(alias).checked_sub(1)?)?.as_deref()
    }

    /// The alias to send a topic with, if there is or may be one, and whether the device has yet to be told what it
    /// stands for. The first topics that come by get what aliases there are, and keep them.
    pub fn alias(&self, topic: &str, is_relative: bool, maximum: u16) -> Option<(u16, bool)> {
        let known =
            self.ours.iter().position(|(name, relative)| **name == *topic && *relative == is_relative);
        if let Some(at) = known {
            return Some((at as u16 + 1, false));
        }
        (self.ours.len() < usize::from(maximum)).then(|| (self.ours.len() as u16 + 1, true))
    }

    /// The device has been told of a new alias.
    pub fn told(&mut self, topic: &Arc<str>, is_relative: bool) {
        self.ours.push((topic.clone(), is_relative));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_sets_and_changes_its_aliases() {
        let mut aliases = Aliases::default();
        assert_eq!((aliases.get(0), aliases.get(1)), (None, None));
        aliases.set(3, "demo/three");
        assert_eq!((aliases.get(1), aliases.get(3), aliases.get(4)), (None, Some("demo/three"), None));
        aliases.set(3, "demo/other");
        aliases.set(1, "demo/one");
        assert_eq!((aliases.get(1), aliases.get(3)), (Some("demo/one"), Some("demo/other")));
    }

    #[test]
    fn the_first_topics_get_the_aliases_there_are() {
        let mut aliases = Aliases::default();
        let topics: [Arc<str>; 3] = ["demo/a".into(), "demo/b".into(), "demo/c".into()];
        assert_eq!(aliases.alias(&topics[0], false, 0), None);
        assert_eq!(aliases.alias(&topics[0], false, 2), Some((1, true)));
        assert_eq!(aliases.alias(&topics[0], false, 2), Some((1, true)), "it was not sent");
        aliases.told(&topics[0], false);
        assert_eq!(aliases.alias(&topics[0], false, 2), Some((1, false)));
        // The same topic by its shorter name is another name.
        assert_eq!(aliases.alias(&topics[0], true, 2), Some((2, true)));
        aliases.told(&topics[1], false);
        assert_eq!(aliases.alias(&topics[2], false, 2), None);
        assert_eq!(aliases.alias(&topics[1], false, 2), Some((2, false)));
    }
}
