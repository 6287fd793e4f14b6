"""The command ``slope-compile``."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import slope_compile
from slope_compile import cli, doctor
from slope_compile.kernels import (
    _cusparselt,
    cpu_library,
    cpu_tuning,
    cusparselt_search,
    gpu_calls,
    gpu_ops,
    gpu_tuning,
)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables go to a folder of the test."""
    monkeypatch.setattr("slope_compile.kernels.cache_files.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("slope_compile.kernels.cache_files.nothing_lasts", lambda: None)
    cpu_tuning.load.cache_clear()
    yield tmp_path
    cpu_tuning.load.cache_clear()


def test_doctor(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in (slope_compile.__version__, torch.__version__, "CPU kernels", "C++ compiler", "slope-compile tune"):
        assert part in text
    if (library := cpu_library.load()) is not None:
        assert library.isa in text
        assert "grad_input_columns" in text


def test_doctor_without_a_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("slope_compile.kernels.cpu_library.load", lambda: None)
    monkeypatch.setattr("slope_compile.kernels.cpu_build.find_compiler", lambda: None)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "none: install g++ 11" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("forward ")]
    assert {row[1] for row in rows} == set(cpu_tuning.DTYPES)
    assert {cell for row in rows for cell in row[2:]} == {"dense"}, "what each dtype gets without kernels"
    assert cli.main(["tune"]) == 1
    assert "no CPU kernels to measure" in capsys.readouterr().err


def test_tune(own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if (library := cpu_library.load()) is None:
        pytest.skip("no CPU library: no C++ compiler, or switched off")
    monkeypatch.setattr(cpu_tuning, "TOKENS", (1, 20))
    monkeypatch.setattr(cpu_tuning, "SHAPES", ((16, 24),))
    before = torch.get_num_threads()
    assert cli.main(["tune", "--threads", "2"]) == 0
    assert torch.get_num_threads() == before
    table = cpu_tuning.load(library.isa, 2)
    assert table is not None
    assert {e.op for e in table.entries} == set(cpu_tuning.OPS)
    out = capsys.readouterr().out
    assert str(own_cache) in out
    assert "grad_weight" in out
    assert "16x24" in out
    assert "copy" not in out
    assert cli.main(["tune", "--threads", "2", "--copies"]) == 0
    assert "with a copy of the weight" in capsys.readouterr().out
    table = cpu_tuning.load(library.isa, 2)
    assert table is not None
    assert {e.op for e in table.entries if e.over_copy is not None} == {"forward"}


def test_nothing_is_measured_where_no_table_can_be_kept(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if cpu_library.load() is None:
        pytest.skip("no CPU library: no C++ compiler, or switched off")
    monkeypatch.setattr("slope_compile.kernels.cache_files.nothing_lasts", lambda: "/home cannot be written")
    assert cli.main(["tune"]) == 1
    said = capsys.readouterr().err
    assert "/home cannot be written" in said
    assert "TORCHINDUCTOR_CACHE_DIR" in said
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "COMMAND", id="no command"),
        pytest.param(["tun"], "invalid choice: 'tun'", id="unknown"),
    ],
)
def test_wrong_calls(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_copies_are_for_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--device", "cuda", "--copies"]) == 2
    assert "--copies is for CPUs" in capsys.readouterr().err


def test_a_negative_number_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--threads", "-1"]) == 2
    assert "--threads" in capsys.readouterr().err


def test_a_wrong_variable_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.VARIABLE, "sse9")
    done = subprocess.run(
        [sys.executable, "-m", "slope_compile.cli", "doctor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert cpu_library.VARIABLE in line
    assert "sse9" in line


@pytest.mark.parametrize(
    ("device", "status", "message"),
    [("tpu", 2, "expected cpu, cuda"), ("meta", 2, "got 'meta'"), ("cuda:9", 1, "none is cuda:9")],
)
def test_tune_of_a_device_that_is_not_there(
    device: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", "--device", device]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("sizes", ["16x16", "16x16x16x16", "0x16x16", "axbxc", "16 x 16 x 16"])
def test_sizes_that_are_none(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--device", "cuda", "--sizes", sizes]) == 2
    assert "expected MxNxK" in capsys.readouterr().err


def test_tune_of_a_gpu(own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is measured there is shown and stored; the measuring itself is tested beside its table."""
    entries = [
        gpu_tuning.Entry("forward", "bfloat16", 16, 64, 96, {"triton": 2e-6, "expanded": 3e-6}),
        gpu_tuning.Entry("grad_weight", "bfloat16", 16, 64, 96, {"triton": 5e-6, "expanded": 4e-6}),
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(gpu_ops, "missing", lambda device: None)
    monkeypatch.setattr(gpu_ops, "name", lambda device: "a GPU")
    monkeypatch.setattr(_cusparselt, "unfit", lambda *product: None)  # asks the device
    searched: list[_cusparselt.Product] = []

    def measure(device: torch.device) -> list[gpu_tuning.Entry]:
        assert searched, "what is verified takes part in the measurement"
        return entries

    def run(self: cusparselt_search.Search, products: Iterable[_cusparselt.Product], report: Any) -> None:
        searched.extend(products)
        report(searched[0], [_cusparselt.Algorithm(7)])
        report(searched[1], [])
        self.host += [3e-5, 5e-5, 1e-3]

    monkeypatch.setattr(gpu_calls, "measure", measure)
    monkeypatch.setattr(cusparselt_search.Search, "run", run)
    gpu_tuning.load.cache_clear()
    assert cli.main(["tune", "--device", "cuda", "--sizes", "48x32x64", "--sizes", "16x16x80"]) == 0
    given = [(dtype, *size) for size in ((48, 32, 64), (48, 64, 32)) for dtype in _cusparselt.DTYPES]
    assert set(given) <= set(searched[:8])
    assert searched[8:] == list(cusparselt_search.tuned())
    table = gpu_tuning.load("a GPU")
    assert table is not None
    assert list(table.entries) == entries
    out, err = capsys.readouterr()
    assert "costs the host 50 us" in out
    assert "bfloat16 M=48 N=32 K=64: 1 of its algorithms are right, the fastest is 7" in err
    assert "bfloat16 M=48 N=64 K=32: 0 of its algorithms are right\n" in err
    assert "2*" in out
    assert "4*" in out
    assert str(own_cache) in out
    monkeypatch.setattr(gpu_ops, "missing", lambda device: "Triton is not installed")
    assert cli.main(["tune", "--device", "cuda:0"]) == 1
    assert "Triton is not installed" in capsys.readouterr().err
    gpu_tuning.load.cache_clear()


def test_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "install triton" in str(dict(doctor._packages())["Triton"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "install a build with CUDA" in str(dict(doctor._gpus())["GPU"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert dict(doctor._gpus())["GPU"] == "none that PyTorch can use"


def test_doctor_names_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ways = {"float16": "2:4 kernel, Triton", "bfloat16": "2:4 kernel, Gluon wgmma.sp"}
    monkeypatch.setattr(
        doctor, "lowering", lambda op, M, N, K, dtype, *_: ways.get(str(dtype)[6:], "dense with expanded weight")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    monkeypatch.setattr(gpu_ops, "missing", lambda device: None)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("NVIDIA H200, compute capability 9.0", "cuSPARSELt", "builds with CUDA for Linux", "GPU 0 kernels"):
        assert part in text
    gpu = text.split("GPU 0, N = K")[1]
    rows = {line.split()[1]: set(line.split()[2:]) for line in gpu.splitlines() if line.startswith("forward ")}
    assert (rows["float16"], rows["bfloat16"]) == ({"Triton"}, {"wgmma.sp"})


def test_doctor_says_whose_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tuning, "load", lambda gpu: None)
    assert doctor._tuned("some GPU", 1).startswith("no: a roofline rule decides; `slope-compile tune --device cuda:1`")
    monkeypatch.setattr(gpu_tuning, "load", lambda gpu: gpu_tuning.Table("NVIDIA H200", ()))
    assert "measured on an NVIDIA H200" in doctor._tuned("NVIDIA H100", 0)
    monkeypatch.setattr(gpu_tuning, "table_path", lambda gpu: Path(__file__))
    assert doctor._tuned("NVIDIA H100", 0) == "yes"
