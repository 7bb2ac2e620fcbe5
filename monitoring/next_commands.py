"""The commands that can follow a run, for its report."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from data.dataset_names import without_weights
from files.names import ADAPTER, BLOCKS, CONFIG, OPTIONS
from launch.program import shell_command
from monitoring.best_step import find_better_step, format_loss
from monitoring.run_files import RunFiles
from options.config import TOY_DATASET, TOY_MODEL, TOY_PROMPT, Config

Commands = list[tuple[str, list[str]]]  # (purpose, words of a shell command)


def next_commands(run: RunFiles) -> Commands:
    """Return the commands that can follow this run, in the current folder.

    If the best evaluation is not the last, its result in best/ comes first.
    """
    folder, better = str(run.folder), find_better_step(run.folder)
    if better:
        names = {path.name for path in better.folder.iterdir()}
        result = f"the best step, {better.step:,} (evaluation loss {better.loss:.4f})"
        commands = _commands_on(better.folder, names, run.config, result, f"{folder}-best")
        last = "the result of the run's former end"
        if better.last_step is not None:
            last = f"the last step, {better.last_step:,} (evaluation: {format_loss(better.last_loss)})"
        commands += _commands_on(run.folder, run.names, run.config, last, folder)[:1]
    else:
        commands = _commands_on(run.folder, run.names, run.config, "the tuned one", folder)
    again = ["--config", f"{folder}/{OPTIONS}", "--output_dir", f"{folder}-again"]
    commands.append(("Train again with the same options", [*shell_command("train.py"), *again]))
    commands.append(("Make this page again", [*shell_command("report.py"), folder]))
    return commands


def _commands_on(folder: Path, names: Set[str], config: Config, result: str, out: str) -> Commands:
    """Return the commands that open a result; the first one asks it.

    Args:
        folder: the RUN, or its best/.
        names: the files in it.
        config: options of the run.
        result: what the folder holds, in words.
        out: beginning of the name of a folder to export to.
    """
    commands = []
    is_demo = (config.model_name, config.dataset) == (TOY_MODEL, TOY_DATASET)
    prompt = ["--prompt", TOY_PROMPT] if is_demo else []  # without one, generate.py starts a conversation
    # evaluate.py uses the held-out rows unless an option names others.
    rows = [] if config.evaluates else ["--dataset", without_weights(config.dataset), "--samples", "200"]
    has_model, has_adapter = CONFIG in names, not names.isdisjoint((ADAPTER, BLOCKS))
    merged = "what was trained" if result == "the tuned one" else result
    for script, purpose, more, is_possible in (
        ("generate.py", f"Ask the base model and {result}", prompt, has_adapter or has_model),
        ("evaluate.py", f"Measure the base model and {result}", rows, has_adapter or has_model),
        ("export.py", f"Make a complete model out of the base and {merged}",
         ["--to", "merged", "--out", f"{out}-merged"], has_adapter),
    ):  # fmt: skip
        if is_possible:
            commands.append((purpose, [*shell_command(script), str(folder), *more]))
    if has_model:
        commands.append(("Serve the model (docs/serving.md)", ["transformers", "serve", str(folder)]))
    return commands
