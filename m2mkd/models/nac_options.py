"""What a NAC can be told: one flat set of options, as recipes and checkpoints hold them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from m2mkd.errors import ConfigError, did_you_mean
from m2mkd.nn import BlockOptions, FCOptions, KernelOptions

Options = Mapping[str, Any]
Seeding = Literal["codes", "learned"]
InputsTo = Literal["all", "first"]
Pooling = Literal["confidence", "first"]
SignatureLoss = Literal["repulsion", "block_model"]
T = TypeVar("T")

_KERNEL = {"truncation": 0.9, "sampling": "relaxed_bernoulli", "temperature": 0.5}


@dataclass(frozen=True)
class NACOptions:
    """Sizes and behaviour of a NAC; the defaults are the published Tiny-ImageNet model's.

    Attributes:
        tokenizer_depths, tokenizer_dims, patch_size, grid_dim: See `m2mkd.nn.ConvNeXtTokenizer`.
        state_dim: Width of states.
        code_dim: Width of codes.
        signature_dim: Width of signatures.
        num_inputs, num_mediators, num_outputs: Latents of each kind.
        depth: Propagators.
        num_heads, head_dim, ffn_ratio, gated, qkv_bias, layer_scale, code_noise: Of all blocks,
            see `m2mkd.nn.BlockOptions`.
        share_norm: The same, of propagators.
        fc: Modulated layers of attention, as `m2mkd.nn.FCOptions`.
        ffn_fc: Those of FFNs; None for the same.
        kernel: How signatures turn into links in propagators, as `m2mkd.nn.KernelOptions`; what is
            left out is truncation 0.9, relaxed Bernoulli samples at temperature 0.5.
        read_out_kernel: The same of the read-out; what is left out links all, without samples.
        read_in, propagator, read_out: What differs in these blocks, as `m2mkd.nn.BlockOptions`. By
            default the read-out has no residual and separate norms, and only propagators drop
            paths.
        share_propagators: Whether all layers are one propagator.
        per_layer_codes: Whether mediators have a code per layer.
        seeding: First states from `codes`, or `learned`.
        code_noise_in_seeder: Whether codes have their training noise there too.
        inputs_to: Propagators that hear the input latents: `all` or the `first`.
        inputs_to_read_out: Whether the read-out hears them.
        stitch_dim: Width of kept stitches; None for none.
        pooling: `confidence`, or `first`: the first output latent's head gives the logits.
        pooling_args: Of `m2mkd.nn.ConfidencePooling`: temperature, gumbel, hard.
        head_norm: Whether a LayerNorm stands before the head of `first`.
        prior: Graph that the mediators' first signatures describe (`m2mkd.nn.graphs.PRIORS`), or
            `none` for random ones.
        prior_args: Its options.
        learn_signatures, learn_codes: Whether these are trained.
        signature_loss: Regulariser of the signatures in training: `repulsion` of all that are near,
            `block_model` of the mediators (8 clusters, as a planted partition); None for none.
            Published runs take repulsion with weight 0.1, and block_model with weight 1 under a
            planted partition.
        signature_loss_weight: What it weighs beside the task's loss.
        stochastic_eval: Whether eval mode draws seeds and confidences, as the published code does.

    Raises:
        ConfigError: A choice that does not exist.
    """

    tokenizer_depths: Sequence[int] = (3, 3)
    tokenizer_dims: Sequence[int] = (96, 192)
    patch_size: int = 4
    grid_dim: int = 64
    state_dim: int = 384
    code_dim: int = 384
    signature_dim: int = 64
    num_inputs: int = 64
    num_mediators: int = 256
    num_outputs: int = 64
    depth: int = 8
    num_heads: int = 6
    head_dim: int = 64
    ffn_ratio: float = 2.0
    gated: bool = True
    qkv_bias: bool = False
    layer_scale: float | None = 0.1
    code_noise: float = 0.05
    share_norm: bool = True
    fc: Options = field(default_factory=dict)
    ffn_fc: Options | None = None
    kernel: Options = field(default_factory=dict)
    read_out_kernel: Options = field(default_factory=dict)
    read_in: Options = field(default_factory=dict)
    propagator: Options = field(default_factory=dict)
    read_out: Options = field(default_factory=dict)
    share_propagators: bool = False
    per_layer_codes: bool = False
    seeding: Seeding = "codes"
    code_noise_in_seeder: bool = True
    inputs_to: InputsTo = "all"
    inputs_to_read_out: bool = True
    stitch_dim: int | None = None
    pooling: Pooling = "confidence"
    pooling_args: Options = field(default_factory=dict)
    head_norm: bool = True
    prior: str = "none"
    prior_args: Options = field(default_factory=dict)
    learn_signatures: bool = True
    learn_codes: bool = True
    signature_loss: SignatureLoss | None = None
    signature_loss_weight: float = 0.1
    stochastic_eval: bool = False

    def __post_init__(self) -> None:
        choices = {
            "seeding": get_args(Seeding),
            "inputs_to": get_args(InputsTo),
            "pooling": get_args(Pooling),
            "signature_loss": (*get_args(SignatureLoss), None),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"nac: {name}={getattr(self, name)!r} is none of {', '.join(map(str, known))}"
                )

    def propagator_block(self, drop_path: float) -> BlockOptions:
        """Options of the propagators."""
        return self._block({"drop_path": drop_path}, self.propagator)

    def read_in_block(self) -> BlockOptions:
        """Options of the read-in."""
        return self._block({"layer_scale": 1.0}, self.read_in)

    def read_out_block(self) -> BlockOptions:
        """Options of the read-out."""
        return self._block({"residual": False, "share_norm": False}, self.read_out)

    def propagator_kernel(self) -> KernelOptions:
        """How propagators link latents."""
        return make_options(KernelOptions, "nac kernel", {**_KERNEL, **self.kernel})

    def read_out_links(self) -> KernelOptions:
        """How the read-out links latents."""
        return make_options(KernelOptions, "nac read_out_kernel", self.read_out_kernel)

    def _block(self, defaults: Options, changes: Options) -> BlockOptions:
        own = {
            "state_dim": self.state_dim,
            "code_dim": self.code_dim,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "ffn_ratio": self.ffn_ratio,
            "gated": self.gated,
            "qkv_bias": self.qkv_bias,
            "layer_scale": self.layer_scale,
            "ffn_layer_scale": self.layer_scale,
            "code_noise": self.code_noise,
            "share_norm": self.share_norm,
            "fc": self.fc,
            "ffn_fc": self.ffn_fc,
        }
        return block_options({**own, **defaults, **changes})


def block_options(values: Options) -> BlockOptions:
    """`BlockOptions` from plain values, as recipes hold them.

    Raises:
        ConfigError: An option that does not exist, or a choice that does not.
    """
    values = dict(values)
    for name in ("fc", "ffn_fc"):
        if isinstance(values.get(name), Mapping):
            values[name] = make_options(FCOptions, f"nac {name}", values[name])
    return make_options(BlockOptions, "nac block", values)


def make_options(kind: type[T], where: str, values: Options) -> T:
    """Builds a dataclass of options from plain values.

    Raises:
        ConfigError: An option that does not exist, or a choice that does not.
    """
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: unknown option '{name}'{did_you_mean(name, known)}")
    return kind(**values)
