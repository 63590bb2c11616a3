"""clip_kd's losses (task, CRD, ICL, GD) in tiles against whole matrices, each in a process of its own. Not for steps.

    python -m scripts.benchmarks.losses FORM PAIRS RUNS    one measurement; prints a JSON line

FORM is `whole` or `tiled` (task and CRD from one set of tiles, as the recipe has them). Memory is what forward
and backward take at the peak beyond the embeddings, gradients included.
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
JUDGED = 8192  # pairs at which DESIGN.md sets its bars
FORMS = ("whole", "tiled")
SHARE = 0.4  # of the machine's memory that whole matrices may take


def total(form: str, V: Tensor, S: Tensor, a: Tensor, V_T: Tensor, S_T: Tensor, a_T: Tensor) -> Tensor:
    """The sum of the terms; g of ICL is a."""
    student, teacher = (V, S, a), (V_T, S_T, a_T)
    tiled.TILED_FROM = dict.fromkeys(tiled.TILED_FROM, 1 if form != "whole" else sys.maxsize)
    first = sum(losses.clip_crd_losses(*student, *teacher))
    return first + losses.icl_loss(V, S, V_T, S_T, a) + 1e8 * losses.gd_loss(*student, *teacher)


def once(form: str, pairs: int) -> Callable[[], dict[str, float]]:
    """Forward and backward of the losses, which gives its seconds, its value and a sum of its gradients."""
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
        value, slope = loss.item(), V.grad.abs().sum().item()  # waits for an accelerator
        return {"seconds": time.perf_counter() - begin, "value": value, "slope": slope}

    return step


def measure(form: str, pairs: int, runs: int) -> dict[str, float]:
    """The last of several runs in one process, and bytes at the peak of the first beyond those before it."""
    keep_memory()
    once(form, 64)()  # libraries are loaded
    step = once(form, pairs)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    found = step()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
    for _ in range(runs - 1):
        found = step()
    return found | {"bytes": peak - before}


def in_process(form: str, pairs: int, runs: int) -> dict[str, float] | str:
    """The figures from a fresh process, or the last line of its error."""
    say(f"{form}, {pairs} pairs")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.losses", form, str(pairs), str(runs)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def bench_losses(options: argparse.Namespace) -> list[str]:
    """Every size; whole matrices only where they fit."""
    lines, peaks = [], {}
    whole = 20 * 4  # bytes per pair of pairs, until measured
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
        f"task + CRD + ICL + GD, width {DIM}, float32, forward and backward; memory: the peak beyond the embeddings; "
        "growth of memory: against the size before, 1 where it is linear"
    )
    return [*HEAD, *map(str, lines), "", f"- {note}"]


def alternate_processes(forms: tuple[str, ...], pairs: int, rounds: int) -> tuple[Figures, Figures, str]:
    """Seconds and megabytes of each form in turn; above the judged size once and cold, which takes minutes."""
    seconds: Figures = {form: [] for form in forms}
    memory: Figures = {form: [] for form in forms}
    small = pairs <= JUDGED
    for _ in range(max(1, rounds // 3) if small else 1):
        values = []
        for form in forms:
            found = in_process(form, pairs, 2 if small else 1)
            if isinstance(found, str):
                return seconds, memory, f"{form}: {found}"
            seconds[form].append(found["seconds"])
            memory[form].append(found["bytes"] / 1e6)
            values.append((found["value"], found["slope"]))
        differ = max(
            abs(part / first - 1) for value in values for part, first in zip(value, values[0], strict=True)
        )
        if differ > 1e-4:
            return seconds, memory, f"the forms disagree by {differ:.1e}"
    return seconds, memory, ""


def growth(peaks: dict[int, float]) -> list[Line]:
    """Memory of tiles against the size before, per pair."""
    lines, sizes = [], sorted(peaks)
    for few, many in itertools.pairwise(sizes):
        ratio = peaks[many] / peaks[few] * few / many
        title = f"memory of tiles, {many:,} pairs against {few:,}, per pair"
        each = [f"{peaks[pairs] * 1e6 / pairs:,.0f} bytes" for pairs in (many, few)]
        bar = "<= 1.1" if few >= JUDGED else "-"  # below, tiles of one size are most of it
        lines.append(Line(title, *each, f"{ratio:.3f}", bar, judge(ratio, bar)))
    return lines


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
