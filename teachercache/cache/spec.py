"""What a cache promises: fields, the teacher's identity, the layout. Frozen records that were checked; no arrays."""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

from teachercache.core.errors import UserError

FORMAT = 1
DTYPES = ("float16", "float32", "int16", "int32", "int64", "bool")
PAIRED = (
    "diffusion_score",
    "diffusion_score_normalised",
    "unet_feature",
)  # of a text beside its row's picture


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a cache.

    [rows, *shape]; [rows, texts, *shape] where `per` is "text"; [rows, views, *shape] where `per` is "image" and the
    cache holds augmented views.
    """

    name: str
    shape: tuple[int, ...]
    per: str  # "row", "image" or "text"
    dtype: str
    doc: str

    def __post_init__(self):
        if self.per not in ("row", "image", "text"):
            raise ValueError(f"field {self.name}: `per` is 'row', 'image' or 'text', not {self.per!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"field {self.name}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not self.name.isidentifier():
            raise ValueError(f"field name {self.name!r} is not an identifier")

    def copies(self, texts: int, views: int) -> int:
        """How many values a row has: its texts, its views, or 0 where there is one and no axis for it."""
        return {"row": 0, "image": views, "text": texts}[self.per]

    def array_shape(self, rows: int, texts: int, views: int = 0) -> tuple[int, ...]:
        """The shape of the whole array for that many rows, texts per row and stored views (0: the plain picture)."""
        copies = self.copies(texts, views)
        return (rows, copies, *self.shape) if copies or self.per == "text" else (rows, *self.shape)

    def dims(self, views: int = 0) -> tuple[str, ...]:
        """Dimension names, as written into the Zarr metadata."""
        inner = ("dim",) if len(self.shape) == 1 else tuple(f"dim{i}" for i in range(len(self.shape)))
        outer = {"row": ("row",), "text": ("row", "text"), "image": ("row", "view") if views else ("row",)}[
            self.per
        ]
        return (*outer, *inner)


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """A teacher's identity: two teachers with equal specs say the same about the same row."""

    name: str
    weights: str  # what `--weights` was: pretrained, random:SEED or a path
    digest: str  # sha256 of the state dict's names and bytes
    outputs: tuple[str, ...]
    fields: tuple[Field, ...]
    view: Mapping[str, Any]  # how a picture becomes a tensor (open_clip preprocess_cfg)
    tokenizer: Mapping[str, Any]
    constants: Mapping[str, float]  # logit_scale (the parameter, before exp), logit_bias

    def field(self, name: str) -> Field:
        """The field of that name; UserError names those there are."""
        for field in self.fields:
            if field.name == name:
                return field
        names = ", ".join(field.name for field in self.fields)
        raise UserError(f"teacher {self.name} has no field '{name}': choose from {names}")


@dataclasses.dataclass(frozen=True)
class CacheMeta:
    """The attributes of a cache's Zarr group; nothing in it depends on when or where it was built."""

    spec: TeacherSpec
    data: str  # what `--data` was
    manifest: str  # digest of keys, texts and picture files
    rows: int
    texts: int  # texts per row, 0 for pictures alone
    block_rows: int
    precision: str  # dtype that the teacher computed in
    versions: Mapping[str, str]
    views: int = 0  # augmented views per picture, 0 for the plain picture
    augment: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # how views were drawn; {} without views
    limit: int = 0  # what `--limit` was, 0 for all rows
    format: int = FORMAT

    @property
    def num_blocks(self) -> int:
        """Blocks that the rows fill, the last one perhaps in part."""
        return -(-self.rows // self.block_rows)

    def block(self, index: int) -> range:
        """The rows of one block."""
        return range(index * self.block_rows, min((index + 1) * self.block_rows, self.rows))


def to_dict(record: Any) -> dict[str, Any]:
    """A plain dict of JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(record)))


def meta_from_dict(values: Mapping[str, Any]) -> CacheMeta:
    """The CacheMeta that `to_dict` wrote; UserError where the format is not ours."""
    if (
        values.get("format") != FORMAT or "views" not in values
    ):  # before there were views, texts shared a chunk
        found = values.get("format") if values.get("format") != FORMAT else "before views"
        raise UserError(
            f"cache format {found!r} is not the format {FORMAT} that this version reads: remove it and build it again "
            "with `tc build`"
        )
    spec = dict(values["spec"])
    spec["fields"] = tuple(Field(**{**field, "shape": tuple(field["shape"])}) for field in spec["fields"])
    spec["outputs"] = tuple(spec["outputs"])
    meta = CacheMeta(**{**{k: v for k, v in values.items() if k != "checksum"}, "spec": TeacherSpec(**spec)})
    if values.get("checksum", checksum(meta)) != checksum(meta):
        raise UserError("zarr.json is damaged: its checksum differs; remove the cache and build it again")
    return meta


def checksum(record: Any) -> int:
    """crc32 of a record's canonical JSON."""
    return zlib.crc32(json.dumps(to_dict(record), sort_keys=True).encode())


def differences(old: Any, new: Any, *, ignore: tuple[str, ...] = ()) -> list[str]:
    """Names of entries in which two records differ (`spec.digest`), each with both values, shortened."""
    left, right = (_flat(to_dict(record)) for record in (old, new))
    return [
        f"{name}: {_short(left.get(name))} there, {_short(right.get(name))} asked"
        for name in left | right
        if name not in ignore and left.get(name) != right.get(name)
    ]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Entries of the spec and of the augmentation under their own names."""
    inner = {
        f"{name}.{key}": value for name in ("spec", "augment") for key, value in values.pop(name, {}).items()
    }
    return values | inner


def _short(value: Any) -> str:
    text = json.dumps(_names(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _names(value: Any) -> Any:
    """A list of records as their names alone."""
    return (
        [item["name"] for item in value]
        if value and isinstance(value, list) and "name" in value[0]
        else value
    )


def fingerprint(record: Any) -> str:
    """sha256 of a record's canonical JSON, 16 hex digits."""
    return hashlib.sha256(json.dumps(to_dict(record), sort_keys=True).encode()).hexdigest()[:16]
