"""Choose the device and the compute precision."""

from typing import NamedTuple

from teachercache.core.errors import UserError
from teachercache.core.process import local_rank


class Precision(NamedTuple):
    """The dtype of a forward pass.

    Attributes:
        dtype: Its name.
        reason: Why it was chosen.
        proposed: It is fast on this device, and is to be measured before it is used (`tc build`).
    """

    dtype: str
    reason: str
    proposed: bool = False


def pick_device(name: str = "auto") -> str:
    """Return a torch device: the named one, or cuda if there is one, or cpu."""
    import torch

    if name != "auto":
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {name}: this machine has no CUDA device; try --device cpu")
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {name}: not a device; try cpu, cuda or cuda:0") from error
        return name
    return f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"


def pick_precision(name: str, device: str) -> Precision:
    """Return the dtype of the forward pass: the named one, or the fastest one of the device as a proposal."""
    import torch

    named = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if name in named:
        if name == "fp16" and device == "cpu":
            raise UserError("--precision fp16 does not work on the CPU: try fp32 or bf16")
        return Precision(named[name], "requested")
    if name != "auto":
        raise UserError(f"--precision {name}: choose from auto, fp32, bf16, fp16")
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return Precision("bfloat16", "the GPU computes bf16 natively", proposed=True)
        return Precision("float16", "the GPU is older than Ampere", proposed=True)
    return Precision("float32", "the CPU is exact and not slower in fp32")
