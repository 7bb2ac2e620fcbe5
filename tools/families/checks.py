"""Comparisons of a family with transformers and PEFT: each returns what differs, or None.

They are those of tests/ for the families of the registry, on one tiny model, and use the tests' helpers. The
family must be in FAMILIES. Everything is in fp32, on the CPU or the first GPU.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import block_expansion
import train
from data.batches import Batch
from data.packing import make_sampler
from data.rows import IGNORE
from launch.ranks import RankInfo
from models import attention
from models.causal_lm import loss_sum
from models.family import CAUSAL, FUSED, VARLEN, Family, unwrapped_name
from models.registry import FAMILIES, build_on_meta, read_config
from monitoring.layer_memory import layer_widths
from monitoring.tracking import NoTracker
from options.errors import DONE, describe
from tests.helpers.adapters import args_for, build_peft_model
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.distributed import RankPool
from tests.helpers.packing import (
    LENGTHS,
    kernel_by_definition,
    loss_and_gradients,
    packed_batch,
    padded_batch,
    seven_rows,
)
from tests.helpers.parity import arguments
from tests.helpers.runs import dense_tensors, set_up, train_run, trained_tensors, transformers_model
from tools.families.calls import IDS, first_difference, is_close, largest_difference, record_calls
from tools.families.draft import family_from_source

LOSS, GRADIENT = 1e-5, 1e-4  # relative tolerances; of gradients, to the largest element of a tensor
# By the first update of new layers, relative to the logits. Zeros before a norm lead to more than 0.1.
SMALL_CHANGE = 0.05
# The tolerance of tensors after five steps of AdamW at 1e-3. Where a gradient is rounding noise, so is the
# update.
AFTER_STEPS = 1e-4


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        source: text of the family's file.
        family: what it defines.
        model_type: its name in FAMILIES.
        folder: the tiny model.
        data: a file of rows in Alpaca's format.
        rank_info: this process as the only rank.
    """

    source: str
    family: Family
    model_type: str
    folder: Path
    data: Path
    rank_info: RankInfo

    def arguments(self, train_type: str, *more: str) -> list[str]:
        """Return the arguments of a run of this model."""
        return [str(a) for a in args_for(self.folder, self.data, train_type, "--precision", "fp32", *more)]


def run_checks(subject: Subject) -> Iterator[tuple[str, str | None]]:
    """Yield (name of a comparison, what differs or None), in the order of CHECKS."""
    for name, check in CHECKS.items():
        try:
            yield name, check(subject)
        except Exception as e:  # whatever a wrong name or setting leads to is what the user wants to know
            yield name, describe(e)


def check_forward(subject: Subject) -> str | None:
    """Compare logits and loss of the model with transformers' own, and name the first module that differs."""
    _, model = set_up(subject.rank_info, subject.arguments("full"), random_adapters=False)
    theirs = load_transformers_model(
        subject.folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    logits, expected = record_calls(model.eval())[1], record_calls(theirs)[1]
    if not is_close(logits, expected):
        first = first_difference(model, theirs)
        return f"{first or 'logits'}: the first module whose result is not transformers'"
    with torch.no_grad():
        loss = loss_sum(model, Batch(IDS, _targets())).item()
    return _compare_losses("loss", loss, _cross_entropy(expected).item())


def _targets() -> Tensor:
    targets = IDS.roll(-1, 1)
    targets[:, -1] = IGNORE
    return targets


def _cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), _targets().flatten(), ignore_index=IGNORE, reduction="sum")


def _compare_losses(name: str, ours: float, theirs: float) -> str | None:
    return f"{name} {ours:.6f} instead of {theirs:.6f}" if abs(ours / theirs - 1) > LOSS else None


def check_adapters(train_type: str) -> Callable[[Subject], str | None]:
    """Return the comparison of a train type's logits and gradients with PEFT's, on dequantized weights."""

    def check(subject: Subject) -> str | None:
        _, model = set_up(subject.rank_info, subject.arguments(train_type))
        model.eval()
        state, adapters = dense_tensors(model), trained_tensors(model)
        uses_dora = any(name.endswith("magnitude_change") for name in adapters)
        peft = build_peft_model(subject.folder, state, adapters, uses_dora).eval()
        logits = peft(input_ids=IDS).logits
        if not is_close(record_calls(model)[1], logits):
            base = transformers_model(subject.folder, state)
            with torch.no_grad(), peft.disable_adapter():
                where = (
                    "adapters" if is_close(peft(input_ids=IDS).logits, base(input_ids=IDS).logits) else "base"
                )
            return f"logits with {where}: {largest_difference(record_calls(model)[1], logits)}"
        loss_sum(model, Batch(IDS, _targets())).backward()
        _cross_entropy(logits).backward()
        theirs = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.grad is not None}
        ours = {_peft_name(unwrapped_name(n)): p.grad for n, p in model.named_parameters() if p.requires_grad}
        return _compare_tensors("gradient of", ours, theirs, GRADIENT)

    return check


def _peft_name(name: str) -> str:
    """Return PEFT's name of a trained tensor of ours."""
    layer, _, last = name.rpartition(".")
    last = "lora_magnitude_vector" if last == "magnitude_change" else last
    return f"base_model.model.{layer}.{last}.weight"


def _compare_tensors(what: str, ours: dict, theirs: dict, tolerance: float) -> str | None:
    """Return a description of the tensor that differs most, relative to the largest element of each."""
    if ours.keys() != theirs.keys():
        return f"{what} {', '.join(sorted(ours.keys() ^ theirs.keys())[:3])}: only on one side"
    errors = {
        name: ((tensor - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-12)).item()
        for name, tensor in ours.items()
    }
    wrong = [name for name, error in errors.items() if not error <= tolerance]
    if not wrong:
        return None
    worst = max(wrong, key=lambda name: errors[name])
    return (
        f"{what} {worst} differs by {errors[worst]:.2g} of its largest element; {len(wrong)} tensors differ"
    )


def check_packing(subject: Subject) -> str | None:
    """Compare rows in packs, and padded, with the same rows one by one: loss and all gradients.

    Some rows are longer than the windows. Rows that see one another must change the gradients far more than
    rounding does, or the comparison would prove nothing.
    """
    _, model = set_up(subject.rank_info, subject.arguments("full"))
    own = subject.family.attention
    for dtype in (torch.float32, torch.bfloat16):  # it reads the config, as a run does
        attention.choose_attention(model.config, subject.family, dtype, True, max(LENGTHS))
    model.set_attn_implementation(own)
    expected = _learn_rows_alone(model)
    packed, padded = packed_batch(), padded_batch()
    _, leaking = loss_and_gradients(model, Batch(packed.ids, packed.targets))
    if _compare_tensors("gradient of", leaking, expected[1], 100 * GRADIENT) is None:
        return "rows that see one another do not change the gradients: this model cannot show a leak"
    ways = {"packed": (own, packed), "padded": (own, padded)}
    if own == FUSED and subject.family.passes_window:  # the tiny model has one if its config can
        ways |= {"padded, causal": (CAUSAL, padded)}
        if subject.family.passes_row_bounds:
            ways |= {"packed, variable-length kernel": (VARLEN, packed)}
    with kernel_by_definition():
        for way, (kind, batch) in ways.items():
            model.set_attn_implementation(kind)
            loss, gradients = loss_and_gradients(model, batch)
            found = _compare_losses("loss", loss, expected[0])
            found = found or _compare_tensors("gradient of", gradients, expected[1], GRADIENT)
            if found:
                return f"{way}: {found}"
    return None


def _learn_rows_alone(model: torch.nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Return (loss, {parameter: gradient}) of the rows one by one, summed."""
    loss, rows = 0.0, seven_rows()
    gradients: dict[str, Tensor] = {}
    for start, length in zip(rows.starts.tolist(), LENGTHS, strict=False):
        ids = rows.tokens[start : start + length].long()[None]
        targets = ids.roll(-1, 1).masked_fill(~rows.learned[start : start + length].roll(-1)[None], IGNORE)
        targets[:, -1] = IGNORE
        row_loss, row_gradients = loss_and_gradients(model, Batch(ids, targets))
        loss += row_loss
        gradients = {name: gradients.get(name, 0) + g for name, g in row_gradients.items()}
    return loss, gradients


def check_expansion(subject: Subject) -> str | None:
    """Compare an expanded model of Llama-Pro with its base, and the logits after a small update."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--model_name", str(subject.folder), "--output_dir", f"{folder}/out", "--new_blocks", "2"]
        errors = io.StringIO()
        with redirect_stdout(io.StringIO()), redirect_stderr(errors):
            status = block_expansion.main(argv)
        if status != DONE:
            return f"block_expansion.py: {errors.getvalue().strip()}"
        base, expanded = (
            load_transformers_model(
                path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
            for path in (subject.folder, f"{folder}/out")
        )
        before, after = (record_calls(model.eval())[1] for model in (base, expanded))
        if not torch.equal(before, after):
            return f"new layers are not the identity: the logits {largest_difference(after, before)[8:]}"
        options = "--max_steps 1 --batch_size 2 --context_length 256 --precision fp32".split()
        args = [str(a) for a in args_for(f"{folder}/out", subject.data, "llama_pro", *options)]
        job, model = set_up(subject.rank_info, args)
        sampler = make_sampler(job.config, job.rows, 0, 1)
        history = train.train(job, model, subject.rank_info, sampler, NoTracker())
        moved = record_calls(model.eval())[1]
    change = ((moved - before).norm() / before.norm()).item()
    if not 0 < change < SMALL_CHANGE:
        return (
            f"the first update changes the logits by {change:.2g} (gradient norm {history[0].grad_norm:.2g}):"
            f" between 0 and {SMALL_CHANGE} is expected; identity_init must name norms behind the outputs"
        )
    return None


def check_two_ranks(subject: Subject) -> str | None:
    """Compare five steps of QDoRA on two ranks with those on one: losses and trained tensors."""
    args = [str(a) for a in arguments(subject.folder, subject.data, "bnb_dora")]
    one = train_run(subject.rank_info, [*args, "--batch_size", "4"])
    ranks = RankPool(2)
    try:
        two = ranks(_train_with, subject.model_type, subject.source, [*args, "--batch_size", "2"])[0]
    finally:
        ranks.close()
    for step, (ours, theirs) in enumerate(zip(two[0], one[0], strict=True), 1):
        if found := _compare_losses(f"loss of step {step}", ours, theirs):
            return found
    for name, tensor in one[1].items():
        if (tensor - two[1][name]).abs().max() > AFTER_STEPS:
            return f"{name} after {len(one[0])} steps: {largest_difference(two[1][name], tensor)}"
    return None


def _train_with(rank_info: RankInfo, model_type: str, source: str, args: list[str]) -> tuple:
    """Train in a rank that does not know the family yet."""
    FAMILIES[model_type] = family_from_source(source)
    return train_run(rank_info, args)


def check_widths(subject: Subject) -> str | None:
    """Compare the widths by which memory is planned with the features of the modules."""
    config, family = read_config(subject.folder)
    model = build_on_meta(config, family)
    widths, layer = layer_widths(model, family), family.decoder_layers(model)[0]
    for name, output in zip(("result", "mlp"), family.outputs, strict=False):
        if name == "mlp" and widths.experts_per_token:
            continue
        found = layer.get_submodule(output).in_features
        if getattr(widths, name) != found:
            return f"layer_widths: {name} {getattr(widths, name)} instead of {found}"
    attention = layer.get_submodule(family.sublayers[0])
    has_norms = any("norm" in type(module).__name__.lower() for module in attention.modules())
    parts = {
        "has_head_norms": has_norms and not widths.latents,  # else they are norms of the latents
        "has_fused_qkv": _widest(layer, family, 0) > max(widths.query, widths.value),
        "has_fused_gate": not widths.experts_per_token and _widest(layer, family, 1) > widths.mlp,
    }
    for name, has_part in parts.items():
        if getattr(widths, name) != has_part:
            return f"layer_widths: {name} {getattr(widths, name)} instead of {has_part}"
    return None


def _widest(layer: torch.nn.Module, family: Family, index: int) -> int:
    """Return the largest number of output features of a sublayer's linears, without its last one."""
    inputs = [name for name in family.linears if name.startswith(f"{family.sublayers[index]}.")]
    linears = [layer.get_submodule(name) for name in inputs if not family.is_output(name)]
    return max((linear.out_features for linear in linears if isinstance(linear, torch.nn.Linear)), default=0)


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "logits and loss are transformers'": check_forward,
    "qlora: logits and gradients are PEFT's": check_adapters("qlora"),
    "bnb_dora: logits and gradients are PEFT's": check_adapters("bnb_dora"),
    "packed and padded rows are rows alone": check_packing,
    "Llama-Pro: new layers are the identity": check_expansion,
    "two ranks train what one trains": check_two_ranks,
    "widths of the memory plan": check_widths,
}
