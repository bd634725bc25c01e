"""Debian's package client with lists of its own: for other architectures and releases than this machine's."""

from __future__ import annotations

from pathlib import Path


def client(home: Path, architecture: str, source: str | None = None) -> tuple[str, ...]:
    """How its commands begin. It keeps all in ``home``, packages in ``home/archives``. ``source`` is the one line
    of its sources; None: it has this machine's."""
    for name in ("lists/partial", "archives/partial"):
        (home / name).mkdir(parents=True)
    (home / "status").touch()
    options = {
        "Dir::State": home, "Dir::State::status": home / "status", "Dir::Cache": home,
        "APT::Architecture": architecture, "APT::Architectures": architecture, "APT::Sandbox::User": "root",
        "Acquire::Languages": "none", "Debug::NoLocking": "true",
    }  # fmt: skip
    if source is not None:
        for name in ("etc/sources.list.d", "etc/preferences.d"):
            (home / name).mkdir(parents=True)
        (home / "etc/sources.list").write_text(f"{source}\n")
        options |= {"Dir::Etc": home / "etc", "Dir::Etc::parts": "/etc/apt/apt.conf.d"}
    return ("apt-get", "-q", "-y", *(part for name, value in options.items() for part in ("-o", f"{name}={value}")))
