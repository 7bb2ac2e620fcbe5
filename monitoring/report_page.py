"""report.html as text: one page that asks for nothing from outside (monitoring/memory_page.py uses its frame).

Its Content-Security-Policy allows the page's own style sheet and script, by their hashes, and nothing else: were
a name in it ever not escaped, a browser would still run nothing. So there are no style attributes either. Every
text goes through `escape`.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import shlex
from collections.abc import Iterable
from html import escape
from pathlib import Path

from files.names import ADAPTER, BLOCKS, CONFIG, OPTIONS, split_revision
from launch.program import shell_command
from monitoring.report_charts import Series, bars, curves, number, running_mean
from monitoring.run_files import RunFiles
from options.config import TOY_DATASET, TOY_MODEL, TOY_PROMPT, Config
from options.declaration import format_value
from options.resolve import resolve

ASSETS = Path(__file__).parent / "report_assets"
LONGEST_TEXT = 4000  # characters of a sample that are shown
MOST_PROMPTS = 50
TOLD_ABOVE = (
    "train_type",
    "model_name",
    "dataset",
    "dataset_format",
    "output_dir",
    "world_size",
)  # not once more


def page(run: RunFiles) -> str:
    """The whole of report.html."""
    title = f"{_model_name(run.config)} · {run.config.train_type}"
    parts = (_header(run, title), _tiles(run), _curves(run), _data(run), _samples(run), _options(run.config),
             _next(run), _machine(run))  # fmt: skip
    return document(title, parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A page of these parts, of which the empty ones are left out, with its policy, style sheet and script."""
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)};"
        " base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + f"\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _model_name(config: Config) -> str:
    """The last part of a path or of a hub id, without a revision."""
    name, _ = split_revision(config.model_name)
    return Path(name).name or name


def _section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{note}{body}</section>" if body else ""


def _facts(rows: list[tuple[str, str]]) -> str:
    inner = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f'<dl class="card facts">{inner}</dl>'


def series_of(steps: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have a finite value of this name."""
    return [
        (s["step"], s[name])
        for s in steps
        if isinstance(s.get(name), int | float) and not isinstance(s[name], bool) and math.isfinite(s[name])
    ]


def duration(seconds: float) -> str:
    """42.3 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    return f"{minutes[0]} min {minutes[1]} s" if seconds < 3600 else f"{hours[0]} h {hours[1]} min"


def _header(run: RunFiles, title: str) -> str:
    config = run.config
    what = [f"model <b>{escape(config.model_name)}</b>", f"data <b>{escape(config.dataset)}</b>",
            f"in {escape(str(run.folder))}"]  # fmt: skip
    return f'<header><h1>{escape(title)}</h1><p class="about">{" · ".join(what)}</p></header>'


def _tiles(run: RunFiles) -> str:
    steps = run.steps
    losses, evaluated = series_of(steps, "loss"), series_of(steps, "eval_loss")
    seconds = sum(value for _, value in series_of(steps, "step_seconds"))
    rates = sorted(
        v for _, v in (series_of(steps[1:], "tokens_per_second") or series_of(steps, "tokens_per_second"))
    )
    memory = [v for _, v in series_of(steps, "memory_allocated_gib")]
    trained = run.facts.get("model", {}).get("parameters_trained")
    tokens = sum(value for _, value in series_of(steps, "tokens"))
    last = steps[-1]["loss"]
    tiles = [("Last loss", "not finite" if last is None else f"{last:.4f}",
              f"{losses[0][1]:.4f} at the first step" if losses else "at no step a number")]  # fmt: skip
    if evaluated:
        best = min(evaluated, key=lambda p: p[1])
        tiles.append(
            ("Validation loss", f"{evaluated[-1][1]:.4f}", f"best {best[1]:.4f} at step {best[0]:,}")
        )
    bad = max((count for _, count in series_of(steps, "bad_steps")), default=0)  # so far, at each step
    taken = f"{len(steps):,} optimizer steps" + f", {bad:,} skipped as NaN or infinite" * (bad > 0)
    tiles.append(("Training time", duration(seconds), taken))
    if rates:
        tiles.append(("Speed", f"{rates[len(rates) // 2]:,.0f}", "tokens/s on all ranks, median"))
    if memory:
        tiles.append(("Peak memory", f"{max(memory):.2f} GiB", "on the fullest rank"))
    trained = "" if trained is None else f"{trained:,} parameters trained"
    tiles.append(("Tokens", _short(tokens), trained))
    inner = "".join(
        f'<div class="card tile"><dt>{escape(n)}</dt><dd>{escape(v)}<small>{escape(s)}</small></dd></div>'
        for n, v, s in tiles
    )
    return f'<dl class="tiles">{inner}</dl>'


def _short(count: float) -> str:
    """45,210; 12.3 M; 1.2 B."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:,.0f}"


def _curves(run: RunFiles) -> str:
    steps = run.steps
    ends = steps[0]["step"], steps[-1]["step"]
    loss, evaluated = (
        series_of(steps, "loss"),
        Series("validation", series_of(steps, "eval_loss"), "second", True),
    )
    window = max(5, len(loss) // 50)
    if len(loss) >= 40:  # single steps scatter: their mean is what falls
        mean = Series(f"mean of {window} steps", running_mean(loss, window))
        series = [Series("each step", loss, "faint"), mean, evaluated]
    else:
        series = [Series("training", loss), evaluated]
    allocated, reserved = (series_of(steps, f"memory_{kind}_gib") for kind in ("allocated", "reserved"))
    memory = [Series("allocated", allocated)]
    if reserved != allocated:  # on a CPU they are one number
        memory.append(Series("reserved", reserved, "second"))
    small = [
        curves("Learning rate", "", [Series("learning rate", series_of(steps, "lr"))], ends),
        curves("Gradient norm", "before clipping", [Series("norm", series_of(steps, "grad_norm"))], ends),
        curves(
            "Speed", "tokens/s, all ranks", [Series("speed", series_of(steps, "tokens_per_second"))], ends
        ),
        curves("Memory", "GiB, fullest rank", memory, ends),
    ]
    first = curves("Loss", "nats per learned token", series, ends, height=250, zero=False)
    body = (f'<div class="first">{first}</div>' if first else "") + "".join(small)
    return _section(
        "Curves",
        f'<div class="grid">{body}</div>',
        "Over the optimizer steps. Point at a curve for its values.",
    )


def _data(run: RunFiles) -> str:
    data, config = run.facts.get("data"), run.config
    if not data:
        return _section("Data", '<p class="note">This run recorded nothing about its data.</p>')
    kept, tokens = data["rows_kept"], data["tokens"]
    rows = [
        ("Dataset", config.dataset),
        ("Format", config.dataset_format),
        ("Rows kept", f"{kept:,}"),
        ("Rows dropped", f"{data['rows_dropped']:,}" + " (nothing in them to learn)" * (data["rows_dropped"] > 0)),
        ("Rows cut", f"{data['rows_cut']:,} ({data['rows_cut'] / kept:.1%}) at {config.context_length:,} tokens"),
        ("Tokens", f"{tokens:,}"),
        ("Learned tokens", f"{data['tokens_learned']:,} ({data['tokens_learned'] / tokens:.1%})"),
        ("Length of a row", f"median {data['length_median']:,}, 95% up to {data['length_p95']:,},"
         f" longest {data['length_longest']:,} tokens"),
        ("Padding", f"{data['padding_share']:.1%} of the batches"),
        ("Steps per epoch", f"{data['steps_per_epoch']:,}"),
    ]  # fmt: skip
    if data.get("packs"):
        rows.append(("Packs", f"{data['packs']:,}"))
    histogram = bars(
        "Length of the rows", "rows by tokens", data["length_width"], data["lengths"], height=200
    )
    return _section("Data", f'<div class="grid">{histogram}{_facts(rows)}</div>')


def _samples(run: RunFiles) -> str:
    by_prompt: dict[str, list[dict]] = {}
    for sample in sorted(run.samples, key=lambda s: s["step"]):
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    cards = ""
    for prompt, samples in list(by_prompt.items())[:MOST_PROMPTS]:
        shown_ones = [samples[0], samples[-1]] if len(samples) > 1 else samples
        pair = "".join(
            f'<div class="{"after" if i else "before"}"><h4>{_when(s["step"])}</h4>{_sample_text(s["text"])}</div>'
            for i, s in enumerate(shown_ones)
        )
        cards += (
            f'<div class="card sample">{_sample_text(prompt, "prompt")}<div class="pair">{pair}</div></div>'
        )
    left = len(by_prompt) - MOST_PROMPTS
    note = f"{left:,} more prompts are in samples.jsonl." if left > 0 else ""
    return _section("Samples", cards, note)


def _when(step: int) -> str:
    return "Before training" if step == 0 else f"After step {step:,}"


def _sample_text(text: str, kind: str = "") -> str:
    cut = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
    return f'<p class="text {kind}">{escape(cut)}</p>' if cut.strip() else '<p class="text note">(empty)</p>'


def _options(config: Config) -> str:
    given = {"train_type": config.train_type, "model_name": config.model_name}
    defaults, _ = resolve(given)
    fields = [f.name for f in dataclasses.fields(Config)]
    values = {n: (getattr(config, n), getattr(defaults, n)) for n in fields}
    changed = [n for n in fields if values[n][0] != values[n][1] and n not in TOLD_ABOVE]
    rows = "".join(
        f"<tr><td><code>{escape(n)}</code></td><td>{escape(format_value(values[n][0]))}</td>"
        f"<td>{escape(format_value(values[n][1]))}</td></tr>"
        for n in changed
    )
    head = "<thead><tr><th>Option</th><th>This run</th><th>Default</th></tr></thead>"
    table = f'<div class="card scroll"><table>{head}<tbody>{rows}</tbody></table></div>' if changed else ""
    every = "".join(
        f"<tr><td><code>{escape(n)}</code></td><td>{escape(format_value(v))}</td></tr>"
        for n, (v, _) in values.items()
    )
    details = (
        '<details class="card"><summary>All options</summary><div class="scroll"><table><tbody>'
        f"{every}</tbody></table></div></details>"
    )
    of = "the demo" if config.model_name == TOY_MODEL else config.train_type
    note = f"What differs from the defaults of {escape(of)}." if changed else f"The defaults of {escape(of)}."
    return _section("Options", table + details, note)


def commands(run: RunFiles) -> list[tuple[str, list[str]]]:
    """(what for, the command) of what can follow this run, as typed where the page was made."""
    folder, config, found = str(run.folder), run.config, []
    demo = (config.model_name, config.dataset) == (TOY_MODEL, TOY_DATASET)
    asked = ["--prompt", TOY_PROMPT] if demo else []  # without one it is a conversation
    # evaluate.py takes these when it is told no other rows.
    held_out = config.eval_share or config.eval_dataset
    measured = [] if held_out else ["--dataset", config.dataset, "--samples", "200"]
    whole, part = CONFIG in run.names, not run.names.isdisjoint((ADAPTER, BLOCKS))
    for script, what, more, needs in (
        ("generate.py", "Ask the base model and the tuned one", asked, part or whole),
        ("evaluate.py", "Measure the base model and the tuned one", measured, part or whole),
        ("export.py", "Make a complete model out of the base and what was trained",
         ["--to", "merged", "--out", f"{folder}-merged"], part),
    ):  # fmt: skip
        if needs:
            found.append((what, [*shell_command(script), folder, *more]))
    if whole:
        found.append(("Serve the model (docs/serving.md)", ["transformers", "serve", folder]))
    again = ["--config", f"{folder}/{OPTIONS}", "--output_dir", f"{folder}-again"]
    found.append(("Train again with the same options", [*shell_command("train.py"), *again]))
    found.append(("Make this page again", [*shell_command("report.py"), folder]))
    return found


def _next(run: RunFiles) -> str:
    inner = "".join(
        f"<div>{escape(what)}<pre>{escape(shlex.join(command))}</pre></div>"
        for what, command in commands(run)
    )
    return _section("Next", f'<div class="card commands">{inner}</div>')


def _machine(run: RunFiles) -> str:
    hardware, versions = run.facts.get("hardware"), run.facts.get("versions")
    if not hardware or not versions:
        return ""
    each = f"{hardware['ranks']} × " if hardware["kind"] == "GPU" and hardware["ranks"] > 1 else ""
    rows = [
        (hardware["kind"], f"{each}{hardware['device']}, {number(hardware['memory_gib'])} GiB"),
        ("Ranks", f"{hardware['ranks']:,}"),
        ("Processors", f"{hardware['processors']} on the host of rank 0"),
        *versions.items(),
    ]
    return _section("Machine and versions", _facts(rows))
