"""Pictures as a person sees them, hostile ones quarantined; manifests and their digests."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest, digest_rows, load_manifest, make_manifest, write_manifest
from teachercache.data.pictures import decode_image, read_image, seen_size
from teachercache.data.sample import BadSample, Sample, clean_texts


def encoded(image: Image.Image, fmt: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def noise(height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pixels(content: bytes) -> np.ndarray:
    image = decode_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


# ----------------------------------------------------------------------------------------------------
# Pictures


def test_plain_pictures_keep_their_pixels():
    rgb, grey = noise(), noise(channels=1)
    for fmt in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(pixels(encoded(Image.fromarray(rgb), fmt)), rgb)
    assert np.array_equal(pixels(encoded(Image.fromarray(grey))), np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(pixels(encoded(Image.fromarray(rgb), "WEBP", lossless=True)), rgb)


def test_one_bit_picture_is_black_and_white():
    bits = noise(channels=1) > 127
    expected = np.repeat(np.where(bits, 255, 0)[..., None], 3, axis=2)
    assert np.array_equal(pixels(encoded(Image.fromarray(bits))), expected)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_picture_is_bad(fmt: str):
    content = encoded(Image.fromarray(noise(64, 64)), fmt)
    for size in (1, 10, len(content) // 2):
        with pytest.raises(BadSample):
            decode_image(content[:size])


def test_what_is_no_picture_is_bad_with_a_reason():
    with pytest.raises(BadSample, match="no bytes"):
        decode_image(b"")
    for content in (
        b"\0" * 1000,
        b"<html>404</html>",
        b"%PDF-1.4 ...",
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        with pytest.raises(BadSample, match="not a picture"):
            decode_image(content)


def test_wrong_extension_is_read_by_content(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(noise())))
    manifest = make_manifest("d", tmp_path, [Sample("a", "a.jpg")])
    assert np.array_equal(np.asarray(read_image(manifest, manifest.row(0))), noise())


@pytest.mark.parametrize(
    "side", [10_000, 30_000]
)  # above the limit; above twice the limit, where PIL itself refuses
def test_decompression_bomb_is_bad_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch):
    content = encoded(Image.new("1", (side, side)))
    assert len(content) < 200_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("the bomb was decoded"))
    with pytest.raises(BadSample, match="pixels"):
        decode_image(content)


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_animation_shows_its_first_frame(fmt: str):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    content = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert (pixels(content) == [255, 0, 0]).all()


def test_cmyk_jpeg_has_its_colours():
    for ink, expected in (
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ):
        got = pixels(encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95)).astype(int)
        assert np.abs(got - expected).max() <= 4


def test_16_bit_grey_is_scaled():
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    got = pixels(encoded(Image.fromarray(values))).astype(float)
    assert np.abs(got - (values / 257)[..., None]).max() <= 1


def test_dark_16_bit_grey_stays_dark():
    got = pixels(encoded(Image.fromarray(np.full((4, 4), 200, np.uint16))))  # 0.3 % of white
    assert got.max() <= 1


@pytest.mark.parametrize("scale", [1, 200, 65535])
def test_32_bit_grey_keeps_its_greys(scale: int):
    """Floats between 0 and 1, 0 and 255, or 0 and 65,535."""
    values = np.linspace(0, scale, 48, dtype=np.float32).reshape(6, 8)
    values[0, 0] = np.nan
    got = pixels(encoded(Image.fromarray(values), "TIFF")).astype(float)
    expected = np.nan_to_num(values) / (257 if scale > 255 else 1) * (255 if scale == 1 else 1)
    assert np.abs(got - expected[..., None]).max() <= 1


@pytest.mark.parametrize("value", [-3.0, 1e6])
def test_32_bit_values_that_are_no_grey_are_named(value: float):
    with pytest.raises(BadSample, match=r"32-bit values lie between .*: write it with 8 or 16 bits"):
        decode_image(encoded(Image.fromarray(np.full((2, 2), value, np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "P"])
def test_a_large_picture_is_converted_in_strips_to_the_same_pixels(
    mode: str, monkeypatch: pytest.MonkeyPatch
):
    if mode == "I;16":
        image = Image.fromarray(noise(11, 7, 2).view(np.uint16)[..., 0])
    else:
        image = Image.fromarray(noise(11, 7, 4), "RGBA").convert(mode)
    content = encoded(image, **({"transparency": 3} if mode == "P" else {}))
    whole = pixels(content)
    monkeypatch.setattr("teachercache.data.pictures.STRIP", 16)
    assert np.array_equal(pixels(content), whole)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_long_notes_in_a_png_do_not_cost_the_picture(place: str):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("notes", "a" * (2 << 20), zip=True)
    rgb = noise()
    content = encoded(Image.fromarray(rgb), pnginfo=notes)
    if place == "behind":  # move the chunk to the end
        start = content.index(b"zTXt") - 4
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        content = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    assert np.array_equal(pixels(content), rgb)
    assert seen_size(content) == (8, 6)


def test_too_little_memory_for_a_picture_is_its_own_reason(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args):
        raise MemoryError

    monkeypatch.setattr("teachercache.data.pictures._flatten", refuse)
    with pytest.raises(BadSample, match="too little memory to decode the picture"):
        decode_image(encoded(Image.fromarray(noise())))


def test_palette_with_a_transparent_colour_lies_on_white():
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1] * 4)
    got = pixels(encoded(image, transparency=0))
    assert (got[:, 0::2] == 255).all()
    assert (got[:, 1::2] == [200, 0, 0]).all()


def test_palette_with_an_alpha_table_lies_on_white():
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1] * 4)
    got = pixels(encoded(image, transparency=bytes([0, 255]))).astype(int)
    assert (got[:, 0::2] == 255).all()
    assert (got[:, 1::2] == [200, 0, 0]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white(mode: str):
    values = noise(channels=len(mode))
    color, alpha = values[..., :-1].astype(float), values[..., -1:] / 255
    expected = np.broadcast_to(color * alpha + 255 * (1 - alpha), (*values.shape[:2], 3))
    assert np.abs(pixels(encoded(Image.fromarray(values))) - expected).max() <= 1


def test_rgb_with_a_colour_key_lies_on_white():
    values = np.array([[[1, 2, 3], [200, 0, 0]]], np.uint8)
    got = pixels(encoded(Image.fromarray(values), transparency=(1, 2, 3)))
    assert got.tolist() == [[[255, 255, 255], [200, 0, 0]]]


TURNS = {  # EXIF orientation -> what a viewer does to the stored array
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", list(TURNS))
def test_exif_rotation_is_turned_back(orientation: int):
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = noise()
    assert np.array_equal(pixels(encoded(Image.fromarray(stored), exif=exif)), TURNS[orientation](stored))


def exif_with_text_typed_as_number() -> bytes:
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "hello"
    content = bytearray(exif.tobytes())
    content[17] = 3  # ImageDescription says it is a SHORT
    return bytes(content)


def outcome(content: bytes) -> str:
    """Whether a picture was read or is bad; any other exception goes through."""
    try:
        assert decode_image(content).mode == "RGB"
    except BadSample:
        return "bad"
    return "read"


def test_broken_exif_never_raises_anything_else():
    content = encoded(Image.fromarray(noise()), "JPEG", exif=exif_with_text_typed_as_number())
    assert outcome(content) in ("read", "bad")


FUZZED = {
    "png": encoded(Image.fromarray(noise(16, 16))),
    "palette": encoded(Image.fromarray(noise(16, 16)).convert("P"), transparency=3),
    "gif": encoded(Image.fromarray(noise(16, 16)), "GIF"),
    "jpeg": encoded(Image.fromarray(noise(16, 16)), "JPEG", exif=exif_with_text_typed_as_number()),
    "webp": encoded(Image.fromarray(noise(16, 16)), "WEBP"),
    "tiff": encoded(Image.fromarray(noise(16, 16)), "TIFF"),
    "avif": encoded(Image.fromarray(noise(16, 16)), "AVIF"),
}


@pytest.mark.parametrize("name", list(FUZZED))
def test_flipped_bytes_give_a_picture_or_a_bad_sample(name: str):
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        content = bytearray(FUZZED[name])
        for place in random.integers(0, len(content), size=random.integers(1, 4)):
            content[place] = random.integers(0, 256)
        outcomes.add(outcome(bytes(content)))
    assert outcomes == {"read", "bad"}


def test_read_image_takes_the_bytes_at_the_offset(tmp_path):
    first, second = encoded(Image.new("RGB", (2, 2), "red")), encoded(Image.fromarray(noise()))
    (tmp_path / "shard").write_bytes(first + second + b"tail")
    sample = Sample("b", "shard", offset=len(first), size=len(second))
    manifest = make_manifest("d", tmp_path, [sample])
    assert np.array_equal(np.asarray(read_image(manifest, manifest.row(0))), noise())


def test_missing_picture_is_bad_and_says_why(tmp_path):
    manifest = make_manifest("d", tmp_path, [Sample("a", "none.png")])
    with pytest.raises(BadSample, match="No such file"):
        read_image(manifest, manifest.row(0))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadSample, match="directory"):
        read_image(manifest, Sample("b", "folder.png"))


# ----------------------------------------------------------------------------------------------------
# JPEGs that are larger than what is wanted of them


def photo(height: int, width: int) -> Image.Image:
    """Smooth, as photographs are: halves of it differ little from its pixels averaged."""
    return Image.fromarray(noise(height // 60 + 2, width // 60 + 2)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.mark.parametrize(
    "size", [(30, 40), (99, 200), (100, 100), (199, 900), (200, 201), (401, 350), (805, 1000)]
)
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}], ids=["plain", "progressive", "444"]
)
def test_reduced_jpeg_never_goes_below_what_is_asked_for(size: tuple[int, int], options: dict):
    content = encoded(photo(*size), "JPEG", quality=90, **options)
    image, whole = decode_image(content, at_least=100), decode_image(content)
    scale = max(scale for scale in (1, 2, 4, 8) if scale == 1 or min(size) // scale >= 100)
    assert (image.height, image.width) == tuple(-(-side // scale) for side in size)
    assert min(image.size) >= min(100, *size)
    same = np.asarray(whole.resize(image.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(image) - same).mean() < 3


def test_only_jpegs_are_reduced_and_only_when_asked():
    image = photo(400, 600)
    for fmt in ("PNG", "WEBP", "TIFF", "GIF", "BMP"):
        content = encoded(image, fmt)
        assert decode_image(content, at_least=50).tobytes() == decode_image(content).tobytes()
    content = encoded(image, "JPEG")
    with Image.open(io.BytesIO(content)) as plain:
        assert (
            decode_image(content).tobytes() == decode_image(content, at_least=0).tobytes() == plain.tobytes()
        )


@pytest.mark.parametrize("orientation", list(TURNS))
def test_reduced_jpegs_are_turned(orientation: int):
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = photo(400, 600)
    image = decode_image(encoded(stored, "JPEG", exif=exif), at_least=150)
    expected = TURNS[orientation](np.asarray(stored.resize((300, 200), Image.Resampling.BOX))).astype(int)
    assert np.asarray(image).shape == expected.shape
    assert np.abs(np.asarray(image) - expected).mean() < 3


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_reduced_jpegs_of_other_modes(mode: str):
    content = encoded(photo(400, 600).convert(mode), "JPEG", quality=95)
    image, whole = (
        decode_image(content, at_least=100),
        decode_image(content).resize((150, 100), Image.Resampling.BOX),
    )
    assert (image.mode, image.size) == ("RGB", (150, 100))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(whole)).mean() < 3


def test_reduced_pictures_of_a_phone_and_through_read_image(tmp_path):
    content = encoded(photo(400, 600), "MPO", save_all=True, append_images=[photo(40, 60)])
    (tmp_path / "a.jpg").write_bytes(content)
    manifest = make_manifest("d", tmp_path, [Sample("a", "a.jpg")])
    assert read_image(manifest, manifest.row(0), at_least=100).size == (150, 100)
    assert read_image(manifest, manifest.row(0)).size == (600, 400)


def test_large_and_damaged_jpegs_are_bad_however_small_they_are_wanted():
    content = encoded(Image.new("L", (10_000, 10_000)), "JPEG")
    with pytest.raises(BadSample, match="more than the limit"):
        decode_image(content, at_least=10)
    content = encoded(photo(400, 600), "JPEG")
    with pytest.raises(BadSample, match="damaged"):
        decode_image(content[: len(content) // 2], at_least=100)


# ----------------------------------------------------------------------------------------------------
# Manifest

SAMPLES = [
    Sample("a", "x/a.png", ("one", "two"), "cat", "train", size=3),
    Sample("b", "", ("three",)),
    Sample("c", "shard.tar", (), offset=512, size=10, split="val"),
]


def manifest_of(samples: list[Sample], root="r") -> Manifest:
    return make_manifest("some/data", Path(root), samples)


def test_rows_come_back_as_they_went_in():
    manifest = manifest_of(SAMPLES)
    assert [manifest.row(i) for i in range(len(manifest))] == SAMPLES
    assert manifest.texts == 2
    assert manifest.column("key") == ["a", "b", "c"]


def test_no_texts_at_all():
    assert manifest_of([Sample("a", "a.png")]).texts == 0


def test_digest_sees_keys_texts_and_pictures_but_neither_root_nor_order():
    same = manifest_of(SAMPLES).digest
    assert manifest_of(SAMPLES, root="elsewhere").digest == same
    assert make_manifest("other/data", manifest_of(SAMPLES).root, SAMPLES).digest == same
    assert manifest_of(SAMPLES[::-1]).digest == same
    changes = [
        SAMPLES[:2],
        [dataclasses.replace(SAMPLES[0], key="z"), *SAMPLES[1:]],
        [dataclasses.replace(SAMPLES[0], texts=("two", "one")), *SAMPLES[1:]],
        [dataclasses.replace(SAMPLES[0], texts=("onetwo",)), *SAMPLES[1:]],
        [dataclasses.replace(SAMPLES[0], image="x/b.png"), *SAMPLES[1:]],
        [dataclasses.replace(SAMPLES[0], size=4), *SAMPLES[1:]],
        [*SAMPLES[:2], dataclasses.replace(SAMPLES[2], offset=1024)],
    ]
    digests = [manifest_of(changed).digest for changed in changes]
    assert len({same, *digests}) == 1 + len(changes)


def test_digest_does_not_depend_on_how_arrow_chunks_the_table():
    samples = [Sample(f"k{i}", f"{i}.png", (f"t{i}",)) for i in range(50)]
    whole = manifest_of(samples)
    pieces = pa.concat_tables([whole.table.slice(0, 7), whole.table.slice(7, 30), whole.table.slice(37)])
    assert digest_rows(pieces) == whole.digest


def test_key_that_comes_twice_is_refused():
    with pytest.raises(UserError, match=r"key 'a' is repeated in some/data"):
        manifest_of([Sample("a", "1.png"), Sample("a", "2.png")])


def test_no_rows_is_refused_and_limit_takes_the_first():
    with pytest.raises(UserError, match="no pictures or texts found in some/data"):
        manifest_of([])
    limited = make_manifest("d", manifest_of(SAMPLES).root, iter(SAMPLES), limit=2)
    assert limited.column("key") == ["a", "b"]


def test_rows_with_a_text_are_those_that_strip_leaves_something_of():
    texts = [(), ("",), ("a",), ("", "b "), (" ", "\n\t")] + [(chr(code),) for code in range(0x3100) if code]
    manifest = manifest_of([Sample(str(i), "a.png", row) for i, row in enumerate(texts)])
    assert manifest.has_text().tolist() == [any(text.strip() for text in row) for row in texts]


def test_rows_of_split():
    manifest = manifest_of(SAMPLES)
    assert manifest.rows_of_split("train").tolist() == [0]
    assert manifest.rows_of_split("val").tolist() == [2]
    assert manifest.rows_of_split("test").tolist() == []
    without = manifest_of([Sample("a", "a.png"), Sample("b", "b.png")])
    assert without.rows_of_split("train").tolist() == without.rows_of_split("test").tolist() == [0, 1]


def test_clean_texts_flags_what_is_blank():
    sample = Sample("a", "", ("dog", "", " \t\n", " x "))
    assert list(clean_texts(sample)) == [("dog", True), ("", False), (" \t\n", False), (" x ", True)]


texts = st.text(st.characters(codec="utf-8"), max_size=8)
samples = st.lists(
    st.builds(
        Sample,
        key=texts,
        image=texts,
        texts=st.lists(texts, max_size=3).map(tuple),
        label=texts,
        split=texts,
        offset=st.integers(-1, 2**62),
        size=st.integers(0, 2**62),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda sample: sample.key,
)


@settings(max_examples=25, deadline=None, database=None)
@given(rows=samples)
def test_manifest_survives_parquet(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("manifest") / "m.parquet"
    manifest = manifest_of(rows, root="/some/root")
    write_manifest(manifest, path)
    again = load_manifest(path)
    assert [again.row(i) for i in range(len(again))] == rows
    assert (again.data, again.root, again.digest) == (manifest.data, manifest.root, manifest.digest)
    assert [file.name for file in path.parent.iterdir()] == ["m.parquet"]


def test_files_that_are_no_manifest_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("not parquet")
    with pytest.raises(UserError, match="not a readable Parquet"):
        load_manifest(path)
    pq.write_table(pa.table({"key": ["a"], "image": ["b"]}), path)
    with pytest.raises(UserError, match=r"not a manifest .*texts"):
        load_manifest(path)
    pq.write_table(manifest_of(SAMPLES).table, path)  # the columns without the metadata
    with pytest.raises(UserError, match="root"):
        load_manifest(path)
    whole = tmp_path / "whole.parquet"
    write_manifest(manifest_of(SAMPLES), whole)
    path.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a readable Parquet"):
        load_manifest(path)
