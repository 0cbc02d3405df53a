"""NormalEquations that are merged, kept and summed over ranks."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import re
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from normal_equations_cases import Rows, accumulate, assert_same, exact, problem, relative, tolerance
from torch import Tensor

from onestep.linalg import NormalEquations

# ------------------------------------------------------------------------------------------------ merging and keeping


@pytest.mark.parametrize("intercept", [False, True])
def test_merge_is_as_one(intercept, dtype):
    rows = problem(300, 5, 2, dtype, weighted=True, offset=2.0)
    parts = [accumulate(chunk, 40, intercept=intercept) for chunk in rows.chunks(110)]
    others = [copy.deepcopy(part) for part in parts[1:]]
    merged = parts[0]
    for part in parts[1:]:
        assert merged.merge(part) is merged
    assert merged.count == 300
    assert relative(merged.solve(0.2).W, exact(rows, 0.2, intercept)[0]) < tolerance(dtype)
    for part, other in zip(parts[1:], others, strict=True):
        assert_same(part, other)


@pytest.mark.parametrize("intercept", [False, True])
def test_merging_nothing_changes_nothing(intercept, dtype):
    full = accumulate(problem(30, 4, 2, dtype), 10, intercept=intercept)
    expected = copy.deepcopy(full)
    assert_same(NormalEquations(4, 2, intercept=intercept, dtype=dtype).merge(full), expected)
    assert_same(full.merge(NormalEquations(4, 2, intercept=intercept, dtype=dtype)), expected)


def test_float64_sums_may_go_into_float32_ones_but_not_the_other_way():
    rows = problem(40, 3, 1, torch.float32)
    narrow, wide = NormalEquations(3, 1).update(*rows), NormalEquations(3, 1, dtype=torch.float64).update(*rows)
    with pytest.raises(TypeError, match=r"other has dtype torch.float32.*expected torch.float64"):
        wide.merge(narrow)
    assert narrow.merge(wide).count == 80


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (NormalEquations(4, 1), ValueError, "other has d=4, k=1, intercept=False; expected d=3, k=1, intercept=False"),
        (NormalEquations(3, 2), ValueError, "other has d=3, k=2"),
        (NormalEquations(3, 1, intercept=True), ValueError, "other has d=3, k=1, intercept=True; expected"),
        (None, TypeError, "other is NoneType; expected NormalEquations"),
    ],
)
def test_bad_merge(other, error, message):
    with pytest.raises(error, match=message):
        NormalEquations(3, 1).merge(other)


@pytest.mark.parametrize("intercept", [False, True])
def test_state_goes_on_bit_for_bit(tmp_path, intercept, dtype):
    rows = problem(200, 5, 2, dtype, weighted=True, offset=3.0)
    first, second = rows.chunks(120)
    equations = accumulate(first, 50, intercept=intercept)
    torch.save(equations.state_dict(), tmp_path / "state.pt")
    state = equations.state_dict()
    equations.update(*second)

    loaded = NormalEquations(5, 2, intercept=intercept, dtype=dtype).update(*second)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(loaded, accumulate(first, 50, intercept=intercept))
    assert_same(loaded.update(*second), equations)
    # Neither side can reach into the other.
    again = NormalEquations(5, 2, intercept=intercept, dtype=dtype)
    again.load_state_dict(state)
    for value in state.values():
        if isinstance(value, Tensor):
            value.fill_(-1)
    assert_same(again.update(*second), equations)


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_their_own_way(clone, dtype):
    rows = problem(100, 4, 1, dtype, offset=1.0)
    first, second = rows.chunks(60)
    equations = accumulate(first, 20, intercept=True)
    copied = clone(equations)
    copied.update(*second)
    assert_same(equations, accumulate(first, 20, intercept=True))
    assert_same(copied, equations.update(*second))
    assert repr(copied) == f"NormalEquations(d=4, k=1, intercept=True, dtype={dtype}, count=100)"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"d": 4}, ValueError, "state has d=4; expected d=3"),
        ({"k": 1}, ValueError, "state has k=1; expected k=2"),
        ({"intercept": True}, ValueError, "state has intercept=True; expected intercept=False"),
        ({"dtype": torch.float64}, ValueError, "state has dtype=torch.float64; expected dtype=torch.float32"),
        ({"count": -1}, ValueError, r"state\['count'\]=-1; expected an integer >= 0"),
        ({"count": 1.5}, TypeError, r"state\['count'\] is float; expected an integer >= 0"),
        ({"gram": None}, TypeError, r"state\['gram'\] is NoneType; expected torch.Tensor"),
        ({"gram": torch.eye(2).double()}, ValueError, r"state\['gram'\] has shape \(2, 2\); expected \(3, 3\)"),
        (
            {"gram": torch.eye(3)},
            ValueError,
            r"state\['gram'\] is torch.float32.*expected dense torch.float64 values",
        ),
        ({"gram": torch.eye(3).double() * torch.nan}, ValueError, r"state\['gram'\] holds NaN or infinity"),
        ({"gram": torch.ones(3, 3).double().triu()}, ValueError, r"state\['gram'\] is not symmetric"),
        ({"gram": -torch.eye(3).double()}, ValueError, r"state\['gram'\] is not symmetric with a diagonal >= 0"),
        ({"cross": torch.ones(3, 1).double()}, ValueError, r"state\['cross'\] has shape \(3, 1\); expected \(3, 2\)"),
        ({"weight_sum": -torch.ones(()).double()}, ValueError, r"state\['weight_sum'\] is -1.0; expected"),
        ({"extra": 1}, ValueError, r"state lacks \[\] and has unknown \['extra'\]; expected the keys"),
    ],
)
def test_bad_state(change, error, message):
    equations = NormalEquations(3, 2, dtype=torch.float32).update(torch.eye(4, 3), torch.eye(4, 2))
    before = copy.deepcopy(equations)
    with pytest.raises(error, match=message):
        equations.load_state_dict({**equations.state_dict(), **change})
    assert_same(equations, before)


def test_incomplete_state():
    equations = NormalEquations(3, 2)
    state = equations.state_dict()
    del state["x_mean"]
    with pytest.raises(ValueError, match=r"state lacks \['x_mean'\] and has unknown \[\]"):
        equations.load_state_dict(state)
    with pytest.raises(TypeError, match="state is list; expected a dict"):
        equations.load_state_dict([])


# -------------------------------------------------------------------------------------------------------------- ranks


RANKS = 2


def shard(rank: int, dtype: torch.dtype) -> Rows:
    return problem(150 + 70 * rank, 4, 2, dtype, weighted=True, offset=5.0 * rank, name="shard")


def reduce_on_one_rank(rank: int, folder: str) -> None:
    """What each process runs; it leaves what it found in a file."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    found: dict[str, Any] = {}
    for dtype in cases.DTYPES:
        for intercept in (False, True):
            equations = accumulate(shard(rank, dtype), 40, intercept=intercept)
            assert equations.all_reduce() is equations
            found[f"{dtype} {intercept}"] = equations.state_dict()
    # A rank that has seen nothing.
    rows = shard(1, torch.float32)
    idle = accumulate(rows if rank == 1 else rows.part(slice(0, 0)), 40, intercept=True)
    found["idle"] = idle.all_reduce().state_dict()
    wrong = {
        "d": NormalEquations(3 + rank, 2),
        "k": NormalEquations(3, 2 + rank),
        "intercept": NormalEquations(3, 2, intercept=rank == 1),
        "dtype": NormalEquations(3, 2, dtype=cases.DTYPES[rank]),
    }
    for name, equations in wrong.items():
        try:
            equations.all_reduce()
        except ValueError as error:
            found[f"wrong {name}"] = str(error)
    # Every rank makes every group; only its members may use it.
    alone = accumulate(shard(rank, torch.float32), 40)
    try:
        found["alone"] = alone.all_reduce(dist.new_group([1])).state_dict()
    except ValueError as error:
        found["alone"] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.spawn(reduce_on_one_rank, args=(str(folder),), nprocs=RANKS, join=False)
    # A join returns when one process ends, too.
    for _ in range(RANKS):
        if context.join(timeout=240):
            break
    else:
        for process in context.processes:
            process.kill()
        pytest.fail("all_reduce hangs")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("intercept", [False, True])
def test_all_ranks_end_with_the_same_bits_and_those_of_a_merge(ranks, intercept, dtype):
    merged = accumulate(shard(0, dtype), 40, intercept=intercept)
    merged.merge(accumulate(shard(1, dtype), 40, intercept=intercept))
    for found in ranks:
        equations = NormalEquations(4, 2, intercept=intercept, dtype=dtype)
        equations.load_state_dict(found[f"{dtype} {intercept}"])
        assert_same(equations, merged)
    shards = [shard(rank, dtype) for rank in range(RANKS)]
    rows = Rows(*(torch.cat(parts) for parts in zip(*shards, strict=True)))
    assert relative(equations.solve(0.3).W, exact(rows, 0.3, intercept)[0]) < 10 * tolerance(dtype)


def test_a_rank_may_have_seen_nothing(ranks):
    expected = accumulate(shard(1, torch.float32), 40, intercept=True)
    for found in ranks:
        equations = NormalEquations(4, 2, intercept=True)
        equations.load_state_dict(found["idle"])
        assert_same(equations, expected)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("d", "[4, 2, 0, 4]; expected [3, 2, 0, 4]"),
        ("k", "[3, 3, 0, 4]; expected [3, 2, 0, 4]"),
        ("intercept", "[3, 2, 1, 4]; expected [3, 2, 0, 4]"),
        ("dtype", "[3, 2, 0, 8]; expected [3, 2, 0, 4]"),
    ],
)
def test_ranks_that_differ_all_raise(ranks, name, values):
    for found in ranks:
        assert re.search(r"rank 1 of the group.*" + re.escape(values), found[f"wrong {name}"])


def test_a_group_of_one_changes_nothing_and_refuses_others(ranks):
    equations = NormalEquations(4, 2)
    equations.load_state_dict(ranks[1]["alone"])
    assert_same(equations, accumulate(shard(1, torch.float32), 40))
    assert "this process is not in group" in ranks[0]["alone"]


def test_all_reduce_without_a_process_group():
    with pytest.raises(
        RuntimeError, match=r"all_reduce needs a process group: call torch\.distributed\.init_process_group"
    ):
        NormalEquations(1, 1).all_reduce()


def test_cuda_without_a_kernel_is_refused_at_once(monkeypatch):
    """The one error that names the op, the device and the remedy; not torch's, rows later."""
    from onestep.ops import _cuda, normal

    monkeypatch.delitem(normal.moments.kernels, "cuda", raising=False)
    monkeypatch.setattr(_cuda, "native", None)
    with pytest.raises(NotImplementedError, match=r"onestep::moments has no kernel for cuda tensors.*ONESTEP_CUDA=ON"):
        NormalEquations(2, 1, device="cuda")
