"""Loading the CPU kernels: the ladder of levels, the messages on the way down, the self-test, threads and forks."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from slope_compile.errors import ConfigError
from slope_compile.kernels import cpu_build, cpu_library
from slope_compile.kernels.cpu_build import Compiler
from slope_compile.kernels.cpu_library import CpuLibrary, LibraryError
from slope_compile.kernels.cpu_self_test import self_test

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the CPU kernels need g++ or clang++")

FUNCTIONS = sorted(cpu_library._SIGNATURES)

STUB = """
#define EXPORT extern "C" __attribute__((visibility("default")))
#if defined(__AVX512F__)
#define LEVEL "avx512"
#elif defined(__AVX2__)
#define LEVEL "avx2"
#else
#define LEVEL "portable"
#endif
EXPORT int slope_cpu_abi(void) { return 3; }
EXPORT const char* slope_cpu_isa(void) { return LEVEL; }
EXPORT int slope_cpu_supported(void) { return 1; }
EXPORT void slope_cpu_set_parallel(void*) {}
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has loaded nothing, without a level asked for."""
    monkeypatch.delenv(cpu_library.VARIABLE, raising=False)
    monkeypatch.setattr(cpu_library, "_loader", cpu_library._Loader())
    yield
    thread = cpu_library._loader.thread
    if thread is not None:
        thread.join(120)


@pytest.fixture
def compiler() -> Compiler:
    found = cpu_build.find_compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture
def library(compiler: Compiler) -> CpuLibrary:
    """The library of this machine; compiled by the first test that asks."""
    found = cpu_library.load()
    assert found is not None
    return found


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What users would see so far."""
    caplog.set_level(logging.INFO, "slope_compile")

    def seen() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    return seen


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> Path:
    """In place of the sources: a translation unit that has every function, and computes nothing."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    functions = "".join(f"EXPORT int slope_cpu_{name}(...) {{ return 0; }}\n" for name in FUNCTIONS)
    (folder / "slope_cpu.cpp").write_text(STUB + functions)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    build = cpu_build.build
    monkeypatch.setattr(cpu_build, "build", lambda level, by: build(level, by, folder / "slope_cpu.cpp"))
    monkeypatch.setattr(cpu_build, "cpu_features", lambda: cpu_build.FEATURES["avx512"])
    return folder / "slope_cpu.cpp"


# --- the real one ---------------------------------------------------------------------------------------


def test_the_best_level_of_this_machine(library: CpuLibrary) -> None:
    assert library.isa in cpu_build.LEVELS
    assert not cpu_build.missing_features(library.isa)
    assert cpu_library.load() is library
    assert self_test(library) is None


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_the_portable_level(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.VARIABLE, "portable")
    library = cpu_library.load()
    assert library is not None
    assert library.isa == "portable"


def test_without_pytorchs_threads(library: CpuLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_library._torch_parallel_for() is not None
    monkeypatch.setattr(cpu_library, "_torch_parallel_for", lambda: None)
    copy = Path(shutil.copy(library.path, tmp_path / "copy.so"))  # another file: variables of its own
    assert self_test(CpuLibrary(copy)) is None


# --- the ladder -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh", "stub")
def test_wrong_results_fall_down_the_ladder(warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    tested = []

    def only_portable_is_right(library: CpuLibrary) -> str | None:
        tested.append(library.isa)
        return None if library.isa == "portable" else "forward is wrong"

    monkeypatch.setattr(cpu_library, "self_test", only_portable_is_right)
    library = cpu_library.load()
    assert library is not None
    assert library.isa == "portable"
    assert cpu_library.load() is library
    assert tested == ["avx512", "avx2", "portable"]
    (warning,) = warnings()
    assert "using the level portable" in warning
    assert "avx512: its results are wrong: forward is wrong" in warning
    assert "avx2: its results are wrong" in warning


@pytest.mark.usefixtures("fresh", "stub")
def test_no_level_is_right(warnings: Callable[[], list[str]]) -> None:
    """The functions of the stub do nothing and say that all went well: the self-test itself refuses each level."""
    assert cpu_library.load() is None
    assert cpu_library.load() is None
    (warning,) = warnings()
    assert "run dense" in warning
    for level in ("avx512", "avx2", "portable"):
        assert f"{level}: its results are wrong: illegal_groups is wrong" in warning


@pytest.mark.usefixtures("fresh")
def test_a_level_that_does_not_compile(
    stub: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, "slope_compile")
    stub.write_text("#if defined(__AVX512F__)\n#error too old a compiler\n#endif\n" + stub.read_text())
    monkeypatch.setattr(cpu_library, "self_test", lambda library: None)
    library = cpu_library.load()
    assert library is not None
    assert library.isa == "avx2"
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "avx512: it does not compile" in warning
    assert "too old a compiler" not in warning
    details = [record for record in caplog.records if "too old a compiler" in record.getMessage()]
    assert {record.levelno for record in details} == {logging.DEBUG}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("abi(void) { return 3; }", "abi(void) { return 0; }", "version 0 of the interface"),
        ("supported(void) { return 1; }", "supported(void) { return 0; }", "does not run it"),
        ("EXPORT int slope_cpu_expand(...)", "EXPORT int slope_cpu_another(...)", "slope_cpu_expand"),
        ("return LEVEL;", 'return "avx2";', "built as avx2"),
    ],
    ids=["interface", "CPU", "symbol", "level"],
)
def test_what_is_checked_before_a_kernel_runs(
    old: str,
    new: str,
    why: str,
    stub: Path,
    warnings: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def must_not_run(library: CpuLibrary) -> str | None:
        pytest.fail("a kernel was run")

    monkeypatch.setattr(cpu_library, "self_test", must_not_run)
    monkeypatch.setenv(cpu_library.VARIABLE, "avx512")
    stub.write_text(stub.read_text().replace(old, new))
    assert cpu_library.load() is None
    (warning,) = warnings()
    assert why in warning
    assert "SLOPE_COMPILE_CPU=avx512" in warning


@pytest.mark.usefixtures("fresh")
def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "torn.so").write_bytes(b"\x7fELF and then nothing")
    with pytest.raises(LibraryError, match="cannot be loaded"):
        CpuLibrary(tmp_path / "torn.so")


@pytest.mark.slow
@pytest.mark.skipif(not cpu_build.missing_features("avx512"), reason="this CPU has AVX-512")
@pytest.mark.skipif(bool(cpu_build.missing_features("avx2")), reason="not an x86-64 with AVX2")
def test_a_wrong_guess_is_refused_by_the_library_itself(compiler: Compiler, tmp_path: Path) -> None:
    """The real sources, built for a level that this CPU does not have: no SIGILL, in a process of its own."""
    code = """
import pathlib, sys
from slope_compile.kernels import cpu_build, cpu_library
cpu_build.cpu_features = lambda: cpu_build.FEATURES["avx512"]
compiler = cpu_build.find_compiler()
try:
    cpu_library.CpuLibrary(cpu_build.build("avx512", compiler))
except cpu_library.LibraryError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "does not run it" in result.stdout


# --- what is asked for ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_off(monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]) -> None:
    monkeypatch.setenv(cpu_library.VARIABLE, "0")
    monkeypatch.setattr(cpu_build, "find_compiler", lambda: pytest.fail("looked for a compiler"))
    cpu_library.start_loading()
    assert cpu_library._loader.thread is None
    assert cpu_library.load() is None
    assert warnings() == []


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("value", ["1", "avx", "AVX2", "native", " "])
def test_an_unknown_level_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.VARIABLE, value)
    for function in (cpu_library.start_loading, cpu_library.load, cpu_library.load):
        with pytest.raises(ConfigError, match=r"SLOPE_COMPILE_CPU=.*portable, avx2, avx512, avx512_bf16"):
            function()


@pytest.mark.usefixtures("fresh", "stub")
def test_a_level_asked_for_is_the_only_one_tried(
    monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    monkeypatch.setenv(cpu_library.VARIABLE, "avx2")
    monkeypatch.setattr(cpu_library, "self_test", lambda library: None)
    library = cpu_library.load()
    assert library is not None
    assert library.isa == "avx2"
    assert warnings() == []


@pytest.mark.usefixtures("fresh", "stub")
def test_a_level_that_the_cpu_does_not_have(monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]) -> None:
    monkeypatch.setenv(cpu_library.VARIABLE, "avx512_bf16")
    assert cpu_library.load() is None
    (warning,) = warnings()
    assert "avx512_bf16: this CPU has no avx512bf16, avx512vbmi2" in warning


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]) -> None:
    monkeypatch.setattr(cpu_build, "find_compiler", lambda: None)
    assert cpu_library.load() is None
    assert cpu_library.load() is None
    (warning,) = warnings()
    assert "apt install g++" in warning


# --- threads and forks ----------------------------------------------------------------------------------


class Slow:
    """In place of the search: ends when told to, and counts."""

    def __init__(self, result: CpuLibrary | None) -> None:
        self.result, self.calls, self.begun, self.may_end = result, 0, threading.Event(), threading.Event()

    def __call__(self, requested: str | None) -> CpuLibrary | None:
        self.calls += 1
        self.begun.set()
        assert self.may_end.wait(60)
        return self.result


@pytest.mark.usefixtures("fresh")
def test_loading_in_the_background(library: CpuLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "_loader", cpu_library._Loader())
    slow = Slow(library)
    monkeypatch.setattr(cpu_library, "_find", slow)
    cpu_library.start_loading()
    cpu_library.start_loading()
    thread = cpu_library._loader.thread
    assert thread is not None
    assert thread.daemon
    assert slow.begun.wait(60)
    results: list[CpuLibrary | None] = []
    callers = [threading.Thread(target=lambda: results.append(cpu_library.load()), daemon=True) for _ in range(4)]
    for caller in callers:
        caller.start()
    time.sleep(0.05)
    assert results == []
    slow.may_end.set()
    for caller in callers:
        caller.join(60)
    assert results == [library] * 4
    assert slow.calls == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.usefixtures("fresh")
def test_a_child_forked_while_loading_loads_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(None)
    monkeypatch.setattr(cpu_library, "_find", slow)
    cpu_library.start_loading()
    assert slow.begun.wait(60)
    child = multiprocessing.get_context("fork").Process(target=_load_in_child, daemon=True)
    child.start()
    child.join(60)
    finished = child.exitcode
    slow.may_end.set()
    if finished is None:
        child.kill()
    assert finished == 0, "the child waits for a thread that it does not have"
    assert cpu_library.load() is None
    assert slow.calls == 1


def _load_in_child() -> None:
    found: list[str | None] = []

    def find(requested: str | None) -> None:
        found.append(requested)

    cpu_library._find = find
    assert cpu_library.load() is None
    assert found == [None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_later_keeps_the_library(library: CpuLibrary) -> None:
    child = multiprocessing.get_context("fork").Process(target=_expect_loaded, daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert cpu_library.load() is library


def _expect_loaded() -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    assert cpu_library._loader.done
    library = cpu_library.load()
    assert library is not None
    assert self_test(library) is None


# --- nothing at import ----------------------------------------------------------------------------------


def test_importing_does_nothing() -> None:
    code = """
import sys, torch
done = []
def watch(event, args):
    if event in ("subprocess.Popen", "os.posix_spawn", "ctypes.dlopen", "os.mkdir") or (
        event == "open" and isinstance(args[1], str) and ("w" in args[1] or "a" in args[1])
    ):
        done.append((event, args))
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import threading
import slope_compile.kernels.cpu_library as cpu_library
assert not done, done
assert threading.active_count() == 1
assert not cpu_library._loader.done
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
