"""State on disk: whole, private, never silently empty. The faults are real where they can be."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import azt

Json = dict[str, Any]

OLD: Json = {"version": 1, "accounts": ["old"], "note": "ä"}
NEW: Json = {"version": 1, "accounts": ["new"] * 50}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "state"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def file(folder: Path) -> Path:
    """A state file that was saved once."""
    azt.write_json(folder / "accounts.json", OLD)
    return folder / "accounts.json"


def names(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()}


def corrupt(file: Path) -> list[Path]:
    return sorted(file.parent.glob(f"{file.name}.corrupt-*"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def python(script: str, *arguments: object) -> list[str]:
    """The command that runs a script which can import azt."""
    return [sys.executable, "-c", script, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(azt.__file__).parent), "PYTHONSAFEPATH": "1"}


# -- Reading and writing --------------------------------------------------------------------------


def test_what_was_written_is_read_back(file: Path) -> None:
    assert azt.read_json(file, 1) == OLD


def test_a_missing_file_reads_as_none(folder: Path) -> None:
    assert azt.read_json(folder / "accounts.json", 1) is None


def test_a_save_leaves_the_file_and_its_copy_and_nothing_else(file: Path) -> None:
    azt.write_json(file, NEW)
    assert names(file.parent) == {"accounts.json", "accounts.json.bak"}
    assert file.read_bytes() == file.with_name("accounts.json.bak").read_bytes()


def test_a_byte_order_mark_is_no_damage(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(OLD).encode())
    assert azt.read_json(file, 1) == OLD
    assert corrupt(file) == []


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_every_file_is_private_from_its_first_byte(folder: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        azt.write_json(folder / "keys.json", OLD)
        azt.read_or_make_secret(folder / "admin-token")
        lock = azt.HomeLock(folder / "lock")
        assert lock.acquire() is None
        lock.release()
    finally:
        os.umask(before)
    assert {mode(one) for one in folder.iterdir()} == {0o600}


def test_a_looser_file_is_mended_when_it_is_read(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.chmod(0o644)
    assert azt.read_json(file, 1) == OLD
    assert mode(file) == 0o600
    assert "accounts.json" in caplog.text


def test_a_replaced_file_never_gets_the_old_looser_mode(file: Path) -> None:
    file.chmod(0o666)
    azt.write_json(file, NEW)
    assert mode(file) == 0o600


def test_a_writer_that_is_replaced_keeps_the_open_file_whole(file: Path) -> None:
    with file.open("rb") as reader:
        azt.write_json(file, NEW)
        assert reader.read() == azt._seal(OLD)


def test_reading_and_writing_refuse_the_loop(file: Path) -> None:
    import asyncio

    async def on_the_loop() -> None:
        azt.write_json(file, NEW)

    with pytest.raises(RuntimeError, match="event loop"):
        asyncio.run(on_the_loop())
    assert azt.read_json(file, 1) == OLD


# -- Damage ---------------------------------------------------------------------------------------


DAMAGE = {
    "empty": b"",
    "only nulls": b"\0" * 200,
    "not utf-8": b'{"version": 1, "accounts": "\xff"}',
    "not json": b"hello",
    "a list": b"[]",
    "null": b"null",
    "no version": b'{"accounts": []}',
    "version of another type": b'{"version": "1", "accounts": []}',
    "version null": b'{"version": null}',
    "too deep": b'{"version":' + b"[" * 100_000,
    "torn": json.dumps(OLD).encode()[:-3],
    "two documents": json.dumps(OLD).encode() * 2,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_kept_and_its_copy_serves(
    file: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_bytes(damage)
    assert azt.read_json(file, 1) == OLD
    [kept] = corrupt(file)
    assert kept.read_bytes() == damage
    assert mode(kept) == 0o600
    assert kept.name in caplog.text
    assert azt.read_json(file, 1) == OLD
    assert file.read_bytes() == azt._seal(OLD)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("copy", [None, b"", b"[]"])
def test_damage_without_a_good_copy_is_an_error_and_nothing_is_touched(
    folder: Path, damage: bytes, copy: bytes | None
) -> None:
    file = folder / "accounts.json"
    file.write_bytes(damage)
    if copy is not None:
        (folder / "accounts.json.bak").write_bytes(copy)
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    with pytest.raises(azt.StateError, match=r"accounts\.json is damaged"):
        azt.read_json(file, 1)
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before


def test_a_file_torn_at_any_byte_is_never_read_as_empty(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert azt.read_json(file, 1) == OLD, length


def test_a_flipped_byte_never_empties_the_state(file: Path) -> None:
    whole, chance = file.read_bytes(), random.Random(7)
    for _ in range(200):
        at, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            read = azt.read_json(file, 1)
        except azt.StateError as error:  # the flip made the version a newer one
            assert "newer azt" in error.message
            continue
        assert read is not None and read.keys() & {"accounts", "note"}, (at, bit)


def test_recovery_on_a_full_disk_loses_nothing(tiny_disk: Path) -> None:
    file = tiny_disk / "accounts.json"
    azt.write_json(file, OLD)
    file.write_bytes(b"damaged")
    fill(tiny_disk)
    with pytest.raises(azt.AztError) as caught:
        azt.read_json(file, 1)
    assert caught.value.status == 507
    assert file.read_bytes() == b"damaged"
    (tiny_disk / "filler").unlink()
    assert azt.read_json(file, 1) == OLD
    assert [one.read_bytes() for one in corrupt(file)] == [b"damaged"]


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_version_is_refused_and_left_alone(file: Path, version: int) -> None:
    newer = json.dumps({"version": version, "accounts": ["from tomorrow"]}).encode()
    file.write_bytes(newer)
    with pytest.raises(azt.StateError, match="newer azt"):
        azt.read_json(file, 1)
    assert file.read_bytes() == newer
    assert corrupt(file) == []


def test_a_newer_copy_is_not_put_in_the_place_of_a_damaged_file(file: Path) -> None:
    file.write_bytes(b"damaged")
    file.with_name("accounts.json.bak").write_text('{"version": 2, "x": 1}')
    with pytest.raises(azt.StateError, match="newer azt"):
        azt.read_json(file, 1)
    assert file.read_bytes() == b"damaged"


# -- Things that are no regular file of ours ------------------------------------------------------


def test_a_symlink_in_place_of_a_state_file_is_refused(file: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(NEW))
    file.unlink()
    file.symlink_to(elsewhere)
    with pytest.raises(azt.StateError, match="cannot be read"):
        azt.read_json(file, 1)


def test_saving_replaces_a_symlink_and_not_its_target(file: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("mine")
    file.unlink()
    file.symlink_to(elsewhere)
    azt.write_json(file, NEW)
    assert elsewhere.read_text() == "mine"
    assert not file.is_symlink()


def test_a_folder_in_place_of_a_state_file_is_refused(folder: Path) -> None:
    (folder / "accounts.json").mkdir()
    with pytest.raises(azt.StateError, match="cannot be read"):
        azt.read_json(folder / "accounts.json", 1)
    with pytest.raises(azt.AztError, match="could not be written"):
        azt.write_json(folder / "accounts.json", NEW)
    assert names(folder) == {"accounts.json"}


def test_a_pipe_in_place_of_a_state_file_is_refused_at_once(folder: Path) -> None:
    os.mkfifo(folder / "accounts.json")
    with pytest.raises(azt.StateError, match="not a regular file"):
        azt.read_json(folder / "accounts.json", 1)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(file: Path) -> None:
    os.chown(file, 65534, 65534)
    with pytest.raises(azt.StateError, match="belongs to another user"):
        azt.read_json(file, 1)


def test_the_lock_is_never_made_through_a_symlink(folder: Path, tmp_path: Path) -> None:
    (folder / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(azt.StateError, match="lock"):
        azt.HomeLock(folder / "lock").acquire()
    assert not (tmp_path / "elsewhere").exists()


# -- Faults of the disk ---------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; only root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user cannot mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Leave no free page on it."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_a_full_disk_answers_507_and_keeps_the_old_content(tiny_disk: Path) -> None:
    file = tiny_disk / "accounts.json"
    azt.write_json(file, OLD)
    fill(tiny_disk)
    with pytest.raises(azt.AztError) as caught:
        azt.write_json(file, NEW)
    assert (caught.value.status, caught.value.code) == (507, "state_not_saved")
    assert "accounts.json" in caught.value.message
    assert azt.read_json(file, 1) == OLD
    assert names(tiny_disk) == {"accounts.json", "accounts.json.bak", "filler"}


def test_saving_works_again_once_there_is_space(tiny_disk: Path) -> None:
    file = tiny_disk / "accounts.json"
    azt.write_json(file, OLD)
    fill(tiny_disk)
    with pytest.raises(azt.AztError):
        azt.write_json(file, NEW)
    (tiny_disk / "filler").unlink()
    azt.write_json(file, NEW)
    assert azt.read_json(file, 1) == NEW


def test_a_read_only_disk_keeps_the_old_content(tiny_disk: Path) -> None:
    file = tiny_disk / "accounts.json"
    azt.write_json(file, OLD)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(azt.AztError) as caught:
        azt.write_json(file, NEW)
    assert caught.value.status == 500
    assert "Read-only" in caught.value.message
    assert azt.read_json(file, 1) == OLD
    with pytest.raises(azt.StateError, match="lock"):
        azt.HomeLock(tiny_disk / "lock").acquire()


def test_a_read_only_home_is_named(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(azt.StateError, match="Read-only.*AI_ZERO_TOKEN_HOME"):
        azt.prepare_home(azt.Paths(tiny_disk / "home", tiny_disk))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_keeps_the_old_content(file: Path) -> None:
    file.parent.chmod(0o500)
    try:
        with pytest.raises(azt.AztError, match="could not be written"):
            azt.write_json(file, NEW)
        assert azt.read_json(file, 1) == OLD
    finally:
        file.parent.chmod(0o700)


def test_a_file_size_limit_keeps_the_old_content(file: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(azt.AztError, match="could not be written") as caught:
            azt.write_json(file, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == "state_not_saved"
    assert azt.read_json(file, 1) == OLD
    assert names(file.parent) == {"accounts.json", "accounts.json.bak"}


def test_a_vanished_folder_is_an_error_with_a_name(folder: Path) -> None:
    folder.rmdir()
    with pytest.raises(azt.AztError, match=r"accounts\.json could not be written \(No such file"):
        azt.write_json(folder / "accounts.json", NEW)


def test_a_copy_that_cannot_be_written_does_not_undo_the_save(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "accounts.json.bak").mkdir()
    azt.write_json(folder / "accounts.json", NEW)
    assert azt.read_json(folder / "accounts.json", 1) == NEW
    assert "accounts.json.bak" in caplog.text


CALLS = ("open", "fsync", "replace")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", CALLS)
def test_a_fault_of_any_system_call_leaves_the_old_or_the_new_content(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    for fails_at in range(1, 10):
        azt.write_json(file, OLD)
        calls = failing(monkeypatch, call, fails_at, number)
        try:
            azt.write_json(file, NEW)
        except azt.AztError as error:
            assert error.status == (507 if number in (errno.ENOSPC, errno.EDQUOT) else 500)
            assert error.code == "state_not_saved"
        finally:
            monkeypatch.undo()
        assert azt.read_json(file, 1) in (OLD, NEW)
        assert not list(file.parent.glob(".*")), "a temporary file is left"
        if calls[0] < fails_at:
            return
    raise AssertionError("the save never went through")


def failing(monkeypatch: pytest.MonkeyPatch, name: str, fails_at: int, number: int) -> list[int]:
    """Let one call of `os.<name>` fail; the count of the calls is kept in the list."""
    real: Callable[..., Any] = getattr(os, name)
    count = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == fails_at:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)
    return count


# -- Crashes and other processes ------------------------------------------------------------------

CRASHER = """
import json, os, pathlib, sys, azt
file = pathlib.Path(sys.argv[1])
old, new = ({"version": 1, "is": word, "pad": word * 500} for word in ("old", "new"))
dying = ("open", "fsync", "replace", "close", "unlink")

def die_at(number):
    count = 0
    def guard(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return real(*args, **kwargs)
        return call
    for name in dying:
        setattr(os, name, guard(getattr(os, name)))

for number in range(1, 100):
    azt.write_json(file, old)
    damaged = len(sys.argv) > 2
    if damaged:
        file.write_bytes(b"damaged")
    child = os.fork()
    if child == 0:
        die_at(number)
        azt.read_json(file, 1) if damaged else azt.write_json(file, new)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, azt.read_json(file, 1)["is"], flush=True)
    if status == 0:
        break
"""


def test_a_save_that_dies_at_any_system_call_leaves_old_or_new(file: Path) -> None:
    command = python(CRASHER, file)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    outcomes = [tuple(line.split()) for line in done.stdout.splitlines()]
    assert outcomes[-1] == ("0", "new")
    assert len(outcomes) > 6
    assert {code for code, _ in outcomes[:-1]} == {"9"}
    assert [content for _, content in outcomes] == sorted(
        (content for _, content in outcomes), reverse=True
    ), "old until one point, new from there on"


def test_a_recovery_that_dies_at_any_system_call_loses_nothing(file: Path) -> None:
    command = python(CRASHER, file, "damaged")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    outcomes = [line.split() for line in done.stdout.splitlines()]
    assert outcomes[-1] == ["0", "old"]
    assert {content for _, content in outcomes} == {"old"}


WRITER = """
import pathlib, sys, azt
file = pathlib.Path(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    number += 1
    azt.write_json(file, {"version": 1, "number": number, "pad": [number] * (number % 7 * 3000)})
"""


def test_a_reader_beside_a_writer_never_sees_a_torn_file(folder: Path) -> None:
    file = folder / "accounts.json"
    writer = subprocess.Popen(python(WRITER, file), env=environment(), stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        writer.stdout.readline()
        seen: set[int] = set()
        while len(seen) < 40:
            value = azt.read_json(file, 1)
            if value is not None:
                assert set(value["pad"]) <= {value["number"]}
                seen.add(value["number"])
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    assert corrupt(file) == []
    assert azt.read_json(file, 1) is not None


def test_a_killed_writer_leaves_a_file_that_reads(folder: Path) -> None:
    file = folder / "accounts.json"
    for _ in range(3):
        writer = subprocess.Popen(python(WRITER, file), env=environment(), stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        while not file.exists():
            assert writer.poll() is None
        writer.kill()
        writer.wait()
        writer.stdout.close()
        assert azt.read_json(file, 1) is not None
        assert corrupt(file) == []


HOLDER = """
import pathlib, sys, azt
lock = azt.HomeLock(pathlib.Path(sys.argv[1]))
print(lock.acquire(), flush=True)
lock.write("http://127.0.0.1:8787")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `folder`."""
    process = subprocess.Popen(
        python(HOLDER, folder / "lock"),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "None\n"
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_the_second_process_learns_who_holds_the_lock(
    folder: Path, holder: subprocess.Popen[str]
) -> None:
    lock = azt.HomeLock(folder / "lock")
    assert lock.acquire() == {"pid": holder.pid, "url": "http://127.0.0.1:8787"}


def test_the_lock_dies_with_its_process(folder: Path, holder: subprocess.Popen[str]) -> None:
    lock = azt.HomeLock(folder / "lock")
    assert lock.acquire() is not None
    holder.kill()
    holder.wait()
    assert lock.acquire() is None
    assert json.loads((folder / "lock").read_text()) == {"pid": os.getpid(), "url": None}
    lock.release()


def test_a_stale_lock_file_is_harmless(folder: Path) -> None:
    (folder / "lock").write_text('{"pid": 1, "url": "http://127.0.0.1:1"}')
    lock = azt.HomeLock(folder / "lock")
    assert lock.acquire() is None
    lock.release()


@pytest.mark.parametrize("content", ["", "[]", "[" * 4096, "\xff"])
def test_a_holder_that_says_nothing_useful_is_a_holder_all_the_same(
    folder: Path, holder: subprocess.Popen[str], content: str
) -> None:
    (folder / "lock").write_text(content)
    assert azt.HomeLock(folder / "lock").acquire() == {"pid": 0, "url": None}


def test_a_folder_that_knows_no_locks_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(azt.StateError, match="cannot be used.*AI_ZERO_TOKEN_HOME"):
        azt.HomeLock(folder / "lock").acquire()


def test_a_released_lock_can_be_taken_again(folder: Path) -> None:
    first, second = azt.HomeLock(folder / "lock"), azt.HomeLock(folder / "lock")
    assert first.acquire() is None
    assert second.acquire() == {"pid": os.getpid(), "url": None}
    first.release()
    assert second.acquire() is None
    second.release()
    second.release()


def test_a_shorter_address_leaves_no_rest_of_the_longer_one(folder: Path) -> None:
    lock, other = azt.HomeLock(folder / "lock"), azt.HomeLock(folder / "lock")
    assert lock.acquire() is None
    lock.write("http://a-rather-long-name.example:12345")
    lock.write("http://b:1")
    assert other.acquire() == {"pid": os.getpid(), "url": "http://b:1"}
    lock.release()


# -- The home -------------------------------------------------------------------------------------


def test_a_new_home_is_made_private(tmp_path: Path) -> None:
    paths = azt.Paths(tmp_path / "a" / "home", tmp_path)
    before = os.umask(0)
    try:
        azt.prepare_home(paths)
    finally:
        os.umask(before)
    assert mode(paths.home) == mode(paths.state) == 0o700


def test_a_looser_state_folder_is_mended_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = azt.Paths(tmp_path / "home", tmp_path)
    paths.state.mkdir(parents=True, mode=0o755)
    azt.prepare_home(paths)
    assert mode(paths.state) == 0o700
    assert "0700" in caplog.text


def test_leftovers_of_a_crash_are_removed_and_nothing_else(tmp_path: Path) -> None:
    paths = azt.Paths(tmp_path / "home", tmp_path)
    azt.prepare_home(paths)
    azt.write_json(paths.accounts, OLD)
    (paths.state / ".accounts.json.0123456789abcdef.tmp").write_text("half")
    (paths.state / "accounts.json.corrupt-20260101-000000").write_text("kept")
    azt.prepare_home(paths)  # another process may be writing: not before the lock is held
    assert len(names(paths.state)) == 4
    lock = azt.HomeLock(paths.lock)
    assert lock.acquire() is None
    assert names(paths.state) == {
        "accounts.json",
        "accounts.json.bak",
        "accounts.json.corrupt-20260101-000000",
        "lock",
    }
    lock.release()


def test_a_home_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(azt.StateError, match="cannot be used.*AI_ZERO_TOKEN_HOME"):
        azt.prepare_home(azt.Paths(tmp_path / "taken", tmp_path))


def test_a_state_folder_that_is_a_symlink_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "home" / ".state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(azt.StateError, match="symbolic link"):
        azt.prepare_home(azt.Paths(tmp_path / "home", tmp_path))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give folders away")
def test_a_state_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    paths = azt.Paths(tmp_path / "home", tmp_path)
    paths.state.mkdir(parents=True, mode=0o700)
    os.chown(paths.state, 65534, 65534)
    with pytest.raises(azt.StateError, match="belongs to another user"):
        azt.prepare_home(paths)


# -- Secrets and foreign files --------------------------------------------------------------------


def test_the_secret_is_made_once_and_stays(folder: Path) -> None:
    made = azt.read_or_make_secret(folder / "admin-token")
    assert len(made) > 40
    assert azt.read_or_make_secret(folder / "admin-token") == made
    assert azt.read_or_make_secret(folder / "another") != made


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff\xfe"])
def test_a_secret_that_is_no_secret_is_made_anew(folder: Path, content: bytes) -> None:
    (folder / "admin-token").write_bytes(content)
    assert len(azt.read_or_make_secret(folder / "admin-token")) > 40


def test_a_secret_behind_a_symlink_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x" * 50)
    (folder / "admin-token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(azt.StateError, match="admin-token"):
        azt.read_or_make_secret(folder / "admin-token")


def test_a_foreign_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    foreign = tmp_path / "models_cache.json"
    foreign.write_bytes(b"x" * 100)
    assert azt.read_foreign(foreign, 100) == b"x" * 100
    with pytest.raises(OSError, match="larger"):
        azt.read_foreign(foreign, 99)
    with pytest.raises(OSError):
        azt.read_foreign(tmp_path / "missing", 100)


# -- Logs ------------------------------------------------------------------------------------------


def test_a_line_that_a_crash_has_torn_spoils_no_other(folder: Path) -> None:
    log = folder / "usage" / "day.jsonl"
    azt.append_bytes(log, b"whole\n")
    with log.open("ab") as file:
        file.write(b"torn")

    size = azt.append_bytes(log, b"next\n", sync=True)

    assert log.read_bytes() == b"whole\ntorn\nnext\n"
    assert size == log.stat().st_size


def test_a_log_that_finds_no_room_keeps_whole_lines(folder: Path) -> None:
    log = folder / "day.jsonl"
    azt.append_bytes(log, b"whole\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(azt.AztError) as refused:
            azt.append_bytes(log, b"longer than that\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert refused.value.status == 507
    assert log.read_bytes() == b"whole\n"


def test_what_is_longer_than_any_line_is_skipped(folder: Path) -> None:
    log = folder / "day.jsonl"
    azt.append_bytes(log, b"first\n" + b"\0" * (3 * azt.MAX_LINE_BYTES) + b"\nlast\n")

    assert list(azt.read_from(log, 0)) == [b"first\n", b"last\n"]


# -- What the system tells -------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_of_who_listens_at_least_the_user_is_told() -> None:
    one, other = socket.socketpair()
    with one, other, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        socket.send_fds(one, [b"in flight"], [listener.fileno()])  # listens, in no one's hands
        listener.close()
        unknown = azt.port_holder(port)

    assert unknown == f"a program of the user {os.getuid()}"
    assert azt.port_holder(port) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_what_this_process_holds_is_counted() -> None:
    before = azt.process_figures()
    with open(os.devnull):
        after = azt.process_figures()

    assert after["open_fds"] == before["open_fds"] + 1
    assert before["threads"] >= 1 and before["resident_memory_bytes"] > 1_000_000
