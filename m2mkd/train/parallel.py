"""How the processes of a job train one network together: copies of it (DDP), shards (FSDP2), or
copies of which each process holds other experts.

Whole tensors go into checkpoints and come out of them, so all ways write the same files.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.vision_transformer import Block
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_map

from m2mkd.errors import ConfigError
from m2mkd.nn import MoEMlp, gather_experts, gather_state_dict, shard_experts, sharded_parameters
from m2mkd.recipe import Recipe
from m2mkd.train.world import World

# Optimisers that change a weight by nothing but its own gradients, and keep nothing but that: they
# do the same to some of the experts as to all.
ELEMENTWISE = (
    *("adam", "adamax", "adamw", "adan", "lion", "momentum"),
    *("nadam", "nadamw", "radam", "rmsprop", "sgd"),
)


class Parallel:
    """A task whose gradients are the means over all processes, each with a copy of the network.

    Args:
        task: On its device, with the same weights in every process.
        world: The processes.
    """

    def __init__(self, task: TrainingTask, world: World) -> None:
        self.module: nn.Module = task.get_trainable_module()  # type: ignore[assignment]
        self.world = world
        self._run: nn.Module = task if world.size == 1 else self._spread(task)

    def _spread(self, task: TrainingTask) -> nn.Module:
        """Arranges the network for several processes; what to call instead of the task."""
        on = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(task, device_ids=on)

    def __call__(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The task's result for this process's images."""
        result: dict[str, Tensor] = self._run(images, targets)
        return result

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Leaves gradients unshared until the last batch of a step."""
        if isinstance(self._run, DistributedDataParallel) and not is_last:
            with self._run.no_sync():
                yield
        else:
            yield

    def clip_gradients(self, part: nn.Module, limit: float) -> None:
        """Limits the gradient norm of a part of the network; every process must call it."""
        clip_grad_norm_(part.parameters(), limit)

    def weights(self) -> dict[str, Tensor]:
        """Whole weights by clean name; every process must call it."""
        return dict(self.module.state_dict())

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes whole weights; raises RuntimeError where they do not fit."""
        self.module.load_state_dict(weights)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole optimiser state; every process must call it."""
        return dict(optimizer.state_dict())

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Takes whole optimiser state; raises ValueError where it does not fit."""
        optimizer.load_state_dict(state)


class _Shards(Parallel):
    """Every process holds a shard of every tensor of a whole network, block by block."""

    def _spread(self, task: TrainingTask) -> nn.Module:
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        for part in self.module.modules():
            if isinstance(part, Block):
                fully_shard(part, mesh=mesh)
        fully_shard(self.module, mesh=mesh)
        return task

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        self.module.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        yield

    def weights(self) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = _gathered(self.module.state_dict())
        return whole

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        own = self.module.state_dict()
        super().load_weights({k: _like(own[k], v) if k in own else v for k, v in weights.items()})

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = _gathered(optimizer.state_dict())
        return state

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        parameters = _parameters(optimizer)
        own = _change_moments(state, lambda number, value: _like(parameters[number], value))
        super().load_optimizer_state(optimizer, own)


class _Experts(Parallel):
    """Every process holds a copy of the network, but its own experts only, and tokens travel."""

    def _spread(self, task: TrainingTask) -> nn.Module:
        shard_experts(self.module)
        experts = sharded_parameters(task)
        for parameter in experts.values():
            # A sum over the tokens of all processes; the other gradients become means.
            parameter.register_hook(lambda gradient: gradient / self.world.size)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, list(experts))
        return super()._spread(task)

    def clip_gradients(self, part: nn.Module, limit: float) -> None:
        experts = {id(parameter) for parameter in sharded_parameters(part).values()}
        common: list[Tensor] = []
        own: list[Tensor] = []
        for parameter in part.parameters():
            if parameter.grad is not None:
                (own if id(parameter) in experts else common).append(parameter.grad)
        squared = get_total_norm(own).square().to(self.world.device)
        torch.distributed.all_reduce(squared)
        norm = (get_total_norm(common).square() + squared).sqrt()
        clip_grads_with_norm_(part.parameters(), limit, norm)

    def weights(self) -> dict[str, Tensor]:
        return gather_state_dict(self.module)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        experts = sharded_parameters(self.module)
        own = {k: self._own(v) if k in experts else v for k, v in weights.items()}
        super().load_weights(own)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return self._change_experts(optimizer, optimizer.state_dict(), gather_experts)

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        own = self._change_experts(optimizer, state, self._own)
        super().load_optimizer_state(optimizer, own)

    def _own(self, whole: Tensor) -> Tensor:
        """This process's experts of a tensor that has all of them as its first dimension."""
        return whole.chunk(self.world.size)[self.world.rank]

    def _change_experts(
        self,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        change: Callable[[Tensor], Tensor],
    ) -> dict[str, Any]:
        experts = {id(parameter) for parameter in sharded_parameters(self.module).values()}
        is_expert = [id(parameter) in experts for parameter in _parameters(optimizer)]
        return _change_moments(
            state, lambda number, value: change(value) if is_expert[number] else value
        )


def make_parallel(task: TrainingTask, world: World, kind: str) -> Parallel:
    """Chooses how the processes train a task together.

    Args:
        task: On its device, with the same weights in every process.
        world: The processes; a single one holds everything.
        kind: `parallel` of the recipe. Modules that are trained in pairs are small and share
            parameters with their network, so `fsdp` copies them all the same.
    """
    is_whole = not isinstance(task.get_trainable_module(), nn.ModuleDict)
    if world.size > 1 and kind == "fsdp" and is_whole:
        return _Shards(task, world)
    if world.size > 1 and kind == "experts":
        return _Experts(task, world)
    return Parallel(task, world)


def check_parallel(recipe: Recipe, student: nn.Module, world: World) -> None:
    """Lets a way that does not go with the student or the precision fail before any training.

    Raises:
        ConfigError: It does not.
    """
    kind, name = recipe.parallel, recipe.student.model
    if kind != "ddp" and recipe.precision == "fp16":
        # A step is left out where a gradient overflows, and processes would not agree on that.
        raise ConfigError(f"precision fp16 does not go with parallel: {kind}; set precision: bf16")
    if kind == "fsdp" and any(p.ndim == 0 for p in student.parameters()):
        raise ConfigError(
            f"student.model {name} has scalar parameters, which fsdp cannot shard; "
            "set parallel: ddp"
        )
    if kind != "experts":
        return
    counts = {layer.num_experts for layer in student.modules() if isinstance(layer, MoEMlp)}
    if not counts:
        raise ConfigError(
            f"parallel: experts spreads the experts of a V-MoE, and student.model {name} has none; "
            "set parallel: ddp"
        )
    for count in counts:
        if count % world.size:
            raise ConfigError(
                f"parallel: experts: {world.size} processes cannot share num_experts {count} of "
                f"student.model {name} evenly; start as many processes as divide it"
            )


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters in the order in which a state dict of the optimiser numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _change_moments(
    state: dict[str, Any], change: Callable[[int, Tensor], Tensor]
) -> dict[str, Any]:
    """An optimiser's state dict with changed tensors, counts of steps excepted."""
    return {
        **state,
        "state": {
            number: {
                name: change(number, value) if isinstance(value, Tensor) and value.ndim else value
                for name, value in own.items()
            }
            for number, own in state["state"].items()
        },
    }


def _gathered(state: Any) -> Any:
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Cuts a whole tensor as a sharded parameter is cut."""
    if not isinstance(parameter, DTensor) or parameter.shape != value.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
