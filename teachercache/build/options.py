"""The options of `tc build` as a record, chosen for this machine."""

from teachercache.build.loop import BuildOptions
from teachercache.core.device import pick_device, pick_precision
from teachercache.core.errors import UserError
from teachercache.core.process import default_workers
from teachercache.data.views import parse_augment


def choose_options(
    *,
    limit: int,
    views: int,
    augment: tuple[str, ...],
    batch_size: int,
    workers: int | None,
    precision: str,
    device: str,
    prune: bool,
) -> BuildOptions:
    """Check the options of `tc build`, and choose device, precision and workers for this machine.

    Args:
        limit: Rows, 0 for all.
        views: Augmented views per image, 0 for none.
        augment: KEY=VALUE settings of the views.
        batch_size: Rows per forward pass.
        workers: Decoding processes; None for the spare cores.
        precision: auto, fp32, bf16 or fp16.
        device: auto or a torch device.
        prune: Follow data that lost or changed rows.

    Raises:
        UserError: An option that this machine or the others do not allow.
    """
    drawn = parse_augment(augment)
    if augment and not views:
        raise UserError("--augment is for stored views: add --views 4, or leave --augment away")
    device = pick_device(device)
    return BuildOptions(
        batch_size=batch_size,
        workers=default_workers() if workers is None else workers,
        device=device,
        precision=pick_precision(precision, device),
        views=views,
        augment=drawn,
        prune=prune,
        limit=limit,
    )
