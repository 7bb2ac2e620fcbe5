"""report.html as text."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from files.names import split_revision
from monitoring import report_charts as charts
from monitoring.next_commands import next_commands
from monitoring.page import MAX_PROMPTS, duration, render, short_count
from monitoring.run_files import RunFiles
from monitoring.run_summary import describe_loss, finite_points, summarize
from monitoring.sample_images import ImageEmbedder
from options.config import EMBEDDED_MODELS, Config
from options.declaration import format_value
from options.resolve import resolve

# Options that the header and the data show already.
SHOWN_ELSEWHERE = {"train_type", "model_name", "dataset", "dataset_format", "output_dir", "world_size"}


def render_report(run: RunFiles) -> str:
    """Return report.html as text."""
    config, facts = run.config, run.facts
    data = facts.get("data")
    name, _ = split_revision(config.model_name)
    loss, curves = _charts(run.steps)
    samples = _sampled_prompts(run)
    return render(
        "report.html.j2",
        title=f"{Path(name).name or name} · {config.train_type}",
        run=run,
        config=config,
        headline=_headline(run),
        loss=loss,
        is_loss_log=bool(loss) and charts.needs_log(loss[0].values),
        curves=curves,
        data=data,
        histogram=data
        and charts.histogram(
            "Length of the rows", "rows by tokens", data["length_width"], data["lengths"], height=200
        ),
        first_rows=facts.get("first_rows", []),
        samples=samples[:MAX_PROMPTS],
        hidden_prompts=len(samples) - MAX_PROMPTS,
        options=_options(config),
        defaults_of="the embedded models" if config.model_name in EMBEDDED_MODELS else config.train_type,
        commands=[(purpose, shlex.join(command)) for purpose, command in next_commands(run)],
        hardware=facts.get("hardware"),
        versions=facts.get("versions"),
    )


def _headline(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return (name, value, note) of each tile at the top of the page."""
    found = summarize(run.steps)
    first = "at no step a number" if found.first_loss is None else f"{found.first_loss:.4f} at the first step"
    tiles = [("Last loss", "not finite" if found.last_loss is None else f"{found.last_loss:.4f}", first)]
    if found.best:
        step, best = found.best
        perplexity = dict(finite_points(run.steps, "eval_perplexity")).get(step)
        note = "" if perplexity is None else f"perplexity {charts.number(perplexity)}, "
        tiles.append(("Best validation loss", f"{best:.4f}",
                      f"{note}at step {step:,}; last {describe_loss(found.last_evaluation)}"))  # fmt: skip
    elif found.last_evaluation is not None:
        tiles.append(("Best validation loss", "not finite", "at no step a number"))
    skipped = f", {found.skipped:,} skipped as NaN or infinite" * (found.skipped > 0)
    note = f"{len(run.steps):,} optimizer steps{skipped}"
    tiles.append(("Training time", duration(found.seconds), note))
    if found.speed is not None:
        tiles.append(("Speed", f"{found.speed:,.0f}", "tokens/s on all ranks, median"))
    if found.peak_gib is not None:
        predicted = (run.facts.get("memory") or {}).get("predicted_peak_gib")
        note = f"; predicted {predicted:.2f} GiB" if predicted else ""
        tiles.append(("Peak memory", f"{found.peak_gib:.2f} GiB", f"on the fullest rank{note}"))
    trained = (run.facts.get("model") or {}).get("parameters_trained")
    note = "" if trained is None else f"{trained:,} parameters trained"
    return [*tiles, ("Tokens", short_count(found.tokens), note)]


def _charts(steps: list[dict]) -> tuple[list, list]:
    """Return (the charts of the loss: linear, and log if it is positive; the charts of all else)."""
    ends = steps[0]["step"], steps[-1]["step"]
    loss, evaluations = finite_points(steps, "loss"), finite_points(steps, "eval_loss")
    validation = charts.Series("validation", evaluations, "second", has_dots=len(evaluations) <= 40)
    window = max(5, len(loss) // 50)
    if len(loss) >= 40:  # single steps scatter too much to show the trend
        mean = charts.Series(f"mean of {window} steps", charts.running_mean(loss, window))
        training = [charts.Series("each step", loss, "faint"), mean]
    else:
        training = [charts.Series("training", loss)]
    allocated, reserved = (finite_points(steps, f"memory_{kind}_gib") for kind in ("allocated", "reserved"))
    memory = [charts.Series("allocated", allocated)]
    if reserved != allocated:  # on a CPU they are the same numbers
        memory.append(charts.Series("reserved", reserved, "second"))

    def curve(name: str, column: str) -> list[charts.Series]:
        return [charts.Series(name, finite_points(steps, column))]

    others = (
        ("Learning rate", "", curve("learning rate", "lr")),
        ("Auxiliary loss of routers", "before its factor", curve("auxiliary loss", "router_aux_loss")),
        ("Gradient norm", "before clipping", curve("norm", "grad_norm")),
        ("Speed", "tokens/s, all ranks", curve("speed", "tokens_per_second")),
        ("Memory", "GiB, fullest rank", memory),
    )
    of_loss = charts.step_chart("Loss", "nats per learned token", [*training, validation], ends, height=250)
    return (
        [c for chart in of_loss for c in charts.loss_charts(chart)],
        [c for title, unit, series in others for c in charts.step_chart(title, unit, series, ends)],
    )


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt and its answers.

    Attributes:
        text: the prompt.
        reference: the row's own answer; "" if it has none.
        shown: its first sample and its last one, or only one if there is one.
        images: (label, `data:` URL or "") of each image.
    """

    text: str
    reference: str
    shown: list[dict]
    images: list[tuple[str, str]]


def _sampled_prompts(run: RunFiles) -> list[SampledPrompt]:
    """Return the prompts of samples.jsonl. Images beyond MAX_EMBEDDED_CHARS are not embedded."""
    by_prompt: dict[tuple, list[dict]] = {}
    for sample in sorted(run.samples, key=lambda s: s["step"]):
        key = sample["prompt"], *(tuple(image.values()) for image in sample["images"])
        by_prompt[key] = [*by_prompt.get(key, [])[:1], sample]
    embedder = ImageEmbedder()
    return [
        SampledPrompt(
            shown[0]["prompt"],
            shown[0]["reference"],
            shown,
            embedder.embed(run.folder, shown[0]["images"]) if i < MAX_PROMPTS else [],
        )
        for i, shown in enumerate(by_prompt.values())
    ]


def _options(config: Config) -> list[dict]:
    """Return {name, value, default, is_changed} of each option; the default is that of the train type."""
    defaults, _ = resolve({"train_type": config.train_type, "model_name": config.model_name})
    return [
        {
            "name": name,
            "value": format_value(getattr(config, name)),
            "default": format_value(getattr(defaults, name)),
            "is_changed": getattr(config, name) != getattr(defaults, name) and name not in SHOWN_ELSEWHERE,
        }
        for name in (f.name for f in dataclasses.fields(Config))
    ]
