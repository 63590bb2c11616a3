"""Read a cache with zarr, numpy and PyTorch alone: no part of this project is imported.

    python examples/read_a_cache.py caches/demo/clip-lite.zarr

The format is specified in docs/reference/cache_format.md.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import zarr
from torch.utils.data import DataLoader, Dataset


class CachedRows(Dataset):
    """The usable rows of a cache: a key and the vector of each."""

    def __init__(self, cache: str, field: str) -> None:
        group = zarr.open_group(cache, mode="r")
        self.vectors, self.keys = group[field], group["key"]
        self.rows = np.flatnonzero(group["valid"][:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> list[tuple[str, torch.Tensor]]:
        """Read the rows of a whole batch at once, in the order of the cache: much faster than one by one."""
        rows = np.sort(self.rows[places])
        vectors = torch.from_numpy(np.asarray(self.vectors.oindex[rows], np.float32))
        return list(zip(map(str, self.keys.oindex[rows]), vectors, strict=True))


def check_complete(cache: Path, attributes: dict) -> None:
    """Stop if the build of a local cache is not finished: each block has a record that is written last."""
    blocks = -(-attributes["rows"] // attributes["block_rows"])
    records = [json.loads(path.read_text()) for path in (cache / "done").glob("*.json")]
    if attributes["format"] != 2 or len(records) < blocks:
        raise SystemExit(
            f"{cache} is of another format, or {blocks - len(records)} of {blocks} blocks are missing"
        )


def main() -> None:
    """Print what a cache holds, and how similar its rows are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", help="the folder of a cache")
    parser.add_argument("--field", default="image_emb")
    options = parser.parse_args()

    group = zarr.open_group(options.cache, mode="r")
    attributes = dict(group.attrs)
    check_complete(Path(options.cache), attributes)
    teacher = attributes["spec"]
    print(f"{attributes['rows']} rows by {teacher['name']}; view {teacher['view']}")
    for name in ("key", "valid", *(field["name"] for field in teacher["fields"])):
        print(f"  {name} {group[name].shape} {group[name].dtype}")

    unit = []
    for _, vectors in DataLoader(CachedRows(options.cache, options.field), batch_size=256):
        unit.append(torch.nn.functional.normalize(vectors, dim=1))
    unit = torch.cat(unit)
    print(f"mean cosine of two rows: {(unit.mean(0) ** 2).sum():.3f}")


if __name__ == "__main__":
    main()
