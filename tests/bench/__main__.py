"""How fast azt is, next to the same upstream directly and to relays that happen to be installed.

    python tests/bench [--quick] [--rounds N] [--only NAME]

Prints a table of medians and asserts nothing. Every round measures each program in turn, so that a
busy minute of the machine hits all of them; still trust ratios and processor time more than single
latencies. nginx (which only passes bytes) and an aiohttp relay take part where they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from programs import (
    CHAT,
    COMPACT,
    MIB,
    TURN,
    Program,
    ask_once,
    chat_body,
    clean_environment,
    codex_body,
    installed_gateways,
    load_command,
    prepare,
    start,
    write_request,
)

Numbers = dict[str, float | None]


@dataclass(frozen=True)
class Sizes:
    rounds: int = 5
    first_tokens: int = 300
    seconds: int = 3
    slow_streams: int = 500
    slow_deltas: int = 200
    body_mib: int = 128
    compact_mib: int = 256
    body_rounds: int = 3


QUICK = Sizes(
    rounds=1,
    first_tokens=100,
    seconds=1,
    slow_streams=200,
    slow_deltas=60,
    body_mib=32,
    compact_mib=64,
    body_rounds=1,
)
RAMP_MS = 2
SLOW_GAP_MS = 50
REPLY_DELTAS = 1000
CONNECTIONS = 16
SLACK_MS = 1000

# key, what it says, format. The keys are those that the scenarios fill.
ROWS = [
    ("cold_s", "cold start to the first answer, s", ".2f"),
    ("idle_mib", "idle memory, MiB", ".1f"),
    ("ttft_p50_ms", "time to first token p50, ms", ".2f"),
    ("added_p50_ms", "  added to direct, ms", ".2f"),
    ("ttft_p99_ms", "time to first token p99, ms", ".2f"),
    ("added_p99_ms", "  added to direct, ms", ".2f"),
    ("chat_per_s", "chat events/s, 16 connections", ",.0f"),
    ("chat_cpu_ms", "  CPU ms per 1,000 events", ".2f"),
    ("short_per_s", "short replies/s, 16 connections", ",.0f"),
    ("short_cpu_ms", "  CPU ms per reply", ".2f"),
    ("slow_complete", "slow streams complete", ",.0f"),
    ("slow_kept", "  deltas kept, % of offered", ".2f"),
    ("slow_lost", "  deltas lost or reordered", ",.0f"),
    ("slow_lag_p50_ms", "  lag p50, ms", ".2f"),
    ("slow_lag_p99_ms", "  lag p99, ms", ".2f"),
    ("slow_cpu_us", "  CPU us per event", ".1f"),
    ("slow_kib", "  memory per open stream, KiB", ".1f"),
    ("peak_mib", "peak memory so far, MiB", ".1f"),
    ("body_s", "large chat body, s", ".2f"),
    ("body_times", "  peak memory over idle, x body", ".2f"),
    ("body_gap_ms", "  longest gap of a parallel stream, ms", ".0f"),
    ("relay_p50_ms", "Codex relay: time to first token p50, ms", ".2f"),
    ("relay_added_ms", "  added to direct, ms", ".2f"),
    ("relay_per_s", "Codex relay: events/s, 16 connections", ",.0f"),
    ("relay_cpu_ms", "  CPU ms per 1,000 events", ".2f"),
    ("compact_s", "Codex relay: large compaction, s", ".2f"),
    ("compact_times", "  peak memory over idle, x body", ".2f"),
    ("loop_us", "recording a request, on the loop, us", ".1f"),
    ("record_us", "recording a request, in a thread, us", ".0f"),
    ("load_s", "start with a history of 10^6 requests, s", ".3f"),
    ("pick_us", "pick of 300 accounts, the serving one empty, us", ".0f"),
]


@dataclass
class Bench:
    folder: Path
    load: list[str]
    sizes: Sizes
    upstream: Program
    launches: int = 0
    programs: list[Program] = field(default_factory=list)

    def launch(self, name: str) -> Program:
        self.launches += 1
        return prepare(name, self.folder / f"{name}-{self.launches}", self.upstream).start()

    def client(
        self, program: Program, body: bytes, target: str = CHAT, **options: int
    ) -> subprocess.Popen[str]:
        """Start the load client against a program; `numbers` waits for what it measured."""
        request = self.folder / f"request-{program.name}-{len(body)}"
        write_request(request, program.port, body, target)
        words = [f"{name}={value}" for name, value in options.items()]
        command = [*self.load, "client", str(program.port), str(request), *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def numbers(client: subprocess.Popen[str]) -> dict[str, float]:
    output, _ = client.communicate()
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def measure_cold_start(bench: Bench, program: Program) -> Numbers:
    """A process and a home of its own each time."""
    if not program.own:
        return {}
    bench.launches += 1
    folder = bench.folder / f"{program.name}-{bench.launches}"
    launch = prepare(program.name, folder, bench.upstream)
    begun = time.perf_counter()
    fresh = launch.start()
    ask_once(fresh)
    cold_s = time.perf_counter() - begun
    idle_mib = fresh.memory_mib()
    fresh.stop()
    return {"cold_s": cold_s, "idle_mib": idle_mib}


def measure_first_token(bench: Bench, program: Program) -> Numbers:
    body = chat_body("bench n=3 gap_ms=2 size=24", stream=True)
    measured = numbers(bench.client(program, body, requests=bench.sizes.first_tokens, expect=3))
    return {"ttft_p50_ms": measured["ttft_p50_ms"], "ttft_p99_ms": measured["ttft_p99_ms"]}


def measure_chat(bench: Bench, program: Program) -> Numbers:
    body = chat_body(f"bench n={REPLY_DELTAS} gap_ms=0 size=24", stream=True)
    before = program.cpu_s()
    client = bench.client(
        program, body, connections=CONNECTIONS, seconds=bench.sizes.seconds, expect=REPLY_DELTAS
    )
    measured = numbers(client)
    used = difference(program.cpu_s(), before)
    deltas = max(1.0, measured["deltas"])
    return {
        "chat_per_s": measured["deltas"] / max(0.001, measured["seconds"]),
        "chat_cpu_ms": scaled(used, 1e6 / deltas),
    }


def measure_short(bench: Bench, program: Program) -> Numbers:
    body = chat_body("bench n=8 gap_ms=0 size=24")
    before = program.cpu_s()
    client = bench.client(
        program, body, connections=CONNECTIONS, seconds=bench.sizes.seconds, expect=1
    )
    measured = numbers(client)
    used = difference(program.cpu_s(), before)
    return {
        "short_per_s": measured["requests"] / max(0.001, measured["seconds"]),
        "short_cpu_ms": scaled(used, 1000 / max(1.0, measured["requests"])),
    }


def measure_slow(bench: Bench, program: Program) -> Numbers:
    """Many streams at the pace of a model; `kept` are the deltas that came in the time planned."""
    sizes = bench.sizes
    body = chat_body(f"bench n={sizes.slow_deltas} gap_ms={SLOW_GAP_MS} size=24", stream=True)
    lasts_ms = sizes.slow_streams * RAMP_MS + sizes.slow_deltas * SLOW_GAP_MS
    cpu_before, memory_before = program.cpu_s(), program.memory_mib()
    client = bench.client(
        program,
        body,
        connections=sizes.slow_streams,
        requests=sizes.slow_streams,
        expect=sizes.slow_deltas,
        ramp_ms=RAMP_MS,
        window_ms=lasts_ms + SLACK_MS,
    )
    time.sleep((sizes.slow_streams * RAMP_MS + lasts_ms) / 2000)  # all are open, none has ended
    memory = difference(program.memory_mib(), memory_before)
    measured = numbers(client)
    deltas = max(1.0, measured["deltas"])
    return {
        "slow_complete": measured["requests"],
        "slow_kept": 100 * measured["kept"] / (sizes.slow_streams * sizes.slow_deltas),
        "slow_lost": measured["lost"] + measured["reordered"],
        "slow_lag_p50_ms": measured["lag_p50_ms"],
        "slow_lag_p99_ms": measured["lag_p99_ms"],
        "slow_cpu_us": scaled(difference(program.cpu_s(), cpu_before), 1e6 / deltas),
        "slow_kib": scaled(memory, 1024 / sizes.slow_streams),
        "peak_mib": program.peak_mib(),
    }


def measure_body(bench: Bench, program: Program) -> Numbers:
    """One large request beside one stream of a delta each 10 ms."""
    size = bench.sizes.body_mib * MIB
    slow = chat_body("bench n=6000 gap_ms=10 size=24", stream=True)
    large = chat_body("bench n=4 gap_ms=0 size=24", padded_to=size)
    program.forget_peak()
    beside = bench.client(program, slow, requests=1)
    time.sleep(0.5)
    measured = numbers(bench.client(program, large, requests=1, expect=1))
    time.sleep(0.2)
    beside.terminate()
    gap_ms = numbers(beside)["gap_max_ms"]
    grown = difference(program.peak_mib(), program.idle_mib)
    return {
        "body_s": measured["took_p50_ms"] / 1000 if measured["requests"] else None,
        "body_times": scaled(grown, MIB / size),
        "body_gap_ms": gap_ms,
    }


PICK = """
import azt, timeit
accounts = {}
for n in range(300):
    one = accounts[f"acc_{n}"] = azt.Account(f"acc_{n}", "", "", "", "", cooldown_until=n)
    window = {"key": "primary", "minutes": 300, "used": n / 3, "resets_at": 2_000_000_000}
    azt.learn_quota(one, {"windows": [window], "captured_at": 1})
rules = azt.Rules(True, before_percent=3)
pick = lambda: azt.pick_account(accounts, 299.5, rules, ("acc_299",))
assert pick().id == "acc_0"
print(min(timeit.repeat(pick, number=5, repeat=200)) / 5 * 1e6)
"""


def measure_pick(bench: Bench, program: Program) -> Numbers:
    """The choice alone, in a process of its own."""
    if program.name != "azt":
        return {}
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", PICK]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return {"pick_us": float(done.stdout)}


USAGE = """
import azt, pathlib, tempfile, time, timeit
def records(day, count):
    for n in range(count):
        one = azt.RequestRecord(f"req_{n}", "POST", "/", 0.0, time.time() - day * 86400)
        one.route, one.model, one.client = "/v1/responses", f"model-{n % 3}", f"client-{n % 3}"
        one.account_id, one.attempts, one.total_ms, one.ttft_ms = f"acc_{n % 4}", 1, n, n % 500
        one.status, one.result = 200, "ok"
        one.usage = {"input_tokens": n, "output_tokens": 3, "total_tokens": n + 3}
        yield one
with tempfile.TemporaryDirectory() as folder:
    paths = azt.Paths(pathlib.Path(folder), pathlib.Path(folder, "codex"))
    azt.prepare_home(paths)
    usage = azt.UsageStats()
    for day in range(100):  # a million events
        usage.add(azt.Batch(records(day, 10_000)))
        lines, usage.pending = usage.pending, []
        usage.save(paths, lines, usage.snapshot() if day == 99 else ())
    load = timeit.timeit(lambda: azt.UsageStats().load(paths), number=1)
    batch = azt.Batch(records(0, 1000))
    on_loop = min(timeit.repeat(lambda: usage.add(batch), number=1, repeat=5))
    in_thread = min(timeit.repeat(lambda: azt.Batch(records(0, 1000)), number=1, repeat=5))
    print(on_loop * 1e3, in_thread * 1e3, load)
"""


def measure_usage(bench: Bench, program: Program) -> Numbers:
    """Recording and a history of 10^6 events, in a process of its own."""
    if program.name != "azt":
        return {}
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", USAGE]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    on_loop_us, in_thread_us, load_s = map(float, done.stdout.split())
    return {"loop_us": on_loop_us, "record_us": in_thread_us, "load_s": load_s}


def measure_relay(bench: Bench, program: Program) -> Numbers:
    """The passthrough of Codex: bytes in, the same bytes out."""
    if program.name == "aiohttp":  # it translates chat, nothing else
        return {}
    short, long = (
        codex_body(f"bench n={n} gap_ms={gap} size=24") for n, gap in ((3, 2), (1000, 0))
    )
    first = bench.client(program, short, TURN, requests=bench.sizes.first_tokens, expect=3)
    first_ms = numbers(first)["ttft_p50_ms"]
    before = program.cpu_s()
    many = {"connections": CONNECTIONS, "seconds": bench.sizes.seconds, "expect": REPLY_DELTAS}
    measured = numbers(bench.client(program, long, TURN, **many))
    used = difference(program.cpu_s(), before)
    deltas = max(1.0, measured["deltas"])
    return {
        "relay_p50_ms": first_ms,
        "relay_per_s": measured["deltas"] / max(0.001, measured["seconds"]),
        "relay_cpu_ms": scaled(used, 1e6 / deltas),
    }


def measure_compact(bench: Bench, program: Program) -> Numbers:
    if program.name == "aiohttp":
        return {}
    size = bench.sizes.compact_mib * MIB
    # Its own memory only: the heap has grown in the scenarios before.
    fresh = bench.launch(program.name) if program.own else program
    if program.own:
        ask_once(fresh)
    idle_mib = fresh.memory_mib()
    fresh.forget_peak()
    body = codex_body("bench n=4 gap_ms=0 size=24", padded_to=size - 400)
    measured = numbers(bench.client(fresh, body, COMPACT, requests=1, expect=1))
    grown = difference(fresh.peak_mib(), idle_mib)
    if program.own:
        fresh.stop()
    return {
        "compact_s": measured["took_p50_ms"] / 1000 if measured["requests"] else None,
        "compact_times": scaled(grown, MIB / size),
    }


SCENARIOS: dict[str, Callable[[Bench, Program], Numbers]] = {
    "cold": measure_cold_start,
    "ttft": measure_first_token,
    "slow": measure_slow,
    "chat": measure_chat,
    "short": measure_short,
    "body": measure_body,
    "relay": measure_relay,
    "compact": measure_compact,
    "pick": measure_pick,
    "usage": measure_usage,
}
# Once the heap has grown it stays: only the first round sees what an open stream costs.
TAKE_HIGHEST = {"slow_kib", "peak_mib"}


def middle(key: str, values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    if not present:
        return None
    return max(present) if key in TAKE_HIGHEST else statistics.median(present)


def run(bench: Bench, names: Iterable[str]) -> dict[str, Numbers]:
    """All rounds of the named scenarios -> program name -> medians."""
    results: dict[str, Numbers] = {program.name: {} for program in bench.programs}
    for name in names:
        rounds: dict[str, list[Numbers]] = {program.name: [] for program in bench.programs}
        count = (
            min(bench.sizes.rounds, bench.sizes.body_rounds)
            if name in ("body", "compact")
            else bench.sizes.rounds
        )
        for number in range(count):
            for program in bench.programs:
                show_progress(f"{name} {number + 1}/{count} {program.name}")
                rounds[program.name].append(SCENARIOS[name](bench, program))
        for program in bench.programs:
            measured = rounds[program.name]
            for key in measured[0]:
                results[program.name][key] = middle(key, [one[key] for one in measured])
    show_progress("")
    sources = {"added_p50_ms": "ttft_p50_ms", "added_p99_ms": "ttft_p99_ms"}
    for key, source in {**sources, "relay_added_ms": "relay_p50_ms"}.items():
        for program in bench.programs[1:]:
            own, direct = results[program.name].get(source), results["direct"].get(source)
            results[program.name][key] = difference(own, direct)
    return results


def show_progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text:<30}\r")
        sys.stderr.flush()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def print_table(results: dict[str, Numbers]) -> None:
    names = list(results)
    others = [name for name in names if name != "azt"]
    heads = [*names, *(f"azt/{name}" for name in others)]
    say(f"{'':<40}" + "".join(f"{head:>13}" for head in heads))
    for key, title, form in ROWS:
        values = [results[name].get(key) for name in names]
        if all(value is None for value in values):
            continue
        own = results["azt"].get(key)
        ratios = [ratio(own, results[name].get(key)) for name in others]
        cells = [*("-" if value is None else format(value, form) for value in values), *ratios]
        say(f"{title:<40}" + "".join(f"{cell:>13}" for cell in cells))


def ratio(own: float | None, other: float | None) -> str:
    return f"{own / other:.2f}x" if own is not None and other else "-"


def parse_arguments() -> tuple[Sizes, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python tests/bench", description="Measure azt; asserts nothing."
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and one round, about 30 s"
    )
    parser.add_argument("--rounds", type=int, help="interleaved rounds (5)")
    parser.add_argument(
        "--only", choices=SCENARIOS, action="append", help="this scenario alone; may repeat"
    )
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    if options.rounds:
        sizes = Sizes(**{**vars(sizes), "rounds": options.rounds})
    return sizes, options.only or list(SCENARIOS)


def main() -> None:
    sizes, names = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="azt-bench-") as temporary:
        folder = Path(temporary)
        load = load_command(folder)
        upstream = start("direct", [*load, "upstream"], clean_environment())
        upstream.own = False
        bench = Bench(folder, load, sizes, upstream, programs=[upstream])
        try:
            for name in installed_gateways():
                bench.programs.append(program := bench.launch(name))
                ask_once(program)
                program.idle_mib = program.memory_mib()
            results = run(bench, names)
        finally:
            for program in bench.programs:
                program.stop()
    language = "Python (no C compiler: slow)" if load[-1].endswith(".py") else "C"
    say(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {sizes.rounds} rounds, "
        f"upstream and client in {language}; {sizes.slow_streams} slow streams of "
        f"{sizes.slow_deltas} deltas, body of {sizes.body_mib} MiB\n"
    )
    print_table(results)


if __name__ == "__main__":
    main()
