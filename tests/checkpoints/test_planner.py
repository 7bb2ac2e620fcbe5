"""What the ranks agree on before they write a checkpoint. That what they write is whole: tests/checkpoints/test_manager.py."""

from __future__ import annotations

import pickle
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.planner import SavePlan

from checkpoints.background import Background
from checkpoints.planner import CopyPlanner, Piece, Share


def piece(name: str, shape: tuple, begin: int = 0, rows: int | None = None, dtype=torch.float32) -> Piece:
    """Some rows of a tensor, or all."""
    rows = shape[0] - begin if rows is None else rows
    return Piece(name, dtype, shape, (begin, *[0] * (len(shape) - 1)), (rows, *shape[1:]))


def agreed(*ranks: list[Piece], background: Background | None = None) -> tuple[list, dict]:
    """(the rank's Share of each, what the manifest will say)."""
    planner = CopyPlanner(background or Background(rests=False))
    plans, metadata = planner.create_global_plan([SavePlan([], planner_data=pieces) for pieces in ranks])
    return [plan.planner_data for plan in plans], metadata.planner_data


def test_each_rank_writes_its_own_part():
    halves = [piece("w", (3, 2), 0, 2), piece("w", (3, 2), 2, 1)]
    shares, tensors = agreed(*([half] for half in halves))
    assert [(share.nbytes, share.others_write) for share in shares] == [(16, set()), (8, set())]
    chunks = [[[0, 0], [2, 2], 0], [[2, 0], [1, 2], 1]]
    assert tensors == {"w": {"dtype": "float32", "shape": [3, 2], "chunks": chunks}}


def test_what_several_ranks_have_is_written_once_by_the_one_with_least():
    wide, narrow, number = piece("wide", (8,)), piece("narrow", (2,)), Piece("n", torch.int64, (), (), ())
    shares, tensors = agreed([wide, narrow, number], [wide, narrow, number])
    assert [share.nbytes for share in shares] == [32, 16]
    assert [share.others_write for share in shares] == [{1, 2}, {0}]
    assert [tensor["chunks"][0][2] for tensor in tensors.values()] == [0, 1, 1]
    shares, _ = agreed([wide], [narrow, wide], [wide, narrow])
    assert [share.others_write for share in shares] == [set(), {1}, {0, 1}]


def test_a_rank_writes_what_no_other_does():
    state = {name: torch.full((2,), float(i)) for i, name in enumerate("abc")}
    planner = CopyPlanner(Background(rests=False))
    planner.hold(state, state)
    assert planner.create_local_plan().planner_data == [piece(name, (2,)) for name in "abc"]
    plan = planner.finish_plan(SavePlan([], "a file", Share(8, {1})))
    assert plan.storage_data == "a file"
    assert [planner.resolve_data(item).tolist() for item in plan.items] == [[0, 0], [2, 2]]


def test_ranks_without_a_row_have_one_empty_part_together():
    shares, tensors = agreed([piece("w", (1, 4))], [piece("w", (1, 4), 1, 0)], [piece("w", (1, 4), 1, 0)])
    assert [share.nbytes for share in shares] == [16, 0, 0]
    assert tensors["w"]["chunks"] == [[[0, 0], [1, 4], 0], [[1, 0], [0, 4], 1]]
    assert shares[2].others_write == {0}


@pytest.mark.parametrize(
    "other",
    [
        piece("w", (4,), 3),
        piece("w", (4,), 1),
        piece("w", (4,), 1, 2),
        piece("w", (4,), 3, 2),
        piece("w", (4,), 2, dtype=torch.bfloat16),
        piece("w", (6,), 2, 2),
    ],
    ids=[
        "missing",
        "twice",
        "one twice and one missing",
        "beyond the end",
        "of another dtype",
        "of another shape",
    ],
)
def test_parts_that_make_up_no_tensor_are_no_checkpoint(other):
    with pytest.raises(ValueError, match="w: its parts on all ranks do not make up the tensor"):
        agreed([piece("w", (4,), 0, 2)], [other])


def test_little_is_sent_and_rests_are_taken():
    """Pickles hold the interpreter; of torch's own plans they are 200 bytes for a tensor, each way."""
    ranks = [[piece(f"layers.{i}.weight", (64, 64), 32 * r, 32) for i in range(100)] for r in range(2)]
    assert len(pickle.dumps(SavePlan([], planner_data=ranks[0]))) < 100 * 100
    behind = Background(rests=True)
    with mock.patch.object(behind, "rest") as rest:
        shares, _ = agreed(*ranks, background=behind)
    assert rest.call_count == 2 * 100 + 100
    assert len(pickle.dumps(shares)) < 500
    shares, _ = agreed(*[[piece(f"layers.{i}.weight", (64, 64)) for i in range(100)]] * 8)
    assert len(pickle.dumps(shares)) < 8 * 100 * 5


def test_the_plan_is_made_once_for_what_stays_as_it_is():
    state = {name: torch.zeros(4, 2) for name in "abc"}
    first, other = (CopyPlanner(Background(rests=False)) for _ in range(2))

    def plans() -> tuple[list, list, dict]:
        sent = []
        for planner in (first, other):
            planner.hold(state, {name: tensor.clone() for name, tensor in state.items()})
            sent.append(planner.create_local_plan())
        back, metadata = first.create_global_plan(sent)
        return (
            [plan.planner_data for plan in sent],
            [plan.planner_data for plan in back],
            metadata.planner_data,
        )

    sent, shares, tensors = plans()
    assert [len(pieces) for pieces in sent] == [3, 3]
    with mock.patch.object(first, "_deal") as deal:
        assert plans() == ([None, None], shares, tensors)
    assert not deal.called
    state["d"] = torch.zeros(3, dtype=torch.int64)
    sent, shares, tensors = plans()
    assert [len(pieces) for pieces in sent] == [4, 4]
    assert list(tensors) == list("abcd") and sum(share.nbytes for share in shares) == 3 * 32 + 24
    del state["a"], state["d"]
    assert list(plans()[2]) == ["b", "c"]
    first.hold(state, state | {"b": torch.zeros(5)})
    assert first.create_local_plan().planner_data, "another shape"
    first.hold(state, state | {"b": torch.zeros(4, 2).bfloat16()})
    assert first.create_local_plan().planner_data, "another dtype"


def test_a_rank_that_changed_is_dealt_with_anew_and_the_others_as_before():
    planner, whole = CopyPlanner(Background(rests=False)), piece("w", (4,))
    halves = [[piece("w", (4,), 0, 2)], [piece("w", (4,), 2)]]
    sent = [SavePlan([], planner_data=pieces) for pieces in halves]
    planner.create_global_plan(sent)
    _, metadata = planner.create_global_plan(
        [SavePlan([], planner_data=[*halves[0], piece("v", (4,))]), SavePlan([])]
    )
    assert metadata.planner_data["w"]["chunks"] == [[[0], [2], 0], [[2], [2], 1]]
    assert metadata.planner_data["v"]["chunks"] == [[[0], [4], 0]]
    for _ in range(2):  # what could not be agreed upon once is not taken for agreed upon
        with pytest.raises(ValueError, match="w: its parts"):
            planner.create_global_plan([SavePlan([], planner_data=[whole]), SavePlan([])])
    with pytest.raises(ValueError, match="w: its parts"):
        planner.create_global_plan([SavePlan([]), SavePlan([])])
