"""LZFSE streams, unpacked. The vectors are from Apple's reference implementation, by way of pyliblzfse 0.4.1."""

from __future__ import annotations

import base64
import random
import struct

import pytest

from skep.block.lzfse import unpack

LZFSE = base64.b64decode(
    """
YnZ4MogSAAC0AEAFAFoCAPCrbz/21QMQoQAAAD8M4ABvwZ0gAAgACLjvLs4u1BSAKQB8AOCue4zmNTg5GTcndxcXIN8BcAECAAAAAAA3AADcAA
AAAABwDwAAALwF/8Uz8mW8DN/DJ/EnPA7fAwAAAAAAAAAAAAAwb2DCZE4AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAKAF
Ci/vQdT1R/PPyUDghP2qYXS1YimF9Fj4j7Exg8lrjlWJIRoz691ZZ3raiMzuikZ0dLd3ZyaVpAALAa8b6Cz4UymJSL0uP5IHHKMJyR8KegAAAA
AAAAAAAAAAYCyg6qLs3xoskdkaq12y2HrPYgkeEcuDnwn/41mR8xd8KeIXiQweojKYLXH5vBqsdL/hZTI6Fo3/m19/rwa3H9fd6Gxf46ff9Orl
ehT/G58XWPBgthur70n0lypyk1+/I+JPfDRRPGUCByGHjIrMmFdV4/aBehkyC2O1SxYb71kswWNiue4zhV+4HPbgSTHgYa/B4zXgWkQtu//gUH
ENZu8x4DUTBh682PPKYgtuH9eDS5GDvTgx1w++Ni04PAcfEmLwmO0L+Vm90F6wUaOQknVE/IiPJoqnTBQHxJAJERhzVRFtfnNVicxmrO6SxeY9
F0vwSCxDfbbwC5fDHjwpBjzsNXi+xlKLqGX3HxwqrsHsPQa8ZsLAgxd7HlBswe3jenAp8p0XJ+b6wdemBYfn4ENCDB6zfSGfd3EUGpAL/NAcET
/io4niKRPFIcQoMyLK/D+K/CdMiTIbLB3E7roYDiSJ45WPLPyF88OEf/o8rp3BQ1QGsyUsn1eDle434FUmCDzkhYo/1mAJcORI/lsL+V45pdGv
l63S7nttfCTE3HG2KeTxLo5CA3Ih3toeobfCcQ9JV8vQWuZFpuWq6my7g8tGJo0VdslX855dJXhkleO1ahTnqHGYTWeKSYe9Jp3XOCqj2eY/NK
y4QNl7rOfKhDtHXuwfD6dyM3ck1yyFPKac0uhfXptmGZ6DDwmRcsz2hfxIw22RQo1IgIvIIJSRQhORQyYgA2LMhAge+aro2O7gjZFJGcVdUtG8
50QJHg/leF0YxflgHObAmeK/Ya//5jX6yclszztf4OESky5wHlhp4Q1yoc76jrLzHcvraiE/J6c0+nLXpseF54hDQnwbs30hn81wGxXkCLxhO0
JnhWO228nFRBueRb/8Hwz5TyrboT2LAdJdSWDCCvP/l8cGrSM4dHzwvSOTRwrhAaS2IG4nTnaVitT9l3EHei3V9JAEJSVryWj4ujNxKnLaWvS6
FAefaw+usNeXOvuZ15JR1cEPfNHxjDLd1GRC1ZHi9jOE+AP1q6naNJwj6Lte7KRl5jFDQKnDp6uXeQTHcO544HuHmR8qVI+T2qi4kzjZVSpS91
/GHei1VNNDEpSUrCWj4evOxKnIaWvR60qcQhbvuxzWmzr1s16bjypdkGNfcj2jTDc1Iajuf509AmIPtO9d38DdCGS7XnEnLqOPEQJ+U/r+ots5
gXPHA9/Nvico5cfzdsRKr5NNXdSM6/mXVPXyYhUGOiBDmZgxMhlhtiBEymCp5mgFN02mIAA1coXSlHCkhGORSKFIpFCE4gJidngk
"""
)
LZVN = base64.b64decode(
    """
YnZ4bhgCAADTAAAA7GxpbmUgMCBvZiAwChAMTjFeMU4yXjROM145UCQ0WA02TjWeMjVONmAaM1AnN14yVjheN045IAxQfjFgNDJYgDEojRCCmA
4zM/EQhGCdMliGMSgOEIcoKRiHILpQiDFoUzMYiWAOOG459JgqMjD2UIsyKEZYizIgDRCKKHxQijIomFiKMigqVjYoUxCLKOxQizIhB1iKMiAO
UIozKTxYijMgN1CKMylyWIszKBwQiyGnUIozKcAYiSANEIgglZgaMzj25zkgb2YgNAoGAAAAAAAAAGJ2eCQ=
"""
)


def text(lines: int) -> bytes:
    return "".join(f"line {i} of {i * i % 37}\n" for i in range(lines)).encode()


def test_what_the_reference_packed() -> None:
    assert (LZFSE[:4], LZVN[:4]) == (b"bvx2", b"bvxn")
    assert unpack(LZFSE, 4744) == text(330)
    assert unpack(LZVN, 536) == text(40)
    raw = b"bvx-" + struct.pack("<I", 3) + b"abc"
    assert unpack(raw + LZVN[:-4] + raw + LZFSE, 10000) == b"abc" + text(40) + b"abc" + text(330)


def test_opcodes_of_lzvn() -> None:
    """One of each: literals short and long, copies at three ranges of distances and the same again, and nothing."""
    body = b"\xe2ab" + b"\x0e" + b"\x48\x02c" + b"\x16" + b"\xe0\x00" + bytes(range(16)) + b"\xaf\x4a\x00x"
    body += b"\x47\x03\x00y" + b"\x46z" + b"\xf2" + b"\xf0\x01" + b"\x06" + bytes(7)
    out = bytearray()

    def copy(distance: int, length: int) -> None:
        for _ in range(length):
            out.append(out[-distance])

    out += b"abc"
    copy(2, 4)
    out += bytes(range(16)) + b"x"
    copy(0x4A >> 2, (7 << 2 | 2) + 3)
    out += b"y"
    copy(3, 3)
    out += b"z"
    copy(3, 3)
    copy(3, 2)
    copy(3, 17)
    stream = b"bvxn" + struct.pack("<II", len(out), len(body)) + body + b"bvx$"
    assert unpack(stream, 1000) == out


@pytest.mark.parametrize("size", [0, 100, 535])
def test_it_gives_no_more_than_is_wanted(size: int) -> None:
    for stream in (LZFSE, LZVN, b"bvx-" + struct.pack("<I", 5000) + bytes(5000) + b"bvx$"):
        with pytest.raises(ValueError, match="more bytes"):
            unpack(stream, size)


@pytest.mark.parametrize("stream", [LZFSE, LZVN])
def test_damage(stream: bytes) -> None:
    """Whatever is damaged, it ends, with a ValueError or with no more than there should be."""
    rng = random.Random(1)
    refused = 0
    for cut in range(len(stream)):
        with pytest.raises(ValueError):
            unpack(stream[:cut], 4744)
    for _ in range(1000):
        damaged = bytearray(stream)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert len(unpack(damaged, 4744)) <= 4744
        except ValueError:
            refused += 1
    assert refused > 500
