"""A gateway on all addresses, asked from the network: what its administration lets in.

python lan_callers.py own|shared FOLDER ADDRESS...
    starts a gateway in FOLDER, calls every route of the administration at each address (so that it
    is the peer's address too) with each forged header and the admin token, and prints a line
    [address, header, method, path, status, body] for each

own      behind `unshare -n`: the network is this process's own, and the addresses are added to it
shared   the addresses are those that the machine has
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from pathlib import Path

from fake_upstream import FakeUpstream
from harness import make_gateway

import azt

FORGED = {
    "Forwarded": "for=127.0.0.1;host=localhost",
    "X-Forwarded-For": "127.0.0.1",
    "X-Real-IP": "127.0.0.1",
    "Via": "1.1 localhost",
}
HOSTS = ("", "localhost:8787", "127.0.0.1")  # "": the address that is called


def add(address: str) -> None:
    kind = ("-6",) if ":" in address else ()
    size = "128" if ":" in address else "32"
    subprocess.run(["ip", *kind, "addr", "add", f"{address}/{size}", "dev", "lo"], check=True)


def say(value: object) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201


def main(folder: str, *addresses: str, own_network: bool) -> None:
    if own_network:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        for address in addresses:
            add(address)
    routes = [route for route in azt.ROUTES if route.access.startswith("admin")]
    with FakeUpstream() as upstream:
        gateway = make_gateway(
            Path(folder),
            upstream,
            arguments=("--host", "::", "--port", "0", "--log-level", "error"),
        )
        try:
            port = int(gateway.url.rpartition(":")[2])
            for address in addresses:
                connection = http.client.HTTPConnection(address, port, timeout=20)
                connection.connect()
                say(["peer", connection.sock.getsockname()[0]])
                for route in routes:
                    for name, value in FORGED.items():
                        for host in HOSTS:
                            headers = {**gateway.proof(), name: value}
                            headers |= {"Host": host} if host else {}
                            path = route.path.replace("{id}", "x1")
                            body = b"{}" if route.method not in ("GET", "DELETE") else None
                            headers |= {"Content-Type": "application/json"} if body else {}
                            connection.request(route.method, path, body, headers)
                            answer = connection.getresponse()
                            text = answer.read().decode()
                            say([address, name, route.method, path, answer.status, text])
                connection.close()
        finally:
            gateway.stop()


if __name__ == "__main__":
    main(*sys.argv[2:], own_network=sys.argv[1] == "own")
