"""One rank of test_expert_parallel.py: compares sharded layers with the whole layer, by case.

Run as: expert_parallel_worker.py RANK FOLDER, for ranks 0, 1 and 2. All three make a group, and the
first two another. Writes FOLDER/RANK.json: by number of ranks and by case, the largest difference
of outputs and gradients, relative to the largest value.
"""

import json
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2mkd.errors import ConfigError
from m2mkd.nn import MoEMlp, gather_state_dict, shard_experts, sharded_parameters

WIDTH, HIDDEN = 6, 10
WORLD = 3
COUNTS = [9, 14, 5]  # tokens of each rank


@dataclass
class Member:
    """This process as one of a group; E is twice the number of ranks."""

    rank: int
    ranks: int
    group: dist.ProcessGroup | None

    @property
    def experts(self) -> int:
        """E."""
        return 2 * self.ranks

    @property
    def counts(self) -> list[int]:
        """Tokens of each rank of the group."""
        return COUNTS[: self.ranks]


def whole_layer(me: Member, **options: Any) -> MoEMlp:
    """A layer that is the same on every rank."""
    torch.manual_seed(1)
    layer = MoEMlp(WIDTH, HIDDEN, num_experts=me.experts, **options).double()
    nn.init.normal_(layer.router.weight)
    nn.init.normal_(layer.router.bias)
    return layer.eval()


def tokens(counts: list[int]) -> list[Tensor]:
    """Each rank's tokens, all known to every rank."""
    torch.manual_seed(2)
    return [torch.randn(count, WIDTH, dtype=torch.float64) for count in counts]


def starve(layer: MoEMlp) -> None:
    """Nobody chooses expert 1."""
    with torch.no_grad():
        layer.router.bias[1] = -100.0


def send_all_away(layer: MoEMlp, parts: list[Tensor]) -> None:
    """All tokens of rank 0, and only these, choose the experts of the last rank."""
    with torch.no_grad():
        layer.router.weight[:, 0] = 0.0
        layer.router.weight[-2:, 0] = 100.0
        for rank, part in enumerate(parts):
            part[:, 0] = 1.0 if rank == 0 else -1.0


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def compare(
    me: Member, layer: MoEMlp, parts: list[Tensor], together: bool, *, compiled: bool = False
) -> float:
    """Runs the layer whole and sharded.

    Args:
        me: This process.
        layer: It is sharded at the end.
        parts: Each rank's tokens.
        together: Whether the whole layer sees all tokens at once, or one rank's after the other's.
        compiled: Whether to trace the sharded layer.
    """
    inputs = [part.clone().requires_grad_() for part in parts]
    if together:
        expected = layer(torch.cat(inputs)).split([len(part) for part in parts])
    else:
        expected = [layer(part) for part in inputs]
    sum(out.square().sum() for out in expected).backward()
    whole = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}

    layer.zero_grad()
    shard_experts(layer, me.group)
    if compiled:
        layer.compile(backend="eager")
    own = parts[me.rank].clone().requires_grad_()
    out = layer(own)
    out.square().sum().backward()
    worst = [difference(out, expected[me.rank]), difference(own.grad, inputs[me.rank].grad)]
    experts = sharded_parameters(layer)
    for name, parameter in layer.named_parameters():
        if name in experts:
            worst.append(difference(parameter.grad, whole[name].chunk(me.ranks)[me.rank]))
        else:
            dist.all_reduce(parameter.grad, group=me.group)
            worst.append(difference(parameter.grad, whole[name]))
    return max(worst)


def cases(me: Member) -> dict[str, float]:
    """Largest relative difference of each case."""
    results = {}
    for gate, options in {
        "softmax_selected": {},
        "softmax_all": {"num_selected": 1, "bias": False, "activation": "relu"},
        "softmax_all_renorm": {"num_selected": me.experts},
    }.items():
        results[gate] = compare(me, whole_layer(me, gate=gate, **options), tokens(me.counts), True)

    layer = whole_layer(me)
    starve(layer)
    results["an expert that gets nothing"] = compare(me, layer, tokens(me.counts), True)
    layer, parts = whole_layer(me), tokens(me.counts)
    send_all_away(layer, parts)
    results["a rank that keeps nothing"] = compare(me, layer, parts, True)
    results["compiled"] = compare(me, whole_layer(me), tokens(me.counts), True, compiled=True)
    results["a rank without tokens"] = compare(
        me, whole_layer(me), tokens([*me.counts[:-1], 0]), True
    )
    results["no tokens at all"] = compare(me, whole_layer(me), tokens([0] * me.ranks), True)
    layer = whole_layer(me, eval_capacity_factor=0.7, prioritise=True)
    results["capacity"] = compare(me, layer, tokens(me.counts), False)
    layer = whole_layer(me, gate="expert_choice")
    results["expert choice"] = compare(me, layer, tokens(me.counts), False)
    return results


def frozen_and_autocast(me: Member) -> dict[str, float]:
    """Values alone, in bfloat16, with nothing that wants gradients."""
    layer, parts = whole_layer(me).float(), [part.float() for part in tokens(me.counts)]
    layer.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(parts[me.rank])
        shard_experts(layer, me.group)
        found = layer(parts[me.rank])
    assert found.dtype == torch.bfloat16
    return {"bfloat16 autocast": difference(found.double(), expected.double())}


def state_dicts(me: Member) -> dict[str, float]:
    """A model's state survives sharding, and a change of one rank's expert is gathered."""
    model = nn.Sequential(
        whole_layer(me), nn.LayerNorm(WIDTH).double(), whole_layer(me, bias=False)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shard_experts(model, me.group)
    assert model[0].fc1_weight.shape == (2, HIDDEN, WIDTH)
    gathered = gather_state_dict(model)
    assert list(gathered) == list(before)
    worst = max(difference(gathered[name], before[name]) for name in before)
    with torch.no_grad():
        model[2].fc2_weight[1] = me.rank
    changed = gather_state_dict(model)["2.fc2_weight"]
    assert changed[1::2, 0, 0].tolist() == list(range(me.ranks))
    assert sorted(sharded_parameters(model)) == sorted(
        name for name in before if name.partition(".")[2].startswith("fc")
    )
    return {"state dict": worst}


def copies(me: Member) -> dict[str, float]:
    """A deep copy, as an average of the weights begins, stays sharded in its group."""
    layer = whole_layer(me)
    expected = layer(tokens(me.counts)[me.rank])
    shard_experts(layer, me.group)
    copy = deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return {"deep copy": difference(copy(tokens(me.counts)[me.rank]), expected)}


def refusals(me: Member) -> dict[str, str]:
    """What is said to those who ask for the impossible."""
    said = {}
    odd = MoEMlp(WIDTH, HIDDEN, num_experts=me.experts + 1)
    twice = whole_layer(me)
    shard_experts(twice, me.group)
    for name, layer in {"odd": odd, "twice": twice}.items():
        try:
            shard_experts(layer, me.group)
        except ConfigError as error:
            said[name] = str(error)
    return said


def main() -> None:
    """Runs all of it, in each group that this process belongs to."""
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    pair = dist.new_group([0, 1])
    groups = [Member(rank, WORLD, None)]
    if rank < 2:
        groups.append(Member(rank, 2, pair))
    results = {
        me.ranks: {
            **cases(me),
            **frozen_and_autocast(me),
            **state_dicts(me),
            **copies(me),
            **refusals(me),
        }
        for me in groups
    }
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
