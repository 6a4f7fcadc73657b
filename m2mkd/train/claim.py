"""Who works on a stage folder right now, on file systems that several machines share.

The owner links a complete small file to its name, which is atomic on NFS too (locks often are not)
and never shows a half-written claim, and touches it every few seconds. No clock is compared with
another: a reader watches whether the file changes. A claim whose owner is gone (killed, or its
machine lost) is taken over.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from m2mkd.errors import BusyError, CheckpointError
from m2mkd.models.checkpoint import write_failure

_FILE = "RUNNING"
_BEAT = 15.0  # seconds between signs of life
_EXPIRY = 90.0  # seconds without one, after which an owner on another machine is taken for dead
_POLL = 1.0


class Claim:
    """The right to write to a folder; a context manager that gives it up at the end.

    Args:
        folder: What to claim; made when missing.
        message: Told when the claim of a job on another machine must be watched for a while.

    Raises:
        BusyError: A living job holds the folder.
        CheckpointError: The folder cannot be written.
    """

    def __init__(self, folder: Path, message: Callable[[str], None]) -> None:
        self._path = folder / _FILE
        self._identity = uuid.uuid4().hex
        self._message = message
        self._ended = threading.Event()
        while not _put(self._path, self._identity):
            rival = _read(self._path)
            if rival is None:
                continue
            if _is_alive(self._path, rival, message):
                raise BusyError(
                    f"{folder} is being written by {_describe(rival)}; let it finish, wait for it "
                    "with --wait, or stop it first"
                )
            message(f"{folder}: {_describe(rival)} is gone; taking over")
            _remove(self._path, rival["id"], message)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Makes sure that this process still holds the folder.

        Raises:
            BusyError: It was stopped for so long that another job took over.
        """
        owner = _read(self._path)
        if owner is None or owner["id"] != self._identity:
            by = "nobody" if owner is None else _describe(owner)
            raise BusyError(
                f"{self._path.parent} is now held by {by}: this process was silent for more than "
                f"{_EXPIRY:.0f} s; it stops without writing"
            )

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        _remove(self._path, self._identity, self._message)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                os.utime(self._path)
            except OSError:
                continue  # `check` finds out whether the claim is lost


def check_free(folder: Path, message: Callable[[str], None]) -> None:
    """Makes sure that no living job holds a folder.

    Raises:
        BusyError: One does.
    """
    path = folder / _FILE
    owner = _read(path)
    if owner is not None and _is_alive(path, owner, message):
        raise BusyError(
            f"{folder} is being written by {_describe(owner)}; let it finish, wait for it with "
            "--wait, or stop it first"
        )


def _put(path: Path, identity: str) -> bool:
    """Makes a complete file with the facts of this process; False when there is one already."""
    facts = {
        "id": identity,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    draft = path.with_name(f".{_FILE}.{identity}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(facts))
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        draft.unlink(missing_ok=True)
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """Facts of the owner; None when nobody holds the folder."""
    unknown = {"id": "", "host": "", "pid": 0, "started": "", "job": None}
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return unknown  # damaged
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    return {**unknown, **facts} if isinstance(facts, dict) else unknown


def _is_alive(path: Path, owner: dict[str, Any], message: Callable[[str], None]) -> bool:
    if owner["host"] == socket.gethostname():
        return bool(owner["started"]) and _start_of(owner["pid"]) == owner["started"]
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and owner["job"] == job:
        return False  # this job was queued again: its earlier life is over
    message(
        f"{path.parent}: watching for up to {_EXPIRY:.0f} s whether {_describe(owner)} is alive"
    )
    before, deadline = _touched(path), time.monotonic() + _EXPIRY
    while time.monotonic() < deadline:
        time.sleep(_POLL)
        if _touched(path) != before:
            return _read(path) is not None
    return False


def _touched(path: Path) -> int:
    """Time of the last sign of life, by the file server's clock."""
    try:
        with path.open("rb") as file:  # opening makes NFS ask the server, stat alone does not
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _start_of(pid: int) -> str:
    """When a process of this machine started, in clock ticks since boot; empty when it is gone."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else numbers[18]  # a zombie only waits to be counted


def _describe(owner: dict[str, Any]) -> str:
    job = f", SLURM job {owner['job']}" if owner["job"] else ""
    return f"process {owner['pid']} on {owner['host'] or 'an unknown machine'}{job}"


def _ticket(path: Path, identity: str) -> Path:
    """The right to remove one owner's claim; whoever creates it has it."""
    return path.with_name(f".{_FILE}.{identity or 'unknown'}")


def _remove(path: Path, identity: str, message: Callable[[str], None]) -> None:
    """Removes one owner's claim, never one that came after it.

    Only the holder of the owner's ticket may, so what he has read stays true until he is done. Of
    several who want to take over, one gets the ticket; the others see what he leaves. A ticket is a
    claim itself, so that of a holder who was killed is taken over in the same way.
    """
    ticket = _ticket(path, identity)
    if not _put(ticket, uuid.uuid4().hex):
        holder = _read(ticket)
        if holder is not None and _is_alive(ticket, holder, message):
            time.sleep(_POLL)
        elif holder is not None:
            _remove(ticket, holder["id"], message)
        return
    try:
        owner = _read(path)
        if owner is not None and owner["id"] == identity:
            path.unlink(missing_ok=True)
    finally:
        ticket.unlink(missing_ok=True)
