"""The README's examples run word for word; only host and port are those of the test."""

from __future__ import annotations

import ast
import base64
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, Gateway, decode_png

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
NODE_MODULES = os.environ.get("AZT_TEST_NODE_MODULES", "")


def examples(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("readme")
    gateway = Gateway(home, {}, ["--demo", "--host", "127.0.0.1", "--port", "0"]).start()
    yield gateway
    gateway.stop()


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def here(text: str, demo: Gateway) -> str:
    assert "http://127.0.0.1:8787" in text
    return text.replace("http://127.0.0.1:8787", demo.url)


@pytest.mark.parametrize("text", [one for one in examples("sh") if "/images/" not in one])
def test_shell_examples_answer(text: str, demo: Gateway, tmp_path: Path) -> None:
    printed = run(["bash", "-euc", here(text, demo)], tmp_path)

    assert '"gpt-5.4"' in printed
    assert '"error"' not in printed


def test_image_examples_return_pictures(demo: Gateway, tmp_path: Path) -> None:
    (text,) = [one for one in examples("sh") if "/images/" in one]

    printed = run(["bash", "-euc", here(text, demo)], tmp_path)

    edited = base64.b64decode(json.loads(printed)["data"][0]["b64_json"])
    for picture in (edited, (tmp_path / "picture.png").read_bytes()):
        assert decode_png(picture) == (64, 64)


@pytest.mark.parametrize("text", examples("python"))
def test_python_examples_answer(text: str, demo: Gateway, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(here(text, demo))

    printed = run([sys.executable, "example.py"], tmp_path)

    assert "demo" in printed


@pytest.mark.skipif(not NODE_MODULES, reason="the Node libraries are not installed")
@pytest.mark.parametrize("text", examples("js"))
def test_node_examples_answer(text: str, demo: Gateway, tmp_path: Path) -> None:
    (tmp_path / "example.mjs").write_text(here(text, demo))
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)

    printed = run(["node", "example.mjs"], tmp_path)

    assert "Hello from Node" in printed


def test_every_kind_of_example_is_there() -> None:
    assert len(examples("sh")) >= 3
    assert len(examples("python")) >= 2
    assert len(examples("js")) >= 1


# -- What was tried --------------------------------------------------------------------------------

ROWS = re.findall(r"^\| (\d+) \| (.+?) \| ([\d,]+) \| (\d+) \| (.+?) \|$", README, re.MULTILINE)


@functools.cache
def claims_made() -> dict[int, set[str]]:
    """Row -> the tests that count a claim of it, as `file::test`."""
    found: dict[int, set[str]] = {}
    for file in (ROOT / "tests").glob("test_*.py"):
        for node in ast.parse(file.read_text()).body:
            for call in ast.walk(node) if isinstance(node, ast.FunctionDef) else ():
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "claim":
                    row = ast.literal_eval(call.args[0])
                    found.setdefault(row, set()).add(f"{file.name}::{node.name}")
    return found


def test_the_table_of_claims_has_the_eighteen_rows_and_nothing_wrong() -> None:
    assert [int(row) for row, *_ in ROWS] == list(range(1, 19))
    assert all(int(tried.replace(",", "")) > 0 for _, _, tried, _, _ in ROWS)
    assert {wrong for _, _, _, wrong, _ in ROWS} == {"0"}


@pytest.mark.parametrize(("row", "test"), [(int(row), test) for row, *_, test in ROWS])
def test_each_claim_names_a_test_that_counts_it(row: int, test: str) -> None:
    assert test.strip("`") in claims_made()[row]


# -- The console -----------------------------------------------------------------------------------


def test_the_pages_of_the_console_are_those_of_its_menu() -> None:
    strings = (ROOT / "azt_web" / "js" / "strings.js").read_text(encoding="utf-8")
    menu = re.findall(r"^  'nav\.(?!more')\w+': \['([^']+)'", strings, re.MULTILINE)
    table = README.partition("| page | what it is for |")[2].partition("\n\n")[0]

    assert menu == re.findall(r"^\| ([A-Z][\w ]+) \|", table, re.MULTILINE)
