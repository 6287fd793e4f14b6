"""Files that outlive a process: compiled libraries, tables of measurements, algorithms that were verified.

Several processes, on several machines with one home directory, may read and write at the same time.  A file is
therefore put in place whole, under a name made of everything that it depends on.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from slope_compile.log import log


def cache_folder() -> Path:
    """The folder of these files: beside Inductor's cache if the user has set that, else in the user's own cache.

    If that folder cannot be written, a temporary one with a copy of its files.
    """
    folder = _users_folder()
    problem = _problem(folder)
    if problem is None:
        return folder
    private = Path(_private_folder(folder).name)
    log.debug("%s %s; files are kept in %s, for this process alone", folder, problem, private)
    return private


def nothing_lasts() -> str | None:
    """Why files in :func:`cache_folder` will not outlive this process; None if they will."""
    folder = _users_folder()
    problem = _problem(folder)
    return None if problem is None else f"{folder} {problem}"


def write(path: Path, text: str) -> None:
    """Put a file in place whole: whoever reads at the same time finds the old content or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def key(*parts: str) -> str:
    """A part of a file's name: another one for other parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def digest(paths: Iterable[Path]) -> str:
    """A digest of the names and contents of files, whatever their order and folder."""
    found = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _users_folder() -> Path:
    root = _chosen_root() or os.environ.get("XDG_CACHE_HOME", "")
    return Path(root if os.path.isabs(root) else os.path.expanduser(os.path.join("~", ".cache"))) / "slope_compile"


def _chosen_root() -> str:
    """``TORCHINDUCTOR_CACHE_DIR``, absolute, if the user has set it; else "".

    Importing Dynamo sets it too, in the process's own environment, to a folder among the temporary files, which is
    ignored here.  Otherwise the cache would move once Dynamo is imported and be lost at reboot.
    """
    root = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    folder, name = os.path.split(root)
    if not root or (folder == tempfile.gettempdir() and name.startswith("torchinductor_")):
        return ""
    return os.path.abspath(root)


def _problem(folder: Path) -> str | None:
    """Why no library can be written to a folder and loaded from it; None if it can."""
    if not folder.is_absolute():  # a user without a home: the folder would depend on the current directory
        return "is in no home"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
        noexec: int = getattr(os, "ST_NOEXEC", 0)
        return "is mounted noexec" if noexec and os.statvfs(folder).f_flag & noexec else None
    except OSError as error:
        return f"cannot be written ({error})"


@functools.cache
def _private_folder(instead_of: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed when the process ends, with a copy of the files of one that cannot be written.

    A read-only home that was filled before, in the image of a container for instance, so spares the compilation.
    """
    folder = tempfile.TemporaryDirectory(prefix="slope_compile-", ignore_cleanup_errors=True)
    try:
        for path in instead_of.iterdir() if instead_of.is_absolute() else ():
            if path.suffix in (".so", ".sha256", ".json"):
                shutil.copy(path, folder.name)
    except OSError:
        log.debug("%s cannot be read", instead_of, exc_info=True)
    return folder
