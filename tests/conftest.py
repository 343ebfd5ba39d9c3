"""What every test gets: a home of its own, a scripted upstream, a real gateway, and clients for it.

home          temporary AI_ZERO_TOKEN_HOME, CODEX_HOME and HOME; autouse
upstream      the scripted backend (fake_upstream.py), fresh for each test
gateway       a running `azt start` with one imported account, pointed at `upstream`; shared
new_gateway   start one more, for tests that change its state or need other settings
client        HTTP calls to `gateway`
openai_client the official library, pointed at `gateway`
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream
from harness import Client, Gateway, home_variables, is_foreign, make_gateway
from hypothesis import HealthCheck, settings

# A property holds or it does not, however slow the machine is.
settings.register_profile("azt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("azt")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    for name in [name for name in os.environ if is_foreign(name)]:
        monkeypatch.delenv(name)
    for name, value in home_variables(folder).items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture(scope="session")
def shared_upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="session")
def shared_gateway(
    shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = make_gateway(tmp_path_factory.mktemp("gateway"), shared_upstream)
    yield gateway
    gateway.stop()


@pytest.fixture
def upstream(shared_upstream: FakeUpstream) -> FakeUpstream:
    shared_upstream.reset()
    return shared_upstream


@pytest.fixture
def gateway(upstream: FakeUpstream, shared_gateway: Gateway) -> Iterator[Gateway]:
    logged = len(shared_gateway.log())
    yield shared_gateway
    assert shared_gateway.process.poll() is None, shared_gateway.log()[logged:]
    assert "Traceback" not in shared_gateway.log()[logged:], shared_gateway.log()[logged:]


@pytest.fixture
def new_gateway(home: Path, upstream: FakeUpstream) -> Iterator[Callable[..., Gateway]]:
    """Call it (arguments of `make_gateway`) for a gateway in this test's own home."""
    started: list[Gateway] = []

    def start(**how: Any) -> Gateway:
        gateway = make_gateway(home, how.pop("upstream", upstream), **how)
        started.append(gateway)
        return gateway

    yield start
    for gateway in started:
        gateway.stop()
        assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture
def client(gateway: Gateway) -> Client:
    return Client(gateway.url)


@pytest.fixture
def openai_client(gateway: Gateway) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any key") as library:
        yield library
