"""The run directory: names that are claimed, and what dead VMs leave."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from skep.control import directory
from skep.control.directory import Claim, NameTaken
from skep.errors import UserError

HOLD = """
import signal, sys
from skep.control.directory import Claim
claim = Claim(sys.argv[1])
print("mine", flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "skep"


def holder(name: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, name], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "src"}
    )
    assert process.stdout is not None and process.stdout.readline() == b"mine\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate(timeout=10)


def test_a_name_is_one_vms_until_it_is_released(run: Path) -> None:
    with Claim("web") as claim:
        assert claim.socket == str(run / "web.sock")
        assert directory.names() == ["web"]
        with pytest.raises(NameTaken, match=rf"^web: a VM of that name is running \(process {os.getpid()}\); give"):
            Claim("web")
        with Claim("db"):
            assert directory.names() == ["db", "web"]
    claim.release()
    assert directory.names() == []
    assert list(run.iterdir()) == []
    Claim("web").release()


def test_the_killed_leave_no_ghost(run: Path) -> None:
    process = holder("web")
    (run / "web.sock").touch()
    assert directory.names() == ["web"]
    end(process)
    assert {path.name for path in run.iterdir()} == {"web.lock", "web.sock"}
    assert directory.names() == []
    assert list(run.iterdir()) == []


def test_a_dead_vms_name_can_be_had_at_once(run: Path) -> None:
    process = holder("web")
    (run / "web.sock").touch()
    end(process)
    with Claim("web") as claim:
        assert not os.path.exists(claim.socket)


def test_of_many_one_gets_the_name(run: Path) -> None:
    """And those who clean up meanwhile take it from nobody."""
    got: list[Claim] = []
    lost: list[str] = []
    start = threading.Barrier(9)

    def claim() -> None:
        start.wait()
        for _ in range(20):
            try:
                got.append(Claim("web", patience=0.001))
                return
            except NameTaken as error:
                lost.append(str(error))

    def look() -> None:
        start.wait()
        for _ in range(200):
            directory.names()

    threads = [threading.Thread(target=claim) for _ in range(8)] + [threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(got) == 1 and len(lost) == 7 * 20
    assert directory.names() == ["web"]
    got[0].release()


def test_names_without_a_wish_are_numbered() -> None:
    claims = [Claim.any_of("guest") for _ in range(3)]
    assert [claim.name for claim in claims] == ["guest", "guest-2", "guest-3"]
    claims[1].release()
    with Claim.any_of("guest") as claim:
        assert claim.name == "guest-2"
    for claim in claims:
        claim.release()


def test_the_directory_is_its_users_alone(run: Path) -> None:
    before = os.umask(0)
    try:
        Claim("web").release()
    finally:
        os.umask(before)
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    run.chmod(0o755)
    with pytest.raises(UserError, match="not a directory of this user's alone; remove it, or set XDG_RUNTIME_DIR"):
        Claim("web")


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_what_others_put_in_its_place_is_refused(run: Path, tmp_path: Path, kind: str) -> None:
    if kind == "file":
        run.touch()
    else:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        run.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    with pytest.raises(UserError, match="not a directory of this user's alone"):
        Claim("web")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_users_run_directory_is_not_taken(tmp_path: Path) -> None:
    """As root has it by way of sudo: what root made there, its owner could not use."""
    os.chown(tmp_path, 65534, 65534)
    assert not directory.directory().startswith(str(tmp_path))
    assert not (tmp_path / "skep").exists()


def test_without_a_run_directory_there_is_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    for value in ("", "relative", "/nonexistent"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert directory.directory() in (f"/run/user/{me}/skep", f"/tmp/skep-{me}")


def test_a_path_too_long_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with pytest.raises(UserError, match="longer than the 107 bytes"):
        Claim("web")


def test_a_lock_held_for_a_moment_is_waited_for(run: Path) -> None:
    """By somebody who looks whether it is stale."""
    run.mkdir(mode=0o700)
    fd = directory._try(run / "web.lock")
    assert fd is not None
    threading.Timer(0.1, os.close, (fd,)).start()
    Claim("web").release()


def test_sigterm_leaves_what_the_next_look_removes(run: Path) -> None:
    process = holder("web")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert directory.names() == []
    assert list(run.iterdir()) == []
