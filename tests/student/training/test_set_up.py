"""Activation checkpointing and torch.compile: the same losses, less memory; and the reason where they are off."""

import dataclasses
import functools
import logging
import shutil

import pytest
import torch
from small import read_lines, train_here, zero_noise
from torch import nn

from student.models.single_stream.model import SIZES, Shape, SingleStream
from student.models.two_tower.loading import build_two_tower
from student.models.two_tower.model import add_block_outputs, add_masked_output
from student.recipe import Run
from student.training import engine
from student.training.engine import set_up_student

MASKED = ("--set", "mfd=10")


def run_of(**settings) -> Run:
    """A run with some settings."""
    return Run(data="", cache="", out="", device="cpu", **settings)


@zero_noise
@pytest.mark.parametrize(
    ("looking", "words"),
    [((), ()), (MASKED, ("--micro-batch", 4)), (MASKED, ("--set", "run.zero=3"))],
    ids=["plain", "mfd-micro", "mfd-zero3"],
)
def test_activation_checkpointing_changes_no_loss(looking, words, squares, cache, tmp_path):
    for name, setting in (("plain", "false"), ("again", "true")):
        settings = (*looking, *words, "--set", f"run.grad_checkpointing={setting}")
        assert train_here(squares, cache, tmp_path / name, "--steps", 3, *settings) == 0
    plain, again = read_lines(tmp_path / "plain"), read_lines(tmp_path / "again")
    for a, b in zip(plain, again, strict=True):
        assert a == {name: pytest.approx(value, rel=1e-6) for name, value in b.items()}


def kept_bytes(student: nn.Module) -> int:
    """Bytes that a forward keeps for its backward, parameters left out."""
    own = {parameter.data_ptr() for parameter in student.parameters()}
    sizes = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = {"image": torch.randn(16, 3, 64, 64), "text": torch.ones(16, 16, dtype=torch.int64)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = student.train()(batch)
    assert outputs["image"].requires_grad
    return sum(sizes.values())


def test_activation_checkpointing_keeps_less():
    plain, again = build_two_tower("vit-tiny"), build_two_tower("vit-tiny")
    set_up_student(plain, run_of())
    set_up_student(again, run_of(grad_checkpointing=True))
    assert kept_bytes(again) < 0.5 * kept_bytes(plain)


def test_why_checkpointing_is_off(capsys):
    from transformers import BertConfig

    config = BertConfig(vocab_size=50, **SIZES["micro"])
    student = SingleStream(config, Shape("uniter", region_width=8, inputs=1, classes=3))
    set_up_student(student, run_of(grad_checkpointing=True))
    assert capsys.readouterr().err == "run.grad_checkpointing is off: SingleStream has no blocks for it\n"
    student = build_two_tower("vit-micro")
    add_block_outputs(student, ["image_block_0"])
    set_up_student(student, run_of(grad_checkpointing=True))
    assert capsys.readouterr().err == "run.grad_checkpointing is off: hidden uses hooks on the blocks\n"
    assert not student.model.visual.transformer.grad_checkpointing


def test_why_a_student_is_not_compiled(monkeypatch, capsys):
    def said(student: nn.Module, **settings) -> str:
        set_up_student(student, run_of(compile=True, **settings))
        return capsys.readouterr().err

    student = build_two_tower("vit-micro")
    compiled = []
    monkeypatch.setattr(type(student), "compile", lambda self: compiled.append(self))
    assert "run.compile is off: ZeRO 3" in said(student, zero=3)
    for looks in (
        lambda one: add_masked_output(one, 0.5),
        lambda one: add_block_outputs(one, ["image_block_0"]),
    ):
        looking = build_two_tower("vit-micro")
        looks(looking)
        assert "run.compile is off: mfd and hidden" in said(looking)
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert said(student) == "run.compile is off: no C++ compiler is installed\n"
    assert compiled == []
    monkeypatch.undo()
    monkeypatch.setattr(type(student), "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    assert said(student) == ""
    assert compiled == [student]
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert "the package triton is missing" in engine.reason_against_compiling(
        student, dataclasses.replace(run_of(), device="cuda")
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_student_has_the_same_losses(squares, cache, tmp_path, capsys, monkeypatch):
    """Traced as a whole, forward and backward; generating C++ besides would take forty seconds and is torch's."""
    whole, compiled = torch.nn.Module.compile, []
    traced = functools.partial(whole, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(traced(self)))
    for name, setting in (("plain", "false"), ("compiled", "true")):
        words = ("--steps", 3, "--set", f"run.compile={setting}")
        assert train_here(squares, cache, tmp_path / name, *words) == 0
    for a, b in zip(read_lines(tmp_path / "plain"), read_lines(tmp_path / "compiled"), strict=True):
        assert a == {key: pytest.approx(value, rel=1e-4) for key, value in b.items()}
    assert len(compiled) == 1
    assert "run.compile is off" not in capsys.readouterr().err


def test_messages_of_deepspeed_below_errors_are_dropped_whatever_level_its_import_sets():
    logger, seen = logging.getLogger("DeepSpeed"), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    level = logger.level
    try:
        with engine.quiet_deepspeed():
            with engine.quiet_deepspeed():
                pass
            logger.setLevel(logging.INFO)
            logger.info("dropped")
            logger.error("printed")
        logger.info("printed again")
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert seen == ["printed", "printed again"]
