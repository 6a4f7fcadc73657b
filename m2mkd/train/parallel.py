"""How the processes of a job train one network together: copies of it (DDP) or shards (FSDP2).

Whole tensors go into checkpoints and come out of them, so both ways write the same files.
"""

from collections.abc import Iterator
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
from torch.utils._pytree import tree_map

from m2mkd.train.world import World


class Parallel:
    """A task whose gradients are the means over all processes.

    Args:
        task: On its device, with the same weights in every process.
        world: The processes.
        is_sharded: Shard a whole network, block by block; modules that are trained in pairs are
            small and share parameters with their network, so they are always copied.
    """

    def __init__(self, task: TrainingTask, world: World, *, is_sharded: bool) -> None:
        self.module: nn.Module = task.get_trainable_module()  # type: ignore[assignment]
        self.is_sharded = (
            is_sharded and world.size > 1 and not isinstance(self.module, nn.ModuleDict)
        )
        self._run: nn.Module = task
        if self.is_sharded:
            _shard(self.module, world)
        elif world.size > 1:
            on = [world.device] if world.device.type == "cuda" else None
            self._run = DistributedDataParallel(task, device_ids=on)

    def __call__(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The task's result for this process's images."""
        result: dict[str, Tensor] = self._run(images, targets)
        return result

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Leaves gradients unshared until the last batch of a step."""
        if is_last:
            yield
        elif self.is_sharded:
            self.module.set_requires_gradient_sync(False)  # type: ignore[operator]
            yield
            self.module.set_requires_gradient_sync(True)  # type: ignore[operator]
        elif isinstance(self._run, DistributedDataParallel):
            with self._run.no_sync():
                yield
        else:
            yield

    def weights(self) -> dict[str, Tensor]:
        """Whole weights by clean name; every process must call it."""
        whole: dict[str, Tensor] = _gathered(self.module.state_dict())
        return whole

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes whole weights; raises RuntimeError where they do not fit."""
        if self.is_sharded:
            own = self.module.state_dict()
            weights = {k: _like(own[k], v) if k in own else v for k, v in weights.items()}
        self.module.load_state_dict(weights)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole optimiser state; every process must call it."""
        state: dict[str, Any] = _gathered(optimizer.state_dict())
        return state

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Takes whole optimiser state; raises ValueError where it does not fit."""
        if self.is_sharded:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, own in state["state"].items():
                parameter = parameters[number]
                for name, value in own.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        own[name] = _like(parameter, value)
        optimizer.load_state_dict(state)


def _shard(network: nn.Module, world: World) -> None:
    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in network.modules():
        if isinstance(part, Block):
            fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)


def _gathered(state: Any) -> Any:
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Cuts a whole tensor as a sharded parameter is cut."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
