"""RUN folders of runs that never trained, and their report.html: parsed, and rendered by a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import torch

import monitoring.report
from data.batches import StepSampler
from data.row_reasons import CUT_ANSWER, LONG_PROMPT, NO_ANSWER, RowReason
from data.rows import TokenizedRows
from monitoring.run_facts import run_facts_json
from options import config as options
from options.train import parse

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """A parsed page: tags with their attributes, texts, and the JSON of the charts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.charts, self._open = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = f"{tag} {dict(attrs).get('type', '')}".strip()

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "script application/json":
            self.charts.append(json.loads(data))
        elif self._open not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def metrics(step: int, **more) -> dict:
    """Return a line of metrics.jsonl."""
    return {"step": step, "epoch": step / 10, "loss": 3.0 / step, "lr": 1e-4 * step, "grad_norm": 0.5 * step,
            "tokens": 1000, "trained_tokens": 400, "step_seconds": 0.5, "tokens_per_second": 2000.0 + step,
            "memory_allocated_gib": 1.25, "memory_reserved_gib": 1.5, **more}  # fmt: skip


def small_rows() -> TokenizedRows:
    """Return 4 rows of 3, 5, 5 and 20 tokens; the last half of each is learned."""
    lengths = torch.tensor([3, 5, 5, 20])
    learned = torch.cat([torch.arange(n) >= n / 2 for n in lengths.tolist()])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    drops = RowReason(NO_ANSWER, 4, (2, 4, 5)), RowReason(LONG_PROMPT, 3, (3, 7, 10))
    cuts = (RowReason(CUT_ANSWER, 1, (11,)),)
    numbers = torch.tensor([1, 6, 8, 11])
    return TokenizedRows(torch.ones(33, dtype=torch.int32), learned, starts, drops, cuts, numbers)


def make_run(folder: Path, steps: list[dict], *argv: str, evaluation: TokenizedRows | None = None) -> Path:
    """Write a RUN with these options and lines of metrics.jsonl, and perhaps the digest of an evaluation."""
    folder.mkdir()
    given = ["--model_name", "some/model", "--dataset", "rows.jsonl", "--output_dir", str(folder), *argv]
    (folder / "config.yaml").write_text(options.dump_yaml(parse(given)[0]))
    rows = small_rows()
    facts = run_facts_json(rows, StepSampler(rows, 2, 1, 0, 1, 0), torch.nn.Linear(3, 2), {}, evaluation)
    (folder / "run.json").write_text(facts)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    return folder


def page_of(folder: Path) -> Page:
    """Write report.html of a RUN and parse it."""
    return Page(monitoring.report.write_report(folder).read_text(encoding="utf-8"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def screenshot(page: Path, folder: Path, scheme: int) -> tuple[Path, str]:
    """Render a page; return (screenshot, document after the scripts). scheme: 0 dark, 1 light."""
    image = folder / f"{scheme}.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--hide-scrollbars", "--window-size=1000,1400",
             f"--user-data-dir={folder}/profile{scheme}", f"--blink-settings=preferredColorScheme={scheme}",
             f"--screenshot={image}", "--dump-dom"]  # fmt: skip
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], check=True, capture_output=True, timeout=60)
    return image, done.stdout.decode()
