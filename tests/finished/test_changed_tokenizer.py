"""A base whose tokenizer or chat template was edited after training: each command warns once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import block_expansion
import evaluate
import export
import generate
from files.names import ADAPTER, BLOCKS, CHAT_TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_JSON
from finished.finished_run import open_run
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import edit_base_metadata, write_chat_run, write_random_run

GENERATE = [generate, "--prompt", "Hi", "--max_new_tokens", "2", "--json"]
MERGE = [export, "--to", "merged", "--check", "false", "--out"]


def warning(folder: Path) -> str:
    """The warning for a base in `folder`."""
    return (
        f"{folder}: its tokenizer or chat template has changed since training: prompts, tokens and stop"
        " tokens may differ from those of training\n"
    )


def edit_template(folder: Path) -> None:
    path = folder / CHAT_TEMPLATE
    path.write_text("Be brief. " + path.read_text())


def edit_json(folder: Path, name: str, **changed) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def add_tool_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")


EDITS = {
    "chat template": edit_template,
    "eos_token": lambda folder: edit_json(folder, TOKENIZER_CONFIG, eos_token="<|im_end|>"),
    "tokenizer.json": lambda folder: edit_json(folder, TOKENIZER_JSON, normalizer={"type": "Lowercase"}),
    "a template of its own for tools": add_tool_template,  # the last one, as it remains
}


@pytest.fixture
def stderr_of(capsys):
    """stderr_of(command, *argv) -> stderr of a command that succeeds; with --json its stdout is only JSON."""

    def run(command, *argv) -> str:
        capsys.readouterr()
        assert command.main(list(map(str, argv))) == 0
        shown = capsys.readouterr()
        assert "--json" not in argv or json.loads(shown.out)["answers"]
        return shown.err

    return run


def test_an_adapter_over_an_edited_tokenizer(checkpoints, one_rank, tmp_path, stderr_of, capsys):
    """The same for best/. The weights are still verified to be those of training."""
    run = write_chat_run(one_rank, tmp_path, checkpoints())
    best, base, kept = shutil.copytree(run, run / "best"), tmp_path / "model", tmp_path / "kept"
    shutil.copytree(base, kept)
    perplexity = ["--metrics", "perplexity", "--samples", "1", "--dataset", tmp_path / "rows.jsonl"]

    def lines(name: str) -> set[str]:
        out = tmp_path / name
        commands = (
            GENERATE,
            [evaluate, *perplexity],
            [*MERGE, out / "merged"],
            [export, "--to", "adapter", "--out", out / "adapter"],
        )
        out.mkdir()
        shown = {stderr_of(command, run, *more) for command, *more in commands}
        return shown | {stderr_of(generate, best, *GENERATE[1:])}

    assert lines("untouched") == {""}
    for name, edit in EDITS.items():
        edit(base)
        assert lines(name) == {warning(base)}, name
        assert open_run(run).is_base_verified
        assert stderr_of(generate, run, *GENERATE[1:], "--base_model", kept) == ""  # the base as it was
        shutil.copytree(kept, base, dirs_exist_ok=True)
    (base / TOKENIZER_JSON).write_text("{")
    assert generate.main([str(run), *GENERATE[1:]]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1  # the error without the warning
    shutil.rmtree(base)
    shutil.copytree(kept, base)
    edit_template(base)
    edit_base_metadata(run / ADAPTER, base_tokenizer=None)  # as an earlier version wrote it
    assert stderr_of(generate, run, *GENERATE[1:]) == ""


def test_new_blocks_over_an_edited_tokenizer(checkpoints, alpaca_file, one_rank, tmp_path, stderr_of):
    """The same when blocks are put back into the expanded model. A whole model reads its own tokenizer."""
    base = shutil.copytree(checkpoints("llama_bias_pro"), tmp_path / "base")
    blocks, whole = tmp_path / "blocks", tmp_path / "whole"
    write_random_run(one_rank, blocks, args_for(base, alpaca_file, "llama_pro", "--llama_pro_save", "blocks"))
    write_random_run(one_rank, whole, args_for(base, alpaca_file, "llama_pro"))

    def shown(where: str) -> list[str]:
        put_back = ["--model_name", base, "--output_dir", tmp_path / where, "--blocks", blocks / BLOCKS]
        merge = [blocks, *MERGE[1:], tmp_path / f"{where} merged"]
        return [
            stderr_of(generate, blocks, *GENERATE[1:]),
            stderr_of(export, *merge),
            stderr_of(block_expansion, *put_back),
            stderr_of(generate, whole, *GENERATE[1:]),
        ]

    assert shown("before") == [""] * 4
    EDITS["tokenizer.json"](base)
    assert shown("after") == [warning(base)] * 3 + [""]
