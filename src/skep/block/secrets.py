"""Passwords and keys, under the names that options of images have for them (`encrypt.key-secret=NAME`).

They are told as QEMU's `--object secret` is: `secret,id=NAME,data=TEXT` or `file=PATH`, and `format=raw` or `base64`.
A file is what a command line should have: everybody on the host can read the command lines of others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from skep.block.words import words
from skep.errors import UserError

_MOST_BYTES = 1 << 20
"""Of a secret's file."""

Secrets = Mapping[str, bytes]
"""By their ids."""
NO_SECRETS: Secrets = MappingProxyType({})


def read_secrets(objects: Iterable[str]) -> Secrets:
    """What these `--object`s define. Raises UserError, which never tells a secret."""
    found: dict[str, bytes] = {}
    for text in objects:
        name, secret = _read(words(text, "qom-type"))
        if name in found:
            raise UserError("there are two secrets of that name", name)
        found[name] = secret
    return found


def secret_named(secrets: Secrets, name: str) -> bytes:
    """Raises UserError where there is none."""
    if name not in secrets:
        raise UserError("no such secret", name, f"say --object secret,id={name},file=PATH")
    return secrets[name]


def _read(said: dict[str, str]) -> tuple[str, bytes]:
    if (kind := said.pop("qom-type", "")) != "secret":
        raise UserError(f"no such kind of object: {kind!r}", "--object", "known is secret")
    name = said.pop("id", "")
    if not name:
        raise UserError("the secret has no id", "--object", "say id=NAME")
    data, path, form = said.pop("data", None), said.pop("file", None), said.pop("format", "raw")
    if said:
        raise UserError(f"not known of a secret: {', '.join(said)}", name, "known are id, data, file and format")
    if (data is None) == (path is None):
        raise UserError("a secret is either data or a file", name)
    secret = os.fsencode(data) if data is not None else secret_of_file(path or "", name)
    if form == "base64":
        import base64  # few are

        try:
            secret = base64.b64decode(secret, validate=False)
        except ValueError:
            raise UserError("is not base64", name) from None
    elif form != "raw":
        raise UserError(f"no such format of a secret: {form!r}", name, "known are raw and base64")
    return name, secret


def secret_of_file(path: str, name: str) -> bytes:
    """All of the file, as it is: a newline at its end is part of the secret, as it is to QEMU. Raises UserError."""
    try:
        with open(path, "rb") as file:
            secret = file.read(_MOST_BYTES + 1)
    except OSError as e:
        raise UserError(f"its file {path} cannot be read: {e.strerror}", name) from None
    if len(secret) > _MOST_BYTES:
        raise UserError(f"its file {path} has more than {_MOST_BYTES} bytes", name)
    return secret
