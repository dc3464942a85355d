//! Appending to logs, fencing, and the trimming of logs.

use carillon_proto::{topic, v1};
use prost::Message as _;

use super::disk::{self, DiskError};
use super::index::TopicId;
use super::plan::{DELETE_MESSAGES, IdEntry, Planner};
use crate::saver::store::{MAX_ID_BYTES, MAX_MESSAGE_BYTES, StoreError, StoreResult};

/// How far a log may go beyond a limit before it is trimmed back to it, so that not every append deletes: a sixteenth;
/// nothing for small ones.
fn slack(limit: u64, exact_below: u64) -> u64 {
    if limit < exact_below { 0 } else { limit / 16 }
}

fn invalid(text: String) -> StoreError {
    StoreError::Invalid(text)
}

impl Planner<'_> {
    pub fn fence(&mut self, slot: u32, epoch: u64) -> StoreResult<()> {
        if self.check_epoch(slot, epoch)? < epoch {
            self.index.epochs[slot as usize] = epoch;
            self.pending.epochs.insert(slot);
        }
        Ok(())
    }

    /// The slot's epoch, if this one is not older.
    fn check_epoch(&self, slot: u32, epoch: u64) -> StoreResult<u64> {
        match self.index.epochs.get(slot as usize) {
            None => Err(invalid(format!("slot {slot} does not exist: there are {}", topic::SLOTS))),
            Some(&current) if epoch < current => Err(StoreError::Fenced { slot, epoch, current }),
            Some(&current) => Ok(current),
        }
    }

    pub fn append(&mut self, append: v1::Append) -> StoreResult<v1::Appended> {
        let v1::Append { slot, message, log, retain, idempotent, retention } = append;
        let message = message.ok_or_else(|| invalid("an append has no message".to_owned()))?;
        check(slot, &message, log, retain)?;
        self.check_epoch(slot, message.epoch)?;
        let known = self.index.topic(&message.topic);
        if idempotent
            && !message.id.is_empty()
            && let Some(id) = known
            && let Some(earlier) = self.find_id(id, &message.id)?
        {
            return Ok(v1::Appended { duplicate: true, epoch: earlier.epoch, seq: earlier.seq, prev: 0 });
        }
        if !log {
            self.fence(slot, message.epoch)?;
            let prev = known.map_or(0, |id| self.index.at(id).seq);
            let appended = v1::Appended { duplicate: false, epoch: message.epoch, seq: message.seq, prev };
            self.retain(v1::Message { prev, ..message });
            return Ok(appended);
        }
        if let Some(id) = known
            && message.seq <= self.index.at(id).seq
        {
            return self.repeated(id, &message);
        }
        // Whoever appends under a newer epoch fences the older off.
        self.fence(slot, message.epoch)?;
        let id = self.index.intern(&message.topic);
        let appended = self.add(id, message, retain, idempotent, retention);
        if let Err(error) = self.enforce_limits(id) {
            tracing::warn!(topic = %self.index.at(id).name, %error, "cannot trim a log to its limits");
        }
        Ok(appended)
    }

    /// An append whose seq is not new: the same one again, its answer having been lost, or a mistake.
    fn repeated(&mut self, id: TopicId, message: &v1::Message) -> StoreResult<v1::Appended> {
        let topic = self.index.at(id);
        let name = topic.name.clone();
        let stored = match self.pending.log.get(&(id, message.seq)) {
            Some((_, value)) => Some(disk::decode_log(value.clone().into(), &name)?),
            None => match self.disk.records(id, message.seq - 1, message.seq).next() {
                Some(record) => Some(disk::decode_log(record?.value, &name)?),
                None => None,
            },
        };
        match stored {
            Some(stored) if stored.epoch == message.epoch && stored.id == message.id => {
                Ok(v1::Appended { duplicate: false, epoch: stored.epoch, seq: stored.seq, prev: stored.prev })
            }
            _ => Err(invalid(format!(
                "{name:?} has seq {} already: an append with seq {} cannot follow",
                self.index.at(id).seq,
                message.seq
            ))),
        }
    }

    fn add(
        &mut self,
        id: TopicId,
        mut message: v1::Message,
        retain: bool,
        idempotent: bool,
        retention: Option<v1::Retention>,
    ) -> v1::Appended {
        self.index.position += 1;
        let position = self.index.position;
        let now_ms = self.now_ms;
        let topic = self.index.at_mut(id);
        message.prev = topic.seq;
        message.stored = true;
        let appended =
            v1::Appended { duplicate: false, epoch: message.epoch, seq: message.seq, prev: message.prev };
        if let Some(retention) = retention {
            topic.retention = retention;
        }
        if topic.seq <= topic.trimmed {
            topic.oldest_ms = now_ms;
        }
        if topic.first_position == 0 {
            topic.first_position = position;
        }
        topic.last_position = position;
        (topic.epoch, topic.seq) = (message.epoch, message.seq);
        if idempotent && !message.id.is_empty() {
            let entry = IdEntry { epoch: message.epoch, seq: message.seq, at_ms: now_ms };
            self.pending.ids.insert((id, message.id.clone()), entry);
        }
        if retain {
            self.retain(message.clone());
        }
        message.topic.clear();
        let value = disk::encode_log(position, now_ms, &message);
        let topic = self.index.at_mut(id);
        topic.count += 1;
        topic.bytes += value.len() as u64;
        self.index.messages += 1;
        self.index.bytes += value.len() as u64;
        self.pending.log.insert((id, message.seq), (position, value));
        self.pending.topics.insert(id);
        self.pending.appends += 1;
        self.index.schedule_age(id);
        appended
    }

    fn retain(&mut self, mut message: v1::Message) {
        self.pending.appends += 1;
        let name = match self.index.retained.get_key_value(message.topic.as_str()) {
            Some((name, _)) => name.clone(),
            None => message.topic.as_str().into(),
        };
        if message.payload.is_empty() {
            self.index.retained.remove(&name);
            self.pending.retained.insert(name, None);
        } else {
            message.retain = true;
            self.index.retained.insert(name.clone(), message.expires_ms);
            self.pending.retained.insert(name, Some((message.expires_ms, message.encode_to_vec())));
        }
    }

    fn find_id(&self, topic: TopicId, id: &str) -> StoreResult<Option<IdEntry>> {
        // A tuple of a String cannot be looked up by a &str.
        if let Some(entry) = self.pending.ids.get(&(topic, id.to_owned())) {
            return Ok(Some(*entry));
        }
        let Some(value) = self.disk.ids.get(disk::id_key(topic, id)).map_err(DiskError::from)? else {
            return Ok(None);
        };
        let entry = (|| {
            Some(IdEntry {
                epoch: disk::number(&value, 0)?,
                seq: disk::number(&value, 8)?,
                at_ms: disk::number(&value, 16)?,
            })
        })();
        let entry = entry.ok_or_else(|| DiskError::Damaged(format!("the message id {id:?}")))?;
        Ok((entry.at_ms + self.id_window_ms > self.now_ms).then_some(entry))
    }

    /// Trims a log that is beyond its count or bytes. The newest message always stays.
    fn enforce_limits(&mut self, id: TopicId) -> Result<(), DiskError> {
        let topic = self.index.at(id);
        let v1::Retention { max_count, max_bytes, .. } = topic.retention;
        let many = max_count > 0 && topic.count > max_count + slack(max_count, 64);
        let large = max_bytes > 0 && topic.bytes > max_bytes + slack(max_bytes, 65_536);
        if !(many || large) || topic.count <= 1 {
            return Ok(());
        }
        self.delete_trimmed(id, DELETE_MESSAGES)?;
        let topic = self.index.at(id);
        let (mut count, mut bytes, newest) = (topic.count, topic.bytes, topic.seq);
        let mut excess = Vec::new();
        for record in self.sizes(id, topic.deleted, newest - 1) {
            let fits = (max_count == 0 || count <= max_count) && (max_bytes == 0 || bytes <= max_bytes);
            if fits || excess.len() >= DELETE_MESSAGES {
                break;
            }
            let (seq, size) = record?;
            count -= 1;
            bytes = bytes.saturating_sub(size);
            excess.push((seq, size));
        }
        if let Some(&(last, _)) = excess.last() {
            self.metrics.trimmed.with_label_values(&["limit"]).inc_by(excess.len() as u64);
            self.index.trim_to(id, last);
            self.delete(id, excess);
        }
        Ok(())
    }

    /// seq and bytes of each record with `after < seq <= until`, committed or pending.
    fn sizes(
        &self,
        id: TopicId,
        after: u64,
        until: u64,
    ) -> impl Iterator<Item = Result<(u64, u64), DiskError>> + use<'_> {
        let pending = &self.pending.log;
        let range = (after < until).then(|| pending.range((id, after + 1)..=(id, until)));
        // A record is deleted from the disk with the commit only: skip those that are planned to be.
        self.disk
            .records(id, after, until)
            .map(|record| record.map(|r| (r.seq, r.value.len() as u64)))
            .chain(range.into_iter().flatten().map(|(&(_, seq), (_, value))| Ok((seq, value.len() as u64))))
    }

    /// Deletes up to `most` messages that are trimmed and still there.
    pub fn delete_trimmed(&mut self, id: TopicId, most: usize) -> Result<(), DiskError> {
        let topic = self.index.at(id);
        if topic.deleted >= topic.trimmed {
            self.index.undeleted.remove(&id);
            return Ok(());
        }
        let mut gone = Vec::new();
        if topic.count == 1 && topic.trimmed == topic.seq {
            // The usual inbox: its one message has been acked. No need to look for it.
            gone.push((topic.seq, topic.bytes));
        } else if topic.count > 0 {
            for record in self.sizes(id, topic.deleted, topic.trimmed).take(most) {
                gone.push(record?);
            }
        }
        self.metrics.trimmed.with_label_values(&["consumed"]).inc_by(gone.len() as u64);
        if gone.len() < most {
            let trimmed = self.index.at(id).trimmed;
            self.delete(id, gone);
            self.index.at_mut(id).deleted = trimmed;
            self.index.undeleted.remove(&id);
            self.pending.topics.insert(id);
        } else {
            self.delete(id, gone);
        }
        Ok(())
    }

    /// Deletes these messages, the oldest of the log.
    fn delete(&mut self, id: TopicId, gone: Vec<(u64, u64)>) {
        let Some(&(last, _)) = gone.last() else { return };
        for (seq, size) in gone {
            let topic = self.index.at_mut(id);
            topic.count = topic.count.saturating_sub(1);
            topic.bytes = topic.bytes.saturating_sub(size);
            self.index.messages = self.index.messages.saturating_sub(1);
            self.index.bytes = self.index.bytes.saturating_sub(size);
            // What was never written need not be deleted.
            if self.pending.log.remove(&(id, seq)).is_none() {
                self.pending.log_deleted.push((id, seq));
            }
        }
        let topic = self.index.at_mut(id);
        topic.deleted = topic.deleted.max(last);
        if topic.deleted >= topic.trimmed {
            self.index.undeleted.remove(&id);
        }
        self.pending.topics.insert(id);
        self.index.schedule_age(id);
    }

    /// Trims what is too old at `now_ms`, at most `most` messages. Answers how many.
    pub fn trim_aged(&mut self, now_ms: u64, most: usize) -> Result<u64, DiskError> {
        let mut trimmed = 0;
        while let Some(&(due, id)) = self.index.ages.first()
            && due <= now_ms
            && trimmed < most
        {
            self.delete_trimmed(id, most)?;
            let topic = self.index.at(id);
            if topic.deleted < topic.trimmed {
                break;
            }
            let limit_ms = topic.retention.max_age_seconds.saturating_mul(1000);
            let mut aged = Vec::new();
            let mut oldest_ms = None;
            for record in self.disk.records(id, topic.trimmed, topic.committed.1) {
                let record = record?;
                let full = trimmed + aged.len() >= most;
                if full || record.appended_ms.saturating_add(limit_ms) > now_ms {
                    oldest_ms = Some(record.appended_ms);
                    break;
                }
                aged.push((record.seq, record.value.len() as u64));
            }
            trimmed += aged.len();
            if let Some(&(last, _)) = aged.last() {
                self.index.trim_to(id, last);
                self.delete(id, aged);
            }
            // Nothing left on disk: what is pending is as young as this round.
            self.index.at_mut(id).oldest_ms = oldest_ms.unwrap_or(self.now_ms.max(now_ms));
            self.pending.topics.insert(id);
            self.index.schedule_age(id);
        }
        self.metrics.trimmed.with_label_values(&["age"]).inc_by(trimmed as u64);
        Ok(trimmed as u64)
    }

    /// Forgets message ids older than the window, at most `most`. Answers how many.
    pub fn forget_ids(&mut self, now_ms: u64, most: usize) -> Result<u64, DiskError> {
        let Some(before) = now_ms.checked_sub(self.id_window_ms) else { return Ok(0) };
        let end = disk::id_age_key(before, 0, "");
        let mut forgotten = 0;
        for guard in self.disk.ids.range(&b"t"[..]..&end[..]).take(most) {
            let key = guard.key().map_err(DiskError::from)?;
            let Some(at_ms) = disk::number(&key, 1) else { continue };
            let mut id_key = vec![b'i'];
            id_key.extend_from_slice(&key[9..]);
            // The id may have been given again since.
            let current = self.disk.ids.get(&id_key).map_err(DiskError::from)?;
            if current.and_then(|value| disk::number(&value, 16)) == Some(at_ms) {
                self.pending.ids_deleted.push(id_key);
            }
            self.pending.ids_deleted.push(key.to_vec());
            forgotten += 1;
        }
        Ok(forgotten)
    }
}

fn check(slot: u32, message: &v1::Message, log: bool, retain: bool) -> StoreResult<()> {
    topic::check_name(&message.topic)
        .map_err(|error| invalid(format!("topic {:?} {error}", message.topic)))?;
    if topic::slot_of(&message.topic) != slot {
        let right = topic::slot_of(&message.topic);
        return Err(invalid(format!("topic {:?} is of slot {right}, not {slot}", message.topic)));
    }
    if message.epoch == 0 || message.seq == 0 {
        return Err(invalid(format!("a message of {:?} has no epoch or no seq", message.topic)));
    }
    if message.id.len() > MAX_ID_BYTES {
        return Err(invalid(format!("a message id is longer than {MAX_ID_BYTES} bytes")));
    }
    if message.encoded_len() > MAX_MESSAGE_BYTES {
        return Err(invalid(format!(
            "a message of {:?} is larger than {MAX_MESSAGE_BYTES} bytes",
            message.topic
        )));
    }
    if !log && !retain {
        return Err(invalid("an append neither to the log nor of a retained message".to_owned()));
    }
    Ok(())
}
