"""report.html as text, and `render`, which fills in the templates of report.html and memory.html.

A page requests nothing from outside. Its Content-Security-Policy allows its own style sheet and script, by
their hashes, and nothing else: a browser would not even run a name that was not escaped. So there are no
style attributes. The templates escape every value.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from files.names import split_revision
from monitoring import report_charts as charts
from monitoring.next_commands import next_commands
from monitoring.run_files import RunFiles
from monitoring.sample_images import embed_copy
from options.config import EMBEDDED_MODELS, Config
from options.declaration import format_value
from options.resolve import resolve

MAX_PROMPTS = 50
MAX_IMAGE_CHARS = 2**21  # of all images that a page embeds
# Options that the header and the data show already.
SHOWN_ELSEWHERE = {"train_type", "model_name", "dataset", "dataset_format", "output_dir", "world_size"}

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
TEMPLATES = Environment(loader=FileSystemLoader(TEMPLATE_FOLDER), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)  # fmt: skip
TEMPLATES.filters |= {"count": "{:,}".format, "number": charts.number, "percent": "{:.1%}".format,
                      "short_duration": charts.short_duration}  # fmt: skip
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}


def duration(seconds: float) -> str:
    """Format a duration: 42.3 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    return f"{minutes[0]} min {minutes[1]} s" if seconds < 3600 else f"{hours[0]} h {hours[1]} min"


def short_count(count: float) -> str:
    """Format a count: 45,210; 12.3 M; 1.2 B."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:,.0f}"


def render(template: str, **values) -> str:
    """Fill in a template with `values`, the style sheet, the script and the Content-Security-Policy."""
    style, script = ((TEMPLATE_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_source_hash(style)}; script-src {_source_hash(script)};"
        " img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
    return TEMPLATES.get_template(template).render(
        policy=policy, style=Markup(style), script=Markup(script), **values
    )


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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


def finite_points(steps: list[dict], name: str) -> charts.Points:
    """Return (step, value) of each line of metrics.jsonl in which the field `name` is a finite number."""
    return [
        (s["step"], s[name])
        for s in steps
        if isinstance(s.get(name), int | float) and not isinstance(s[name], bool) and math.isfinite(s[name])
    ]


def _headline(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return (name, value, note) of each tile at the top of the page."""
    steps = run.steps
    losses, evaluations = finite_points(steps, "loss"), finite_points(steps, "eval_loss")
    last = steps[-1]["loss"]
    tiles = [("Last loss", "not finite" if last is None else f"{last:.4f}",
              f"{losses[0][1]:.4f} at the first step" if losses else "at no step a number")]  # fmt: skip
    if evaluations:
        step, best = min(evaluations, key=lambda point: point[1])
        perplexity = dict(finite_points(steps, "eval_perplexity")).get(step)
        note = "" if perplexity is None else f"perplexity {charts.number(perplexity)}, "
        tiles.append(("Best validation loss", f"{best:.4f}",
                      f"{note}at step {step:,}; last {evaluations[-1][1]:.4f}"))  # fmt: skip
    skipped = max((count for _, count in finite_points(steps, "bad_steps")), default=0)  # a running total
    note = f"{len(steps):,} optimizer steps" + f", {skipped:,} skipped as NaN or infinite" * (skipped > 0)
    tiles.append(("Training time", duration(sum(v for _, v in finite_points(steps, "step_seconds"))), note))
    # The first step warms up.
    rates = finite_points(steps[1:], "tokens_per_second") or finite_points(steps, "tokens_per_second")
    if rates:
        median = sorted(v for _, v in rates)[len(rates) // 2]
        tiles.append(("Speed", f"{median:,.0f}", "tokens/s on all ranks, median"))
    if memory := [v for _, v in finite_points(steps, "memory_allocated_gib")]:
        predicted = (run.facts.get("memory") or {}).get("predicted_peak_gib")
        note = f"; predicted {predicted:.2f} GiB" if predicted else ""
        tiles.append(("Peak memory", f"{max(memory):.2f} GiB", f"on the fullest rank{note}"))
    trained = (run.facts.get("model") or {}).get("parameters_trained")
    note = "" if trained is None else f"{trained:,} parameters trained"
    return [*tiles, ("Tokens", short_count(sum(v for _, v in finite_points(steps, "tokens"))), note)]


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
    """Return the prompts of samples.jsonl. Images beyond MAX_IMAGE_CHARS are not embedded."""
    by_prompt: dict[tuple, list[dict]] = {}
    for sample in sorted(run.samples, key=lambda s: s["step"]):
        key = sample["prompt"], *(tuple(image.values()) for image in sample["images"])
        by_prompt[key] = [*by_prompt.get(key, [])[:1], sample]
    prompts, left = list[SampledPrompt](), MAX_IMAGE_CHARS
    for shown in by_prompt.values():
        images = []
        for image in shown[0]["images"] if len(prompts) < MAX_PROMPTS else ():
            url = embed_copy(run.folder, image.get("copy", ""))
            images.append((image["label"], url if len(url) <= left else ""))
            left -= len(images[-1][1])
        prompts.append(SampledPrompt(shown[0]["prompt"], shown[0]["reference"], shown, images))
    return prompts


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
