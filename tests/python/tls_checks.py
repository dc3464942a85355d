"""Clients over TLS: `tls_checks.py CHECK HOST PORT CA [CERTIFICATE KEY]`; prints "ok CHECK"."""

import queue
import socket
import ssl
import struct
import sys

TIMEOUT = 15


def paho():
    """paho-mqtt publishes to itself, with both versions."""
    import paho.mqtt.client as mqtt

    for version in (mqtt.MQTTv311, mqtt.MQTTv5):
        got = queue.Queue()
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=f"paho-{version}", protocol=version)
        client.tls_set(ca_certs=CA, certfile=CERTIFICATE, keyfile=KEY)
        client.on_connect = lambda c, *_: c.subscribe("tls/paho", qos=1)
        client.on_subscribe = lambda c, *_: c.publish("tls/paho", b"x" * 100_000, qos=1)
        client.on_message = lambda c, _, message: got.put(message.payload)
        client.connect(HOST, PORT)
        client.loop_start()
        assert got.get(timeout=TIMEOUT) == b"x" * 100_000
        client.disconnect()
        client.loop_stop()


def behind_a_proxy():
    """A PROXY header in the clear, then TLS; header and ClientHello in one piece, and byte by byte."""
    header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack(">H", 12)
    header += socket.inet_aton("192.0.2.77") + socket.inet_aton("127.0.0.1") + struct.pack(">HH", 4711, 8883)
    context = ssl.create_default_context(cafile=CA)
    for piece in (100_000, 1):
        raw = socket.create_connection((HOST, PORT), timeout=TIMEOUT)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname=HOST)

        def step(action, first=b""):
            while True:
                try:
                    result = action()
                    break
                except ssl.SSLWantReadError:
                    result = None
                send(first + outgoing.read())
                first = b""
                data = raw.recv(65536)
                assert data, "closed"
                incoming.write(data)
            send(outgoing.read())
            return result

        def send(data):
            for at in range(0, len(data), piece):
                raw.sendall(data[at : at + piece])

        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        step(tls.do_handshake, header)
        body = b"\0\4MQTT\4\2\0\x3c" + struct.pack(">H", 7) + b"proxied"
        step(lambda: tls.write(b"\x10" + bytes([len(body)]) + body))
        answer = step(lambda: tls.read(4))
        assert answer == b"\x20\x02\0\0", answer
        if piece == 1:
            print("connected", flush=True)
            sys.stdin.readline()


if __name__ == "__main__":
    name, HOST, PORT, CA = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    CERTIFICATE, KEY = (sys.argv[5:7] + [None, None])[:2]
    globals()[name]()
    print(f"ok {name}")
