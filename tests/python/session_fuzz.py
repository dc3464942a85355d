"""Random MQTT sessions against a running gateway: packets that are valid one by one, in every order that a device may or
may not send them in, some of them broken, over connections that come, go, take each other over and come back.

    session_fuzz.py HOST:PORT METRICS_URL --corpus DIR [--seconds 30] [--seed 1] [--keep DIR] [--failed DIR]
    session_fuzz.py HOST:PORT METRICS_URL --corpus DIR --merge FROM

First every case of the corpus is run. Then new ones are made: by chance, or from one that is there, with something left
out, doubled, moved or changed. A case whose answers hold something that was not seen before (see `behaviours`), or that
moves a counter that had not moved, is made from in turn, and with --keep made as short as possible and written there.
--merge chooses from both directories the fewest that show all there is to see, and leaves those in the corpus.

Each run is decided by its seed, as far as the server's timing lets it. After every batch an honest pair of clients must
still get a message through. Prints what it has done; ends with a non-zero status, and the cases of the batch in the
directory of --failed, if the server does not serve any more.

A case is a text file: `N open`, `N send HEX`, `N close`, `N reset`, N being the connection. What is sent is the device's
bytes, except that `~~~~` is another text of four characters each time, so that no case meets sessions of a former one.
"""

import argparse
import hashlib
import pathlib
import random
import select
import socket
import struct
import sys
import time
import urllib.request

OWN = b"~~~~"
TOPICS = ["a", "a/b", "demo/a", "u/~~~~", "demo/u/~~~~", "g/1", "all", "$SYS/x", "/", "a//b", "é", "x" * 300, "up/x"]
FILTERS = TOPICS + ["#", "+", "a/#", "+/b", "demo/+", "$share/~~~~/a", "$share/~~~~/demo/#", "$share//a", "$share/s", "a/#/b",
                    "a+", "other/#"]
MAX_ACTIONS, MAX_SEND_BYTES = 60, 4096
BATCH = 20
MAX_FILES, MAX_BYTES = 290, 900_000
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
        body += text(r, r.choice(["", "~~~~", "~~~~", "~~~~y", "~~~~z", "é" * 10 + "~~~~"]))
        if flags & 4:
            if self.version == 5:
                body += b"\x00"
            body += text(r, r.choice(TOPICS)) + binary(b"gone")
        if flags & 0x80:
            body += text(r, r.choice(["~~~~", "~~~~y", "a/b", "$x"]))
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
        return packet(first, body + r.randbytes(r.choice([0, 0, 1, 10, 10, 100] + [3000] * (r.random() < 0.1))))

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


def make(r):
    """A case by chance."""
    actions, sessions = [], {}
    for _ in range(r.randrange(4, 50)):
        at = r.randrange(4)
        if at not in sessions:
            sessions[at] = Session(r, r.choice([4, 5, 5]))
            actions.append((at, "open", sessions[at].connect() if r.random() > 0.02 else sessions[at].say()))
        elif r.random() < 0.06:
            actions.append((at, r.choice(["close", "close", "reset"]), b""))
            del sessions[at]
        else:
            actions.append((at, "send", b"".join(sessions[at].say() for _ in range(r.choice([1, 1, 1, 2, 4])))))
    # An opening sends nothing by itself.
    return [one for at, verb, data in actions for one in
            ([(at, "open", b""), (at, "send", data)] if verb == "open" else [(at, verb, data)])][:MAX_ACTIONS]


def mutate(r, case, others):
    """A case made from one that is there."""
    case = list(case)
    for _ in range(r.choice([1, 1, 2, 4])):
        at = r.randrange(len(case)) if case else 0
        what = r.randrange(10)
        if not case or what == 0:
            session = Session(r, r.choice([4, 5]))
            case.insert(at, (case[at][0] if case else 0, "send", session.say()))
        elif what == 1:
            del case[at]
        elif what == 2:
            case.insert(r.randrange(len(case) + 1), case[at])
        elif what == 3:
            case.insert(r.randrange(len(case)), case.pop(at))
        elif what in (4, 5) and case[at][2]:  # some bytes are others
            data = bytearray(case[at][2])
            for _ in range(r.choice([1, 1, 3])):
                data[r.randrange(len(data))] = r.choice([0, 1, 0x7F, 0x80, 0xFF, r.randrange(256)])
            case[at] = (case[at][0], "send", bytes(data))
        elif what == 6:  # the rest is another's
            case = case[:at] + list(r.choice(others))[-r.randrange(1, 20) :]
        elif what == 7 and len(case[at][2]) > 1:  # in two pieces
            number, _, data = case[at]
            cut = r.randrange(1, len(data))
            case[at : at + 1] = [(number, "send", data[:cut]), (number, "send", data[cut:])]
        elif what == 8:  # as if in one piece
            number = case[at][0]
            if at + 1 < len(case) and case[at + 1][:2] == (number, "send") and case[at][1] == "send":
                case[at : at + 2] = [(number, "send", (case[at][2] + case[at + 1][2])[:MAX_SEND_BYTES])]
        else:  # lost, and back
            number = case[at][0]
            opening = [(number, "open", b"")]
            hello = next((data for n, verb, data in case if n == number and verb == "send"), b"")
            case[at:at] = [(number, r.choice(["close", "reset"]), b"")] + opening + [(number, "send", hello)]
    return case[:MAX_ACTIONS]


def packets(held):
    """Takes whole packets off the front of these bytes."""
    while len(held) >= 2:
        length, shift, at = 0, 0, 1
        while at < len(held) and at < 5:
            length |= (held[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if held[at - 1] < 128:
                break
        if held[at - 1] >= 128 or len(held) < at + length:
            return
        first, body = held[0], bytes(held[at : at + length])
        del held[: at + length]
        yield first, body


def property_ids(body, at):
    """Which properties there are, and where what follows them begins."""
    length, shift = 0, 0
    while at < len(body):
        length |= (body[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if body[at - 1] < 128:
            break
    end, found = at + length, set()
    while at < end:
        kind = body[at]
        found.add(kind)
        at += 1
        if kind in (0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A):
            at += 1
        elif kind in (0x13, 0x21, 0x22, 0x23):
            at += 2
        elif kind in (0x02, 0x11, 0x18, 0x27):
            at += 4
        elif kind == 0x0B:
            while body[at] > 127:
                at += 1
            at += 1
        else:
            for _ in range(2 if kind == 0x26 else 1):
                at += 2 + struct.unpack_from(">H", body, at)[0]
    return "".join(f" {kind:02x}" for kind in sorted(found)), end


def token(version, first, body):
    """An answer in short: its type, its codes, and apart from these which properties it has."""
    kind, five = first >> 4, version == 5
    if kind == 2:
        return f"connack {body[0]} {body[1]:02x}", property_ids(body, 2)[0] if five else ""
    if kind == 3:
        topic = 2 + struct.unpack_from(">H", body)[0]
        return f"publish {first & 15:x}", property_ids(body, topic + (2 if first & 6 else 0))[0] if five else ""
    if kind in (4, 5, 6, 7):
        return f"{kind} {body[2] if len(body) > 2 else 0:02x}", ""
    if kind in (9, 11):
        codes = body[property_ids(body, 2)[1] :] if five else body[2:]
        return f"{kind} {bytes(sorted(set(codes))).hex()}", ""
    if kind == 14:
        return f"disconnect {body[0] if body else 0:02x}", property_ids(body, 1)[0] if len(body) > 1 else ""
    return f"{kind}", ""


class Connection:
    """One connection of a case, and what it was answered."""

    def __init__(self, address):
        self.sock = socket.create_connection(address, timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.version, self.said, self.held, self.tokens, self.end = None, bytearray(), bytearray(), [], None
        self.kinds, self.seen = [], set()

    def send(self, data, retained):
        if self.end:
            return
        if self.version is None and len(data) > 8 and data[0] == 0x10:
            at = data.find(b"MQTT")
            self.version = data[at + 4] if 0 < at < len(data) - 4 else 0
        self.said += data
        for first, body in packets(self.said):
            self.kinds.append(first >> 4)
            if first & 0xF1 == 0x31 and len(body) > 2:
                retained.add(body[2 : 2 + struct.unpack_from(">H", body)[0]])
        try:
            self.sock.send(data)
        except BlockingIOError:
            pass
        except OSError:
            self.end = self.end or "reset"

    def read(self):
        """Takes what there is; gives whether there was something."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return False
        except OSError:
            self.end = "reset"
            return True
        if not data:
            self.end = "closed"
            return True
        self.held += data
        for first, body in packets(self.held):
            try:
                short, properties = token(self.version, first, body)
            except (IndexError, struct.error):
                # What was sent as CONNECT was none, or of no version that is known here.
                short, properties = f"{first >> 4}?", ""
            if properties:
                self.seen.add(f"{short.split()[0]} has{properties}")
            if self.kinds:
                self.seen.add(f"{self.version}: {self.kinds[-1]} then {short}")
            if not self.tokens or self.tokens[-1] != short:
                self.tokens.append(short)
        return True


ANSWERED = {1, 3, 6, 8, 10, 12}


def pump(connections, seconds, until=None):
    """Reads until nothing comes for so long, or until one connection was answered."""
    while True:
        open_ones = {c.sock: c for c in connections if c.sock.fileno() >= 0 and not c.end}
        if not open_ones or (until is not None and until.end):
            return
        ready, _, _ = select.select(list(open_ones), [], [], seconds)
        if not ready:
            return
        for sock in ready:
            open_ones[sock].read()
        if until is not None and until.sock in ready:
            return


class Target:
    """The server, and how cases are run against it."""

    def __init__(self, address, metrics):
        self.address, self.metrics_url, self.runs, self.sent_bytes, self.sent = address, metrics, 0, 0, 0

    def own(self):
        """Four characters that no other case has had."""
        digits, number = "0123456789abcdefghijklmnopqrstuvwxyz", self.runs % 36**4
        return "".join(digits[number // 36**i % 36] for i in (3, 2, 1, 0)).encode()

    def run(self, case):
        """Runs a case; gives the behaviours it has shown."""
        self.runs += 1
        own, now, past, retained = self.own(), {}, [], set()
        for number, verb, data in case:
            connection = now.get(number)
            if verb == "open":
                if connection is None:
                    now[number] = Connection(self.address)
            elif connection is None:
                continue
            elif verb == "send":
                connection.send(data.replace(OWN, own), retained)
                self.sent_bytes, self.sent = self.sent_bytes + len(data), self.sent + 1
                waits = bool(connection.kinds) and connection.kinds[-1] in ANSWERED
                pump(now.values(), 0.03 if waits else 0, connection if waits else None)
            else:
                pump(now.values(), 0)
                past.append(now.pop(number))
                connection.end = connection.end or f"we {verb}"
                if verb == "reset":
                    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sock.close()
        pump(now.values(), 0.012)
        for connection in now.values():
            connection.end = connection.end or "open"
            connection.sock.close()
        if retained:
            self.clear(retained)
        return behaviours(past + list(now.values()))

    def clear(self, topics):
        """Nothing retained is left for the next case."""
        try:
            with socket.create_connection(self.address, timeout=10) as sock:
                sock.sendall(packet(0x10, binary(b"MQTT") + b"\x04\x02\x00\x3c" + binary(b"clears")))
                for topic in topics:
                    sock.sendall(packet(0x31, binary(topic)))
                sock.sendall(b"\xe0\x00")
                while sock.recv(4096):
                    pass
        except OSError:
            # A topic that is none ends this connection; whether the server is well is asked otherwise.
            pass

    def counters(self):
        """All counters and what they stand at."""
        with urllib.request.urlopen(self.metrics_url, timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        series = (line.rsplit(" ", 1) for line in lines if "_total" in line and not line.startswith("#"))
        return {name: float(value) for name, value in series}

    def moved(self, cases):
        """Which counters these cases move. Slow: shards add up once a second."""
        time.sleep(1.2)
        before = self.counters()
        for case in cases:
            self.run(case)
        time.sleep(1.2)
        return {name for name, value in self.counters().items() if value > before.get(name, 0)}


def behaviours(connections):
    """What can be seen of a case: what answers follow each other on a connection, of which version, how it ended, what
    came after what, and which properties answers have."""
    seen = set()
    for c in connections:
        line = ["begin"] + c.tokens + [c.end or "open"]
        seen |= {f"{c.version}: {a}, {b}" for a, b in zip(line, line[1:])} | c.seen
    return seen


def shortest(target, case, wanted):
    """The same with everything left out that these behaviours do not need; none if they do not come reliably."""
    wanted = wanted & target.run(case) & target.run(case)
    if not wanted:
        return None, wanted
    size = len(case) // 2
    while size:
        at = 0
        while at < len(case):
            fewer = case[:at] + case[at + size :]
            if fewer and wanted <= target.run(fewer):
                case = fewer
            else:
                at += size
        size //= 2
    return case, wanted


def write(case, directory, moves=()):
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"# moves {name}" for name in sorted(moves)]
    lines += [f"{number} {verb} {data.hex()}".rstrip() for number, verb, data in case]
    raw = ("\n".join(lines) + "\n").encode()
    path = directory / hashlib.sha1(raw).hexdigest()[:16]
    path.write_bytes(raw)
    return path


def load(directory):
    """All cases of a directory, with the counters that they are known to move."""
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        lines = path.read_text().splitlines()
        parts = [line.split() for line in lines if not line.startswith("#")]
        case = [(int(p[0]), p[1], bytes.fromhex(p[2]) if len(p) > 2 else b"") for p in parts]
        found.append((case, [line[8:] for line in lines if line.startswith("# moves ")]))
    return found


def merge(target, corpus, source):
    """Leaves in the corpus the fewest cases of both that show all there is to see, up to its limits."""
    cases = load(corpus) + load(source)
    shown = []
    for case, moves in cases:
        # What comes every time, so that the next run sees it, too.
        again = target.run(case) & target.run(case) & target.run(case)
        shown.append((sum(len(data) for _, _, data in case), again | {f"moves {name}" for name in moves}, case, moves))
    shown.sort(key=lambda one: one[0])
    everything = set().union(*(one[1] for one in shown)) if shown else set()
    left, chosen = set(everything), []
    while left and len(chosen) < MAX_FILES:
        best = max(shown, key=lambda one: len(one[1] & left) / (200 + one[0]))
        if not best[1] & left:
            break
        chosen.append(best)
        left -= best[1]
    for path in corpus.iterdir() if corpus.is_dir() else []:
        path.unlink()
    total = 0
    for _, _, case, moves in chosen:
        path = write(case, corpus, moves)
        total += path.stat().st_size
        if total > MAX_BYTES:
            path.unlink()
            break
    print(f"{len(chosen)} cases of {len(cases)} show {len(everything) - len(left)} of {len(everything)} behaviours, {total} bytes")


def receive(sock, kind, deadline, held=None):
    """The next packet of this kind; others are passed over."""
    held = bytearray() if held is None else held
    while time.monotonic() < deadline:
        for first, body in packets(held):
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


def fuzz(target, options):
    began = time.monotonic()
    corpus = load(options.corpus)
    if not corpus and not options.keep:
        sys.exit(f"there is no corpus in {options.corpus}")
    r, seen, known = random.Random(options.seed), set(), {name for _, moves in corpus for name in moves}
    pool, recent, kept, counters = [case for case, _ in corpus], [], 0, target.counters()
    waiting = [case for case, _ in corpus]
    # What behaves in a new way only now and then is not chased for ever.
    flighty = {}

    def batch(cases):
        nonlocal kept
        for case in cases:
            new = target.run(case) - seen
            seen.update(new)
            if not new or case in pool:
                continue
            if options.keep:
                case, reliable = shortest(target, case, new)
                for one in new - reliable:
                    flighty[one] = flighty.get(one, 0) + 1
                    if flighty[one] < 3:
                        seen.discard(one)
                if case is None:
                    continue
                write(case, options.keep)
            kept += 1
            pool.append(case)

    while waiting or time.monotonic() - began < options.seconds:
        cases, waiting = waiting[:BATCH], waiting[BATCH:]
        replayed = bool(cases)
        while len(cases) < BATCH and not replayed:
            cases.append(make(r) if not pool or r.random() < 0.25 else mutate(r, r.choice(pool), pool))
        try:
            batch(cases)
            honest(target.address, target.runs)
            now = target.counters()
        except (OSError, AssertionError) as error:
            paths = [str(write(case, options.failed)) for case in cases]
            sys.exit(f"{error!r} after these cases: {' '.join(paths)}")
        moved = {name for name, value in now.items() if value > counters.get(name, 0)} - known
        counters, recent = now, recent[-1:] + [cases]
        known |= moved
        for name in moved if options.keep and not replayed else ():
            some = [case for cases in recent for case in cases]
            while len(some) > 1:
                half = some[: len(some) // 2]
                some = half if name in target.moved(half) else some[len(half) :]
            if name in target.moved(some):
                write(some[0], options.keep, [name])
                pool.append(some[0])
    print(f"{len(corpus)} cases of the corpus and {target.runs} runs in all ({target.sent} sends, {target.sent_bytes} bytes): "
          f"{len(seen)} behaviours, {len(known)} counters moved, {kept} new cases")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("server")
    parser.add_argument("metrics")
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=pathlib.Path)
    parser.add_argument("--merge", type=pathlib.Path)
    parser.add_argument("--failed", type=pathlib.Path, default=pathlib.Path("failed-sessions"))
    options = parser.parse_args()
    host, port = options.server.rsplit(":", 1)
    target = Target((host, int(port)), options.metrics)
    if options.merge:
        merge(target, options.corpus, options.merge)
    else:
        fuzz(target, options)


main()
