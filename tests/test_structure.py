"""The shape of azt.py: rooms in order, each using only what stands above it, and short answers to
what an auditor searches for. The README is held to the program here too."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from harness import ROOT

import azt

SOURCE = (ROOT / "azt.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
README = (ROOT / "README.md").read_text(encoding="utf-8")

RULE = "# " + "=" * 98
# The aim for the finished gateway is 6,000: what a change adds, a later one must earn back.
LINES_MAX = 13810
FUNCTION_LINES_MAX = 60
LONG_FUNCTIONS: set[str] = set()
PACKAGES = {"certifi", "h11", "truststore"}
SECRET = re.compile(r"(_token|_secret|api_key)$")

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# -- Rooms ----------------------------------------------------------------------------------------


def banners() -> dict[int, tuple[str, int]]:
    """Room number -> (title, line of the banner)."""
    found = {}
    for number, (above, line) in enumerate(zip(LINES, LINES[1:], strict=False), start=2):
        match = re.fullmatch(r"# (\d+)\. (.+)", line)
        if match and above == RULE:
            found[int(match[1])] = (match[2], number)
    return found


BANNERS = banners()


def room_of(line: int) -> int:
    """0 is what stands above the first room: the docstring and the imports."""
    return max((room for room, (_title, start) in BANNERS.items() if start <= line), default=0)


def definitions() -> dict[str, int]:
    """Module-level name -> its room."""
    found: dict[str, int] = {}
    for node in TREE.body:
        room = room_of(node.lineno)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found[node.name] = room
        elif room and isinstance(node, (ast.Assign, ast.AnnAssign)):
            for name in stored_names(node):
                found.setdefault(name, room)
    return found


def stored_names(tree: ast.AST) -> set[str]:
    nodes = ast.walk(tree)
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def local_names(tree: ast.AST) -> set[str]:
    """What a definition binds itself: parameters, variables, nested functions."""
    found = stored_names(tree) if isinstance(tree, FUNCTIONS) else set()
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            found |= {
                argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)
            }
        if isinstance(node, FUNCTIONS):
            found |= stored_names(node)
    return found


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def dotted(node: ast.AST) -> str:
    """`os.path.join` for that attribute, `open` for that name, "?.x" behind an expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def functions() -> Iterator[Function]:
    for node in ast.walk(TREE):
        if isinstance(node, FUNCTIONS):
            yield node


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, (*FUNCTIONS, ast.Lambda)):
            yield node
            waiting.extend(ast.iter_child_nodes(node))


def rooms_where(is_it: Callable[[ast.AST], bool]) -> dict[int, list[int]]:
    """Room -> the lines where something stands."""
    found: dict[int, list[int]] = {}
    for node in ast.walk(TREE):
        if is_it(node):
            line = getattr(node, "lineno", 0)
            found.setdefault(room_of(line), []).append(line)
    return found


def test_the_contents_list_names_the_banners() -> None:
    contents = re.findall(r"^ +(\d+)  (.+?)  ", ast.get_docstring(TREE, clean=False) or "", re.M)

    assert {int(number): title for number, title in contents} == {
        room: title for room, (title, _line) in BANNERS.items()
    }


def test_rooms_are_numbered_in_order() -> None:
    lines = [line for _room, (_title, line) in sorted(BANNERS.items())]

    assert sorted(BANNERS) == list(range(1, len(BANNERS) + 1))
    assert lines == sorted(lines)


def test_rooms_use_only_names_from_rooms_above() -> None:
    home = definitions()
    reaching_down = []
    for statement in TREE.body:
        local = local_names(statement)
        for node in ast.walk(statement):
            is_read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
            if is_read and node.id not in local and home.get(node.id, 0) > room_of(node.lineno):
                reaching_down.append(f"line {node.lineno}: {node.id} of room {home[node.id]}")

    assert reaching_down == []


def test_no_name_is_defined_twice() -> None:
    names = [node.name for node in TREE.body if isinstance(node, (*FUNCTIONS, ast.ClassDef))]

    assert sorted(names) == sorted(set(names))


# -- What an auditor searches for -----------------------------------------------------------------


def test_no_coroutine_calls_a_blocking_function() -> None:
    blocking = {
        function.name
        for function in functions()
        if any(dotted(decorator) == "blocking" for decorator in function.decorator_list)
    }
    # `write` is also the method of sinks and sockets; calling the blocking one on the loop raises.
    blocking -= {"write"}
    found = [
        f"line {node.lineno}: {dotted(node.func)}"
        for function in functions()
        if isinstance(function, ast.AsyncFunctionDef)
        for node in own_nodes(function)
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in blocking
    ]

    assert blocking >= {"open_response", "read_json", "write_json"}
    assert found == []


def test_only_say_prints() -> None:
    say = next(function for function in functions() if function.name == "say")
    lines = [call.lineno for call in calls(TREE) if dotted(call.func) == "print"]
    stdout = [line for line in range(1, len(LINES)) if "sys.stdout.write" in LINES[line - 1]]

    assert [line for line in lines if not say.lineno <= line <= (say.end_lineno or 0)] == []
    assert stdout == []


def test_only_the_standard_library_and_three_packages_are_imported() -> None:
    modules = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])

    assert modules - sys.stdlib_module_names <= PACKAGES


def test_only_the_settings_room_reads_the_environment() -> None:
    names = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
    rooms = rooms_where(lambda node: isinstance(node, ast.Attribute) and dotted(node) in names)

    assert list(rooms) == [5]


def opens_a_file(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = dotted(node.func)
    if name in {"open", "io.open", "os.mkdir", "os.open", "os.rename", "os.replace", "shutil.move"}:
        return not any(dotted(argument) == "os.devnull" for argument in node.args)
    methods = {"mkdir", "makedirs", "touch", "unlink", "write_bytes", "write_text"}
    return isinstance(node.func, ast.Attribute) and node.func.attr in methods


def test_only_the_state_room_opens_files() -> None:
    assert list(rooms_where(opens_a_file)) == [4]


def test_only_the_outbound_room_opens_connections() -> None:
    openers = {
        "http.client.HTTPConnection",
        "http.client.HTTPResponse",
        "http.client.HTTPSConnection",
        "socket.create_connection",
        "urllib.request.urlopen",
    }
    rooms = rooms_where(lambda node: isinstance(node, ast.Attribute) and dotted(node) in openers)
    connects = rooms_where(
        lambda node: isinstance(node, ast.Attribute) and node.attr in {"connect", "open_connection"}
    )

    assert list(rooms) == []
    assert list(connects) == [6]


def test_secrets_never_reach_a_log_call() -> None:
    found = []
    for call in calls(TREE):
        if dotted(call.func).startswith("log."):
            names = [dotted(node) for part in call.args for node in ast.walk(part)]
            found += [(call.lineno, name) for name in names if SECRET.search(name)]

    assert found == []


def test_routes_are_sorted_and_unique() -> None:
    keys = [(route.path, route.method) for route in azt.ROUTES]

    assert keys == sorted(set(keys))


# -- Size -----------------------------------------------------------------------------------------


def test_the_file_stays_readable_in_length() -> None:
    assert len(LINES) < LINES_MAX


def length(function: Function) -> int:
    """Lines without the docstring: a translator's ledger of fields may be long."""
    text = ast.get_docstring(function, clean=False)
    lines = (function.end_lineno or 0) - function.lineno + 1
    return lines - (len(text.splitlines()) if text else 0)


def test_functions_fit_a_screen() -> None:
    long = {function.name for function in functions() if length(function) > FUNCTION_LINES_MAX}

    assert long == LONG_FUNCTIONS


def test_nothing_names_the_machine_it_was_written_on() -> None:
    places = ["work/", "root/", "opt/", "home/[a-z]+/\\."]
    hosts = ["pypi\\.org/simple", "pythonhosted\\.org", "registry\\.npmjs", "deb\\.debian"]
    pattern = re.compile("|".join([f"(?<![\\w.}}])/{place}" for place in places] + hosts))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = []
    for name in set(listed.stdout.split("\n")) - {"", "tests/test_structure.py"}:
        path = ROOT / name
        text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
        found += [f"{name}: {match[0]}" for match in pattern.finditer(text)]

    assert found == []


# -- The README says what the program does --------------------------------------------------------


def azt_help(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "azt", *command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def words_in_help(*command: str) -> set[str]:
    """The commands that a help text lists; none for a command that has no further ones."""
    _before, mark, listed = azt_help(*command).partition("ACTION" if command else "COMMAND\n")
    if command:
        _before, mark, listed = listed.partition("ACTION\n")
    return set(re.findall(r"^ {4}(\w+) ", listed, re.MULTILINE)) if mark else set()


@functools.cache
def commands_in_help() -> set[str]:
    found = set()
    for word in words_in_help():
        actions = words_in_help(word)
        found |= {f"{word} {action}" for action in actions} or {word}
    return found


def commands_in_readme() -> set[str]:
    rows = re.findall(r"^\| `azt ([a-z]+(?: [a-z]+)?)", README, re.MULTILINE)
    return set(rows)


def test_the_readme_lists_every_command() -> None:
    assert commands_in_readme() == commands_in_help()


def test_the_readme_mentions_no_other_command() -> None:
    groups = {command.split()[0] for command in commands_in_help()}
    mentioned = set(re.findall(r"`azt (?!is ready)([a-z]+)", README))

    assert mentioned <= groups


def test_the_readme_lists_every_setting_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-zA-Z]+(?:\.\w+)?)` \| (\S+) \| .*? \| ?(\S*) \|$", README, re.M)
    listed = {key: (default.strip("`"), variable.strip("`")) for key, default, variable in rows}

    assert listed == {
        key: (shown(setting.default), setting.env) for key, setting in azt.SETTINGS.items()
    }


def shown(value: object) -> str:
    if value in ("", []):
        return "empty"
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_readme_lists_every_route_of_the_api() -> None:
    listed = set(re.findall(r"^\| `([A-Z]+)` \| `(/\S+)` \|$", README, re.MULTILINE))
    served = {
        (route.method, route.path)
        for route in azt.ROUTES
        if route.path.startswith(("/codex/", "/v1/")) and route.path not in azt._NOT_OFFERED
    }
    anything = {(method, path) for method, path in served if path.endswith("{rest}")}

    assert listed == served - anything | {("GET", "/_gateway/health"), ("GET", "/metrics")}
    assert all(f"| any | `{path}` |" in README for _, path in anything)


def test_the_readme_lists_every_host() -> None:
    rows = dict(re.findall(r"^\| `([*\w-]+\.[\w.]+)` \| (.+) \|$", README, re.MULTILINE))

    assert {host: why for host, why in rows.items() if host in azt.OUTBOUND} == azt.OUTBOUND


def test_the_readme_lists_every_state_file() -> None:
    paths = azt.Paths(ROOT / "home", ROOT / "codex")
    files = {path for path in vars(paths).values() if path.parent == paths.state}
    _before, _mark, section = README.partition("| file | content |")
    listed = re.findall(r"^\| `([\w.-]+)` \|", section.partition("\n\n")[0], re.MULTILINE)

    assert sorted(path.name for path in files) == listed


@pytest.mark.parametrize("word", re.findall(r"demo:\w+", azt._DEMO_HELP))
def test_the_readme_explains_every_word_of_the_demo(word: str) -> None:
    assert f"| `{word}` |" in README
