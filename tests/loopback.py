"""A raw server on loopback that does exactly what a test's script says, byte by byte.

with Server(answer(b"hi"), hang) as server:      # the first connection, then every other
    ...
    server.requests                              # what came in, head and body
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable

Script = Callable[["Peer"], None]

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def sized(body: bytes, status: str = "200 OK", head: bytes = b"") -> bytes:
    """A whole response with a Content-Length."""
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (
        status.encode(),
        head,
        len(body),
        body,
    )


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Peer:
    """The server's side of one connection."""

    def __init__(self, sock: socket.socket, server: Server) -> None:
        self.sock = sock
        self.server = server
        self._buffer = b""

    def read_request(self) -> bytes:
        """One request with its body, as it came; b"" when the client closed instead."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._more():
                return b""
        head, _, body = self._buffer.partition(b"\r\n\r\n")
        length = next(
            (
                int(line[15:])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length:")
            ),
            0,
        )
        while len(body) < length:
            assert self._more(), "the client left in the middle of its body"
            body = self._buffer.partition(b"\r\n\r\n")[2]
        self._buffer = body[length:]
        self.server.requests.append(head + b"\r\n\r\n" + body[:length])
        return self.server.requests[-1]

    def _more(self) -> bool:
        data = self.sock.recv(65536)
        self._buffer += data
        return bool(data)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def wait_closed(self) -> None:
        """Until the client has closed its side."""
        while self.sock.recv(65536):
            pass

    def reset(self) -> None:
        """Close with a reset instead of an orderly end."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def answer(response: bytes) -> Script:
    """Answer every request of the connection with these bytes."""

    def script(peer: Peer) -> None:
        while peer.read_request():
            peer.send(response)

    return script


def once(response: bytes) -> Script:
    """Answer one request with these bytes, then close."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(response)

    return script


def hang(peer: Peer) -> None:
    """Read what comes and never answer."""
    peer.wait_closed()


class Server:
    """Runs the scripts in the order of the connections; the last one serves all that follow."""

    def __init__(self, *scripts: Script, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self._scripts = scripts
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.scheme = "https" if tls else "http"
        self.url = f"{self.scheme}://127.0.0.1:{self.port}"
        self.connections = 0
        self.requests: list[bytes] = []
        self.errors: list[BaseException] = []
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Server:
        self._threads[0].start()
        return self

    def __exit__(self, *error: object) -> None:
        socket.socket.shutdown(self._listener, socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(10)
        if self.errors and error[0] is None:
            raise self.errors[0]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            script = self._scripts[min(self.connections, len(self._scripts) - 1)]
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(sock, script), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, script: Script) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socks.append(sock)
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
                self._socks.append(sock)
            script(Peer(sock, self))
        except OSError:
            pass  # the client left, or the test is over
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self.errors.append(error)
        finally:
            sock.close()


class Tee:
    """Stands in front of a server on loopback: passes each byte on, and keeps what clients sent."""

    def __init__(self, url: str) -> None:
        self._target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sent: list[bytearray] = []
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def posts(self, path: str) -> list[bytes]:
        """The bodies of the POST requests to a path, connection by connection."""
        found = []
        for sent in self._sent:
            rest = bytes(sent)
            while rest:
                head, _, rest = rest.partition(b"\r\n\r\n")
                fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
                length = int(fields.get(b"content-length", b"0"))
                if head.startswith(f"POST {path} ".encode()):
                    found.append(rest[:length])
                rest = rest[length:]
        return found

    def __enter__(self) -> Tee:
        self._threads[0].start()
        return self

    def __exit__(self, *error: object) -> None:
        socket.socket.shutdown(self._listener, socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(10)
        for sock in self._socks:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._socks += [client, server]
            self._sent.append(bytearray())
            for pair in ((client, server, self._sent[-1]), (server, client, bytearray())):
                for sock in pair[:2]:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._threads.append(threading.Thread(target=_copy, args=pair, daemon=True))
                self._threads[-1].start()


def _copy(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            kept += data
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class Internet(Server):
    """All hosts there are, as a proxy: every tunnel ends in TLS and then in one server's hands."""

    def __init__(self, url: str, tls: ssl.SSLContext) -> None:
        super().__init__(self._tunnel)
        self._target, self._certificates = ("127.0.0.1", int(url.rpartition(":")[2])), tls
        self.called: set[str] = set()

    def _tunnel(self, peer: Peer) -> None:
        self.called.add(peer.read_request().split(b" ")[1].decode())
        peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        secure = self._certificates.wrap_socket(peer.sock, server_side=True)
        self._socks.append(secure)
        with secure, socket.create_connection(self._target) as plain:
            other: dict[socket.socket, socket.socket] = {secure: plain, plain: secure}
            while True:
                ready = [secure] if secure.pending() else select.select([*other], [], [])[0]
                for source in ready:
                    data = source.recv(65536)
                    if not data:
                        return
                    other[source].sendall(data)
