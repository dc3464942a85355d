//! How far a device has received messages of QoS 2, for the end of its connection: the acknowledgements that the saver is
//! sent meanwhile are not waited for, and with one that is lost the message would come again as a new one. No I/O.

use std::sync::Arc;

use carillon_proto::v1;

/// Topics remembered, the ones with the newest messages: an acknowledgement is lost within seconds, or it is not.
const REACHED_MAX: usize = 64;

/// By topic, the newest last: up to here everything was sent, and is finished or in flight.
#[derive(Default)]
pub struct Reached(Vec<(Arc<str>, u64)>);

impl Reached {
    pub fn note(&mut self, topic: &Arc<str>, seq: u64) {
        let known = self.0.iter().position(|(name, _)| name == topic);
        let seq = known.map_or(seq, |at| seq.max(self.0.remove(at).1));
        if self.0.len() == REACHED_MAX {
            self.0.remove(0);
        }
        self.0.push((topic.clone(), seq));
    }

    /// Adds it to what is in flight.
    pub fn add_to(&self, sent: &mut Vec<v1::AckPosition>) {
        for (topic, seq) in &self.0 {
            match sent.iter_mut().find(|position| *position.topic == **topic) {
                Some(position) => position.seq = position.seq.max(*seq),
                None => sent.push(v1::AckPosition { topic: topic.to_string(), seq: *seq }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(reached: &Reached, sent: &[(&str, u64)]) -> Vec<(String, u64)> {
        let position = |&(topic, seq): &(&str, u64)| v1::AckPosition { topic: topic.to_owned(), seq };
        let mut sent = sent.iter().map(position).collect();
        reached.add_to(&mut sent);
        sent.into_iter().map(|position| (position.topic, position.seq)).collect()
    }

    #[test]
    fn the_farthest_is_told_of_each_topic() {
        let mut reached = Reached::default();
        for (topic, seq) in [("a", 3), ("b", 5), ("a", 2)] {
            reached.note(&topic.into(), seq);
        }
        let expected = [("b".to_owned(), 7), ("a".to_owned(), 3)];
        assert_eq!(told(&reached, &[("b", 7), ("a", 1)]), expected);
        assert_eq!(told(&reached, &[]), [("b".to_owned(), 5), ("a".to_owned(), 3)]);
    }

    #[test]
    fn the_topics_that_were_longest_silent_are_forgotten() {
        let mut reached = Reached::default();
        for seq in 1..=REACHED_MAX as u64 {
            reached.note(&seq.to_string().into(), seq);
        }
        reached.note(&"1".into(), 1000);
        reached.note(&"new".into(), 1);
        let told = told(&reached, &[]);
        assert_eq!(told.len(), REACHED_MAX);
        assert!(told.contains(&("1".to_owned(), 1000)) && !told.iter().any(|(topic, _)| topic == "2"));
    }
}
