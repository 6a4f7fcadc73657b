"""The processes that share one training job (started by torchrun or srun), or the only one."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import distributed

from m2mkd.errors import ConfigError, M2MKDError, TrainingError
from m2mkd.recipe import Recipe
from m2mkd.train.stopping import StopRequest

T = TypeVar("T")
# What gloo and NCCL say when a process at the other end is gone or silent.
_BROKEN = (
    "gloo",
    "NCCL",
    "ncclSystemError",
    "Connection closed",
    "Connection reset",
    "Broken pipe",
)


@dataclass(frozen=True)
class World:
    """One process's place among those of its job.

    Attributes:
        rank: Number of this process, from 0; process 0 alone writes files.
        size: Number of processes.
        device: Where this process computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` in process 0 only and hands its result to all; every process must call it.

        Reading the run folder this way also keeps the others from remembering that a file was
        missing, as network file systems do, after process 0 has written it.

        Args:
            work: Quick; its result is a plain value.

        Raises:
            M2MKDError: In process 0, what `work` raised; a `TrainingError` in the others.
        """
        if self.size == 1:
            return work()
        failure: M2MKDError | None = None
        answer: list[object] = [None, False]
        if self.is_main:
            try:
                answer = [work(), True]
            except M2MKDError as error:
                failure = error
        broadcast_object_list(answer)
        if failure is not None:
            raise failure
        if not answer[1]:
            raise TrainingError(f"process {self.rank} stops because process 0 did; see its message")
        return answer[0]  # type: ignore[return-value]

    def total(self, values: Iterable[float]) -> list[float]:
        """Sums numbers over the processes, in float64; every process must call it."""
        values = list(values)
        if self.size == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(numbers)
        summed: list[float] = numbers.tolist()
        return summed

    def total_and_stop(
        self, values: Iterable[float], stop: StopRequest
    ) -> tuple[list[float], bool]:
        """Sums numbers like `total`, and lets a stop that one process was asked for reach all.

        Returns:
            The sums, and whether to stop: the same in every process, whatever signal comes late.
        """
        signals = [float(stop.is_set), float(stop.is_by_scheduler)]
        asked, by_scheduler, *summed = self.total([*signals, *values])
        if asked and not stop.is_set:
            stop.set(signal.SIGTERM if by_scheduler else signal.SIGINT)
        return summed, asked > 0

    @contextmanager
    def lost_peers_named(self) -> Iterator[None]:
        """Turns the failure of a collective, when another process has died, into one line.

        Raises:
            TrainingError: Another process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            is_broken = isinstance(error, distributed.DistBackendError) or any(
                word in str(error) for word in _BROKEN
            )
            if self.size == 1 or not is_broken or isinstance(error, M2MKDError):
                raise
            raise TrainingError(
                f"process {self.rank} of {self.size} lost another one, which was killed or failed "
                "(see its message); the same command goes on from the last checkpoint"
            ) from error


def leave_world() -> None:
    """Ends a process of a job of several that has done its part; does nothing to a job of one.

    It ends here, not by way of the interpreter's own end, during which a thread of a connection
    that lets go of a tensor aborts the process; torchrun would end all others for it.
    """
    if not distributed.is_initialized():
        return
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """What places and scales the training of one job, in the recipe's precision.

    Raises:
        ConfigError: A precision the device cannot do.
    """
    # accelerate keeps the first precision of a process; a second run may ask for another.
    AcceleratorState._reset_state(reset_partial_state=False)
    mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[recipe.precision]
    # accelerate joins processes without a GPU only when told that there is none.
    is_cpu_job = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    try:
        accelerator = Accelerator(mixed_precision=mixed, cpu=is_cpu_job)
    except ValueError as error:
        raise ConfigError(f"precision {recipe.precision}: {error}; set precision: fp32") from None
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU; set precision: bf16 or fp32")
    return accelerator
