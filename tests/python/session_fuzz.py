"""Random MQTT sessions against a running gateway: packets that are valid one by one, in every order that a device may or
may not send them in, some of them broken, over connections that come, go, take each other over and come back.

    session_fuzz.py HOST:PORT SECONDS SEED

Each run is decided by its seed. After every round of sessions an honest pair of clients must still get a message through.
Prints what it has done; ends with a non-zero status, and the seed of the round, if the server does not serve any more.
"""

import random
import socket
import struct
import sys
import time

TOPICS = ["a", "a/b", "demo/a", "u/x", "demo/u/x", "g/1", "all", "$SYS/x", "/", "a//b", "é", "x" * 300]
FILTERS = TOPICS + ["#", "+", "a/#", "+/b", "demo/+", "$share/s/a", "$share/s/demo/#", "$share//a", "$share/s", "a/#/b", "a+"]
PROPERTIES = {  # identifier: how its value is made
    0x01: lambda r: bytes([r.randrange(3)]),
    0x02: lambda r: struct.pack(">I", r.choice([0, 1, 60, 0xFFFFFFFF])),
    0x03: lambda r: text(r, "text/plain"),
    0x08: lambda r: text(r, r.choice(TOPICS)),
    0x09: lambda r: binary(r.randbytes(r.randrange(20))),
    0x0B: lambda r: varint(r.choice([0, 1, 127, 128, 268435455])),
    0x11: lambda r: struct.pack(">I", r.choice([0, 1, 3600, 0xFFFFFFFF])),
    0x15: lambda r: text(r, "method"),
    0x16: lambda r: binary(b"data"),
    0x17: lambda r: bytes([r.randrange(3)]),
    0x18: lambda r: struct.pack(">I", r.choice([0, 1, 5])),
    0x19: lambda r: bytes([r.randrange(3)]),
    0x1F: lambda r: text(r, "why"),
    0x21: lambda r: struct.pack(">H", r.choice([0, 1, 2, 100, 65535])),
    0x22: lambda r: struct.pack(">H", r.choice([0, 1, 5, 65535])),
    0x23: lambda r: struct.pack(">H", r.choice([0, 1, 2, 3, 17, 65535])),
    0x26: lambda r: text(r, r.choice(["token", "key"])) + text(r, r.choice(["value", "a.b.c"])),
    0x27: lambda r: struct.pack(">I", r.choice([0, 1, 20, 100, 1 << 20])),
}
FITTING = {  # by packet type: the properties that it may have
    1: [0x11, 0x21, 0x22, 0x26, 0x27, 0x17, 0x19],
    3: [0x01, 0x02, 0x03, 0x08, 0x09, 0x23, 0x26],
    8: [0x0B, 0x26],
    10: [0x26],
    14: [0x11, 0x1F, 0x26],
}


def varint(number):
    out = bytearray()
    while True:
        byte = number % 128
        number //= 128
        out.append(byte | (128 if number else 0))
        if not number:
            return bytes(out)


def binary(value):
    return struct.pack(">H", len(value)) + value


def text(r, value):
    raw = value.encode()
    if r.random() < 0.005:
        raw += r.choice([b"\x00", b"\xff", b"\xed\xa0\x80"])
    return binary(raw)


def packet(first, body):
    return bytes([first]) + varint(len(body)) + body


class Session:
    """What one device says, in whatever order."""

    def __init__(self, r, version):
        self.r, self.version = r, version

    def properties(self, kind):
        if self.version != 5:
            return b""
        r, block = self.r, b""
        while r.random() < 0.3:
            some = r.choice(list(PROPERTIES)) if r.random() < 0.03 else r.choice(FITTING.get(kind, [0x1F, 0x26]))
            block += bytes([some]) + PROPERTIES[some](r)
        return varint(len(block)) + block

    def connect(self):
        r = self.r
        flags = 2 if r.random() < 0.5 else 0
        will = r.random() < 0.3
        if will:
            flags |= 4 | r.choice([0, 8, 16]) | r.choice([0, 32])
        name, password = r.random() < 0.5, r.random() < 0.05
        if name:
            flags |= 0x80
        if password and (name or self.version == 5):
            flags |= 0x40
        if r.random() < 0.01:
            flags ^= 1 << r.randrange(8)
        level = self.version if r.random() > 0.01 else r.randrange(256)
        body = binary(b"MQTT" if r.random() > 0.01 else b"MQIsdp") + bytes([level, flags])
        body += struct.pack(">H", r.choice([0, 1, 10, 60, 65535])) + self.properties(1)
        body += text(r, r.choice(["", "x", "y", "z", "device-1", "é" * 10]))
        if flags & 4:
            if self.version == 5:
                body += b"\x00"
            body += text(r, r.choice(TOPICS)) + binary(b"gone")
        if flags & 0x80:
            body += text(r, r.choice(["x", "y", "a/b", "$x"]))
        if flags & 0x40:
            body += binary(r.choice([b"", b"secret", b"a.b.c", b"eyJhbGciOiJIUzI1NiJ9.e30.x"]))
        return packet(0x10, body)

    def identifier(self):
        return struct.pack(">H", self.r.choice([0, 1, 1, 2, 2, 3, 4, 5, 65535]))

    def publish(self):
        r = self.r
        qos = r.choice([0, 0, 1, 1, 2, 2, 3]) if r.random() < 0.05 else r.choice([0, 1, 2])
        first = 0x30 | r.choice([0, 0, 0, 8]) | qos << 1 | r.choice([0, 0, 0, 1])
        topic = "" if self.version == 5 and r.random() < 0.1 else r.choice(TOPICS)
        body = text(r, topic) + (self.identifier() if qos else b"") + self.properties(3)
        return packet(first, body + r.randbytes(r.choice([0, 1, 10, 100, 3000])))

    def subscribe(self):
        r, body = self.r, self.identifier() + self.properties(8)
        for _ in range(r.choice([0, 1, 1, 1, 2, 5])):
            options = r.randrange(256) if r.random() < 0.05 else r.choice([0, 1, 2])
            if self.version == 5 and r.random() < 0.4:
                options |= r.choice([4, 8, 16, 32])
            body += text(r, r.choice(FILTERS)) + bytes([options])
        return packet(0x82, body)

    def unsubscribe(self):
        body = self.identifier() + self.properties(10)
        for _ in range(self.r.choice([0, 1, 1, 2])):
            body += text(self.r, self.r.choice(FILTERS))
        return packet(0xA2, body)

    def answer(self):
        """PUBACK, PUBREC, PUBREL, PUBCOMP: to what was sent, or to nothing."""
        r, body = self.r, self.identifier()
        if self.version == 5 and r.random() < 0.3:
            body += bytes([r.choice([0, 0x10, 0x80, 0x92, 0x99, 0xFF])])
            if r.random() < 0.3:
                body += self.properties(4)
        return packet(r.choice([0x40, 0x50, 0x62, 0x70]), body)

    def goodbye(self):
        r = self.r
        if self.version == 5 and r.random() < 0.5:
            return packet(0xE0, bytes([r.choice([0, 4, 0x80, 0x82])]) + self.properties(14))
        return packet(0xE0, b"")

    def nonsense(self):
        r = self.r
        return r.choice([
            lambda: packet(0xC0, b""),
            lambda: packet(0xF0, b"" if r.random() < 0.5 else b"\x18" + self.properties(15)),
            lambda: packet(r.randrange(256), r.randbytes(r.randrange(20))),
            lambda: bytes([r.randrange(256)]) + b"\xff\xff\xff\xff",
            lambda: bytes([0x30]) + varint(2 << 20),
            self.connect,
        ])()

    def say(self):
        some = self.r.choices(
            [self.publish, self.subscribe, self.unsubscribe, self.answer, self.goodbye, self.nonsense],
            [40, 15, 5, 30, 2, 3],
        )[0]()
        if self.r.random() < 0.01:  # one byte of it is another
            at = self.r.randrange(len(some))
            some = some[:at] + bytes([self.r.randrange(256)]) + some[at + 1 :]
        return some


def drain(sock):
    """Reads what there is; b"" when the server has closed."""
    try:
        return sock.recv(65536)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def round_of_sessions(address, seed, counts):
    r = random.Random(seed)
    devices = []
    for _ in range(r.randrange(1, 12)):
        sock = socket.create_connection(address, timeout=10)
        sock.setblocking(False)
        session = Session(r, r.choice([4, 5, 5]))
        devices.append((sock, session, bytearray(session.connect() if r.random() > 0.02 else session.say())))
    for _ in range(r.randrange(5, 120)):
        if not devices:
            break
        at = r.randrange(len(devices))
        sock, session, out = devices[at]
        for _ in range(r.choice([0, 1, 1, 2, 5])):
            out += session.say()
            counts["packets"] += 1
        closed = drain(sock) == b"" if r.random() < 0.8 else False
        try:
            sent = sock.send(out[: r.choice([1, 3, 50, len(out) + 1])]) if out else 0
            counts["bytes"] += sent
            del out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        if closed or r.random() < 0.02:
            if r.random() < 0.3:  # a reset
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            del devices[at]
            counts["closed by the server" if closed else "hung up"] += 1
    for sock, _, _ in devices:
        sock.close()
    counts["sessions"] += 1


def receive(sock, kind, deadline, held=None):
    """The next packet of this kind; others are passed over."""
    held = bytearray() if held is None else held
    while time.monotonic() < deadline:
        while len(held) >= 2:
            length, shift, at = 0, 0, 1
            while at < len(held):
                length |= (held[at] & 127) << shift
                shift, at = shift + 7, at + 1
                if held[at - 1] < 128:
                    break
            if len(held) < at + length:
                break
            first, body = held[0], bytes(held[at : at + length])
            del held[: at + length]
            if first >> 4 == kind:
                return body
        sock.settimeout(max(deadline - time.monotonic(), 0.01))
        data = sock.recv(65536)
        if not data:
            raise OSError("closed")
        held += data
    raise TimeoutError(f"no packet of type {kind}")


def honest(address, number):
    """Two devices that behave: one subscribes, the other one's message must reach it."""
    deadline = time.monotonic() + 20
    topic = f"honest/{number}".encode()

    def hello(name):
        sock = socket.create_connection(address, timeout=20)
        sock.sendall(packet(0x10, binary(b"MQTT") + b"\x04\x02\x00\x3c" + binary(name)))
        held = bytearray()
        assert receive(sock, 2, deadline, held)[1] == 0
        return sock, held

    subscriber, held = hello(b"honest-subscriber")
    subscriber.sendall(packet(0x82, b"\x00\x01" + binary(topic) + b"\x01"))
    assert receive(subscriber, 9, deadline, held)[2] == 1
    publisher, _ = hello(b"honest-publisher")
    publisher.sendall(packet(0x32, binary(topic) + b"\x00\x01" + b"here"))
    assert receive(publisher, 4, deadline) == b"\x00\x01"
    assert receive(subscriber, 3, deadline, held).endswith(b"here")
    for sock in (subscriber, publisher):
        sock.sendall(b"\xe0\x00")
        sock.close()


def main():
    host, port = sys.argv[1].rsplit(":", 1)
    address = (host, int(port))
    until, seed = time.monotonic() + float(sys.argv[2]), int(sys.argv[3])
    counts = dict.fromkeys(["sessions", "packets", "bytes", "closed by the server", "hung up"], 0)
    number = 0
    while time.monotonic() < until:
        for _ in range(20):
            number += 1
            try:
                round_of_sessions(address, seed + number, counts)
            except OSError as error:
                sys.exit(f"seed {seed + number}: {error}")
        try:
            honest(address, number)
        except (OSError, AssertionError) as error:
            sys.exit(f"after seeds {seed + number - 19} to {seed + number}: {error!r}")
    print(", ".join(f"{value} {name}" for name, value in counts.items()))


main()
