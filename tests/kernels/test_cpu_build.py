"""Compiling and caching the C++ kernels: what names a library, who compiles it, and what is never loaded."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import stat
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from slope_compile.kernels import _cpu_compiler, cache_files, cpu_build
from slope_compile.kernels.cpu_build import BuildError, Compiler

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the CPU kernels need g++ or clang++")

SMALL = 'extern "C" __attribute__((visibility("default"))) int answer(void) { return 24; }\n'


@pytest.fixture
def compiler() -> Compiler:
    found = cpu_build.find_compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A translation unit that compiles in no time, with a header beside it."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "part.h").write_text("// nothing\n")
    (folder / "small.cpp").write_text('#include "part.h"\n' + SMALL)
    return folder / "small.cpp"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slope_compile"


def counting(compiler: Compiler, folder: Path, seconds: float = 0) -> tuple[Compiler, Path]:
    """The compiler behind a script that notes each call in a file."""
    script, calls = folder / "compiler.sh", folder / "calls"
    calls.touch()
    command = " ".join(compiler.command)
    script.write_text(f'#!/bin/sh\necho called >> "{calls}"\nsleep {seconds}\nexec {command} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return Compiler((str(script),), compiler.version), calls


def answer(library: Path) -> int:
    result: int = ctypes.CDLL(str(library)).answer()
    return result


# --- the sources ----------------------------------------------------------------------------------------


def test_the_real_sources_are_there_with_their_headers() -> None:
    assert cpu_build.SOURCE.is_file()
    headers = {path.name for path in cpu_build.SOURCE.parent.glob("*.h")}
    included = {
        line.split('"')[1]
        for path in cpu_build.SOURCE.parent.iterdir()
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith('#include "')
    }
    assert included <= headers


# --- the key --------------------------------------------------------------------------------------------


def test_everything_that_matters_changes_the_key(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(("g++",), "g++ 12")
    keys = [cpu_build.cache_key("portable", compiler, source)]

    def expect_another() -> None:
        keys.append(cpu_build.cache_key("portable", compiler, source))

    source.write_text(source.read_text() + "\n")
    expect_another()
    (source.parent / "part.h").write_text("// something\n")
    expect_another()
    (source.parent / "more.h").write_text("")
    expect_another()
    (source.parent / "more.h").rename(source.parent / "other.h")
    expect_another()
    compiler = Compiler(("g++",), "g++ 13")
    expect_another()
    compiler = Compiler(("clang++",), "g++ 13")
    expect_another()
    monkeypatch.setattr(cpu_build, "COMMON_FLAGS", (*cpu_build.COMMON_FLAGS, "-g"))
    expect_another()
    monkeypatch.setitem(cpu_build.FLAGS, "portable", ("-mavx2",))
    expect_another()
    monkeypatch.setattr(cpu_build, "ABI", cpu_build.ABI + 1)
    expect_another()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    expect_another()
    keys.append(cpu_build.cache_key("avx2", compiler, source))
    assert len(set(keys)) == len(keys)


def test_the_rest_does_not(source: Path) -> None:
    compiler = Compiler(("g++",), "g++ 12")
    key = cpu_build.cache_key("avx2", compiler, source)
    (source.parent / "notes.txt").write_text("not compiled")
    os.utime(source)
    assert cpu_build.cache_key("avx2", compiler, source) == key
    elsewhere = shutil.copytree(source.parent, source.parent.parent / "elsewhere")
    assert cpu_build.cache_key("avx2", compiler, elsewhere / source.name) == key


# --- building -------------------------------------------------------------------------------------------


def test_built_once_then_found(source: Path, cache: Path, compiler: Compiler, tmp_path: Path) -> None:
    wrapped, calls = counting(compiler, tmp_path)
    library = cpu_build.build("portable", wrapped, source)
    assert library.parent == cache
    assert answer(library) == 24
    assert cpu_build.build("portable", wrapped, source) == library
    assert calls.read_text().count("called") == 1
    assert {path.suffix for path in cache.iterdir()} == {".so", ".sha256", ".lock"}


@pytest.mark.parametrize("damage", ["truncated", "empty", "no digest", "torn digest", "removed"])
def test_a_torn_library_is_built_again(damage: str, source: Path, cache: Path, compiler: Compiler) -> None:
    library = cpu_build.build("portable", compiler, source)
    whole, digest = library.read_bytes(), library.with_suffix(".sha256")
    assert cache in library.parents
    match damage:
        case "truncated":
            library.write_bytes(whole[: len(whole) // 2])
        case "empty":
            library.write_bytes(b"")
        case "no digest":
            digest.unlink()
        case "torn digest":
            digest.write_bytes(digest.read_bytes()[:20] + b"\xff\xff")
        case "removed":
            library.unlink()
    assert cpu_build.build("portable", compiler, source) == library
    assert library.stat().st_size == len(whole)
    assert answer(library) == 24


def test_several_processes_compile_once(source: Path, cache: Path, compiler: Compiler, tmp_path: Path) -> None:
    wrapped, calls = counting(compiler, tmp_path, seconds=0.5)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=cpu_build.build, args=("portable", wrapped, source), daemon=True) for _ in range(5)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    assert calls.read_text().count("called") == 1
    assert len(list(cache.glob("*.so"))) == 1
    assert answer(cpu_build.build("portable", wrapped, source)) == 24


def test_without_locks_it_still_works(
    source: Path, cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert answer(cpu_build.build("portable", compiler, source)) == 24
    assert cache.is_dir()


def test_what_a_killed_process_left_is_removed(source: Path, cache: Path, compiler: Compiler) -> None:
    key = cpu_build.cache_key("portable", compiler, source)
    left, other = cache / f".{key}-abandoned", cache / ".slope_cpu-avx2-another-one"
    for folder in (left, other):
        folder.mkdir(parents=True)
        (folder / "half.so").touch()
    cpu_build.build("portable", compiler, source)
    assert not left.exists()
    assert other.exists()


def test_a_compilation_error_is_told_and_leaves_nothing(source: Path, cache: Path, compiler: Compiler) -> None:
    source.write_text("this is no C++\n")
    with pytest.raises(BuildError, match="does not compile") as caught:
        cpu_build.build("portable", compiler, source)
    assert "this" in caught.value.details
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_missing_sources_are_a_build_error(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(BuildError):
        cpu_build.build("portable", Compiler(("g++",), ""), tmp_path / "nowhere" / "slope_cpu.cpp")
    assert not cache.exists()


def test_a_compiler_that_hangs_is_given_up(
    source: Path, cache: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped, _ = counting(compiler, tmp_path, seconds=2)
    monkeypatch.setattr(cpu_build, "COMPILE_SECONDS", 0.2)
    with pytest.raises(BuildError, match="did not finish"):
        cpu_build.build("portable", wrapped, source)
    assert not list(cache.glob("*.so"))


# --- where ----------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_replaced(
    source: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")  # root may write anywhere, but not into this
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    library = cpu_build.build("portable", compiler, source)
    assert answer(library) == 24
    assert tmp_path / "file" not in library.parents
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert cpu_build.build("portable", compiler, source) == library


def test_what_a_folder_has_is_used_though_it_cannot_be_written(
    source: Path, cache: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped, calls = counting(compiler, tmp_path)
    library = cpu_build.build("portable", wrapped, source)
    (cache / "tuned-portable.json").write_text("{}")
    assert cache_files.nothing_lasts() is None

    def refuse(**where: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    said = cache_files.nothing_lasts()
    assert said is not None
    assert str(cache) in said
    copy = cpu_build.build("portable", wrapped, source)
    assert copy.name == library.name
    assert copy.parent != cache
    assert answer(copy) == 24
    assert calls.read_text().count("called") == 1
    assert (cache_files.cache_folder() / "tuned-portable.json").read_text() == "{}"


# --- with what ------------------------------------------------------------------------------------------


def test_the_compiler_is_inductors_first(monkeypatch: pytest.MonkeyPatch, compiler: Compiler, tmp_path: Path) -> None:
    wrapped, _ = counting(compiler, tmp_path)
    script = wrapped.command[0]
    config = SimpleNamespace(cpp=SimpleNamespace(cxx=(None, script)))
    monkeypatch.setitem(sys.modules, "torch._inductor.config", config)
    assert _cpu_compiler.inductor_compilers() == [script]
    found = cpu_build.find_compiler()
    assert found is not None
    assert found.command == (script,)


def test_inductors_setting_is_spelled_as_expected() -> None:
    from torch._inductor import config

    assert isinstance(config.cpp.cxx, tuple)
    assert _cpu_compiler.inductor_compilers()


def test_cxx_may_have_arguments(monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> None:
    monkeypatch.setattr(cpu_build, "inductor_compilers", list)
    monkeypatch.setenv("CXX", f"env {' '.join(compiler.command)}")
    found = cpu_build.find_compiler()
    assert found is not None
    assert found.command == ("env", *compiler.command)


def test_a_name_that_is_no_compiler_is_passed_over(monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> None:
    monkeypatch.setattr(cpu_build, "inductor_compilers", lambda: ["false", "/nowhere/c++"])
    monkeypatch.setenv("CXX", "also-not-there")
    found = cpu_build.find_compiler()
    assert found is not None
    assert found.command in (("g++",), ("clang++",))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "inductor_compilers", list)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert cpu_build.find_compiler() is None


# --- for what -------------------------------------------------------------------------------------------


def test_features_decide_the_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = frozenset({"avx2", "fma", "f16c", "sse2"})
    monkeypatch.setattr(cpu_build, "cpu_features", lambda: claimed)
    assert cpu_build.missing_features("avx2") == set()
    assert cpu_build.missing_features("avx512") == {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert {"avx512vbmi2", "avx512bf16"} < cpu_build.missing_features("avx512_bf16")
    monkeypatch.setattr(cpu_build, "cpu_features", frozenset)
    assert [level for level in cpu_build.LEVELS if not cpu_build.missing_features(level)] == ["portable"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/cpuinfo")
def test_features_are_spelled_as_the_levels_need_them() -> None:
    """``avx512_vbmi2`` in /proc/cpuinfo is ``-mavx512vbmi2``."""
    features = cpu_build.cpu_features()
    assert not any("_" in feature or feature != feature.lower() for feature in features)
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            words = line.partition(":")[2].split()
            assert ("avx2" in words) == ("avx2" in features)
            assert ("avx512_bf16" in words) == ("avx512bf16" in features)
            break
    else:
        assert not features


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="replaces /proc/cpuinfo")
def test_the_model_is_the_first_cpu_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """On ARM Linux gives numbers for a name; elsewhere Python's own word has to do."""
    described = {"model name": "Some CPU @ 2 GHz", "flags": "avx2 fma"}
    monkeypatch.setattr(cpu_build, "_cpuinfo", lambda: described)
    assert cpu_build.cpu_model() == "Some CPU @ 2 GHz"
    assert cpu_build.cpu_features() == {"avx2", "fma"}
    described = {"CPU implementer": "0x41", "CPU part": "0xd40"}
    assert cpu_build.cpu_model() == "0x41 0xd40"
    described = {}
    monkeypatch.setattr("platform.processor", lambda: "another")
    assert cpu_build.cpu_model() == "another"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/cpuinfo")
def test_the_model_of_this_machine() -> None:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    assert not names or cpu_build.cpu_model() == names[0]


# --- forks ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "one.lock"
    context = multiprocessing.get_context("fork")
    child_may_end = context.Event()
    with cpu_build._locked(path) as alone:
        assert alone
        child = context.Process(target=child_may_end.wait, args=(60,), daemon=True)
        child.start()
    acquired = threading.Event()

    def lock_again() -> None:
        with cpu_build._locked(path):
            acquired.set()

    threading.Thread(target=lock_again, daemon=True).start()
    try:
        assert acquired.wait(30), "the child still holds the lock"
    finally:
        child_may_end.set()
        child.join(30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_closes_the_lock_files_of_its_parent(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with cpu_build._locked(tmp_path / "one.lock"):
        (descriptor,) = cpu_build._lock_files
        child = context.Process(target=_expect_closed, args=(descriptor, tmp_path / "one.lock"), daemon=True)
        child.start()
        child.join(30)
    assert child.exitcode == 0


def _expect_closed(descriptor: int, path: Path) -> None:
    try:
        still_open = os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        still_open = False
    assert not still_open
    assert not cpu_build._lock_files
