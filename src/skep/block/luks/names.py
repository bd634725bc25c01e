"""The options of encryption, by QEMU's names. Images that are not encrypted need no more of this package."""

from __future__ import annotations

from collections.abc import Mapping

from skep.block.format import Option

CREATE: Mapping[str, Option] = {
    "key-secret": Option("ID of the secret that provides the keyslot passphrase"),
    "cipher-alg": Option("Name of encryption cipher algorithm"),
    "cipher-mode": Option("Name of encryption cipher mode"),
    "ivgen-alg": Option("Name of IV generator algorithm"),
    "ivgen-hash-alg": Option("Name of IV generator hash algorithm"),
    "hash-alg": Option("Name of encryption hash algorithm"),
    "iter-time": Option("Time to spend in PBKDF in milliseconds"),
}
AMEND: Mapping[str, Option] = {
    "state": Option("Select new state of affected keyslots (active/inactive)"),
    "keyslot": Option("Select a single keyslot to modify explicitly"),
    "old-secret": Option("Select all keyslots that match this password"),
    "new-secret": Option("New secret to set in the matching keyslots. Empty string to erase"),
    "iter-time": Option("Time to spend in PBKDF in milliseconds"),
}


def prefixed(prefix: str, options: Mapping[str, Option]) -> Mapping[str, Option]:
    return {prefix + name: option for name, option in options.items()}
