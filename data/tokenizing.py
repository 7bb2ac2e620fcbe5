"""Data: recipe -> rows -> tokens and targets -> batches of padded rows (of packed ones: data/packing.py).

Rows are tokenized once, before any process with a GPU is started, into three flat tensors that all
processes share. Which rows make up an optimizer step is decided here too, for all ranks at once, so every
rank knows the step's token counts without asking the others.

Shapes: B rows of a micro-batch, T tokens of its longest row.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain

import jinja2
import numpy as np
import torch
from fastcore.parallel import parallel

from data.formats import FORMATS, Rendered, checked, encode, recognise
from data.sources import Recipe, find_recipe, load_rows
from options.errors import UserError
from options.limits import ROW

# What a chat template can raise for a row: it is a program, in a sandbox.
TEMPLATE_ERRORS = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
                   AssertionError, RecursionError, MemoryError)  # fmt: skip
FILLED = 10**6  # rows that a recipe makes of its `fill`
IGNORE = -100  # the target of a position that is not learned, as in torch's cross-entropy


@dataclass(frozen=True)
class TokenizedRows:
    """All examples, one after the other. tokens [N] int32; learned [N] bool: the token is a target;
    starts [R + 1] int64: example i is tokens[starts[i]:starts[i+1]]; dropped: rows without a target; cut: kept
    rows that lost their end to context_length; numbers [R] int64: of the examples' rows in the dataset, from 1."""

    tokens: torch.Tensor
    learned: torch.Tensor
    starts: torch.Tensor
    dropped: int
    cut: int
    numbers: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self) -> torch.Tensor:
        return self.starts.diff()

    def targets(self) -> torch.Tensor:
        """Learned tokens of each example, without its first token, which nothing predicts: [R]."""
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), self.learned.long().cumsum(0)])
        return sums[self.starts[1:]] - sums[self.starts[:-1] + 1]


@dataclass(frozen=True)
class Examples:
    """A dataset as texts. format, markers: what its rows were rendered with."""

    rendered: list[Rendered]
    format: str
    markers: list[str]


def prepare(dataset: str, dataset_format: str, samples: int, context_length: int, tokenizer) -> TokenizedRows:
    """--dataset, read, rendered, tokenized and cut to context_length tokens.

    Raises UserError for anything wrong with the data, and if no example has a token to learn from.
    """
    examples = read_examples(dataset, dataset_format, samples, context_length, tokenizer)
    return tokenize(examples.rendered, tokenizer, context_length, f"--dataset {dataset}")


def read_examples(
    dataset: str, dataset_format: str, samples: int, context_length: int, tokenizer
) -> Examples:
    """--dataset, read and rendered. samples: rows used; -1 = as the recipe says. Raises UserError for anything
    wrong with the data."""
    recipe, file = find_recipe(dataset)
    samples = samples if samples > 0 else recipe.samples
    if recipe.fill and (context_length > ROW // max(len(recipe.fill["output"]), 1) or samples > FILLED):
        raise UserError(f"--dataset {dataset}: fills at most {FILLED:,} rows of {ROW:,} characters")
    data = load_rows(recipe, file, samples)
    rows = data.rows
    if recipe.fill:
        rows = [recipe.fill | {"output": recipe.fill["output"] * context_length}] * len(rows)
    name = _format_of(recipe, rows[0], dataset, dataset_format)
    rendered = _render_all(_Rendering(rows, data.places, name, recipe.markers, tokenizer))
    return Examples(rendered, name, recipe.markers)


def _format_of(recipe: Recipe, row: dict, dataset: str, dataset_format: str) -> str:
    name = dataset_format if dataset_format != "auto" else recipe.format
    return name if name != "auto" else recognise(set(row), row, f"--dataset {dataset}", recipe.markers)


def find_format(dataset: str, dataset_format: str) -> tuple[str, list[str]]:
    """(the name of the format that `prepare` renders in, the recipe's markers). Reads the data only where nothing
    else tells. Raises UserError for what is wrong with it."""
    recipe, file = find_recipe(dataset)
    unknown = dataset_format == recipe.format == "auto"
    row = load_rows(recipe, file, 1).rows[0] if unknown else {}
    return _format_of(recipe, row, dataset, dataset_format), recipe.markers


@dataclass(frozen=True)
class _Rendering:
    """Rows to be rendered in the format `name`; called with a range of them, it returns their Rendered."""

    rows: list[dict]
    places: list[str]
    name: str
    markers: list[str]
    tokenizer: object

    def __call__(self, numbers: range) -> list[Rendered]:
        rendered = []
        for i in numbers:
            values = checked(self.rows[i], FORMATS[self.name], f"--dataset {self.places[i]}")
            try:
                one = FORMATS[self.name].render(values, self.tokenizer, self.markers)
                rendered.append(dataclasses.replace(one, number=i + 1))
                one.text.encode()  # JSON can spell half a character, which no tokenizer takes
            except TEMPLATE_ERRORS as e:
                raise UserError(f"--dataset {self.places[i]}: {_reason(e)}") from None
            if len(one.text) > ROW:
                raise UserError(
                    f"--dataset {self.places[i]}: a text of {len(one.text):,} characters; at most {ROW:,} are read"
                )
        return rendered


def _render_all(render: _Rendering) -> list[Rendered]:
    """In this process, unless there is much to do: a chat template takes up to a millisecond per row.

    The workers are forked, so that rows and tokenizer need no copying; they run nothing but Python.
    """
    total = len(render.rows)
    workers = min(os.cpu_count() or 1, 16)
    if render.name != "chat" or total < 2000 or workers == 1 or not hasattr(os, "fork"):
        return render(range(total))
    global _held
    _held = render  # the forked workers find it here
    blocks = [range(i, min(i + 200, total)) for i in range(0, total, 200)]
    try:
        parts = parallel(_render_held, blocks, n_workers=workers, method="fork", progress=False)
    except BrokenProcessPool:
        raise UserError(
            f"--dataset: one of {workers} processes that render its rows was killed; out of host memory is the"
            " usual cause"
        ) from None
    return list(chain.from_iterable(parts))


def _render_held(numbers: range) -> list[Rendered]:
    return _held(numbers)


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
    tokens, learned, lengths, numbers, cut, prompts = [], [], [], [], 0, []
    for start in range(0, len(rendered), 1000):  # the library works on a batch in parallel
        block = rendered[start : start + 1000]
        encoded = encode(tokenizer, [r.text for r in block], block[0].special, return_offsets_mapping=True)
        for example, ids, offsets in zip(block, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids, targets = _targets(example, ids, offsets, tokenizer.eos_token_id)
            if targets.any():
                prompts.append(int(targets.argmax()))
            if targets[1:context_length].any():
                tokens.append(ids[:context_length])
                learned.append(targets[:context_length])
                lengths.append(len(tokens[-1]))
                numbers.append(example.number)
                cut += len(ids) > context_length
    if not lengths:
        why = f"the shortest prompt takes {min(prompts)} tokens" if prompts else "no answer has any text"
        raise UserError(
            f"{where}: none of the {len(rendered)} rows has anything to learn from within --context_length"
            f" {context_length} ({why})"
        )
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flat = [torch.from_numpy(np.concatenate(a)) for a in (tokens, learned)]
    dropped = len(rendered) - len(lengths)
    return TokenizedRows(*flat, torch.from_numpy(starts), dropped, cut, torch.tensor(numbers))


def _targets(
    example: Rendered, ids: list[int], offsets: list, eos: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [L] int32, which of them are targets [L] bool), with the EOS token where one is due."""
    begins, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(ids)).reshape(-1, 2).T
    # Tokenizers with trim_offsets (Llama 3) report a token of spaces as empty, at its end: it begins where
    # the token before it ended.
    begins = np.where(begins == ends, np.append(0, ends[:-1]), begins) if ids else begins
    targets = np.zeros(len(ids), dtype=bool)
    for start, end in example.learned:
        targets |= (begins < end) & (ends > start)
    if ids and max(ids) >= 2**31:
        raise UserError(f"--model_name: its tokenizer makes the id {max(ids)}")
    tokens = np.asarray(ids, dtype=np.int32)
    if example.ends and example.learned and (not ids or ids[-1] != eos):
        tokens, targets = np.append(tokens, np.int32(eos)), np.append(targets, True)
    elif example.ends and example.learned:
        targets[-1] = True  # a tokenizer that writes the EOS token by itself
    return tokens, targets


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank. ids [B, T] int64, targets [B, T] int64: the next token, or IGNORE; lengths [B, 1] int64,
    of packed rows [B, T]: how many tokens the row has that a token is of; only RoPE of type longrope goes by it; places
    [P] int64: where the learned ones are in the batch as one line of B * T tokens, filled up with others
    (`learned_places`); None: all of it.

    Only where rows are packed: positions [B, T] int64, of each token in its row; bounds [N + 1] int32: where rows
    begin and end in the batch as one line; longest: tokens of the longest row.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor | None = None
    places: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    bounds: torch.Tensor | None = None
    longest: int | None = None

    def inputs(self) -> dict:
        """What SummedLoss takes. From positions that begin again transformers knows the rows, and confines its
        masks to them; models/attention.py knows them from the bounds."""
        own = {"input_ids": self.ids, "row_lengths": self.lengths}
        if self.positions is None:
            return own
        bounds = {f"cu_seq_lens_{x}": self.bounds for x in "qk"} | {
            f"max_length_{x}": self.longest for x in "qk"
        }
        return own | {"position_ids": self.positions} | bounds

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU copies while the program goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {name: v for name, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **{name: change(v) for name, v in tensors.items()})


@dataclass(frozen=True)
class Step:
    """What one rank does for one optimizer step; of all ranks and micro-batches: n_tokens, n_targets, rows (indices
    into the TokenizedRows)."""

    epoch: float
    batches: list[Batch]
    n_tokens: int
    n_targets: int
    rows: torch.Tensor


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
        self._longest = int(self._lengths.max())

    def count(self) -> int:
        """What an epoch deals: rows. batch_size counts the same."""
        return len(self.rows)

    def steps_per_epoch(self) -> int:
        return -(-self.count() // (self.batch_size * self.accumulation * self.world))

    def deal(self, epoch: int) -> Iterator[tuple[Sequence, list[Sequence]]]:
        """Per step (all that it takes, [each micro-batch, of all ranks]): indices of rows."""
        order = self._order(epoch)
        for step in _split(order, self.batch_size * self.world * self.accumulation):
            yield step, _split(step, self.batch_size * self.world)

    def _order(self, epoch: int) -> Sequence:
        return torch.randperm(len(self.rows), generator=self._generator(epoch))

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def positions(self) -> int:
        """Of the first epoch's batches, of all ranks, padding included."""
        size, total = self.batch_size, 0
        for micro in _split(self._order(0), size * self.world):
            total += -(-len(micro) // size) * min(size, len(micro)) * self._width(micro)
        return total

    def padding_share(self) -> float:
        """Padding among all positions of the first epoch."""
        return 1 - int(self._lengths.sum()) / self.positions()

    def steps(self, num_epochs: int, done: int = 0) -> Iterator[Step]:
        """The steps of the whole run, in order, after the first `done`. Where a run stands in its data is no more
        than that number."""
        first, skipped = divmod(done, self.steps_per_epoch())
        for epoch in range(first, num_epochs):
            for i, (step, micros) in enumerate(self.deal(epoch)):
                if epoch == first and i < skipped:
                    continue
                batches = [self._batch(m) for m in micros]
                done, rows = epoch + (i + 1) / self.steps_per_epoch(), self._rows(step)
                counts = int(self._lengths[rows].sum()), int(self._targets[rows].sum())
                yield Step(done, batches, *counts, rows)

    def _batch(self, micro: Sequence) -> Batch:
        """This rank's part of a micro-batch of all ranks, in the shape of the largest part: ranks that share a
        vocabulary exchange equally many tokens (models/loss.py), and FSDP waits for the slowest anyway. At an epoch's
        end a rank may be left without rows."""
        own = micro[self.rank * self.batch_size :][: self.batch_size]
        most = max(int(self._targets[self._rows(part)].sum()) for part in _split(micro, self.batch_size))
        return self._collate(own, (min(self.batch_size, len(micro)), self._width(micro)), most)

    def _rows(self, step: Sequence) -> torch.Tensor:
        """Indices of all rows of a step, or of a part of one."""
        return step

    def _width(self, micro: Sequence) -> int:
        """Tokens of the longest line of a micro-batch of all ranks, rounded up, but not beyond the longest of all."""
        return min(rounded(int(self._lengths[micro].max())), self._longest)

    def _collate(self, own: Sequence, shape: tuple[int, int], most: int) -> Batch:
        return make_batch(self.rows, own, shape, most)


def rounded(length: int) -> int:
    """Up to a number of five binary digits and zeros: at most a sixteenth more, and 16 lengths from one power of two to
    the next. A GPU's attention may plan anew for each length that it meets: cuDNN's, as torch 2.11 calls it, takes 0.15 s on
    an H200."""
    step = 1 << max(length.bit_length() - 5, 0)
    return -(-length // step) * step


def _split(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def learned_places(targets: torch.Tensor, most: int | None) -> torch.Tensor:
    """Of targets [B, T]: the places, in the batch as one line, of those that are not IGNORE, filled up with others to
    `most`, the number of the rank that has most of them: ranks that share a vocabulary bring equally many tokens
    (models/loss.py). None: not filled up."""
    ignored = targets.flatten() == IGNORE
    return ignored.sort(stable=True).indices[: int((~ignored).sum()) if most is None else most]


def make_batch(
    rows: TokenizedRows, indices: torch.Tensor, shape: tuple[int, int], most: int | None = None
) -> Batch:
    """The rows `indices` in a batch of that shape [B, T]: padded on the right, where causal attention never looks,
    and with rows of nothing but padding. most: as for `learned_places`."""
    spans = [(int(rows.starts[i]), int(rows.starts[i + 1])) for i in indices]
    ids, lengths = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[0], 1, dtype=torch.int64)
    targets = torch.full(shape, IGNORE)
    for row, (start, end) in enumerate(spans):
        lengths[row] = end - start
        tokens = rows.tokens[start:end].long()
        ids[row, : end - start] = tokens
        targets[row, : end - start - 1] = tokens[1:].masked_fill(~rows.learned[start + 1 : end], IGNORE)
    return Batch(ids, targets, lengths, learned_places(targets, most))
