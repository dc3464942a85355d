//! What came by on a filter while somebody was about to subscribe to it, or was away: each is due what came since, and
//! nothing from before.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Topics remembered of those that came by on a filter, over all spans.
const TOPICS_MAX: usize = 10_000;

/// The time since the oldest of those who wait began to, in spans: one begins when somebody does, if anything came by since
/// the one before.
#[derive(Debug, Default)]
pub struct Passed {
    spans: VecDeque<Span>,
    /// Topics in all spans.
    topics: usize,
    next: u64,
}

#[derive(Debug, Default)]
struct Span {
    number: u64,
    /// Those who began to wait at its beginning.
    waiting: u32,
    /// By topic: `prev` of the first message and seq of the last.
    topics: HashMap<Arc<str>, (u64, u64)>,
    /// There were more topics than can be remembered.
    is_lost: bool,
}

/// More topics came by than can be remembered.
#[derive(Debug, PartialEq, Eq)]
pub struct TooMany;

impl Passed {
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Somebody waits from now on. The answer says since when.
    pub fn begin(&mut self) -> u64 {
        match self.spans.back_mut() {
            Some(last) if last.topics.is_empty() && !last.is_lost => last.waiting += 1,
            _ => {
                self.spans.push_back(Span { number: self.next, waiting: 1, ..Span::default() });
                self.next += 1;
            }
        }
        self.next - 1
    }

    /// One that has waited since then does so no more.
    pub fn end(&mut self, since: u64) {
        let Ok(at) = self.spans.binary_search_by_key(&since, |span| span.number) else { return };
        self.spans[at].waiting -= 1;
        if self.spans[at].waiting > 0 {
            return;
        }
        let Some(span) = self.spans.remove(at) else { return };
        self.topics -= span.topics.len();
        // What is in it is due to those who have waited longer, if there are any.
        if at == 0 {
            return;
        }
        let longer = &mut self.spans[at - 1];
        longer.is_lost |= span.is_lost;
        for (topic, (prev, seq)) in span.topics {
            longer.topics.entry(topic).and_modify(|known| known.1 = seq).or_insert_with(|| {
                self.topics += 1;
                (prev, seq)
            });
        }
    }

    /// A stored message came by.
    pub fn note(&mut self, topic: &Arc<str>, prev: u64, seq: u64) {
        let Some(last) = self.spans.back_mut() else { return };
        if last.is_lost {
            return;
        }
        if let Some((_, known)) = last.topics.get_mut(topic) {
            *known = seq;
            return;
        }
        if self.topics >= TOPICS_MAX
            && let Some(oldest) = self.spans.iter_mut().find(|span| !span.topics.is_empty())
        {
            // Those who have waited longest go without.
            oldest.is_lost = true;
            self.topics -= std::mem::take(&mut oldest.topics).len();
        }
        if let Some(last) = self.spans.back_mut().filter(|last| !last.is_lost) {
            last.topics.insert(topic.clone(), (prev, seq));
            self.topics += 1;
        }
    }

    /// What came by since then: topic, `prev` of the first, seq of the last.
    pub fn since(&self, since: u64) -> Result<HashMap<Arc<str>, (u64, u64)>, TooMany> {
        let mut found: HashMap<Arc<str>, (u64, u64)> = HashMap::new();
        let begin = self.spans.partition_point(|span| span.number < since);
        for span in self.spans.range(begin..) {
            if span.is_lost {
                return Err(TooMany);
            }
            for (topic, &(prev, seq)) in &span.topics {
                found.entry(topic.clone()).and_modify(|known| known.1 = seq).or_insert((prev, seq));
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn since(passed: &Passed, since: u64) -> Vec<(String, u64, u64)> {
        let found = passed.since(since).unwrap();
        let mut found: Vec<_> =
            found.into_iter().map(|(topic, (prev, seq))| (topic.to_string(), prev, seq)).collect();
        found.sort();
        found
    }

    fn of(topic: &str, prev: u64, seq: u64) -> (String, u64, u64) {
        (topic.to_owned(), prev, seq)
    }

    #[test]
    fn each_is_due_what_came_since_it_began_to_wait() {
        let (mut passed, a, b): (_, Arc<str>, Arc<str>) = (Passed::default(), "a".into(), "b".into());
        passed.note(&a, 0, 1);
        let first = passed.begin();
        assert_eq!(passed.begin(), first, "nothing came by in between");
        passed.note(&a, 1, 2);
        passed.note(&b, 0, 1);
        let second = passed.begin();
        passed.note(&a, 2, 3);
        let third = passed.begin();
        passed.note(&a, 3, 4);
        let all = [of("a", 1, 4), of("b", 0, 1)];
        assert_eq!(since(&passed, first), all);
        assert_eq!(since(&passed, second), [of("a", 2, 4)]);
        assert_eq!(since(&passed, third), [of("a", 3, 4)]);
        // One in the middle goes: those before it and behind it are due the same as before.
        passed.end(second);
        assert_eq!(since(&passed, first), all);
        assert_eq!(since(&passed, third), [of("a", 3, 4)]);
        passed.end(first);
        assert_eq!(since(&passed, first), all, "the other that began then is still there");
        passed.end(first);
        assert_eq!((passed.topics, passed.spans.len()), (1, 1), "what nobody is due is forgotten");
        passed.end(third);
        assert!(passed.is_empty());
        assert_eq!(passed.topics, 0);
    }

    #[test]
    fn at_the_bound_those_who_have_waited_longest_go_without() {
        let mut passed = Passed::default();
        let first = passed.begin();
        let note = |passed: &mut Passed, from: usize, to: usize| {
            (from..to).for_each(|n| passed.note(&n.to_string().into(), 0, 1));
        };
        note(&mut passed, 0, 10);
        let second = passed.begin();
        note(&mut passed, 10, TOPICS_MAX);
        assert_eq!(passed.since(first).unwrap().len(), TOPICS_MAX);
        note(&mut passed, TOPICS_MAX, TOPICS_MAX + 1);
        assert_eq!(passed.since(first), Err(TooMany));
        assert_eq!(passed.since(second).unwrap().len(), TOPICS_MAX - 9);
        note(&mut passed, TOPICS_MAX + 1, TOPICS_MAX + 11);
        assert_eq!(passed.since(second), Err(TooMany));
        let third = passed.begin();
        note(&mut passed, 0, 1);
        assert_eq!(since(&passed, third), [of("0", 0, 1)], "who begins afterwards misses nothing");
        passed.end(second);
        assert_eq!(passed.since(first), Err(TooMany));
        passed.end(first);
        passed.end(third);
        assert_eq!((passed.topics, passed.is_empty()), (0, true));
    }
}
