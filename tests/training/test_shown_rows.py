"""--show_rows, as a command."""

from __future__ import annotations

from pathlib import Path

import train
from data.row_text import LEGEND
from tests.helpers.tiny import write_questions


def test_rows_are_shown_and_nothing_is_written(checkpoints, tmp_path, capfd):
    """Also where a run is in --output_dir. Errors are those of a run."""
    rows = write_questions(tmp_path / "rows.jsonl", even=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("of an earlier run")
    argv = ["--model_name", str(checkpoints()), "--dataset", str(rows), "--output_dir", str(out)]
    assert train.main([*argv, "--show_rows", "2", "--log_to", "wandb"]) == 0
    printed = capfd.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("row ")] == [
        "row 1",
        "row 2",
    ]
    assert "\ndata: " in f"\n{printed}"
    _, legend, examples = printed.partition(f"\n{LEGEND}\n")
    assert legend and examples.count("[[") == examples.count("]]") == 2
    assert [path.name for path in Path(out).iterdir()] == ["config.yaml"]
    assert (out / "config.yaml").read_text() == "of an earlier run"
    assert train.main([*argv[:3], str(tmp_path / "missing.jsonl"), "--show_rows", "2"]) == 2
    assert "missing.jsonl: no such file" in capfd.readouterr().err
