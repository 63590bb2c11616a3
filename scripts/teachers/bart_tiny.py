"""Pretrain a small BART by text infilling, as a language model for VLKD on a laptop.

    python -m scripts.teachers.bart_tiny                     # -> models/bart-tiny, a transformers folder

The text comes from local sources: Python's language reference, the docstrings of the standard library, captions of drawn
scenes, and the public-domain captions (openclipart) of the training split of data/demo if it exists. The tokenizer is a
byte-level BPE trained on this text; 30 % of the words are masked, as in BART. Training takes less than half an hour on
one core and resumes from the last checkpoint.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.datasets.prose import docstrings, is_prose, sentences

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from scripts.datasets import scenes as prepare_scenes
from scripts.datasets.scene_questions import Tokens, questions_of, usable
from scripts.datasets.scenes import Scene
from student.models.seq2seq.infilling import infill
from student.models.seq2seq.texts import Marks, marks_of, padded, word_starts

if TYPE_CHECKING:
    from transformers import BartForConditionalGeneration, PreTrainedTokenizerFast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # in BART's order: ids 0 to 4
SHAPE: dict[str, Any] = {
    "d_model": 128,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 128,
}
SHARE = 0.3  # fraction of masked words, as in BART's pretraining; VLKD uses 0.15
SCENES_SEED, HELD_OUT = 4, 0.02


def documentation() -> list[str]:
    """Return the distinct pieces of prose in the language reference and the standard library."""
    from pydoc_data.topics import topics

    texts = itertools.chain(topics.values(), docstrings(Path(sysconfig.get_path("stdlib"))))
    return list(dict.fromkeys(piece for text in texts for piece in sentences(text) if is_prose(piece)))


def scene_texts(num: int) -> list[str]:
    """Return captions of drawn scenes and questions with answers, most of them after a caption that answers them."""
    texts = []
    for i in range(num):
        rng = random.Random(f"{SCENES_SEED}-{i}")
        scene = prepare_scenes.draw_scene_values(rng)
        first, second = prepare_scenes.captions_of(scene, rng)
        texts += [first, second]
        if usable(scene) and rng.random() < 0.5:
            item = rng.choice(questions_of(scene, rng))
            shapes = [thing["shape"] for thing in scene["objects"]]
            answer = item["answer_choices"][item["answer_label"]]
            texts.append(f"{first} {spoken(item['question'], shapes)} Answer: {spoken(answer, shapes)}")
        context = f"{first} " if rng.random() < 0.7 else ""
        question, answer = short_question(scene, rng)
        texts.append(f"{context}{question} Answer: {answer}.")
    return texts


def short_question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a question and its one-word answer."""
    thing = rng.choice(scene["objects"])
    shapes = [other["shape"] for other in scene["objects"]]
    absent = rng.choice([shape for shape in prepare_scenes.SHAPES if shape not in shapes])
    return rng.choice(
        [
            (f"What color is the {thing['shape']}?", thing["color"]),
            (f"Which shape is {thing['color']}?", thing["shape"]),
            (f"Is there a {thing['shape']} in the picture?", "yes"),
            (f"Is there a {absent} in the picture?", "no"),
        ]
    )


def spoken(words: Tokens, shapes: list[str]) -> str:
    """Convert tokens of VCR to text that refers to objects by their shape."""
    text = " ".join(shapes[word[0]] if isinstance(word, list) else str(word) for word in words)
    return re.sub(r" ([?.,])", r"\1", text)


def demo_captions(folder: Path) -> list[str]:
    """Return the public-domain captions of the training split, or none if the folder does not exist."""
    files = sorted(folder.glob("train/*/clipart_*.txt"))
    return list(
        dict.fromkeys(
            line.strip() for file in files for line in file.read_text().splitlines() if line.strip()
        )
    )


def train_tokenizer(texts: list[str], size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE with the special tokens of BART, as a tokenizer of transformers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=SHAPE["max_position_embeddings"],
    )


def make_batch(
    rows: list[list[int]], marks: Marks, starts: np.ndarray, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Return a batch of masked texts for BartForConditionalGeneration.

    Args:
        rows: token ids of each text.
        marks: ids of the special tokens.
        starts: for each token of the vocabulary, whether it starts a word.
        rng: source of the masks.
    """
    masked = [
        [marks.begin, *infill(row, starts[row].tolist(), marks.mask, rng, share=SHARE), marks.end]
        for row in rows
    ]
    whole = padded([[marks.begin, *row, marks.end] for row in rows], marks.pad)
    source = padded(masked, marks.pad)
    return {
        "input_ids": source,
        "attention_mask": (source != marks.pad).long(),
        "labels": whole.masked_fill(whole == marks.pad, -100),
    }


def held_out_loss(
    model: "BartForConditionalGeneration", rows: list[list[int]], marks: Marks, starts: np.ndarray
) -> float:
    """Return the mean loss per token on held-out texts, with the same masks in every call."""
    rng, losses = np.random.default_rng(1), []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            losses.append(model(**make_batch(rows[start : start + 64], marks, starts, rng)).loss.item())
    model.train()
    return sum(losses) / len(losses)


def pretrain(out: Path, texts: list[str], *, steps: int, batch: int, lr: float, vocabulary: int) -> None:
    """Train the model and write its folder. A checkpoint is written next to `out` every 250 steps."""
    from transformers import BartConfig, BartForConditionalGeneration

    rng = np.random.default_rng(0)
    texts = [texts[i] for i in rng.permutation(len(texts))]
    tokenizer = train_tokenizer(texts, vocabulary)
    core, max_length = tokenizer.backend_tokenizer, SHAPE["max_position_embeddings"]
    marks, starts = marks_of(core), word_starts(core)
    rows = [text.ids[: max_length - 2] for text in core.encode_batch(texts, add_special_tokens=False)]
    held, rows = rows[: int(HELD_OUT * len(rows))][:512], rows[int(HELD_OUT * len(rows)) :]
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), dropout=0.0, **SHAPE))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(rows):,} texts, {sum(map(len, rows)):,} tokens; {size / 1e6:.2f}M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    partial, first_step = out.with_name(out.name + ".checkpoint"), 0
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    began = time.monotonic()
    for step in range(first_step, steps):
        rng = np.random.default_rng([2, step])
        # Texts of similar length need little padding
        pool = sorted((rows[i] for i in rng.integers(len(rows), size=4 * batch)), key=len)
        start = int(rng.integers(4)) * batch
        warm = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = (
            lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        )
        loss = model(**make_batch(pool[start : start + batch], marks, starts, rng)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            held_loss = held_out_loss(model, held, marks, starts)
            print(
                json.dumps(
                    {
                        "step": step + 1,
                        "loss": round(loss.item(), 4),
                        "held_out": round(held_loss, 4),
                        "seconds": round(time.monotonic() - began),
                    }
                ),
                flush=True,
            )
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                partial.with_suffix(".new"),
            )
            os.replace(partial.with_suffix(".new"), partial)
    write_folder(model, tokenizer, out)
    partial.unlink(missing_ok=True)


def write_folder(
    model: "BartForConditionalGeneration", tokenizer: "PreTrainedTokenizerFast", out: Path
) -> None:
    """Write a BART folder of transformers with weights in float16."""
    folder = out.with_name(out.name + ".partial")
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    os.replace(folder, out)


def main() -> None:
    """Collect the text and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("models/bart-tiny"))
    parser.add_argument(
        "--demo", type=Path, default=Path("data/demo"), help="folder of training captions, if it exists"
    )
    parser.add_argument("--scenes", type=int, default=12000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--vocabulary", type=int, default=4096)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: remove it first")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    texts = documentation() + scene_texts(options.scenes) + 4 * demo_captions(options.demo)
    pretrain(
        options.out,
        texts,
        steps=options.steps,
        batch=options.batch_size,
        lr=options.lr,
        vocabulary=options.vocabulary,
    )


if __name__ == "__main__":
    main()
