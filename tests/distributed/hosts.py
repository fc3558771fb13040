"""Two hosts on one machine: network namespaces joined by a wire that delays and loses packets and can be cut.

The wire is a pair of TUN devices whose packets a thread carries over, as not every kernel has the netem queue.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

ADDRESSES = ("10.77.0.1", "10.77.0.2")
WIRE = "wire"  # the device's name on both hosts
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    name = f"cf-try-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed: {error.stderr.strip()}"
    except OSError as error:
        return f"/dev/net/tun cannot be opened: {error.strerror}"
    return ""


class Hosts:
    """A context manager. delay: seconds each way. loss: the share of packets that get lost."""

    def __init__(self, delay: float = 0.0, loss: float = 0.0) -> None:
        self.delay, self.loss, self.is_cut = delay, loss, False
        self._names = [f"cf-{os.getpid()}-{host}" for host in range(2)]
        self._tuns: list[int] = []
        self._processes: list[subprocess.Popen] = []
        self._ended = threading.Event()
        self._carrier = threading.Thread(target=self._carry, daemon=True)

    def __enter__(self) -> Hosts:
        for host, name in enumerate(self._names):
            _ip("netns", "add", name)
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            device = f"cf{os.getpid() % 10**7}-{host}"
            fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TUN_WITHOUT_HEADER))
            self._tuns.append(tun)
            _ip("link", "set", device, "netns", name, "name", WIRE)
            _ip("-n", name, "address", "add", ADDRESSES[host], "peer", ADDRESSES[1 - host], "dev", WIRE)
            for link in (WIRE, "lo"):
                _ip("-n", name, "link", "set", link, "up")
        self._carrier.start()
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            self.kill(process)
        self._ended.set()
        self._carrier.join(5)
        for tun, name in zip(self._tuns, self._names, strict=False):
            os.close(tun)
            _ip("netns", "del", name)

    def start(self, host: int, words: Sequence[str], **options: Any) -> subprocess.Popen:
        """Start a command on a host, in a process group of its own."""
        command = ["ip", "netns", "exec", self._names[host], *words]
        process = subprocess.Popen(command, start_new_session=True, text=True, **options)
        self._processes.append(process)
        return process

    @staticmethod
    def kill(process: subprocess.Popen) -> None:
        """Kill a command with all that it started, as if its host had lost power."""
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for pid in (process.pid, *map(int, children)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait(20)

    def _carry(self) -> None:
        """Carry packets from each device to the other one."""
        draws, number = random.Random(0), 0
        waiting: list[tuple[float, int, int, bytes]] = []
        while not self._ended.is_set():
            wait = max(0.0, min(0.05, waiting[0][0] - time.monotonic())) if waiting else 0.05
            for tun in select.select(self._tuns, [], [], wait)[0]:
                packet = os.read(tun, 1 << 16)
                if not self.is_cut and draws.random() >= self.loss:
                    number += 1
                    other = self._tuns[1 - self._tuns.index(tun)]
                    heapq.heappush(waiting, (time.monotonic() + self.delay, number, other, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                *_, tun, packet = heapq.heappop(waiting)
                if not self.is_cut:
                    os.write(tun, packet)
