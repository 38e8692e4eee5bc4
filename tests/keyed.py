"""Keys of what is expensive to make: the same sources, compiler and flags give the same key, whenever they were written."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def version_of(compiler: str | Path) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def key(*parts: str | Path) -> str:
    """A hash of texts and of files; a folder stands for the files below it."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode() + b"\0")
            continue
        files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
        for file in files:
            if file.suffix != ".pyc":
                digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@contextmanager
def made_once(folder: Path, *parts: str | Path, files: Iterable[Path] = ()) -> Iterator[bool]:
    """Whether what ``folder`` holds has yet to be made from ``parts``; one process at a time is told, the others wait.

    Leaving the block without an error notes that it has been made; ``files`` must be there, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note, wanted = folder / "key", key(*parts)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = not note.exists() or note.read_text() != wanted or not all(f.exists() for f in files)
        if missing:
            note.unlink(missing_ok=True)
        yield missing
        if missing:
            note.write_text(wanted)
