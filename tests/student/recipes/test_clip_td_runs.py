"""Whole runs of clip_td on a small VCR, SNLI-VE and VQA set: resume, micro-batches, stages, regimes, faces, answers."""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import own_recipes
import pytest
import torch
import zarr
from safetensors.torch import load_file
from small import TINY_CFG, build_cache, contained, read_lines, save_teacher

from student.cli import main
from student.inference.answerer import load_task_model
from student.inputs.clip_logits import ClipScorer, find_anchors
from student.inputs.questions import read_question
from student.recipe import Progress, Run
from student.recipes.clip_td import CLIP_TD
from student.settings import override
from student.training.prepare import prepare
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest
from tests.student.inputs.test_tasks import write_vqa

CFG = TINY_CFG | {"text_cfg": TINY_CFG["text_cfg"] | {"context_length": 32}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sets of 24 drawn scenes, easy questions as VQA, their caches of a tiny CLIP and of regions."""
    from scripts.datasets import scene_vcr_snli_ve as prepare_scene_tasks
    from teachercache.cli import main as tc

    home = tmp_path_factory.mktemp("home")
    prepare_scene_tasks.write_tasks(home / "scenes", 24, seed=3, size=48, test=0.25)
    write_vqa(home / "vqa", [["red"] * 10, ["blue"] * 6 + ["red"] * 4] * 6)
    teacher = save_teacher(home / "clip", CFG)
    for name, data in data_of(home).items():
        build_cache(
            data,
            teacher,
            home / "caches" / name / "clip.zarr",
            outputs=("embeddings", "tokens", "random_tokens"),
        )
        words = [
            "build",
            "--teacher",
            "regions-lite",
            "--outputs",
            "regions:3",
            "--data",
            data,
            "--workers",
            0,
            "--out",
            home / "caches" / name / "regions.zarr",
            "--device",
            "cpu",
        ]
        assert tc([str(word) for word in words]) == 0
    return home


def unit(rows):
    """Rows of length 1, float32."""
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def data_of(home: Path) -> dict[str, Path]:
    return {"vcr": home / "scenes" / "vcr1", "snli_ve": home / "scenes" / "snli_ve", "vqa": home / "vqa"}


def train(home: Path, out: Path, *words: object, task: str = "vcr", recipe: str = "clip_td") -> int:
    """`student train` on one of the sets in this process."""
    start = [
        "train",
        "--recipe",
        recipe,
        "--data",
        data_of(home)[task],
        "--cache",
        home / "caches" / task,
        "--out",
        out,
        "--batch-size",
        8,
        "--steps",
        4,
        "--set",
        "model=uniter-micro",
        "--set",
        "run.workers=0",
    ]
    with contained():
        return main([str(word) for word in (*start, *words)])


def sets(**settings: object) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def prepared(home: Path, task: str = "vcr", *settings: str):
    """What a run is made of, without training."""
    run = Run(str(data_of(home)[task]), str(home / "caches" / task), "", device="cpu", workers=0)
    recipe, run = override(
        dataclasses.replace(CLIP_TD, batch=8, steps=4), run, ["model=uniter-micro", *settings]
    )
    with contained():
        return prepare(recipe, run)


def places_of(cache: store.Cache) -> dict[str, int]:
    """Key -> row, by zarr alone."""
    return {str(key): row for row, key in enumerate(zarr.open(str(cache.path))["key"][:])}


# ----------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("select", ["best", "random"])
def test_a_batch_holds_what_the_caches_say_of_its_rows(home, select):
    """Every field against the cache looked up by key, place and word; selected sub-words spell the word."""
    found = prepared(home, "vcr", f"select={select}")
    batches, cache = found.batches, store.open_cache(home / "caches" / "vcr" / "clip.zarr")
    fields = {name: store.read_field(cache, name) for name in cache.fields}
    at = places_of(cache)
    batch, rows = batches[1], batches.order.rows_of(1)
    kind, checked = ("word", 0) if select == "best" else ("random", 0)
    for i, row in enumerate(rows.tolist()):
        sample = batches.manifest.row(row)
        columns, here = json.loads(sample.task), at[sample.key]
        np.testing.assert_array_equal(batch["image_emb"][i].half().numpy(), fields["image_emb"][here])
        assert batch["target"][i].argmax() == columns["label"]
        for c in range(4):
            place = columns["texts"].index("pair") + c
            np.testing.assert_array_equal(
                batch["text_emb"][i, c].half().numpy(), fields["text_emb"][here, place]
            )
            cosines = unit(fields["image_emb"][here]) @ unit(fields["text_emb"][here, 1 + c])
            scale = np.exp(cache.meta.spec.constants["logit_scale"])
            assert float(batch["clip_logits"][i, c]) == pytest.approx(
                float(scale * cosines), rel=1e-3, abs=1e-3
            )
            for k in range(2):
                index = int(fields[f"{kind}_index"][here, place, k])
                start, end = fields["word_span"][here, place, index]
                pieces = [
                    batches.reader.tokenizer.id_to_token(int(one))
                    for one in batch["text"][i, c][batch["word_tokens"][i, c, k]]
                ]
                assert (
                    "".join(piece.removeprefix("##") for piece in pieces)
                    == sample.texts[place][start:end].lower()
                )
                feature = fields[f"{kind}_feature"][here, place, k]
                np.testing.assert_array_equal(batch["word_feature"][i, c, k].half().numpy(), feature)
                checked += 1
    assert checked == 64


@pytest.mark.parametrize("settings", [("mode=qa2r",), ("stage=adapt",), ("stage=adapt", "regime=semi:1")])
def test_sub_words_know_the_region_of_the_object_that_they_name(home, settings):
    """Sub-words with a region are the objects' names in the order of VCR's own line, question before choice."""
    batches, checked = prepared(home, "vcr", *settings).batches, 0
    batches.mask = lambda ids, attention_mask, random: (np.zeros(1, np.int64), np.zeros(1, np.int64))
    text = (data_of(home)["vcr"] / "train.jsonl").read_text()
    lines = {line["annot_id"]: line for line in map(json.loads, text.splitlines())}
    for step in range(4):
        batch = batches[step]
        for i, row in enumerate(batches.order.rows_of(step).tolist()):
            line = lines[batches.manifest.row(row).key.split("/")[-1]]
            right = line["answer_choices"][line["answer_label"]]
            for c in range(batch["text"].shape[1]):
                if settings[0] == "stage=adapt":
                    tokens = line["question"] + (right if batches.order.labeled[row] else [])
                else:
                    tokens = line["question"] + right + line["rationale_choices"][c]
                places = [place for token in tokens if isinstance(token, list) for place in token]
                region = batch["text_region"][i, c]
                assert (region[region > 0] - 1).tolist() == places
                named = [
                    batches.reader.tokenizer.id_to_token(int(one)) for one in batch["text"][i, c][region > 0]
                ]
                assert named == [line["objects"][place] for place in places]
                checked += len(named)
    assert checked > 20


def test_labels_of_rows_outside_the_subset_are_hidden_and_half_of_a_batch_has_some(home, tmp_path):
    found = prepared(home, "vcr", "regime=semi:2").batches
    chosen = np.flatnonzero(found.order.labeled)
    groups = Counter(read_question(found.task, found.manifest.row(row)).group for row in chosen.tolist())
    assert max(groups.values()) == 2
    for step in range(3):
        batch, rows = found[step], found.order.rows_of(step)
        assert (
            batch["labeled"].tolist()
            == [float(row in set(chosen.tolist())) for row in rows]
            == [1.0, 0.0] * 4
        )
        assert (batch["target"].sum(1) == batch["labeled"]).all()
    low = prepared(home, "vcr", "regime=low:2").batches
    assert set(low.rows.tolist()) == set(chosen.tolist())
    assert prepared(home, "vcr", "regime=zero").batches[0]["labeled"].sum() == 0


def test_adaptive_batches_mask_words_and_swap_pictures(home):
    batches = prepared(home, "vcr", "stage=adapt").batches
    mask = batches.reader.tokenizer.token_to_id("[MASK]")
    matched = masked = kept = 0
    regions = store.open_cache(home / "caches" / "vcr" / "regions.zarr")
    feature = store.read_field(regions, "region_feature")
    at = places_of(regions)
    for step in range(4):
        batch, again, rows = batches[step], batches[step], batches.order.rows_of(step)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        for i, row in enumerate(rows.tolist()):
            sample = batches.manifest.row(row)
            columns = json.loads(sample.task)
            own = torch.tensor(np.array(feature[at[sample.key], 0])).float()
            assert bool(batch["matched"][i]) == torch.equal(batch["region_feature"][i, 0], own)
            matched += int(batch["matched"][i])
            right = f"{columns['question']} {columns['choices'][columns['label']]}"
            ids = batch["text"][i, 0].clone()
            slots = [k for k in range(len(batch["masked_word"][i])) if batch["masked_word"][i, k] >= 0]
            for k in slots:
                place, word = int(batch["masked_place"][i, k]), int(batch["masked_word"][i, k])
                masked, kept = masked + int(ids[place] == mask), kept + int(ids[place] == word)
                ids[place] = word
            assert slots
            assert batches.reader.tokenizer.decode(ids.tolist()).replace(" ", "") == right.lower().replace(
                " ", ""
            )
    assert 8 <= matched <= 24  # of 32
    assert masked > 5 * max(kept, 1) / 2


@pytest.mark.parametrize("setting", ["regime=full", "regime=semi:2", "stage=adapt"])
def test_gradients_of_two_ranks_are_those_of_one(home, setting):
    """Each rank's loss over its rows, gradients averaged as DeepSpeed does, against one process with all rows."""
    found = prepared(home, "vcr", setting)
    plan = found.batches.plan
    whole, step = found.batches[1], found.step.eval()  # without dropout, which differs between ranks
    halves = []
    for rank in (0, 1):
        found.batches.plan = dataclasses.replace(plan, rank=rank, world=2)
        halves.append(found.batches[1])
    assert torch.equal(torch.cat([half["image_emb"] for half in halves]), whole["image_emb"])
    names, parameters = zip(*[(n, p) for n, p in step.named_parameters() if p.requires_grad], strict=True)

    def gradient(batch):
        loss, _, _ = step(batch, Progress(0, 4))
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    one, two = gradient(whole), [sum(pair) / 2 for pair in zip(*map(gradient, halves), strict=True)]
    for name, a, b in zip(names, one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)
    assert sum(bool(a.abs().max() > 1e-6) for a in one) > len(one) / 2


@pytest.mark.parametrize("task", ["snli_ve", "vqa"])
def test_clip_itself_scores_the_answers_of_snli_ve_and_vqa(home, task):
    batches = prepared(home, task).batches
    scorer, rows = batches.score.__self__, batches.order.rows_of(0)
    batch = batches[0]
    assert isinstance(scorer, ClipScorer)
    source = scorer.source
    for i, row in enumerate(rows.tolist()):
        at = source.at[row]
        image, scale = unit(source.fields["image_emb"][at]), scorer.scale
        if task == "snli_ve":
            near = float(image @ unit(source.fields["text_emb"][at, 0]))
            low, middle, high = scorer.anchors
            expected = [-scale * abs(near - anchor) for anchor in (high, middle, low)]
        else:
            words = {batches.manifest.row(other).texts[1]: other for other in batches.rows.tolist()}
            expected = [
                scale * float(image @ unit(source.fields["text_emb"][source.at[words[answer]], 1]))
                for answer in batches.task.answers
            ]
        assert batch["clip_logits"][i].tolist() == pytest.approx(expected, rel=1e-3, abs=2e-2)
    assert find_anchors(np.array([0.0, 0.1, 1.0, 1.1, 5.0])) == pytest.approx([0.05, 1.05, 5.0])
    with pytest.raises(UserError, match="too few or too alike"):
        find_anchors(np.array([0.0, 1.0, 1.0]))


# ----------------------------------------------------------------------------------------------------
# Runs


def test_a_run_answers_and_is_resumed_to_the_same_losses(home, tmp_path, monkeypatch, capsys):
    assert train(home, tmp_path / "whole", recipe="own_recipes:TD_STOPPING") == 0
    monkeypatch.setenv(own_recipes.STOP_VARIABLE, "1")
    assert train(home, tmp_path / "run", recipe="own_recipes:TD_STOPPING") == 143
    monkeypatch.delenv(own_recipes.STOP_VARIABLE)
    assert train(home, tmp_path / "run", "--resume", recipe="own_recipes:TD_STOPPING") == 0
    assert read_lines(tmp_path / "run") == read_lines(tmp_path / "whole")
    line = read_lines(tmp_path / "run")[0]
    assert {"task", "dv", "dt", "words", "distilled", "right"} <= set(line)
    labelled = (tmp_path / "run" / "labelled.txt").read_text().splitlines()
    assert len(labelled) == len(read_manifest(str(data_of(home)["vcr"])).rows_of_split("train"))
    monkeypatch.chdir(home)  # caches/vcr1 is not there: --data names the folder of its caches
    (home / "caches" / "vcr1").symlink_to(home / "caches" / "vcr")
    capsys.readouterr()
    assert (
        main(["eval", str(tmp_path / "run"), "--task", "vcr", "--data", str(data_of(home)["vcr"]), "--json"])
        == 0
    )
    metrics = json.loads(capsys.readouterr().out)["results"][0]["metrics"]
    manifest = read_manifest(str(data_of(home)["vcr"]))
    rows = manifest.rows_of_split("val")
    scores = load_task_model(tmp_path / "run", device="cpu").score(manifest, rows, "q2a")
    labels = [json.loads(manifest.row(row).task)["label"] for row in rows.tolist()]
    assert metrics["q2a"] == pytest.approx(np.mean(scores.argmax(1) == labels))
    assert str(metrics["qa2r"]).startswith("skipped")


def test_micro_batches_and_two_halves_have_the_whole_batchs_losses(home, tmp_path):
    """Dropout is replayed; losses are means over rows, so parts of a batch average to it."""
    assert train(home, tmp_path / "whole", "--micro-batch", 8) == 0
    assert train(home, tmp_path / "micro", "--micro-batch", 4, *sets(**{"run.seed": 0})) == 0
    first, second = read_lines(tmp_path / "whole")[0], read_lines(tmp_path / "micro")[0]
    assert second["lr"] == first["lr"]
    still = own_recipes.TD_STILL
    for name, words in (("a", ()), ("b", ("--micro-batch", 4)), ("c", ("--micro-batch", 2))):
        assert train(home, tmp_path / name, *words, recipe="own_recipes:TD_STILL") == 0
    assert still.constants.model == "uniter-micro"
    for name in ("b", "c"):
        for a, b in zip(read_lines(tmp_path / "a"), read_lines(tmp_path / name), strict=True):
            for key, value in a.items():
                assert b[key] == pytest.approx(value, rel=2e-4, abs=1e-5), key


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "vl-bert-micro", "select": "random"},
        {"model": "villa-micro", "adv_steps": 2, "adv_lr": 1.0},
        {"model": "clip-1-linear", "distill_weight": 0.0},
        {"model": "clip-3-linear", "fusion": "cosine"},
        {"model": "clip-transformer"},
        {"mode": "qa2r"},
        {"choices": "correct", "confidence": "false"},
        {"run.zero": 2},
    ],
)
def test_faces_baselines_and_switches_train(home, tmp_path, settings):
    assert train(home, tmp_path / "run", *sets(**settings)) == 0
    lines = read_lines(tmp_path / "run")
    assert len(lines) == 4
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert ("adv" in lines[0]) == ("villa" in settings.get("model", ""))
    state = load_file(tmp_path / "run" / "model.safetensors")
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert state
    assert made["questions"]["task"]["which"] == settings.get("mode", "q2a")
    assert not any("words" in name or "heads" in name for name in state)


def test_the_best_student_so_far_is_a_run_that_answers(home, tmp_path):
    assert train(home, tmp_path / "run", "--eval-every", 2) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    manifest = read_manifest(str(data_of(home)["vcr"]))
    rows = manifest.rows_of_split("val")
    model = load_task_model(tmp_path / "run" / "best", device="cpu", cache=str(home / "caches" / "vcr"))
    labels = [json.loads(manifest.row(row).task)["label"] for row in rows.tolist()]
    best = max(line["q2a"] for line in lines)
    assert np.mean(model.score(manifest, rows, "q2a").argmax(1) == labels) == pytest.approx(best)


def test_a_student_without_pictures_splits_vcr_by_what_words_tell(home, tmp_path, monkeypatch):
    from evaluation.studies.vcr_mitigation import implicit_parts
    from scripts.datasets import mitigate_vcr
    from scripts.papers import attention as show_attention
    from teachercache.data.readers.questions import json_lines

    assert train(home, tmp_path / "run", *sets(model="bert-micro", distill_weight=0.0)) == 0
    source = data_of(home)["vcr"] / "val.jsonl"
    scores = mitigate_vcr.scores_of(tmp_path / "run", source)
    lines = json_lines(source)
    assert set(scores) == {line["annot_id"] for line in lines}
    parts = implicit_parts(lines, scores, sure=0.26)
    assert sum(map(len, parts.values())) == len(lines)
    monkeypatch.setattr(sys, "argv", ["mitigate_vcr.py", "implicit", str(source)])
    assert mitigate_vcr.main() == 2  # neither --run nor --scores
    assert train(home, tmp_path / "other", *sets(model="bert-micro")) == 2  # there is nothing to distil into
    monkeypatch.setattr(sys, "argv", ["show_attention.py", str(tmp_path / "run"), "--data", str(source)])
    assert show_attention.main() == 2  # it looks at no regions


def test_clip_itself_is_tuned_and_answers_from_its_run_alone(home, tmp_path):
    assert train(home, tmp_path / "run", *sets(model="clip-tuned", init=home / "clip")) == 0
    before, after = (
        load_file(path)
        for path in (home / "clip" / "open_clip_model.safetensors", tmp_path / "run" / "model.safetensors")
    )
    moved = [
        name
        for name, value in before.items()
        if not torch.equal(after[f"clip.model.{name}"].reshape(value.shape), value)
    ]
    assert len(moved) > 0.8 * len(before)
    manifest = read_manifest(str(data_of(home)["vcr"]))
    scores = load_task_model(tmp_path / "run", device="cpu").score(manifest, np.arange(3), "q2a")
    assert scores.shape == (3, 4)
    assert train(home, tmp_path / "other", *sets(model="clip-tuned")) == 2


@pytest.mark.parametrize("task", ["snli_ve", "vqa"])
def test_other_tasks_train_and_answer(home, tmp_path, task, monkeypatch, capsys):
    assert train(home, tmp_path / "run", task=task) == 0
    model = load_task_model(tmp_path / "run", device="cpu", cache=str(home / "caches" / task))
    manifest = read_manifest(str(data_of(home)[task]))
    rows = manifest.rows_of_split("val") if task == "snli_ve" else np.arange(len(manifest))
    scores = model.score(manifest, rows, "")
    assert scores.shape == (len(rows), model.task.classes)
    assert np.isfinite(scores).all()
    assert model.score(manifest, rows, "q2a") is None
    monkeypatch.chdir(home)  # caches/<name of the data> are found from here
    capsys.readouterr()
    assert (
        main(["eval", str(tmp_path / "run"), "--task", task, "--data", str(data_of(home)[task]), "--json"])
        == 0
    )
    metrics = json.loads(capsys.readouterr().out)["results"][0]["metrics"]
    columns = [json.loads(manifest.row(row).task) for row in rows.tolist()]
    if task == "snli_ve":
        right = [
            float(column["label"] == best) for column, best in zip(columns, scores.argmax(1), strict=True)
        ]
    else:  # of ten answers, nine are left for each that is left out: min(1, matches / 3) in the mean
        given = [
            [answer == model.task.answers[best] for answer in column["answers"]]
            for column, best in zip(columns, scores.argmax(1), strict=True)
        ]
        right = [np.mean([min(1, (sum(one) - one[k]) / 3) for k in range(10)]) for one in given]
    assert metrics["accuracy"] == pytest.approx(np.mean(right))


def test_adapted_students_begin_the_task_and_do_not_answer_themselves(home, tmp_path, capsys):
    assert train(home, tmp_path / "adapted", *sets(stage="adapt")) == 0
    data = data_of(home)["vcr"]
    hint = f"next: student train --recipe clip_td --data {data} --set init={tmp_path / 'adapted'}"
    assert hint in capsys.readouterr().err
    assert {"mlm", "itm", "dv", "dt"} <= set(read_lines(tmp_path / "adapted")[0])
    assert (
        train(home, tmp_path / "task", "--steps", 1, *sets(init=tmp_path / "adapted", **{"optim.lr": 0.0}))
        == 0
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("adapted", "task"))
    shared = [name for name in before if name.startswith(("bert.", "regions."))]
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert any(name.startswith("answer.") for name in after)
    assert not any(name.startswith("answer.") for name in before)
    assert (
        main(["eval", str(tmp_path / "adapted"), "--task", "vcr", "--data", str(data_of(home)["vcr"])]) == 2
    )
    assert "stage=adapt run without answers" in capsys.readouterr().err


def test_training_reads_no_picture_and_loads_no_teacher(home, tmp_path, monkeypatch):
    from student.inputs import pairs, question_rows
    from teachercache.data import pictures as samples
    from teachercache.teachers import registry as teachers

    def refuse(*words, **more):
        raise AssertionError("a picture or a teacher was asked for")

    for module, name in (
        (samples, "read_image"),
        (question_rows, "read_image"),
        (pairs, "read_image"),
        (teachers, "load"),
        (teachers, "find"),
    ):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr("student.inputs.open_rows.readable_rows", refuse)
    monkeypatch.setattr("student.training.prepare.load_teacher", refuse)
    assert train(home, tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "regime=low"), "choose full, zero, low:N or semi:N"),
        (("--live",), "drop --live"),
        (("--set", "model=lxmert-tiny"), "choose from uniter-base"),
        (("--set", "model=bert-tiny"), "add --set distill_weight=0"),
        (("--set", "init=/nowhere"), "is not there"),
        (("--set", "max_text=900"), "positions at most"),
        (("--set", "num_words=4"), "more words in --outputs, as tokens:4"),
        (("--set", "num_words=4", "--set", "select=random"), "more words in --outputs, as random_tokens:4"),
        (("--set", "model=clip-transformer", "--set", "fusion=cosine"), "reads both side by side"),
        (("--set", "tokenizer=/nowhere"), "neither tokenizer.json"),
        (("--set", "model=villa-micro", "--set", "run.zero=3"), "choose 0, 1 or 2"),
        (("--batch-size", 500), "fewer than --batch-size"),
        (("--cache", "/nowhere"), "tc build --teacher regions-lite"),
    ],
)
def test_what_cannot_be_is_one_line(home, tmp_path, capsys, words, said):
    assert train(home, tmp_path / "run", *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert said in lines[-1]
    assert not (tmp_path / "run").exists()
