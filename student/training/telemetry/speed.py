"""Measure the speed of a run: samples/s, fraction of time spent waiting for data, MFU, peak memory."""

import dataclasses
import re
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from student.recipe import Batch, Progress, Run
from student.training.step import Engine

# Peak FLOP/s for dense matrices, from the vendors' data sheets: bfloat16 (float32 sums), float32 (no TF32)
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
    """Return the name of the accelerator, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def peak_flops(device: str, precision: str) -> float | None:
    """Return the peak FLOP/s of one device, or None if it is unknown."""
    name = device_name(device)
    for model, (bfloat16, float32) in PEAKS.items():
        if re.search(rf"\b{model}\b", name):  # whole words, because L4 is a prefix of L40S
            tf32 = torch.get_float32_matmul_precision() != "highest"
            return bfloat16 if precision == "bfloat16" else None if tf32 else float32
    return None


def peak_memory(device: str) -> int:
    """Return the peak memory in bytes: allocated on the GPU, or resident in this process (no workers)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # preferred, because ru_maxrss includes the peak of the parent process
        return next(
            int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclasses.dataclass
class Speed:
    """Accumulates the times of the steps since the start or the resume, without saving and evaluating.

    Args:
        run: Settings of the run.
        batch: Rows per step, over all ranks.
        steps: Number of measured steps.
        waited: Seconds spent waiting for data.
        computed: Seconds spent on everything else.
        flops: FLOPs of one step on this device; 0 if unknown.
        began: Time at which the current phase began.
    """

    run: Run
    batch: int
    steps: int = 0
    waited: float = 0.0
    computed: float = 0.0
    flops: float = 0.0
    began: float = 0.0

    def wait(self) -> None:
        """Start to wait for data."""
        self.began = time.monotonic()

    def compute(self) -> None:
        """Start to compute: the data has arrived."""
        now = time.monotonic()
        self.waited, self.began = self.waited + now - self.began, now

    def end_step(self) -> None:
        """End the step: its values have been read."""
        now = time.monotonic()
        self.computed, self.began, self.steps = self.computed + now - self.began, now, self.steps + 1

    def count_products(self, engine: Engine, micro_batches: Iterable[Batch], progress: Progress) -> None:
        """Count the FLOPs of a step for MFU: three times those of its forward pass.

        Recomputation by micro-batches and activation checkpointing is not counted. Nothing is counted if the
        peak of the device is unknown, for a compiled student, or with a teacher in the training process.

        Args:
            engine: The engine of the run.
            micro_batches: The micro-batches of a step.
            progress: Current step and number of steps.
        """
        if (
            peak_flops(self.run.device, self.run.precision) is None
            or self.run.compile
            or self.run.online_teacher
            or engine.module.gradient_teacher is not None
        ):
            return
        from torch.utils.flop_counter import FlopCounterMode

        engine.module.eval()  # draws no random numbers and leaves running means unchanged
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the counter misses its fused operation
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for micro_batch in micro_batches:
                engine(micro_batch, progress, {})
        torch.backends.mha.set_fastpath_enabled(fast)
        engine.module.train()
        self.flops = 3 * counter.get_total_flops()
        self.began = time.monotonic()  # counting is not part of the step

    def facts(self) -> dict[str, float]:
        """Return the content of speed.json; `mfu` is missing if it is unknown."""
        seconds = max(self.waited + self.computed, 1e-9)
        facts = {
            "seconds_per_step": seconds / max(1, self.steps),
            "samples_per_second": self.steps * self.batch / seconds,
            "data_wait": self.waited / seconds,
            "peak_memory_bytes": peak_memory(self.run.device),
        }
        peak = peak_flops(self.run.device, self.run.precision)
        if self.flops and peak:
            facts["mfu"] = self.flops * self.steps / seconds / peak
        return facts

    def summary(self) -> str:
        """Return the facts as a line of text."""
        facts = self.facts()
        line = f"{facts['samples_per_second']:,.0f} samples/s, {100 * facts['data_wait']:.0f} % waiting"
        line += f", {facts['peak_memory_bytes'] / 1e9:.1f} GB"
        return line + (f", MFU {100 * facts['mfu']:.0f} %" if "mfu" in facts else "")
