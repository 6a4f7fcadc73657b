"""Recipes: one YAML file describes a whole run, checked before anything is computed.

A recipe is looked up by the name of a built-in file in `m2mkd/recipes/` or by path, changed with
`key.path=value` overrides, and validated by the pydantic models below. Unknown keys, wrong types
and impossible combinations raise `ConfigError` with one line per mistake.
"""

import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from m2mkd.errors import ConfigError, did_you_mean

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


Range = tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]]


class Augmentation(_Section):
    """Training augmentation, in timm's terms (`timm.data.create_transform`, `timm.data.Mixup`)."""

    crop_scale: Range = Field((1.0, 1.0), description="area range of the random crop")
    crop_ratio: Range = Field((1.0, 1.0), description="aspect range of the crop")
    hflip: Fraction = Field(0.0, description="probability of a horizontal flip")
    color_jitter: float = Field(0.0, ge=0.0, description="strength of colour jitter")
    auto_augment: str | None = Field(None, description="timm policy, such as rand-m9-mstd0.5-inc1")
    random_erase: Fraction = Field(0.0, description="probability of random erasing")
    repeats: Positive = Field(
        1, description="repeated augmentation: copies of an image in an epoch of the same length"
    )
    mixup: float = Field(0.0, ge=0.0, description="mixup alpha")
    cutmix: float = Field(0.0, ge=0.0, description="cutmix alpha")
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="smoothing of the targets")

    @model_validator(mode="after")
    def _check(self) -> "Augmentation":
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(
                    f"{name} [{low}, {high}] runs backwards; put the smaller one first"
                )
        return self

    @property
    def mixes_images(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0.0 or self.cutmix > 0.0


DATASETS = (
    "digits",
    "fashion_mnist",
    "image_folder",
    "cifar10",
    "cifar100",
    "cub",
    "tiny_imagenet",
    "imagenet",
    "imagenet_r",
    "imagenet_a",
    "tiny_imagenet_r",
)
# They hold no training images.
EVALUATION_ONLY = ("imagenet_r", "imagenet_a", "tiny_imagenet_r")


class DataConfig(_Section):
    """Where images come from and how they are prepared."""

    dataset: str = Field(description="which images; see the table of data sets")
    root: Path | None = Field(
        None, description="folder of the data set; not needed for digits and hfds/"
    )
    image_size: Positive = Field(224, description="height and width fed to the models, in pixels")
    channels: Literal[1, 3] = Field(3, description="1 for greyscale, 3 for RGB")
    mean: tuple[float, ...] | None = Field(None, description="per channel; default 0.5")
    std: tuple[Annotated[float, Field(gt=0.0)], ...] | None = Field(
        None, description="per channel; default 0.5"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field("bicubic", description="of resizing")
    crop_pct: float = Field(1.0, gt=0.0, le=1.0, description="centre crop at evaluation")
    batch_size: Positive = Field(64, description="images per process and forward pass")
    accumulate: Positive = Field(
        1, description="batches per process and optimiser step; raise it when memory is short"
    )
    eval_batch_size: Positive = Field(250, description="images per evaluation step")
    train_limit: Positive | None = Field(None, description="use only this many training images")
    workers: int = Field(0, ge=0, description="data loading processes")
    on_bad_image: Literal["fail", "skip"] = Field(
        "fail", description="what an unreadable image does; skip leaves it out and counts it"
    )
    augment: Augmentation = Augmentation()

    @field_validator("dataset")
    @classmethod
    def _check_dataset(cls, value: str) -> str:
        family, _, name = value.partition("/")
        is_known = value in DATASETS or family == "wds" or (family == "hfds" and name)
        if not is_known or (family == "wds" and "/" not in value):
            raise ValueError(
                f"{value!r} is none of {', '.join(DATASETS)}, hfds/NAME, wds/ or wds/PREFIX"
                f"{did_you_mean(value, DATASETS)}"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.root is None and not self.dataset.startswith(("digits", "hfds/")):
            raise ValueError(f"dataset {self.dataset} needs a folder; set data.root")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.channels:
                raise ValueError(f"{name} has {len(value)} values for {self.channels} channel(s)")
        return self

    @model_validator(mode="after")
    def _check_mixing(self) -> "DataConfig":
        if self.augment.mixes_images and self.batch_size % 2:
            raise ValueError(f"mixup pairs images; batch_size {self.batch_size} must be even")
        return self

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, for pixels scaled to [0, 1]."""
        default = (0.5,) * self.channels
        return self.mean or default, self.std or default


class Schedule(_Section):
    """How long and how fast one stage trains (optimisers and schedulers are timm's)."""

    epochs: int = Field(ge=0, description="passes over the training images")
    lr: float = Field(gt=0.0, description="peak learning rate; lr_base_size may scale it")
    optimizer: str = Field("adamw", description="any name `timm.optim` knows")
    weight_decay: float = Field(0.05, ge=0.0, description="not for biases, norms and positions")
    scheduler: str = Field("cosine", description="any name `timm.scheduler` knows")
    warmup_epochs: int = Field(0, ge=0, description="epochs of linear warm-up")
    warmup_lr: float = Field(1e-6, ge=0.0, description="learning rate at the very start")
    min_lr: float = Field(1e-5, ge=0.0, description="learning rate at the end")
    clip_grad: float | None = Field(None, gt=0.0, description="gradient norm limit, per module")
    drop_path: float = Field(0.0, ge=0.0, lt=1.0, description="stochastic depth of the trained net")

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} leaves nothing of epochs {self.epochs}"
            )
        return self


# Arguments of timm.create_model that other keys decide.
_DECIDED = {
    "num_classes": "the data set decides it",
    "img_size": "set data.image_size",
    "in_chans": "set data.channels",
    "drop_path_rate": "set drop_path of a schedule",
    "pretrained": "set teacher.pretrained",
    "checkpoint_path": "set teacher.checkpoint",
}


def _check_model_args(value: dict[str, Any]) -> dict[str, Any]:
    for name in value.keys() & _DECIDED.keys():
        raise ValueError(f"{name} does not belong here: {_DECIDED[name]}")
    return value


ModelArgs = Annotated[dict[str, Any], AfterValidator(_check_model_args)]


class TeacherConfig(_Section):
    """The monolithic ViT whose knowledge moves, and how it is cut into modules."""

    model: str = Field(description="any timm VisionTransformer")
    model_args: ModelArgs = Field(default_factory=dict, description="passed to create_model")
    depths: list[Positive] | Literal["auto"] = Field("auto", description="blocks per module")
    pretrained: bool = Field(False, description="weights from the hub")
    checkpoint: Path | None = Field(
        None, description="weights from a .safetensors or .pth file, or from RUN/teacher"
    )
    incubate: Schedule | None = Field(None, description="train each module inside the meta model")
    finetune: Schedule | None = Field(None, description="train the assembled teacher end to end")
    align: bool | None = Field(
        None,
        description="teach the meta model what the teacher's modules do, on meta's schedule, "
        "before it hosts the pairs; default: for a given teacher",
    )

    @model_validator(mode="after")
    def _check(self) -> "TeacherConfig":
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("pretrained and checkpoint both name weights; keep one")
        if not (self.is_given or self.incubate or self.finetune):
            raise ValueError(
                "a fresh teacher must be trained: set incubate, finetune, pretrained or checkpoint"
            )
        if self.is_given and self.incubate:
            raise ValueError("incubate trains a fresh teacher; leave it out for given weights")
        return self

    @property
    def is_given(self) -> bool:
        """Whether the teacher starts from existing weights."""
        return self.pretrained or self.checkpoint is not None

    @property
    def is_aligned(self) -> bool:
        """Whether the meta model learns from the teacher's modules."""
        return self.is_given if self.align is None else self.align


class StudentConfig(_Section):
    """The modular student."""

    model: str = Field(description="a model of m2mkd.models, such as vmoe_tiny_patch16_224")
    model_args: ModelArgs = Field(default_factory=dict, description="passed to create_model")
    depths: list[Positive] | Literal["auto"] = Field("auto", description="blocks per module")
    upcycle_from: Path | None = Field(
        None, description="a dense ViT whose weights it starts with: a file, or RUN/teacher"
    )


class DistillConfig(_Section):
    """m2mKD: loss (arXiv 2402.16918), stitches, and how the trained modules are put together."""

    schedule: Schedule = Field(description="how the pairs are trained")
    mode: Literal["joint", "separate"] = Field("joint", description="all pairs in one pass, or not")
    alpha: Fraction = Field(0.5, description="weight of the KD term; labels weigh 1 - alpha")
    temperature: float = Field(1.0, gt=0.0, description="softens both distributions")
    kd: Literal["soft", "hard"] = Field(
        "soft", description="the teacher hybrid's distribution, or its top class"
    )
    kd_reduction: Literal["batchmean", "numel"] = Field(
        "batchmean", description="numel divides by batch x classes, as the published code does"
    )
    boundary_weight: float = Field(
        0.0, ge=0.0, description="weight of the feature term at the module's output"
    )
    stitch: Literal["norm_linear", "linear"] = Field("norm_linear", description="stitch layers")
    assembly: Literal["drop", "keep", "fold"] = Field(
        "drop", description="what becomes of the stitches in the assembled student"
    )
    grid: Literal["keep", "resize", "reset"] = Field(
        "keep",
        description="what becomes of the positions for end_to_end_data: keep needs images of the "
        "same size, resize interpolates, reset starts afresh",
    )
    classifier: Literal["keep", "reset"] = Field(
        "keep",
        description="what becomes of the classifier for end_to_end_data (of a NAC: its pooling "
        "too): keep needs the same classes, reset starts afresh",
    )
    nac_context: Literal["alone", "circuit"] = Field(
        "alone",
        description="what a NAC's module is taught among: alone, under one random code (the "
        "paper); circuit: among the NAC's latents, with their codes and links",
    )

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        if self.assembly == "fold" and self.stitch != "linear":
            raise ValueError(
                f"assembly fold merges linear maps, but stitch is {self.stitch}; set stitch: linear"
            )
        return self


class LogitKDConfig(_Section):
    """Settings of the logit-distillation baseline (the whole teacher teaches the whole student)."""

    alpha: Fraction = Field(0.5, description="weight of the KD term")
    temperature: float = Field(1.0, gt=0.0, description="softens both distributions")


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Baseline = Literal["end_to_end_only", "equal_updates", "logit_kd"]


class Recipe(_Section):
    """A whole run: data, models, and the settings of every stage."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", description="names the default run folder"
    )
    seed: int = Field(0, ge=0, description="of weights, data order, augmentation and noise")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of training")
    lr_base_size: Positive | None = Field(
        None,
        description="images per step that every lr is meant for: trains with lr x batch_size x "
        "accumulate x processes / lr_base_size (512 in DeiT); default: every lr as it stands",
    )
    parallel: Literal["ddp", "fsdp", "experts"] = Field(
        "ddp",
        description="several processes hold copies of the network (ddp), shards (fsdp), or copies "
        "with other experts of a V-MoE each (experts)",
    )
    grad_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass instead of keeping them"
    )
    compile: bool = Field(False, description="torch.compile the trained network")
    threads: Positive | None = Field(None, description="CPU threads; default: all cores")
    tracking: tuple[Tracker, ...] = Field(
        (), description="experiment trackers that also get the numbers, through accelerate"
    )
    corruptions: bool = Field(
        False, description="also grade the student on damaged validation images, severity 1 to 5"
    )
    checkpoint_every: Positive | None = Field(
        None, description="optimiser steps between checkpoints; default: once an epoch"
    )
    data: DataConfig
    end_to_end_data: DataConfig | None = Field(
        None,
        description="keys as in data: what the student is trained on end to end, its baseline too, "
        "and graded on; default: data",
    )
    meta: Schedule
    teacher: TeacherConfig
    student: StudentConfig
    distill: DistillConfig
    end_to_end: Schedule
    logit_kd: LogitKDConfig = LogitKDConfig()
    baselines: list[Baseline] = Field(
        default_factory=list,
        description="end_to_end_only: the student alone, same end-to-end schedule; equal_updates: "
        "alone, for distill + end_to_end epochs; logit_kd: taught by the whole teacher's logits",
    )

    @model_validator(mode="after")
    def _check_data(self) -> "Recipe":
        for data in (self.data, self.end_to_end_data or self.data):
            if data.dataset in EVALUATION_ONLY:
                raise ValueError(
                    f"{data.dataset} has no training images; evaluate a run on it with "
                    f"`m2mkd evaluate RUN --data dataset={data.dataset} --data root=FOLDER`"
                )
        return self

    @model_validator(mode="after")
    def _check_end_to_end_data(self) -> "Recipe":
        if self.end_to_end_data is None:
            for key in ("grid", "classifier"):
                if (choice := getattr(self.distill, key)) != "keep":
                    raise ValueError(
                        f"distill.{key} {choice} is for a student that goes on with "
                        "end_to_end_data; set that, or leave out the choice"
                    )
            return self
        if self.end_to_end_data.channels != self.data.channels:
            raise ValueError(
                f"end_to_end_data.channels {self.end_to_end_data.channels} is not data.channels "
                f"{self.data.channels}; set both alike, images are converted"
            )
        for name in self.baselines:
            if name != "end_to_end_only":
                why = {
                    "logit_kd": "the teacher does not know these images",
                    "equal_updates": "an epoch of pairs is none of these images",
                }[name]
                raise ValueError(
                    f"baselines: {name} does not go with end_to_end_data ({why}); end_to_end_only "
                    "does, with epochs of your choice"
                )
        return self

    def data_key(self, stage: str) -> str:
        """Key of the section with the data that a stage or unit of the plan trains on."""
        has_own = self.end_to_end_data is not None
        return "end_to_end_data" if has_own and _trains_student(stage) else "data"

    def data_of(self, stage: str) -> DataConfig:
        """The data that a stage or unit of the plan trains on, and is graded on."""
        data: DataConfig = getattr(self, self.data_key(stage))
        return data


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does; PyYAML's own rule wants 1.0e-3.

    A key that comes twice is an error; PyYAML takes the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.YAMLError(f"the key '{key.value}' comes twice{key.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def builtin_recipes() -> dict[str, str]:
    """Returns the text of every built-in recipe by name."""
    folder = resources.files("m2mkd") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads, overrides and validates a recipe.

    Args:
        name_or_path: A built-in recipe's name, or the path of a YAML file.
        overrides: `key.path=value` strings; values are YAML.

    Raises:
        ConfigError: Unknown recipe, key or value, or a combination that cannot work.
    """
    values = _parse_yaml(_recipe_text(name_or_path), name_or_path)
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {name_or_path} is not a YAML mapping of keys to values")
    for override in overrides:
        _apply_override(values, override)
    return validate(values, source=name_or_path)


def load_data(path: Path, stage: str = "end_to_end") -> DataConfig:
    """Reads the data of a run's recipe; imported networks come with no more than that.

    Args:
        path: The recipe.
        stage: The stage or unit of the plan whose data to read.

    Raises:
        ConfigError: Unreadable, or a data section that cannot work.
    """
    values = _parse_yaml(_recipe_text(str(path)), str(path))
    values = values if isinstance(values, dict) else {}
    if _trains_student(stage) and values.get("end_to_end_data") is not None:
        values["data"] = values["end_to_end_data"]
    return make_data(values, source=str(path))


def make_data(
    values: dict[str, Any], *, source: str, overrides: tuple[str, ...] = ()
) -> DataConfig:
    """Validates the `data` section of plain values; `source` is named in the error.

    Args:
        values: A recipe, of which nothing else is read; overrides are applied to it in place.
        source: What to call it in errors.
        overrides: As for `load_recipe`; they may name nothing but `data.*`.

    Raises:
        ConfigError: An unknown key or value.
    """
    for override in overrides:
        if not override.startswith("data."):
            raise ConfigError(f"--set {override} is not of the form data.key=value")
        _apply_override(values, override)
    try:
        return DataConfig.model_validate(values.get("data"))
    except ValidationError as error:
        items = [{**item, "loc": ("data", *item["loc"])} for item in error.errors()]
        lines = "; ".join(_describe(item) for item in items)
        raise ConfigError(f"recipe {source}: {lines}") from None


def validate(values: dict[str, Any], *, source: str) -> Recipe:
    """Turns plain values into a `Recipe`; `source` is named in the error."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = "; ".join(_describe(item) for item in error.errors())
        raise ConfigError(f"recipe {source}: {lines}") from None


def _trains_student(stage: str) -> bool:
    return stage.startswith(("end_to_end", "baselines"))


def named_for(key: str, message: str) -> str:
    """An error message about keys of `data`, for another section of the same keys."""
    fields = "|".join(DataConfig.model_fields)
    return re.sub(rf"\bdata\.({fields})\b", rf"{key}.\1", message)


def digest(*parts: Any) -> str:
    """Returns a short hash of JSON-able values; equal inputs give equal digests."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _recipe_text(name_or_path: str) -> str:
    builtin = builtin_recipes()
    if name_or_path in builtin:
        return builtin[name_or_path]
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read recipe {path}: {error}") from None
    raise ConfigError(
        f"unknown recipe '{name_or_path}'{did_you_mean(name_or_path, builtin)}"
        f"; built in: {', '.join(builtin)}; or give the path of a .yaml file"
    )


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r} is not of the form key.path=value")
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: '{parent}' is a value, not a section")
        values[parent] = dict(child)  # an alias in YAML is the same object in two places
        values = values[parent]
    values[last] = _parse_yaml(text, f"--set {override}")


def _describe(item: Any) -> str:
    """One pydantic error as `where: what`, with a suggestion for a misspelt key."""
    # pydantic puts the member of a union that it tried into the path.
    path = [part for part in item["loc"] if not str(part).startswith(("list[", "literal["))]
    where = ".".join(str(part) for part in path) or "recipe"
    if item["type"] == "extra_forbidden":
        return f"unknown key '{where}'{did_you_mean(str(path[-1]), _known_keys(path[:-1]))}"
    if item["type"] == "missing":
        return f"'{where}' is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message.replace("a valid tuple", "a list")
    message = re.sub("a valid dictionary( or instance of .*)?", "keys with values", message)
    if item["type"] == "value_error":
        is_data = where == "end_to_end_data"
        return f"{where}: {named_for(where, message) if is_data else message}"
    expected = item.get("ctx", {}).get("expected")
    hint = ""
    if expected and isinstance(item["input"], str):
        hint = did_you_mean(item["input"], re.findall(r"'([^']*)'", expected))
    return f"{where}={item['input']!r}: {message[:1].lower()}{message[1:]}{hint}"


def _known_keys(path: list[Any]) -> list[str]:
    section: Any = Recipe
    for part in path:
        field = section.model_fields.get(part)
        if field is None:
            return []
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next(
            (o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None
        )
        if section is None:
            return []
    return list(section.model_fields)
