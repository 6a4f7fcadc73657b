"""Asking a run to save and end: Ctrl-C by a person, SIGTERM or SIGUSR1 by a scheduler, SIGHUP by a
terminal that closes.
"""

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Schedulers send SIGTERM before they reclaim a machine, and the signal that a job asked for
# (`--signal=USR1@120`) before its time is up.
_SCHEDULER = (signal.SIGTERM, signal.SIGUSR1)
_SAME_PRESS = 1.0  # seconds in which a launcher may deliver one Ctrl-C twice
_WORKER_GRACE = 60  # seconds a data worker outlives a scheduler's SIGTERM


class Interrupted(KeyboardInterrupt):
    """The run stopped on request, with its state saved."""


class Preempted(Interrupted):
    """A scheduler asked for the stop: the job can be queued again."""


class StopRequest:
    """Whether, and by whom, the run was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    @property
    def is_set(self) -> bool:
        """Whether the run shall save and end."""
        return self.signal is not None

    @property
    def is_by_scheduler(self) -> bool:
        """Whether it was not a person who asked."""
        return self.signal in _SCHEDULER

    def set(self, number: int = signal.SIGINT) -> None:
        """Asks for the stop; a second Ctrl-C ends the process at once."""
        now = time.monotonic()
        if self.is_set and number == signal.SIGINT and now - self._since > _SAME_PRESS:
            raise KeyboardInterrupt
        if not self.is_set:
            self.signal, self._since = signal.Signals(number), now

    def exception(self, where: str) -> Interrupted:
        """What to raise once the state is saved; `where` says how far the run came."""
        if self.signal is not None and self.is_by_scheduler:
            return Preempted(f"{where} on {self.signal.name}")
        return Interrupted(where)


@contextmanager
def stopping_on_signals(stop: StopRequest) -> Iterator[None]:
    """Makes Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP set `stop`; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        stop.set(number)

    asking = [signal.SIGINT, *_SCHEDULER]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        asking.append(signal.SIGHUP)
    previous = {s: signal.signal(s, request) for s in asking}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Sends what was written to a terminal nowhere: it is gone, and writing to it would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        # By its kind, as a terminal that has hung up is none to isatty; one may be closed, too.
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)


def outlive_signals(worker: int) -> None:
    """Lets a data loading worker serve on while the main process saves.

    Signals reach all processes of a job. A worker that ended at once would take the main process
    down before the end of its step; one that never ended could not be cleaned up.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_GRACE))
