"""GLUE, XSUM and held-out text: files in their true layout, a tiny BART that learns, numbers by other libraries."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from evaluation.probes.finetune_text import Options
from evaluation.tasks.language import glue, text_loss, xsum
from teachercache.core.errors import UserError

LINES = {  # a train line and a dev line of each task, as GLUE's own files have them
    "CoLA": (None, "gj04\t1\t\tOur friends won't buy this.", 'gj04\t0\t*\tThey drank the "pub.'),
    "SST-2": ("sentence\tlabel", "hide new secretions \t0", "it 's a charming journey . \t1"),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t702876\t702977\tAmrozi said\tHe "said',
        "0\t1\t2\tYucaipa owned\tYucaipa bought",
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "133273\t213221\t213222\tHow is it?\tHow?\t0",
        "201359\t303345\t303346\tWhy?\tWhy not?\t1",
    ),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane.\tAn air plane.\t5.000",
        "1\tmain-captions\tMSRvid\t2012test\t0004\tnone\tnone\tA man.\tA flute.\t3.800",
    ),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t31193\t31193n\tgov\t( x )\t( y )\t(ROOT x)\t(ROOT y)\tConceptually cream\tProduct\tneutral\tneutral",
        "0\t63735\t63735n\tslate\t( x )\t( y )\t(ROOT x)\t(ROOT y)\tThe new\tEveryone\tneutral\tcontradiction",
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel",
        "0\tWhen did it?\tIn 1979.\tentailment",
        "1\tWhat came?\tAs of that day.\tnot_entailment",
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tNo weapons.\tWeapons.\tnot_entailment",
        "1\tA place.\tA.\tentailment",
    ),
}
OPTIONS = Options(epochs=8, batch=16, lr=3e-3, longest=16)
WORDS = ["good", "bad", "film", "the", "a", "was", "it", "plot", "so", "very"]


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BART folder with a vocabulary of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

    out = tmp_path_factory.mktemp("language") / "bart"
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(
        zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, sep_token="</s>", cls_token="<s>", **names
    ).save_pretrained(out)
    torch.manual_seed(0)
    BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(special + WORDS),
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            dropout=0.0,
            init_std=0.1,
        )
    ).save_pretrained(out)
    return str(out)


def write_glue(root: Path) -> None:
    for name, (header, train, dev) in LINES.items():
        files = {"train.tsv": train, "dev.tsv": dev}
        if name == "MNLI":
            files = {"train.tsv": train, "dev_matched.tsv": dev, "dev_mismatched.tsv": dev}
        (root / name).mkdir(parents=True)
        for file, line in files.items():
            (root / name / file).write_text("\n".join(filter(None, [header, line])) + "\n", encoding="utf-8")


def test_every_task_is_read_by_its_own_header(tmp_path):
    write_glue(tmp_path / "GLUE")
    found = glue.find_tasks(str(tmp_path / "GLUE"))
    assert list(found) == list(LINES)
    rows = {name: glue.read_tsv(path / "train.tsv", glue.GLUE[name])[0][0] for name, path in found.items()}
    assert rows["CoLA"] == (("Our friends won't buy this.",), 1)
    assert rows["SST-2"] == (("hide new secretions ",), 0)
    assert rows["MRPC"] == (("Amrozi said", 'He "said'), 1)
    assert rows["QQP"] == (("How is it?", "How?"), 0)
    assert rows["STS-B"] == (("A plane.", "An air plane."), 5.0)
    assert rows["MNLI"] == (("Conceptually cream", "Product"), 1)
    assert rows["QNLI"] == (("When did it?", "In 1979."), 0)
    assert rows["RTE"] == (("No weapons.", "Weapons."), 1)
    quoted = glue.read_tsv(found["CoLA"] / "dev.tsv", glue.GLUE["CoLA"])
    assert quoted == ([(('They drank the "pub.',), 0)], 0)  # one quotation mark opens nothing
    assert list(glue.find_tasks(str(tmp_path / "GLUE" / "RTE"))) == ["RTE"]


def test_broken_and_unlabeled_lines_are_counted(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\n2\ta\tb\t-\n\n")
    assert glue.read_tsv(path, glue.GLUE["RTE"]) == ([(("a", "b"), 0)], 2)
    path.write_text("index\tsentence1\tlabel\n0\ta\tentailment\n")
    with pytest.raises(UserError, match="no column sentence2"):
        glue.read_tsv(path, glue.GLUE["RTE"])
    path.write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t?\n")
    with pytest.raises(UserError, match=r"no line of .* has a label"):
        glue.read_tsv(path, glue.GLUE["RTE"])


def sentiment(root: Path, task: str = "SST-2") -> Path:
    """Texts in which one word decides, as SST-2 or as RTE."""
    draw = random.Random(0)
    folder = root / "GLUE" / task
    folder.mkdir(parents=True)
    for name, num in (("train", 160), ("dev", 60)):
        lines = ["sentence\tlabel" if task == "SST-2" else "index\tsentence1\tsentence2\tlabel"]
        for i in range(num):
            words = draw.choices(WORDS[2:], k=5)
            words[draw.randrange(5)] = "good" if i % 2 else "bad"
            text = " ".join(words)
            lines.append(
                f"{text}\t{i % 2}"
                if task == "SST-2"
                else f"{i}\t{text}\tit was good\t{'entailment' if i % 2 else 'not_entailment'}"
            )
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder.parent


@pytest.mark.parametrize("task", ["SST-2", "RTE"])
def test_a_small_bart_learns_what_one_word_decides(bart, tmp_path, task):
    metrics = glue.evaluate(bart, str(sentiment(tmp_path, task)), OPTIONS)
    assert metrics[f"{task}/majority"] == 0.5
    assert metrics[f"{task}/acc"] > 0.9
    assert metrics["average"] == metrics[f"{task}/acc"]
    assert metrics["CoLA"].startswith("skipped: ")
    assert "average_vlkd" not in metrics


def test_the_seed_says_it_all(bart, tmp_path):
    data = str(sentiment(tmp_path))
    short = Options(epochs=1, batch=32, lr=1e-3, longest=16)
    torch.manual_seed(1)
    first = glue.evaluate(bart, data, short)
    state = torch.random.get_rng_state()
    assert glue.evaluate(bart, data, short) == first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_metrics_are_their_definitions():
    draw = np.random.default_rng(0)
    truth, said = draw.integers(0, 2, 50), draw.integers(0, 2, 50)
    tp, fp, fn, tn = (int(((truth == a) & (said == b)).sum()) for a, b in ((1, 1), (0, 1), (1, 0), (0, 0)))
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue.METRICS["mcc"](truth, said) == pytest.approx((tp * tn - fp * fn) / below)
    assert glue.METRICS["f1"](truth, said) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert glue.METRICS["acc"](truth, said) == (tp + tn) / 50
    x, y = draw.normal(size=50), draw.normal(size=50)
    assert glue.METRICS["pearson"](x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [np.argsort(np.argsort(one)) for one in (x, y)]
    assert glue.METRICS["spearman"](x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_stsb_is_a_regression(bart, tmp_path):
    folder = tmp_path / "STS-B"
    folder.mkdir()
    header = LINES["STS-B"][0]
    lines = [f"{i}\tg\tf\ty\t0\tn\tn\t{'good ' * (i % 6)}film\tfilm\t{i % 6}.000" for i in range(120)]
    (folder / "train.tsv").write_text("\n".join([header, *lines]))
    (folder / "dev.tsv").write_text("\n".join([header, *lines[:30]]))
    metrics = glue.evaluate(bart, str(folder), OPTIONS)
    assert metrics["STS-B/pearson"] > 0.9
    assert metrics["average"] == (metrics["STS-B/pearson"] + metrics["STS-B/spearman"]) / 2


def test_the_learning_rate_rises_for_an_epoch_and_falls_to_nothing():
    rates = [Options(epochs=4, lr=1.0).rate(step, 5) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([(20 - step) / 15 for step in range(5, 20)])
    assert max(Options(epochs=1, lr=1.0).rate(step, 20) for step in range(20)) == 1.0


# ----------------------------------------------------------------------------------------------------
# XSUM

DOCUMENTS = [("the film was good . \u00a0so good", "a good film"), ("it was bad", "a bad plot")]


def write_bbc(root: Path) -> None:
    """XSum's own files: sections marked by [SN]."""
    (root / "bbc-summary-data").mkdir(parents=True)
    for i, (document, summary) in enumerate(DOCUMENTS):
        parts = {
            "URL": f"http://web.archive.org/{i}",
            "TITLE": "A title",
            "FIRST-SENTENCE": summary,
            "RESTBODY": document,
        }
        text = "\n\n".join(f"[SN]{name}[SN]\n{part}" for name, part in parts.items()) + "\n"
        (root / "bbc-summary-data" / f"{i}.summary").write_text(text, encoding="utf-8")
    split = {"train": ["0", "1"], "validation": [], "test": ["1", "404"]}
    (root / xsum.SPLIT_FILE).write_text(json.dumps(split))


def test_xsum_is_read_in_its_three_forms(tmp_path):
    write_bbc(tmp_path / "bbc")
    expected = [((" ".join(document.split()),), summary) for document, summary in DOCUMENTS]
    assert xsum.read_split(str(tmp_path / "bbc"), "train") == expected
    assert (
        xsum.read_split(str(tmp_path / "bbc"), "test") == expected[1:]
    )  # a file that is not there is left out
    (tmp_path / "train.source").write_text(
        "".join(f"{document}\n" for document, _ in DOCUMENTS), encoding="utf-8"
    )
    (tmp_path / "train.target").write_text("".join(f"{summary}\n" for _, summary in DOCUMENTS))
    assert xsum.read_split(str(tmp_path), "train") == [
        ((document,), summary) for document, summary in DOCUMENTS
    ]
    (tmp_path / "train.target").write_text("one line\n")
    with pytest.raises(UserError, match="2 lines"):
        xsum.read_split(str(tmp_path), "train")
    lines = [
        json.dumps({"document": document, "summary": summary, "id": "1"}) for document, summary in DOCUMENTS
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    assert len(xsum.read_split(str(tmp_path), "test")) == 2
    with pytest.raises(UserError, match="no XSUM at"):
        xsum.read_split(str(tmp_path / "bbc" / "bbc-summary-data"), "train")


def test_a_small_bart_learns_to_summarize(bart, tmp_path, monkeypatch):
    """Two documents learned by heart: ROUGE by rouge-score, of what was written."""
    rouge = pytest.importorskip("rouge_score.rouge_scorer")
    monkeypatch.setattr(xsum, "SHORTEST", 1)
    monkeypatch.setattr(xsum, "LONGEST", 8)
    for split in ("train", "test"):
        times = 24 if split == "train" else 1
        (tmp_path / f"{split}.source").write_text(
            "".join("the film was good so good\nit was bad\n" for _ in range(times))
        )
        (tmp_path / f"{split}.target").write_text("".join("a good film\na bad plot\n" for _ in range(times)))
    options = Options(epochs=8, batch=8, lr=1e-2, label_smoothing=0.1, longest=16)
    metrics = xsum.evaluate(bart, str(tmp_path), options)
    train, test = xsum.read_split(str(tmp_path), "train"), xsum.read_split(str(tmp_path), "test")
    said = xsum.summaries(bart, train, test, options)
    scorer = rouge.RougeScorer(["rouge2"], use_stemmer=True)
    theirs = [
        scorer.score(truth, text)["rouge2"].fmeasure for (_, truth), text in zip(test, said, strict=True)
    ]
    assert metrics["ROUGE_2"] == pytest.approx(sum(theirs) / 2)
    assert metrics["ROUGE_1"] > 0.8
    assert metrics["num_different"] == 2


# ----------------------------------------------------------------------------------------------------
# Held-out text


def test_three_tokens_of_twenty_are_hidden():
    hidden = text_loss.holes(202)
    assert sum(hidden) == 30
    assert not hidden[0]
    assert not hidden[-1]
    ids = text_loss.masked_ids(list(range(100, 302)), 4)
    assert ids.count(4) == 10
    assert len(ids) == 202 - 30 + 10
    assert text_loss.masked_ids([0, 7, 8, 2], 4) == [0, 7, 8, 2]


def test_text_loss_is_the_mean_over_tokens(bart, tmp_path):
    from transformers import AutoTokenizer, BartForConditionalGeneration

    texts = [" ".join(WORDS * 3), "the film was good", " ".join(WORDS[::-1] * 2)]
    (tmp_path / "texts.txt").write_text("\n".join([*texts, texts[0]]) + "\n")
    metrics = text_loss.evaluate(bart, str(tmp_path / "texts.txt"))
    model, tokenizer = (
        BartForConditionalGeneration.from_pretrained(bart).eval(),
        AutoTokenizer.from_pretrained(bart),
    )
    total, masked = [], []
    for text in texts:  # one at a time: no padding
        ids = tokenizer(text)["input_ids"]
        source = torch.tensor([text_loss.masked_ids(ids, tokenizer.mask_token_id)])
        logits = model(input_ids=source, labels=torch.tensor([ids])).logits[0]
        losses = cross_entropy(logits, torch.tensor(ids), reduction="none").tolist()
        total += losses
        masked += [loss for loss, hidden in zip(losses, text_loss.holes(len(ids)), strict=True) if hidden]
    assert metrics["nll_per_token"] == pytest.approx(sum(total) / len(total), rel=1e-5)
    assert metrics["nll_per_masked_token"] == pytest.approx(sum(masked) / len(masked), rel=1e-5)
    assert (metrics["num_texts"], metrics["num_tokens"]) == (3, len(total))


def test_what_is_no_language_model_is_one_line(tmp_path):
    (tmp_path / "texts.txt").write_text("a text\n")
    with pytest.raises(UserError, match="no transformers folder"):
        text_loss.evaluate(str(tmp_path), str(tmp_path / "texts.txt"))
