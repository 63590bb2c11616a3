"""The options of `tc build` as a record, chosen for this machine."""

from typing import Any

from teachercache.build.loop import BuildOptions
from teachercache.core.device import pick_device, pick_precision
from teachercache.core.errors import UserError
from teachercache.core.process import check_workers, default_workers
from teachercache.data.views import parse_augment


def choose_options(
    *,
    views: int,
    augment: tuple[str, ...],
    workers: int | None,
    precision: str,
    device: str,
    **others: Any,
) -> BuildOptions:
    """Check the options of `tc build`, and choose device, precision and workers for this machine.

    Args:
        views: Augmented views per image, 0 for none.
        augment: KEY=VALUE settings of the views.
        workers: Decoding processes; None for the spare cores.
        precision: auto, fp32, bf16 or fp16.
        device: auto or a torch device.
        **others: The other members of `BuildOptions`.

    Raises:
        UserError: An option that this machine or the others do not allow.
    """
    drawn = parse_augment(augment)
    check_workers(workers or 0, "--workers ")
    if augment and not views:
        raise UserError("--augment is for stored views: add --views 4, or leave --augment away")
    device = pick_device(device)
    return BuildOptions(
        workers=default_workers() if workers is None else workers,
        device=device,
        precision=pick_precision(precision, device),
        views=views,
        augment=drawn,
        **others,
    )
