"""`python3 tests`: prepare a private environment, then check format, lint, types and run the tests.

Arguments go to pytest, and then only pytest runs: `python3 tests -k stream`. With `--trust` the
tests that back a number of the README's claims run with their full counts, and a table ends it.
With `--soak [MINUTES]` nothing but a long run under load is made (tests/soak.py).
With `--screenshots` no test runs: every view of the console becomes a picture, to be looked at.

The environment lies in `.azt-test-env` in the checkout (ignored by git) and is made anew when
`pyproject.toml`, the Node packages below or the Python version change. Needs Python 3.11 with venv;
with npm the official Node libraries are installed too and their tests run. Nothing outside the
checkout changes, but for Debian packages that are missing when this runs as root (containers).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".azt-test-env"
BIN = ENVIRONMENT / "bin"
NODE = ENVIRONMENT / "node"
LITELLM = ENVIRONMENT / "litellm"

LITELLM_PACKAGE = "litellm[mcp]>=1.100,<2"
NODE_PACKAGES = {
    "@ai-sdk/openai": "^4",
    "@ai-sdk/openai-compatible": "^3",
    "@openai/codex": "^0.169",
    "ai": "^7",
    "axe-core": "^4",
    "openai": "^7",
    "zod": "^4",
}

CHECKS = {
    "format": ["ruff", "format", "--check", "--output-format", "concise", "."],
    "lint": ["ruff", "check", "--output-format", "concise", "."],
    "types": ["mypy", "--strict", "azt.py"],
}


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever `python3` is here runs this file
        say(f"azt needs Python 3.11 or newer; this is {sys.version.split()[0]}.")
        return 2
    try:
        prepare()
    except subprocess.CalledProcessError as error:
        say(f"The test environment cannot be prepared: {' '.join(map(str, error.cmd))} failed.")
        return 2
    if "--screenshots" in arguments:
        names = [one for one in arguments if one != "--screenshots"]
        has_fonts = any(Path("/usr/share/fonts").rglob("*CJK*"))
        install_debian_packages({"fonts-noto-cjk": has_fonts})
        pictures = [BIN / "python", ROOT / "tests/browser/screenshots.py", *names]
        return subprocess.run(pictures, cwd=ROOT, env=variables()).returncode
    if arguments[:1] == ["--soak"]:
        command = [BIN / "python", ROOT / "tests" / "soak.py", *arguments[1:]]
        return subprocess.run(command, cwd=ROOT, env=variables()).returncode
    failed = [] if arguments else run_checks()
    with tempfile.TemporaryDirectory(prefix="azt-claims-") as claims:
        command = [BIN / "pytest", *pytest_options(arguments), f"--claims={claims}"]
        tests = subprocess.run(command, cwd=ROOT, env=variables())
        if "--trust" in arguments:
            say("\n".join(claims_table(Path(claims))))
    return tests.returncode or (1 if failed else 0)


def say(text: str) -> None:
    print(text, flush=True)


# -- The environment -------------------------------------------------------------------------------


def prepare() -> None:
    stamp = ENVIRONMENT / "made-for"
    wanted = fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    programs = {name: shutil.which(name) is not None for name in ("chromium", "curl", "strace")}
    has_venv = importlib.util.find_spec("ensurepip") is not None
    install_debian_packages({**programs, "python3-venv": has_venv})
    say("Preparing the test environment in .azt-test-env (once).")
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    venv.create(ENVIRONMENT, with_pip=True)
    quiet_pip = [BIN / "python", "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    subprocess.run([*quiet_pip, "--editable", ".[dev]"], cwd=ROOT, check=True)
    install_litellm()
    install_node_packages()
    stamp.write_text(wanted)


def fingerprint() -> str:
    """Changes with everything that the environment is made from."""
    parts = [sys.version, sys.prefix, str(ROOT), str(shutil.which("npm")), repr(NODE_PACKAGES)]
    parts.append(LITELLM_PACKAGE)
    parts.append((ROOT / "pyproject.toml").read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def install_debian_packages(needed: dict[str, bool]) -> None:
    """In a fresh container: package -> whether what the tests need of it is there already."""
    missing = [package for package, is_there in needed.items() if not is_there]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        say(f"Missing on this machine: {', '.join(missing)}. Install it first.")
        return
    quietly = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=quietly, check=True)
    subprocess.run(["apt-get", "install", "-y", "-qq", *missing], env=quietly, check=True)


def install_litellm() -> None:
    """In an environment of its own: it holds back the version of the openai library."""
    venv.create(LITELLM, with_pip=True)
    quiet_pip = [LITELLM / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install"]
    subprocess.run([*quiet_pip, "-qq", LITELLM_PACKAGE], cwd=ROOT, check=True)


def install_node_packages() -> None:
    npm = shutil.which("npm")
    if npm is None:
        say("No npm here: the tests of the Node libraries are skipped.")
        return
    NODE.mkdir()
    (NODE / "package.json").write_text(json.dumps({"private": True, "dependencies": NODE_PACKAGES}))
    quietly = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    subprocess.run([npm, "install", *quietly], cwd=NODE, check=True)


def variables() -> dict[str, str]:
    """The caller's environment, with the private one in front."""
    own = {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    if (NODE / "node_modules").is_dir():
        own["AZT_TEST_NODE_MODULES"] = str(NODE / "node_modules")
    return {**os.environ, **own}


# -- The checks ------------------------------------------------------------------------------------


def run_checks() -> list[str]:
    """The names of those that failed, said before the tests: pytest has the last line."""
    failed = []
    for name, (program, *arguments) in CHECKS.items():
        done = subprocess.run(
            [BIN / program, *arguments],
            cwd=ROOT,
            env=variables(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        say(f"{name:<8}{'ok' if done.returncode == 0 else 'FAILED'}")
        if done.returncode != 0:
            say(done.stdout.rstrip())
            failed.append(name)
    if failed:
        say(f"These checks failed: {', '.join(failed)}. The tests run all the same.")
    return failed


def claims_table(folder: Path) -> list[str]:
    """What all workers counted, one line for each claim in the order of the rows."""
    sums: dict[tuple[int, str], list[int]] = {}
    notes: dict[tuple[int, str], list[str]] = {}
    tests: dict[tuple[int, str], set[str]] = {}
    for file in folder.glob("*.json"):
        for row, text, tried, wrong, said, test in json.loads(file.read_text()):
            counts = sums.setdefault((row, text), [0, 0])
            counts[0] += tried
            counts[1] += wrong
            notes.setdefault((row, text), []).extend(said)
            tests.setdefault((row, text), set()).add(test)
    lines = [f"{'row':>3} | {'claim':<66} | {'tried':>9} | {'wrong':>5} | test", "-" * 130]
    for (row, text), (tried, wrong) in sorted(sums.items()):
        proof = ", ".join(sorted(tests[row, text]))
        lines.append(f"{row:>3} | {text:<66} | {tried:>9,} | {wrong:>5,} | {proof}")
        lines += [f"    |   {note}" for note in sorted(set(notes[row, text]))]
    return lines


def pytest_options(arguments: list[str]) -> list[str]:
    workers = min(4, os.cpu_count() or 1)
    return ["--quiet", "--numprocesses", str(workers), "--dist=worksteal", *arguments]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
