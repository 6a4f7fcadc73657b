"""Expert parallelism: the experts of a layer are spread over ranks, each rank keeps its tokens.

GShard (arXiv 2006.16668 section 3.2) in the dropless form: every rank routes its own tokens, sends
each row to the rank that has its expert, and gets the result back. Works with any backend that has
`all_to_all_single` with uneven splits: NCCL, and Gloo for processes on CPUs.

A model is built whole on every rank, with equal weights, and then sharded, before its optimiser is
made:

    shard_experts(model)                  # rank r keeps experts r*E/R to (r+1)*E/R
    ...                                   # train (a recipe's `parallel: experts` does all this)
    weights = gather_state_dict(model)    # all ranks together: the whole model's state dict

Checkpoints hold the whole model: save what `gather_state_dict` returns on one rank, load it into a
whole model, then shard that. Two things to know when training:

- Router and everything else are replicated, and their gradients must be averaged over ranks as
  usual. Experts must be left out of that (`sharded_parameters` lists them): their gradients are
  already sums over the tokens of all ranks, of R losses that are each a mean over one rank's
  tokens, so divide them by R where the other gradients are averaged.
- A capacity, expert choice and the balance losses look at the tokens of one rank, as V-MoE's
  routing groups do. Without a capacity the outputs are those of the whole model.

Letters: R ranks, T tokens of a rank, D width, E experts, K experts per token, M rows of the own
tokens, N rows received.
"""

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2mkd import ops
from m2mkd.errors import ConfigError
from m2mkd.nn.moe import MoEMlp
from m2mkd.ops._autocast import to_region

_EXPERT_PARAMETERS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


class ShardedMoEMlp(MoEMlp):
    """An `MoEMlp` of whose experts a rank has [E/R, ...]; `shard_experts` makes them."""

    group: dist.ProcessGroup | None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedMoEMlp":
        """A copy, such as an average of the weights starts from; it stays in the same group."""
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        memo[id(self.group)] = self.group  # a process group cannot be copied
        copy.__dict__ = deepcopy(self.__dict__, memo)
        return copy

    # How many rows travel is known only when they do.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _apply_experts(self, tokens_TD: Tensor, weights_TK: Tensor, plan: ops.MoEPlan) -> Tensor:
        rows_MD = ops.moe_gather(to_region(tokens_TD), plan)
        # The plan sorts rows by expert, so what goes to one rank lies together.
        sent_RE = plan.offsets.diff().view(dist.get_world_size(self.group), -1)
        got_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(got_RE, sent_RE, group=self.group)
        sent, got = sent_RE.sum(dim=1).tolist(), got_RE.sum(dim=1).tolist()
        got_ND = _AllToAll.apply(rows_MD, sent, got, self.group)
        done_ND = self._apply_own_experts(got_ND, got_RE)
        done_MD = _AllToAll.apply(done_ND, got, sent, self.group)
        return ops.moe_combine(done_MD, weights_TK, plan)

    def _apply_own_experts(self, rows_ND: Tensor, counts_RE: Tensor) -> Tensor:
        """Applies this rank's experts to rows that lie by rank, and by expert within a rank."""
        num_ranks, num_own = counts_RE.shape
        own = torch.arange(num_own, device=counts_RE.device, dtype=torch.int32).repeat(num_ranks)
        expert_N1 = own.repeat_interleave(counts_RE.flatten())[:, None]
        return ops.moe_mlp(
            rows_ND,
            rows_ND.new_ones(expert_N1.shape),
            ops.moe_plan(expert_N1, num_own),
            self.fc1_weight,
            self.fc1_bias,
            self.fc2_weight,
            self.fc2_bias,
            self.activation,
        )


class _AllToAll(torch.autograd.Function):
    """Sends the first rows to rank 0, the next to rank 1, and so on; gradients travel back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        received = rows.new_empty(sum(got), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), got, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        returned: Tensor = _AllToAll.apply(grads[0], ctx.got, ctx.sent, ctx.group)
        return returned, None, None, None


def shard_experts(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Keeps this rank's experts of every MoE layer in a whole model, and drops the others.

    Args:
        model: Or a single `MoEMlp`; it is changed. Weights must be equal on all ranks.
        group: The ranks to spread over; None for all.

    Raises:
        ConfigError: torch.distributed is not initialised, the experts of a layer cannot be divided
            evenly, or they are sharded already.
    """
    if not dist.is_initialized():
        raise ConfigError(
            "shard_experts needs a process group; start with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for name, layer in _moe_layers(model).items():
        if isinstance(layer, ShardedMoEMlp):
            raise ConfigError(f"shard_experts: {name or 'the layer'} is sharded already")
        if layer.num_experts % num_ranks:
            raise ConfigError(
                f"shard_experts: {name or 'the layer'} has num_experts={layer.num_experts}, which "
                f"{num_ranks} ranks cannot share evenly; use a number of ranks that divides it"
            )
    for layer in _moe_layers(model).values():
        for part, parameter in _expert_parameters(layer).items():
            own = parameter.detach().chunk(num_ranks)[rank].clone()
            setattr(layer, part, nn.Parameter(own, requires_grad=parameter.requires_grad))
        layer.__class__ = ShardedMoEMlp
        assert isinstance(layer, ShardedMoEMlp)
        layer.group = group


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that differ between ranks, by their names in the model."""
    return {
        f"{name}.{part}" if name else part: parameter
        for name, layer in _moe_layers(model).items()
        if isinstance(layer, ShardedMoEMlp)
        for part, parameter in _expert_parameters(layer).items()
    }


def gather_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the whole model, with all experts of sharded layers; it stays as it is.

    All ranks must call it together, and all get the result.
    """
    state = dict(model.state_dict())
    for name, layer in _moe_layers(model).items():
        if not isinstance(layer, ShardedMoEMlp):
            continue
        for part, parameter in _expert_parameters(layer).items():
            whole = gather_experts(parameter.detach(), layer.group)
            state[f"{name}.{part}" if name else part] = whole
    return state


def gather_experts(own: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All experts of a tensor [E/R, ...] that every rank has for its own: [E, ...].

    All ranks must call it together: for a parameter, or for what an optimiser keeps of one.
    """
    own = own.contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return torch.cat(parts)


def _moe_layers(model: nn.Module) -> dict[str, MoEMlp]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MoEMlp)}


def _expert_parameters(layer: MoEMlp) -> dict[str, nn.Parameter]:
    """The parameters that have experts as their first dimension; absent biases left out."""
    found = {part: getattr(layer, part) for part in _EXPERT_PARAMETERS}
    return {part: parameter for part, parameter in found.items() if parameter is not None}
