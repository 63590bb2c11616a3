"""A diffusion model as a matcher against Eq. 1 written out one pair and one draw at a time; what the command takes."""

import json
import shutil

import numpy as np
import pytest
import torch
from own_encoder import ENCODER
from PIL import Image
from published_pairs import noise, write_aro, write_winoground
from small import save_diffusion, save_teacher

from evaluation.models.matcher import Question, of_diffusion, of_encoder, score_questions
from evaluation.results.suite import run_suite
from evaluation.results.suite_tables import suite_table
from student.cli import main
from teachercache.core.errors import UserError
from teachercache.data.sample import BadSample
from teachercache.teachers.diffusion import model as diffusion
from teachercache.teachers.registry import load

TEXTS = [["red 1", "1 red"], ["a red b", "re d", "1 red"], [""]]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def teacher(request, tmp_path_factory):
    return load(str(save_diffusion(tmp_path_factory.mktemp("diffusion") / "sd", prediction=request.param)))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [noise(random, (20, 18)) for _ in TEXTS]


def slow_error(teacher, picture: Image.Image, text: str, draws: list[tuple[int, torch.Tensor]]) -> float:
    """Eq. 1 with its letters, a pair and a draw at a time, straight from the parts of the pipeline."""
    module = teacher.module
    x = teacher.view(picture)[None]
    z = module.vae.encode(x).latent_dist.mean * module.vae.config.scaling_factor
    c = module.text_encoder(teacher.tokenize([text])).last_hidden_state
    errors = []
    for t, eps in draws:
        abar = module.alphas_cumprod[t].double()
        z_t = (abar.sqrt() * z + (1 - abar).sqrt() * eps).float()
        said = module.unet(z_t, torch.tensor([t]), encoder_hidden_states=c).sample
        if module.prediction == "v_prediction":
            said = abar.sqrt() * said + (1 - abar).sqrt() * z_t
        errors.append(float((said - eps).double().square().mean()))
    return sum(errors) / len(errors)


def test_a_diffusion_matcher_is_the_slow_loop_with_shared_draws(teacher, pictures):
    found = of_diffusion(teacher, samples=3, t_range=(50, 900), seed=5).score(pictures, TEXTS, normalize=True)
    t, eps = diffusion.draw_noise(teacher.module, 3, seed=5, t_range=(50, 900))
    draws = list(zip(t.tolist(), eps[:, None], strict=True))
    with torch.no_grad():
        for i, (picture, texts) in enumerate(zip(pictures, TEXTS, strict=True)):
            errors = [slow_error(teacher, picture, text, draws) for text in texts]
            empty = slow_error(teacher, picture, "", draws)
            assert found["score"][i].tolist() == pytest.approx([-error for error in errors], rel=1e-4)
            wanted = [empty - error for error in errors]
            assert found["normalised"][i].tolist() == pytest.approx(wanted, abs=1e-5)
    assert found["normalised"][2].tolist() == [0.0]
    assert len({round(float(value), 7) for value in torch.cat(found["score"])}) == 6


def test_other_pictures_and_texts_change_nothing_and_another_seed_does(teacher, pictures):
    matcher = of_diffusion(teacher, samples=2)
    whole = matcher.score(pictures, TEXTS)
    alone = matcher.score(pictures[1:2], TEXTS[1:2])
    assert set(whole) == {"score"}
    torch.testing.assert_close(alone["score"][0], whole["score"][1], rtol=1e-4, atol=1e-6)
    other = of_diffusion(teacher, samples=2, seed=1).score(pictures[1:2], TEXTS[1:2])
    assert not torch.allclose(other["score"][0], whole["score"][1], rtol=1e-3)
    assert all(not parameter.requires_grad for parameter in teacher.module.parameters())


def test_asking_counts_what_was_compared_and_leaves_out_what_cannot_be_read(pictures):
    def missing():
        raise BadSample("gone")

    questions = [
        Question(lambda: pictures[0], ("a", "b")),
        Question(missing, ("c",)),
        Question(lambda: pictures[1], ("d",)),
    ]
    heard = score_questions(of_encoder(ENCODER), questions)
    assert [None if score is None else len(score) for score in heard.scores["score"]] == [2, None, 1]
    assert (heard.matches, heard.problems) == (3, ["gone"])
    with pytest.raises(UserError, match="no picture can be read, the first because: gone"):
        score_questions(of_encoder(ENCODER), questions[1:2])


# ----------------------------------------------------------------------------------------------------
# The command


def test_models_of_both_kinds_stand_side_by_side(diffusion_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    data = write_winoground(tmp_path / "wino", "zip", 4)
    clip = save_teacher(tmp_path / "clip")
    words = ["eval", str(clip), str(diffusion_folder), "--task", "winoground", "--data", str(data)]
    assert main([*words, "--samples", "2", "--json"]) == 0
    results = json.loads(capfd.readouterr().out)["results"]
    assert [result["model"] for result in results] == [str(clip), str(diffusion_folder)]
    for result in results:
        assert {"text_score", "image_score", "group_score", "ties", "text_score_low"} <= set(
            result["metrics"]
        )
        assert result["metrics"]["seconds_per_match"] > 0
    assert [result["metrics"]["num_matches"] for result in results] == [16, 24]  # the empty text is one more
    assert "normalised/image_score" in results[1]["metrics"]
    assert results[1]["pretrained"].endswith("2 draws")
    assert main(words) == 0
    assert "text_score/object" in capfd.readouterr().out


def test_a_run_keeps_its_result(finished_run, tmp_path, capfd):
    data, run = (
        write_winoground(tmp_path / "wino", "folder", 4),
        shutil.copytree(finished_run, tmp_path / "run"),
    )
    assert main(["eval", str(run), "--task", "winoground", "--data", str(data), "--json"]) == 0
    (result,) = json.loads(capfd.readouterr().out)["results"]
    assert json.loads((run / "eval/wino_winoground.json").read_text()) == result


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "retrieval"], "has no embeddings to evaluate"),
        (["--task", "retrieval", "--samples", "2"], "only winoground, aro, sugar_crepe take one"),
        (["--task", "winoground", "--figures", "f"], "--figures draws what encoders predict: leave it out"),
        (
            ["--task", "winoground", "--data", "nowhere"],
            "no folder nowhere: --task winoground needs the folder",
        ),
    ],
)
def test_errors(words, said, diffusion_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(diffusion_folder), *words]) == 2
    assert said in capsys.readouterr().err


def test_the_suite_finds_these_sets(tmp_path):
    write_winoground(tmp_path / "a/winoground", "parquet", 4)
    write_aro(tmp_path / "aro", 8)
    report = run_suite([ENCODER], tmp_path)
    assert {(result["dataset"], result["task"]) for result in report.results} == {
        (name,) * 2 for name in ("winoground", "aro")
    }
    table = suite_table(report)
    assert "| winoground | winoground | text score |" in table
    assert "| aro | aro | attribution macro | - |" in table
    assert "no swap_att.json or replace_att.json in" in table
