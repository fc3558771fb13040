"""Run functions on gloo ranks of this machine; they start once, serve many tests, and every wait has a timeout."""

from __future__ import annotations

import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing  # how tensors pass between processes
from processes import context

START_SECONDS, ANSWER_SECONDS = 90, 120
COLLECTIVE_TIMEOUT = timedelta(seconds=45)  # a busy machine imports DeepSpeed for long


def _serve(rank: int, size: int, store: str, tasks: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=size, init_method=f"file://{store}", timeout=COLLECTIVE_TIMEOUT
    )
    answers.put((rank, True, None))
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            answers.put((rank, True, function(rank, *arguments)))
        except Exception as error:  # shown by the test that asked
            answers.put((rank, False, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


class Ranks:
    """`size` processes, one process group."""

    def __init__(self, size: int, folder: Any) -> None:
        ours = context()
        self.size = size
        self._answers = ours.Queue()
        self._tasks = [ours.Queue() for _ in range(size)]
        self._processes = [
            ours.Process(
                target=_serve, args=(rank, size, f"{folder}/store", self._tasks[rank], self._answers), daemon=True
            )
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()
        self._collect(START_SECONDS)

    def try_all(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """(whether it returned, what it returned or the error's name, text and trace) of function(rank, *arguments)."""
        for tasks in self._tasks:
            tasks.put((function, arguments))
        return self._collect(ANSWER_SECONDS)

    def ask(self, rank: int, function: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
        """Return the same for `rank` alone, if only it is expected to answer."""
        for tasks in self._tasks:
            tasks.put((function, arguments))
        answered, *answer = self._answers.get(timeout=ANSWER_SECONDS)
        assert answered == rank
        return answer[0], answer[1]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What every rank returns; an error of any fails the test."""
        answers = self.try_all(function, *arguments)
        errors = [f"rank {rank}: {answer[2]}" for rank, (fine, answer) in enumerate(answers) if not fine]
        assert not errors, "\n".join(errors)
        return [answer for _, answer in answers]

    def _collect(self, seconds: float) -> list[tuple[bool, Any]]:
        found = {}
        for _ in range(self.size):
            try:
                rank, fine, answer = self._answers.get(timeout=seconds)
            except queue.Empty:
                missing = sorted(set(range(self.size)) - set(found))
                self.stop(kill=True)
                raise AssertionError(f"no answer from ranks {missing} in {seconds} s") from None
            found[rank] = fine, answer
        return [found[rank] for rank in range(self.size)]

    def stop(self, kill: bool = False) -> None:
        for tasks, process in zip(self._tasks, self._processes, strict=True):
            if kill:
                process.kill()
            else:
                tasks.put(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()
