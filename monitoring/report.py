"""Writes the page about a run, <output_dir>/report.html: train.py at the end of a run, report.py again.

All that it shows is in the RUN: config.yaml, metrics.jsonl, samples.jsonl where there is one, and run.json.
monitoring/run_files.py reads them, monitoring/report_page.py makes the page.
"""

from __future__ import annotations

from pathlib import Path

from files.atomic_writes import write_text
from launch.program import print_error
from monitoring.report_page import page
from monitoring.run_files import read_run
from options.errors import UserError

PAGE = "report.html"


def write_report(folder: Path) -> Path:
    """Makes folder/report.html. Raises UserError as `read_run` does."""
    run = read_run(folder)
    # A name may hold bytes that are no text; in the page they are question marks.
    text = page(run).encode("utf-8", "replace").decode("utf-8")
    write_text(folder / PAGE, text)
    return folder / PAGE


def run(folder: Path) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right."""
    try:
        print(write_report(folder))
    except UserError as e:
        return print_error(e, verbose=False)
    except OSError as e:
        return print_error(UserError(f"{folder / PAGE}: cannot be written ({e.strerror})"), verbose=False)
    return 0
