"""Recipes: every mistake is one line that says where it is and, where spelling is to blame, what
was meant.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from m2mkd.errors import ConfigError
from m2mkd.recipe import Recipe, builtin_recipes, digest, load_recipe, validate

SMALL = """
name: small
data: {dataset: digits, image_size: 8, channels: 1}
meta: {epochs: 1, lr: 0.001}
teacher: {model: vit_tiny_patch16_224, finetune: {epochs: 1, lr: 0.001}}
student: {model: vmoe_tiny_patch16_224}
distill: {schedule: {epochs: 1, lr: 0.001}}
end_to_end: {epochs: 1, lr: 0.001}
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    """Path of a recipe with nothing but what is required."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def mistake(recipe: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- built-in recipes


def test_built_in_recipes_are_named_after_their_files() -> None:
    recipes = builtin_recipes()
    assert "quickstart" in recipes
    assert list(recipes) == sorted(recipes)


def test_an_unknown_recipe_gets_a_suggestion_and_the_list() -> None:
    message = mistake("quickstrat")
    assert "unknown recipe 'quickstrat'; did you mean 'quickstart'?" in message
    assert "built in: " in message and "path of a .yaml file" in message


def test_a_built_in_name_wins_over_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quickstart").write_text("name: mine")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").name == "quickstart"


# --- files


def test_a_file_is_read_with_defaults_filled_in(small: str) -> None:
    recipe = load_recipe(small)
    assert (recipe.name, recipe.seed, recipe.precision) == ("small", 0, "fp32")
    assert recipe.data.normalisation == ((0.5,), (0.5,))
    assert recipe.distill.alpha == 0.5 and recipe.baselines == []
    assert not recipe.data.augment.mixes_images and not recipe.teacher.is_given


def test_a_file_needs_no_yaml_ending(tmp_path: Path) -> None:
    path = tmp_path / "recipe.txt"
    path.write_text(SMALL)
    assert load_recipe(str(path)).name == "small"


def test_a_file_may_hold_any_language(tmp_path: Path) -> None:
    path = tmp_path / "accents.yaml"
    path.write_bytes(f"# Größe, 大きさ\n{SMALL}".encode())
    assert load_recipe(str(path)).name == "small"


def test_a_missing_file_is_reported_by_path(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    assert f"cannot read recipe {path}" in mistake(str(path))


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert f"cannot read recipe {folder}" in mistake(str(folder))


def test_a_binary_file_is_not_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert f"cannot read recipe {path}" in mistake(str(path))


@pytest.mark.parametrize(
    "text",
    ["data: [1, 2", "a: b: c", "\tname: x", "name: 'x", "--- 1\n--- 2\n", "name: 2024-13-01"],
    ids=["open list", "two colons", "tab", "open quote", "two documents", "impossible date"],
)
def test_broken_yaml_is_reported_by_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert f"{path} is not valid YAML: " in mistake(str(path))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "3"])
def test_yaml_that_is_no_mapping_is_reported(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    assert "is not a YAML mapping of keys to values" in mistake(str(path))


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(f"name: !!python/object/apply:pathlib.Path.touch [{tmp_path}/ran]")
    assert "is not valid YAML" in mistake(str(path))


# --- single mistakes


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("data.datset=digits", "unknown key 'data.datset'; did you mean 'dataset'?"),
        ("data.augment.mxup=0.2", "unknown key 'data.augment.mxup'; did you mean 'mixup'?"),
        (
            "teacher.finetune.optimiser=sgd",
            "unknown key 'teacher.finetune.optimiser'; did you mean 'optimizer'?",
        ),
        ("distill.schedule.epoch=3", "did you mean 'epochs'?"),
        ("logit_kd.temprature=3", "did you mean 'temperature'?"),
    ],
)
def test_a_misspelt_key_gets_a_suggestion(small: str, override: str, expected: str) -> None:
    assert expected in mistake(small, override)


def test_a_key_unlike_all_others_gets_no_suggestion(small: str) -> None:
    message = mistake(small, "zzzzzz=1")
    assert "unknown key 'zzzzzz'" in message and "did you mean" not in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.dataset=digit", "did you mean 'digits'?"),
        ("data.dataset=fashon_mnist", "did you mean 'fashion_mnist'?"),
        ("data.dataset=image_foldr", "did you mean 'image_folder'?"),
        ("data.interpolation=bicubik", "did you mean 'bicubic'?"),
        ("data.on_bad_image=skipp", "did you mean 'skip'?"),
        ("precision=fp23", "precision='fp23': input should be 'fp32', 'bf16' or 'fp16'"),
        ("distill.mode=seperate", "did you mean 'separate'?"),
        ("distill.kd=sfot", "did you mean 'soft'?"),
        ("distill.stitch=norm_liner", "did you mean 'norm_linear'?"),
        ("distill.assembly=fodl", "did you mean 'fold'?"),
        ("baselines=[end_to_end]", "baselines.0='end_to_end'"),
        ("baselines=[logit_kdd]", "did you mean 'logit_kd'?"),
        ("teacher.depths=atuo", "did you mean 'auto'?"),
    ],
)
def test_a_misspelt_choice_gets_a_suggestion(small: str, override: str, expected: str) -> None:
    assert expected in mistake(small, override)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("seed=one", "seed='one'"),
        ("seed=-1", "seed=-1"),
        ("name=a b", "name='a b'"),
        ("threads=0", "threads=0"),
        ("checkpoint_every=0", "checkpoint_every=0"),
        ("data=3", "data=3"),
        ("data.channels=2", "data.channels=2"),
        ("data.image_size=0", "data.image_size=0"),
        ("data.batch_size=1.5", "data.batch_size=1.5"),
        ("data.eval_batch_size=0", "data.eval_batch_size=0"),
        ("data.train_limit=0", "data.train_limit=0"),
        ("data.workers=-1", "data.workers=-1"),
        ("data.crop_pct=0", "data.crop_pct=0"),
        ("data.crop_pct=1.1", "data.crop_pct=1.1"),
        ("data.augment.hflip=1.5", "data.augment.hflip=1.5"),
        ("data.augment.crop_scale=0.5", "data.augment.crop_scale=0.5"),
        ("data.augment.mixup=-1", "data.augment.mixup=-1"),
        ("data.augment.label_smoothing=1", "data.augment.label_smoothing=1"),
        ("meta.epochs=-1", "meta.epochs=-1"),
        ("meta.lr=0", "meta.lr=0"),
        ("meta.clip_grad=0", "meta.clip_grad=0"),
        ("meta.drop_path=1", "meta.drop_path=1"),
        ("teacher.depths=[2,0]", "teacher.depths.1=0"),
        ("teacher.depths=2", "teacher.depths=2"),
        ("student.model=3", "student.model=3"),
        ("distill.alpha=1.5", "distill.alpha=1.5"),
        ("distill.temperature=0", "distill.temperature=0"),
        ("distill.boundary_weight=-1", "distill.boundary_weight=-1"),
    ],
)
def test_a_wrong_value_is_shown_with_its_key(small: str, override: str, where: str) -> None:
    assert f"recipe {small}: {where}: " in mistake(small, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.dataset=image_folder"], "dataset image_folder needs a folder; set data.root"),
        (["data.dataset=fashion_mnist"], "dataset fashion_mnist needs a folder; set data.root"),
        (["data.mean=[0.1, 0.2]"], "mean has 2 values for 1 channel(s)"),
        (["data.channels=3", "data.std=[0.5]"], "std has 1 values for 3 channel(s)"),
        (["meta.warmup_epochs=1"], "leaves nothing of epochs 1"),
        (["teacher.finetune=null"], "a fresh teacher must be trained"),
        (["teacher.pretrained=true", "teacher.checkpoint=x.pth"], "both name weights; keep one"),
        (
            ["teacher.pretrained=true", "teacher.incubate={epochs: 1, lr: 1.0}"],
            "leave it out for given weights",
        ),
        (["teacher.model_args.img_size=8"], "img_size does not belong here: set data.image_size"),
        (["student.model_args.num_classes=8"], "does not belong here: the data set decides it"),
        (["distill.assembly=fold"], "but stitch is norm_linear; set stitch: linear"),
    ],
)
def test_a_combination_that_cannot_work_says_why(
    small: str, overrides: list[str], expected: str
) -> None:
    assert expected in mistake(small, *overrides)


@pytest.mark.parametrize("section", ["name", "data", "meta", "teacher", "student", "distill"])
def test_a_missing_section_is_named(section: str) -> None:
    values: dict[str, Any] = yaml.safe_load(SMALL)
    del values[section]
    with pytest.raises(ConfigError, match=f"^recipe here: '{section}' is missing$"):
        validate(values, source="here")


def test_all_mistakes_are_reported_together(small: str) -> None:
    message = mistake(small, "sed=1", "meta.lr=0", "data.channels=2")
    assert "'sed'" in message and "meta.lr=0" in message and "data.channels=2" in message


# --- overrides


def test_overrides_change_values_of_every_kind(small: str) -> None:
    recipe = load_recipe(
        small,
        (
            "seed=7",
            "meta.lr=1e-4",
            "data.augment.crop_scale=[0.5, 1.0]",
            "teacher.model_args={depth: 2}",
            "student.model_args.num_experts=8",
            "teacher.depths=[1, 1]",
            "data.root=/data=set",
            "baselines=[logit_kd]",
            "distill.schedule.clip_grad=null",
        ),
    )
    assert recipe.seed == 7 and recipe.meta.lr == 1e-4
    assert recipe.data.augment.crop_scale == (0.5, 1.0)
    assert recipe.teacher.model_args == {"depth": 2}
    assert recipe.student.model_args == {"num_experts": 8}
    assert recipe.teacher.depths == [1, 1]
    assert recipe.data.root == Path("/data=set")
    assert recipe.baselines == ["logit_kd"] and recipe.distill.schedule.clip_grad is None


def test_an_override_leaves_what_shares_an_alias_alone(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    schedule = "{epochs: 1, lr: 0.001}"
    text = SMALL.replace(f"end_to_end: {schedule}", "end_to_end: *all")
    path.write_text(text.replace(f"meta: {schedule}", f"meta: &all {schedule}"))
    recipe = load_recipe(str(path), ("end_to_end.epochs=77",))
    assert (recipe.end_to_end.epochs, recipe.meta.epochs) == (77, 1)


def test_the_last_of_two_overrides_counts(small: str) -> None:
    assert load_recipe(small, ("seed=1", "seed=2")).seed == 2


@pytest.mark.parametrize("override", ["seed", "=3", " =3", "a.b", ""])
def test_an_override_without_key_or_value_is_reported(small: str, override: str) -> None:
    assert f"--set {override!r} is not of the form key.path=value" in mistake(small, override)


def test_an_override_below_a_plain_value_is_reported(small: str) -> None:
    assert "--set name.x=3: 'name' is a value, not a section" in mistake(small, "name.x=3")


@pytest.mark.parametrize("override", ["meta=[", "seed=1: 2: 3", "name=2024-13-01"])
def test_an_override_that_is_no_yaml_is_reported(small: str, override: str) -> None:
    assert f"--set {override} is not valid YAML" in mistake(small, override)


def test_a_key_that_comes_twice_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(SMALL + "meta: {epochs: 3, lr: 1.0}\n")
    assert "the key 'meta' comes twice" in mistake(str(path))


def test_a_name_is_no_way_out_of_the_folder_of_runs(small: str) -> None:
    assert "name='..': string should match pattern" in mistake(small, "name=..")


def test_kinds_of_values_are_named_in_words(small: str) -> None:
    message = mistake(small, "tracking=tensorboard", "meta=3")
    assert "tracking='tensorboard': input should be a list" in message
    assert "meta=3: input should be keys with values" in message


# --- the validated recipe


def test_a_recipe_survives_a_round_trip_through_yaml(small: str) -> None:
    recipe = load_recipe(small, ("data.augment.crop_scale=[0.5, 1.0]",))
    text = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert validate(yaml.safe_load(text), source="dump") == recipe


def test_digests_tell_recipes_apart_and_ignore_the_order_of_keys(small: str) -> None:
    values = load_recipe(small).model_dump(mode="json")
    same = dict(reversed(values.items()))
    other = load_recipe(small, ("seed=1",)).model_dump(mode="json")
    assert digest(values) == digest(same) != digest(other)
    assert digest("a", "b") != digest("b", "a")


def test_the_json_schema_describes_every_section() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
