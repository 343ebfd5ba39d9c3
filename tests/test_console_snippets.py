"""The texts that the console offers for pasting: Node makes them, their programs read them."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_upstream import FakeUpstream, Json, answer, message
from harness import ROOT, Gateway

import azt

PREPARED = ROOT / ".azt-test-env" / "node" / "node_modules"
NODE_MODULES = Path(os.environ.get("AZT_TEST_NODE_MODULES") or PREPARED)
HOSTILE = "a'b\"c\\d$(touch x)`e` {f} \u2019 #\né"
CLIENTS = {
    "python": ["python", "python"],
    "js": ["js"],
    "curl": ["sh", "sh", "sh"],
    "codex": ["toml", "toml"],
    "openclaw": ["json"],
    "openwebui": ["sh"],
    "continue": ["yaml"],
    "langchain": ["python"],
    "env": ["sh", "fish", "powershell"],
}
Run = Callable[..., Any]


@pytest.fixture
def node(tmp_path: Path) -> Run:
    """Call it with the lines of a module, for the value that it leaves in `out`."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed")

    def call(code: str, *arguments: Any) -> Any:
        script = "globalThis.document = { documentElement: {} };\n"
        script += "globalThis.navigator ??= { languages: [] };\n"  # Node has it since 21
        script += "const files = await import('node:fs');\n"
        script += "globalThis.fetch = async (url) => new Response(files.readFileSync(url));\n"
        script += "globalThis.location = { hash: '' };\n"
        for name in ("i18n", "snippets"):
            file = (ROOT / f"azt_web/js/{name}.js").as_uri()
            script += f"const {name} = await import({json.dumps(file)});\n"
        script += f"const given = JSON.parse(process.argv[1]); let out;\n{code}\n"
        command = [
            program,
            "--input-type=module",
            "-e",
            script + "console.log(JSON.stringify(out))",
        ]
        done = subprocess.run(
            [*command, json.dumps(arguments)],
            cwd=ROOT / "azt_web",
            capture_output=True,
            check=True,
        )
        return json.loads(done.stdout)

    return call


@pytest.fixture
def snippets(node: Run) -> Run:
    """Call it with a client and the values: `[{label, lang, text}]`, the same in both languages."""

    def call(client: str, url: str = "http://127.0.0.1:8787", **values: str) -> Any:
        given = {"base": f"{url}/v1", "codexBase": f"{url}/codex/v1", "key": "local", "model": "m"}
        words = "(language) => { i18n.setLang(language); return snippets.snippets(...given); }"
        found, other = node(f"out = ['en', 'zh-CN'].map({words});", client, given | values)
        assert found == other
        pairs = zip(found, CLIENTS[client], strict=True)
        return [{**one, "lang": language} for one, language in pairs]

    return call


def strings_of(text: str) -> set[str]:
    return {one.value for one in ast.walk(ast.parse(text)) if isinstance(one, ast.Constant)}


def words_of(text: str) -> list[str]:
    """What a shell understands, its commands replaced by one that prints its arguments."""
    script = 'curl() { printf \'%s\\0\' "$@"; }; docker() { curl "$@"; }; python3() { cat; }\n'
    names = "OPENAI_BASE_URL OPENAI_API_KEY"
    script += f"{text}\nfor name in {names}; do printf '%s\\0' \"${{!name}}\"; done\n"
    script = script.replace(" > apple.png", "")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")


@pytest.mark.parametrize("client", CLIENTS)
def test_no_value_breaks_out_of_a_snippet(
    snippets: Run, client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = snippets(client, model=HOSTILE, key=HOSTILE)
    assert found
    for one in found:
        text, lang = one["text"], one["lang"]
        if lang == "python":
            assert HOSTILE in strings_of(text)
        elif lang == "json":
            assert json.loads(text)["models"]["providers"]["azt"]["apiKey"] == HOSTILE
        elif lang == "yaml":
            model = yaml.safe_load(text)["models"][0]
            assert model["apiKey"] == model["model"] == HOSTILE
        elif lang == "toml":
            assert azt.codex_route(tomllib.loads(text))[1] == "http://127.0.0.1:8787/codex/v1"
        elif lang == "sh":
            assert any(HOSTILE in word for word in words_of(text))
        else:
            assert lang in ("js", "fish", "powershell")
    assert [one.name for one in tmp_path.iterdir()] == ["home"]


def test_the_javascript_is_valid_whatever_the_model_is_called(
    snippets: Run, tmp_path: Path
) -> None:
    file = tmp_path / "call.mjs"
    file.write_text(snippets("js", model=HOSTILE)[0]["text"])
    subprocess.run(["node", "--check", str(file)], check=True)


@pytest.mark.parametrize("at", [0, 1])
def test_codex_takes_the_texts_for_its_config_as_azt_writes_them(snippets: Run, at: int) -> None:
    text = snippets("codex")[at]["text"]
    mode = azt.CODEX_MODES[at]
    written = azt.take_over("", mode, "http://127.0.0.1:8787/codex/v1")
    assert tomllib.loads(text) == tomllib.loads(written)


@pytest.mark.parametrize("client", ["python", "js", "curl", "langchain"])
def test_a_pasted_snippet_gets_an_answer(
    gateway: Gateway, upstream: FakeUpstream, snippets: Run, client: str, tmp_path: Path
) -> None:
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    commands = {
        "python": [sys.executable, "call"],
        "js": ["node", "call.mjs"],
        "sh": ["bash", "call"],
    }
    for one in snippets(client, gateway.url, model="gpt-5.4"):
        is_picture = "images" in one["label"]
        if not is_picture:
            upstream.script(answer(message("Here I am")))
        command = commands[one["lang"]]
        (tmp_path / command[1]).write_text(one["text"])
        how: Json = {"cwd": tmp_path, "timeout": 60, "text": True}
        done = subprocess.run(command, capture_output=True, **how)
        assert done.returncode == 0, done.stderr
        if is_picture:
            assert (tmp_path / "apple.png").read_bytes() == b"hi"  # what the scripted backend draws
        elif "/chat/" in one["label"]:
            assert "[DONE]" in done.stdout
        else:
            assert "Here I am" in done.stdout


def test_an_address_is_told_for_another_machine(node: Run) -> None:
    urls = ["http://127.0.0.1:8787/v1", "http://[::1]:8787/v1", "http://localhost/v1"]
    out = node("out = given.map((url) => snippets.atHost(url, 'host.docker.internal'));", *urls)
    assert out == [f"http://host.docker.internal{rest}" for rest in (":8787/v1", ":8787/v1", "/v1")]


def test_the_client_seen_last_has_its_snippet(node: Run) -> None:
    code = "out = given.map((name) => snippets.clientSeen(name).id);"
    assert node(code, "Cline", "OpenAI/JS", "something", None) == [
        "cline",
        "js",
        "python",
        "python",
    ]
