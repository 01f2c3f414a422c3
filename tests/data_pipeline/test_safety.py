"""Names, keys, schemes and credentials of data from untrusted places."""

import pytest

from data_pipeline.safety import check_key, check_name, redact, scheme_of
from sharpmoe.errors import DamageError, DataError


@pytest.mark.parametrize("name", ["..", "../a", "a/b", "/etc/passwd", ".lock", "", "a\0b", "a\n", "x" * 300])
def test_names_and_keys_are_no_paths(name: str) -> None:
    with pytest.raises(DataError, match="expected"):
        check_name(name)
    with pytest.raises(DamageError, match="expected"):
        check_key(name)


@pytest.mark.parametrize(
    "location", ["pipe:cat a", "file:///etc", "ftp://h/a", "PIPE:x", "s3:bucket", "data:text", "gopen:x"]
)
def test_schemes_outside_the_list(location: str) -> None:
    with pytest.raises(DataError, match="is not allowed"):
        scheme_of(location)


def test_schemes_of_the_list() -> None:
    assert [scheme_of(place) for place in ("HTTP://h/a", "https://h", "s3://b/p", "gs://b")] == [
        "http",
        "https",
        "s3",
        "gs",
    ]
    assert [scheme_of(place) for place in ("data/a", "/data/a:b", "./pipe:cat", "a_b:c")] == [None] * 4


def test_credentials_are_left_out() -> None:
    text = redact("get https://ann:hunter2@host:8/a/b?sig=abc&x=1#t failed, s3://key:secret@bucket/p, plain text?")
    assert text == "get https://host:8/a/b failed, s3://bucket/p, plain text?"
