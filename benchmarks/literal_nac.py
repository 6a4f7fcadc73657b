"""A slow NAC in the published layout, written out step by step: the peer of `bench_nac.py`, and in
the tests the measure of options that no golden file has.

It knows nothing of our classes; `tests/golden/test_nac_options.py` holds it to a golden file.
Letters of the products: b example, u receiver, v sender, h head, k head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
GRAPH = "latent_graphs.0"
DEPTHS = {"pico": (1, 1, 0), "micro": (3, 3, 3), "femto": (1, 0, 0), "tiny": (3, 3, 9)}

# By name: classes, tokenizer, width of the grid, its side, state width, FFN ratio, heads, input
# latents, mediators, neighbours that a new node of the scale-free prior chooses.
PUBLISHED = {
    "nac_tiny_imagenet": (200, "tiny", 64, 8, 384, 2.0, 6, 64, 256, 2),
    "nac_imagenet": (1000, None, 64, 28, 512, 1.0, 8, 192, 768, 6),
}


def published_config(name: str) -> dict[str, Any]:
    """`model.kwargs` of the published file of a model with the scale-free prior."""
    classes, tokenizer, grid, side, width, ratio, heads, inputs, mediators, m = PUBLISHED[name]
    kernel = {
        "truncation": 0.9,
        "stochastic_kernel": True,
        "stochastic_sampling_temperature": 0.5,
    }
    attention = {"kernel_type": "DotProductKernel", "share_layernorm": True}
    residual = "include_residual_in_latent_attention"
    graph = {
        "num_input_latents": inputs,
        "num_mediator_latents": mediators,
        "num_output_latents": 64,
        "num_iterations": 8,
        "signature_dim": 64,
        "code_dim": width,
        "num_heads": heads,
        "head_dim": 64,
        "ffn_capacity_factor": ratio,
        "use_geglu": True,
        "qkv_bias_in_attention": False,
        "share_propagator_weights": False,
        "layer_scale_initial_value": 0.1,
        "path_drop_prob": 0.1,
        "code_noise_scale": 0.05,
        "use_code_noise_in_latent_seeder": True,
        "mod_fc_kwargs": {
            "scale_gain": 0.1,
            "learnable_scale_gain": True,
            "add_one_to_scale": True,
        },
        "input_latent_kwargs": None,
        "output_latent_kwargs": None,
        "mediator_latent_kwargs": {
            "graph_preset": "barabasi-albert",
            "graph_generator_kwargs": {"n": mediators, "m": m},
        },
        "propagator_kwargs": {"latent_attention_kwargs": {**attention, "kernel_kwargs": kernel}},
        "read_in_kwargs": {
            "include_residual_in_read_in_attention": True,
            "num_heads": heads,
            "path_drop_prob": 0.0,
        },
        "read_out_kwargs": {
            residual: False,
            "path_drop_prob": 0.0,
            "pre_output_layernorm": False,
            "use_head": False,
        },
    }
    preset = {} if tokenizer is None else {"capacity_preset": tokenizer}
    positions = {"dim": grid, "grid_size": [side, side]}
    return {
        "input_dim": 3,
        "input_tokenizer_type": "ConvNeXtImageTokenizer",
        "input_tokenizer_kwargs": {
            **preset,
            "num_stages": 2,
            "positional_grid_kwargs": positions,
        },
        "latent_graph_type": "LatentGraph",
        "latent_graph_kwargs": graph,
        "output_tokenizer_type": "OutputLatentPooling",
        "output_tokenizer_kwargs": {"softmax_type": "gumbel"},
        "output_dim": classes,
        "simplified_interface": True,
        "state_dim": width,
    }


class Literal:
    """Reads a published state dict by its names, or invents one: then every tensor read is drawn.

    Args:
        config: `model.kwargs` of a published file.
        state: Tensors by name; None draws each when it is first read.
    """

    def __init__(self, config: dict[str, Any], state: State | None = None) -> None:
        self.config = config
        self.graph = config.get("latent_graph_kwargs", config)  # students have one level
        self.state: State = {} if state is None else state
        self.draws = state is None
        self.training = (
            False  # published noise on codes, first states, links, paths and confidences
        )
        self.generator = torch.Generator().manual_seed(0)

    def get(self, name: str, *shape: int) -> Tensor:
        name = name.removeprefix(".")
        if self.draws and name not in self.state:
            value = torch.randn(shape, generator=self.generator)
            if name.endswith(("norm.weight", "gamma", "module.weight")) or name.endswith(
                ".0.weight"
            ):
                value = 1 + 0.2 * value
            elif name.endswith(("gain", "bandwidth")):
                value = 0.5 + value.sigmoid()
            elif name.endswith("bias"):
                value = 0.1 * value
            elif len(shape) == 2 and not name.endswith("_"):
                value = value / math.sqrt(shape[1])
            elif len(shape) == 4:
                value = value / math.sqrt(shape[1] * shape[2] * shape[3])
            self.state[name] = value
        value = self.state[name]
        assert tuple(value.shape) == shape, name
        return value

    def layer_norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        width = x.shape[-1]
        weight, bias = self.get(f"{name}.weight", width), self.get(f"{name}.bias", width)
        return F.layer_norm(x, [width], weight, bias, eps)

    def linear(self, x: Tensor, name: str, out: int) -> Tensor:
        return F.linear(
            x, self.get(f"{name}.weight", out, x.shape[-1]), self.get(f"{name}.bias", out)
        )

    def mod_fc(self, x: Tensor, codes: Tensor, name: str, out: int, bias: bool = True) -> Tensor:
        options = self.graph.get("mod_fc_kwargs") or {}
        width = x.shape[-1]
        scale = F.linear(codes, self.get(f"{name}.scale.weight", width, codes.shape[-1]))
        scale = F.layer_norm(scale, [width])
        if options.get("learnable_scale_gain", False):
            scale = scale * self.get(f"{name}.scale_gain")
        else:
            scale = scale * options.get("scale_gain", 1.0)
        if options.get("add_one_to_scale", False):
            scale = scale + 1
        y = F.linear(x * scale, self.get(f"{name}.native_weight", out, width))
        return y + self.get(f"{name}.native_bias", out) if bias else y

    def conv_norm(self, x: Tensor, name: str) -> Tensor:
        return self.layer_norm(x.permute(0, 2, 3, 1), name, 1e-6).permute(0, 3, 1, 2)

    def conv(self, x: Tensor, name: str, out: int, size: int, **options: int) -> Tensor:
        inner = x.shape[1] // options.get("groups", 1)
        weight = self.get(f"{name}.weight", out, inner, size, size)
        return F.conv2d(x, weight, self.get(f"{name}.bias", out), **options)

    def tokens(self, images: Tensor) -> Tensor:
        """The first stages of a ConvNeXt, and the grid."""
        options = self.config["input_tokenizer_kwargs"]
        root, width = "input_tokenizer.backbone", self.config["state_dim"]
        depths = DEPTHS[options.get("capacity_preset", "tiny")][: options.get("num_stages", 3)]
        x = images
        for i, (depth, dim) in enumerate(
            zip(depths, (width // 4, width // 2, width), strict=False)
        ):
            down = f"{root}.downsample_layers.{i}"
            if i == 0:
                x = self.conv_norm(self.conv(x, f"{down}.0", dim, 4, stride=4), f"{down}.1")
            else:
                x = self.conv(self.conv_norm(x, f"{down}.0"), f"{down}.1", dim, 2, stride=2)
            for j in range(depth):
                block = f"{root}.stages.{i}.{j}"
                y = self.conv(x, f"{block}.dwconv", dim, 7, padding=3, groups=dim)
                y = self.layer_norm(y.permute(0, 2, 3, 1), f"{block}.norm", 1e-6)
                y = F.gelu(self.linear(y, f"{block}.pwconv1", 4 * dim))
                y = self.linear(y, f"{block}.pwconv2", dim) * self.get(f"{block}.gamma", dim)
                x = x + y.permute(0, 3, 1, 2)
        grid = options["positional_grid_kwargs"]
        positions = self.get(
            "input_tokenizer.positional_grid.grid", grid["dim"], *grid["grid_size"]
        )
        x = torch.cat([x, positions.expand(len(x), -1, -1, -1)], 1)
        return x.flatten(2).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_affinity: Tensor) -> Tensor:
        """[B, U, HK] from q [B, U, HK] and k, v [B, U or 1, V, HK]."""
        heads, width = self.graph["num_heads"], self.graph["head_dim"]
        q, k, v = (x.unflatten(-1, (heads, width)) for x in (q, k, v))
        pairs = "bvhk" if k.shape[1] == 1 else "buvhk"
        k, v = (x[:, 0] if k.shape[1] == 1 else x for x in (k, v))
        scores = torch.einsum(f"buhk,{pairs}->bhuv", q, k) / math.sqrt(width)
        weights = (scores + log_affinity[..., None, :, :]).softmax(-1)
        return torch.einsum(f"bhuv,{pairs}->buhk", weights, v).flatten(2)

    def noisy(self, codes: Tensor) -> Tensor:
        """Codes as a block hears them in training; the noise is a constant to autograd."""
        if not self.training:
            return codes
        noise = (2 * torch.rand_like(codes) - 1) * self.graph.get("code_noise_scale", 0.0)
        return codes + codes.detach() * noise

    def dropped(self, y: Tensor, kwargs: dict) -> Tensor:
        """Messages after stochastic depth."""
        rate = kwargs.get("path_drop_prob", self.graph.get("path_drop_prob", 0.0))
        if not self.training or rate == 0.0:
            return y
        return y * torch.empty(len(y), 1, 1).bernoulli_(1 - rate) / (1 - rate)

    def ffn(self, x: Tensor, codes: Tensor, name: str, kwargs: dict) -> Tensor:
        hidden = round(self.graph.get("ffn_capacity_factor", 1.0) * x.shape[-1])
        is_gated = self.graph.get("use_geglu", False)
        y = self.layer_norm(x, f"{name}.layernorm")
        y = self.mod_fc(y, codes, f"{name}.ffn.0", hidden * (1 + is_gated))
        y = y[..., :hidden] * F.gelu(y[..., hidden:]) if is_gated else F.gelu(y)
        y = self.mod_fc(y, codes, f"{name}.ffn.2", x.shape[-1])
        return x + self.dropped(y * self.get(f"{name}.layer_scale.gamma", x.shape[-1]), kwargs)

    def read_in(self, states: Tensor, codes: Tensor, tokens: Tensor) -> Tensor:
        name, codes = f"{GRAPH}.read_in.read_in_attention", self.noisy(codes)
        inner = self.graph["num_heads"] * self.graph["head_dim"]
        bias = self.graph.get("qkv_bias_in_attention", True)
        x = self.layer_norm(tokens, f"{name}.sender_layernorm")
        q = self.layer_norm(states, f"{name}.receiver_layernorm")
        q = self.mod_fc(q, codes, f"{name}.query_compiler", inner, bias)
        pairs = x[:, None].expand(-1, len(codes), -1, -1)
        k, v = (
            self.mod_fc(pairs, codes[:, None], f"{name}.{part}_compiler", inner, bias)
            for part in ("key", "value")
        )
        y = self.attend(q, k, v, torch.zeros(len(codes), x.shape[1]))
        y = self.mod_fc(y, codes, f"{name}.exit_layer", states.shape[-1])
        y = y * self.get(f"{name}.layer_scale.gamma", states.shape[-1])
        options = self.graph.get("read_in_kwargs") or {}
        if options.get("include_residual_in_read_in_attention", False):
            y = states + y
        return self.ffn(y, codes, f"{GRAPH}.read_in.ffn", options)

    def propagate(
        self,
        name: str,
        kwargs: dict,
        receivers: Tensor,
        r_codes: Tensor,
        r_sig: Tensor,
        senders: Tensor,
        s_codes: Tensor,
        s_sig: Tensor,
    ) -> Tensor:
        attention = f"{name}.latent_attention"
        r_codes, s_codes = self.noisy(r_codes), self.noisy(s_codes)
        options = kwargs.get("latent_attention_kwargs") or {}
        inner = self.graph["num_heads"] * self.graph["head_dim"]
        bias = self.graph.get("qkv_bias_in_attention", True)
        shares = options.get("share_layernorm", False)
        kind = "receiver" if shares else "sender"
        r = self.layer_norm(receivers, f"{attention}.receiver_layernorm")
        s = self.layer_norm(senders, f"{attention}.{kind}_layernorm")
        q = self.mod_fc(r, r_codes, f"{attention}.query_compiler", inner, bias)
        k = self.mod_fc(s, s_codes, f"{attention}.key_compiler", inner, bias)
        v = self.mod_fc(s, s_codes, f"{attention}.value_compiler", inner, bias)
        if r_sig is None:
            log = torch.zeros(1, 1)
        else:
            log = self.log_affinity(attention, options, r_sig, s_sig, len(receivers))
        y = self.attend(q, k[:, None], v[:, None], log)
        y = self.mod_fc(y, r_codes, f"{attention}.exit_layer", receivers.shape[-1])
        y = y * self.get(f"{attention}.layer_scale.gamma", receivers.shape[-1])
        if kwargs.get("include_residual_in_latent_attention", True):
            y = receivers + self.dropped(y, kwargs)
        return self.ffn(y, r_codes, f"{name}.ffn", kwargs)

    def log_affinity(
        self, attention: str, options: dict, r_sig: Tensor, s_sig: Tensor, batch: int
    ) -> Tensor:
        """[U, V], or [B, U, V] where links are drawn."""
        kernel = options.get("kernel_kwargs") or {}
        distance = 1 - F.normalize(r_sig, dim=1) @ F.normalize(s_sig, dim=1).T
        log = -distance / self.get(f"{attention}.kernel.bandwidth")
        truncation = kernel.get("truncation")
        if truncation is not None:
            log = log.masked_fill(distance > truncation, -torch.inf)
        if self.training and kernel.get("stochastic_kernel", False):
            temperature = kernel["stochastic_sampling_temperature"]
            eps = torch.finfo(log.dtype).eps
            noise = torch.rand(batch, *log.shape).logit(eps)
            log = F.logsigmoid((log.exp().logit(eps) + noise) / temperature)
        return log - log.logsumexp(-1, keepdim=True)

    def mediator(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """A student of a propagator, with a stitch on both sides."""
        x = self.linear(tokens, "pre_stitch", self.config["state_dim"])
        x = self.propagate("", self.config, x, codes, None, x, codes, None)
        return self.linear(x, "post_stitch", self.config["stitch_dim"])

    def read_out_student(self, tokens: Tensor, states: Tensor, codes: Tensor) -> Tensor:
        """A student of the read-out whose head gives the logits."""
        x = self.linear(tokens, "pre_stitch", self.config["state_dim"])
        x = self.propagate("", self.config, states, codes, None, x, codes, None)
        x = self.layer_norm(x, "head.0.module")
        return self.mod_fc(x, codes, "head.1", self.config["output_dim"])[:, 0]

    def latents(self, kind: str, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Signatures, codes and first states [B, U, D]."""
        name, width = f"{GRAPH}.{kind}_latents", self.config["state_dim"]
        count, code_dim = self.graph[f"num_{kind}_latents"], self.graph["code_dim"]
        signatures = self.get(f"{name}.signatures_", count, self.graph["signature_dim"])
        layers = self.graph["num_iterations"]
        has_layers = kind == "mediator" and not self.graph.get(
            "share_codes_between_iterations", True
        )
        shape = (layers, count, code_dim) if has_layers else (count, code_dim)
        codes = self.get(f"{name}.codes_", *shape)
        if not self.graph.get("use_latent_seeder", True):
            states = self.get(f"{name}.initial_states_", count, width)
            return signatures, codes, states.expand(batch, -1, -1)
        seeder = f"{GRAPH}.latent_seeder"
        first = self.noisy(codes[0] if has_layers else codes)
        normed = self.layer_norm(first, f"{seeder}.layernorm")
        log_variance = self.linear(normed, f"{seeder}.code_to_state_logvar", width)
        states = self.linear(normed, f"{seeder}.code_to_state_mu", width).expand(batch, -1, -1)
        if self.training:
            states = states + (0.5 * log_variance).exp() * torch.randn_like(states)
        return signatures, codes, states

    def stitch(self, states: Tensor, pair: int) -> Tensor:
        width = self.config.get("stitch_dim")
        if width is None:
            return states
        y = self.layer_norm(states, f"{GRAPH}.stitch_norm")
        y = F.gelu(self.linear(y, f"{GRAPH}.stitch_pairs.{pair}.0", width))
        return states + self.linear(y, f"{GRAPH}.stitch_pairs.{pair}.1", states.shape[-1])

    def logits(self, images: Tensor) -> Tensor:
        (i_sig, i_codes, i), (m_sig, m_codes, m), (o_sig, o_codes, o) = (
            self.latents(kind, len(images)) for kind in ("input", "mediator", "output")
        )
        i = self.stitch(self.read_in(i, i_codes, self.tokens(images)), 0)
        layers = self.graph["num_iterations"]
        codes = list(m_codes) if m_codes.dim() == 3 else [m_codes] * layers
        shares = self.graph.get("share_propagator_weights", True)
        for layer in range(layers):
            hears = layer == 0 or self.graph.get(
                "enable_persistent_input_mediator_communication", True
            )
            name = f"{GRAPH}.propagators.{0 if shares else layer}"
            kwargs = self.graph.get("propagator_kwargs") or {}
            senders = self.senders(hears, (i, i_codes, i_sig), (m, codes[layer], m_sig))
            m = self.propagate(name, kwargs, m, codes[layer], m_sig, *senders)
            m = self.stitch(m, layer + 1)
        hears = self.graph.get("enable_input_output_communication", True)
        senders = self.senders(hears, (i, i_codes, i_sig), (m, codes[-1], m_sig))
        kwargs = self.graph.get("read_out_kwargs") or {}
        o = self.propagate(f"{GRAPH}.read_out", kwargs, o, o_codes, o_sig, *senders)
        classes = self.config["output_dim"]
        if kwargs.get("use_head", True):
            if kwargs.get("pre_output_layernorm", True):
                o = self.layer_norm(o, f"{GRAPH}.read_out.head.0.module")
            o = self.mod_fc(o, o_codes, f"{GRAPH}.read_out.head.1", classes)
        if self.config.get("output_tokenizer_type", "FirstSlotAsLogits") == "FirstSlotAsLogits":
            return o[:, 0]
        scores = self.linear(o, "output_tokenizer.confidence_scorer", 1)
        weights = F.gumbel_softmax(scores, dim=1) if self.training else scores.softmax(1)
        return self.linear((weights * o).sum(1), "output_tokenizer.to_logits", classes)

    @staticmethod
    def senders(hears: bool, inputs: tuple, mediators: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """States, codes and signatures of the senders."""
        if not hears:
            return mediators
        return tuple(torch.cat(pair, -2) for pair in zip(inputs, mediators, strict=True))
