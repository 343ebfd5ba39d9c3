"""What every test gets: a home of its own, a scripted upstream, a real gateway, and clients for it.

home          temporary AI_ZERO_TOKEN_HOME, CODEX_HOME and HOME; autouse
upstream      the scripted backend (fake_upstream.py), fresh for each test
gateway       a running `azt start` with one imported account, pointed at `upstream`; shared
new_gateway   start one more, for tests that change its state or need other settings
client        HTTP calls to `gateway`
openai_client the official library, pointed at `gateway`
claim         counts what a claim of the table in `python3 tests --trust` was tried with
many          how often a test tries: a sample, or the full count with `--trust`
ports         the two callback ports of a sign-in are this test's, and free
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream
from harness import Claim, Client, Gateway, home_variables, is_foreign, make_gateway
from hypothesis import HealthCheck, settings

# A property holds or it does not, however slow the machine is.
settings.register_profile("azt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("azt")


# -- The claims of `python3 tests --trust` ---------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trust", action="store_true", help="full counts; only tests with a claim")
    parser.addoption("--claims", metavar="FOLDER", help="where each worker leaves its counts")


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    if config.getoption("--trust"):
        chosen = [item for item in items if "claim" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
        for item in items:
            item.add_marker(pytest.mark.timeout(3600))


CLAIMS = pytest.StashKey[list[Claim]]()


@pytest.fixture
def claim(request: pytest.FixtureRequest) -> Iterator[Callable[[int, str], Claim]]:
    """`claim(7, "killed at every system call")`: row of the numbers to show, and what was tried."""
    own: list[Claim] = []

    test = request.node.nodeid.partition("[")[0].removeprefix("tests/")

    def start(row: int, text: str) -> Claim:
        own.append(Claim(row, text, test))
        return own[-1]

    yield start
    request.config.stash.setdefault(CLAIMS, []).extend(own)
    for one in own:
        assert one.tried, f"nothing was tried for {one.text!r}"
        assert not one.wrong, f"{len(one.wrong)} of {one.tried} wrong, the first: {one.wrong[:3]}"


@pytest.fixture
def many(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`many(20, 1000)`: 20 in the daily run, 1,000 with `--trust`."""
    full = request.config.getoption("--trust")
    return lambda sample, all_of_them: all_of_them if full else sample


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder, claims = session.config.getoption("--claims"), session.config.stash.get(CLAIMS, [])
    if folder and claims:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        counts = [
            [one.row, one.text, one.tried, len(one.wrong), one.notes, one.test] for one in claims
        ]
        Path(folder, f"{worker}.json").write_text(json.dumps(counts))


# -- Homes and gateways ----------------------------------------------------------------------------


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


@pytest.fixture(scope="session")
def quiet_upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(request: pytest.FixtureRequest) -> FakeUpstream:
    """One that no other gateway calls: a shared one asks for quotas now and then, by itself."""
    is_shared = "shared_upstream" in request.fixturenames  # by a gateway of more than this test
    chosen: FakeUpstream = request.getfixturevalue(
        "shared_upstream" if is_shared else "quiet_upstream"
    )
    chosen.reset()
    return chosen


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


@pytest.fixture
def ports() -> Iterator[None]:
    """They are fixed, for the issuer knows no others: tests of all workers take turns."""
    with open(os.path.join(tempfile.gettempdir(), "azt-test-callback-ports"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
