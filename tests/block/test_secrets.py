"""Secrets: where they come from, and that no message tells them."""

from __future__ import annotations

from pathlib import Path

import pytest

from skep.block.secrets import read_secrets, secret_named
from skep.block.words import words
from skep.errors import UserError


def test_words() -> None:
    assert words("secret,id=a,data=1,,2=3,flag,id=b", "kind") == {
        "kind": "secret",
        "id": "b",
        "data": "1,2=3",
        "flag": "on",
    }
    assert words("") == {}


def test_secrets_come_from_words_and_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"\x00\xffkey\n")
    secrets = read_secrets(
        ["secret,id=a,data=let,,me in", f"qom-type=secret,id=b,file={path}", "secret,id=c,data=aGVsbG8=,format=base64"]
    )
    assert secrets == {"a": b"let,me in", "b": b"\x00\xffkey\n", "c": b"hello"}
    assert secret_named(secrets, "c") == b"hello"


@pytest.mark.parametrize(
    "said",
    [
        "secret,data=hidden",
        "secret,id=a",
        "secret,id=a,data=hidden,file=/dev/null",
        "secret,id=a,data=hidden,format=rot13",
        "secret,id=a,data=h,format=base64",
        "secret,id=a,data=hidden,keyid=b",
        "secret,id=a,file=/nowhere/at/all",
        "secret,id=a,file=/",
        "secret,id=a,file=/dev/zero",
        "iothread,id=a",
        "",
    ],
)
def test_mistakes_tell_no_secret(said: str) -> None:
    with pytest.raises(UserError) as error:
        read_secrets([said])
    assert "hidden" not in str(error.value)
    with pytest.raises(UserError):
        secret_named({}, "a")
    with pytest.raises(UserError):
        read_secrets(["secret,id=a,data=1", "secret,id=a,data=2"])
