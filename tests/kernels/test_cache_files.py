"""Where files that outlive a process are kept, and how they are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from slope_compile.kernels import cache_files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a home is named by HOME")


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert cache_files.cache_folder() == tmp_path / "home" / ".cache" / "slope_compile"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_files.cache_folder() == tmp_path / "xdg" / "slope_compile"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert cache_files.cache_folder() == tmp_path / "inductor" / "slope_compile"


@pytest.mark.slow
def test_the_folder_that_inductor_names_by_itself_is_not_the_users_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo sets the variable when it is imported: what is looked for before and after is in one place."""
    code = """
import os
from slope_compile.kernels import cache_files, cpu_tuning
before = cache_files.cache_folder(), cpu_tuning.table_path("avx2", 2)
import torch._dynamo
from torch._inductor.runtime.cache_dir_utils import cache_dir
assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == cache_dir()
assert (cache_files.cache_folder(), cpu_tuning.table_path("avx2", 2)) == before
print(before[0])
"""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / ".cache" / "slope_compile")


def test_a_folder_does_not_depend_on_where_the_process_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "here")
    assert cache_files.cache_folder() == tmp_path / "here" / "slope_compile"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user who is not in the password file
    folder = cache_files.cache_folder()
    assert folder.is_absolute()
    assert tmp_path not in folder.parents
    assert not (tmp_path / "~").exists()


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="this platform does not say how it is mounted")
def test_a_cache_mounted_noexec_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "slope_compile"
    assert cache_files.cache_folder() == cache
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert cache_files.cache_folder() != cache


def test_a_file_is_put_in_place_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads while it is written, or after the writer was ended, finds the old content."""
    path = tmp_path / "one.json"
    cache_files.write(path, "old")
    replace, seen = os.replace, []

    def watched(source: str, target: Path) -> None:
        seen.append((path.read_text(), Path(source).read_text()))
        replace(source, target)

    monkeypatch.setattr("os.replace", watched)
    cache_files.write(path, "new")
    assert seen == [("old", "new")]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_names_and_contents_make_a_digest(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("a")
    other.write_text("b")
    digests = [cache_files.digest([one, other])]
    assert cache_files.digest(iter([other, one])) == digests[0], "in any order"
    digests.append(cache_files.digest([one]))
    one.write_text("b")
    other.write_text("a")
    digests.append(cache_files.digest([one, other]))
    one.rename(tmp_path / "once")
    digests.append(cache_files.digest([tmp_path / "once", other]))
    assert len(set(digests)) == len(digests)


def test_parts_of_a_key_do_not_run_together() -> None:
    assert cache_files.key("a", "bc") != cache_files.key("ab", "c")
    assert cache_files.key("a", "bc") == cache_files.key("a", "bc")
