"""A run as a chain of SLURM jobs: one a stage, and an array with one task a module pair.

submitit writes the batch scripts; it is imported only here (`pip install 'm2mkd[cluster]'`).
"""

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from m2mkd.errors import ConfigError
from m2mkd.models.checkpoint import write_text
from m2mkd.recipe import load_recipe
from m2mkd.train.execute import train
from m2mkd.train.parallel import check_parallel
from m2mkd.train.progress import Reporter
from m2mkd.train.run import Run
from m2mkd.train.stopping import Preempted, StopRequest, stopping_on_signals
from m2mkd.train.world import World

# What each job waits for. Baselines need no pairs, so they run beside them.
_AFTER = {
    "meta": [],
    "teacher": ["meta"],
    "distill": ["teacher"],
    "baselines": ["teacher"],
    "end_to_end": ["distill"],
    "evaluate": ["end_to_end", "baselines"],
}
_IN_PARALLEL = ("meta", "teacher", "baselines", "end_to_end")  # the others take one process
_NOTICE = 120  # seconds between the signal to save and the end of a job's time


@dataclass(frozen=True)
class Resources:
    """What each job asks SLURM for; None leaves it to the cluster's defaults.

    Attributes:
        partition, account, qos, constraint: As `sbatch` has them.
        minutes: Time limit. A job that needs more saves, and is queued again.
        nodes: Machines of jobs that train whole networks.
        gpus: GPUs a machine of these, one process each; 0 takes one process and no GPU.
        cpus: CPU cores a process.
        memory: GB a machine.
        at_once: Pairs that may run at the same time.
        setup: Shell lines before the start, such as `module load cuda`.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    minutes: int = 720
    nodes: int = 1
    gpus: int = 1
    cpus: int = 8
    memory: int | None = None
    at_once: int = 8
    setup: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class StageJob:
    """What one SLURM job runs; called by submitit on the compute node, once per process."""

    recipe: str
    out: str
    stage: str

    def __call__(self, pair: int | None = None) -> None:
        """Trains the stage, or one pair of it; out of time, saves and queues itself again."""
        stop = StopRequest()
        with stopping_on_signals(stop):
            rank = _join_processes()
            recipe, out = load_recipe(self.recipe), Path(self.out)
            try:
                with Reporter(quiet=rank > 0) as reporter:
                    train(recipe, out, reporter, stage=self.stage, pair=pair, stop=stop)
            except Preempted as stopped:
                print(f"{stopped}; state saved", flush=True)
                # After SIGTERM the job was pre-empted, which SLURM repairs itself, or cancelled.
                if stop.signal == signal.SIGUSR1 and rank == 0:
                    job = os.environ["SLURM_JOB_ID"]
                    subprocess.run(["scontrol", "requeue", job], check=True)


def launch(
    run: Run, resources: Resources, show: Callable[[str], None] | None = None
) -> dict[str, str]:
    """Submits a run's stages as SLURM jobs that wait for each other.

    Args:
        run: The run; data, models and settings have been checked by building it.
        resources: What to ask for.
        show: Gets each batch script instead of SLURM.

    Returns:
        The job id of every stage; placeholders when the scripts are only shown.

    Raises:
        ConfigError: submitit is missing, this machine has no SLURM, or so many processes cannot
            share the student's experts.
    """
    if run.recipe.parallel != "ddp":
        processes = resources.nodes * max(1, resources.gpus)
        check_parallel(run.recipe, run.networks.student(), World(size=processes))
    submit = _submitter(run, resources, show)
    recipe = (run.out / "recipe.yaml").resolve()
    if show is None:
        text = yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False)
        write_text(recipe, text)
    jobs: dict[str, str] = {}
    for stage, after in _AFTER.items():
        if stage != "evaluate" and all(unit.stage != stage for unit in run.plan.values()):
            continue
        earlier = [jobs[name] for name in after if name in jobs]
        options = _options(run, resources, stage, earlier)
        jobs[stage] = submit(StageJob(str(recipe), str(run.out.resolve()), stage), options)
    return jobs


def _submitter(
    run: Run, resources: Resources, show: Callable[[str], None] | None
) -> Callable[[StageJob, dict[str, Any]], str]:
    try:
        from submitit import SlurmExecutor
        from submitit.slurm.slurm import _make_sbatch_string
    except ImportError:
        raise ConfigError("m2mkd launch needs submitit; pip install 'm2mkd[cluster]'") from None
    logs, count = run.out.resolve() / "slurm" / "%j", run.networks.num_modules

    def print_script(job: StageJob, options: dict[str, Any]) -> str:
        if job.stage == "distill":
            options = {**options, "map_count": count}
        command = f"python -u -m submitit.core._submit {logs}"
        assert show is not None
        show(f"# {job.stage}\n{_make_sbatch_string(command=command, folder=logs, **options)}")
        return f"<job id of {job.stage}>"

    def to_slurm(job: StageJob, options: dict[str, Any]) -> str:
        executor = SlurmExecutor(folder=logs)
        executor.update_parameters(**options)
        if job.stage == "distill":
            first = executor.map_array(job, range(count))[0]
            return str(first.job_id).partition("_")[0]
        return str(executor.submit(job).job_id)

    if show is not None:
        return print_script
    if SlurmExecutor.affinity() < 0:
        raise ConfigError(
            "there is no srun on this machine; run m2mkd launch on a login node, or see the "
            "scripts with --dry-run"
        )
    return to_slurm


def _options(run: Run, resources: Resources, stage: str, earlier: list[str]) -> dict[str, Any]:
    """sbatch options of a stage, in submitit's names."""
    is_parallel = stage in _IN_PARALLEL
    gpus = resources.gpus if is_parallel else min(resources.gpus, 1)
    wanted = {
        "job_name": f"{run.recipe.name}-{stage}",
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "time": resources.minutes,
        "nodes": resources.nodes if is_parallel else 1,
        "ntasks_per_node": max(1, gpus),
        "gpus_per_node": gpus or None,
        "cpus_per_task": resources.cpus,
        "mem": None if resources.memory is None else f"{resources.memory}GB",
        "dependency": f"afterok:{':'.join(earlier)}" if earlier else None,
        "array_parallelism": resources.at_once,
        "setup": list(resources.setup) or None,
        "stderr_to_stdout": True,
        "srun_args": ["--kill-on-bad-exit=1"],  # one process fails: the job ends
        "additional_parameters": {
            "signal": f"USR1@{_NOTICE}",
            "requeue": True,
            "kill-on-invalid-dep": "yes",  # a failed stage takes the later ones off the queue
        },
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _join_processes() -> int:
    """Tells torch which of the job's processes this is; returns its rank."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    return int(os.environ.get("RANK", "0"))
