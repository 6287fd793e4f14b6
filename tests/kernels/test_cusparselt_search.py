"""The search for cuSPARSELt's algorithms survives bad ones: with scripted children, and with one real child."""

from __future__ import annotations

import json
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fake_cusparselt
from fake_cusparselt import DEADLY, FAST, SLOW, Misbehaving
from slope_compile.kernels import _cusparselt, cache_files, cusparselt_search, gpu_tuning
from slope_compile.kernels._cusparselt import Algorithm, Product
from slope_compile.kernels.cusparselt_search import Search

CPU = torch.device("cpu")
HALF, OTHER = torch.float16, torch.bfloat16
FIRST, SECOND = (HALF, 32, 48, 64), (HALF, 64, 48, 64)

CHILD = """
import json, os, sys, time

does = json.loads(sys.argv[1])

def note(*words):
    with open(does["notes"], "a") as notes:
        print(*words, file=notes)

def say(key, default):
    action = does.get(key, default)
    if action == "die":
        sys.stderr.write("terminated\\n")
        sys.stderr.flush()
        os.abort()
    if action == "hang":
        time.sleep(600)
    print(action if isinstance(action, str) else json.dumps(action), flush=True)

note("start")
say("start", {"identity": does["identity"]})
for line in sys.stdin:
    request = json.loads(line)
    if "product" in request:
        note(*request["product"])
        say("product", {"ready": True})
    elif "release" in request:
        note("release")
        say("release", {"ready": True})
    elif "suggest" in request:
        note("suggest")
        say("suggest", {"algorithm": [2, 4, 1], "count": does["count"]})
    else:
        alg_id, split_k, _ = request["try"]
        note("try", alg_id, split_k)
        say(f"{alg_id} {split_k}", {"seconds": 1.0 + alg_id, "host": 1e-4})
"""


class Children:
    """Of one search, and what they were asked in all."""

    def __init__(self, folder: Path) -> None:
        self._notes = folder / "notes"

    def search(self, **does: Any) -> Search:
        given = {"notes": str(self._notes), "identity": list(_cusparselt.identity(CPU)), "count": 4} | does
        return Search(CPU, (sys.executable, "-I", "-S", "-c", CHILD, json.dumps(given)))

    def asked(self) -> list[str]:
        return self._notes.read_text().splitlines() if self._notes.exists() else []

    def started(self) -> int:
        return self.asked().count("start")

    def tried(self) -> list[str]:
        return [line.removeprefix("try ") for line in self.asked() if line.startswith("try")]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Children]:
    def product(*_: object) -> Tensor:
        raise AssertionError("an algorithm is tried in the process that searches")

    fake = Misbehaving()
    monkeypatch.setattr(fake, "product", product)
    monkeypatch.setattr(_cusparselt, "primitives", fake)
    monkeypatch.setattr(_cusparselt, "unfit", lambda *_: None)
    monkeypatch.setattr(cache_files, "cache_folder", lambda: tmp_path)
    _cusparselt.known.cache_clear()
    yield Children(tmp_path)
    _cusparselt.known.cache_clear()


def ids(product: Product) -> list[int]:
    return [one.alg_id for one in _cusparselt.known(CPU)[product]]


def test_one_child_for_many_products_and_the_suggestion_first(children: Children) -> None:
    reported = []
    with children.search() as search:
        search.run([FIRST, SECOND, FIRST], report=lambda *found: reported.append(found))
        search.run([(OTHER, 32, 48, 64)])
    assert children.started() == 1
    assert [i for i, line in enumerate(children.asked()) if line == "release"] == [15, 23]
    assert children.tried() == ["2 4", "0 1", "1 1", "2 1", "3 1"] * 3
    assert _cusparselt.algorithm(CPU, *FIRST) == Algorithm(0)
    assert ids(FIRST) == ids(SECOND) == [0, 1, 2, 2, 3]
    assert [product for product, _ in reported] == [FIRST, SECOND]
    assert search.host == [1e-4] * 3
    with children.search() as another:
        another.run([FIRST, SECOND])
    assert children.started() == 1, "what is known is not searched, and no child is started for nothing"


def test_wrong_and_refused_ids_do_not_count(children: Children) -> None:
    with children.search(**{"0 1": {"wrong": "off by 3"}, "1 1": {"refused": "not supported"}, "2 4": {"memory": ""}}
                         ) as search:  # fmt: skip
        search.run([FIRST])
    assert ids(FIRST) == [2, 3]
    assert children.started() == 1


@pytest.mark.parametrize("end", ["die", "hang", "this is no answer"])
def test_an_id_that_ends_its_child_is_the_only_one_lost(
    children: Children, end: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cusparselt_search, "STEP_SECONDS", 2.0)
    with children.search(**{"1 1": end}) as search:
        search.run([FIRST, SECOND])
        assert ids(FIRST) == ids(SECOND) == [0, 2, 2, 3]
        assert children.started() == 2
        assert children.tried().count("1 1") == 1, "the next product of that dtype does without it"
        search.run([(OTHER, 32, 48, 64)])
        assert children.tried().count("1 1") == 2
    expected = {"die": "status -6: terminated", "hang": "no answer within 2 s"}.get(end, "not an answer")
    assert "alg_id=1" in caplog.text
    assert expected in caplog.text


def test_the_library_s_own_search_may_end_it_too(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt_search, "IDS", 3)
    with children.search(suggest="die") as search:
        search.run([FIRST, SECOND])
    assert ids(FIRST) == ids(SECOND) == [0, 1, 2]
    assert children.started() == 2
    assert children.asked().count("suggest") == 1


def test_children_and_ids_are_limited(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt_search, "DEATHS", 3)
    monkeypatch.setattr(cusparselt_search, "IDS", 5)
    every = {f"{alg_id} {split_k}": "die" for alg_id in range(9) for split_k in (1, 4)}
    with children.search(count=9, **every) as search:
        search.run([FIRST])
        assert children.tried() == ["2 4", "0 1", "1 1"]
        assert children.started() == 3
        assert _cusparselt.known(CPU) == {FIRST: ()}
        search.run([SECOND])
        assert children.tried()[3:] == ["2 1", "3 1", "4 1"]


@pytest.mark.slow
def test_time_is_limited(children: Children, caplog: pytest.LogCaptureFixture) -> None:
    """An id that the limit cuts off has done nothing wrong; what was found counts, and what was not is unknown."""
    with children.search(**{"3 1": "hang"}) as search:
        search.run([FIRST, SECOND], seconds=2.5)
        assert ids(FIRST) == [0, 1, 2, 2]
        assert SECOND not in _cusparselt.known(CPU)
        assert "1 products were not searched" in caplog.text
        search.run([SECOND], seconds=2.5)
        assert children.tried().count("3 1") == 2
    with children.search(suggest="hang") as search:
        search.run([(OTHER, 32, 48, 64)], seconds=1.0)
    assert (OTHER, 32, 48, 64) not in _cusparselt.known(CPU)


@pytest.mark.parametrize(
    ("does", "started"),
    [
        ({"start": "die"}, 2),
        ({"start": {"identity": ["another GPU", "801", "2.0"]}}, 2),
        ({"product": "die"}, 2),
        ({"product": {"memory": "2 GiB"}}, 1),
    ],
)
def test_what_cannot_be_searched_stays_unknown(
    children: Children, does: dict[str, Any], started: int, caplog: pytest.LogCaptureFixture
) -> None:
    products = [(HALF, 16 * tokens, 48, 64) for tokens in range(1, 6)]
    with children.search(**does) as search:
        search.run(products)
        search.run(products)
    assert children.started() == started
    assert not children.tried()
    assert not _cusparselt.known(CPU)
    assert "cannot be tried" in caplog.text


def test_a_child_that_dies_when_it_is_not_needed(children: Children) -> None:
    with children.search(release="die") as search:
        search.run([FIRST])
        search.run([SECOND])
    assert ids(FIRST) == ids(SECOND) == [0, 1, 2, 2, 3]
    assert children.started() == 2


def test_a_command_that_does_not_exist(children: Children, caplog: pytest.LogCaptureFixture) -> None:
    Search(CPU, ("/nowhere/python",)).run([FIRST])
    assert "cannot be tried" in caplog.text
    assert not _cusparselt.known(CPU)


def test_interrupted_in_the_middle_it_starts_over(children: Children) -> None:
    """The answer that was not waited for must not be taken for that to another question."""

    def stop(_signal: int, _frame: types.FrameType | None) -> None:
        raise TimeoutError

    previous: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, stop)
    try:
        with children.search(**{"1 1": "hang"}) as search:
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            with pytest.raises(TimeoutError):
                search.run([FIRST])
            assert FIRST not in _cusparselt.known(CPU)
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            with pytest.raises(TimeoutError):
                search.run([SECOND])
            assert children.started() == 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_what_tuning_searches() -> None:
    products = list(cusparselt_search.tuned())
    assert {(dtype, M, *sorted((N, K))) for dtype, M, N, K in products} == {
        (dtype, M, *sorted(shape)) for dtype in (HALF, OTHER) for M in gpu_tuning.TOKENS for shape in gpu_tuning.SHAPES
    }
    assert products[0][1] == max(gpu_tuning.TOKENS)


@pytest.mark.slow
def test_a_real_child(children: Children, caplog: pytest.LogCaptureFixture) -> None:
    """The process that computes, with ids that are wrong in every way, and one that aborts it."""
    with Search(CPU, fake_cusparselt.COMMAND) as search:
        search.run([FIRST, SECOND])
    for product in (FIRST, SECOND):
        assert ids(product) == [FAST, SLOW]
    assert f"Algorithm(alg_id={DEADLY}, split_k=1, split_k_mode=-1) of M, N, K = 32, 48, 64 in float16" in caplog.text
    assert caplog.text.count("ended its process") == 1


def test_the_command_finds_the_package(
    children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever lies in the working folder; it gets as far as a GPU that no machine has."""
    (tmp_path / "torch.py").write_text("raise AssertionError('another torch')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cusparselt_search, "USELESS", 1)
    with Search(torch.device("cuda", 99)) as search:
        search.run([FIRST])
    (message,) = caplog.messages
    assert "it ended with status 1: " in message
    assert re.search("(?i)cuda|driver|ordinal", message), message
