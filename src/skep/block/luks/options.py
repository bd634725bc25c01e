"""What may be said of encryption when an image is made, and when its key slots are changed."""

from __future__ import annotations

from collections.abc import Mapping

from skep.block.choices import choice, number
from skep.block.format import ImageError
from skep.block.luks.cipher import IV_GENERATORS, MODES
from skep.block.luks.header import HASHES, SLOTS, Encryption, Header
from skep.block.luks.keys import KeySlots, make_header
from skep.block.secrets import Secrets, secret_named

_LONGEST_ITER_TIME = 600_000


def header_of(path: str, options: Mapping[str, str]) -> tuple[Header, bytes]:
    """A new header by these options, and its master key. Raises ImageError."""
    algorithm = choice(path, options, "cipher-alg", "aes-256", "aes-128", "aes-192")
    mode = choice(path, options, "cipher-mode", *MODES)
    generator = choice(path, options, "ivgen-alg", *IV_GENERATORS)
    iv_hash = choice(path, options, "ivgen-hash-alg", *HASHES)
    key_bytes = int(algorithm[4:]) // 8 * (2 if mode == "xts" else 1)
    encryption = Encryption(mode, generator, iv_hash, key_bytes)
    if mode == "xts" and algorithm == "aes-192":
        raise ImageError("aes-192 has no mode xts", path)
    try:
        return make_header(encryption, choice(path, options, "hash-alg", *HASHES), _iter_time(path, options))
    except ValueError as error:
        raise ImageError(str(error), path) from None


def add_first_key(slots: KeySlots, key: bytes, path: str, options: Mapping[str, str], secrets: Secrets) -> None:
    """The password of a new image. Raises UserError."""
    slots.add(key, password_of(path, options, secrets), iter_time=_iter_time(path, options))


def password_of(path: str, options: Mapping[str, str], secrets: Secrets, name: str = "key-secret") -> bytes:
    """Raises UserError where it was not told."""
    secret = options.get(name)
    if secret is None:
        todo = "--object secret,id=ID,file=PATH tells one"
        raise ImageError(f"Parameter '{name}' is required for cipher", path, todo)
    return secret_named(secrets, secret)


def amend(
    slots: KeySlots, path: str, key: bytes | None, options: Mapping[str, str], secrets: Secrets, force: bool
) -> None:
    """Add a password, or erase one, as `qemu-img amend` does. ``key``: the master key, if the image is not locked.
    Raises UserError."""
    state = choice(path, {"state": options.get("state", "")}, "state", "", "active", "inactive")
    old, new = (options.get(name) for name in ("old-secret", "new-secret"))
    slot = number(path, options, "keyslot", 0, SLOTS - 1)
    if state == "active":
        if new is None:
            raise ImageError("'new-secret' is required to activate a keyslot", path)
        if old is not None:
            raise ImageError("'old-secret' must not be given when activating keyslots", path)
        if key is None:
            raise ImageError("the image is locked", path, "give the password of another keyslot as key-secret")
        slots.add(key, secret_named(secrets, new), number=slot, iter_time=_iter_time(path, options))
    elif state == "inactive":
        if new is not None:
            raise ImageError("'new-secret' must not be given when erasing keyslots", path)
        if options.get("iter-time") is not None:
            raise ImageError("'iter-time' must not be given when erasing keyslots", path)
        slots.erase(_to_erase(slots, path, slot, old, secrets, force), force=force)
    else:
        raise ImageError("the new state is missing", path, "state=active adds a password, state=inactive erases one")


def _to_erase(
    slots: KeySlots, path: str, slot: int | None, old: str | None, secrets: Secrets, force: bool
) -> list[int]:
    known = None if old is None else slots.slots_of(secret_named(secrets, old))
    if slot is not None:
        if known is not None and slot not in known:
            raise ImageError(f"This keyslot {slot} doesn't contain that password, or is not in use", path)
        if not slots.header.slots[slot].active and not force:
            raise ImageError(f"Given keyslot {slot} is already erased (inactive)", path)
        return [slot]
    if known is None:
        raise ImageError("To erase keyslot(s), either explicit keyslot index or the password must be given", path)
    if not known:
        raise ImageError("No keyslots match given (old) password for erase operation", path)
    return known


def _iter_time(path: str, options: Mapping[str, str]) -> int:
    found = number(path, options, "iter-time", 1, _LONGEST_ITER_TIME)
    return 2000 if found is None else found
