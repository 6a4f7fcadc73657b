"""NAC: Neural Attentive Circuits (arXiv 2210.08031), image classifiers whose modules form a graph.

A NAC reads an image's tokens into input latents, lets mediator latents exchange messages along a
circuit for some layers, and gathers the result in output latents. The circuit follows from the
latents' signatures; what a latent computes follows from its code.

Letters: B batch, V tokens, U latents, D state width, S signature width, N edges, C classes.
"""

from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2mkd.errors import ConfigError
from m2mkd.models.nac_options import NACOptions, make_options
from m2mkd.nn import (
    CircuitCache,
    ConfidencePooling,
    ConvNeXtTokenizer,
    Edges,
    FirstLatent,
    KeptStitches,
    LatentAttention,
    Latents,
    Propagator,
    ReadIn,
    ReadOut,
    Seeder,
    SignatureKernel,
)
from m2mkd.nn.circuit_losses import block_model_loss, signature_repulsion
from m2mkd.ops import Circuit

__all__ = ["NAC"]


class NAC(nn.Module):
    """Neural Attentive Circuit for images.

    Signatures move in training, so circuits follow them: they are looked up in every forward pass
    and rebuilt when a signature has changed. In eval mode the model is deterministic, unless
    `stochastic_eval` asks for the published behaviour.

    Layers are numbered 0 to depth - 1 for propagators, and depth for the read-out.

    Args:
        img_size: Height and width of the images, in pixels; positions are learned for this size.
        in_chans: Channels of the images.
        num_classes: C.
        drop_path_rate: Stochastic depth of propagators and kept stitches.
        options: See `m2mkd.models.nac_options.NACOptions`.

    Raises:
        ConfigError: Unknown options, or values that cannot work.
    """

    def __init__(
        self,
        *,
        img_size: int = 64,
        in_chans: int = 3,
        num_classes: int = 200,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = opts = make_options(NACOptions, "nac", options)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = opts.state_dim
        self.depth = opts.depth
        self.grad_checkpointing = False
        self.auxiliary_loss: Tensor | None = None
        self.tokenizer = ConvNeXtTokenizer(
            img_size,
            in_chans,
            depths=opts.tokenizer_depths,
            dims=opts.tokenizer_dims,
            patch_size=opts.patch_size,
            grid_dim=opts.grid_dim,
        )
        self._add_latents(opts)
        self.read_in = ReadIn(self.tokenizer.width, opts.read_in_block())
        block = opts.propagator_block(drop_path_rate)
        self.propagators = nn.ModuleList(
            Propagator(block) for _ in range(1 if opts.share_propagators else opts.depth)
        )
        kernel, read_out_kernel = opts.propagator_kernel(), opts.read_out_links()
        self.kernels = nn.ModuleList(SignatureKernel(kernel) for _ in self.propagators)
        self.read_out_kernel = SignatureKernel(read_out_kernel)
        self.stitches = (
            KeptStitches(
                opts.state_dim,
                opts.stitch_dim,
                num_pairs=opts.depth + 1,
                drop_path=drop_path_rate,
            )
            if opts.stitch_dim
            else None
        )
        is_first = opts.pooling == "first"
        self.read_out = ReadOut(
            opts.read_out_block(),
            num_outputs=num_classes if is_first else None,
            head_norm=opts.head_norm,
        )
        self.pooling: ConfidencePooling | FirstLatent = (
            FirstLatent()
            if is_first
            else ConfidencePooling(
                opts.state_dim,
                num_classes,
                stochastic_eval=opts.stochastic_eval,
                **opts.pooling_args,
            )
        )
        self._caches = {
            "with_inputs": CircuitCache(kernel.truncation),
            "mediators": CircuitCache(kernel.truncation),
            "read_out": CircuitCache(read_out_kernel.truncation),
        }
        self._fixed: dict[str, Circuit] | None = None

    def _add_latents(self, opts: NACOptions) -> None:
        state_dim = opts.state_dim if opts.seeding == "learned" else None
        sizes = (opts.signature_dim, opts.code_dim)
        self.input_latents = Latents(opts.num_inputs, *sizes, state_dim=state_dim)
        self.mediator_latents = Latents(
            opts.num_mediators,
            *sizes,
            state_dim=state_dim,
            num_layers=opts.depth if opts.per_layer_codes else None,
            signatures=_prior_signatures(opts),
        )
        self.output_latents = Latents(opts.num_outputs, *sizes, state_dim=state_dim)
        for latents in (self.input_latents, self.mediator_latents, self.output_latents):
            latents.signatures.requires_grad_(opts.learn_signatures)
            latents.codes.requires_grad_(opts.learn_codes)
        self.seeder = (
            Seeder(
                opts.code_dim,
                opts.state_dim,
                code_noise=opts.code_noise if opts.code_noise_in_seeder else 0.0,
                stochastic_eval=opts.stochastic_eval,
            )
            if opts.seeding == "codes"
            else None
        )

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, channels, H, W] to logits [B, C]."""
        if self.training:
            self.auxiliary_loss = self._signature_loss()
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """States of the output latents, [B, U, D], or their class scores where there is a head."""
        return self.forward_circuit(self.tokenizer(images))

    def forward_head(self, states_BUD: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, C] from the states of the output latents; pooled states [B, D] before them."""
        if pre_logits and isinstance(self.pooling, ConfidencePooling):
            return self.pooling.pool(states_BUD)
        logits: Tensor = self.pooling(states_BUD)
        return logits

    def forward_circuit(self, tokens_BVD: Tensor) -> Tensor:
        """As `forward_features`, from the tokens of images."""
        batch = tokens_BVD.shape[0]
        circuits = self._find_circuits() if self._fixed is None else self._fixed
        inputs = self._seed(self.input_latents, batch)
        mediators = self._seed(self.mediator_latents, batch)
        outputs = self._seed(self.output_latents, batch)
        inputs = self._run(self.read_in, inputs, self.input_latents.codes, tokens_BVD)
        inputs = self._stitch(inputs, 0)
        for layer in range(self.depth):
            codes = self.mediator_latents.codes_of(layer)
            senders, sender_codes = self._senders(layer, inputs, mediators)
            edges = self._edges(layer, circuits, batch)
            mediators = self._run(
                self.block(layer),
                mediators,
                codes,
                senders,
                sender_codes,
                edges,
                receivers_send=True,
            )
            mediators = self._stitch(mediators, layer + 1)
        senders, sender_codes = self._senders(self.depth, inputs, mediators)
        edges = self._edges(self.depth, circuits, batch)
        return self._run(
            self.read_out, outputs, self.output_latents.codes, senders, sender_codes, edges
        )

    def block(self, layer: int) -> Propagator:
        """The propagator of a layer, or the read-out."""
        if layer == self.depth:
            return self.read_out
        propagator = self.propagators[0 if self.options.share_propagators else layer]
        assert isinstance(propagator, Propagator)
        return propagator

    def kernel(self, layer: int) -> SignatureKernel:
        """What gives a layer's links their strengths."""
        if layer == self.depth:
            return self.read_out_kernel
        kernel = self.kernels[0 if self.options.share_propagators else layer]
        assert isinstance(kernel, SignatureKernel)
        return kernel

    def hears_inputs(self, layer: int) -> bool:
        """Whether the input latents are among a layer's senders, before the mediators."""
        if layer == self.depth:
            return self.options.inputs_to_read_out
        return layer == 0 or self.options.inputs_to == "all"

    def signatures(self, layer: int) -> tuple[Tensor, Tensor]:
        """Signatures of a layer's receivers [U, S] and senders [V, S]."""
        mediators = self.mediator_latents.signatures
        receivers = self.output_latents.signatures if layer == self.depth else mediators
        if not self.hears_inputs(layer):
            return receivers, mediators
        return receivers, torch.cat([self.input_latents.signatures, mediators])

    def circuit(self, layer: int) -> Circuit:
        """Who hears whom at a layer, by the present signatures."""
        name = self._circuit_name(layer)
        if self._fixed is not None:
            return self._fixed[name]
        return self._caches[name].get(*self.signatures(layer))

    def log_affinity(self, layer: int) -> Tensor:
        """Strengths of the edges of `circuit(layer)`, [N], which sum to one over a receiver's."""
        return self.kernel(layer).log_affinity(*self.signatures(layer), self.circuit(layer))

    def _signature_loss(self) -> Tensor | None:
        """The regulariser of the signatures, weighted; None without one."""
        opts, mediators = self.options, self.mediator_latents.signatures
        if opts.signature_loss is None:
            return None
        if opts.signature_loss == "repulsion":
            latents = (self.input_latents, self.mediator_latents, self.output_latents)
            loss = signature_repulsion(torch.cat([kind.signatures for kind in latents]))
        else:
            truncation = opts.propagator_kernel().truncation
            limit = 2.0 if truncation is None else truncation
            bandwidths = [self.kernel(layer).bandwidth for layer in range(len(self.kernels))]
            losses = [block_model_loss(mediators, width, limit) for width in bandwidths]
            loss = torch.stack(losses).sum()
        return opts.signature_loss_weight * loss

    def fix_circuits(self) -> None:
        """Keeps the present circuits until the model's mode is set again.

        For tracing: whole graphs (`torch.compile(fullgraph=True)`, `torch.export`) cannot hold the
        search for edges. Signatures must not change meanwhile.
        """
        self._fixed = None
        self._fixed = self._find_circuits()

    def set_attention_impl(self, impl: str) -> None:
        """Sets which `ops.circuit_attention` all blocks run: auto, sparse, dense, reference."""
        for module in self.modules():
            if isinstance(module, LatentAttention):
                module.impl = impl

    def set_stochastic_eval(self, enable: bool) -> None:
        """Sets whether eval mode draws seeds and confidences, as the published code does."""
        for module in self.modules():
            if isinstance(module, (Seeder, ConfidencePooling)):
                module.stochastic_eval = enable

    def train(self, mode: bool = True) -> "NAC":
        """Sets training or eval mode; circuits follow the signatures again."""
        self._fixed = None
        super().train(mode)
        return self

    def _seed(self, latents: Latents, batch: int) -> Tensor:
        if self.seeder is None:
            assert latents.states is not None
            return latents.states.expand(batch, -1, -1)
        states: Tensor = self.seeder(latents.codes_of(0), batch)
        return states

    def _senders(self, layer: int, inputs: Tensor, mediators: Tensor) -> tuple[Tensor, Tensor]:
        # The read-out hears the mediators under their last code.
        codes = self.mediator_latents.codes_of(-1 if layer == self.depth else layer)
        if not self.hears_inputs(layer):
            return mediators, codes
        states = torch.cat([inputs, mediators], dim=1)
        return states, torch.cat([self.input_latents.codes, codes])

    def _circuit_name(self, layer: int) -> str:
        if layer == self.depth:
            return "read_out"
        return "with_inputs" if self.hears_inputs(layer) else "mediators"

    # Edges are found by their values, which a graph cannot hold; a compiled model breaks here.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _find_circuits(self) -> dict[str, Circuit]:
        layers = {self._circuit_name(layer): layer for layer in range(self.depth + 1)}
        return {name: self.circuit(layer) for name, layer in layers.items()}

    def _edges(self, layer: int, circuits: dict[str, Circuit], batch: int) -> Edges:
        circuit = circuits[self._circuit_name(layer)]
        return Edges(circuit, self.kernel(layer)(*self.signatures(layer), circuit, batch))

    def _stitch(self, states_BUD: Tensor, pair: int) -> Tensor:
        if self.stitches is None:
            return states_BUD
        stitched: Tensor = self.stitches(states_BUD, pair)
        return stitched

    def _run(self, block: nn.Module, *args: Any, **options: bool) -> Tensor:
        """One block, whose inner tensors are computed again in the backward pass if asked for."""
        run = partial(block, **options)
        if self.grad_checkpointing and torch.is_grad_enabled():
            states: Tensor = checkpoint(run, *args, use_reentrant=False)
        else:
            states = run(*args)
        return states

    # What timm expects of its models.

    def no_weight_decay(self) -> set[str]:
        """Parameters that do not decay: positions, signatures and learned first states."""
        names = {"tokenizer.grid"}
        for kind in ("input", "mediator", "output"):
            names |= {f"{kind}_latents.{part}" for part in ("signatures", "states")}
        return names

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: keeps the states between blocks, those of the tokenizer included,
        and recomputes the rest.
        """
        self.grad_checkpointing = enable
        for stage in self.tokenizer.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module | None:
        """The layer that gives the logits."""
        if isinstance(self.pooling, ConfidencePooling):
            return self.pooling.classifier
        return self.read_out.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Starts the classifier afresh for another number of classes.

        Raises:
            ConfigError: The logits are the first output latent's, so there is no classifier.
        """
        del global_pool
        if not isinstance(self.pooling, ConfidencePooling):
            raise ConfigError("a NAC with pooling='first' has no classifier to reset")
        self.num_classes = num_classes
        width = self.options.state_dim
        self.pooling.classifier = nn.Linear(width, num_classes) if num_classes else nn.Identity()


def _prior_signatures(opts: NACOptions) -> Tensor | None:
    """The mediators' first signatures, drawn with torch's default generator."""
    if opts.prior == "none":
        return None
    from m2mkd.nn.graphs import prior_signatures  # networkx takes a while to import

    seed = int(torch.randint(2**31, (), device="cpu"))
    return prior_signatures(
        opts.prior, opts.num_mediators, opts.signature_dim, seed=seed, **opts.prior_args
    )


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], kwargs: Any) -> NAC:
    if pretrained:
        raise ConfigError(
            f"{variant} has no weights here; train one, or convert a published checkpoint with "
            "`m2mkd import`"
        )
    model: NAC = build_model_with_cfg(NAC, variant, pretrained, **{**sizes, **kwargs})
    return model


def _cfg(size: int, channels: int, num_classes: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (channels, size, size),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        "first_conv": "tokenizer.stem.0",
        "classifier": "pooling.classifier",
    }


default_cfgs = generate_default_cfgs(
    {
        "nac.untrained": _cfg(64, 3, 200),
        "nac_tiny_imagenet.untrained": _cfg(64, 3, 200),
        "nac_imagenet.untrained": _cfg(224, 3, 1000),
        "nac_digits.untrained": _cfg(8, 1, 10),
        "nac_fashion.untrained": _cfg(28, 1, 10),
    }
)

_BARABASI = "barabasi_albert"


@register_model
def nac(pretrained: bool = False, **kwargs: Any) -> NAC:
    """A NAC of any sizes; those of `NACOptions` where none are given, and random signatures."""
    return _create("nac", pretrained, {}, kwargs)


@register_model
def nac_tiny_imagenet(pretrained: bool = False, **kwargs: Any) -> NAC:
    """The papers' NAC for Tiny-ImageNet: 64 + 256 + 64 latents of width 384, 8 propagators."""
    sizes = {"prior": _BARABASI, "prior_args": {"m": 2}}
    return _create("nac_tiny_imagenet", pretrained, sizes, kwargs)


@register_model
def nac_imagenet(pretrained: bool = False, **kwargs: Any) -> NAC:
    """m2mKD's NAC for ImageNet: 192 + 768 + 64 latents of width 512, 8 propagators."""
    sizes = {
        "tokenizer_dims": (128, 256),
        "state_dim": 512,
        "code_dim": 512,
        "num_inputs": 192,
        "num_mediators": 768,
        "num_heads": 8,
        "ffn_ratio": 1.0,
        "prior": _BARABASI,
        "prior_args": {"m": 6},
    }
    return _create("nac_imagenet", pretrained, sizes, kwargs)


@register_model
def nac_digits(pretrained: bool = False, **kwargs: Any) -> NAC:
    """A small NAC for digits of 8x8 pixels: 16 tokens, 8 + 24 + 4 latents of width 64."""
    sizes = {
        "tokenizer_depths": (1,),
        "tokenizer_dims": (32,),
        "patch_size": 2,
        "grid_dim": 16,
        "state_dim": 64,
        "code_dim": 32,
        "signature_dim": 16,
        "num_inputs": 8,
        "num_mediators": 24,
        "num_outputs": 4,
        "depth": 2,
        "num_heads": 2,
        "head_dim": 32,
        "prior": _BARABASI,
        "prior_args": {"m": 2},
    }
    return _create("nac_digits", pretrained, sizes, kwargs)


@register_model
def nac_fashion(pretrained: bool = False, **kwargs: Any) -> NAC:
    """A small NAC for images of 28x28 pixels: 49 tokens, 16 + 48 + 8 latents of width 96."""
    sizes = {
        "tokenizer_depths": (1,),
        "tokenizer_dims": (48,),
        "grid_dim": 16,
        "state_dim": 96,
        "code_dim": 64,
        "signature_dim": 32,
        "num_inputs": 16,
        "num_mediators": 48,
        "num_outputs": 8,
        "depth": 4,
        "num_heads": 3,
        "head_dim": 32,
        "prior": _BARABASI,
        "prior_args": {"m": 2},
    }
    return _create("nac_fashion", pretrained, sizes, kwargs)
