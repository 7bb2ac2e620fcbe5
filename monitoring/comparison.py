"""Several runs side by side, for compare.html: names, data, options, machines, answers to a prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring.run_facts import EVALUATION, TRAINING
from monitoring.run_files import RunFiles
from monitoring.run_summary import RunSummary, summarize
from options.config import FIELDS
from options.declaration import format_value
from options.errors import UserError, join_names

# Each run has its own, and dump_yaml resets the last two.
NOT_COMPARED = {"output_dir", "resume", "overwrite"}
HARDWARE = ("ranks", "device", "memory_gib")
ABSENT = "not recorded"
WHY_DIFFERENT = "other rows, split, tokenizer, template or context length"

Differences = list[tuple[str, list[str]]]  # (name, its value in each run)


@dataclass(frozen=True)
class Compared:
    """A run among others.

    Attributes:
        name: its folder, from the folder that all runs are in.
        index: its place in the command.
    """

    name: str
    index: int
    files: RunFiles
    summary: RunSummary


def compare(runs: Sequence[RunFiles]) -> list[Compared]:
    """Return the runs with their names and summaries, in their order."""
    names = short_names([run.folder for run in runs])
    return [
        Compared(name, i, run, summarize(run.steps))
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    ]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the paths of different folders from the deepest folder that all of them are in."""
    paths = [os.path.abspath(folder) for folder in folders]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, shared) for path in paths]


def describe_data_differences(runs: Sequence[Compared]) -> list[str]:
    """Return lines about rows that are not known to be the same in all runs; [] if they are.

    The digests are those of tokens. So the same text in the tokens of another model differs.
    """
    losses = {"trained": "training", "evaluated": "evaluation"}
    lines = [
        f"data: runs were {verb} on different tokens ({WHY_DIFFERENT}): {names}; their {losses[verb]} losses"
        " cannot be compared"
        for verb, names in _find_different_data(runs).items()
    ]
    for verb, (known, unknown) in _group_by_data(runs).items():
        if unknown and len(unknown) + sum(map(len, known)) > 1:
            names = join_names([run.name for run in unknown])
            lines.append(
                f"data: the rows that these runs of an earlier version were {verb} on are not recorded, and"
                f" may differ: {names}"
            )
    return lines


def check_same_data(runs: Sequence[Compared]) -> None:
    """Raise UserError if the rows of the runs are known to differ. Those that are not recorded may."""
    verbs: dict[str, list[str]] = {}
    for verb, names in _find_different_data(runs).items():
        verbs.setdefault(names, []).append(verb)
    found = [f"{' and '.join(each)} on different tokens: {names}" for names, each in verbs.items()]
    if found:
        raise UserError(
            f"runs were {'; '.join(found)} ({WHY_DIFFERENT}), so their losses cannot be compared;"
            " --different_data true makes the page all the same"
        )


def has_different_data(runs: Sequence[Compared]) -> bool:
    """Return whether `check_same_data` refuses the runs."""
    return bool(_find_different_data(runs))


def _find_different_data(runs: Sequence[Compared]) -> dict[str, str]:
    """Return {what was done with rows that differ: names of the runs, grouped by these rows}."""
    shows_dataset = len({run.files.config.dataset for run in runs}) > 1

    def name(group: list[Compared]) -> str:
        names = join_names([run.name for run in group])
        datasets = join_names([*dict.fromkeys(run.files.config.dataset for run in group)])
        return f"{names} (--dataset {datasets})" if shows_dataset else names

    groups = {verb: known for verb, (known, _) in _group_by_data(runs).items()}
    return {verb: " | ".join(map(name, known)) for verb, known in groups.items() if len(known) > 1}


def _group_by_data(runs: Sequence[Compared]) -> dict[str, tuple[list[list[Compared]], list[Compared]]]:
    """Return {"trained", "evaluated": (groups of runs with the same rows, runs whose rows are not known)}."""
    evaluated = [run for run in runs if run.summary.best]
    groups = {
        "trained": _group_by_digest(runs, TRAINING),
        "evaluated": _group_by_digest(evaluated, EVALUATION),
    }
    return {
        verb: ([group for digest, group in found.items() if digest], found.get(None, []))
        for verb, found in groups.items()
    }


def _group_by_digest(runs: Sequence[Compared], key: str) -> dict[str | None, list[Compared]]:
    """Return {digest in run.json: the runs that have it}; None stands for runs without one."""
    groups: dict[str | None, list[Compared]] = {}
    for run in runs:
        groups.setdefault((run.files.facts.get("data") or {}).get(key), []).append(run)
    return groups


def find_best(runs: Sequence[Compared]) -> Compared | None:
    """Return the run with the lowest evaluation loss; None if not several were evaluated on the same rows."""
    evaluated = [run for run in runs if run.summary.best]
    digests = _group_by_digest(evaluated, EVALUATION).keys()
    if len(evaluated) < 2 or len(digests) > 1 or None in digests:
        return None
    return min(evaluated, key=_best_loss)


def _best_loss(run: Compared) -> float:
    assert run.summary.best
    return run.summary.best[1]


def differing_options(runs: Sequence[Compared]) -> Differences:
    """Return the options that do not have the same value in all runs. An option not given has its default."""
    names = [name for name in FIELDS if name not in NOT_COMPARED]
    return _differences(runs, names, lambda run, name: format_value(getattr(run.files.config, name)))


def differing_machines(runs: Sequence[Compared]) -> Differences:
    """Return the facts about machines and the versions that are not the same in all runs."""

    def value(run: Compared, name: str) -> str:
        facts: dict[str, Any] = run.files.facts
        section = facts.get("hardware" if name in HARDWARE else "versions") or {}
        return str(section.get(name, ABSENT))

    versions = dict.fromkeys(name for run in runs for name in run.files.facts.get("versions") or {})
    return _differences(runs, [*HARDWARE, *versions], value)


def _differences(
    runs: Sequence[Compared], names: Sequence[str], value: Callable[[Compared, str], str]
) -> Differences:
    """Return (name, value(run, name) of each run) of the names whose values are not all the same."""
    values = ((name, [value(run, name) for run in runs]) for name in names)
    return [(name, found) for name, found in values if len(set(found)) > 1]


@dataclass(frozen=True)
class ComparedPrompt:
    """A prompt that several runs answered.

    Attributes:
        reference: the row's own answer; "" if it has none. If the runs have several, those with their names.
        before: the answer before training, if all runs have the same one; else None.
        answers: (run, step, text) of the last answer of each run.
        images: of a sample, as samples.jsonl has them.
        folder: the RUN with their copies.
    """

    text: str
    reference: str
    before: str | None
    answers: list[tuple[Compared, int, str]]
    images: list[dict]
    folder: Path


def shared_prompts(runs: Sequence[Compared]) -> tuple[list[ComparedPrompt], int]:
    """Return (the prompts that several runs answered, the number of those that only one run did).

    Prompts are the same if their texts and their images are. A text is what the model sees, so models with
    other chat templates have no prompt in common.
    """
    found: dict[tuple, dict[int, list[dict]]] = {}
    for run in runs:
        for sample in sorted(run.files.samples, key=lambda s: s["step"]):
            images = tuple(image.get("copy") or image["label"] for image in sample["images"])
            found.setdefault((sample["prompt"], images), {}).setdefault(run.index, []).append(sample)
    shared = [_compare_answers(runs, by_run) for by_run in found.values() if len(by_run) > 1]
    return shared, len(found) - len(shared)


def _join_references(references: dict[str, str]) -> str:
    """Return the one reference of {run's name: reference}, or all of them with the names."""
    if len(set(references.values())) == 1:
        return next(iter(references.values()))
    return "\n".join(f"{name}: {text or 'none'}" for name, text in references.items())


def _compare_answers(runs: Sequence[Compared], by_run: dict[int, list[dict]]) -> ComparedPrompt:
    """Return a prompt with its answers. by_run: {index of a run: its samples, by step}."""
    first = next(iter(by_run.values()))[0]
    before = [samples[0]["text"] if samples[0]["step"] == 0 else None for samples in by_run.values()]
    return ComparedPrompt(
        text=first["prompt"],
        reference=_join_references({runs[i].name: samples[-1]["reference"] for i, samples in by_run.items()}),
        before=before[0] if len(set(before)) == 1 else None,
        answers=[(runs[i], samples[-1]["step"], samples[-1]["text"]) for i, samples in by_run.items()],
        images=first["images"],
        folder=runs[next(iter(by_run))].files.folder,
    )
