"""The bridge between the loop and the worker threads."""

from __future__ import annotations

import asyncio
import gc
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import azt


@azt.blocking
def thread_id() -> int:
    return threading.get_ident()


def wait_until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not come about in time"
        time.sleep(0.001)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - another thread brings it about
            await asyncio.sleep(0.001)


class Gate:
    """A job that holds its worker until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> int:
        self.entered.set()
        assert self._open.wait(10)
        return threading.get_ident()

    def open(self) -> None:
        self._open.set()


# -- blocking -------------------------------------------------------------------------------------


def test_a_blocking_function_runs_off_the_loop() -> None:
    assert thread_id() == threading.get_ident()


def test_a_blocking_function_refuses_to_run_on_the_loop() -> None:
    async def on_the_loop() -> int:
        return thread_id()

    with pytest.raises(RuntimeError, match="thread_id blocks and must not run on the event loop"):
        asyncio.run(on_the_loop())


def test_a_blocking_function_refuses_in_a_callback_of_the_loop() -> None:
    async def through_a_callback() -> str:
        told: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def callback() -> None:
            try:
                thread_id()
            except RuntimeError as error:
                told.set_result(str(error))

        asyncio.get_running_loop().call_soon(callback)
        return await told

    assert "must not run" in asyncio.run(through_a_callback())


def test_a_blocking_function_may_run_in_a_thread_while_a_loop_runs_elsewhere() -> None:
    async def beside_the_loop() -> int:
        return await azt.in_thread(azt.WorkerPool("t", 1), thread_id)

    assert asyncio.run(beside_the_loop()) != threading.get_ident()


def test_a_blocking_function_keeps_its_name_and_docstring() -> None:
    assert azt.write_json.__name__ == "write_json"
    assert azt.write_json.__doc__


# -- in_thread ------------------------------------------------------------------------------------


def test_arguments_go_in_and_the_value_comes_back() -> None:
    assert asyncio.run(azt.in_thread(azt.WorkerPool("t", 1), divmod, 17, 5)) == (3, 2)


@pytest.mark.parametrize("kind", [ValueError, OSError, azt.StateError, SystemExit])
def test_an_exception_of_the_worker_reaches_the_awaiting_side(kind: type[BaseException]) -> None:
    def fail() -> None:
        raise kind("the reason")

    async def main() -> str:
        try:
            await azt.in_thread(azt.WorkerPool("t", 1), fail)
        except BaseException as error:  # noqa: BLE001 - also those that are no Exception
            return f"{type(error).__name__} {error} {error.__cause__}"
        return ""

    told = asyncio.run(main())
    assert kind.__name__ in told
    assert "the reason" in told


def test_a_stop_iteration_of_the_worker_does_not_hang_the_await() -> None:
    calls = azt.in_thread(azt.WorkerPool("t", 1), next, iter(()))
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(calls, 5))


def test_a_worker_outlives_the_exception_of_its_job() -> None:
    def fail() -> None:
        raise ValueError

    async def main() -> tuple[int, int]:
        pool = azt.WorkerPool("t", 1)
        with pytest.raises(ValueError):
            await azt.in_thread(pool, fail)
        return await azt.in_thread(pool, divmod, 7, 2)

    assert asyncio.run(main()) == (3, 1)


def test_a_cancelled_await_ends_at_once_and_the_late_result_is_dropped() -> None:
    async def main() -> tuple[float, int]:
        pool, gate = azt.WorkerPool("t", 1), Gate()
        waiting = asyncio.create_task(azt.in_thread(pool, gate))
        await until(gate.entered.is_set)
        started = time.monotonic()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        took = time.monotonic() - started
        gate.open()
        return took, await azt.in_thread(pool, thread_id)

    took, worker = asyncio.run(main())
    assert took < 1
    assert worker != threading.get_ident()


def test_a_late_result_that_nobody_takes_is_closed() -> None:
    near, far = socket.socketpair()

    async def main() -> None:
        pool, gate = azt.WorkerPool("t", 1), Gate()
        waiting = asyncio.create_task(azt.in_thread(pool, lambda: gate() and near))
        await until(gate.entered.is_set)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.open()
        await until(lambda: near.fileno() == -1)

    asyncio.run(asyncio.wait_for(main(), 5))
    assert far.recv(1) == b""
    far.close()


def test_a_result_that_came_just_before_the_cancellation_is_closed_too() -> None:
    near, far = socket.socketpair()

    async def main() -> None:
        pool = azt.WorkerPool("t", 1)
        waiting = asyncio.create_task(azt.in_thread(pool, lambda: near))
        await asyncio.sleep(0)
        time.sleep(0.1)  # noqa: ASYNC251 - the value comes while the loop is busy,
        await asyncio.sleep(0)  # the future takes it, and its task has not run yet
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
    assert near.fileno() == -1
    assert far.recv(1) == b""
    far.close()


def test_a_result_after_the_end_of_the_loop_hurts_nobody() -> None:
    pool, gate = azt.WorkerPool("t", 1), Gate()

    async def main() -> None:
        task = asyncio.create_task(azt.in_thread(pool, gate))
        await until(gate.entered.is_set)
        task.cancel()

    asyncio.run(main())
    gate.open()
    again = asyncio.run(azt.in_thread(pool, divmod, 9, 2))
    assert again == (4, 1)
    assert pool.threads == 1


def test_many_calls_at_once_all_come_back_in_their_own_place() -> None:
    async def main() -> list[int]:
        pool = azt.WorkerPool("t", 8)
        calls = [azt.in_thread(pool, lambda n=number: n * n) for number in range(500)]
        return await asyncio.gather(*calls)

    assert asyncio.run(main()) == [number * number for number in range(500)]


# -- WorkerPool -----------------------------------------------------------------------------------


def test_no_thread_runs_before_the_first_job() -> None:
    assert azt.WorkerPool("t", 4).threads == 0


def test_a_free_worker_is_reused() -> None:
    async def main() -> tuple[set[int], int]:
        pool = azt.WorkerPool("t", 100)
        workers = {await azt.in_thread(pool, thread_id) for _ in range(100)}
        return workers, pool.threads

    workers, threads = asyncio.run(main())
    assert threads < 20  # now and then a worker is still on its way back when the next job comes
    assert len(workers) <= threads


def test_the_pool_grows_with_the_jobs_that_wait() -> None:
    pool, gates = azt.WorkerPool("t", 64), [Gate() for _ in range(40)]

    async def main() -> list[int]:
        calls = [asyncio.create_task(azt.in_thread(pool, gate)) for gate in gates]
        await until(lambda: all(gate.entered.is_set() for gate in gates))
        for gate in gates:
            gate.open()
        return await asyncio.gather(*calls)

    assert len(set(asyncio.run(main()))) == 40
    assert pool.threads == 40


def test_the_worker_that_became_free_last_works_first() -> None:
    pool, gates = azt.WorkerPool("t", 3), [Gate() for _ in range(3)]
    order: list[int] = []
    ended = [threading.Event() for _ in range(4)]

    def job(number: int) -> Callable[[], None]:
        def run() -> None:
            order.append(gates[number]())
            ended[number].set()

        return run

    for number in range(3):
        assert pool.submit(job(number))
        assert gates[number].entered.wait(5)
    for number in range(3):
        gates[number].open()
        assert ended[number].wait(5)
        wait_until(lambda idle=number + 1: len(pool._idle) == idle)
    next_worker: list[int] = []
    pool.submit(lambda: (next_worker.append(threading.get_ident()), ended[3].set())[0])
    assert ended[3].wait(5)
    assert next_worker == [order[-1]]


def test_jobs_of_a_single_thread_run_in_the_order_they_came() -> None:
    async def main() -> list[int]:
        pool = azt.WorkerPool("file", 1)
        done: list[int] = []
        await asyncio.gather(*(azt.in_thread(pool, done.append, n) for n in range(200)))
        assert pool.threads == 1
        return done

    assert asyncio.run(main()) == list(range(200))


def test_a_full_pool_answers_503_with_retry_after() -> None:
    async def main() -> azt.AztError:
        pool, gate = azt.WorkerPool("t", 1, waiting_max=0), Gate()
        busy = asyncio.create_task(azt.in_thread(pool, gate))
        await until(gate.entered.is_set)
        with pytest.raises(azt.AztError) as caught:
            await azt.in_thread(pool, thread_id)
        gate.open()
        await busy
        return caught.value

    error = asyncio.run(main())
    assert (error.status, error.code) == (503, "overloaded")
    assert int(error.headers["retry-after"]) > 0


def test_as_many_jobs_wait_as_the_pool_allows() -> None:
    pool, gate = azt.WorkerPool("t", 1, waiting_max=2), Gate()
    done = threading.Semaphore(0)
    assert pool.submit(gate)
    assert gate.entered.wait(5)
    assert [pool.submit(done.release) for _ in range(3)] == [True, True, False]
    gate.open()
    assert done.acquire(timeout=5)
    assert done.acquire(timeout=5)
    assert not done.acquire(blocking=False)


def test_a_full_pool_works_again_once_a_worker_is_free() -> None:
    pool, gate, done = azt.WorkerPool("t", 1, waiting_max=0), Gate(), threading.Event()
    assert pool.submit(gate)
    assert not pool.submit(done.set)
    gate.open()
    wait_until(lambda: pool.submit(done.set))
    assert done.wait(5)


def test_idle_threads_end() -> None:
    pool = azt.WorkerPool("ending", 4, idle_s=0.05)
    gates = [Gate() for _ in range(4)]
    for gate in gates:
        assert pool.submit(gate)
    assert pool.threads == 4
    for gate in gates:
        gate.open()
    wait_until(lambda: pool.threads == 0)
    wait_until(lambda: not any(one.name == "azt-ending" for one in threading.enumerate()))


def test_a_pool_whose_threads_have_ended_works_again() -> None:
    pool = azt.WorkerPool("t", 2, idle_s=0.01)
    for _ in range(3):
        assert asyncio.run(azt.in_thread(pool, divmod, 9, 4)) == (2, 1)
        wait_until(lambda: pool.threads == 0)


def test_no_job_is_lost_while_idle_threads_end() -> None:
    async def main() -> int:
        pool = azt.WorkerPool("t", 4, idle_s=0.0005)
        done = 0
        for _ in range(300):
            done += await azt.in_thread(pool, int, "1")
            await asyncio.sleep(0.0005)
        return done

    assert asyncio.run(asyncio.wait_for(main(), 30)) == 300


def test_an_idle_worker_does_not_keep_the_last_job_alive() -> None:
    class Body:
        pass

    async def main() -> weakref.ref[Body]:
        body = Body()
        await azt.in_thread(pool, id, body)
        return weakref.ref(body)

    pool = azt.WorkerPool("t", 1)
    kept = asyncio.run(main())
    wait_until(lambda: gc.collect() is not None and kept() is None)


def test_workers_are_daemons_and_named_after_their_pool() -> None:
    worker = asyncio.run(azt.in_thread(azt.WorkerPool("named", 1), threading.current_thread))
    assert worker.name == "azt-named"
    assert worker.daemon


def test_a_machine_without_room_for_a_thread_answers_503() -> None:
    script = """
import asyncio, resource, azt
azt.threading.stack_size(64 << 20)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
pool = azt.WorkerPool("t", 4)
try:
    asyncio.run(azt.in_thread(pool, int))
except azt.AztError as error:
    print(error.status, error.code, pool.threads)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(azt.__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["503", "overloaded", "0"], done.stderr
