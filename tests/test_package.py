"""What gets installed, seen from outside: what sdist and wheel hold, and the package in clean environments.

Everything is built from a copy of the repository, because setuptools leaves build folders behind. A clean
environment here is a new virtual environment that sees the packages of the current one (torch is too large to
install again) through a ``.pth`` file. Python does not follow ``.pth`` files in a folder that another one
added, so an editable install of this repository in the current environment has no effect there; a test checks
that.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("slope_compile", "passes", "kernels", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("passes", "kernels")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command, which must succeed; its errors are in the failure message."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TORCH"))
    }
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if result.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}", pytrace=False)
    return result.stdout


def copy_repository(to: Path) -> Path:
    """A copy of what the build reads, the links kept as links."""
    to.mkdir(parents=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, to / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, to / name)
    return to


def source_files() -> set[str]:
    """The path in a wheel of each file of the library: its modules, and what goes with them."""
    files = set()
    for folder, prefix in (
        ("slope_compile", ""),
        ("passes", "slope_compile/"),
        ("kernels", "slope_compile/"),
    ):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            through_link = name.startswith(("slope_compile/passes/", "slope_compile/kernels/"))
            if path.is_file() and not through_link and "__pycache__" not in path.parts:
                files.add(prefix + name)
    return files


class Distributions(NamedTuple):
    """One build: the sdist, and the wheel made from that sdist."""

    sdist: Path
    wheel: Path

    def wheel_text(self, suffix: str) -> str:
        """The text of the only file of the wheel whose path ends so."""
        with zipfile.ZipFile(self.wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(suffix))
            return archive.read(name).decode()

    def wheel_files(self) -> set[str]:
        """The files of the wheel without its metadata."""
        with zipfile.ZipFile(self.wheel) as archive:
            return {
                name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")
            }


def build(source: Path, out: Path) -> Distributions:
    """Build as ``python -m build`` does by default, but with the setuptools that is installed: no network."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source.parent)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Distributions(sdist, wheel)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    folder = tmp_path_factory.mktemp("build")
    return build(copy_repository(folder / "source"), folder / "dist")


class Environment(NamedTuple):
    """A virtual environment with this project installed, and the folder its modules must come from."""

    python: Path
    package: Path
    cwd: Path

    def python_says(self, code: str) -> str:
        """What a program prints; it runs outside the repository and can import only what is installed."""
        return run(self.python, "-P", "-c", code, cwd=self.cwd).strip()


def install(folder: Path, *what: str | Path) -> Path:
    """The interpreter of a new environment with one thing installed, as a user of pip would, but offline."""
    home = folder / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    (site,) = home.glob("lib/python*/site-packages")
    visible = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "current_environment.pth").write_text("\n".join(visible) + "\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    offline = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(*pip, "install", *offline, *what, cwd=folder)
    return python


@pytest.fixture(scope="module")
def wheel_environment(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("wheel")
    python = install(folder, distributions.wheel)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    return Environment(python, site / "slope_compile", folder)


@pytest.fixture(scope="module")
def editable_environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("editable")
    source = copy_repository(folder / "source")
    return Environment(install(folder, "--editable", source), source / "slope_compile", folder)


@pytest.fixture(params=["wheel", "editable"])
def environment(request: pytest.FixtureRequest) -> Environment:
    found: Environment = request.getfixturevalue(f"{request.param}_environment")
    return found


# --- what is in the archives ----------------------------------------------------------------------------


def test_wheel_holds_the_library_and_nothing_else(distributions: Distributions) -> None:
    files = distributions.wheel_files()
    assert files == source_files()
    assert "slope_compile/py.typed" in files
    for folder in FOLDERS:
        assert any(name.startswith(f"slope_compile/{folder}/") and name.endswith(".py") for name in files), (
            folder
        )


def test_wheel_has_one_top_level_name(distributions: Distributions) -> None:
    assert {name.split("/")[0] for name in distributions.wheel_files()} == {"slope_compile"}
    assert distributions.wheel_text("/top_level.txt").split() == ["slope_compile"]


def test_wheel_registers_the_backend(distributions: Distributions) -> None:
    lines = distributions.wheel_text("/entry_points.txt").splitlines()
    at = lines.index("[torch_dynamo_backends]")
    assert lines[at + 1] == "slope = slope_compile.backend:slope"


def test_version_is_the_one_in_the_source(distributions: Distributions) -> None:
    metadata = Parser().parsestr(distributions.wheel_text("/METADATA"))
    tree = ast.parse((ROOT / "slope_compile" / "__init__.py").read_text(encoding="utf-8"))
    (version,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    assert metadata["Version"] == version
    assert metadata["Name"] == "slope-compile"
    assert metadata["License-Expression"] == "BSD-3-Clause"


def test_sdist_holds_the_folders_as_the_repository_does(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        members = archive.getmembers()
    files = {member.name.split("/", 1)[1] for member in members if member.isfile()}
    for folder in FOLDERS:
        expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.py")}
        assert expected, folder
        assert expected <= files, sorted(expected - files)
        assert not any(name.startswith(f"slope_compile/{folder}") for name in files), "held twice"
    assert {"LICENSE", "README.md", "pyproject.toml", "slope_compile/py.typed"} <= files


def test_wheel_is_the_same_where_links_are_lost(distributions: Distributions, tmp_path: Path) -> None:
    """A checkout without symbolic links still builds: pyproject.toml says where the folders are."""
    source = copy_repository(tmp_path / "source")
    for folder in FOLDERS:
        (source / "slope_compile" / folder).unlink()
    assert build(source, tmp_path / "dist").wheel_files() == distributions.wheel_files()


# --- what an environment with it does -------------------------------------------------------------------


@pytest.mark.slow
def test_modules_come_from_the_installation(environment: Environment) -> None:
    code = """
import importlib, json, sys
names = ["slope_compile"] + [f"slope_compile.{name}" for name in sys.argv[1:]]
print(json.dumps([importlib.import_module(name).__file__ for name in names]))
"""
    modules = [f"{folder}.{path.stem}" for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    output = run(environment.python, "-P", "-c", code, *modules, cwd=environment.cwd)
    for found in json.loads(output):
        assert Path(found).is_relative_to(environment.package), f"{found} is outside {environment.package}"


@pytest.mark.slow
def test_backend_is_found_by_name_alone(environment: Environment) -> None:
    """torch finds the entry point and imports the package at the first use of the name, not before."""
    code = """
import sys, torch, torch._dynamo
assert "slope" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
assert not [name for name in sys.modules if name.startswith("slope_compile")]
compiled = torch.compile(lambda x: x.sin() + 1, backend="slope")
x = torch.arange(4.0)
torch.testing.assert_close(compiled(x), x.sin() + 1)
print(sys.modules["slope_compile.backend"].__file__)
"""
    assert Path(environment.python_says(code)) == environment.package / "backend.py"


def test_kernels_and_passes_are_not_ours(environment: Environment) -> None:
    """Hugging Face's `kernels` may be installed; ours must not answer to that name, nor to `passes`."""
    code = """
import importlib.util, json
specs = {name: importlib.util.find_spec(name) for name in ("kernels", "passes")}
print(json.dumps({name: list(spec.submodule_search_locations or []) for name, spec in specs.items() if spec}))
"""
    found: dict[str, list[str]] = json.loads(environment.python_says(code))
    assert "passes" not in found
    ours = (environment.package.parent, environment.package, ROOT)
    for location in map(Path, found.get("kernels", [])):
        assert location.parent not in ours, f"`import kernels` finds {location}"


def test_import_does_no_work_and_package_data_is_found(environment: Environment) -> None:
    """Importing loads neither Triton nor Inductor, starts no process, opens no library and writes no file.

    An audit hook sees these however they are done. torch goes first: what importing it does is its affair, and takes
    so long that both questions go to one process.
    """
    code = """
import os, sys, torch
before = set(sys.modules)
done = []
STARTS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork", "os.spawn", "os.startfile")
NETWORK = ("socket.connect", "socket.getaddrinfo")
def watch(event, args):
    if event in STARTS or event in NETWORK or event == "ctypes.dlopen":
        done.append((event, str(args[0]) if args else ""))
    elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        done.append(("written", str(args[0])))
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import slope_compile
done_by_import = list(done)
assert not done_by_import, done_by_import
heavy = ("triton", "torch._inductor", "torch._dynamo", "transformers", "matplotlib")
loaded = [name for name in set(sys.modules) - before if name.startswith(heavy)]
assert not loaded, sorted(loaded)
import subprocess
subprocess.run([sys.executable, "-c", ""])
assert [event for event, _ in done if event == "subprocess.Popen"], "the hook sees nothing"
assert not torch.cuda.is_initialized()
import importlib.resources
print(importlib.resources.files("slope_compile").joinpath("py.typed").is_file())
"""
    assert environment.python_says(code) == "True"


def test_an_editable_install_sees_a_module_added_later(editable_environment: Environment) -> None:
    added = editable_environment.package.parent / "kernels" / "added_later.py"
    added.write_text("VALUE = 24\n", encoding="utf-8")
    code = "from slope_compile.kernels.added_later import VALUE; print(VALUE)"
    assert editable_environment.python_says(code) == "24"


# --- next to Hugging Face's `kernels`, with the repository itself on sys.path ---------------------------


def test_a_regular_package_named_kernels_wins_at_the_repository_root(tmp_path: Path) -> None:
    """``python -c`` and notebooks put the current folder first on sys.path; there our folder must not win."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'installed'\n", encoding="utf-8")
    code = "import sys, kernels; assert sys.path[0] == '', sys.path; print(kernels.WHOSE)"
    assert run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path)).strip() == "installed"


@pytest.mark.slow
def test_transformers_imports_at_the_repository_root() -> None:
    """With a top-level ``kernels/__init__.py`` this fails: our folder is taken for Hugging Face's."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    try:
        installed = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's `kernels` is not installed, so there is nothing to collide with")
    code = """
import json, sys
from transformers import GPT2LMHeadModel
from transformers.utils.import_utils import is_kernels_available
import kernels
print(json.dumps([sys.path[0], GPT2LMHeadModel.__name__, is_kernels_available(), kernels.__file__]))
"""
    output = run(sys.executable, "-c", code, cwd=ROOT, HF_HUB_OFFLINE="1")
    first, model, available, file = json.loads(output.splitlines()[-1])
    assert first == ""
    assert model == "GPT2LMHeadModel"
    assert Path(file) == Path(str(installed.locate_file("kernels/__init__.py")))
    if not available:
        pytest.skip(f"transformers does not take kernels {installed.version}, so it did not import it")
