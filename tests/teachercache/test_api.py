"""The Python interface of phase 1: the same as the commands, as records."""

import pytest
from small import make_folder, run, tree

from teachercache import api
from teachercache.cache import store
from teachercache.core.errors import UserError

HERE = {"device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("api") / "photos", 8, texts=2)


@pytest.fixture(scope="module")
def built(photos, teacher_folder) -> api.Built:
    return api.build(teacher_folder, photos, photos.parent / "a.zarr", **HERE)


def test_build_is_the_command(built, photos, teacher_folder, tmp_path):
    words = ("--teacher", teacher_folder, "--data", photos, "--device", "cpu", "--workers", 0)
    assert run("build", *words, "--out", tmp_path / "b.zarr") == 0
    assert tree(built.cache) == tree(tmp_path / "b.zarr")
    assert built == api.Built(photos.parent / "a.zarr", rows=8, rows_written=8, quarantined=0, blocks_left=0)


def test_a_second_build_writes_nothing_and_nothing_is_printed(built, photos, teacher_folder, capsys):
    again = api.build(str(teacher_folder), str(photos), built.cache, outputs=["embeddings"], **HERE)
    assert (again.cache, again.rows, again.rows_written) == (built.cache, 8, 0)
    assert capsys.readouterr().out == ""


def test_views_take_settings_as_a_mapping_or_as_texts(photos, teacher_folder, tmp_path):
    for name, augment in (("a", {"flip": 0}), ("b", ["flip=0"])):
        options = HERE | {"views": 2, "augment": augment, "limit": 3}
        built = api.build(teacher_folder, photos, tmp_path / f"{name}.zarr", **options)
        assert store.open_cache(built.cache).meta.augment["flip"] == 0
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "b.zarr")


def test_search(built, capsys):
    key = keys(built)[0]
    by_key = api.search(built.cache, keys=[key], top=3)
    assert len(by_key) == 3
    assert key not in [result["key"] for result in by_key]
    by_image = api.search(built.cache, images=[by_key[0]["image"]], top=1)
    assert by_image[0]["key"] == by_key[0]["key"]
    assert api.search(built.cache, "a square", top=2)[0].keys() == {"key", "score", "image", "texts"}
    assert capsys.readouterr().out == ""


def keys(built: api.Built) -> list[str]:
    return [str(key) for key in store.read_keys(store.open_cache(built.cache))]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"teacher": "clip-vit-b61"}, "did you mean 'clip-vit-b16'?"),
        ({"data": "nowhere"}, "no data at nowhere"),
        ({"outputs": "embedings"}, "did you mean 'embeddings'?"),
        ({"batch_sise": 8}, "no option 'batch_sise': did you mean 'batch_size'?"),
        ({"batch_size": 0}, "batch_size=0: a value of type int from 1"),
        ({"limit": 0}, "limit=0: "),
        ({"workers": "two"}, "workers=two: "),
        ({"views": 2, "augment": {"flipp": 0}}, "did you mean 'flip'?"),
        ({"device": "abacus"}, "--device abacus: not a device"),
    ],
)
def test_mistakes_are_user_errors(words, says, teacher_folder, photos, tmp_path):
    given = {"teacher": teacher_folder, "data": photos, "out": tmp_path / "c.zarr"} | HERE | words
    with pytest.raises(UserError) as error:
        api.build(**given)
    assert says in str(error.value)
    assert list(tmp_path.iterdir()) == []
