"""Processes for tests, forked from one that has loaded torch and the package, which takes seconds."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import signal
import socket
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def context() -> ForkServerContext:
    """Starts processes fast, each as fresh as a spawned one but for these modules and the environment of the first."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["torch.multiprocessing", "open_clip", "cliperase_fast.unlearning.api"])
    return found


def apart(function: Callable[..., T], *arguments: object, **environment: str) -> T:
    """What `function` returns in a process of its own."""
    with ProcessPoolExecutor(1, context(), _prepared, (environment,)) as process:
        return process.submit(function, *arguments).result()


def kill_once(reached: Callable[[], bool], function: Callable[..., object], *arguments: object) -> None:
    """Call `function` in a process that is killed once `reached()`; it must not end before."""
    process = context().Process(target=function, args=arguments, daemon=True)
    process.start()
    while process.is_alive() and not reached():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def launched(size: int, folder: Path, function: Callable[..., T], *arguments: object) -> list[T]:
    """What `function` returns on each of `size` ranks, in an environment like torchrun's; what they print goes to files
    in `folder`."""
    (port,) = free_ports(1)
    ours = context()
    answers = ours.Queue()
    ranks = []
    for rank in range(size):
        environment = {
            "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        log = folder / f"rank-{rank}.log"
        ranks.append(ours.Process(target=_serve, args=(rank, environment, log, answers, function, arguments)))
        ranks[-1].start()
    found = {}
    try:
        for _ in range(size):
            rank, fine, answer = answers.get(timeout=300)
            assert fine, f"rank {rank}: {answer}"
            found[rank] = answer
    except queue.Empty:
        raise AssertionError("\n".join(path.read_text()[-3000:] for path in folder.glob("rank-*.log"))) from None
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [found[rank] for rank in range(size)]


def _serve(
    rank: int, environment: dict[str, str], log: Path, answers: Any, function: Callable[..., Any], arguments: tuple
) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _prepared(environment)
    try:
        answers.put((rank, True, function(*arguments)))
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _prepared(environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def peak(step: Callable[[], object]) -> int:
    """Bytes that are resident at most while `step` runs, beyond those before it."""
    ctypes.CDLL(None).malloc_trim(0)  # what was given back is not to be had for nothing
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak starts again from what is resident now
    before = _kib("VmRSS")
    step()
    return (_kib("VmHWM") - before) * 1024


def _kib(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))
