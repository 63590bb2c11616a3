"""Single-stream students: words and their sub-words, embeddings and losses against slow loops, starts, VILLA."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from student import losses
from student.models.single_stream.loading import load_into, open_student, read_state, renamed
from student.models.single_stream.model import FIRST, IMAGE, SECOND, SIZES, Shape, SingleStream, rebuild
from student.models.single_stream.regions import geometry, valid_regions, waves
from student.models.single_stream.tokenizer import encode_pairs, tokens_of, vocabulary_tokenizer
from student.models.single_stream.villa import Perturbation, ascend
from teachercache.core.errors import UserError

MICRO = SIZES["micro"]
TEXT = ("text", "token_type_ids", "attention_mask", "text_region")
TEXTS = ["Is the red circle above?", "It is a striped star.", "yes", "no"]


def words_of() -> object:
    return vocabulary_tokenizer(TEXTS)


def batch_of(n=2, C=2, regions=3, width=5, **more) -> dict:
    """Rows of C pairs with regions; the second row has one region fewer."""
    pairs = [
        ("is the red circle above?", f"it is a {word}.") for word in ("star", "yes", "no", "circle")[: n * C]
    ]
    encoded = encode_pairs(words_of(), pairs, 40)
    torch.manual_seed(5)
    box = torch.tensor([[0, 0, 1, 1], [0.1, 0.2, 0.5, 0.9], [0.3, 0.3, 0.4, 0.4]]).expand(n, -1, -1).clone()
    box[1, 2] = 0
    batch = {
        "text": encoded.ids,
        "token_type_ids": encoded.token_type_ids,
        "attention_mask": encoded.attention_mask,
    }
    batch["text_region"] = torch.zeros_like(encoded.ids)
    batch = {name: value.unflatten(0, (n, C)) for name, value in batch.items()}
    feature = torch.randn(n, regions, width) * valid_regions(box)[..., None]
    target = torch.eye(C)[torch.arange(n) % C] if C > 1 else torch.eye(3)[:n]
    return batch | {"region_feature": feature, "region_box": box, "target": target} | more


def student_of(
    face="uniter", *, inputs=2, classes=2, many=False, stage="task", perturbation=None
) -> SingleStream:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=words_of().get_vocab_size(), type_vocab_size=3, **MICRO)
    return SingleStream(config, Shape(face, 5, inputs, classes, many, stage), perturbation)


# ----------------------------------------------------------------------------------------------------
# Words


def test_pairs_are_written_as_bert_writes_them_and_spans_point_into_the_joined_text():
    tokenizer, first, second = words_of(), "Is the RED circle above?", "It is a striped starship."
    found = encode_pairs(tokenizer, [(first, second), ("yes", "")], 60)
    joined = f"{first} {second}"
    pieces = [tokenizer.id_to_token(int(number)) for number in found.ids[0]]
    assert pieces[0] == "[CLS]"
    assert pieces[-1] == "[SEP]"
    assert pieces.count("[SEP]") == 2
    assert pieces[pieces.index("red")] == joined[slice(*found.spans[0, pieces.index("red")])].lower()
    assert found.token_type_ids[0].tolist() == [i > pieces.index("[SEP]") for i in range(len(pieces))]
    assert found.attention_mask[1].sum() == 3
    assert not found.token_type_ids[1].any()
    assert (found.spans[1, 3:] == 0).all()
    start = joined.index("starship")
    chosen = tokens_of(found.spans[0], torch.tensor([[start, start + 8], [0, 0]]).numpy())
    assert [pieces[i].removeprefix("##") for i in chosen[0].nonzero()[0]]
    assert not chosen[1].any()
    assert "".join(pieces[i].removeprefix("##") for i in chosen[0].nonzero()[0]) == "starship"


def test_a_vocabulary_depends_on_the_texts_and_not_on_their_order_and_knows_every_character():
    one, other = vocabulary_tokenizer(TEXTS), vocabulary_tokenizer(TEXTS[::-1])
    assert one.get_vocab() == other.get_vocab()
    assert one.token_to_id("[UNK]") not in one.encode("hat is a rathole").ids


# ----------------------------------------------------------------------------------------------------
# The student


def test_geometry_and_waves_are_the_papers_numbers():
    box = torch.tensor([0.1, 0.2, 0.5, 0.8], dtype=torch.float64)
    torch.testing.assert_close(
        geometry(box), torch.tensor([0.1, 0.2, 0.5, 0.8, 0.4, 0.6, 0.24], dtype=torch.float64)
    )
    found = waves(box.unsqueeze(0), 4)[0].view(4, 8)
    for c, value in enumerate(box.tolist()):
        for k in range(4):
            angle = 100 * value / 1000 ** (k / 4)
            assert math.isclose(found[c, k], math.sin(angle), abs_tol=1e-9)
            assert math.isclose(found[c, 4 + k], math.cos(angle), abs_tol=1e-9)


@pytest.mark.parametrize("face", ["uniter", "vl-bert"])
def test_padding_and_missing_regions_change_nothing(face):
    student, batch = student_of(face).eval().double(), batch_of()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    before = student(batch)
    longer = batch | {name: torch.nn.functional.pad(batch[name], (0, 3)) for name in TEXT}
    noisy = batch["region_feature"].clone()
    noisy[1, 2] = 100.0  # a box of zeros: no region
    after = student(longer | {"region_feature": noisy})
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
    seen = batch["region_feature"].clone()
    seen[0, 2] = 100.0
    assert (student(batch | {"region_feature": seen})["logits"][0] - before["logits"][0]).abs().max() > 1e-6


def test_words_are_means_of_their_tokens_and_each_choice_is_read_alone():
    student, batch = student_of().eval(), batch_of()
    tokens = torch.zeros(2, 2, 2, batch["text"].shape[-1], dtype=torch.bool)
    tokens[0, 1, 0, [2, 4]] = True
    found = student(batch | {"word_tokens": tokens})
    hidden = student.encode(*student.embed(batch))
    torch.testing.assert_close(found["words"][0, 1, 0], (hidden[1, 2] + hidden[1, 4]) / 2)
    assert (found["words"][1] == 0).all()
    alone = {name: value[:, 1:] if name in TEXT else value for name, value in batch.items()}
    student.shape = Shape("uniter", 5, 2, 1)
    torch.testing.assert_close(student(alone)["cls"][:, 0], found["cls"][:, 1], rtol=1e-5, atol=1e-6)


def test_uniter_without_regions_is_bert():
    """Against transformers' own BertModel: the same text, no picture."""
    student, batch = student_of().eval(), batch_of(C=1, n=2)
    words, regions, mask = student.embed(batch)
    length = words.shape[1]
    mask[:, length:] = False
    mine = student.encode(words, regions, mask)[:, :length]
    kinds = torch.where(batch["token_type_ids"][:, 0], 2, 0)
    theirs = student.bert(batch["text"][:, 0], batch["attention_mask"][:, 0], kinds).last_hidden_state
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_element_of_uniters_picture_by_hand():
    student, batch = student_of().eval(), batch_of(C=1)
    _, regions, _ = student.embed(batch)
    part, f, b = student.regions, batch["region_feature"][0, 1], batch["region_box"][0, 1]
    where = part.pos_layer_norm(part.pos_linear(geometry(b)))
    kind = student.bert.embeddings.token_type_embeddings.weight[IMAGE]
    torch.testing.assert_close(
        regions[0, 1], part.LayerNorm(part.img_layer_norm(part.img_linear(f)) + where + kind)
    )


def test_a_word_of_vl_bert_sees_the_object_that_it_names_or_the_whole_picture():
    """VL-BERT: the sum of word, type, place and visual feature embedding; region 2 is not there in the second row."""
    student, batch = student_of("vl-bert").eval(), batch_of()
    said = torch.zeros_like(batch["text"])
    said[:, 0, 3], said[:, 1, 4], said[0, 1, 5] = 1, 2, 7  # the last: a region that was left out
    words, _, _ = student.embed(batch | {"text_region": said})
    embed, part = student.bert.embeddings, student.regions
    visual = part.word_norm(part.features(batch["region_feature"], batch["region_box"]))
    for n, c, place, region in ((0, 0, 3, 1), (0, 0, 2, 0), (0, 1, 4, 2), (1, 1, 4, 0), (0, 1, 5, 0)):
        kind = embed.token_type_embeddings.weight[SECOND if batch["token_type_ids"][n, c, place] else FIRST]
        word = embed.word_embeddings.weight[batch["text"][n, c, place]]
        expected = embed.LayerNorm(word + kind + embed.position_embeddings.weight[place] + visual[n, region])
        torch.testing.assert_close(words[2 * n + c, place], expected)


def test_a_student_is_built_again_from_what_run_json_holds():
    student, batch = student_of("vl-bert").eval(), batch_of()
    assert student.spec.family == "single_stream"
    again = rebuild(json.loads(json.dumps(student.spec.config))).eval()
    again.load_saved_state(student.saved_state())
    assert torch.equal(again(batch)["logits"], student(batch)["logits"])


# ----------------------------------------------------------------------------------------------------
# Starts


def opened(init, name="uniter-micro"):
    return open_student(
        name,
        str(init),
        Shape(name.rpartition("-")[0], 5, 1, 3),
        tokenizer=words_of(),
        perturbation=Perturbation(),
        max_text=40,
    )


def test_a_bert_that_starts_vl_bert_reads_its_words_as_before_and_learns_to_see(tmp_path):
    """Scales of 0 that have a gradient: pictures change nothing at first, then something."""
    BertModel(BertConfig(vocab_size=words_of().get_vocab_size(), **MICRO)).save_pretrained(tmp_path)
    student, batch = opened(tmp_path, "vl-bert-micro").eval(), batch_of(C=1)
    other = batch | {"region_feature": batch["region_feature"] + 1}
    assert torch.equal(student(batch)["cls"], student(other)["cls"])
    student(batch)["logits"].square().sum().backward()
    for norm in (student.regions.word_norm, student.regions.region_norm):
        assert norm.weight.grad.abs().sum() > 0
        with torch.no_grad():
            norm.weight -= norm.weight.grad
    assert not torch.equal(student(batch)["cls"], student(other)["cls"])
    scratch = student_of("vl-bert", inputs=1, classes=3).eval()
    assert not torch.equal(scratch(batch)["cls"], scratch(other)["cls"])


def test_a_bert_folder_starts_the_text_side(tmp_path):
    bert = BertModel(BertConfig(vocab_size=words_of().get_vocab_size(), **MICRO))
    bert.save_pretrained(tmp_path)
    student = opened(tmp_path)
    torch.testing.assert_close(student.bert.encoder.state_dict(), bert.encoder.state_dict())
    kinds, old = (one.embeddings.token_type_embeddings.weight for one in (student.bert, bert))
    assert torch.equal(kinds[:2], old)
    assert torch.equal(kinds[2], old[0])
    with pytest.raises(UserError, match="layers of width"):
        opened(tmp_path, "uniter-tiny")


def test_a_uniter_checkpoint_starts_words_and_regions(tmp_path):
    """A made-up file with the released checkpoints' names."""
    student = student_of(inputs=1, classes=3)
    state = {}
    for name, tensor in student.state_dict().items():
        if name.startswith(("bert.", "regions.")):
            theirs = name.replace("regions.", "uniter.img_embeddings.").replace("bert.", "uniter.", 1)
            state[theirs] = torch.full_like(tensor, 0.5)
    state["uniter.img_embeddings.mask_embedding.weight"] = torch.zeros(2, 5)
    state["cls.predictions.bias"] = torch.zeros(7)
    path = tmp_path / "uniter-micro.pt"
    torch.save(state, path)
    other = student_of(inputs=1, classes=3)
    load_into(other, read_state(path), str(path))
    for name, tensor in other.state_dict().items():
        assert (tensor == 0.5).all() == name.startswith(("bert.", "regions.")), name


def test_uniters_second_stage_of_vcr_is_inside_and_has_four_token_types(tmp_path):
    student = student_of(inputs=1, classes=3)
    state = {
        name.replace("bert.", "uniter.", 1): tensor
        for name, tensor in student.state_dict().items()
        if name.startswith("bert.")
    }
    kinds = state["uniter.embeddings.token_type_embeddings.weight"] = torch.randn(4, MICRO["hidden_size"])
    torch.save({"model_state": state, "step": 7}, tmp_path / "vcr.pt")
    load_into(student, read_state(tmp_path / "vcr.pt"), "vcr.pt")
    assert torch.equal(student.bert.embeddings.token_type_embeddings.weight, kinds[:3])


def test_old_names_and_foreign_files(tmp_path):
    found = renamed({"bert.embeddings.LayerNorm.gamma": torch.ones(1), "cls.seq": torch.ones(1)})
    assert set(found) == {"bert.embeddings.LayerNorm.weight"}
    save_file({"something.else": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no BERT in it that fits"):
        load_into(student_of(), read_state(tmp_path), str(tmp_path))
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"bad\.pt cannot be loaded"):
        read_state(tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"did you mean|choose from"):
        open_student(
            "unitr-tiny",
            "",
            Shape("uniter", 5, 1, 3),
            tokenizer=words_of(),
            perturbation=Perturbation(),
            max_text=40,
        )


# ----------------------------------------------------------------------------------------------------
# VILLA


def test_a_perturbation_goes_up_its_rows_gradient_and_stays_in_the_ball():
    delta, gradient = torch.zeros(2, 3, 4), torch.randn(2, 3, 4)
    moved = ascend(delta, gradient, Perturbation(lr=0.3))
    for row, slope in zip(moved, gradient, strict=True):
        assert math.isclose(row.norm(), 0.3, rel_tol=1e-5)
        torch.testing.assert_close(row, 0.3 * slope / slope.norm())
    moved = ascend(moved, gradient, Perturbation(lr=1.0, most=0.5))
    assert torch.allclose(moved.flatten(1).norm(dim=1), torch.tensor(0.5))


@pytest.mark.parametrize("many", [False, True])
def test_perturbed_predictions_lose_more_each_time_and_teach_the_parameters(many):
    student = student_of("villa", inputs=1, classes=3, many=many, perturbation=Perturbation(4, 0.5)).train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = batch_of(C=1, n=2)
    found = student(batch)
    each = [
        losses.answer_loss(found["adv_logits"][:, k], batch["target"], many=many).sum().item()
        for k in range(4)
    ]
    clean = losses.answer_loss(found["logits"], batch["target"], many=many).sum().item()
    assert math.isclose(each[0], clean, rel_tol=1e-5)  # delta begins at 0
    assert each[1] > each[0]
    assert each[2] > each[0]
    assert each[3] > each[2]
    found["adv_logits"].sum().backward()
    assert student.regions.img_linear.weight.grad.abs().max() > 0
    assert "adv_logits" not in student.eval()(batch)
    with torch.no_grad():
        assert not student.train()(batch)["adv_logits"].requires_grad


# ----------------------------------------------------------------------------------------------------
# Losses against slow loops


def test_answer_loss_and_its_gradient():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 1, 0, 0], [0.3, 0, 0.6, 0], [0, 0, 0, 0]], dtype=torch.float64)
    for many in (False, True):
        slow = []
        for z, t in zip(logits, target, strict=True):
            total = sum(torch.exp(value) for value in z)
            if many:
                p = [1 / (1 + torch.exp(-value)) for value in z]
                slow.append(
                    -sum(b * torch.log(a) + (1 - b) * torch.log(1 - a) for a, b in zip(p, t, strict=True))
                )
            else:
                slow.append(-sum(b * torch.log(torch.exp(a) / total) for a, b in zip(z, t, strict=True)))
        fast, slow = losses.answer_loss(logits, target, many=many), torch.stack(slow)
        torch.testing.assert_close(fast, slow)
        a, b = (torch.autograd.grad(one.sum(), logits, retain_graph=True)[0] for one in (fast, slow))
        torch.testing.assert_close(a, b)


def test_token_l1_and_its_gradient():
    S = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    T, W = (
        torch.randn(2, 3, 5, dtype=torch.float64),
        torch.tensor([[0.05, 0, 1], [0.05, 0.05, 0]], dtype=torch.float64),
    )
    slow = (
        sum(W[i, j] * abs(S[i, j, k] - T[i, j, k]) for i in range(2) for j in range(3) for k in range(5)) / 30
    )
    fast = losses.token_l1(S, T, W)
    torch.testing.assert_close(fast, slow)
    gradient = torch.autograd.grad(fast, S)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(slow, S)[0])
    assert (gradient[0, 1] == 0).all()


def test_confidence_weight_compares_the_surest_answers_and_lets_no_gradient_through():
    teacher = torch.tensor([[2.0, 0, 0, 0], [0.1, 0, 0, 0], [1.0, 1, 1, 1]])
    student = torch.tensor([[1.0, 0, 0, 0], [3.0, 0, 0, 0], [1.0, 1, 1, 1]], requires_grad=True)

    def surest(row):
        total = sum(math.exp(value) for value in row)
        return max(math.exp(value) / total for value in row)

    for T in (0.5, 1.0, 1.01, 2.0):
        found = losses.confidence_weight(teacher, student, T)
        pairs = zip(teacher.tolist(), student.tolist(), strict=True)
        expected = [float(T * surest(a) / surest(b) > 1) for a, b in pairs]
        assert found.tolist() == expected
        assert not found.requires_grad
    assert losses.confidence_weight(teacher, student, 1.0)[2] == 0  # r = 1 is not above 1


def test_answer_kl_is_both_divergences():
    clean, logits = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    for many in (False, True):
        for i in range(2):
            total = 0.0
            for k in range(4):
                if many:
                    pairs = [
                        torch.stack([z.sigmoid(), 1 - z.sigmoid()], -1) for z in (clean[i], logits[i, k])
                    ]
                else:
                    pairs = [z.softmax(-1) for z in (clean[i], logits[i, k])]
                p, q = pairs
                total += (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
            torch.testing.assert_close(losses.answer_kl(logits, clean, many=many)[i], total / 4)
