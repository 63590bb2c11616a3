"""How fast a run goes: samples/s, the share of time that waits for data, MFU, memory at its peak. Measures alone."""

import dataclasses
import re
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from student.recipe import Progress, Run

# Dense tensor-core peaks of vendors' data sheets, FLOP/s: bfloat16 with float32 sums, and float32 without TF32.
PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A10G": (70e12, 31e12),
    "A10": (125e12, 31e12),
    "L40S": (362e12, 91e12),
    "L4": (121e12, 30e12),
    "RTX 4090": (165e12, 82e12),
    "RTX 3090": (71e12, 36e12),
}


def device_name(device: str) -> str:
    """The accelerator's name; a CPU's peak is not known."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def peak_flops(device: str, precision: str) -> float | None:
    """FLOP/s that one device could do at best; None where that is not known."""
    name = device_name(device)
    for known, (bfloat16, float32) in PEAKS.items():
        if re.search(rf"\b{known}\b", name):  # a whole word: an L40 is no L4
            tf32 = torch.get_float32_matmul_precision() != "highest"
            return bfloat16 if precision == "bfloat16" else None if tf32 else float32
    return None


def peak_memory(device: str) -> int:
    """Bytes at the peak: allocated on the GPU, else resident in this process without its decoding workers."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss has the parent's peak in it
        return next(
            int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclasses.dataclass
class Speed:
    """Times of the steps since the start or the resume; saving and evaluating are no part of a step."""

    run: Run
    batch: int  # rows of a step over all processes
    steps: int = 0
    waited: float = 0.0  # seconds for data
    computed: float = 0.0  # seconds for everything else
    flops: float = 0.0  # of one step on this device, 0 where unknown or useless
    began: float = 0.0

    def wait(self) -> None:
        """From here on the run waits for data."""
        self.began = time.monotonic()

    def compute(self) -> None:
        """The data is here."""
        now = time.monotonic()
        self.waited, self.began = self.waited + now - self.began, now

    def end_step(self) -> None:
        """The step is done, its values are read."""
        now = time.monotonic()
        self.computed, self.began, self.steps = self.computed + now - self.began, now, self.steps + 1

    def count_products(self, engine: Any, parts: Iterable[Any], progress: Progress) -> None:
        """Count the products of a step, where the device's peak is known, for MFU: three times its forwards.

        What micro-batches and activation checkpoints compute again is no part of it. A compiled student and a live
        teacher are not counted.
        """
        known = peak_flops(self.run.device, self.run.precision) is not None
        if (
            not known
            or self.run.compile
            or self.run.online_teacher
            or engine.module.gradient_teacher is not None
        ):
            return
        from torch.utils.flop_counter import FlopCounterMode

        engine.module.eval()  # which draws no random numbers and keeps no running means
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one operation that nothing counts
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for part in parts:
                engine(part, progress, {})
        torch.backends.mha.set_fastpath_enabled(fast)
        engine.module.train()
        self.flops = 3 * counter.get_total_flops()
        self.began = time.monotonic()  # counting is no part of the step

    def facts(self) -> dict[str, float]:
        """What speed.json holds; the share `mfu` where it is known."""
        seconds = max(self.waited + self.computed, 1e-9)
        found = {
            "seconds_per_step": seconds / max(1, self.steps),
            "samples_per_second": self.steps * self.batch / seconds,
            "data_wait": self.waited / seconds,
            "peak_memory_bytes": peak_memory(self.run.device),
        }
        peak = peak_flops(self.run.device, self.run.precision)
        if self.flops and peak:
            found["mfu"] = self.flops * self.steps / seconds / peak
        return found

    def words(self) -> str:
        """The same for a person."""
        facts = self.facts()
        words = f"{facts['samples_per_second']:,.0f} samples/s, {100 * facts['data_wait']:.0f} % waiting"
        words += f", {facts['peak_memory_bytes'] / 1e9:.1f} GB"
        return words + (f", MFU {100 * facts['mfu']:.0f} %" if "mfu" in facts else "")
