"""Loading NACs and NAC student modules of the published code (`official.load`).

Names and defaults are those of the code that published m2mKD (arXiv 2402.16918).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd.errors import CheckpointError, ConfigError
from m2mkd.models.nac import NAC
from m2mkd.models.nac_options import block_options
from m2mkd.models.nac_stages import MediatorStage, ReadInStage, ReadOutStage
from m2mkd.models.official_config import (
    Section,
    block,
    pooling_options,
    prior_options,
    read_in_block,
    student_tokenizer_options,
    tokenizer_options,
)
from m2mkd.nn import (
    ConfidencePooling,
    ConvNeXtTokenizer,
    FirstLatent,
    Propagator,
    ReadIn,
    ReadOut,
)

# The first of the kept stitches; its rows are their width.
STITCH = "latent_graphs.0.stitch_pairs.0.0.weight"

Config = Mapping[str, Any]
Loaded = tuple[nn.Module, dict[str, str]]

# Published name -> ours, tried in order; each may change a name once.
_SHARED_NAMES = (
    (r"\b(query|key|value)_compiler\.", r"\1."),
    (r"\bexit_layer\.", "exit."),
    (r"\b(sender|receiver)_layernorm\.", r"\1_norm."),
    (r"\bnative_(weight|bias)$", r"\1"),
    (r"\bscale_gain$", "gain"),
    (r"\blin\.(weight|bias)$", r"linear.\1"),
    (r"\b(read_in|latent)_attention\.", "attention."),
    (r"\bffn\.layernorm\.", "ffn.norm."),
    (r"\bffn\.ffn\.0\.", "ffn.fc1."),
    (r"\bffn\.ffn\.2\.", "ffn.fc2."),
    (r"\bhead\.0\.module\.", "head_norm."),
    (r"\bhead\.1\.", "head."),
    (r"\bbackbone\.downsample_layers\.0\.", "stem."),
    (r"\bbackbone\.downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\bbackbone\.stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\bdwconv\.", "conv_dw."),
    (r"\bpwconv([12])\.", r"mlp.fc\1."),
    (r"\bpositional_grid\.grid$", "grid"),
    (r"\bconfidence_scorer\.", "confidence."),
    (r"\bto_logits\.", "classifier."),
)
_NAC_NAMES = (
    (r"^latent_graphs\.0\.", ""),
    (r"^(input|mediator|output)_latents\.(signatures|codes)_$", r"\1_latents.\2"),
    (r"^(input|mediator|output)_latents\.initial_states_$", r"\1_latents.states"),
    (r"^latent_seeder\.layernorm\.", "seeder.norm."),
    (r"^latent_seeder\.code_to_state_mu\.", "seeder.mean."),
    (r"^latent_seeder\.code_to_state_logvar\.", "seeder.log_variance."),
    (r"^propagators\.(\d+)\.latent_attention\.kernel\.", r"kernels.\1."),
    (r"^read_out\.latent_attention\.kernel\.", "read_out_kernel."),
    (r"^stitch_pairs\.(\d+)\.0\.", r"stitches.post.\1."),
    (r"^stitch_pairs\.(\d+)\.1\.", r"stitches.pre.\1."),
    (r"^stitch_norm\.", "stitches.norm."),
    (r"^input_tokenizer\.", "tokenizer."),
    (r"^output_tokenizer\.", "pooling."),
)

# What we have one behaviour for.
_ONLY = (
    ("share_ffn_between_propagators", False),
    ("disable_input_mediator_communication", False),
    ("use_input_states_as_mediator_states", False),
    ("propagator_layerwise_kwargs", None),
    ("read_in_cls", "AttentiveReadIn"),
)
# Where first values came from; the checkpoint replaces them.
_SOURCES = ("student_state_dict_dir", "predefined_codes_dir", "stitch_ckpt_path", "stitch_dim")
_STUDENT_DEFAULTS = {"num_heads": 6}
_LATENT_SOURCES = (
    "graph_preset",
    "graph_generator_kwargs",
    "init_with_identical_codes",
    "predefined_codes_path",
)


def nac_arguments(config: Config, *, with_prior: bool = False) -> dict[str, Any]:
    """Arguments of `NAC` that describe the network of a published config.

    Args:
        config: `model.kwargs` of a published YAML file, or all of such a file.
        with_prior: Whether to ask for first signatures too, which a checkpoint would replace.

    Raises:
        ConfigError: A key or value that asks for something this package does not have.
    """
    config = _model_kwargs(config)
    top = Section("config", config)
    top.only("latent_graph_type", "LatentGraph")
    state_dim, num_classes = top.need("state_dim"), top.need("output_dim")
    tokenizer = tokenizer_options(top, state_dim)
    pooling = pooling_options(
        top.take("output_tokenizer_type", "FirstSlotAsLogits"), top.sub("output_tokenizer_kwargs")
    )
    graph = top.sub("latent_graph_kwargs", {"state_dim": state_dim})
    prior = prior_options(graph.sub("mediator_latent_kwargs")) if with_prior else {}
    return {
        "img_size": tokenizer["img_size"],
        "in_chans": top.need("input_dim"),
        "num_classes": num_classes,
        "tokenizer_depths": tokenizer["depths"],
        "tokenizer_dims": tokenizer["dims"],
        "patch_size": tokenizer["patch_size"],
        "grid_dim": tokenizer["grid_dim"],
        **prior,
        **pooling,
        **_graph_arguments(graph, pooling["pooling"]),
    }


def _model_kwargs(config: Config) -> Config:
    """The model's part of a published experiment's file; the config itself if it is that part."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        return config
    kwargs = model.get("kwargs")
    if model.get("name") != "NeuralCompiler" or not isinstance(kwargs, Mapping):
        raise ConfigError(f"model.name is {model.get('name')!r}, not a NeuralCompiler with kwargs")
    return kwargs


def _graph_arguments(graph: Section, pooling: str) -> dict[str, Any]:
    for name, value in _ONLY:
        graph.only(name, value)
    graph.ignore("input_dim", "output_dim", *_SOURCES)
    seeder = graph.sub("latent_seeder_kwargs")
    seeder.only("use_state_noise", True)
    seeder.only("use_code_as_mean_state", False)
    seeder.done()
    learn = {
        "learnable_signatures": graph.take("learnable_signatures", True),
        "learnable_codes": graph.take("learnable_codes", True),
    }
    for kind in ("input", "mediator", "output"):
        latents = graph.sub(f"{kind}_latent_kwargs")
        latents.ignore(*_LATENT_SOURCES)
        for name, value in learn.items():
            latents.only(name, value)
        latents.done()
    blocks, kernels = _blocks(graph)
    propagator = blocks["propagator"]
    read_out = graph.sub("read_out_kwargs")
    uses_head = read_out.take("use_head", True)
    if uses_head != (pooling == "first"):
        raise ConfigError(
            f"{read_out.where}.use_head={uses_head} does not go with this output tokenizer: "
            "FirstSlotAsLogits needs a head, OutputLatentPooling none"
        )
    arguments = {
        "state_dim": propagator.pop("state_dim"),
        "code_dim": propagator.pop("code_dim"),
        "signature_dim": graph.need("signature_dim"),
        "num_inputs": graph.need("num_input_latents"),
        "num_mediators": graph.need("num_mediator_latents"),
        "num_outputs": graph.need("num_output_latents"),
        "depth": graph.need("num_iterations"),
        "drop_path_rate": propagator.pop("drop_path"),
        **blocks,
        **kernels,
        "share_propagators": graph.take("share_propagator_weights", True),
        "per_layer_codes": not graph.take("share_codes_between_iterations", True),
        "seeding": "codes" if graph.take("use_latent_seeder", True) else "learned",
        "code_noise": graph.take("code_noise_scale") or 0.0,
        "code_noise_in_seeder": graph.take("use_code_noise_in_latent_seeder", False),
        "inputs_to": (
            "all" if graph.take("enable_persistent_input_mediator_communication", True) else "first"
        ),
        "inputs_to_read_out": graph.take("enable_input_output_communication", True),
        "head_norm": read_out.take("pre_output_layernorm", True),
        "learn_signatures": learn["learnable_signatures"],
        "learn_codes": learn["learnable_codes"],
    }
    graph.done()
    return arguments


def _blocks(graph: Section) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Options of the three kinds of blocks, and of the two kinds of kernels."""
    shared = {
        "state_dim": graph.need("state_dim"),
        "code_dim": graph.need("code_dim"),
        "num_heads": graph.take("num_heads", 1),
        "head_dim": graph.take("head_dim", 64),
        "path_drop_prob": graph.take("path_drop_prob", 0.0),
        "ffn_capacity_factor": graph.take("ffn_capacity_factor", 1.0),
        "code_noise_scale": graph.take("code_noise_scale"),
        "use_geglu": graph.take("use_geglu", False),
        "qkv_bias_in_attention": graph.take("qkv_bias_in_attention", True),
        "mod_fc_cls": graph.take("mod_fc_cls", "ModFC"),
        "mod_fc_kwargs": graph.take("mod_fc_kwargs"),
        "ffn_mod_fc_cls": graph.take("ffn_mod_fc_cls"),
        "ffn_mod_fc_kwargs": graph.take("ffn_mod_fc_kwargs"),
    }
    scale = graph.take("layer_scale_initial_value", 1e-6)
    read_in = graph.sub("read_in_kwargs", {**shared, "ffn_layer_scale_initial_value": scale})
    propagator = graph.sub("propagator_kwargs", {**shared, "layer_scale_initial_value": scale})
    read_out = graph.sub("read_out_kwargs", {**shared, "layer_scale_initial_value": scale})
    read_out.ignore("output_dim", "pre_output_layernorm", "use_head")
    propagator.only("stitch_dim", None)
    read_in_options = read_in_block(read_in)
    propagator_options, kernel = block(propagator, residual=True, circuit=True)
    read_out_options, read_out_kernel = block(read_out, residual=True, circuit=True)
    for section in (read_in, propagator, read_out):
        section.done()
    return (
        {
            "read_in": read_in_options,
            "propagator": propagator_options,
            "read_out": read_out_options,
        },
        {"kernel": kernel, "read_out_kernel": read_out_kernel},
    )


def load_nac(tensors: dict[str, Tensor], config: Config) -> Loaded:
    """A published NeuralCompiler; repetitions of a shared propagator are dropped from `tensors`."""
    arguments = nac_arguments(config)
    names = {name: rename(name, _NAC_NAMES + _SHARED_NAMES) for name in tensors}
    if arguments["share_propagators"]:
        _merge_propagators(tensors, names)
    stitch = tensors.get(STITCH)
    if stitch is not None:
        arguments["stitch_dim"] = stitch.shape[0]
    return NAC(**arguments), names


def _merge_propagators(tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    """Keeps one copy of a propagator that the published layout lists once per layer.

    Raises:
        CheckpointError: Two copies differ.
    """
    first: dict[str, str] = {}
    for name, ours in names.items():
        shared = re.sub(r"^(propagators|kernels)\.\d+\.", r"\1.0.", ours)
        names[name] = shared
        original = first.setdefault(shared, name)
        if original == name:
            continue
        if not torch.equal(tensors[original], tensors[name]):
            raise CheckpointError(f"no place for {name}: it should repeat {original} and does not")
        del tensors[name]


def load_read_in(tensors: dict[str, Tensor], config: Config) -> Loaded:
    """A published ReadInStudent."""
    section = _student_section(config, "readin")
    section.only("read_in_cls", "AttentiveReadIn")
    options = block_options({**read_in_block(section), "code_noise": 0.0})
    tokenizer = ConvNeXtTokenizer(
        in_chans=section.need("input_dim"), **student_tokenizer_options(section, options.state_dim)
    )
    read_in = ReadIn(tokenizer.width, options)
    return _with_latents(ReadInStage(tokenizer, read_in, _stitch_dim(section, tensors)), tensors)


def load_mediator(tensors: dict[str, Tensor], config: Config) -> Loaded:
    """A published MediatorStudent."""
    section = _student_section(config, "mediator")
    options, _ = block(section, residual=True, circuit=False)
    propagator = Propagator(block_options({**options, "code_noise": 0.0}))
    names = ((r"^(latent_attention|ffn)\.", r"propagator.\1."),)
    return _with_latents(MediatorStage(propagator, _stitch_dim(section, tensors)), tensors, names)


def load_read_out(tensors: dict[str, Tensor], config: Config) -> Loaded:
    """A published ReadOutStudent."""
    section = _student_section(config, "readout")
    values, _ = block(section, residual=False, circuit=False)
    options = block_options({**values, "code_noise": 0.0})
    num_classes = section.need("output_dim")
    pooling = pooling_options(
        section.take("tokenizer_type", "FirstSlotAsLogits"), section.sub("tokenizer_kwargs")
    )
    read_out = ReadOut(
        options,
        num_outputs=num_classes if section.take("use_head", True) else None,
        head_norm=section.take("pre_output_layernorm", True),
    )
    last: ConfidencePooling | FirstLatent = FirstLatent()
    if pooling["pooling"] == "confidence":
        last = ConfidencePooling(options.state_dim, num_classes, **pooling["pooling_args"])
    names = ((r"^(latent_attention|ffn|head)\.", r"read_out.\1."), (r"^tokenizer\.", "pooling."))
    return _with_latents(
        ReadOutStage(read_out, last, _stitch_dim(section, tensors)), tensors, names
    )


def _student_section(config: Config, part: str) -> Section:
    """A student's own keys; published files have shared ones and a mapping for each part."""
    if "share_kwargs" in config:
        file = Section("config", config)
        config = {**file.sub("share_kwargs").values, **file.sub(part).values}
    return Section("config", config, _STUDENT_DEFAULTS)


def _stitch_dim(section: Section, tensors: dict[str, Tensor]) -> int:
    """The teacher's width: published files leave it to the command line, so the tensors say it."""
    width: int
    if section.take("stitch_dim") is not None:
        width = section.take("stitch_dim")
    elif "pre_stitch.weight" in tensors:
        width = tensors["pre_stitch.weight"].shape[1]
    elif "post_stitch.weight" in tensors:
        width = tensors["post_stitch.weight"].shape[0]
    else:
        raise CheckpointError("the checkpoint has no stitches, so it is not a student module")
    return width


def _with_latents(
    stage: ReadInStage | MediatorStage | ReadOutStage,
    tensors: dict[str, Tensor],
    names: tuple[tuple[str, str], ...] = (),
) -> Loaded:
    """Gives a stage the code and states beside its tensors; published files have none."""
    stage.set_latents(tensors.pop("codes", None), tensors.pop("states", None))
    tensors |= dict(stage.named_buffers(recurse=False))
    return stage, {name: rename(name, names + _SHARED_NAMES) for name in tensors}


def rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """A published name as ours."""
    for pattern, ours in patterns:
        name = re.sub(pattern, ours, name)
    return name
