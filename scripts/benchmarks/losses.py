"""Benchmark the losses of clip_kd (task, CRD, ICL, GD) in tiles against whole matrices, each in a new process.

    python -m scripts.benchmarks.losses FORM PAIRS RUNS    one measurement; prints a JSON line

FORM is `whole` or `tiled` (task and CRD share their tiles, as in the recipe). Memory is the peak of forward and backward
pass without the embeddings, including gradients.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scripts.benchmarks.report import HEAD, Figures, Line, compare, judge, number, resident
from student import losses
from student.losses import tiled
from teachercache.core.process import keep_memory
from teachercache.core.progress import say

DIM = 512
JUDGED = 8192  # number of pairs at which the bars apply
FORMS = ("whole", "tiled")
SHARE = 0.4  # fraction of the machine's memory that whole matrices may use


def total(form: str, V: Tensor, S: Tensor, a: Tensor, V_T: Tensor, S_T: Tensor, a_T: Tensor) -> Tensor:
    """Return the sum of the terms. The scale g of ICL is a.

    Args:
        form: "whole" or "tiled".
        V: student image embeddings, unit vectors [pairs, DIM].
        S: student text embeddings.
        a: logit scale of the student.
        V_T: teacher image embeddings.
        S_T: teacher text embeddings.
        a_T: logit scale of the teacher.
    """
    student, teacher = (V, S, a), (V_T, S_T, a_T)
    tiled.TILED_FROM = dict.fromkeys(tiled.TILED_FROM, 1 if form != "whole" else sys.maxsize)
    task, crd = losses.clip_crd_losses(*student, *teacher)
    return task + crd + losses.icl_loss(V, S, V_T, S_T, a) + 1e8 * losses.gd_loss(*student, *teacher)


def once(form: str, pairs: int) -> Callable[[], dict[str, float]]:
    """Return a function that runs forward and backward pass: seconds, value of the loss, and a sum of gradients."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    V, S, V_T, S_T = (normalize(torch.randn(pairs, DIM, device=device)) for _ in range(4))
    a, a_T = torch.tensor(14.3, device=device, requires_grad=True), torch.tensor(50.0, device=device)
    V.requires_grad_(), S.requires_grad_()

    def step() -> dict[str, float]:
        V.grad = S.grad = a.grad = None
        begin = time.perf_counter()
        loss = total(form, V, S, a, V_T, S_T, a_T)
        loss.backward()
        assert V.grad is not None
        value, slope = loss.item(), V.grad.abs().sum().item()  # waits for an accelerator
        return {"seconds": time.perf_counter() - begin, "value": value, "slope": slope}

    return step


def measure(form: str, pairs: int, runs: int) -> dict[str, float]:
    """Return the last of several runs in this process, and the peak memory of the first run in bytes."""
    keep_memory()
    once(form, 64)()  # load libraries before the baseline
    step = once(form, pairs)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    figures = step()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
    for _ in range(runs - 1):
        figures = step()
    return figures | {"bytes": peak - before}


def in_process(form: str, pairs: int, runs: int) -> dict[str, float] | str:
    """Return `measure` of a new process, or the last line of its error output."""
    say(f"{form}, {pairs} pairs")
    process = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.losses", form, str(pairs), str(runs)],
        capture_output=True,
        text=True,
    )
    if process.returncode:
        return (process.stderr.strip().splitlines() or [f"exit {process.returncode}"])[-1]
    return json.loads(process.stdout.splitlines()[-1])


def bench_losses(options: argparse.Namespace) -> list[str]:
    """Return the table of all sizes. Whole matrices are skipped if they do not fit into memory."""
    lines: list[Line] = []
    peaks: dict[int, float] = {}
    whole: float = 20 * 4  # bytes per element of the matrix of pairs; an estimate until measured
    for pairs in sorted(options.loss_rows):
        need = whole * pairs**2
        fits = need < SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        forms = FORMS if fits else ("tiled",)
        seconds, memory, errors = alternate_processes(forms, pairs, options.rounds)
        if errors:
            lines.append(Line(f"{pairs:,} pairs", f"skipped: {errors}", "-"))
            continue
        peaks[pairs] = max(memory["tiled"])
        if not fits:
            skipped = f"skipped: needs ~{need / 2**30:.0f} GB"
            lines.append(Line(f"{pairs:,} pairs, time", f"tiled {number(seconds['tiled'][0])} s", skipped))
            lines.append(Line(f"{pairs:,} pairs, memory", f"tiled {number(peaks[pairs])} MB", skipped))
            continue
        whole = max(memory["whole"]) * 1e6 / pairs**2
        for form in forms[1:]:
            judged = pairs == JUDGED and form == "tiled"
            for what, figures, unit, bar in (
                ("time", seconds, "s", "<= 1.0"),
                ("memory", memory, "MB", "<= 0.05"),
            ):
                title, bar = f"{pairs:,} pairs, {form}, {what}", bar if judged else "-"
                lines.append(compare(title, figures, form, "whole", unit=unit, other="whole", bar=bar))
    lines += growth(peaks)
    note = (
        f"task + CRD + ICL + GD, width {DIM}, float32, forward and backward pass; memory: the peak without the "
        "embeddings; growth of memory: relative to the previous size, 1 if linear"
    )
    return [*HEAD, *map(str, lines), "", f"- {note}"]


def alternate_processes(forms: tuple[str, ...], pairs: int, rounds: int) -> tuple[Figures, Figures, str]:
    """Measure seconds and megabytes of each form in alternation. Above JUDGED one cold run takes minutes."""
    seconds: Figures = {form: [] for form in forms}
    memory: Figures = {form: [] for form in forms}
    small = pairs <= JUDGED
    for _ in range(max(1, rounds // 3) if small else 1):
        values = []
        for form in forms:
            figures = in_process(form, pairs, 2 if small else 1)
            if isinstance(figures, str):
                return seconds, memory, f"{form}: {figures}"
            seconds[form].append(figures["seconds"])
            memory[form].append(figures["bytes"] / 1e6)
            values.append((figures["value"], figures["slope"]))
        difference = max(
            abs(x / first - 1) for pair in values for x, first in zip(pair, values[0], strict=True)
        )
        if difference > 1e-4:
            return seconds, memory, f"the forms disagree by {difference:.1e}"
    return seconds, memory, ""


def growth(peaks: dict[int, float]) -> list[Line]:
    """Return lines with the memory of tiles per pair, relative to the previous size."""
    lines, sizes = [], sorted(peaks)
    for few, many in itertools.pairwise(sizes):
        ratio = peaks[many] / peaks[few] * few / many
        title = f"memory of tiles, {many:,} pairs against {few:,}, per pair"
        ours, theirs = (f"{peaks[pairs] * 1e6 / pairs:,.0f} bytes" for pairs in (many, few))
        bar = "<= 1.1" if few >= JUDGED else "-"  # at smaller sizes the constant tile memory dominates
        lines.append(Line(title, ours, theirs, f"{ratio:.3f}", bar, judge(ratio, bar)))
    return lines


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
