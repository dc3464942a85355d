"""Checks with paho-mqtt, a client nobody here wrote: `paho_checks.py NAME HOST PORT`. Exit code 0 = it holds."""

import queue
import sys
import threading
import time

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

HOST, PORT = "127.0.0.1", 0
PATIENCE = 15


class Device:
    """A client with its loop in a thread, and what happens to it in queues."""

    def __init__(self, client_id, version=mqtt.MQTTv5, user=None, password=None, clean=True, expiry=None,
                 will=None, connect_properties=None, keepalive=60):
        v5 = version == mqtt.MQTTv5
        kwargs = {} if v5 else {"clean_session": clean}
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id, protocol=version, **kwargs)
        if user is not None:
            self.client.username_pw_set(user, password)
        self.connacks, self.messages, self.subacks = queue.Queue(), queue.Queue(), queue.Queue()
        self.unsubacks, self.pubacks, self.disconnects = queue.Queue(), queue.Queue(), queue.Queue()
        self.client.on_connect = lambda c, u, flags, reason, props: self.connacks.put((flags, reason, props))
        self.client.on_message = lambda c, u, message: self.messages.put(message)
        self.client.on_subscribe = lambda c, u, mid, reasons, props: self.subacks.put(reasons)
        self.client.on_unsubscribe = lambda c, u, mid, reasons, props: self.unsubacks.put(reasons)
        self.client.on_publish = lambda c, u, mid, reason, props: self.pubacks.put((mid, reason))
        self.client.on_disconnect = lambda c, u, flags, reason, props: self.disconnects.put((reason, props))
        if will is not None:
            self.client.will_set(**will)
        connect = {"keepalive": keepalive}
        if v5:
            properties = connect_properties or Properties(PacketTypes.CONNECT)
            if expiry is not None:
                properties.SessionExpiryInterval = expiry
            connect |= {"clean_start": clean, "properties": properties}
        self.client.connect(HOST, PORT, **connect)
        self.client.loop_start()
        self.flags, self.reason, self.properties = self.connacks.get(timeout=PATIENCE)

    def subscribe(self, topic, qos=1, options=None):
        self.client.subscribe(topic, options=options) if options else self.client.subscribe(topic, qos)
        return self.subacks.get(timeout=PATIENCE)

    def publish(self, topic, payload, qos=1, retain=False, properties=None):
        """Publishes and waits for the acknowledgement; gives its reason code."""
        self.client.publish(topic, payload, qos, retain, properties)
        return self.pubacks.get(timeout=PATIENCE)[1]

    def next(self):
        return self.messages.get(timeout=PATIENCE)

    def nothing(self, seconds=0.7):
        try:
            message = self.messages.get(timeout=seconds)
        except queue.Empty:
            return
        raise AssertionError(f"unexpected: {message.topic} {message.payload!r}")

    def leave(self):
        self.client.disconnect()
        self.client.loop_stop()

    def vanish(self):
        """The network is gone: no DISCONNECT."""
        self.client.loop_stop()
        self.client._sock_close()


def equal(left, right):
    assert left == right, f"{left!r} is not {right!r}"


def properties_travel():
    receiver, sender = Device("receiver"), Device("sender")
    receiver.subscribe("props")
    p = Properties(PacketTypes.PUBLISH)
    p.PayloadFormatIndicator = 1
    p.MessageExpiryInterval = 600
    p.ContentType = "text/plain"
    p.ResponseTopic = "answers/here"
    p.CorrelationData = b"\x00\x01binary"
    p.UserProperty = [("a", "1"), ("b", "2"), ("a", "3")]
    sender.publish("props", "text", properties=p)
    got = receiver.next().properties
    equal(got.PayloadFormatIndicator, 1)
    assert 590 <= got.MessageExpiryInterval <= 600, got.MessageExpiryInterval
    equal(got.ContentType, "text/plain")
    equal(got.ResponseTopic, "answers/here")
    equal(got.CorrelationData, b"\x00\x01binary")
    own = [pair for pair in got.UserProperty if pair[0] in ("a", "b")]
    equal(own, [("a", "1"), ("b", "2"), ("a", "3")])


def sequence_numbers_are_there():
    receiver, sender = Device("receiver"), Device("sender")
    # By its full name: who leaves the app out gets the publisher's properties and nothing else.
    receiver.subscribe("demo/numbered")
    for text in ("one", "two", "three"):
        sender.publish("numbered", text)
    seqs, epochs = [], set()
    for _ in range(3):
        user = dict(receiver.next().properties.UserProperty)
        seqs.append(int(user["seq"]))
        epochs.add(user["epoch"])
    equal(seqs, [seqs[0], seqs[0] + 1, seqs[0] + 2])
    equal(len(epochs), 1)


def request_and_response():
    answerer, asker = Device("answerer"), Device("asker")
    answerer.subscribe("question")
    asker.subscribe("answer/asker")
    p = Properties(PacketTypes.PUBLISH)
    p.ResponseTopic, p.CorrelationData = "answer/asker", b"42"
    asker.publish("question", "what is it?", properties=p)
    question = answerer.next()
    p = Properties(PacketTypes.PUBLISH)
    p.CorrelationData = question.properties.CorrelationData
    answerer.publish(question.properties.ResponseTopic, "this", properties=p)
    answer = asker.next()
    equal((answer.payload, answer.properties.CorrelationData), (b"this", b"42"))


def sessions_are_kept():
    for version in (mqtt.MQTTv5, mqtt.MQTTv311):
        name = f"kept-{version}"
        kept = {"version": version, "clean": False} | ({"expiry": 3600} if version == mqtt.MQTTv5 else {})
        first = Device(name, **kept)
        equal(first.flags.session_present, False)
        first.subscribe(f"sessions/{version}")
        first.vanish()
        sender = Device(f"sender-{version}", version)
        for i in range(20):
            sender.publish(f"sessions/{version}", str(i))
        second = Device(name, **kept)
        equal(second.flags.session_present, True)
        equal([second.next().payload for _ in range(20)], [str(i).encode() for i in range(20)])
        second.leave()
        clean = Device(name, version)
        equal(clean.flags.session_present, False)
        clean.leave()


def sessions_expire():
    first = Device("brief", clean=False, expiry=1)
    first.subscribe("brief/topic")
    first.leave()
    time.sleep(3)
    equal(Device("brief", clean=False, expiry=1).flags.session_present, False)


def taken_over():
    first = Device("one-device")
    second = Device("one-device")
    reason, _ = first.disconnects.get(timeout=PATIENCE)
    equal(reason.value, 0x8E)
    second.subscribe("still/there")
    first.client.loop_stop()


def reason_codes():
    device = Device("codes")
    # "No matching subscribers" (0x10) may be told, but need not be (MQTT 5.0 §3.4.2.1).
    assert device.publish("nobody/listens", "x").value in (0, 0x10)
    equal([code.value for code in device.subscribe("codes/topic", 1)], [1])
    equal([code.value for code in device.subscribe("codes/topic", 0)], [0])
    equal(device.publish("codes/topic", "x").value, 0)
    device.client.unsubscribe("codes/topic")
    equal([code.value for code in device.unsubacks.get(timeout=PATIENCE)], [0])
    device.client.unsubscribe("codes/topic")
    equal([code.value for code in device.unsubacks.get(timeout=PATIENCE)], [0x11])


def bad_token_is_refused():
    for version in (mqtt.MQTTv5, mqtt.MQTTv311):
        device = Device("intruder", version, user="alice", password="not.a.token")
        assert device.reason.is_failure, device.reason
        assert device.reason.value in (0x86, 0x87, 4, 5), device.reason
        device.client.loop_stop()


def unsubscribed_is_silent():
    receiver, sender = Device("receiver"), Device("sender")
    receiver.subscribe("quiet")
    sender.publish("quiet", "heard")
    equal(receiver.next().payload, b"heard")
    receiver.client.unsubscribe("quiet")
    receiver.unsubacks.get(timeout=PATIENCE)
    sender.publish("quiet", "unheard")
    receiver.nothing()


def subscription_options():
    device, other = Device("optioned"), Device("other")
    device.subscribe("local", options=SubscribeOptions(qos=1, noLocal=True))
    device.publish("local", "mine")
    other.publish("local", "theirs")
    equal(device.next().payload, b"theirs")
    other.publish("kept", "retained", retain=True)
    device.subscribe("kept", options=SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND))
    device.nothing()
    device.subscribe("kept", options=SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE))
    equal(device.next().retain, True)
    device.subscribe("kept", options=SubscribeOptions(
        qos=1, retainAsPublished=True, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB))
    other.publish("kept", "retained again", retain=True)
    message = device.next()
    equal((message.payload, bool(message.retain)), (b"retained again", True))


def subscription_identifiers():
    receiver, sender = Device("receiver"), Device("sender")
    p = Properties(PacketTypes.SUBSCRIBE)
    p.SubscriptionIdentifier = 7
    receiver.client.subscribe("identified/+", 1, properties=p)
    receiver.subacks.get(timeout=PATIENCE)
    sender.publish("identified/x", "x")
    equal(receiver.next().properties.SubscriptionIdentifier, [7])


def slow_receiver_gets_all():
    p = Properties(PacketTypes.CONNECT)
    p.ReceiveMaximum = 2
    receiver, sender = Device("slow", connect_properties=p), Device("sender")
    receiver.subscribe("flow")
    for i in range(200):
        sender.client.publish("flow", str(i), 1)
    equal([receiver.next().payload for _ in range(200)], [str(i).encode() for i in range(200)])


def large_payloads_travel():
    receiver, sender = Device("receiver"), Device("sender")
    receiver.subscribe("large")
    payload = bytes(range(256)) * 1024
    sender.publish("large", payload)
    assert receiver.next().payload == payload


def shared_subscriptions_have_their_options():
    publisher = Device("publisher")
    equal(getattr(publisher.properties, "SharedSubscriptionAvailable", 1), 1)
    publisher.publish("shared/x", b"kept", retain=True)
    member, other = Device("member"), Device("member3", version=mqtt.MQTTv311)

    def identified(number):
        properties = Properties(PacketTypes.SUBSCRIBE)
        properties.SubscriptionIdentifier = number
        return properties

    options = SubscribeOptions(qos=1, retainAsPublished=True)
    member.client.subscribe("$share/g/shared/+", options=options, properties=identified(7))
    equal(member.subacks.get(timeout=PATIENCE)[0].value, 1)
    # Retained messages are not sent on it (section 4.8.2).
    member.nothing()
    # Beside it a plain subscription gets a copy of its own.
    options = SubscribeOptions(qos=0, retainHandling=2)
    member.client.subscribe("shared/x", options=options, properties=identified(8))
    member.subacks.get(timeout=PATIENCE)
    publisher.publish("shared/x", b"both", retain=True)
    both = sorted((member.next() for _ in range(2)), key=lambda m: m.properties.SubscriptionIdentifier)
    equal([(m.properties.SubscriptionIdentifier, m.qos, m.retain, m.payload) for m in both],
          [([7], 1, True, b"both"), ([8], 0, False, b"both")])
    # The whole share: QoS of each member, in turn; no copy for anybody twice.
    equal(other.subscribe("$share/g/demo/shared/+", qos=0)[0].value, 0)
    for i in range(6):
        publisher.publish("shared/y", b"%d" % i)
    mine, theirs = [member.next() for _ in range(3)], [other.next() for _ in range(3)]
    equal(sorted(m.payload for m in mine + theirs), [b"%d" % i for i in range(6)])
    equal({m.qos for m in mine} | {m.topic for m in mine}, {1, "shared/y"})
    equal({m.qos for m in theirs} | {m.topic for m in theirs}, {0, "demo/shared/y"})
    # Subscribed anew: the options are the new ones, and it is one subscription still.
    member.client.subscribe("$share/g/shared/+", options=SubscribeOptions(qos=0), properties=identified(9))
    member.subacks.get(timeout=PATIENCE)
    other.leave()
    for i in range(3):
        publisher.publish("shared/z", b"%d" % i)
    equal([(m.properties.SubscriptionIdentifier, m.qos, m.payload) for m in (member.next() for _ in range(3))],
          [([9], 0, b"%d" % i) for i in range(3)])
    member.nothing()


def wills_are_sent():
    for version in (mqtt.MQTTv5, mqtt.MQTTv311):
        topic = f"wills/{version}"
        watcher = Device(f"watcher-{version}", version)
        watcher.subscribe(topic)
        lost = Device(f"lost-{version}", version, will={"topic": topic, "payload": "gone", "qos": 1, "retain": True})
        lost.vanish()
        message = watcher.next()
        equal((message.payload, message.retain), (b"gone", False))
        late = Device(f"late-{version}", version)
        late.subscribe(topic)
        message = late.next()
        equal((message.payload, bool(message.retain)), (b"gone", True))


def exactly_once():
    for version in (mqtt.MQTTv5, mqtt.MQTTv311):
        topic = f"exactly/{version}"
        kept = {"version": version, "clean": False} | ({"expiry": 3600} if version == mqtt.MQTTv5 else {})
        receiver, sender = Device(f"exact-{version}", **kept), Device(f"sender-{version}", **kept)
        for device in (receiver, sender):
            device.client.reconnect_delay_set(0.1, 0.5)
        reasons = receiver.subscribe(topic, 2)
        equal([reason.value for reason in reasons], [2])
        for i in range(100):
            sender.publish(topic, str(i), 2)
        got = [receiver.next() for _ in range(100)]
        equal([message.payload for message in got], [str(i).encode() for i in range(100)])
        equal({message.qos for message in got}, {2})
        # The network goes in the middle of it all, several times, at both ends.
        for round in range(5):
            for i in range(20):
                sender.client.publish(topic, f"{round} {i}", 2)
            time.sleep(0.02 * round)
            sender.client._sock_close()
            receiver.client._sock_close()
            time.sleep(0.1)
        # While it connects, paho sends what is new before it sends again what is not finished: not in order, but once.
        got = sorted(receiver.next().payload for _ in range(100))
        equal(got, sorted(f"{round} {i}".encode() for round in range(5) for i in range(20)))
        receiver.nothing()


def lower_quality_of_service():
    receiver, sender = Device("receiver"), Device("sender")
    for subscribed in (0, 1, 2):
        equal([reason.value for reason in receiver.subscribe(f"lower/{subscribed}", subscribed)], [subscribed])
        for published in (0, 1, 2):
            sender.publish(f"lower/{subscribed}", "x", published)
            equal(receiver.next().qos, min(subscribed, published))


def aliases_both_ways():
    p = Properties(PacketTypes.CONNECT)
    p.TopicAliasMaximum = 5
    receiver, sender = Device("receiver", connect_properties=p), Device("sender")
    equal(sender.properties.TopicAliasMaximum, 16)
    receiver.subscribe("aliased/topic", 2)
    p = Properties(PacketTypes.PUBLISH)
    p.TopicAlias = 3
    sender.publish("aliased/topic", "0", 1, properties=p)
    for qos in (0, 1, 2):
        sender.publish("", str(qos), qos, properties=p)
    got = [receiver.next() for _ in range(4)]
    # QoS 2 may come behind the rest; paho hands aliases on, and does not put the topic back.
    equal(sorted(message.payload for message in got), [b"0", b"0", b"1", b"2"])
    equal([message.topic for message in got], ["aliased/topic", "", "", ""])
    equal({message.properties.TopicAlias for message in got}, {1})


def many_devices_at_once():
    devices = [Device(f"d{i}", user=f"u{i}") for i in range(50)]
    for device in devices:
        device.subscribe("crowd")
    threads = [threading.Thread(target=lambda d=d: d.client.publish("crowd", "hi", 1)) for d in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device in devices:
        for _ in devices:
            device.next()


CHECKS = {name: value for name, value in list(globals().items())
          if callable(value) and getattr(value, "__module__", None) == __name__ and name.islower()
          and name not in ("equal",)}

if __name__ == "__main__":
    name, HOST, PORT = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if name == "list":
        print("\n".join(CHECKS))
    else:
        CHECKS[name]()
        print("ok", name)
