"""The MoE layer: what it computes, its capacity and its auxiliary losses."""

import pytest
import torch
from torch.nn import functional as F

from m2mkd.errors import ConfigError
from m2mkd.nn import MoEMlp, auxiliary_loss


def layer(**options: object) -> MoEMlp:
    moe = MoEMlp(8, 12, **{"num_experts": 4, **options})
    torch.nn.init.normal_(moe.router.weight)
    return moe


@pytest.mark.parametrize("gate", ["softmax_selected", "softmax_all", "softmax_all_renorm"])
@pytest.mark.parametrize("num_selected", [1, 2, 4])
def test_output_is_the_weighted_sum_of_the_chosen_experts(gate: str, num_selected: int) -> None:
    moe = layer(gate=gate, num_selected=num_selected).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = torch.zeros(10, 8, dtype=torch.float64)
    for t, token in enumerate(x.reshape(-1, 8)):
        logits = moe.router(token)
        chosen = logits.topk(num_selected).indices
        weights = logits.softmax(0)[chosen]
        if gate != "softmax_all":
            weights = weights / weights.sum()
        for weight, e in zip(weights, chosen, strict=True):
            hidden = F.gelu(moe.fc1_weight[e] @ token + moe.fc1_bias[e])
            expected[t] += weight * (moe.fc2_weight[e] @ hidden + moe.fc2_bias[e])
    torch.testing.assert_close(moe(x).reshape(10, 8), expected)


def test_capacity_drops_tokens_beyond_it() -> None:
    moe = layer(num_selected=1, eval_capacity_factor=1.0).eval()
    torch.nn.init.zeros_(moe.router.weight)
    torch.nn.init.constant_(moe.router.bias, 0.0)
    moe.router.bias.data[2] = 5.0  # every token wants expert 2, which takes 8 * 1 / 4 = 2 of them
    out = moe(torch.randn(8, 8))
    assert (out[:2] != 0).any(dim=1).all() and (out[2:] == 0).all()


def test_priority_keeps_the_most_certain_tokens() -> None:
    torch.manual_seed(1)
    moe = layer(
        num_selected=1, gate="softmax_all", eval_capacity_factor=0.5, prioritise=True
    ).eval()
    x = torch.randn(16, 8)
    kept = (moe(x) != 0).any(dim=1)
    scores, experts = moe.router(x).softmax(1).max(dim=1)
    for e in experts.unique():
        mine = (experts == e).nonzero().flatten()
        best = mine[scores[mine].argsort(descending=True)[:2]]
        assert set(kept.nonzero().flatten().tolist()) & set(mine.tolist()) == set(best.tolist())


@pytest.mark.parametrize("factor", [None, 1.5])
def test_with_expert_choice_every_expert_serves_its_best_tokens(factor: float | None) -> None:
    moe = layer(gate="expert_choice", eval_capacity_factor=factor).double().eval()
    x = torch.randn(10, 8, dtype=torch.float64)
    scores = moe.router(x).softmax(1)
    expected = torch.zeros_like(x)
    for e in range(4):
        for t in scores[:, e].topk(5 if factor is None else 8).indices:  # 2 * 10 / 4, or 1.5 x 5
            hidden = F.gelu(moe.fc1_weight[e] @ x[t] + moe.fc1_bias[e])
            expected[t] += scores[t, e] * (moe.fc2_weight[e] @ hidden + moe.fc2_bias[e])
    torch.testing.assert_close(moe(x), expected)
    assert moe(x[:0]).shape == (0, 8)


def test_expert_choice_trains_its_router_and_compiles_in_one_graph() -> None:
    moe = layer(gate="expert_choice", importance_weight=0.1).train()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    for tokens in (12, 17):
        x = torch.randn(tokens, 8)
        moe.zero_grad()
        out = compiled(x)
        out.square().sum().backward()
        assert moe.router.weight.grad.abs().sum() > 0
        torch.testing.assert_close(out, moe(x))


@pytest.mark.parametrize(
    "options", [{"prioritise": True}, {"load_weight": 0.1, "router_noise": 1.0}]
)
def test_options_that_expert_choice_lacks_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} means nothing"):
        layer(gate="expert_choice", **options)


def test_a_capacity_that_rounds_to_zero_names_its_numbers() -> None:
    moe = MoEMlp(8, 12, num_experts=64, num_selected=1, eval_capacity_factor=1.0).eval()
    with pytest.raises(ConfigError, match="capacity 0 from num_tokens=16, num_experts=64"):
        moe(torch.randn(16, 8))


def test_importance_loss_is_zero_for_even_routing() -> None:
    moe = layer(importance_weight=1.0).train()
    torch.nn.init.zeros_(moe.router.weight)
    torch.nn.init.zeros_(moe.router.bias)
    moe(torch.randn(6, 8))
    assert auxiliary_loss(moe).item() == pytest.approx(0.0, abs=1e-9)
    torch.nn.init.normal_(moe.router.weight)
    x = torch.randn(6, 8)
    moe(x)
    importance = moe.router(x).softmax(1).sum(0)
    expected = (importance.std(unbiased=False) / importance.mean()) ** 2
    assert auxiliary_loss(moe).item() == pytest.approx(expected.item(), rel=1e-5)


def test_load_loss_counts_how_often_fresh_noise_would_choose_an_expert() -> None:
    moe = layer(load_weight=1.0, router_noise=1.0).train()
    x = torch.randn(6, 8)
    torch.manual_seed(3)
    moe(x)
    loss = auxiliary_loss(moe)
    torch.manual_seed(3)
    clean = moe.router(x)
    noisy = clean + torch.randn_like(clean) / 4
    threshold = noisy.topk(2, dim=1).values[:, 1:]
    trials = clean[:, :, None] + torch.randn(6, 4, 200_000) / 4
    load = (trials > threshold[:, :, None]).float().mean(dim=2).mean(dim=0)
    expected = (load.std(unbiased=False) / load.mean()) ** 2
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)
    loss.backward()
    assert moe.router.weight.grad.abs().sum() > 0


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    moe = layer(z_weight=0.5).train()
    x = torch.randn(6, 8)
    moe(x)
    expected = 0.5 * moe.router(x).logsumexp(1).square().mean()
    torch.testing.assert_close(auxiliary_loss(moe), expected)


@pytest.mark.parametrize("option", ["importance_weight", "load_weight", "z_weight"])
def test_losses_of_no_tokens_are_zero(option: str) -> None:
    moe = layer(router_noise=1.0, **{option: 1.0}).train()
    moe(torch.randn(0, 8))
    auxiliary_loss(moe).backward()
    assert auxiliary_loss(moe).item() == 0
    assert not moe.router.weight.grad.any()


def test_noise_acts_in_training_only() -> None:
    moe = layer(router_noise=5.0, num_selected=1)
    x = torch.randn(32, 8)
    moe.train()
    assert not torch.equal(moe(x), moe(x))
    moe.eval()
    assert torch.equal(moe(x), moe(x))


def test_half_precision_autocast_routes_in_float32() -> None:
    moe = layer().eval()
    x = torch.randn(64, 8)
    expected = moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(x)
        logits, _ = moe._logits(x.bfloat16())
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=3e-2)
    assert logits.dtype == torch.float32
    exact = moe.router(x.bfloat16().float())
    torch.testing.assert_close(logits, exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gate", ["softmax_selected", "expert_choice"])
def test_shapes_can_be_had_without_memory_on_the_meta_device(gate: str) -> None:
    moe = MoEMlp(8, 16, num_experts=4, gate=gate, importance_weight=0.1, z_weight=0.1).to("meta")
    out = moe(torch.empty(2, 5, 8, device="meta"))
    assert out.shape == (2, 5, 8) and out.is_meta
    assert moe.auxiliary_loss is not None and moe.auxiliary_loss.is_meta
