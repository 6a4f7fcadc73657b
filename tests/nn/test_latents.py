"""Latents, their first states, and the circuits their signatures make."""

import copy

import pytest
import torch

from m2mkd.errors import ConfigError, ShapeError
from m2mkd.nn import (
    CircuitCache,
    CodeNoise,
    ConfidencePooling,
    ConvNeXtTokenizer,
    KernelOptions,
    Latents,
    Seeder,
    SignatureKernel,
)


@pytest.fixture
def signatures() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(9, 4))


def test_a_circuit_is_kept_while_signatures_stay(signatures: tuple) -> None:
    cache = CircuitCache(0.9)
    assert cache.get(*signatures) is cache.get(*signatures)


@pytest.mark.parametrize("how", ["in place", "data", "optimiser", "load", "replaced"])
def test_a_circuit_follows_signatures_however_they_change(signatures: tuple, how: str) -> None:
    cache = CircuitCache(0.9)
    receivers, senders = signatures
    before = cache.get(receivers, senders)
    moved = torch.randn(6, 4)
    if how == "in place":
        with torch.no_grad():
            receivers.copy_(moved)
    elif how == "data":  # does not count as a new version of the tensor
        receivers.data.copy_(moved)
    elif how == "load":
        holder = torch.nn.ParameterList([receivers])
        holder.load_state_dict({"0": moved})
    elif how == "replaced":
        receivers = torch.nn.Parameter(moved)
    else:
        receivers.grad = receivers.detach() - moved
        torch.optim.SGD([receivers], lr=1.0).step()
    after = cache.get(receivers, senders)
    assert after != before
    assert after == CircuitCache(0.9).get(receivers, senders)


def test_a_copied_cache_is_independent(signatures: tuple) -> None:
    cache = CircuitCache(0.9)
    before = cache.get(*signatures)
    other = copy.deepcopy(cache)
    other.get(-signatures[0], signatures[1])
    assert cache.get(*signatures) is before


def test_without_truncation_everyone_hears_everyone(signatures: tuple) -> None:
    cache = CircuitCache(None)
    circuit = cache.get(*signatures)
    assert circuit.density == 1.0
    with torch.no_grad():
        signatures[0].neg_()
    assert cache.get(*signatures) is circuit


def test_links_are_drawn_per_example_in_training_alone(signatures: tuple) -> None:
    kernel = SignatureKernel(KernelOptions(truncation=0.9, sampling="relaxed_bernoulli"))
    circuit = CircuitCache(0.9).get(*signatures)
    assert kernel.train()(*signatures, circuit, 3).shape == (3, circuit.num_edges)
    assert kernel.eval()(*signatures, circuit, 3).shape == (circuit.num_edges,)


def test_affinities_of_a_receiver_sum_to_one(signatures: tuple) -> None:
    kernel = SignatureKernel(KernelOptions(bandwidth=0.5))
    circuit = CircuitCache(0.9).get(*signatures)
    affinity = kernel.log_affinity(*signatures, circuit).exp()
    sums = torch.zeros(6).index_add(0, circuit.receiver_of_edge, affinity)
    has_senders = circuit.row_ptr.diff() > 0
    torch.testing.assert_close(sums, has_senders.float())


def test_a_bandwidth_that_is_not_learned_is_stored_all_the_same() -> None:
    kernel = SignatureKernel(KernelOptions(bandwidth=0.5, learn_bandwidth=False))
    assert list(kernel.parameters()) == []
    assert float(kernel.state_dict()["bandwidth"]) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "bernouli"}, "sampling='bernouli' is none of none, relaxed_bernoulli"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ],
)
def test_kernel_options_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KernelOptions(**options)


def test_code_noise_scales_codes_in_training_and_leaves_gradients_alone() -> None:
    noise, codes = CodeNoise(0.1), torch.randn(50, 8, requires_grad=True)
    assert noise.eval()(codes) is codes
    noisy = noise.train()(codes)
    ratio = (noisy / codes).detach()
    assert (ratio - 1).abs().max() <= 0.1 + 1e-5 and ratio.std() > 0.03
    noisy.sum().backward()
    assert torch.equal(codes.grad, torch.ones_like(codes))


def test_seeds_are_means_in_eval_mode_and_draws_in_training() -> None:
    seeder, codes = Seeder(8, 6), torch.randn(4, 8)
    seeder.eval()
    first, second = seeder(codes, 3)[:2]
    assert torch.equal(first, second)
    draws = seeder.train()(codes.expand(4, 8), 2000)
    torch.testing.assert_close(draws.mean(0), first, atol=0.02, rtol=0)
    assert 0.02 < draws.std(0).mean() < 0.3  # exp(-5 / 2) = 0.08
    seeder.eval().stochastic_eval = True
    assert not torch.equal(*seeder(codes, 2))


def test_codes_of_layers_differ_where_asked() -> None:
    latents = Latents(3, 4, 5, num_layers=2)
    assert latents.codes_of(1).shape == (3, 5)
    assert torch.equal(latents.codes_of(-1), latents.codes_of(1))
    assert not torch.equal(latents.codes_of(0), latents.codes_of(1))
    assert Latents(3, 4, 5).codes_of(7).shape == (3, 5)


def test_first_signatures_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 3\); 3 latents need \(3, 4\)"):
        Latents(3, 4, 5, signatures=torch.zeros(3, 3))


@pytest.mark.parametrize("hard", [False, True])
def test_pooling_weighs_latents_by_confidence(hard: bool) -> None:
    pooling = ConfidencePooling(4, 0, hard=hard).eval()
    states = torch.randn(2, 3, 4)
    scores = pooling.confidence(states)[..., 0]
    weights = scores.softmax(1)
    if hard:
        weights = torch.eye(3)[scores.argmax(1)]
    torch.testing.assert_close(pooling(states), (weights[..., None] * states).sum(1))
    if hard:
        sampled = pooling.train().pool(states)
        assert (sampled[:, None] - states).abs().amin(1).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1), "dims": (8,)}, "must name the same stages"),
        ({"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, "leave nothing of images of 16x16"),
    ],
)
def test_tokenizers_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvNeXtTokenizer(16, 3, **options)


def test_images_of_another_size_are_refused() -> None:
    tokenizer = ConvNeXtTokenizer(16, 3, depths=(0, 1), dims=(8, 12), grid_dim=4)
    assert tokenizer(torch.randn(2, 3, 16, 16)).shape == (2, 4, 16)
    with pytest.raises(ShapeError, match=r"\(24, 24\) pixels make \(3, 3\) tokens"):
        tokenizer(torch.randn(2, 3, 24, 24))


def test_a_tokenizer_without_a_grid_has_the_features_alone() -> None:
    tokenizer = ConvNeXtTokenizer((8, 16), 1, depths=(1,), dims=(8,), patch_size=4, grid_dim=0)
    assert tokenizer.grid is None and tokenizer.num_tokens == 8
    assert tokenizer(torch.randn(2, 1, 8, 16)).shape == (2, 8, 8)
