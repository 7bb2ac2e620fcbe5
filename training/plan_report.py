"""Prints a plan, as text or as JSON, and draws its curve."""

from __future__ import annotations

import json
from pathlib import Path

from files.config_parts import text_config
from launch.memory import GIB, format_bytes
from options.errors import UserError
from training.batch_table import BatchTable
from training.fitting import Proposal
from training.machine import CPUS_PER_RANK, RESERVED_GIB
from training.memory_changes import as_arguments
from training.plan import PLACEHOLDER, Plan
from training.plan_curve import draw_picture, draw_text

# Phases with other names in the text.
PHASE_NAMES = {"load": "after load"}
CLOSE = 0.05  # share of the peak by which the estimate may be wrong (docs/memory.md)
SHOWN_BATCHES = 8  # lines of the table; JSON has all


def print_plan(plan: Plan, measured: dict | None = None) -> None:
    """Print the plan, and write the picture of its curve. Raises UserError if it cannot be written.

    measured: what JSON has of a probe; None = there was none.
    """
    file = draw_curve(plan) if plan.curve else None
    if plan.request.plan.json:
        print(json.dumps(as_json(plan) | ({"measured": measured} if measured else {}), indent=2))
        return
    print("\n".join(describe(plan)))
    if plan.curve:
        print(f"\n{draw_text(plan.curve)}\npicture: {file}")


def draw_curve(plan: Plan) -> Path:
    """Write the picture of the curve, and return its file. Raises UserError if it cannot be written."""
    assert plan.curve is not None
    file = plan.request.plan.curve_file or Path("curve.png")
    try:
        draw_picture(plan.curve, file)
    except OSError as e:
        raise UserError(f"--curve_file {file}: {e.strerror or e}") from None
    return file


def describe(plan: Plan) -> list[str]:
    """Return the lines about a plan."""
    lines = [*_describe_run(plan), "", *_describe_memory(plan), ""]
    lines += _describe_verdict(plan)
    if plan.table:
        lines += ["", *_describe_table(plan.table)]
    lines += [line for proposal in plan.proposals for line in _describe_proposal(plan, proposal)]
    return [*lines, *list_remarks(plan)]


def _describe_run(plan: Plan) -> list[str]:
    """Return the lines about the model, the machine and the options that matter most."""
    config, model = plan.config, plan.planned.model.config
    rows = "packs" if config.packing else "rows"
    ranks = f"{config.world_size} rank{'s' * (config.world_size > 1)}, {config.sharding_strategy}"
    ranks += _describe_images(plan)
    assumption = f" ({plan.assumption})" if plan.assumption else ""
    return [
        f"model: {config.model_name}, {model.model_type}, {text_config(model).num_hidden_layers} layers",
        f"machine: {plan.machine}{assumption}",
        f"run: {config.train_type}, {config.batch_size} x {plan.tokens:,} tokens ({rows} per GPU), {ranks}",
        f"precision: {plan.precision}",
    ]


def _describe_images(plan: Plan) -> str:
    """Return what the line about the run says of images; "" without any."""
    if plan.images is None:
        return ""
    count, side = plan.images.count(plan.config, plan.tokens), plan.images.side
    each = "pack" if plan.config.packing else "row"
    return f"; {count} image{'s' * (count > 1)} of {side} x {side} pixels per {each}"


def _describe_memory(plan: Plan) -> list[str]:
    """Return the table of the phases, and the lines about host, disk and traffic."""
    lines = ["memory of the fullest GPU, in GiB:"]
    lines += [f"  {PHASE_NAMES.get(name, name):<12}{gib:8.2f}" for name, gib in plan.phases_gib().items()]
    assumption = f" (with {CPUS_PER_RANK} CPUs per rank; --cpus)" if plan.machine.cpus is None else ""
    lines += [f"host memory in all: {plan.estimate.host / GIB:.2f} GiB{assumption}"]
    return [*lines, _describe_disk(plan), _describe_traffic(plan)]


def _describe_disk(plan: Plan) -> str:
    """Return the line about what the run writes."""
    disk, config = plan.disk, plan.config
    kept = format_bytes(disk.checkpoint) + " each" if disk.checkpoints is None else None
    parts = {
        "download": format_bytes(plan.planned.download) if plan.planned.download else "",
        "quantized cache": format_bytes(disk.cache) if config.quantized_cache else "",
        "checkpoints": kept or (format_bytes(disk.checkpoints or 0) if disk.checkpoints else ""),
        "best": format_bytes(disk.best) if disk.best else "",
        "result": format_bytes(disk.result) if disk.result else "",
    }
    text = ", ".join(f"{name} {size}" for name, size in parts.items() if size)
    return f"disk: {text or 'nothing but the files of a run'}"


def _describe_traffic(plan: Plan) -> str:
    """Return the line about what a rank moves in an optimizer step."""
    traffic = plan.traffic
    between = {"weights": traffic.weights, "gradients": traffic.gradients, "vocabulary": traffic.vocabulary}
    parts = [f"{name} {format_bytes(size)}" for name, size in between.items() if size]
    host = [f"{format_bytes(traffic.to_host)} to the host"] * bool(traffic.to_host)
    host += [f"{format_bytes(traffic.to_gpu)} from the host"] * bool(traffic.to_gpu)
    return f"traffic of a rank per step: {', '.join([*parts, *host]) or 'none'}"


def _describe_verdict(plan: Plan) -> list[str]:
    """Return the lines that say whether it fits, with the command to run or how to go on."""
    machine, peak = plan.machine, plan.estimate.peak / GIB
    usable, left = machine.usable_gib, machine.usable_gib - peak
    of = f"{peak:.2f} of {usable:.2f} GiB ({machine.gib:.2f} less {RESERVED_GIB:.2f} for CUDA and NCCL)"
    if not plan.fits:
        host = plan.estimate.host / GIB
        lacks_host = machine.host_gib is not None and host > machine.host_gib
        more = f", and {host:.2f} of {machine.host_gib:.2f} GiB of host memory" if lacks_host else ""
        return [f"does not fit: {of}{more}", "what makes it fit, the cheapest in speed first:"]
    lines = [f"fits: {of}, {left:.2f} GiB are left{_describe_close(left, peak)}", f"  {plan.command()}"]
    return [_describe_longest(plan), *lines] if plan.table else lines


def _describe_close(left: float, peak: float) -> str:
    """Return the end of a line where less is left than the estimate may be wrong by. Both in GiB."""
    return "; close: the estimate is right to about 5%" if left < CLOSE * peak else ""


def _describe_longest(plan: Plan) -> str:
    """Return the line about the longest context."""
    text = f"the longest context that fits: {plan.tokens:,} tokens, with --batch_size 1"
    return f"{text}; it is the model's limit, not the memory's" if plan.is_models_limit else text


def _describe_table(table: BatchTable) -> list[str]:
    """Return the lines of the table of batches against contexts."""
    lines = ["GiB for --batch_size (down) and --context_length (across); [ ] does not fit:"]
    lines.append(" " * 6 + "".join(f"{tokens:>11,}" for tokens in table.contexts))
    shown = zip(table.batches[:SHOWN_BATCHES], table.peaks, table.fits, strict=False)
    for batch, peaks, fits in shown:
        cells = [
            f"{gib:.2f} " if is_enough else f"[{gib:.2f}]" for gib, is_enough in zip(peaks, fits, strict=True)
        ]
        lines.append(f"{batch:>6}" + "".join(f"{cell:>11}" for cell in cells))
    return lines


def _describe_proposal(plan: Plan, proposal: Proposal) -> list[str]:
    """Return the lines about changes with which the run fits."""
    peak, host = proposal.estimate.peak / GIB, proposal.estimate.host / GIB
    close = _describe_close(plan.machine.usable_gib - peak, peak)
    return [
        f"  {as_arguments(proposal.options)}: {peak:.2f} GiB, host {host:.2f} GiB{close}",
        *(f"    --{option}: {costs}" for option, costs in proposal.costs.items()),
        f"    {plan.command(proposal.options)}",
    ]


def list_remarks(plan: Plan) -> list[str]:
    """Return the lines on options and limits that the numbers do not show."""
    lines = list(plan.request.remarks)
    if first := plan.first_command():
        lines.append(f"before the run: {first}")
    if plan.is_shape:
        lines.append(
            f"{plan.planned.name} is a shape only: in place of {PLACEHOLDER}, put the folder or hub id of"
            " such a model"
        )
    if plan.planned.family.vision and plan.images is None:
        lines.append("planned for rows of text alone; --images_per_row N plans for rows with images")
    if plan.tokens > plan.planned.context_limit:
        lines.append(
            f"--context_length {plan.tokens}: the model was made for {plan.planned.context_limit:,} tokens"
        )
    if plan.not_counted:
        lines.append(
            f"what these take is not in the numbers: {' '.join(f'--{name}' for name in plan.not_counted)}"
        )
    if "dataset" in plan.without_effect:
        lines.append("--dataset: the data are not looked at; --probe reads them")
    if plan.without_effect:
        lines.append(f"without effect on memory: {' '.join(f'--{name}' for name in plan.without_effect)}")
    return lines


def as_json(plan: Plan) -> dict:
    """Return the plan as an object for programs. docs/plan.md lists its names, which stay as they are."""
    config, model, machine = plan.config, plan.planned.model.config, plan.machine
    return {
        "fits": plan.fits,
        "peak_gib": plan.estimate.peak / GIB,
        "host_gib": plan.estimate.host / GIB,
        "phases": plan.phases_gib(),
        "left_gib": machine.usable_gib - plan.estimate.peak / GIB,
        "model": {
            "name": config.model_name,
            "model_type": model.model_type,
            "layers": text_config(model).num_hidden_layers,
            "context_limit": plan.planned.context_limit,
        },
        "machine": {
            "gpu": machine.gpu.name,
            "gpus": machine.gpus,
            "gib": machine.gib,
            "usable_gib": machine.usable_gib,
            "host_gib": machine.host_gib,
            "cpus": machine.cpus,
        },
        "run": {
            "train_type": config.train_type,
            "batch_size": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "context_length": plan.tokens,
            "images": plan.images.count(plan.config, plan.tokens) if plan.images else 0,
            "world_size": config.world_size,
            "sharding_strategy": config.sharding_strategy,
            "precision": str(plan.precision),
        },
        "command": plan.command(),
        "changes": [_change_as_json(plan, each) for each in plan.proposals],
        "longest_context": _longest_as_json(plan),
        "batch_table": vars(plan.table) if plan.table else None,
        "curve": plan.curve.points if plan.curve else None,
        "disk_gib": _in_gib(plan.planned, "download")
        | _in_gib(plan.disk, "cache", "checkpoint", "checkpoints", "best", "result"),
        "traffic_gib": _in_gib(plan.traffic, "weights", "gradients", "vocabulary", "to_gpu", "to_host"),
        "without_effect": plan.without_effect,
        "remarks": list_remarks(plan),
    }


def _in_gib(sizes: object, *names: str) -> dict[str, float | None]:
    """Return {name: GiB} of attributes in bytes; None stays None: not known."""
    values = {name: getattr(sizes, name) for name in names}
    return {name: None if value is None else value / GIB for name, value in values.items()}


def _longest_as_json(plan: Plan) -> dict | None:
    """Return the longest context and what limits it; None if it was not searched, or none fits."""
    limit = "model" if plan.is_models_limit else "memory"
    return {"tokens": plan.tokens, "limited_by": limit} if plan.table else None


def _change_as_json(plan: Plan, proposal: Proposal) -> dict:
    """Return changes with which the run fits, and what it then takes."""
    return {
        "options": proposal.options,
        "costs": proposal.costs,
        "peak_gib": proposal.estimate.peak / GIB,
        "host_gib": proposal.estimate.host / GIB,
        "command": plan.command(proposal.options),
    }
