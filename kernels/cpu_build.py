"""Compile the C++ kernels for one level of instruction sets, once per machine.

A library is cached under a name made of everything that it depends on: sources, flags, compiler and its version,
platform.  Beside it stands the sha256 of its bytes, so that a torn file is never loaded.  Several processes, on several
machines with one home directory, may ask at the same time: one compiles, the others wait and find the file.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from slope_compile.kernels import cache_files
from slope_compile.kernels._cpu_compiler import inductor_compilers
from slope_compile.log import log

ABI = 3
"""Version of the C interface that the Python side expects; see ``slope_cpu_abi``."""

SOURCE = Path(__file__).parent / "csrc" / "slope_cpu.cpp"
"""The one translation unit; it includes the headers beside it."""

LEVELS = ("avx512_bf16", "avx512", "avx2", "portable")
"""The ladder, best first."""

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
FLAGS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "-mavx512vbmi2", "-mavx512bf16", "-mbmi2"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": (),
}
"""Level -> flags for the instructions that the compiler may use; -march=native would tie the file to one machine."""

FEATURES = {level: frozenset(flag.removeprefix("-m") for flag in flags) for level, flags in FLAGS.items()}
"""Level -> the features that the CPU must have, spelled as in :func:`cpu_features`."""

COMMON_FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden")
"""Hidden symbols: two levels in one process must not share their inline variables."""

COMPILE_SECONDS = 600
"""The time after which a compiler is stopped."""


class BuildError(Exception):
    """A library could not be built.  ``details`` is the compiler's output."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class Compiler(NamedTuple):
    """A compiler that runs here."""

    command: tuple[str, ...]
    version: str
    """The whole output of ``--version``."""

    def __str__(self) -> str:
        return f"{' '.join(self.command)} ({self.version.splitlines()[0] if self.version else 'no version'})"


def cpu_features() -> frozenset[str]:
    """The features that the CPU reports, in lower case without separators (``avx512bf16``); empty where unknown.

    The library checks in ``slope_cpu_supported`` whether the operating system supports them too.
    """
    text = _sysctl("machdep.cpu.features", "machdep.cpu.leaf7_features") or _cpuinfo().get("flags", "")
    return frozenset(word.lower().replace("_", "").replace(".", "") for word in text.split())


def cpu_model() -> str:
    """The name of the CPU's model; empty where unknown."""
    found = _cpuinfo()
    parts = (found.get(field, "") for field in ("model name", "CPU implementer", "CPU variant", "CPU part"))
    return _sysctl("machdep.cpu.brand_string") or " ".join(filter(None, parts)) or platform.processor()


def _cpuinfo() -> dict[str, str]:
    """Linux's description of the first CPU; empty on other systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = itertools.takewhile(str.strip, file)
            return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    except OSError:
        log.debug("CPU kernels: the description of the CPU cannot be read", exc_info=True)
        return {}


def _sysctl(*names: str) -> str:
    """Properties of the CPU as macOS gives them; empty on other systems."""
    if sys.platform != "darwin":
        return ""
    try:
        return _run(("sysctl", "-n", *names), timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        log.debug("CPU kernels: the description of the CPU cannot be read", exc_info=True)
        return ""


def missing_features(level: str) -> frozenset[str]:
    """The features that a level needs and this CPU does not report."""
    return FEATURES[level] - cpu_features()


def find_compiler() -> Compiler | None:
    """The compiler that Inductor would use, else $CXX, g++ or clang++; None if none of them runs."""
    for name in dict.fromkeys([*inductor_compilers(), os.environ.get("CXX", ""), "g++", "clang++"]):
        if not name:
            continue
        command = (name,) if shutil.which(name) else tuple(shlex.split(name))  # "ccache g++" is two words
        try:
            answer = _run((*command, "--version"), timeout=60)
        except (OSError, subprocess.SubprocessError):
            continue
        if answer.returncode == 0:
            return Compiler(command, answer.stdout.strip())
    return None


def _run(command: tuple[str, ...], timeout: float) -> subprocess.CompletedProcess[str]:
    """The outcome of a command.  Its messages are in no particular language, so that the key depends on none."""
    return subprocess.run(
        command,
        env=os.environ | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


def source_files(source: Path = SOURCE) -> list[Path]:
    """The translation unit and all headers beside it."""
    return [path for path in source.parent.iterdir() if path.suffix in (".cpp", ".h")]


def cache_key(level: str, compiler: Compiler, source: Path = SOURCE) -> str:
    """The name of this level's library, which changes with everything that could change the library."""
    parts = (
        str(ABI),
        source.name,
        cache_files.digest(source_files(source)),
        *COMMON_FLAGS,
        *FLAGS[level],
        *compiler.command,
        compiler.version,
        sys.platform,
        platform.machine(),
    )
    return f"slope_cpu-{level}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


def build(level: str, compiler: Compiler, source: Path = SOURCE) -> Path:
    """The library of a level, from the cache or compiled now.

    Raises:
        BuildError: the sources are not there, nothing can be written, or the compiler failed.
    """
    try:
        key, folder = cache_key(level, compiler, source), cache_files.cache_folder()
        library = folder / f"{key}.so"
        if not _is_whole(library):
            with _locked(folder / f"{key}.lock") as alone:
                if not _is_whole(library):  # another process may have made it while this one waited
                    if alone:
                        _sweep(library)
                    _compile(level, compiler, source, library)
        return library
    except OSError as error:
        raise BuildError(f"it cannot be built ({error})") from error


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_whole(library: Path) -> bool:
    """Whether a cached library exists with all its bytes; loading a truncated one could end the process."""
    try:
        expected = _digest_file(library).read_text(encoding="ascii")
        return hashlib.sha256(library.read_bytes()).hexdigest() == expected
    except (OSError, ValueError):
        return False


def _work_prefix(library: Path) -> str:
    return f".{library.stem}-"


def _sweep(library: Path) -> None:
    """Remove the files of a process that ended while compiling."""
    for abandoned in library.parent.glob(f"{_work_prefix(library)}*"):
        shutil.rmtree(abandoned, ignore_errors=True)


def _compile(level: str, compiler: Compiler, source: Path, library: Path) -> None:
    """Compile under a temporary name, then put library and digest in place."""
    prefix = _work_prefix(library)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=prefix, ignore_cleanup_errors=True) as work:
        result, digest = Path(work) / library.name, Path(work) / "digest"
        command = (*compiler.command, *COMMON_FLAGS, *FLAGS[level], str(source), "-o", str(result))
        log.debug("CPU kernels: %s", shlex.join(command))
        try:
            outcome = _run(command, timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler} did not finish in {COMPILE_SECONDS} s") from error
        if outcome.returncode or not result.is_file():
            raise BuildError(f"it does not compile with {compiler}", outcome.stderr + outcome.stdout)
        digest.write_text(hashlib.sha256(result.read_bytes()).hexdigest(), encoding="ascii")
        os.replace(result, library)
        os.replace(digest, _digest_file(library))


_lock_files: set[int] = set()
"""File descriptors of the locks that this process holds or waits for."""


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock among processes; yields whether it could be taken.

    Where locks do not work (some network file systems) two processes may compile the same library, which is harmless.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    _lock_files.add(descriptor)
    try:
        locked = _lock(descriptor)
        try:
            yield locked
        finally:
            if locked:
                _unlock(descriptor)
    finally:
        _lock_files.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):
        log.debug("CPU kernels: files cannot be locked here", exc_info=True)
        return False
    return True


def _unlock(descriptor: int) -> None:
    """Unlock explicitly: a child forked meanwhile has the file open too, so that closing it would not unlock it."""
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _forget_locks() -> None:
    """Close the lock files in a forked child: the locks are the parent's and must be free when it ends."""
    for descriptor in _lock_files:
        os.close(descriptor)
    _lock_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
