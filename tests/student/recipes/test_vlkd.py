"""vlkd without runs: losses against loops, the projector, the student against transformers, what rows are read as."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
from small_bart import micro_bart

from student import losses
from student.models.heads import Temperature
from student.models.seq2seq.loading import Reading, make_reader
from student.models.seq2seq.model import Seq2Seq
from student.models.seq2seq.self_critical import CaptionSampler, reward_of, rewards
from student.models.seq2seq.texts import answer_prompt, caption_prompt, encode_prompt
from student.recipe import Progress
from student.recipes.vlkd import VLKD
from teachercache.core.errors import UserError
from teachercache.data.sample import Sample
from tests.student.losses.test_losses import rows

NOW, WIDTH = Progress(0, 1), 12


def make_student(stage: str = "distil", *, width: int = WIDTH, visual: str = "cls", **changes) -> Seq2Seq:
    bart, tokenizer = micro_bart(dropout=0.0, **changes)
    reading = Reading(stage, masks=0, share=0.15, max_text=32)
    reader = make_reader(tokenizer.backend_tokenizer, bart.config, reading)
    student = Seq2Seq(bart, reader, visual=visual)
    student.connect(width)
    return student


def sample(*texts: str, **task) -> Sample:
    return Sample("a", "a.png", texts, task=json.dumps(task) if task else "")


def read(student: Seq2Seq, *samples: Sample, seed: int = 0) -> dict:
    random = [np.random.default_rng([seed, i]) for i in range(len(samples))]
    batch = student.read_texts(samples, [one.texts[0] for one in samples], random)
    pictures = torch.randn(len(samples), 12, generator=torch.Generator().manual_seed(1))
    return batch | {"image_emb": pictures, "text_emb": pictures.flip(0)}


CAPTIONS = [
    sample("a red bird said 12"),
    sample("square 3"),
    sample("two birds and a square said nothing at all."),
]


# ----------------------------------------------------------------------------------------------------
# Losses


def test_ttdm_is_the_loop_in_value_and_gradient():
    e, t = rows(5, 1, count=4).requires_grad_(), rows(5, 2, count=4)
    slow = sum((t[k, j] - e[k, j]) ** 2 for k in range(4) for j in range(5)) / 4
    fast = losses.ttdm_loss(e, t)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(one, e)[0] for one in (fast, slow)), rtol=1e-12, atol=1e-15
    )
    assert float(losses.ttdm_loss(t, t)) == 0
    torch.testing.assert_close(fast, 2 * (1 - (e * t).sum(1)).mean())  # of unit rows


def test_the_likelihood_of_a_text_is_the_loop_over_its_tokens():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, generator=random, dtype=torch.float64, requires_grad=True)
    text = torch.randint(0, 6, (3, 4), generator=random)
    counted = torch.tensor([[True] * 4, [False, True, True, False], [False] * 4])
    slow = [torch.zeros((), dtype=torch.float64)] * 3
    for k in range(3):
        for j in range(4):
            if counted[k, j]:
                total = sum(torch.exp(z) for z in logits[k, j])
                slow[k] = slow[k] - torch.log(torch.exp(logits[k, j, text[k, j]]) / total)
    fast = losses.text_nll(logits, text, counted)
    torch.testing.assert_close(fast, torch.stack(slow), rtol=1e-12, atol=1e-14)
    one, other = (torch.autograd.grad(value.sum(), logits)[0] for value in (fast, torch.stack(slow)))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_scst_raises_what_beats_the_greedy_caption():
    nll = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64, requires_grad=True)
    loss = losses.scst_loss(nll, torch.tensor([4.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 2.0]))
    assert loss.item() == pytest.approx((3 * 2 - 1 * 3 + 0) / 3)
    loss.backward()
    assert nll.grad.tolist() == pytest.approx([1, -1 / 3, 0])


def test_the_recipes_terms_are_the_papers():
    student, heads = make_student(), Temperature(0.07)
    batch = read(student, *CAPTIONS)
    outputs = {name: value.detach() for name, value in (student(batch) | heads({})).items()}
    terms, notes = VLKD.loss(outputs, batch, VLKD.constants, NOW)
    e = outputs["text_in_teacher_space"] / outputs["text_in_teacher_space"].norm(dim=1, keepdim=True)
    v, t = (batch[name] / batch[name].norm(dim=1, keepdim=True) for name in ("image_emb", "text_emb"))
    ttdm = sum(float((t[k] - e[k]).norm()) ** 2 for k in range(3)) / 3
    logits = [[float(v[i] @ e[j]) / 0.07 for j in range(3)] for i in range(3)]
    i2t = (
        -sum(np.log(np.exp(logits[k][k]) / sum(np.exp(logits[k][j]) for j in range(3))) for k in range(3)) / 3
    )
    t2i = (
        -sum(np.log(np.exp(logits[k][k]) / sum(np.exp(logits[j][k]) for j in range(3))) for k in range(3)) / 3
    )
    assert float(terms["ttdm"]) == pytest.approx(1000 * ttdm, rel=1e-5)
    assert float(terms["itcl"]) == pytest.approx((i2t + t2i) / 2, rel=1e-5)
    assert float(terms["icti"]) == pytest.approx(float(outputs["nll"].sum()) / 3, rel=1e-6)
    assert float(notes["tau"]) == pytest.approx(0.07)
    for name in terms:
        off = dataclasses.replace(VLKD.constants, **{name: 0.0})
        assert terms.keys() - VLKD.loss(outputs, batch, off, NOW)[0].keys() == {name}
    assert VLKD.teacher_fields(dataclasses.replace(VLKD.constants, ttdm=0.0)) == ("image_emb",)
    assert VLKD.teacher_fields(dataclasses.replace(VLKD.constants, visual="patches")) == (
        "patch_emb",
        "image_emb",
        "text_emb",
    )
    assert VLKD.teacher_fields(dataclasses.replace(VLKD.constants, stage="vqa")) == ("image_emb",)


# ----------------------------------------------------------------------------------------------------
# The student


@pytest.mark.parametrize("width", [7, 16, 40])
def test_there_and_back_is_the_orthogonal_projector_onto_what_the_way_there_keeps(width):
    student = make_student(width=width)
    there, back = (one.weight.detach().double().numpy() for one in (student.text_out, student.text_in))
    _, values, right = np.linalg.svd(there)
    kept = right[: (values > 1e-6).sum()]
    np.testing.assert_allclose(back @ there, kept.T @ kept, atol=1e-5)
    assert len(kept) == min(width, 16)
    if width >= 16:
        np.testing.assert_allclose(back @ there, np.eye(16), atol=1e-5)


def test_the_decoder_reads_pictures_before_the_text_and_padding_is_not_there():
    student = make_student().eval()
    batch = read(student, *CAPTIONS)
    V = student.pictures(batch)
    torch.testing.assert_close(V[:, 0].norm(dim=1), torch.ones(3))
    C, there = student.context(batch["source"], V)
    E = student.bart.model.encoder(
        input_ids=batch["source"][1:2, : int(there[1].sum()) - 1]
    ).last_hidden_state[0]
    expected = torch.cat(
        [V[1] @ student.image_in.weight.T, E @ student.text_out.weight.T @ student.text_in.weight.T]
    )
    torch.testing.assert_close(C[1][there[1]], expected, rtol=1e-4, atol=1e-5)
    patches = make_student(visual="patches")
    seen = patches.pictures({"patch_emb": torch.randn(2, 5, WIDTH)})
    assert seen.shape == (2, 5, WIDTH)
    torch.testing.assert_close(seen.norm(dim=-1), torch.ones(2, 5))


@torch.no_grad()
def test_the_likelihood_is_that_of_one_token_after_the_other_and_rows_do_not_meet():
    student = make_student().eval()
    batch = read(student, *CAPTIONS)
    found = student(batch)
    for k in range(3):
        alone = {name: value[k : k + 1] for name, value in batch.items()}
        alone["source"], alone["text"] = (one[one != 1][None] for one in (alone["source"], alone["text"]))
        C, there = student.context(alone["source"], student.pictures(alone))
        total, ids = 0.0, [student.bart.config.decoder_start_token_id]
        for word in alone["text"][0].tolist():
            out = student.bart.model.decoder(input_ids=torch.tensor([ids]), encoder_hidden_states=C)
            z = student.bart.lm_head(out.last_hidden_state[0, -1]) + student.bart.final_logits_bias[0]
            total, ids = total - float(z.log_softmax(0)[word]), [*ids, word]
        assert there.all()
        assert float(found["nll"][k]) == pytest.approx(total, rel=1e-4)
        assert float(found["tokens"][k]) == alone["text"].shape[1]
        mean = student.bart.model.encoder(input_ids=alone["text"]).last_hidden_state[0].mean(0)
        torch.testing.assert_close(
            found["text_in_teacher_space"][k], mean @ student.text_out.weight.T, rtol=1e-4, atol=1e-5
        )


def test_the_language_model_alone_is_this_one_without_a_picture():
    student = make_student(width=7).eval()  # a projector that loses something
    batch = read(student, *CAPTIONS)
    ours = student.decode(batch["text"], *student.context(batch["source"], None))
    alone = student.language_model()
    plain = alone(
        input_ids=batch["source"], attention_mask=(batch["source"] != 1).long(), labels=batch["text"]
    ).logits
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)
    before = student.bart(
        input_ids=batch["source"], attention_mask=(batch["source"] != 1).long(), labels=batch["text"]
    ).logits
    assert (before - ours).abs().max() > 0.05


def test_every_parameter_has_a_gradient_but_what_a_softmax_cannot_see():
    student = make_student()
    outputs = student(read(student, *CAPTIONS))
    (outputs["nll"].sum() + outputs["text_in_teacher_space"].square().sum()).backward()
    silent = {
        name for name, value in student.named_parameters() if value.grad is None or value.grad.norm() < 1e-4
    }
    assert {name.rpartition(".k_proj.")[2] for name in silent} == {"bias"}


# ----------------------------------------------------------------------------------------------------
# What rows are read as


def spoken(student: Seq2Seq, ids: torch.Tensor) -> str:
    return student.read_texts.tokenizer.decode(ids.tolist(), skip_special_tokens=False).replace("<pad>", "")


def test_while_distilling_the_text_is_whole_and_its_source_has_holes():
    student = make_student()
    batch = read(student, *CAPTIONS)
    assert [spoken(student, ids) for ids in batch["text"]] == [f"<s>{one.texts[0]}</s>" for one in CAPTIONS]
    assert batch["prompt_length"].tolist() == [0, 0, 0]
    for source, text in zip(batch["source"], batch["text"], strict=True):
        assert (source == 4).sum() >= 1  # <mask>
        left = iter(text.tolist())
        assert all(one in left for one in source[source != 4].tolist() if one != 1)  # in order
    again, other = read(student, *CAPTIONS), read(student, *CAPTIONS, seed=5)
    assert torch.equal(again["source"], batch["source"])
    assert other["source"].shape != batch["source"].shape or not torch.equal(other["source"], batch["source"])


def test_captions_and_answers_stand_in_their_prompts():
    student = make_student("caption")
    batch = read(student, sample(" Red birds. "), sample("square 3"))
    assert {spoken(student, ids) for ids in batch["source"]} == {f"<s>A picture of{'<mask>' * 6}.</s>"}
    assert [spoken(student, ids) for ids in batch["text"]] == [
        "<s>A picture of Red birds.</s>",
        "<s>A picture of square 3.</s>",
    ]
    assert all(
        spoken(student, ids[:given]) == "<s>A picture of"
        for ids, given in zip(batch["text"], batch["prompt_length"], strict=True)
    )
    counted = student(batch)["tokens"].tolist()
    assert counted == [
        float((ids != 1).sum() - given)
        for ids, given in zip(batch["text"], batch["prompt_length"], strict=True)
    ]
    student = make_student("vqa")
    asked = sample("What color?", task="vqa", question="What color?", answers=["Red"] * 7 + ["blue"] * 3)
    texts = Counter(spoken(student, read(student, asked, seed=seed)["text"][0]) for seed in range(200))
    assert texts.keys() == {"<s>What color? Answer: red.</s>", "<s>What color? Answer: blue.</s>"}
    assert 110 < texts["<s>What color? Answer: red.</s>"] < 170
    assert spoken(student, read(student, asked)["source"][0]) == "<s>What color? Answer:<mask><mask>.</s>"
    with pytest.raises(UserError, match="asks nothing"):
        read(student, CAPTIONS[0])


def test_a_prompt_that_is_too_long_keeps_its_masks():
    student = make_student()
    marks, tokenizer = student.read_texts.marks, student.read_texts.tokenizer
    ids, given = encode_prompt(tokenizer, marks, answer_prompt("is it a bird " * 30, 2), 32)
    assert (len(ids), ids.count(marks.mask)) == (30, 2)
    assert ids[: len(given)] == given
    assert tokenizer.decode(given).endswith("bird Answer:")
    assert caption_prompt(2) == "A picture of [MASK][MASK]."


# ----------------------------------------------------------------------------------------------------
# Writing


def test_what_is_written_is_the_same_alone_and_among_others_and_greedy_is_a_beam_of_one():
    student = make_student("caption").eval()
    for layer in student.bart.model.decoder.layers:  # what is seen outweighs the word before
        layer.encoder_attn.out_proj.weight.data.mul_(20)
    fields = {"image_emb": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))}
    prompts = [caption_prompt(6), answer_prompt("What color is it?", 2), caption_prompt(6)]
    for beams in (1, 3):
        together = student.generate_texts(fields, prompts, num_beams=beams, max_new_tokens=7)
        for k, prompt in enumerate(prompts):
            alone = {"image_emb": fields["image_emb"][k : k + 1]}
            assert student.generate_texts(alone, [prompt], num_beams=beams, max_new_tokens=7) == [together[k]]
    assert together[0] != together[2]  # the same prompt, another picture
    batch = read(student, *CAPTIONS)
    C, there = student.context(batch["source"], student.pictures(batch))
    reader = dataclasses.replace(student.read_texts, sampling_steps=7)
    prompt = batch["text"][:, : int(batch["prompt_length"][0])]
    greedy = CaptionSampler(student.bart, reader, reward_of([])).write(C, there, prompt, None)
    texts = student.generate_texts(batch, [caption_prompt(6)] * 3, max_new_tokens=7)
    for ids, text in zip(greedy, texts, strict=True):
        said = reader.tokenizer.decode(ids[prompt.shape[1] :].tolist(), skip_special_tokens=True)
        assert " ".join(said.strip().removesuffix(".").split()) == text


def test_sampled_words_follow_the_models_probabilities():
    student = make_student("caption").eval()
    batch = {name: value.expand(4000, *value.shape[1:]) for name, value in read(student, CAPTIONS[0]).items()}
    C, there = student.context(batch["source"], student.pictures(batch))
    noise = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    given, reader = batch["text"][:, :3], dataclasses.replace(student.read_texts, sampling_steps=1)
    words = CaptionSampler(student.bart, reader, reward_of([])).write(C, there, given, noise)[:, -1]
    logits = student.decode(torch.cat([given, given[:, :1]], 1)[:1], C[:1], there[:1])[0, 3]
    expected = logits.softmax(0)
    found = words.bincount(minlength=len(expected)) / 4000
    assert (found - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert expected.max() > 0.05


def test_rewards_are_those_of_the_texts_and_dropout_stays_as_it_was():
    student = make_student("scst")
    student.reward = reward_of([one.texts for one in CAPTIONS])
    batch = read(student, *CAPTIONS)
    assert batch["sampling_noise"].shape == (3, 20)
    C, there = student.context(batch["source"], student.pictures(batch))
    sampler = CaptionSampler(student.bart, student.read_texts, student.reward)
    text, found = sampler.sample(C, there, batch)
    assert student.bart.training
    assert found["reward"].shape == (3,)
    given = int(batch["prompt_length"][0])
    assert (text[:, :given] == batch["text"][:, :given]).all()
    outputs = student(batch)
    assert outputs["nll"].requires_grad
    torch.testing.assert_close(outputs["reward"], found["reward"])
    tokenizer = student.read_texts.tokenizer
    for k, caption in enumerate(CAPTIONS):
        said = torch.tensor(
            [tokenizer.encode(f"A picture of {caption.texts[0]}", add_special_tokens=False).ids]
        )
        (score,) = rewards(said, batch["reference"][k : k + 1], student.read_texts, student.reward)
        words = len(caption.texts[0].split())
        assert score == pytest.approx(2.5 * min(4, words))  # it has no longer n-grams than words
