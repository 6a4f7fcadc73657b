"""`m2mkd import`: published checkpoints in, runs out that other commands accept."""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from m2mkd.cli.main import main
from m2mkd.errors import ConfigError
from m2mkd.models import official
from m2mkd.models.checkpoint import load_model, read_checkpoint
from m2mkd.models.official_config import check_keys

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from golden_files import Golden
from literal_nac import Literal


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def imported(*args: object) -> dict[str, Any]:
    result = run("import", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error_of(*args: object) -> str:
    result = run("import", *args)
    assert result.exit_code == 1, result.output
    return result.stderr


def tensors(golden: Golden, group: str = "state") -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(v) for n, v in golden.group(group).items() if n[:2] != "__"}


@pytest.fixture
def nac_file(tmp_path: Path) -> tuple[Path, Path]:
    """A NAC as its training script leaves it, and the experiment's YAML file."""
    golden = Golden("nac_scale")
    path, config = tmp_path / "checkpoint_best.pt", tmp_path / "nac.yml"
    state = {f"module.{name}": value for name, value in tensors(golden).items()}
    ema = {name: torch.zeros_like(value) for name, value in tensors(golden).items()}
    args = argparse.Namespace(lr=0.1, data="/data")
    torch.save({"model": state, "model_ema": ema, "epoch": 3, "args": args}, path)
    experiment = {
        "model": {"name": "NeuralCompiler", "kwargs": golden.config},
        "data": {
            "dataset": {
                "name": "TINY-IMNET",
                "kwargs": {"data_path": "/PATH/TO/TINY", "input_size": 32},
            }
        },
    }
    config.write_text(yaml.safe_dump(experiment))
    return path, config


def change(config: Path, *path: str, value: object) -> Path:
    values = yaml.safe_load(config.read_text())
    section = values
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    config.write_text(yaml.safe_dump(values))
    return config


def test_an_imported_nac_gives_the_published_logits(nac_file: tuple, tmp_path: Path) -> None:
    path, config = nac_file
    facts = imported(path, "--kind", "nac", "--config", config, "-o", tmp_path / "run")
    golden = Golden("nac_scale")
    assert set(facts["placed"]) == set(tensors(golden)) and facts["fresh"] == []
    model, checkpoint = load_model(tmp_path / "run")
    with torch.no_grad():
        logits = model(golden["in/x"])
    torch.testing.assert_close(logits, golden["out/logits"], atol=2e-5, rtol=0)
    assert checkpoint.card.class_names == [str(i) for i in range(10)]
    assert checkpoint.card.preprocessing["crop_pct"] == 0.875
    data = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"]
    assert (data["dataset"], data["root"]) == ("tiny_imagenet", "/PATH/TO/TINY")
    assert json.loads((tmp_path / "run" / "import.json").read_text())["placed"] == facts["placed"]


def test_the_summary_says_what_is_not_known(nac_file: tuple, tmp_path: Path) -> None:
    path, config = nac_file
    result = run("import", path, "--kind", "nac", "--config", config, "-o", tmp_path / "run")
    assert "tensors of" in result.stdout and "classes are numbered" in result.stdout


def test_the_moving_average_is_taken_when_asked_for(nac_file: tuple, tmp_path: Path) -> None:
    path, config = nac_file
    imported(path, "--kind", "nac", "--config", config, "--ema", "-o", tmp_path / "run")
    model, _ = load_model(tmp_path / "run")
    assert not model.tokenizer.grid.any()


def test_an_imported_network_is_evaluated_on_its_data(tmp_path: Path) -> None:
    """The digits as 32x32 images of one channel, for a NAC of the published layout."""
    config = copy.deepcopy(Golden("nac_scale").config)
    config["input_dim"] = 1
    literal = Literal(config)
    literal.logits(torch.zeros(1, 1, 32, 32))
    torch.save(literal.state, tmp_path / "nac.pth")
    (tmp_path / "nac.yml").write_text(yaml.safe_dump(config))
    args = ["--kind", "nac", "--config", tmp_path / "nac.yml", "--dataset", "digits"]
    facts = imported(tmp_path / "nac.pth", *args, "-o", tmp_path / "run")
    assert facts["class_names_known"]
    result = run("evaluate", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["count"] > 100


def write_folder(root: Path, names: list[str]) -> None:
    for split in ("train", "val"):
        for i, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(root / split / name / "a.png")


def test_numbered_classes_are_those_of_the_data_set_met_later(
    nac_file: tuple, tmp_path: Path
) -> None:
    path, config = nac_file
    args = ["--kind", "nac", "--config", config, "--dataset", "image_folder"]
    imported(path, *args, "-o", tmp_path / "run")
    names = [f"class {i}" for i in range(10)]
    write_folder(tmp_path / "images", names)
    result = run("evaluate", tmp_path / "run", "--root", tmp_path / "images", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["count"] == 10
    imported(path, *args, "--root", tmp_path / "images", "-o", tmp_path / "named")
    assert load_model(tmp_path / "named")[1].card.class_names == names
    write_folder(tmp_path / "fewer", names[:4])
    message = error_of(path, *args, "--root", tmp_path / "fewer", "-o", tmp_path / "other")
    assert "the data set has 4 classes, the network 10" in message


def test_another_image_size_and_other_classes_need_a_choice(
    nac_file: tuple, tmp_path: Path
) -> None:
    path, config = nac_file
    kwargs = ("model", "kwargs")
    change(config, *kwargs, "output_dim", value=7)
    change(
        config,
        *kwargs,
        "input_tokenizer_kwargs",
        "positional_grid_kwargs",
        "grid_size",
        value=[6, 6],
    )
    args = [path, "--kind", "nac", "--config", config, "-o", tmp_path / "run"]
    message = error_of(*args)
    assert "positional_grid.grid has shape [8, 4, 4], not [8, 6, 6]" in message
    assert "choose grid resize or reset" in message and "choose classifier reset" in message
    assert not (tmp_path / "run").exists()
    facts = imported(*args, "--grid", "resize", "--classifier", "reset")
    assert facts["fresh"] == ["pooling.classifier.weight", "pooling.classifier.bias"]
    model, checkpoint = load_model(tmp_path / "run")
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 7)
    assert checkpoint.card.image_size == 48
    result = imported(*args[:-1], tmp_path / "other", "--grid", "reset", "--classifier", "reset")
    assert result["fresh"][0] == "tokenizer.grid"


def test_tensors_without_a_place_are_listed_and_nothing_is_written(
    nac_file: tuple, tmp_path: Path
) -> None:
    path, config = nac_file
    state = {**tensors(Golden("nac_scale")), "criterion.weight": torch.zeros(2)}
    torch.save({"state_dict": state}, path)
    message = error_of(path, "--kind", "nac", "--config", config, "-o", tmp_path / "run")
    assert "no place for criterion.weight" in message
    assert not (tmp_path / "run").exists()


class Harmful:
    """Would run code when unpickled without care."""

    def __reduce__(self) -> tuple:
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.zeros(1)}, "hook": Harmful()}, "as weights alone"),
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3}, "holds no state dict; its keys are epoch"),
    ],
)
def test_files_that_are_not_weights_are_refused(
    content: object, message: str, nac_file: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, config = nac_file
    torch.save(content, path)
    text = error_of(path, "--kind", "nac", "--config", config, "-o", tmp_path / "run")
    assert message in text and "unpickled" not in capsys.readouterr().out


def test_a_run_is_not_overwritten(nac_file: tuple, tmp_path: Path) -> None:
    path, config = nac_file
    args = [path, "--kind", "nac", "--config", config, "-o", tmp_path / "run"]
    imported(*args)
    assert "holds a run already" in error_of(*args)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            ("modle",),
            "config has unknown keys: 'modle'; did you mean 'model'?, 'seed'; known: crit",
        ),
        (
            ("model", "kwargs", "output_dims"),
            "model.kwargs has unknown keys: 'output_dims'; did you",
        ),
    ],
)
def test_keys_that_nobody_would_read_are_listed(
    path: tuple[str, ...], message: str, nac_file: tuple, tmp_path: Path
) -> None:
    checkpoint, config = nac_file
    change(config, *path, value=7)
    if len(path) == 1:
        change(config, "seed", value=3)
    text = error_of(checkpoint, "--kind", "nac", "--config", config, "-o", tmp_path / "run")
    assert f"{config}: " in text and message in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("nac", {"git_rev": "0", "wandb": {"use": True}, "speedrun_meta": {}, "scheduler": None}),
        ("nac", {"state_dim": 32, "student_type": "tinyimnet", "student_state_dict_dir": "x"}),
        ("nac_readin", {"share_kwargs": {}, "readin": {}, "mediator": {}, "readout": {}}),
        ("vit", {"model": "vit_large_patch16_224", "drop_path_rate": 0.1, "mistake": None}),
    ],
)
def test_keys_of_published_files_are_known(kind: str, values: dict[str, Any]) -> None:
    check_keys(kind, values)
    with pytest.raises(ConfigError, match="unknown keys: 'mistake'"):
        check_keys(kind, {**values, "mistake": 1})


def test_a_missing_moving_average_is_an_error(nac_file: tuple, tmp_path: Path) -> None:
    path, config = nac_file
    torch.save({"model": tensors(Golden("nac_scale"))}, path)
    args = [path, "--kind", "nac", "--config", config, "--ema", "-o", tmp_path / "run"]
    assert "holds no moving average" in error_of(*args)


def student_yaml(depth_config: dict[str, Any]) -> dict[str, Any]:
    """The published students' file, with the sizes of the golden NAC."""
    graph = depth_config["latent_graph_kwargs"]
    head = {"num_heads": 2, "head_dim": 16, "path_drop_prob": 0.0}
    return {
        "share_kwargs": {
            "state_dim": 32,
            "code_dim": 32,
            "layer_scale_initial_value": 0.1,
            "use_geglu": True,
            "qkv_bias_in_attention": False,
            "ffn_capacity_factor": 2.0,
            "mod_fc_kwargs": graph["mod_fc_kwargs"],
        },
        "mediator": {**head, "latent_attention_kwargs": {"share_layernorm": True}},
        "readin": {
            **head,
            "input_dim": 3,
            "tokenizer_kwargs": depth_config["input_tokenizer_kwargs"],
            "tokenizer_type": "ConvNeXtImageTokenizer",
            "include_residual_in_read_in_attention": True,
        },
        "readout": {
            **head,
            "include_residual_in_latent_attention": False,
            "pre_output_layernorm": False,
            "output_dim": 10,
            "use_head": False,
            "tokenizer_kwargs": {"softmax_type": "gumbel"},
            "tokenizer_type": "OutputLatentPooling",
        },
    }


@pytest.fixture
def students(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of published students, and their YAML file."""
    golden = Golden("nac_from_students")
    folder, config = tmp_path / "students", tmp_path / "students.yml"
    folder.mkdir()
    for name in ("ReadInStudent", "MediatorStudent_1", "MediatorStudent_2", "ReadOutStudent"):
        state = tensors(golden, f"student/{name}")
        torch.save({"model": state, "model_stages": [], "epoch": 1}, folder / f"{name}.pth")
    config.write_text(yaml.safe_dump(student_yaml(Golden("nac_scale").config)))
    return folder, config


def test_published_students_become_a_nac(students: tuple, nac_file: tuple, tmp_path: Path) -> None:
    args = [students[0], "--kind", "nac_students", "--config", nac_file[1]]
    args += ["--student-config", students[1]]
    facts = imported(*args, "-o", tmp_path / "run")
    stored = Golden("nac_from_students").arrays
    assert facts["num_placed"] == len(stored["imagenet/loaded"])
    assert len(facts["dropped"]) == len(stored["imagenet/student_tensors_not_used"])
    assert len(facts["fresh"]) == len(stored["imagenet/nac_tensors_left_at_init"])
    tiny = ["--grid", "reset", "--classifier", "reset"]
    facts = imported(*args, *tiny, "-o", tmp_path / "tiny")
    assert facts["num_placed"] == len(stored["tinynet/loaded"])
    model, _ = load_model(tmp_path / "tiny")
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()
    (students[0] / "MediatorStudent_2.pth").unlink()
    message = error_of(*args, "-o", tmp_path / "more")
    assert "lacks MediatorStudent_2.pth; a NAC of 2 propagators has 4 students" in message


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("nac_readin", "ReadInStudent"),
        ("nac_mediator", "MediatorStudent_1"),
        ("nac_readout", "ReadOutStudent"),
    ],
)
def test_one_student_becomes_a_checkpoint(
    kind: str, name: str, students: tuple, tmp_path: Path
) -> None:
    args = [students[0] / f"{name}.pth", "--kind", kind, "--config", students[1]]
    facts = imported(*args, "-o", tmp_path / "module")
    checkpoint = read_checkpoint(tmp_path / "module" / "step_000000")
    assert set(facts["placed"].values()) == set(checkpoint.weights)
    again = official.load(
        kind,
        tensors(Golden("nac_from_students"), f"student/{name}"),
        yaml.safe_load(students[1].read_text()),
    )
    again.load_state_dict(checkpoint.weights)


def test_a_teacher_in_stages_gives_the_published_logits(tmp_path: Path) -> None:
    golden = Golden("vit_teacher_2_2")
    state = tensors(golden)
    model = official.load("vit", state, golden.config)
    stages = [stage.state_dict() for stage in _split(model, golden.config["divided_depths"])]
    torch.save({"model_stages": stages}, tmp_path / "teacher.pth")
    config = {"num_heads": golden.config["num_heads"], "divided_depths": [2, 2]}
    (tmp_path / "teacher.yml").write_text(yaml.safe_dump(config))
    args = [tmp_path / "teacher.pth", "--kind", "vit", "--config", tmp_path / "teacher.yml"]
    imported(*args, "-o", tmp_path / "run")
    model, checkpoint = load_model(tmp_path / "run")
    with torch.no_grad():
        logits = model(golden["in/x"])
    torch.testing.assert_close(logits, golden["out/logits"], atol=2e-5, rtol=0)
    assert checkpoint.card.depths == [2, 2] and checkpoint.card.model == "vit_incubated"


def _split(model: torch.nn.Module, depths: list[int]) -> list[torch.nn.Module]:
    from m2mkd.models import split_vit

    return list(split_vit(model, depths))


def test_a_vmoe_gives_the_published_logits_and_can_be_resized(tmp_path: Path) -> None:
    golden = Golden("vmoe")
    torch.save({"model": tensors(golden)}, tmp_path / "vmoe.pth")
    config = {"num_heads": golden.config["num_heads"]}
    (tmp_path / "vmoe.yml").write_text(yaml.safe_dump(config))
    args = [tmp_path / "vmoe.pth", "--kind", "vmoe", "--config", tmp_path / "vmoe.yml"]
    imported(*args, "-o", tmp_path / "run")
    model, _ = load_model(tmp_path / "run")
    with torch.no_grad():
        logits = model(golden["in/x"])
    torch.testing.assert_close(logits, golden["out/logits"], atol=2e-5, rtol=0)
    change(tmp_path / "vmoe.yml", "img_size", value=48)
    assert "choose grid resize or reset" in error_of(*args, "-o", tmp_path / "large")
    imported(*args, "-o", tmp_path / "large", "--grid", "resize")
    model, checkpoint = load_model(tmp_path / "large")
    assert checkpoint.card.image_size == 48 and model(torch.zeros(1, 3, 48, 48)).shape == (1, 10)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kind", "nac_students"], "--student-config goes with"),
        (["--kind", "nac", "--set", "batch=3"], "data.key=value"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    args: list[str], message: str, nac_file: tuple, tmp_path: Path
) -> None:
    result = run("import", nac_file[0], *args, "--config", nac_file[1], "-o", tmp_path / "run")
    assert result.exit_code in (1, 2) and message in result.stderr
