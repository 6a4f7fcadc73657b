"""What goes wrong around training that is nobody's bug, each told in one line with a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from m2mkd.errors import M2MKDError, TrainingError
from m2mkd.recipe import DataConfig, Recipe, named_for

_GO_ON = "the same command goes on from the last checkpoint"


@contextmanager
def failures_named(
    where: str, recipe: Recipe, *, is_training: bool, key: str = "data"
) -> Iterator[None]:
    """Gives a name to memory that runs out and data workers that die.

    Args:
        where: Which stage, for the message.
        recipe: Whose settings to name.
        is_training: Whether the batch size of training or of evaluation is to blame.
        key: The section of its data.

    Raises:
        TrainingError: Memory ran out or a worker died; the original error is its cause.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        data: DataConfig = getattr(recipe, key)
        if isinstance(error, M2MKDError):
            raise
        if _is_out_of_memory(error):
            told = _memory(error, recipe, data, is_training)
        elif "DataLoader worker" in text:
            told = _worker(text, data)
        else:
            raise
        raise TrainingError(f"{where}: {named_for(key, told)}") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(
        error, (MemoryError, torch.OutOfMemoryError)
    ) or "can't allocate memory" in str(error)


def _memory(error: Exception, recipe: Recipe, data: DataConfig, is_training: bool) -> str:
    place = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
    if not is_training:
        return f"out of {place} at data.eval_batch_size {data.eval_batch_size}; lower it; {_GO_ON}"
    half, twice = max(1, data.batch_size // 2), 2 * data.accumulate
    helps = [f"lower it, such as data.batch_size: {half} with data.accumulate: {twice}"]
    if not recipe.grad_checkpointing:
        helps.append("set grad_checkpointing: true")
    if recipe.precision == "fp32" and place == "GPU memory":
        helps.append("set precision: bf16 (another result)")
    return f"out of {place} at data.batch_size {data.batch_size}; {', or '.join(helps)}; {_GO_ON}"


def _worker(text: str, data: DataConfig) -> str:
    why = " ".join(text.split()).split(" It is possible")[0].rstrip(". ")
    shared = " or the shared memory in /dev/shm" if "Bus error" in text else ""
    return (
        f"a data loading process died ({why}), most often because memory{shared} ran out; lower "
        f"data.workers (now {data.workers}), then {_GO_ON}"
    )
