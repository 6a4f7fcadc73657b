"""Runs the stages of a recipe in order, skipping what is done and waiting for other jobs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from m2mkd.errors import BusyError, CheckpointError, ConfigError
from m2mkd.recipe import Recipe
from m2mkd.train import alignment
from m2mkd.train.plan import STAGES
from m2mkd.train.progress import Reporter
from m2mkd.train.run import Run
from m2mkd.train.stopping import StopRequest, stopping_on_signals

_POLL = 10.0  # seconds between looks at a stage that another job is working on


def train(
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    *,
    stage: str | None = None,
    from_stage: str | None = None,
    pair: int | None = None,
    fresh: bool = False,
    wait: bool = False,
    stop: StopRequest | None = None,
) -> dict[str, Any] | None:
    """Runs a recipe: all stages that are not complete, or one of them.

    Every process of a job calls it alike; process 0 writes, and evaluates in the end.

    Args:
        recipe: What to do.
        out: The run folder.
        reporter: Where progress goes.
        stage: Only this one of `STAGES`; earlier ones must be complete.
        from_stage: Redo this stage and all after it.
        pair: With stage `distill`: only this pair.
        fresh: Set all earlier results of the folder aside first.
        wait: Wait for stages that are missing or that another job is working on.
        stop: Asks for a checkpoint and an end; signals do so in any case.

    Returns:
        The summary (as in `summary.json`), or None when the evaluate stage was not run here.

    Raises:
        M2MKDError: Anything a user can cause; what was computed stays.
        Interrupted: Stopped on request, after saving.
    """
    from m2mkd.train.summary import summarise

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    stop = stop or StopRequest()
    run = Run(recipe, out, reporter, stop)
    if wait and run.world.size > 1:
        raise ConfigError("--wait is for jobs of one process; several would idle together")
    redone = STAGES if fresh else STAGES[STAGES.index(from_stage) :] if from_stage else ()
    with stopping_on_signals(stop), run.world.lost_peers_named():
        run.world.on_main(lambda: _prepare(run, pair, redone))
        for name in STAGES[:-1] if stage is None else [stage]:
            if name != "evaluate":
                _perform(run, name, pair, wait=wait)
        if stage not in (None, "evaluate"):
            return None
        while missing := run.world.on_main(lambda: _missing(run, "evaluate")):
            _pause(run, missing, wait=wait)
    # One process is enough, and the others need not wait for it.
    return summarise(run) if run.world.is_main else None


def _prepare(run: Run, pair: int | None, redone: tuple[str, ...]) -> None:
    run.prepare_folder(pair)
    for plan in run.plan.values():
        if plan.stage in redone:
            run.set_aside(run.out / plan.name, "asked to start over")


def _perform(run: Run, stage: str, pair: int | None, *, wait: bool) -> None:
    """Does one stage, unless it is complete."""
    from m2mkd.train.report import refresh_report  # slow to load: not before the first step

    steps: dict[str, Callable[[], None]] = {
        "meta": run.train_meta,
        "teacher": run.train_teacher,
        "distill": lambda: run.train_pairs(pair),
        "end_to_end": run.train_end_to_end,
        "baselines": run.train_baselines,
    }
    units = [unit.name for unit in run.plan.values() if unit.stage == stage]
    is_new = False
    while run.world.on_main(lambda: not all(run.is_done(unit) for unit in units)):
        is_new = True
        missing = run.world.on_main(lambda: _missing(run, stage))
        if missing is not None:
            _pause(run, missing, wait=wait)
            continue
        try:
            steps[stage]()
        except BusyError as error:
            if not wait:
                raise
            _pause(run, str(error), wait=True)
            continue
        if pair is None:  # a pair's job writes to its own folder only
            run.world.on_main(lambda: refresh_report(run.out, run.reporter))
        if run.world.total_and_stop([], run.stop)[1]:
            raise run.stop.exception(f"stopped after stage {stage}")
        return
    if units and not is_new:
        run.reporter.message(f"{stage}: complete")


def _missing(run: Run, stage: str) -> str | None:
    """Which earlier stage is not complete, as an error message; None when all are."""
    needed = {
        "teacher": ["meta"],
        "distill": ["meta", "teacher", alignment.NAME],
        "end_to_end": ["distill"],
        "baselines": ["teacher"] if "logit_kd" in run.recipe.baselines else [],
        "evaluate": list(run.plan),
    }
    for name in needed.get(stage, []):
        if name in run.plan and not run.is_done(name):
            return (
                f"stage {stage} needs {name}, which is not complete in {run.out}; run it first, "
                "wait for the job that does with --wait, or leave out --stage"
            )
    return None


def _pause(run: Run, reason: str, *, wait: bool) -> None:
    """Sleeps a little before the next look, or fails when nobody wants to wait."""
    if not wait:
        raise CheckpointError(reason)
    if reason != run.waiting_for:
        run.reporter.message(f"waiting: {reason}")
        run.waiting_for = reason
    deadline = time.monotonic() + _POLL
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if run.stop.is_set:
            raise run.stop.exception("stopped while waiting for another job")
