"""--data at fsspec URLs: a real S3 server on loopback, and memory://."""

from teachercache.paths import as_path


def test_every_bucket_is_fresh(s3):
    path = as_path(s3()) / "x/y.txt"
    path.write_bytes(b"hello")
    assert path.read_bytes() == b"hello"
    assert [str(entry) for entry in path.parent.iterdir()] == [str(path)]
    assert not (as_path(s3()) / "x/y.txt").exists()
