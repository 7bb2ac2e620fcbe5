"""Whether RUN/best holds better weights than the RUN."""

from __future__ import annotations

import json
import math

import pytest

from finished.model_card import _describe_losses
from monitoring.best_step import BestStep, find_better_step, read_evaluations, read_saved_step
from monitoring.run_facts import record_saved_step


@pytest.mark.parametrize(
    ("losses", "kept", "is_better"),
    [
        ([1.5, 1.25, 1.75], 2, True),
        ([1.5, 1.25, None], 2, True),  # NaN
        ([1.5, 1.25, 1.0], 3, False),
        ([1.5, 1.25, 1.0], 1, False),  # the disk was full when step 3 was to be kept
        ([1.5, 1.25, 1.25], 2, False),  # equal: neither is better
    ],
)
def test_best_is_named_only_if_it_evaluated_better(losses, kept, is_better, tmp_path):
    lines = [{"step": 2 * i, "loss": 1.0, "eval_loss": v} for i, v in enumerate(losses, 1)]
    lines.insert(1, {"step": 3, "loss": 1.0})  # a step that was not evaluated
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert find_better_step(tmp_path) is None
    (tmp_path / "best").mkdir()
    score = tmp_path / "best" / "evaluation.json"
    score.write_text(json.dumps({"step": 2 * kept, "eval_loss": losses[kept - 1]}))
    found = find_better_step(tmp_path)
    if not is_better:
        assert found is None
        return
    last = math.nan if losses[-1] is None else losses[-1]
    shown = "a loss that is not finite" if losses[-1] is None else f"{last:.4f}"
    assert found == BestStep(tmp_path / "best", 2 * kept, 1.25, 6, pytest.approx(last, nan_ok=True))
    assert found.describe().endswith(f"at step 4; {tmp_path} has the last step, 6, with {shown}")
    for damaged in ("", "[]", '{"step": "4", "eval_loss": 1}', '{"step": 4, "eval_loss": NaN}'):
        score.write_text(damaged)
        assert find_better_step(tmp_path) is None


@pytest.mark.parametrize(
    ("saved_step", "last_loss", "is_better", "said"),
    [
        (4, 1.25, True, "has the last step, 4, with 1.2500"),
        (None, None, True, "is not known: the run was continued"),
        (6, 1.0, False, ""),
        (5, None, True, "has the last step, 5, with a loss that is not known"),
    ],
)
def test_a_run_that_was_continued_and_stopped_holds_an_earlier_step(
    saved_step, last_loss, is_better, said, tmp_path
):
    """The last evaluation of metrics.jsonl is not that of the RUN's weights."""
    evaluated = {2: 1.5, 4: 1.25, 6: 1.0, 8: 1.75}
    lines = [{"step": i, "loss": i / 2, "epoch": 1.0} for i in range(1, 9)]
    lines = [line | ({"eval_loss": loss} if (loss := evaluated.get(line["step"])) else {}) for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.json").write_text(json.dumps({"saved_step": 1}))
    record_saved_step(tmp_path, saved_step)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "evaluation.json").write_text('{"step": 6, "eval_loss": 1.0}')
    found = find_better_step(tmp_path)
    assert read_saved_step(tmp_path) == saved_step and (found is not None) == is_better
    if found:
        assert found == BestStep(tmp_path / "best", 6, 1.0, saved_step, last_loss)
        assert said in found.describe()
    card = "\n".join(_describe_losses(tmp_path))
    assert "Evaluation loss: 1.7500" not in card
    final = "not known" if saved_step is None else f"{saved_step / 2:.4f} after {saved_step} steps"
    assert f"inal loss: {final}" in card


def test_the_card_of_weights_whose_losses_are_not_finite(tmp_path):
    """The last evaluation and the last training loss, with best/ and without."""
    lines = [{"step": i, "loss": 2.0, "epoch": i / 4, "eval_loss": 1.5} for i in (1, 2)]
    lines[1] |= {"loss": None, "eval_loss": None}  # as metrics.jsonl has NaN
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = "Final loss: not finite after 2 steps (0.50 epochs)"
    assert _describe_losses(tmp_path) == ["Evaluation loss: not finite after 2 steps", final]
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "evaluation.json").write_text('{"step": 1, "eval_loss": 1.5}')
    best, *others = _describe_losses(tmp_path)
    assert best.startswith("Best evaluation loss of the run: 1.5000 after 1 steps; ")
    assert others == ["Evaluation loss: not finite after 2 steps", final]


def test_control_characters_of_a_folder_are_not_printed(tmp_path):
    assert "\x1b" not in BestStep(tmp_path / "h\x1b[31m" / "best", 6, 1.0, 8, 1.5).describe()


def test_evaluations_of_damaged_metrics_are_not_known(tmp_path):
    assert read_evaluations(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_loss": 2}\n{"step": 2, "eval_lo')
    assert read_evaluations(tmp_path) == [(1, 2.0)], "a line that is being written does not count"
    (tmp_path / "metrics.jsonl").write_text('{"eval_loss": 2}\n')
    assert read_evaluations(tmp_path) == []
