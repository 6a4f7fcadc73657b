"""Understanding the published NAC configs: their keys, defaults and nesting, as our options.

The published constructors name these keys; a key that would change the model and that we do not
have is an error. Letters: none.
"""

from collections.abc import Mapping
from typing import Any

from m2mkd.errors import ConfigError, did_you_mean

Config = Mapping[str, Any]

_PRESETS = {
    "tiny": (3, 3, 9),
    "mini": (3, 3, 6),
    "micro": (3, 3, 3),
    "nano": (1, 1, 1),
    "pico": (1, 1, 0),
    "femto": (1, 0, 0),
    "atto": (0, 0, 0),
}
_OTHER_PRESET = (3, 3, 27)
_STEM = 4
_FC_KINDS = {"ModFC": "modfc", "WModFC": "wmodfc", "FC": "fc"}
# Published graph preset -> our prior, and how its options are called here.
_PRIORS: dict[str, tuple[str, dict[str, str]]] = {
    "watts-strogatz": ("watts_strogatz", {"k": "k", "p": "p"}),
    "planted-partition": (
        "planted_partition",
        {"l": "num_clusters", "p_in": "p_in", "p_out": "p_out"},
    ),
    "erdos-renyi": ("erdos_renyi", {"p": "p"}),
    "barabasi-albert": ("barabasi_albert", {"m": "m"}),
    "ring-of-cliques": ("ring_of_cliques", {"num_cliques": "num_cliques"}),
    "balanced-tree": ("balanced_tree", {"r": "branching"}),
    "barbell": ("barbell", {}),
    "hypercube": ("hypercube", {}),
    "complete": ("complete", {}),
}
_SAMPLING = {"no_sample": "none", "sample": "relaxed_bernoulli", "threshold": "threshold"}
# Keys of the published files: of an experiment with a NAC, with those that its logger adds, and of
# its students; and of the constructors, with img_size, which ours needs where no grid tells it.
_EXPERIMENT = (
    *("criterion", "data", "distillation", "git_rev", "model", "optimizer", "scheduler"),
    *("speedrun_meta", "training", "wandb", "__speedrun__"),
)
_STUDENTS = ("mediator", "readin", "readout", "share_kwargs")
_NAC = (
    *("img_size", "input_dim", "output_dim", "state_dim", "simplified_interface"),
    *("input_tokenizer_kwargs", "input_tokenizer_type", "latent_graph_kwargs", "latent_graph_type"),
    *("output_tokenizer_kwargs", "output_tokenizer_type", "predefined_states_dir"),
    *("stitch_ckpt_path", "stitch_dim", "student_state_dict_dir", "student_type"),
)
_VIT = (
    *("attn_drop_rate", "depth", "divided_depths", "drop_path_rate", "drop_rate", "embed_dim"),
    *("img_size", "in_chans", "layernorm_eps", "mlp_ratio", "model", "num_classes", "num_heads"),
    *("patch_size", "qkv_bias"),
)
_VMOE = (
    *_VIT,
    *("idx", "is_student", "moe_pos", "num_expert", "post_stitch_pos", "pre_stitch_pos"),
    *("set_gate_hook", "stitch_dim", "top_k"),
)


class Section:
    """One mapping of a config, read key by key, so that what nobody reads can be reported.

    Args:
        where: What to call it in errors.
        values: The mapping, or None for an empty one.
        defaults: What holds where it has no key of its own.

    Raises:
        ConfigError: Not a mapping.
    """

    def __init__(self, where: str, values: Any, defaults: Config | None = None) -> None:
        if values is not None and not isinstance(values, Mapping):
            raise ConfigError(f"{where} is {values!r}, not a mapping of keys to values")
        self.where = where
        self._own = set(values or {})
        self.values: dict[str, Any] = {**(defaults or {}), **(values or {})}
        self._read: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a key."""
        self._read.add(name)
        return self.values.get(name, default)

    def need(self, name: str) -> Any:
        """The value of a key that has no default.

        Raises:
            ConfigError: It is missing.
        """
        self._read.add(name)
        if name not in self.values:
            raise ConfigError(f"{self.where} lacks '{name}'")
        return self.values[name]

    def sub(self, name: str, defaults: Config | None = None) -> "Section":
        """The mapping under a key."""
        return Section(f"{self.where}.{name}", self.take(name), defaults)

    def only(self, name: str, *allowed: Any) -> None:
        """Reads a key that we have one behaviour for; the first allowed value is the default.

        Raises:
            ConfigError: It asks for another.
        """
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"{self.where}.{name}={value!r} is not supported; m2mkd has {allowed[0]!r}"
            )

    def ignore(self, *names: str) -> None:
        """Accepts keys that say nothing about a trained model's outputs."""
        self._read.update(names)

    def done(self) -> None:
        """Ends the reading.

        Raises:
            ConfigError: A key that nobody read.
        """
        for name in sorted(self._own - self._read):
            hint = did_you_mean(name, self._read)
            raise ConfigError(f"{self.where} has an unknown key '{name}'{hint}")


def check_keys(kind: str, config: Config) -> None:
    """Lets keys fail that no published file has, where nobody would read them.

    Args:
        kind: As `m2mkd.models.official.load` takes it.
        config: A published file, or the arguments of the constructor alone.

    Raises:
        ConfigError: It has other keys, and they are not null.
    """
    is_file = "state_dim" not in config  # the constructors of NACs need it
    if kind in ("vit", "vmoe"):
        _check_known("config", config, _VIT if kind == "vit" else _VMOE)
    elif kind != "nac":
        if is_file:  # a student's own arguments are its block's, tokenizer's and pooling's
            _check_known("config", config, _STUDENTS)
    elif is_file:
        _check_known("config", config, _EXPERIMENT)
        kwargs = Section("config.model", config.get("model")).sub("kwargs").values
        _check_known("config.model.kwargs", kwargs, _NAC)
    else:
        _check_known("config", config, _NAC)


def _check_known(where: str, values: Config, known: tuple[str, ...]) -> None:
    unknown = [name for name, value in values.items() if name not in known and value is not None]
    if unknown:
        listed = ", ".join(f"'{name}'{did_you_mean(str(name), known)}" for name in unknown)
        raise ConfigError(f"{where} has unknown keys: {listed}; known: {', '.join(known)}")


def tokenizer_options(config: Section, state_dim: int) -> dict[str, Any]:
    """Arguments of `ConvNeXtTokenizer`, without the number of input channels."""
    config.only("input_tokenizer_type", "ConvNeXtImageTokenizer")
    section = config.sub("input_tokenizer_kwargs")
    return _tokenizer(section, state_dim, config.take("img_size"))


def student_tokenizer_options(config: Section, state_dim: int) -> dict[str, Any]:
    """The same from a read-in student's config."""
    config.only("tokenizer_type", "ConvNeXtImageTokenizer")
    section = config.sub("tokenizer_kwargs")
    return _tokenizer(section, state_dim, config.take("img_size"))


def _tokenizer(section: Section, state_dim: int, img_size: Any) -> dict[str, Any]:
    section.ignore("input_dim")
    width = section.take("repr_dim", state_dim)
    stages = section.take("num_stages", 3)
    depths = _PRESETS.get(section.take("capacity_preset", "tiny"), _OTHER_PRESET)[:stages]
    dims = (width // 4, width // 2, width)[:stages]
    section.only("convnext_kwargs", None, {})
    grid = section.sub("positional_grid_kwargs")
    grid_dim = 0
    if section.take("positional_grid_kwargs") is not None:
        grid_dim = grid.need("dim")
        stride = _STEM * 2 ** (len(depths) - 1)
        img_size = tuple(side * stride for side in grid.take("grid_size", (8, 8)))
        grid.done()
    if img_size is None:
        raise ConfigError(
            f"{section.where} has no positional_grid_kwargs, so the size of the images is not "
            "known; add img_size to the config"
        )
    section.done()
    return {
        "img_size": img_size,
        "depths": depths,
        "dims": dims,
        "patch_size": _STEM,
        "grid_dim": grid_dim,
    }


def fc_options(kind: str | None, kwargs: Section) -> dict[str, Any]:
    """`FCOptions` of a mod_fc_cls and its mod_fc_kwargs."""
    name = "ModFC" if kind is None else kind
    if name not in _FC_KINDS:
        hint = did_you_mean(name, _FC_KINDS)
        raise ConfigError(f"{kwargs.where}: no layer {name}{hint}; known: {', '.join(_FC_KINDS)}")
    kwargs.only("activation", None)
    options: dict[str, Any] = {"kind": _FC_KINDS[name]}
    if name == "ModFC":
        kwargs.only("scale_dropout", 0.0, 0)
        kwargs.ignore("eps", "weight_init_fn", "weight_init_fn_kwargs", "weight_init_gain")
        options |= {
            "scale_norm": kwargs.take("scale_normalization_type", "ln"),
            "product_norm": kwargs.take("scale_times_input_normalization_type", "none"),
            "gain": kwargs.take("scale_gain", 1.0),
            "learn_gain": kwargs.take("learnable_scale_gain", False),
            "add_one": kwargs.take("add_one_to_scale", False),
        }
    elif name == "WModFC":
        kwargs.only("eps", 1e-6)
    kwargs.done()
    return options


def kernel_options(section: Section) -> dict[str, Any]:
    """`KernelOptions` of kernel_kwargs."""
    section.only("use_gumbel_along_functions", False)
    # Neither changes values or gradients of a log-kernel.
    section.ignore("straight_through", "truncation_implementation")
    section.ignore("gumbel_temperature", "gumbel_hard")
    is_stochastic = section.take("stochastic_kernel", False)
    in_eval = section.take("stochastic_eval_behaviour", "no_sample")
    if in_eval not in _SAMPLING:
        hint = did_you_mean(str(in_eval), _SAMPLING)
        raise ConfigError(f"{section.where}.stochastic_eval_behaviour={in_eval!r}{hint}")
    options = {
        "truncation": section.take("truncation"),
        "bandwidth": section.take("initial_bandwidth", 1.0),
        "learn_bandwidth": section.take("learnable_bandwidth", True),
        "sampling": "relaxed_bernoulli" if is_stochastic else "none",
        "temperature": section.take("stochastic_sampling_temperature", 1.0),
        "eval_sampling": _SAMPLING[in_eval] if is_stochastic else "none",
    }
    section.done()
    return options


def block(
    section: Section, *, residual: bool, circuit: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`BlockOptions` and `KernelOptions` of a propagator, read-out or student of one.

    Args:
        section: Its kwargs, with those of the graph around it as defaults.
        residual: The default of include_residual_in_latent_attention.
        circuit: Whether there is a kernel.
    """
    fc_kind, fc_kwargs = section.take("mod_fc_cls"), section.take("mod_fc_kwargs")
    scale = section.take("layer_scale_initial_value", 1e-6)
    drop_path = section.take("path_drop_prob", 0.0)
    attention = section.sub(
        "latent_attention_kwargs",
        {
            "state_dim": section.need("state_dim"),
            "code_dim": section.need("code_dim"),
            "num_heads": section.take("num_heads", 1),
            "head_dim": section.take("head_dim", 64),
            "include_residual": section.take("include_residual_in_latent_attention", residual),
            "layer_scale_initial_value": scale,
            "path_drop_prob": drop_path,
            "qkv_bias": section.take("qkv_bias_in_attention", True),
            "mod_fc_cls": fc_kind,
            "mod_fc_kwargs": fc_kwargs,
        },
    )
    options = _attention(attention)
    options["share_norm"] = attention.take("share_layernorm", False)
    attention.only("path_drop_prob", drop_path)
    kernel: dict[str, Any] = {}
    if circuit:
        attention.only("kernel_type", "DotProductKernel")
        attention.only("mask_attn_scores_with_affinities", True)
        attention.only("normalize_kernel_along_keys", True)
        kernel = kernel_options(attention.sub("kernel_kwargs"))
    attention.only("scale_attention_by_affinities_after_softmax", False)
    attention.done()
    options["drop_path"] = drop_path
    options |= _ffn(section, fc_kind, fc_kwargs, scale, drop_path)
    options["code_noise"] = section.take("code_noise_scale") or 0.0
    return options, kernel


def read_in_block(section: Section) -> dict[str, Any]:
    """`BlockOptions` of an attentive read-in."""
    fc_kind, fc_kwargs = section.take("mod_fc_cls"), section.take("mod_fc_kwargs")
    drop_path = section.take("path_drop_prob", 0.0)
    attention = section.sub(
        "read_in_attention_kwargs",
        {
            "state_dim": section.need("state_dim"),
            "code_dim": section.need("code_dim"),
            "num_heads": section.take("num_heads", 1),
            "head_dim": section.take("head_dim", 64),
            "include_residual": section.take("include_residual_in_read_in_attention", False),
            "layer_scale_initial_value": section.take("read_in_layer_scale_initial_value", 1.0),
            "qkv_bias": section.take("qkv_bias_in_attention", True),
            "mod_fc_cls": fc_kind,
            "mod_fc_kwargs": fc_kwargs,
        },
    )
    options = _attention(attention)
    attention.done()
    options["drop_path"] = drop_path
    scale = section.take("ffn_layer_scale_initial_value", 1e-6)
    options |= _ffn(section, fc_kind, fc_kwargs, scale, drop_path)
    options["code_noise"] = section.take("code_noise_scale") or 0.0
    return options


def _attention(section: Section) -> dict[str, Any]:
    return {
        "state_dim": section.take("state_dim"),
        "code_dim": section.take("code_dim"),
        "num_heads": section.take("num_heads"),
        "head_dim": section.take("head_dim"),
        "residual": section.take("include_residual"),
        "layer_scale": section.take("layer_scale_initial_value"),
        "qkv_bias": section.take("qkv_bias"),
        "fc": fc_options(section.take("mod_fc_cls"), section.sub("mod_fc_kwargs")),
    }


def _ffn(
    section: Section, fc_kind: Any, fc_kwargs: Any, scale: float | None, drop_path: float
) -> dict[str, Any]:
    own_kind, own_kwargs = section.take("ffn_mod_fc_cls"), section.take("ffn_mod_fc_kwargs")
    if own_kind is None:
        own_kind, own_kwargs = fc_kind, fc_kwargs
    ffn = section.sub(
        "ffn_kwargs",
        {
            "capacity_factor": section.take("ffn_capacity_factor", 1.0),
            "path_drop_prob": drop_path,
            "layer_scale_initial_value": scale,
            "use_geglu": section.take("use_geglu", False),
            "mod_fc_cls": own_kind,
            "mod_fc_kwargs": own_kwargs,
        },
    )
    ffn.only("include_residual", True)
    ffn.only("path_drop_prob", drop_path)
    options = {
        "ffn_ratio": ffn.take("capacity_factor"),
        "gated": ffn.take("use_geglu"),
        "ffn_layer_scale": ffn.take("layer_scale_initial_value"),
        "ffn_fc": fc_options(ffn.take("mod_fc_cls"), ffn.sub("mod_fc_kwargs")),
    }
    ffn.done()
    return options


def pooling_options(kind: str, section: Section) -> dict[str, Any]:
    """`pooling` and `pooling_args` of an output tokenizer."""
    section.ignore("state_dim", "output_dim")
    if kind == "FirstSlotAsLogits":
        section.done()
        return {"pooling": "first", "pooling_args": {}}
    if kind != "OutputLatentPooling":
        raise ConfigError(
            f"{section.where}: no output tokenizer {kind}; known: FirstSlotAsLogits, "
            "OutputLatentPooling"
        )
    softmax = section.take("softmax_type", "gumbel")
    if softmax not in ("gumbel", "gumbel-hard", "vanilla"):
        raise ConfigError(f"{section.where}.softmax_type={softmax!r} is not known")
    args = {
        "gumbel": softmax != "vanilla",
        "hard": softmax == "gumbel-hard",
        "temperature": section.take("softmax_temperature", 1.0),
    }
    section.done()
    return {"pooling": "confidence", "pooling_args": args}


def prior_options(section: Section) -> dict[str, Any]:
    """`prior` and `prior_args` of mediator_latent_kwargs, for models that start afresh.

    Raises:
        ConfigError: A graph preset that we do not have.
    """
    preset = section.take("graph_preset")
    options = section.take("graph_generator_kwargs") or {}
    if preset is None:
        return {"prior": "none"}
    if preset == "grid-graph":
        args = {"rows": options["dim"][0], "periodic": options.get("periodic", False)}
        return {"prior": "grid", "prior_args": args}
    if preset not in _PRIORS:
        hint = did_you_mean(str(preset), _PRIORS)
        raise ConfigError(f"{section.where}.graph_preset={preset!r} is not known{hint}")
    name, names = _PRIORS[preset]
    args = {ours: options[theirs] for theirs, ours in names.items() if theirs in options}
    return {"prior": name, "prior_args": args}
