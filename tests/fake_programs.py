"""Fake programs on PATH, so that failures which are hard to cause can be seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def fake(folder: Path, name: str, script: str) -> Path:
    """Write an executable POSIX shell script that stands in for a program and records its arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>"$0.calls"\n{script}\n')
    program.chmod(0o755)
    return program


def calls(folder: Path, name: str) -> list[str]:
    """Return the argument lines that a fake was called with."""
    record = folder / f"{name}.calls"
    return record.read_text().splitlines() if record.exists() else []
