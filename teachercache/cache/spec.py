"""Metadata of a cache: its fields, the identity of its teacher and its layout, as frozen records."""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

from teachercache.core.errors import UserError, closest

FORMAT = 2
LARGEST = 1 << 48  # no array has so many rows, texts or numbers
DTYPES = ("float16", "float32", "int16", "int32", "int64", "bool")
PER = ("row", "image", "text", "pair")
COMPARISONS = ("cosine", "relative_error", "same_choice")
INPUTS = ("image", "text", "boxes", "words", "pairs")
UNNAMED = "dim"  # the name of an inner dimension that a field does not name


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a cache.

    The array has the shape [rows, *shape] if `per` is "row"; [rows, texts, *shape] if `per` is "text" or "pair"; and
    [rows, *shape] if `per` is "image", or [rows, views, *shape] in a cache of augmented views.

    `tc verify` computes some rows again and compares them with the stored values:

    - `"cosine"`: the cosine of the flattened values. If `beside` names a field of integer choices, only the choices
      on which both computations agree are compared.
    - `"relative_error"`: the difference relative to the absolute value of `beside`, or of the field itself.
    - `"same_choice"`: the values are positions in the last dimension of `beside` (-1: none). Two positions are equal if
      `beside` has equal values there, so that ties may be broken either way.

    Attributes:
        name: An identifier; the name of the array on disk.
        shape: The shape of one value.
        per: What a value belongs to: a "row", its "image", each "text", or each "pair" of a text and its row's image.
        dtype: One of `DTYPES`.
        doc: One line for `tc info`.
        dims: Names of the dimensions of `shape`. By default ("dim",), or ("dim0", "dim1", ...).
        compare: How two computations of the field are compared, one of `COMPARISONS`.
        beside: The other field that `compare` needs.
    """

    name: str
    shape: tuple[int, ...]
    per: str
    dtype: str
    doc: str
    dims: tuple[str, ...] = ()
    compare: str = "cosine"
    beside: str = ""

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise ValueError(f"field {self.name}: `per` is one of {', '.join(PER)}, not {self.per!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"field {self.name}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not self.name.isidentifier():
            raise ValueError(f"field name {self.name!r} is not an identifier")
        if self.dims and len(self.dims) != len(self.shape):
            raise ValueError(f"field {self.name}: {len(self.dims)} dims for the shape {self.shape}")
        if self.compare not in COMPARISONS:
            raise ValueError(f"field {self.name}: `compare` is one of {', '.join(COMPARISONS)}")
        if self.compare == "same_choice" and not self.beside:
            raise ValueError(f"field {self.name}: same_choice needs `beside`, the field of the scores")

    @property
    def per_text(self) -> bool:
        """Whether a row has one value for each of its texts."""
        return self.per in ("text", "pair")

    @property
    def is_vector(self) -> bool:
        """Whether a value is a feature vector: floats along one dimension without a name of its own."""
        return len(self.shape) == 1 and self.dims in ((), (UNNAMED,)) and self.dtype.startswith("float")

    def copies(self, texts: int, views: int) -> int:
        """Return the number of values per row: its texts or its views, or 0 if the array has no such axis."""
        return {"row": 0, "image": views, "text": texts, "pair": texts}[self.per]

    def array_shape(self, rows: int, texts: int, views: int = 0) -> tuple[int, ...]:
        """Return the shape of the whole array. `views` is 0 for a cache of unaugmented images."""
        copies = self.copies(texts, views)
        return (rows, copies, *self.shape) if copies or self.per_text else (rows, *self.shape)

    def array_dims(self, views: int = 0) -> tuple[str, ...]:
        """Return the dimension names that the Zarr metadata of the array holds."""
        default = (UNNAMED,) if len(self.shape) == 1 else tuple(f"dim{i}" for i in range(len(self.shape)))
        axis = ("text",) if self.per_text else ("view",) if self.per == "image" and views else ()
        return ("row", *axis, *(self.dims or default))


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """The identity of a teacher: two teachers with equal specs compute the same values from the same row.

    Attributes:
        name: The value of `--teacher`.
        weights: The value of `--weights`: pretrained, random:SEED or a path.
        digest: sha256 over the names and bytes of the state dict.
        outputs: The values of `--outputs`, normalized.
        fields: The fields that the teacher computes.
        view: How an image becomes a tensor, as `teachercache.data.views.describe_view` returns it (size, mean and std are
            required); {} for a teacher without image input.
        tokenizer: A description of the tokenizer; {} for a teacher without text input.
        constants: Numbers that recipes need, such as logit_scale (the parameter, before exp).
        inputs: What the teacher reads, from `INPUTS`: see `teachercache.teachers.teacher.Inputs`.
    """

    name: str
    weights: str
    digest: str
    outputs: tuple[str, ...]
    fields: tuple[Field, ...]
    view: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    constants: Mapping[str, float]
    inputs: tuple[str, ...] = ("image", "text")

    def __post_init__(self) -> None:
        unknown = [name for name in self.inputs if name not in INPUTS]
        if unknown:
            raise ValueError(f"teacher {self.name}: input {unknown[0]!r} is not one of {', '.join(INPUTS)}")
        per = {field.name: field.per for field in self.fields}
        for field in self.fields:
            if field.beside and per.get(field.beside) != field.per:
                raise ValueError(
                    f"field {field.name}: `beside` names no field per {field.per}: {field.beside!r}"
                )

    def field(self, name: str) -> Field:
        """Return the field of that name; raise UserError with the existing names if there is none."""
        for field in self.fields:
            if field.name == name:
                return field
        names = ", ".join(field.name for field in self.fields)
        hint = closest(name, [field.name for field in self.fields])
        raise UserError(f"teacher {self.name} has no field '{name}': {hint}choose from {names}")

    @property
    def image_vector(self) -> str:
        """The name of the first field with a feature vector per image, or an empty string."""
        return next((field.name for field in self.fields if field.per == "image" and field.is_vector), "")

    @property
    def text_vector(self) -> str:
        """The name of the first field with a feature vector per text, or an empty string."""
        return next((field.name for field in self.fields if field.per == "text" and field.is_vector), "")

    @property
    def reads_pairs(self) -> bool:
        """Whether a value of some field depends on both a text and its row's image."""
        return bool({"words", "pairs"} & set(self.inputs))


@dataclasses.dataclass(frozen=True)
class CacheMeta:
    """The attributes of a cache's Zarr group. They do not depend on when or where the cache was built.

    Attributes:
        spec: The teacher, with the fields that this cache stores.
        data: The value of `--data`.
        manifest: The digest of keys, texts and image files.
        rows: The number of rows.
        texts: The number of texts per row; 0 for data without texts.
        block_rows: The number of rows of one block.
        precision: The dtype of the teacher's forward pass.
        versions: The versions of the packages that computed the cache.
        views: The number of augmented views per image; 0 for unaugmented images.
        augment: The augmentation settings; {} without views.
        limit: The value of `--limit`; 0 for all rows.
        format: The format version of the cache.
    """

    spec: TeacherSpec
    data: str
    manifest: str
    rows: int
    texts: int
    block_rows: int
    precision: str
    versions: Mapping[str, str]
    views: int = 0
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    limit: int = 0
    format: int = FORMAT

    @property
    def num_blocks(self) -> int:
        """The number of blocks, counting a last one that is not full."""
        return -(-self.rows // self.block_rows)

    def block(self, index: int) -> range:
        """Return the rows of one block."""
        return range(index * self.block_rows, min((index + 1) * self.block_rows, self.rows))


def to_dict(record: Any) -> dict[str, Any]:
    """Return a dataclass as a plain dict of JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(record)))


def meta_from_dict(values: Mapping[str, Any]) -> CacheMeta:
    """Return the CacheMeta that `to_dict` wrote; raise UserError if the format or the checksum is wrong."""
    if values.get("format") != FORMAT:
        raise UserError(f"cache format {values.get('format')!r}, this version reads format {FORMAT}")
    spec = dict(values["spec"])
    spec["fields"] = tuple(
        Field(**{**field, "shape": tuple(field["shape"]), "dims": tuple(field["dims"])})
        for field in spec["fields"]
    )
    spec["outputs"], spec["inputs"] = tuple(spec["outputs"]), tuple(spec["inputs"])
    meta = CacheMeta(**{**{k: v for k, v in values.items() if k != "checksum"}, "spec": TeacherSpec(**spec)})
    _check_types(meta)
    if values.get("checksum", checksum(meta)) != checksum(meta):
        raise UserError("zarr.json is damaged: its checksum differs; remove the cache and build it again")
    return meta


def _check_types(meta: CacheMeta) -> None:
    """Raise ValueError if an entry is of another type, or no possible size: arrays are made of these numbers."""
    sizes = (meta.rows, meta.texts, meta.views, meta.limit, meta.block_rows)
    shapes = [size for field in meta.spec.fields for size in field.shape]
    if any(type(size) is not int or not 0 <= size <= LARGEST for size in (*sizes, *shapes)):
        raise ValueError("a size is no number that is possible")
    if not meta.block_rows or not meta.rows or not meta.spec.fields:
        raise ValueError("there are no rows or no fields")
    texts = (meta.data, meta.manifest, meta.precision, meta.spec.name, meta.spec.weights, meta.spec.digest)
    if not all(isinstance(text, str) for text in (*texts, *meta.spec.outputs)):
        raise TypeError("a name is no text")
    parts = (meta.versions, meta.augment, meta.spec.view, meta.spec.tokenizer, meta.spec.constants)
    if not all(isinstance(part, Mapping) for part in parts):
        raise TypeError("a part is no object")


def checksum(record: Any) -> int:
    """Return the crc32 of a record's canonical JSON."""
    return zlib.crc32(json.dumps(to_dict(record), sort_keys=True).encode())


def differences(old: Any, new: Any, *, ignore: tuple[str, ...] = ()) -> list[str]:
    """Return the entries in which two records differ, each with both values, shortened."""
    left, right = (_flat(to_dict(record)) for record in (old, new))
    return [
        f"{name}: {_short(left.get(name))} stored, {_short(right.get(name))} requested"
        for name in left | right
        if name not in ignore and left.get(name) != right.get(name)
    ]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Flatten the entries of the spec and of the augmentation into dotted names."""
    inner = {
        f"{name}.{key}": value for name in ("spec", "augment") for key, value in values.pop(name, {}).items()
    }
    return values | inner


def _short(value: Any) -> str:
    text = json.dumps(_names(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _names(value: Any) -> Any:
    """Shorten a list of records to their names."""
    records = value and isinstance(value, list) and "name" in value[0]
    return [item["name"] for item in value] if records else value


def fingerprint(record: Any) -> str:
    """Return 16 hex digits of the sha256 of a record's canonical JSON."""
    return hashlib.sha256(json.dumps(to_dict(record), sort_keys=True).encode()).hexdigest()[:16]
