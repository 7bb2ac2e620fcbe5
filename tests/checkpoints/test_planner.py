"""The plan that ranks exchange before they write a checkpoint.

tests/checkpoints/test_manager.py tests that the written checkpoint is complete.
"""

from __future__ import annotations

import pickle
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.planner import SavePlan

from checkpoints.background import BackgroundThrottle
from checkpoints.planner import CheckpointPlanner, TensorChunk, WriteAssignment


def chunk(
    name: str, shape: tuple, begin: int = 0, rows: int | None = None, dtype=torch.float32
) -> TensorChunk:
    """Some rows of a tensor, or all of them."""
    rows = shape[0] - begin if rows is None else rows
    return TensorChunk(name, dtype, shape, (begin, *[0] * (len(shape) - 1)), (rows, *shape[1:]))


def assign(*ranks: list[TensorChunk], throttle: BackgroundThrottle | None = None) -> tuple[list, dict]:
    """Return (each rank's WriteAssignment, the tensors' entries in the manifest)."""
    planner = CheckpointPlanner(throttle or BackgroundThrottle(enabled=False))
    plans, metadata = planner.create_global_plan([SavePlan([], planner_data=chunks) for chunks in ranks])
    return [plan.planner_data for plan in plans], metadata.planner_data


def test_each_rank_writes_its_own_part():
    halves = [chunk("w", (3, 2), 0, 2), chunk("w", (3, 2), 2, 1)]
    assignments, tensors = assign(*([half] for half in halves))
    assert [(assignment.nbytes, assignment.written_elsewhere) for assignment in assignments] == [
        (16, set()),
        (8, set()),
    ]
    chunks = [[[0, 0], [2, 2], 0], [[2, 0], [1, 2], 1]]
    assert tensors == {"w": {"dtype": "float32", "shape": [3, 2], "chunks": chunks}}


def test_a_chunk_of_several_ranks_is_written_once_by_the_rank_with_fewest_bytes():
    wide, narrow, number = (
        chunk("wide", (8,)),
        chunk("narrow", (2,)),
        TensorChunk("n", torch.int64, (), (), ()),
    )
    assignments, tensors = assign([wide, narrow, number], [wide, narrow, number])
    assert [assignment.nbytes for assignment in assignments] == [32, 16]
    assert [assignment.written_elsewhere for assignment in assignments] == [{1, 2}, {0}]
    assert [tensor["chunks"][0][2] for tensor in tensors.values()] == [0, 1, 1]
    assignments, _ = assign([wide], [narrow, wide], [wide, narrow])
    assert [assignment.written_elsewhere for assignment in assignments] == [set(), {1}, {0, 1}]


def test_a_rank_writes_what_no_other_does():
    state = {name: torch.full((2,), float(i)) for i, name in enumerate("abc")}
    planner = CheckpointPlanner(BackgroundThrottle(enabled=False))
    planner.set_tensors(state, state)
    assert planner.create_local_plan().planner_data == [chunk(name, (2,)) for name in "abc"]
    plan = planner.finish_plan(SavePlan([], "a file", WriteAssignment(8, {1})))
    assert plan.storage_data == "a file"
    assert [planner.resolve_data(item).tolist() for item in plan.items] == [[0, 0], [2, 2]]


def test_ranks_without_a_row_have_one_empty_part_together():
    assignments, tensors = assign(
        [chunk("w", (1, 4))], [chunk("w", (1, 4), 1, 0)], [chunk("w", (1, 4), 1, 0)]
    )
    assert [assignment.nbytes for assignment in assignments] == [16, 0, 0]
    assert tensors["w"]["chunks"] == [[[0, 0], [1, 4], 0], [[1, 0], [0, 4], 1]]
    assert assignments[2].written_elsewhere == {0}


@pytest.mark.parametrize(
    "other",
    [
        chunk("w", (4,), 3),
        chunk("w", (4,), 1),
        chunk("w", (4,), 1, 2),
        chunk("w", (4,), 3, 2),
        chunk("w", (4,), 2, dtype=torch.bfloat16),
        chunk("w", (6,), 2, 2),
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
    with pytest.raises(ValueError, match="w: the ranks' chunks do not cover the tensor"):
        assign([chunk("w", (4,), 0, 2)], [other])


def test_plans_are_small_and_planning_pauses():
    """Pickling holds the interpreter. torch's own plans take 200 bytes per tensor, each way."""
    ranks = [[chunk(f"layers.{i}.weight", (64, 64), 32 * r, 32) for i in range(100)] for r in range(2)]
    assert len(pickle.dumps(SavePlan([], planner_data=ranks[0]))) < 100 * 100
    throttle = BackgroundThrottle(enabled=True)
    with mock.patch.object(throttle, "pause_if_due") as pause:
        assignments, _ = assign(*ranks, throttle=throttle)
    assert pause.call_count == 2 * 100 + 100
    assert len(pickle.dumps(assignments)) < 500
    assignments, _ = assign(*[[chunk(f"layers.{i}.weight", (64, 64)) for i in range(100)]] * 8)
    assert len(pickle.dumps(assignments)) < 8 * 100 * 5


def test_unchanged_tensors_are_planned_once():
    state = {name: torch.zeros(4, 2) for name in "abc"}
    first, other = (CheckpointPlanner(BackgroundThrottle(enabled=False)) for _ in range(2))

    def plans() -> tuple[list, list, dict]:
        sent = []
        for planner in (first, other):
            planner.set_tensors(state, {name: tensor.clone() for name, tensor in state.items()})
            sent.append(planner.create_local_plan())
        back, metadata = first.create_global_plan(sent)
        return (
            [plan.planner_data for plan in sent],
            [plan.planner_data for plan in back],
            metadata.planner_data,
        )

    sent, assignments, tensors = plans()
    assert [len(chunks) for chunks in sent] == [3, 3]
    with mock.patch.object(first, "_assign_writers") as assign_writers:
        assert plans() == ([None, None], assignments, tensors)
    assert not assign_writers.called
    state["d"] = torch.zeros(3, dtype=torch.int64)
    sent, assignments, tensors = plans()
    assert [len(chunks) for chunks in sent] == [4, 4]
    assert (
        list(tensors) == list("abcd") and sum(assignment.nbytes for assignment in assignments) == 3 * 32 + 24
    )
    del state["a"], state["d"]
    assert list(plans()[2]) == ["b", "c"]
    first.set_tensors(state, state | {"b": torch.zeros(5)})
    assert first.create_local_plan().planner_data, "another shape"
    first.set_tensors(state, state | {"b": torch.zeros(4, 2).bfloat16()})
    assert first.create_local_plan().planner_data, "another dtype"


def test_a_changed_rank_is_planned_again_with_the_other_ranks_stored_chunks():
    planner, full = CheckpointPlanner(BackgroundThrottle(enabled=False)), chunk("w", (4,))
    halves = [[chunk("w", (4,), 0, 2)], [chunk("w", (4,), 2)]]
    sent = [SavePlan([], planner_data=chunks) for chunks in halves]
    planner.create_global_plan(sent)
    _, metadata = planner.create_global_plan(
        [SavePlan([], planner_data=[*halves[0], chunk("v", (4,))]), SavePlan([])]
    )
    assert metadata.planner_data["w"]["chunks"] == [[[0], [2], 0], [[2], [2], 1]]
    assert metadata.planner_data["v"]["chunks"] == [[[0], [4], 0]]
    for _ in range(2):  # a failed plan is not reused
        with pytest.raises(ValueError, match="w: the ranks' chunks do not cover"):
            planner.create_global_plan([SavePlan([], planner_data=[full]), SavePlan([])])
    with pytest.raises(ValueError, match="w: the ranks' chunks do not cover"):
        planner.create_global_plan([SavePlan([]), SavePlan([])])
