"""Data: recipe -> rows -> tokens and targets -> batches.

Rows are tokenized once, before any process with a GPU is started, into three flat tensors that all
processes share. Which rows make up an optimizer step is decided here too, for all ranks at once, so every
rank knows the step's token counts without asking the others.

Shapes: B rows of a micro-batch, T tokens of its longest row.
"""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch

from config import UserError
from formats import FORMATS, GUANACO_MARKERS, Rendered, checked, recognise

RECIPES = Path(__file__).parent / "datasets"
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")
IGNORE = -100  # the target of a position that is not learned, as in torch's cross-entropy


@dataclass(frozen=True)
class Recipe:
    """A file of datasets/: where rows come from and how they read. Keys as in the TOML file.

    source: a hub id, or a file beside the recipe; data_files, split: for the hub; samples: rows used unless
    --dataset_samples says otherwise; columns: {ours: theirs}; markers: of the two speakers in a guanaco
    text; fill: one row, whose output is repeated until it fills the context.
    """

    source: str = ""
    split: str = "train"
    data_files: str | None = None
    format: str = "auto"
    samples: int = -1
    columns: dict[str, str] | None = None
    markers: tuple[str, str] = GUANACO_MARKERS
    fill: dict[str, str] | None = None


@dataclass(frozen=True)
class Rows:
    """Raw rows and where each came from, for messages."""

    rows: list[dict]
    places: list[str]


@dataclass(frozen=True)
class TokenizedRows:
    """All examples, one after the other. tokens [N] int32; learned [N] bool: the token is a target;
    starts [R + 1] int64: example i is tokens[starts[i]:starts[i+1]]."""

    tokens: torch.Tensor
    learned: torch.Tensor
    starts: torch.Tensor
    dropped: int
    cut: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self) -> torch.Tensor:
        return self.starts.diff()

    def targets(self) -> torch.Tensor:
        """Learned tokens of each example, without its first token, which nothing predicts: [R]."""
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), self.learned.long().cumsum(0)])
        return sums[self.starts[1:]] - sums[self.starts[:-1] + 1]


def find_recipe(dataset: str) -> tuple[Recipe, Path | None]:
    """(the recipe of --dataset, the local file that it reads or None). Raises UserError for unknown names."""
    path = Path(dataset).expanduser()
    if path.suffix == ".toml" or (RECIPES / f"{dataset}.toml").is_file():
        path = path if path.suffix == ".toml" else RECIPES / f"{dataset}.toml"
        recipe = _read_recipe(path)
        local = path.parent / recipe.source
        return recipe, local if Path(recipe.source).suffix in FILE_TYPES and local.is_file() else None
    if path.suffix in FILE_TYPES:
        return Recipe(source=dataset), path
    if path.is_dir() or dataset.count("/") == 1:
        return Recipe(source=dataset), None
    names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
    raise UserError(
        f"--dataset {dataset}: not a recipe ({names}), a {', '.join(FILE_TYPES)} file or a hub id (owner/name)"
    )


def _read_recipe(path: Path) -> Recipe:
    try:
        recipe = Recipe(**tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as e:
        raise UserError(f"--dataset {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as e:
        raise UserError(f"--dataset {path}: not a recipe ({e})") from None
    if recipe.format not in ("auto", *FORMATS) or len(recipe.markers) != 2:
        raise UserError(f"--dataset {path}: format must be one of {', '.join(FORMATS)}, markers two texts")
    return recipe


def load_rows(recipe: Recipe, file: Path | None, samples: int) -> Rows:
    """The first `samples` rows (-1: all). Raises UserError for what is missing, empty or malformed."""
    if recipe.fill:
        return Rows([recipe.fill] * max(samples, 1), ["dummy"] * max(samples, 1))
    rows = _read_file(file) if file else _read_hub(recipe)
    if samples > 0:
        rows = Rows(rows.rows[:samples], rows.places[:samples])
    if not rows.rows:
        raise UserError(f"--dataset {file or recipe.source}: is empty")
    if recipe.columns:
        theirs = {v: k for k, v in recipe.columns.items()}
        rows = Rows([{theirs.get(k, k): v for k, v in row.items()} for row in rows.rows], rows.places)
    return rows


def _read_file(path: Path) -> Rows:
    if not path.is_file():
        raise UserError(f"--dataset {path}: no such file")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        line = path.read_bytes()[: e.start].count(b"\n") + 1
        raise UserError(f"--dataset {path}:{line}: not UTF-8") from None
    except OSError as e:
        raise UserError(f"--dataset {path}: {e.strerror}") from None
    if path.suffix == ".csv":
        return _read_csv(path, text)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _read_json_list(path, text)
    rows, places = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_json(line, path, number))
            places.append(f"{path}:{number}")
            if not isinstance(rows[-1], dict):
                raise UserError(f"--dataset {path}:{number}: not a JSON object")
    return Rows(rows, places)


def _json(text: str, path: Path, line: int | None):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"--dataset {path}:{line or e.lineno}: not JSON ({e.msg})") from None
    except RecursionError:
        raise UserError(f"--dataset {path}:{line or 1}: JSON nested too deeply") from None


def _read_json_list(path: Path, text: str) -> Rows:
    rows = _json(text, path, None)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"--dataset {path}: entry {i} is not a JSON object")
    return Rows(rows, [f"{path} entry {i}" for i in range(1, len(rows) + 1)])


def _read_csv(path: Path, text: str) -> Rows:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    rows, places = [], []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"--dataset {path}:{reader.line_num}: another number of columns than the header"
                )
            rows.append(row)
            places.append(f"{path}:{reader.line_num}")
    except csv.Error as e:
        raise UserError(f"--dataset {path}:{reader.line_num}: not CSV ({e})") from None
    return Rows(rows, places)


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"--dataset {path}: not a parquet file ({str(e).splitlines()[0]})") from None
    return Rows(rows, [f"{path} row {i}" for i in range(1, len(rows) + 1)])


def _read_hub(recipe: Recipe) -> Rows:
    """Through Hugging Face `datasets`: a hub id, or a local folder (one named like the id goes first)."""
    import datasets

    if not hasattr(datasets, "load_dataset"):  # our folder datasets/, seen as an empty package
        raise UserError(f"--dataset {recipe.source}: needs the package `datasets` (pip install datasets)")
    datasets.utils.logging.disable_progress_bar()
    try:
        loaded = datasets.load_dataset(recipe.source, data_files=recipe.data_files, split=recipe.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"--dataset {recipe.source}: could not be loaded ({reason})") from None
    return Rows(loaded.to_list(), [f"{recipe.source} row {i}" for i in range(1, len(loaded) + 1)])


def prepare(dataset: str, dataset_format: str, samples: int, context_length: int, tokenizer) -> TokenizedRows:
    """--dataset, read, rendered, tokenized and cut to context_length tokens.

    Raises UserError for anything wrong with the data, and if no example has a token to learn from.
    """
    recipe, file = find_recipe(dataset)
    rows = load_rows(recipe, file, samples if samples > 0 else recipe.samples)
    if recipe.fill:
        rows.rows[:] = [recipe.fill | {"output": recipe.fill["output"] * context_length}] * len(rows.rows)
    name = dataset_format if dataset_format != "auto" else recipe.format
    if name == "auto":
        name = recognise(set(rows.rows[0]), rows.rows[0], f"--dataset {dataset}")
    rendered = []
    for row, place in zip(rows.rows, rows.places, strict=True):
        values = checked(row, FORMATS[name], f"--dataset {place}")
        try:
            rendered.append(FORMATS[name].render(values, tokenizer, recipe.markers))
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as e:  # from a chat template
            raise UserError(f"--dataset {place}: {_reason(e)}") from None
    return tokenize(rendered, tokenizer, context_length, f"--dataset {dataset}")


def _reason(e: Exception) -> str:
    text = str(e).strip().splitlines()
    if text and "chat_template" in text[0]:
        return "the tokenizer has no chat template; use an instruct model, or rows of another format"
    return text[0] if text else type(e).__name__


def toy_texts() -> list[str]:
    """The embedded data as texts, for the demo model's tokenizer."""
    rows = load_rows(*find_recipe("toy"), -1)
    return [FORMATS["alpaca"].render(row).text for row in rows.rows]


def tokenize(rendered: list[Rendered], tokenizer, context_length: int, where: str) -> TokenizedRows:
    """Tokens and targets of rendered rows. A token is a target if it holds a character of a learned range
    of the very text that was tokenized. Examples without a target are dropped and counted."""
    if not tokenizer.is_fast:
        raise UserError(
            "--model_name: its tokenizer cannot tell where a token lies in the text (no tokenizer.json)"
        )
    if tokenizer.eos_token_id is None and any(r.ends for r in rendered):
        raise UserError("--model_name: its tokenizer has no EOS token, so a model could not learn to stop")
    tokens, learned, lengths, cut, shortest = [], [], [], 0, None
    for start in range(0, len(rendered), 1000):  # the library works on a batch in parallel
        block = rendered[start : start + 1000]
        encoded = tokenizer(
            [r.text for r in block],
            add_special_tokens=block[0].special,
            return_offsets_mapping=True,
            verbose=False,
        )
        for example, ids, offsets in zip(block, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids, targets = _targets(example, ids, offsets, tokenizer.eos_token_id)
            first = int(targets.argmax()) if targets.any() else len(ids)
            shortest = first if shortest is None else min(shortest, first)
            cut += len(ids) > context_length
            ids, targets = ids[:context_length], targets[:context_length]
            if targets[1:].any():
                tokens.append(ids)
                learned.append(targets)
                lengths.append(len(ids))
    if not lengths:
        raise UserError(
            f"{where}: none of the {len(rendered)} rows has anything to learn from within --context_length"
            f" {context_length} (the shortest prompt takes {shortest} tokens)"
        )
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flat = [torch.from_numpy(np.concatenate(a)) for a in (tokens, learned)]
    return TokenizedRows(*flat, torch.from_numpy(starts), len(rendered) - len(lengths), cut)


def _targets(
    example: Rendered, ids: list[int], offsets: list, eos: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [L] int32, which of them are targets [L] bool), with the EOS token where one is due."""
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    targets = np.zeros(len(ids), dtype=bool)
    for start, end in example.learned:
        targets |= (spans[:, 0] < end) & (spans[:, 1] > start)
    tokens = np.asarray(ids, dtype=np.int32)
    if example.ends and example.learned and (not ids or ids[-1] != eos):
        tokens, targets = np.append(tokens, np.int32(eos)), np.append(targets, True)
    elif example.ends and example.learned:
        targets[-1] = True  # a tokenizer that writes the EOS token by itself
    return tokens, targets


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank. ids [B, T] int64, targets [B, T] int64: the next token, or IGNORE."""

    ids: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in (self.ids, self.targets)))


@dataclass(frozen=True)
class Step:
    """What one rank does for one optimizer step; n_tokens, n_targets: of all ranks and micro-batches."""

    epoch: float
    batches: list[Batch]
    n_tokens: int
    n_targets: int


class StepSampler:
    """Deals the rows of an epoch to steps, micro-batches and ranks.

    The order is a permutation made from (seed, epoch) alone. A step takes the next
    world * accumulation * batch_size rows, so how they are split changes nothing about the step; every row
    comes once per epoch, and the last step of an epoch is simply smaller.
    """

    def __init__(
        self, rows: TokenizedRows, batch_size: int, accumulation: int, rank: int, world: int, seed: int
    ):
        self.rows, self.batch_size, self.accumulation = rows, batch_size, accumulation
        self.rank, self.world, self.seed = rank, world, seed
        self._lengths, self._targets = rows.lengths(), rows.targets()

    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.accumulation * self.world))

    def deal(self, epoch: int) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Per step (indices of all its rows, [indices of each micro-batch of this rank])."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.rows), generator=generator)
        across = self.batch_size * self.world
        for step in order.split(across * self.accumulation):
            yield (
                step,
                [micro[self.rank * self.batch_size :][: self.batch_size] for micro in step.split(across)],
            )

    def padding_share(self) -> float:
        """Padding among all positions of this rank's first epoch."""
        real = padded = 0
        for _, micros in self.deal(0):
            for lengths in (self._lengths[m] for m in micros if len(m)):
                real, padded = real + int(lengths.sum()), padded + len(lengths) * int(lengths.max())
        return 1 - real / max(padded, 1)

    def steps(self, num_epochs: int) -> Iterator[Step]:
        """The steps of the whole run, in order."""
        for epoch in range(num_epochs):
            for i, (step, micros) in enumerate(self.deal(epoch)):
                batches = [self._batch(m, spare=step[:1]) for m in micros]
                done = epoch + (i + 1) / self.steps_per_epoch()
                yield Step(done, batches, int(self._lengths[step].sum()), int(self._targets[step].sum()))

    def _batch(self, indices: torch.Tensor, spare: torch.Tensor) -> Batch:
        """Padded to its longest row, on the right: causal attention never looks there. A rank that is left
        without rows at an epoch's end takes the row `spare` without targets: collectives need all ranks."""
        empty = len(indices) == 0
        spans = [
            (int(self.rows.starts[i]), int(self.rows.starts[i + 1])) for i in (spare if empty else indices)
        ]
        width = max(end - start for start, end in spans)
        ids = torch.zeros(len(spans), width, dtype=torch.int64)
        targets = torch.full((len(spans), width), IGNORE)
        for row, (start, end) in enumerate(spans):
            tokens = self.rows.tokens[start:end].long()
            ids[row, : end - start] = tokens
            if not empty:
                targets[row, : end - start - 1] = tokens[1:].masked_fill(
                    ~self.rows.learned[start + 1 : end], IGNORE
                )
        return Batch(ids, targets)
