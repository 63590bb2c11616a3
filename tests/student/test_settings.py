"""Every setting has a range: odd values are one line before anything is loaded, and the defaults are within it."""

import dataclasses
import json

import pytest

from student.cli import main
from student.recipe import Optim, Run
from student.recipes.registry import RECIPES
from student.settings import TrainOptions, resolve_run
from teachercache.core.errors import UserError
from teachercache.core.ranges import check, from_text, kinds_of

OPTIONS = TrainOptions("data", "caches", "out", None, None, None, None, "", 0, online_teacher=False)
NUMBERS = ("-1", "nan", "inf", "-inf", "1e400", "10**30", "", "x", "[1]", "-" * 100_000, "None")
FREE = ("init", "tokenizer")  # paths, which may be empty
SETTINGS = [
    (name, key, kind)
    for name, recipe in RECIPES.items()
    for group, record in (("", type(recipe.constants)), ("optim.", Optim), ("run.", Run))
    if not group or name == "clip"
    for key, kind in ((f"{group}{field}", kind) for field, kind in kinds_of(record).items())
]


def resolve(recipe: str, *settings: str, **options):
    return resolve_run(RECIPES[recipe], dataclasses.replace(OPTIONS, **options), settings, resume=False)


def is_text(recipe: str, key: str) -> bool:
    return isinstance(value_of(recipe, key), str)


def value_of(recipe: str, key: str):
    group, _, name = key.rpartition(".")
    if group == "run":
        return getattr(Run(data="d", cache="c", out="o"), name)
    return getattr(Optim() if group else RECIPES[recipe].constants, name)


@pytest.mark.parametrize(
    ("recipe", "key", "kind"), SETTINGS, ids=lambda part: part if isinstance(part, str) else ""
)
def test_no_setting_takes_an_odd_value(recipe, key, kind):
    assert check(value_of(recipe, key), kind) == value_of(recipe, key)  # the default is within the range
    refused = NUMBERS if not is_text(recipe, key) else () if key in FREE else ("",)
    for text in refused:
        if (key, text) in (("run.workers", "-1"), ("run.report_to", "")):
            continue
        if key in ("hidden_image", "hidden_text"):
            continue
        with pytest.raises(UserError, match=rf"^--set {key}="):
            resolve(recipe, f"{key}={text}")


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        ("clip", "optim.beta1=1"),
        ("clip", "optim.beta2=2"),
        ("clip", "optim.warmup=5"),
        ("clip", "optim.schedule=step"),
        ("clip", "run.seed=1180591620717411303424"),
        ("clip", "run.workers=999"),
        ("clip", "run.zero=7"),
        ("clip", "run.precision=float23"),
        ("clip", "run.device=cuda:x"),
        ("clip", "run.report_to=wandbb"),
        ("clip", "run.report_to=wandb,wandb"),
        ("clip", "run.eval_task=vcr"),
        ("clip_kd", "mask_ratio=2"),
        ("clip_kd", "mask_ratio=1"),
        ("clip_kd", "ensemble=avrage"),
        ("clip_kd", "hidden_image=3"),
        ("clip_kd", "hidden_text=3:7;5:9"),
        ("clip_td", "select=worst"),
        ("clip_td", "choices=some"),
        ("clip_td", "stage=adopt"),
        ("clip_td", "mode=q2r"),
        ("clip_td", "fusion=sum"),
        ("clip_td", "regime=low"),
        ("clip_td", "regime=low:0"),
        ("clip_td", "regime=full:3"),
        ("clip_td", "num_words=0"),
        ("clip_td", "temperature=0"),
        ("clip_td", "max_text=0"),
        ("sds_clip", "objective=both"),
        ("sds_clip", "train=norms"),
        ("sds_clip", "grad=none"),
        ("sds_clip", "latent_init=one"),
        ("sds_clip", "unet_precision=int8"),
        ("sds_clip", "t_max=0"),
        ("sds_clip", "t_min=1000"),
        ("vlkd", "stage=captions"),
        ("vlkd", "visual=rows"),
        ("vlkd", "mask_share=0"),
        ("vlkd", "data_share=1.5"),
        ("vlkd", "tau=0"),
        ("psd", "schedule=cubic"),
        ("psd", "teacher=me"),
        ("psd", "alpha_end=1.1"),
        ("psd", "teacher_temperature=0"),
    ],
)
def test_a_value_out_of_its_range_is_refused(recipe, setting):
    with pytest.raises(UserError, match=rf"^--set {setting.partition('=')[0]}="):
        resolve(recipe, setting)


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("sds_clip", "t_min=1200 t_max=1500"),  # neither is within the other's default
        ("clip_td", "regime=semi:100"),
        ("clip_kd", "hidden_image=3:7,5:11 mask_ratio=0"),
        ("clip", "run.report_to=tensorboard,wandb run.workers=0 run.device=cuda:1 run.eval_task=zeroshot"),
        ("clip", "run.seed=9223372036854775807 optim.lr=0.0 optim.warmup=1.0"),
    ],
)
def test_values_at_the_edge_of_their_range_are_taken(recipe, text):
    chosen, run = resolve(recipe, *text.split())
    values = {f"run.{key}": value for key, value in dataclasses.asdict(run).items()}
    values |= {f"optim.{key}": value for key, value in dataclasses.asdict(chosen.optim).items()}
    values |= dataclasses.asdict(chosen.constants)
    for setting in text.split():
        key, _, value = setting.partition("=")
        assert str(values[key]) == value or values[key] == float(value)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("seed", -1, "--seed -1: a value of type int from 0 to"),
        ("seed", 2**70, "--seed 1180591620717411303424: "),
        ("data", "", "--data : a value of type str that is not empty"),
        ("cache", "", "--cache : "),
        ("out", "", "--out : "),
        ("report_to", "wandbb", "--report-to wandbb: choose from tensorboard, wandb"),
    ],
)
def test_options_have_the_ranges_of_their_settings(option, value, says):
    with pytest.raises(UserError) as error:
        resolve("clip", **{option: value})
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", str(10**30)],
        ["--steps", "-1"],
        ["--batch-size", "1"],
        ["--micro-batch", "nan"],
        ["--eval-every", "0"],
        ["--seed", "1.5"],
        ["--out", ""],
        ["--out", "a\0b"],
        ["--recipe", ""],
        ["--recipe", "\udc80"],
    ],
)
def test_options_of_train_out_of_their_range_are_one_line(words, capsys):
    assert main(["train", "--recipe", "clip", "--print-config", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("optim.learning_rte", "optim.lr"),
        ("lr", "optim.lr"),
        ("optim.wd", "optim.weight_decay"),
        ("weight-decay", "optim.weight_decay"),
        ("run.num_workers", "run.workers"),
        ("save_every", "run.save_every"),
        ("epochs", "--steps"),
        ("batchsize", "--batch-size"),
        ("run.output_dir", "--out"),
        ("dtype", "run.precision"),
        ("model_name", "model"),
        ("mask_ration", "mask_ratio"),
    ],
)
def test_names_of_other_programs_lead_to_ours(key, meant):
    with pytest.raises(UserError) as error:
        resolve("clip_kd", f"{key}=1")
    assert f"did you mean '{meant}'? choose from" in str(error.value)


def test_the_settings_of_a_run_on_disk_are_values_of_today(finished_run):
    """A run that is resumed compares its run.json with the settings: names, values and types stay."""
    record = json.loads((finished_run / "run.json").read_text())
    for name, kinds in (("run", kinds_of(Run)), ("optim", kinds_of(Optim))):
        saved = record["run"] if name == "run" else record["recipe"]["optim"]
        for key, value in saved.items():
            assert from_text(str(value), kinds[key]) == value
