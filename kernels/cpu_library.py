"""The compiled CPU kernels of this process, loaded once and checked before use.

``SLOPE_COMPILE_CPU`` chooses the level of instruction sets.  If it is unset, the best level that works is taken; ``0``
turns the kernels off; a level's name takes that level or none.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from slope_compile.errors import ConfigError
from slope_compile.kernels import cpu_build
from slope_compile.kernels.cpu_build import ABI, LEVELS, BuildError, Compiler
from slope_compile.kernels.cpu_self_test import self_test
from slope_compile.log import log

VARIABLE = "SLOPE_COMPILE_CPU"
OFF = "0"

Function = Callable[..., int]

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_START = (_INT, _INT)  # dtype, threads
_MATRIX = (_POINTER, _LONG, _LONG)  # with the strides of both dimensions
_SPARSE = (_POINTER, _POINTER)  # values, pattern
_SIGNATURES: dict[str, tuple[type, tuple[type, ...]]] = {
    # x, W, bias, down, up, R, y, M, N, K
    "forward": (_INT, (*_START, *_MATRIX, *_SPARSE, *[_POINTER] * 3, _LONG, _POINTER, *[_LONG] * 3)),
    # grad, W, column mask, dx, M, N, K
    "grad_input": (_INT, (*_START, *_MATRIX, *_SPARSE, _POINTER, _POINTER, *[_LONG] * 3)),
    # grad, x, pattern, dv, accumulate, M, N, K
    "grad_weight": (_INT, (*_START, *_MATRIX, *_MATRIX, _POINTER, _POINTER, _INT, *[_LONG] * 3)),
    # dense, pattern, values, N, K
    "compress": (_INT, (*_START, *_MATRIX, _POINTER, _POINTER, _LONG, _LONG)),
    # W, column mask, dense, N, K
    "expand": (_INT, (*_START, *_SPARSE, _POINTER, _POINTER, _LONG, _LONG)),
    # W, column mask, N, K
    "pick_columns": (_INT, (*_START, *_SPARSE, _POINTER, _LONG, _LONG)),
    # W, column mask, column values, column pattern, N, K
    "compress_columns": (_INT, (*_START, *_SPARSE, *[_POINTER] * 3, _LONG, _LONG)),
    # pattern, N, K
    "illegal_groups": (_LONG, (_POINTER, _LONG, _LONG)),
}
"""Name without ``slope_cpu_`` -> types of the result and of the arguments."""


class LibraryError(Exception):
    """A compiled library cannot be used."""


class CpuLibrary:
    """The C functions, called with numbers and addresses; ``csrc/slope_cpu.cpp`` describes their arguments.

    They check nothing.  A status other than 0 is an error: 1 for no memory, 2 for an unknown dtype.
    """

    forward: Function
    grad_input: Function
    grad_weight: Function
    compress: Function
    expand: Function
    pick_columns: Function
    compress_columns: Function
    illegal_groups: Function
    isa: str
    """The level it was built for."""
    path: Path

    def __init__(self, path: Path) -> None:
        """Load a file, without running any of its kernels.

        Raises:
            LibraryError: it cannot be loaded, has another version of the interface, or is not for this CPU.
        """
        try:
            handle = ctypes.CDLL(str(path))
            version = handle.slope_cpu_abi()
            if version != ABI:
                raise LibraryError(f"version {version} of the interface, expected {ABI}")
            if not handle.slope_cpu_supported():
                raise LibraryError("this CPU or operating system does not run it")
            handle.slope_cpu_isa.restype = ctypes.c_char_p
            isa: bytes = handle.slope_cpu_isa()
            self.path, self.isa = path, isa.decode("ascii")
            for name, (result, types) in _SIGNATURES.items():
                function = getattr(handle, f"slope_cpu_{name}")
                function.argtypes, function.restype = types, result
                setattr(self, name, function)
            handle.slope_cpu_set_parallel.argtypes = (_POINTER,)
            handle.slope_cpu_set_parallel.restype = None
            handle.slope_cpu_set_parallel(_torch_parallel_for())
        except (OSError, AttributeError) as error:
            raise LibraryError(f"it cannot be loaded ({error})") from error


def _torch_parallel_for() -> int | None:
    """The address of PyTorch's ``torch_parallel_for``, a C function; without it the kernels run on one thread."""
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))  # loaded already: the same one
        return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        log.debug("CPU kernels: no torch_parallel_for, they run on one thread", exc_info=True)
        return None


class _Loader:
    """The state of loading the library in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done = False
        self.library: CpuLibrary | None = None
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.testing = threading.Lock()
        self.leaving = False

    def begin(self, requested: str | None) -> threading.Thread:
        """The thread that finds the library, started by the first call, and again after one that failed.

        The library is found in a thread of its own so that the caller's thread-local modes do not apply: autocast, a
        default device, fake tensors, a counter of FLOPs, a transformation of ``torch.func``.  The self-test would fail
        in these modes.
        """
        with self.lock:
            if self.thread is None or not (self.done or self.thread.is_alive()):
                name = "slope_compile CPU kernels"
                self.thread = threading.Thread(target=self._run, args=(requested,), name=name, daemon=True)
                self.thread.start()
            return self.thread

    def _run(self, requested: str | None) -> None:
        try:
            self.library = _find(requested)
            self.done = True
        except BaseException as failure:
            self.failure = failure  # for those who wait

    def test(self, library: CpuLibrary) -> str | None:
        """The self-test, unless the process is about to end."""
        with self.testing:
            if self.leaving:
                raise SystemExit("CPU kernels: the process ends, none are loaded any more")
            return self_test(library)

    def leave(self) -> None:
        """Wait for a test that is running, and let no other begin.

        The thread is a daemon, so that a running compiler does not delay the end of the process.  But a daemon that
        returns to Python after the interpreter has ended is itself ended, and inside PyTorch's C++ code that calls
        ``std::terminate``.
        """
        with self.testing:
            self.leaving = True

    def found(self) -> CpuLibrary | None:
        """The library that the thread found, or None; raises if the thread failed."""
        if not self.done and self.failure is not None:
            raise self.failure
        return self.library


_loader = _Loader()


def load() -> CpuLibrary | None:
    """The library, or None where there is none; found at the first call, compiled if need be.

    Raises:
        ConfigError: the environment variable has an unknown value.
    """
    loader = _loader
    if not loader.done:
        loader.begin(_requested()).join()
    return loader.found()


def start_loading() -> None:
    """Begin :func:`load` in the background.

    Raises:
        ConfigError: the environment variable has an unknown value.
    """
    if not _loader.done and (requested := _requested()) != OFF:
        _loader.begin(requested)


def _start_afresh() -> None:
    """Begin anew in a forked child: the thread that was loading and holds the lock exists in the parent only."""
    global _loader
    if not _loader.done:
        _loader = _Loader()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
atexit.register(lambda: _loader.leave())


def _requested() -> str | None:
    """The level asked for, "0", or None for the best."""
    value = os.environ.get(VARIABLE, "")
    if value and value != OFF and value not in LEVELS:
        raise ConfigError(f"{VARIABLE}={value!r}: expected 0 (off), {', '.join(reversed(LEVELS))}, or unset")
    return value or None


def _find(requested: str | None) -> CpuLibrary | None:
    """Walk down the ladder until a level works; one warning in all if one did not."""
    if requested == OFF:
        log.info("CPU kernels: off (%s=0)", VARIABLE)
        return None
    compiler = cpu_build.find_compiler()
    if compiler is None:
        log.warning(
            "CPU kernels: no C++ compiler found, so 2:4 layers on the CPU are expanded and run dense, "
            "on copies that are kept while weights are constant. Install one "
            "(Debian, Ubuntu: apt install g++; macOS: xcode-select --install; conda: conda install cxx-compiler) "
            "or name it in CXX. %s=0 silences this.",
            VARIABLE,
        )
        return None
    refused = []
    claimed = [level for level in LEVELS if not cpu_build.missing_features(level)]
    for level in claimed if requested is None else [requested]:
        try:
            library = _try(level, compiler)
        except (BuildError, LibraryError) as error:
            refused.append(f"{level}: {error}")
            log.debug("CPU kernels: %s: %s\n%s", level, error, getattr(error, "details", ""), exc_info=True)
            continue
        if refused:
            log.warning(
                "CPU kernels: using the level %s, because a better one is not usable here (%s); "
                'TORCH_LOGS="+slope_compile" shows details',
                level,
                "; ".join(refused),
            )
        return library
    log.warning(
        "CPU kernels: none is usable here (%s), so 2:4 layers on the CPU are expanded and run dense. %s "
        'TORCH_LOGS="+slope_compile" shows details, %s=0 silences this.',
        "; ".join(refused),
        "They need g++ 11 or clang++ 14, or newer, named in CXX if need be."
        if requested is None
        else f"No other level was tried, because {VARIABLE}={requested}.",
        VARIABLE,
    )
    return None


def _try(level: str, compiler: Compiler) -> CpuLibrary:
    """The library of one level, built, loaded and tested."""
    if missing := cpu_build.missing_features(level):
        raise LibraryError(f"this CPU has no {', '.join(sorted(missing))}")
    path = cpu_build.build(level, compiler)
    library = CpuLibrary(path)
    if library.isa != level:
        raise LibraryError(f"it was built as {library.isa}")
    if (wrong := _loader.test(library)) is not None:
        raise LibraryError(f"its results are wrong: {wrong}")
    log.info("CPU kernels: level %s, %s", level, path)
    return library
