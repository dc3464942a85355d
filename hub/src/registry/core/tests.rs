//! The core as a table: what happens, then what is to be done, written as short lines.

use carillon_agent::app::Webhook;
use carillon_proto::topic::slot_of;

use super::*;

const TOPIC: &str = "demo/g/a";
const GATEWAY: Receiver = 1;
const NOW: u64 = 1_000_000;

/// A core that owns every slot under epoch 3, fenced, with what it puts out as lines.
struct Bench {
    core: Core,
    asks: Vec<(u64, saver_request::Op)>,
    now_ms: u64,
    next_token: u64,
}

impl Bench {
    fn new() -> Self {
        let mut bench = Bench::unfenced(Limits { unanswered: 100, idle_topics: 1000 });
        bench.core.set_slots(&all_slots(3), NOW);
        let lines = bench.run();
        assert_eq!(lines.len(), 1024);
        bench.answer_all(done());
        bench
    }

    fn unfenced(limits: Limits) -> Self {
        Bench { core: Core::new(limits), asks: Vec::new(), now_ms: NOW, next_token: 1 }
    }

    fn attach(&mut self, receiver: Receiver, name: &str) {
        let attached = Attached { instance: name.into(), incarnation: 1, routes_only: false };
        self.core.attach(receiver, attached);
    }

    /// A gateway that has announced everything.
    fn attach_complete(&mut self, receiver: Receiver, name: &str) {
        self.attach(receiver, name);
        self.complete(receiver);
    }

    fn complete(&mut self, receiver: Receiver) {
        let slots: Vec<_> = (0..1024).map(|slot| v1::SlotEpoch { slot, epoch: 3 }).collect();
        self.core.complete(receiver, &slots, NOW);
    }

    fn publish(&mut self, topic: &str, qos: u32) -> Vec<String> {
        self.publish_with(topic, qos, |_| {})
    }

    fn publish_with(&mut self, topic: &str, qos: u32, change: impl FnOnce(&mut Publish)) -> Vec<String> {
        let message = v1::Message {
            topic: topic.to_owned(),
            qos,
            id: format!("m{}", self.next_token),
            ..v1::Message::default()
        };
        let mut publish =
            Publish { token: self.next_token, message, store: None, idempotent: false, broadcast: None };
        self.next_token += 1;
        change(&mut publish);
        self.core.publish(publish, self.now_ms);
        self.run()
    }

    /// Ends the turn.
    fn run(&mut self) -> Vec<String> {
        let mut outputs = Vec::new();
        self.core.turn(&mut outputs);
        let mut lines = Vec::new();
        for output in outputs {
            lines.push(line(&output));
            if let Output::Ask { tag, op } = output {
                self.asks.push((tag, op));
            }
        }
        lines
    }

    /// Answers the oldest question.
    fn answer(&mut self, answer: Result<saver_reply::Result, AskError>) -> Vec<String> {
        self.answer_nth(0, answer)
    }

    fn answer_nth(&mut self, place: usize, answer: Result<saver_reply::Result, AskError>) -> Vec<String> {
        let (tag, _) = self.asks.remove(place);
        self.core.answered(tag, answer, self.now_ms);
        self.run()
    }

    fn answer_all(&mut self, answer: Result<saver_reply::Result, AskError>) {
        for (tag, _) in std::mem::take(&mut self.asks) {
            self.core.answered(tag, answer.clone(), self.now_ms);
        }
        self.run();
    }

    /// A topic whose head is known.
    fn load(&mut self, receiver: Receiver, topic: &str, head: u64) {
        self.core.announce(receiver, 99, 0, topic, true, NOW);
        assert_eq!(self.run(), [format!("heads {topic}")]);
        assert_eq!(self.answer(heads(&[head])), [format!("announced 99.0 {head}")]);
    }

    fn tick(&mut self, ms: u64) -> Vec<String> {
        self.now_ms += ms;
        self.core.tick(self.now_ms);
        self.run()
    }
}

fn all_slots(epoch: u64) -> HashMap<u32, u64> {
    (0..1024).map(|slot| (slot, epoch)).collect()
}

fn done() -> Result<saver_reply::Result, AskError> {
    Ok(saver_reply::Result::Done(v1::Done {}))
}

fn heads(seqs: &[u64]) -> Result<saver_reply::Result, AskError> {
    let heads = seqs.iter().map(|&seq| v1::Head { epoch: 2, seq, ..v1::Head::default() }).collect();
    Ok(saver_reply::Result::Heads(v1::HeadsReply { heads }))
}

fn appended(prev: u64) -> Result<saver_reply::Result, AskError> {
    Ok(saver_reply::Result::Appended(v1::Appended { prev, ..v1::Appended::default() }))
}

fn duplicate(epoch: u64, seq: u64) -> Result<saver_reply::Result, AskError> {
    Ok(saver_reply::Result::Appended(v1::Appended { duplicate: true, epoch, seq, prev: 0 }))
}

fn line(output: &Output) -> String {
    match output {
        Output::Ask { op, .. } => match op {
            saver_request::Op::Fence(fence) => format!("fence {}", fence.epoch),
            saver_request::Op::Heads(heads) => format!("heads {}", heads.topics.join(" ")),
            saver_request::Op::Append(append) => {
                let message = append.message.as_ref().unwrap();
                let what = match (append.log, append.retain) {
                    (true, false) => "append",
                    (true, true) => "append+retain",
                    (false, true) => "retain",
                    (false, false) => "nothing",
                };
                format!("{what} {}:{}", message.epoch, message.seq)
            }
            saver_request::Op::Read(read) => format!("read after {}", read.after),
            other => format!("{other:?}"),
        },
        Output::Reply { token, published, .. } => {
            let code = published.code().as_str_name().to_lowercase();
            let dup = if published.duplicate { " duplicate" } else { "" };
            if published.code() == PublishCode::Accepted {
                format!("reply {token} {}:{}{dup}", published.epoch, published.seq)
            } else {
                format!("reply {token} {code}")
            }
        }
        Output::Deliver { to, message, .. } => {
            format!("deliver {} prev {} to {to:?}", message.seq, message.prev)
        }
        Output::Announced { request, index, head, retained } => match head {
            Some(head) if *retained => format!("announced {request}.{index} {head} retained"),
            Some(head) => format!("announced {request}.{index} {head}"),
            None => format!("announced {request}.{index} not owner"),
        },
        Output::Kick { to, kick } => {
            format!("kick {to}/{} {}", kick.connection, kick.reason().as_str_name().to_lowercase())
        }
        Output::Presence(event) => {
            let what = if event.online { "online" } else { "offline" };
            format!("presence {} {what} sessions {} {}", event.client_id, event.sessions, event.reason)
        }
        Output::Will(message) => format!("will {}", message.topic),
        Output::GaveUp { .. } => "gave up".to_owned(),
    }
}

#[test]
fn a_stored_message_is_delivered_when_it_is_durable() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 7);
    assert_eq!(bench.publish(TOPIC, 1), ["append 3:8"]);
    assert_eq!(bench.answer(appended(7)), ["deliver 8 prev 7 to [1]", "reply 1 3:8"]);
}

#[test]
fn publishes_wait_for_the_fence_and_the_head_in_order() {
    let mut bench = Bench::unfenced(Limits { unanswered: 100, idle_topics: 1000 });
    bench.core.set_slots(&HashMap::from([(slot_of(TOPIC), 3)]), NOW);
    assert_eq!(bench.run(), ["fence 3"]);
    assert_eq!(bench.publish(TOPIC, 1), [""; 0]);
    assert_eq!(bench.publish(TOPIC, 0), [""; 0]);
    assert_eq!(bench.answer(done()), [format!("heads {TOPIC}")]);
    assert_eq!(bench.answer(heads(&[41])), ["append 3:42"]);
    // Nobody is there to deliver to, and no gateway lives: the slot is whole.
    assert_eq!(bench.answer(appended(41)), ["reply 1 3:42", "reply 2 3:43"]);
}

#[test]
fn messages_are_released_in_order_whatever_the_order_of_answers() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 0);
    assert_eq!(bench.publish(TOPIC, 1), ["append 3:1"]);
    assert_eq!(bench.publish(TOPIC, 1), ["append 3:2"]);
    assert_eq!(bench.publish(TOPIC, 0), [""; 0]);
    assert_eq!(bench.answer_nth(1, appended(1)), [""; 0]);
    assert_eq!(
        bench.answer(appended(0)),
        [
            "deliver 1 prev 0 to [1]",
            "reply 1 3:1",
            "deliver 2 prev 1 to [1]",
            "reply 2 3:2",
            // Not stored, after 2: who has seen 2 has missed nothing.
            "deliver 3 prev 2 to [1]",
            "reply 3 3:3",
        ]
    );
}

#[test]
fn a_topic_with_nothing_to_release_keeps_no_room_for_messages() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 0);
    let room = |bench: &Bench| bench.core.slots[&slot_of(TOPIC)].topics[TOPIC].pending.capacity();
    assert_eq!(bench.publish(TOPIC, 1), ["append 3:1"]);
    assert!(room(&bench) > 0);
    assert_eq!(bench.answer(appended(0)), ["deliver 1 prev 0 to [1]", "reply 1 3:1"]);
    assert_eq!(room(&bench), 0);
    assert_eq!(bench.publish(TOPIC, 0), ["deliver 2 prev 1 to [1]", "reply 2 3:2"]);
    assert_eq!(room(&bench), 0);
}

#[test]
fn a_failed_append_burns_its_number() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 0);
    bench.publish(TOPIC, 1);
    bench.publish(TOPIC, 1);
    assert_eq!(bench.answer(Err(AskError::Unavailable("full".into()))), ["reply 1 store_unavailable"]);
    assert_eq!(bench.answer(appended(0)), ["deliver 2 prev 0 to [1]", "reply 2 3:2"]);
    assert_eq!(bench.publish(TOPIC, 1), ["append 3:3"]);
}

#[test]
fn an_append_of_unknown_outcome_is_found_in_the_log_and_delivered() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 0);
    bench.publish(TOPIC, 1);
    assert_eq!(
        bench.answer(Err(AskError::Unknown("lost".into()))),
        ["reply 1 store_unavailable", "read after 0"]
    );
    // What comes meanwhile waits.
    assert_eq!(bench.publish(TOPIC, 1), [""; 0]);
    let message = v1::Message { topic: TOPIC.into(), seq: 1, stored: true, ..v1::Message::default() };
    let head = Some(v1::Head { epoch: 3, seq: 1, trimmed: 0, retained: false });
    let reply = v1::ReadReply { messages: vec![message], head, next: 1 };
    assert_eq!(bench.answer(Ok(saver_reply::Result::Read(reply))), ["deliver 1 prev 0 to [1]", "append 3:2"]);
    assert_eq!(bench.answer(appended(1)), ["deliver 2 prev 1 to [1]", "reply 2 3:2"]);
}

#[test]
fn recovery_is_tried_again_until_the_saver_answers() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 0);
    bench.publish(TOPIC, 1);
    bench.answer(Err(AskError::Unknown("lost".into())));
    assert_eq!(bench.publish(TOPIC, 1), [""; 0]);
    assert_eq!(bench.answer(Err(AskError::Unavailable("away".into()))), ["reply 2 store_unavailable"]);
    assert_eq!(bench.tick(10), [""; 0]);
    assert_eq!(bench.tick(RETRY_MS), ["read after 0"]);
}

#[test]
fn a_duplicate_is_answered_with_the_earlier_position_and_not_delivered() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 9);
    assert_eq!(bench.publish_with(TOPIC, 1, |publish| publish.idempotent = true), ["append 3:10"]);
    assert_eq!(bench.answer(duplicate(2, 5)), ["reply 1 2:5 duplicate"]);
}

#[test]
fn a_duplicate_of_what_was_never_delivered_is_delivered() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 4);
    bench.publish_with(TOPIC, 1, |publish| publish.idempotent = true);
    assert_eq!(bench.answer(duplicate(2, 5)), ["reply 1 2:5 duplicate", "read after 4"]);
}

#[test]
fn a_retry_of_what_is_in_no_log_is_harmless_too() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 0);
    let again = |publish: &mut Publish| {
        publish.idempotent = true;
        publish.message.id = "same".into();
    };
    assert_eq!(bench.publish_with(TOPIC, 0, again), ["deliver 1 prev 0 to [1]", "reply 1 3:1"]);
    assert_eq!(bench.publish_with(TOPIC, 0, again), ["reply 2 3:1 duplicate"]);
    assert_eq!(bench.publish_with("demo/g/b", 0, again), ["heads demo/g/b"]);
    assert_eq!(bench.answer(heads(&[0])), ["reply 3 3:1"]);
}

#[test]
fn a_fenced_append_gives_the_slot_up() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 0);
    bench.publish(TOPIC, 1);
    bench.publish(TOPIC, 0);
    assert_eq!(bench.answer(Err(AskError::Fenced)), ["reply 1 not_owner", "reply 2 not_owner", "gave up"]);
    assert_eq!(bench.publish(TOPIC, 1), ["reply 3 not_owner"]);
    // The keeper may say for a while that the slot is ours: not under this epoch.
    bench.core.set_slots(&all_slots(3), NOW);
    assert_eq!(bench.publish(TOPIC, 1), ["reply 4 not_owner"]);
    let mut newer = all_slots(3);
    newer.insert(slot_of(TOPIC), 4);
    bench.core.set_slots(&newer, NOW);
    assert_eq!(bench.run(), ["fence 4"]);
}

#[test]
fn a_slot_that_goes_answers_what_waits_and_what_is_being_appended() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 0);
    bench.publish(TOPIC, 1);
    bench.publish(TOPIC, 0);
    bench.core.announce(GATEWAY, 5, 0, "demo/g/b", true, NOW);
    bench.run();
    bench.core.set_slots(&HashMap::new(), NOW);
    let mut lines = bench.run();
    lines.sort();
    assert_eq!(lines, ["announced 5.0 not owner", "reply 2 not_owner"]);
    // It was durable before the new owner's fence: the new owner has it in the log.
    assert_eq!(bench.answer(appended(0)), ["reply 1 3:1"]);
    assert_eq!(bench.core.sizes(), Sizes::default());
}

#[test]
fn a_slot_is_whole_when_every_live_gateway_has_announced_everything() {
    let mut bench = Bench::new();
    let live = |names: &[&str]| names.iter().map(|name| (Arc::from(*name), 1)).collect::<HashSet<_>>();
    bench.core.set_live(live(&["g1", "g2"]));
    bench.attach_complete(1, "g1");
    bench.load(1, TOPIC, 0);
    // g2 lives but is not attached; then it is, but has not announced yet.
    assert_eq!(bench.publish(TOPIC, 0), ["deliver 1 prev 0 to [1]", "reply 1 3:1"]);
    bench.attach(2, "g2");
    assert_eq!(bench.publish(TOPIC, 0), ["deliver 2 prev 0 to [1, 2]", "reply 2 3:2"]);
    bench.core.complete(2, &[v1::SlotEpoch { slot: slot_of(TOPIC), epoch: 2 }], NOW);
    assert_eq!(bench.publish(TOPIC, 0), ["deliver 3 prev 0 to [1, 2]", "reply 3 3:3"]);
    bench.complete(2);
    assert_eq!(bench.publish(TOPIC, 0), ["deliver 4 prev 0 to [1]", "reply 4 3:4"]);
    // A new incarnation begins anew.
    bench.core.set_live([("g1".into(), 1), ("g2".into(), 2)].into());
    assert_eq!(bench.core.sizes().slots_not_whole, 1024);
    bench.core.detach(2, bench.now_ms);
    bench.core.set_live(live(&["g1"]));
    assert_eq!(bench.core.sizes().slots_not_whole, 0);
}

#[test]
fn a_receiver_that_is_no_gateway_gets_what_it_asked_for_alone() {
    let mut bench = Bench::new();
    bench.core.attach(7, Attached { instance: "c".into(), incarnation: 1, routes_only: true });
    bench.core.announce_wildcard(7, "demo/up/#", true);
    bench.attach(1, "g1");
    bench.load(1, TOPIC, 0);
    bench.load(1, "demo/up/x", 0);
    assert_eq!(bench.publish(TOPIC, 0)[0], "deliver 1 prev 0 to [1]");
    assert_eq!(bench.publish("demo/up/x", 0)[0], "deliver 1 prev 0 to [1, 7]");
    bench.core.announce_wildcard(7, "demo/up/#", false);
    assert_eq!(bench.publish("demo/up/x", 0)[0], "deliver 2 prev 0 to [1]");
}

#[test]
fn routes_end_with_their_stream() {
    let mut bench = Bench::new();
    bench.attach_complete(1, "g1");
    bench.attach_complete(2, "g2");
    bench.load(1, TOPIC, 0);
    bench.core.announce(2, 1, 0, TOPIC, true, NOW);
    bench.core.announce_wildcard(2, "demo/#", true);
    assert_eq!(bench.run(), ["announced 1.0 0"]);
    assert_eq!(bench.publish(TOPIC, 0)[0], "deliver 1 prev 0 to [1, 2]");
    bench.core.detach(2, bench.now_ms);
    assert_eq!(bench.publish(TOPIC, 0)[0], "deliver 2 prev 0 to [1]");
    bench.core.announce(1, 2, 0, TOPIC, false, NOW);
    bench.run();
    assert_eq!(bench.publish(TOPIC, 0), ["reply 3 3:3"]);
}

#[test]
fn too_many_unanswered_publishes_are_refused() {
    let mut bench = Bench::new();
    bench.core.set_limits(Limits { unanswered: 1, idle_topics: 1000 });
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 0);
    assert_eq!(bench.publish(TOPIC, 1), ["append 3:1"]);
    assert_eq!(bench.publish(TOPIC, 1), ["reply 2 overloaded"]);
    bench.answer(appended(0));
    assert_eq!(bench.publish(TOPIC, 1), ["append 3:2"]);
}

#[test]
fn broken_messages_are_refused() {
    let mut bench = Bench::new();
    assert_eq!(bench.publish("demo/+/x", 1), ["reply 1 refused"]);
    assert_eq!(bench.publish(TOPIC, 3), ["reply 2 refused"]);
    assert_eq!(bench.publish("", 0), ["reply 3 refused"]);
}

#[test]
fn the_apps_rules_say_what_is_kept() {
    let mut app = App::default();
    app.topics[0].filter = "g/#".into();
    app.topics[0].max_count = 5;
    let message = |topic: &str, qos| v1::Message { topic: topic.into(), qos, ..v1::Message::default() };
    for (topic, qos, store, kept) in [
        ("demo/g/a", 1, None, true),
        ("demo/g/a", 0, None, false),
        ("demo/g/a", 0, Some(true), true),
        ("demo/g/a", 1, Some(false), false),
        ("demo/x", 1, None, false),
        ("demo/x", 1, Some(true), true),
        ("demo/up/order", 1, None, false),
    ] {
        let policy = policy::policy(&app, &message(topic, qos), store);
        assert_eq!(policy.store, kept, "{topic} qos {qos} store {store:?}");
    }
    assert_eq!(policy::policy(&app, &message("demo/g/a", 1), None).retention.max_count, 5);
    assert!(policy::policy(&app, &message("demo/u/alice", 1), None).retention.consumed);
    assert!(!policy::policy(&app, &message("demo/g/alice", 1), None).retention.consumed);
    // With a webhook upstream messages are kept until it has taken them.
    app.webhook = Some(webhook());
    assert!(policy::policy(&app, &message("demo/up/order", 1), None).store);
    assert!(!policy::policy(&app, &message("demo/up/order", 0), None).store);
}

#[test]
fn a_retained_message_that_is_not_logged_is_set_before_it_is_delivered() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 6);
    assert_eq!(bench.publish_with(TOPIC, 0, |publish| publish.message.retain = true), ["retain 3:7"]);
    assert_eq!(bench.answer(appended(0)), ["deliver 7 prev 6 to [1]", "reply 1 3:7"]);
    let announce = |bench: &mut Bench| {
        bench.core.announce(GATEWAY, 9, 0, TOPIC, true, 0);
        bench.run()
    };
    assert_eq!(announce(&mut bench), ["announced 9.0 6"]);
    let keep = |publish: &mut Publish| {
        (publish.message.retain, publish.message.payload) = (true, "kept".into());
    };
    assert_eq!(bench.publish_with(TOPIC, 1, keep), ["append+retain 3:8"]);
    bench.answer(appended(6));
    assert_eq!(announce(&mut bench), ["announced 9.0 8 retained"]);
}

#[test]
fn numbers_do_not_go_back_when_a_topic_was_evicted() {
    let mut bench = Bench::new();
    bench.core.set_limits(Limits { unanswered: 100, idle_topics: 0 });
    bench.publish(TOPIC, 0);
    bench.answer(heads(&[10]));
    assert_eq!(bench.publish(TOPIC, 0), ["reply 2 3:12"]);
    // Twice over all slots: the first look takes the mark of use away.
    for _ in 0..2048 {
        bench.run();
    }
    assert_eq!(bench.core.sizes().topics, 0);
    assert_eq!(bench.publish(TOPIC, 0), [format!("heads {TOPIC}")]);
    assert_eq!(bench.answer(heads(&[10])), ["reply 3 3:13"]);
}

#[test]
fn topics_with_subscribers_are_not_evicted() {
    let mut bench = Bench::new();
    bench.core.set_limits(Limits { unanswered: 100, idle_topics: 0 });
    bench.attach_complete(GATEWAY, "g1");
    bench.load(GATEWAY, TOPIC, 0);
    for _ in 0..4096 {
        bench.run();
    }
    assert_eq!(bench.core.sizes().topics, 1);
    assert_eq!(bench.publish(TOPIC, 0)[0], "deliver 1 prev 0 to [1]");
}

#[test]
fn announcements_wait_out_a_saver_that_is_away() {
    let mut bench = Bench::new();
    bench.attach_complete(GATEWAY, "g1");
    bench.core.announce(GATEWAY, 1, 0, TOPIC, true, NOW);
    assert_eq!(bench.run(), [format!("heads {TOPIC}")]);
    bench.publish(TOPIC, 1);
    // The publisher is told at once, the gateway when there is an answer.
    assert_eq!(bench.answer(Err(AskError::Unavailable("away".into()))), ["reply 1 store_unavailable"]);
    assert_eq!(bench.tick(RETRY_MS), [format!("heads {TOPIC}")]);
    assert_eq!(bench.answer(heads(&[3])), ["announced 1.0 3"]);
}

#[test]
fn a_fence_is_tried_again() {
    let mut bench = Bench::unfenced(Limits { unanswered: 100, idle_topics: 1000 });
    bench.core.set_slots(&HashMap::from([(slot_of(TOPIC), 3)]), NOW);
    bench.run();
    bench.publish(TOPIC, 1);
    assert_eq!(bench.answer(Err(AskError::Unavailable("away".into()))), ["reply 1 store_unavailable"]);
    assert_eq!(bench.tick(RETRY_MS), ["fence 3"]);
    assert_eq!(bench.answer(done()), [format!("heads {TOPIC}")]);
}

#[test]
fn what_is_said_of_a_slot_before_it_is_ours_waits_for_a_moment() {
    let mut bench = Bench::unfenced(Limits { unanswered: 100, idle_topics: 1000 });
    bench.attach(1, "g1");
    bench.core.announce(1, 1, 0, TOPIC, true, NOW);
    bench.complete(1);
    assert_eq!(bench.session(1, change("a", true, 1, 10, false)), [""; 0]);
    assert_eq!(bench.run(), [""; 0]);
    bench.core.set_slots(&all_slots(3), NOW);
    assert_eq!(bench.run().len(), 1024);
    assert_eq!(bench.core.sizes().slots_not_whole, 0);
    assert_eq!(bench.online(), ["a@g1"]);
    for _ in 0..1024 {
        bench.answer(done());
    }
    assert_eq!(bench.answer(heads(&[5])), ["announced 1.0 5"]);
    // Of a slot that does not become ours.
    bench.core.set_slots(&HashMap::new(), NOW);
    bench.run();
    bench.core.announce(1, 2, 0, TOPIC, true, NOW);
    assert_eq!(bench.tick(500), [""; 0]);
    assert_eq!(bench.tick(500), ["announced 2.0 not owner"]);
}

#[test]
fn a_slot_that_is_ours_under_a_new_epoch_keeps_its_routes_and_sessions() {
    let mut bench = Bench::new();
    bench.attach_complete(1, "g1");
    bench.attach_complete(2, "g2");
    bench.load(1, TOPIC, 5);
    bench.session(1, change("a", true, 1, 10, false));
    bench.core.set_slots(&all_slots(4), NOW);
    assert_eq!(bench.run().len(), 1024);
    bench.answer_all(done());
    bench.asks.clear();
    assert_eq!(bench.online(), ["a@g1"]);
    assert_eq!(
        bench.core.sizes(),
        Sizes { slots: 1024, slots_not_whole: 1024, topics: 1, sessions: 1, unanswered: 0 }
    );
    let slots: Vec<_> = (0..1024).map(|slot| v1::SlotEpoch { slot, epoch: 4 }).collect();
    bench.core.complete(1, &slots, NOW);
    bench.core.complete(2, &slots, NOW);
    assert_eq!(bench.core.sizes().slots_not_whole, 0);
}

// --- slots on their way ---

#[test]
fn what_reaches_the_next_owner_before_it_has_heard_of_its_slot_waits_there() {
    let mut bench = Bench::unfenced(Limits { unanswered: 2, idle_topics: 1000 });
    let slot = slot_of(TOPIC);
    assert_eq!(bench.publish(TOPIC, 1), ["reply 1 not_owner"]);
    bench.core.set_coming(&HashSet::from([slot]));
    assert_eq!(bench.publish(TOPIC, 1), [""; 0]);
    assert_eq!(bench.publish(TOPIC, 1), [""; 0]);
    assert_eq!(bench.publish(TOPIC, 1), ["reply 4 overloaded"], "within the limit of all publishes");
    bench.core.set_slots(&HashMap::from([(slot, 4)]), NOW);
    bench.core.set_coming(&HashSet::new());
    assert_eq!(bench.run(), ["fence 4"]);
    assert_eq!(bench.answer(done()), [format!("heads {TOPIC}")]);
    assert_eq!(bench.answer(heads(&[7])), ["append 4:8", "append 4:9"], "in their order");
    // It does not come after all.
    let mut bench = Bench::unfenced(Limits { unanswered: 2, idle_topics: 1000 });
    bench.core.set_coming(&HashSet::from([slot]));
    bench.publish(TOPIC, 1);
    bench.core.set_coming(&HashSet::new());
    assert_eq!(bench.run(), ["reply 1 not_owner"]);
    assert_eq!(bench.core.sizes().unanswered, 0);
    // Nor in time.
    bench.core.set_coming(&HashSet::from([slot]));
    bench.publish(TOPIC, 1);
    bench.core.tick(NOW + 999);
    assert_eq!(bench.run(), [""; 0]);
    bench.core.tick(NOW + 1000);
    assert_eq!(bench.run(), ["reply 2 not_owner"]);
    assert_eq!(bench.core.sizes().unanswered, 0);
}

// --- sessions ---

fn webhook() -> Webhook {
    Webhook { url: "http://localhost/".into(), secret: None, presence: true, timeout_ms: 1000 }
}

fn with_presence(bench: &mut Bench) {
    let app = App { webhook: Some(webhook()), ..App::default() };
    bench.core.set_apps(Arc::new(BTreeMap::from([("demo".to_owned(), Arc::new(app))])));
}

fn change(client_id: &str, online: bool, connection: u64, since_ms: u64, again: bool) -> v1::SessionChange {
    v1::SessionChange {
        session: Some(v1::SessionRef {
            app: "demo".into(),
            user: "alice".into(),
            client_id: client_id.into(),
        }),
        online,
        since_ms,
        address: "192.0.2.1:5".into(),
        connection,
        again,
        reason: if online { String::new() } else { "normal".into() },
        will: None,
        arrival_ms: None,
    }
}

impl Bench {
    fn session(&mut self, receiver: Receiver, change: v1::SessionChange) -> Vec<String> {
        self.core.session_change(receiver, change, self.now_ms);
        self.run()
    }

    fn online(&self) -> Vec<String> {
        let mut online: Vec<_> = self
            .core
            .sessions("demo", "alice")
            .unwrap()
            .iter()
            .map(|one| format!("{}@{}", one.session.as_ref().unwrap().client_id, one.gateway))
            .collect();
        online.sort();
        online
    }
}

#[test]
fn presence_tells_the_first_and_the_last() {
    let mut bench = Bench::new();
    with_presence(&mut bench);
    bench.attach_complete(1, "g1");
    assert_eq!(bench.session(1, change("a", true, 1, 10, false)), ["presence a online sessions 1 "]);
    assert_eq!(bench.session(1, change("b", true, 2, 20, false)), ["presence b online sessions 2 "]);
    assert_eq!(bench.online(), ["a@g1", "b@g1"]);
    assert_eq!(bench.session(1, change("a", false, 1, 0, false)), ["presence a offline sessions 1 normal"]);
    // Of a connection that is not this session's any more.
    assert_eq!(bench.session(1, change("b", false, 1, 0, false)), [""; 0]);
    assert_eq!(bench.session(1, change("b", false, 2, 0, false)), ["presence b offline sessions 0 normal"]);
    assert_eq!(bench.core.sizes().sessions, 0);
}

#[test]
fn a_newer_session_takes_over_from_the_older() {
    let mut bench = Bench::new();
    bench.attach_complete(1, "g1");
    bench.attach_complete(2, "g2");
    bench.session(1, change("a", true, 5, 10, false));
    assert_eq!(bench.session(2, change("a", true, 1, 20, false)), ["kick 1/5 taken_over"]);
    assert_eq!(bench.online(), ["a@g2"]);
    // The old one's end changes nothing.
    assert_eq!(bench.session(1, change("a", false, 5, 10, false)), [""; 0]);
    assert_eq!(bench.online(), ["a@g2"]);
    // On the same gateway the larger connection is the newer one.
    assert_eq!(bench.session(2, change("a", true, 2, 30, false)), ["kick 2/1 taken_over"]);
    // Told about again after a change of owner: the one that began earlier has to go.
    assert_eq!(bench.session(1, change("a", true, 9, 5, true)), ["kick 1/9 taken_over"]);
    assert_eq!(bench.online(), ["a@g2"]);
}

#[test]
fn a_kick_reaches_the_sessions_that_are_meant() {
    let mut bench = Bench::new();
    bench.attach_complete(1, "g1");
    bench.session(1, change("a", true, 1, 10, false));
    bench.session(1, change("b", true, 2, 10, false));
    assert_eq!(bench.core.kick("demo", "alice", "b"), Some(1));
    assert_eq!(bench.run(), ["kick 1/2 administrative"]);
    assert_eq!(bench.core.kick("demo", "alice", ""), Some(2));
    assert_eq!(bench.core.kick("demo", "bob", ""), Some(0));
}

#[test]
fn a_stream_that_breaks_for_a_moment_fires_no_presence() {
    let mut bench = Bench::new();
    with_presence(&mut bench);
    bench.core.set_live([("g1".into(), 1)].into());
    bench.attach_complete(1, "g1");
    bench.session(1, change("a", true, 1, 10, false));
    bench.session(1, change("b", true, 2, 10, false));
    bench.core.detach(1, bench.now_ms);
    assert_eq!(bench.online(), [""; 0]);
    assert_eq!(bench.tick(1000), [""; 0]);
    bench.attach(2, "g1");
    assert_eq!(bench.session(2, change("a", true, 1, 10, true)), [""; 0]);
    assert_eq!(bench.online(), ["a@g1"]);
    // b went while the stream was away: it is not announced again.
    bench.complete(2);
    assert_eq!(bench.tick(1000), [""; 0]);
    assert_eq!(bench.tick(30_000), ["presence b offline sessions 1 network"]);
}

#[test]
fn sessions_of_a_gateway_that_is_gone_end() {
    let mut bench = Bench::new();
    with_presence(&mut bench);
    bench.core.set_live([("g1".into(), 1)].into());
    bench.attach_complete(1, "g1");
    bench.session(1, change("a", true, 1, 10, false));
    bench.core.detach(1, bench.now_ms);
    bench.core.set_live(HashSet::new());
    assert_eq!(bench.tick(100), ["presence a offline sessions 0 gateway_lost"]);
}

#[test]
fn a_moved_session_has_30_s_to_arrive_if_its_gateway_does_not_say() {
    let mut bench = Bench::new();
    with_presence(&mut bench);
    bench.core.set_live([("g1".into(), 1)].into());
    bench.attach_complete(1, "g1");
    bench.session(1, change("a", true, 1, 10, false));
    let moved = v1::SessionChange { reason: "moved".into(), ..change("a", false, 1, 10, false) };
    assert_eq!(bench.session(1, moved), [""; 0]);
    assert_eq!(bench.tick(29_900), [""; 0]);
    assert_eq!(bench.tick(100), ["presence a offline sessions 0 moved"]);
}

#[test]
fn a_session_that_was_moved_is_not_reported_if_it_arrives() {
    let mut bench = Bench::new();
    with_presence(&mut bench);
    bench.core.set_live([("g1".into(), 1), ("g2".into(), 1)].into());
    bench.attach_complete(1, "g1");
    bench.attach_complete(2, "g2");
    let moved_in = |client, arrival_ms| v1::SessionChange {
        reason: "moved".into(),
        arrival_ms,
        ..change(client, false, 1, 10, false)
    };
    let moved = |client| moved_in(client, Some(10_000));
    for client in ["a", "b", "c"] {
        bench.session(1, change(client, true, 1, 10, false));
    }
    assert_eq!(
        bench.session(1, moved_in("c", Some(0))),
        ["presence c offline sessions 2 moved"],
        "no time to arrive"
    );
    assert_eq!(bench.session(1, moved("a")), [""; 0]);
    assert_eq!(bench.session(1, moved("b")), [""; 0]);
    assert_eq!(bench.online(), [""; 0]);
    // The gateway that was drained ends; that is no news of its former devices.
    bench.core.detach(1, bench.now_ms);
    bench.core.set_live([("g2".into(), 1)].into());
    assert_eq!(bench.tick(1000), [""; 0]);
    assert_eq!(bench.session(2, change("a", true, 1, 20, false)), [""; 0]);
    assert_eq!(bench.online(), ["a@g2"]);
    assert_eq!(bench.tick(8900), [""; 0]);
    assert_eq!(bench.tick(100), ["presence b offline sessions 1 moved"]);
}

// --- wills ---

fn with_will(change: v1::SessionChange, delay_ms: u64, due: bool) -> v1::SessionChange {
    let message = v1::Message { topic: "demo/will".into(), qos: 1, ..v1::Message::default() };
    v1::SessionChange { will: Some(Box::new(v1::Will { message: Some(message), delay_ms, due })), ..change }
}

/// Two gateways, and a session with a will at the first.
fn with_two_gateways(delay_ms: u64) -> Bench {
    let mut bench = Bench::new();
    bench.core.set_live([("g1".into(), 1), ("g2".into(), 1)].into());
    bench.attach_complete(1, "g1");
    bench.attach_complete(2, "g2");
    bench.session(1, with_will(change("a", true, 7, 10, false), delay_ms, false));
    bench
}

fn lose_first(bench: &mut Bench) {
    bench.core.detach(1, bench.now_ms);
    bench.core.set_live([("g2".into(), 1)].into());
}

#[test]
fn the_will_of_a_gateway_that_is_gone_is_published_after_its_delay_and_once() {
    let mut bench = with_two_gateways(5000);
    lose_first(&mut bench);
    assert_eq!(bench.tick(4900), [""; 0]);
    assert_eq!(bench.tick(200), ["will demo/will"]);
    assert_eq!(bench.tick(60_000), [""; 0]);
    // While the gateway is there, the will is its own business.
    let mut bench = with_two_gateways(0);
    bench.core.detach(1, bench.now_ms);
    assert_eq!(bench.tick(60_000), [""; 0]);
    bench.core.set_live([("g2".into(), 1)].into());
    assert_eq!(bench.tick(100), ["will demo/will"]);
}

#[test]
fn a_will_is_no_more_when_its_session_ended_or_came_back() {
    let mut bench = with_two_gateways(0);
    bench.session(1, change("a", false, 7, 10, false));
    lose_first(&mut bench);
    assert_eq!(bench.tick(60_000), [""; 0]);
    let mut bench = with_two_gateways(5000);
    bench.core.detach(1, bench.now_ms);
    bench.session(2, change("a", true, 1, 20, false));
    bench.core.set_live([("g2".into(), 1)].into());
    assert_eq!(bench.tick(60_000), [""; 0]);
    // The same after the connection had ended, with the delay running.
    let mut bench = with_two_gateways(5000);
    bench.session(1, with_will(change("a", false, 7, 10, false), 5000, true));
    lose_first(&mut bench);
    bench.session(2, change("a", true, 1, 20, false));
    assert_eq!(bench.tick(60_000), [""; 0]);
}

#[test]
fn a_delay_that_runs_goes_on_without_its_gateway() {
    let mut bench = with_two_gateways(5000);
    bench.session(1, with_will(change("a", false, 7, 10, false), 5000, true));
    assert_eq!(bench.tick(3000), [""; 0]);
    lose_first(&mut bench);
    assert_eq!(bench.tick(1900), [""; 0]);
    assert_eq!(bench.tick(200), ["will demo/will"]);
}

#[test]
fn a_gateway_is_told_that_its_device_came_back_elsewhere() {
    let due = || with_will(change("a", false, 7, 10, false), 60_000, true);
    let mut bench = with_two_gateways(60_000);
    bench.session(1, due());
    assert_eq!(bench.session(2, change("a", true, 1, 20, false)), ["kick 1/7 taken_over"]);
    // Announced to an owner that did not know of it, after the device had come back.
    let again = v1::SessionChange { again: true, ..due() };
    assert_eq!(bench.session(1, again), ["kick 1/7 taken_over"]);
    lose_first(&mut bench);
    assert_eq!(bench.tick(120_000), [""; 0]);
}

#[test]
fn a_parked_session_keeps_its_will_and_a_published_one_is_forgotten() {
    let mut bench = with_two_gateways(5000);
    bench.session(1, with_will(change("a", true, 7, 10, true), 5000, true));
    assert_eq!(bench.session(1, change("a", true, 7, 10, true)), [""; 0]);
    lose_first(&mut bench);
    assert_eq!(bench.tick(5100), ["will demo/will"]);
    let mut bench = with_two_gateways(0);
    // Published when the connection dropped; the session stays.
    bench.session(1, change("a", true, 7, 10, true));
    lose_first(&mut bench);
    assert_eq!(bench.tick(5100), [""; 0]);
}

#[test]
fn wills_that_are_not_announced_again_are_no_more() {
    let mut bench = with_two_gateways(0);
    bench.core.detach(1, bench.now_ms);
    bench.attach(3, "g1");
    bench.session(3, with_will(change("b", true, 8, 10, true), 0, false));
    bench.complete(3);
    bench.core.detach(3, bench.now_ms);
    bench.core.set_live([("g2".into(), 1)].into());
    assert_eq!(bench.tick(100), ["will demo/will"]);
    assert_eq!(bench.tick(60_000), [""; 0]);
}
