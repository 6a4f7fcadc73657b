"""Killing real processes of a run at random moments, and damaging what they leave.

`python tests/train/bad_days.py FOLDER [KILLS]` runs the long campaign and prints its figures.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from tiny import metrics, tiny_recipe

from m2mkd.recipe import Recipe
from m2mkd.train.claim import check_free
from m2mkd.train.execute import train
from m2mkd.train.progress import Reporter

# What changes files, as Python's audit hooks name it. Native code writes between these.
_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.utime")


class NotingReporter(Reporter):
    """Appends every message to a file, so that it survives the process."""

    def __init__(self, path: Path) -> None:
        super().__init__(quiet=True)
        self.path = path

    def message(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text + "\n")


def attempt(recipe: Recipe, out: Path, prepare: Callable[[], None], delay: float | None) -> int:
    """Runs a recipe in a forked process.

    Args:
        recipe: What to run.
        out: Its run folder; messages go to `out.messages` beside it.
        prepare: Called in the process first.
        delay: Seconds after which the process is killed; None lets it be.

    Returns:
        Its exit code; -9 when it was killed.
    """
    messages = out.with_suffix(".messages")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            prepare()
            train(recipe, out, NotingReporter(messages))
            code = 0
        except Exception as error:
            NotingReporter(messages).message(f"failed: {error!r}")
        finally:
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_at_write(number: int, out: Path) -> Callable[[], None]:
    """Makes a process kill itself just before its n-th change of a file in the run folder."""
    left = [number]

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            is_write = isinstance(arguments[1], str) and arguments[1][:1] in ("w", "a", "x")
        else:
            is_write = event in _WRITES
        if is_write and str(arguments[0]).startswith(str(out)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(look)


def damage_newest(out: Path, how: str, chance: random.Random) -> bool:
    """Cuts or changes a random file of the newest checkpoint, where its stage has an older one."""
    # A killed process may have left an old step half removed: that has no meta.json any more.
    steps = [path.parent for path in out.rglob("step_*/meta.json") if "superseded" not in str(path)]
    steps = [path for path in steps if not path.name.startswith(".")]
    if not steps:
        return False
    stage = max(steps, key=lambda path: path.stat().st_mtime_ns).parent
    own = sorted(path for path in steps if path.parent == stage)
    if len(own) < 2:
        return False
    newest = own[-1]
    victim = chance.choice(sorted(path for path in newest.iterdir() if path.is_file()))
    data = bytearray(victim.read_bytes())
    position = chance.randrange(len(data))
    if how == "truncate":
        data = data[:position]
    else:
        data[position] ^= 1 << chance.randrange(8)
    victim.write_bytes(data)
    return True


def differences(ours: Path, reference: Path) -> list[str]:
    """Stages whose metrics or final weights are not those of the reference, bit for bit."""
    one, other = metrics(ours), metrics(reference)
    bad = [stage for stage in {*one, *other} if one.get(stage) != other.get(stage)]
    for stage in other:
        weights = [
            load_file(run / stage / (run / stage / "last").read_text() / "model.safetensors")
            for run in (ours, reference)
        ]
        same = all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        bad += [] if same else [f"{stage} (weights)"]
    return bad


def campaign(folder: Path, recipe: Recipe, reference: Path, kills: int, seed: int) -> Counter[str]:
    """Kills and damages runs until there were enough kills; each must end like the reference.

    Returns:
        Counts: rounds (whole runs), kills, how many of them by the clock and while a checkpoint
        was half written, kills by stage, truncations, flips, warnings of damage.

    Raises:
        AssertionError: A run failed, or ended otherwise than the reference.
        BusyError: A run that is complete still holds a folder.
    """
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    while counts["kills"] < kills:
        out = folder / f"round-{counts['rounds']}"
        while (code := _disturbed(recipe, out, chance, counts)) != 0:
            assert code == -signal.SIGKILL, out.with_suffix(".messages").read_text()[-2000:]
        text = out.with_suffix(".messages").read_text()
        counts["warnings"] += text.count("going on from an earlier step")
        counts["rounds"] += 1
        assert (bad := differences(out, reference)) == [], (out, bad)
        assert not list(out.rglob(".step_*.tmp"))
        for left in out.rglob("RUNNING"):  # by one that was killed while it gave a folder up
            check_free(left.parent, print)
    return counts


def _disturbed(recipe: Recipe, out: Path, chance: random.Random, counts: Counter[str]) -> int:
    by_clock = chance.random() < 0.3
    prepare = (lambda: None) if by_clock else dying_at_write(chance.randint(1, 70), out)
    code = attempt(recipe, out, prepare, chance.uniform(0.2, 3.0) if by_clock else None)
    if code != -signal.SIGKILL:
        return code
    counts["kills"] += 1
    counts["by clock"] += by_clock
    counts["while writing a checkpoint"] += bool(list(out.rglob(".step_*.tmp")))
    held = list(out.rglob("RUNNING"))
    counts[f"in {held[0].parent.relative_to(out) if held else 'between stages'}"] += 1
    how = chance.choice(["truncate", "flip", "", ""])
    if how and damage_newest(out, how, chance):
        counts[how] += 1
    return code


def long_recipe() -> Recipe:
    """Every stage and baseline, a checkpoint at every step."""
    return tiny_recipe(checkpoint_every=1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    where.mkdir(parents=True)
    train(long_recipe(), where / "reference", Reporter(quiet=True))
    wanted = int(sys.argv[2]) if len(sys.argv) > 2 else 60
    figures = campaign(where, long_recipe(), where / "reference", wanted, seed=0)
    print(json.dumps(figures, indent=1, sort_keys=True))
