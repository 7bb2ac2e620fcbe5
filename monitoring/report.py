"""Writes <output_dir>/report.html: called by train.py at the end of a run, and by report.py at any time.

The report shows files of the RUN: config.yaml, metrics.jsonl, run.json, and samples.jsonl if it exists.
monitoring/run_files.py reads them, monitoring/report_page.py makes the page.
"""

from __future__ import annotations

from pathlib import Path

from files.atomic_writes import write_text
from launch.program import print_error
from monitoring.report_page import render_report
from monitoring.run_files import read_run
from options.errors import UserError

PAGE = "report.html"


def write_report(folder: Path) -> Path:
    """Write the report.html of a RUN and return its path. Raises OSError, and UserError as `read_run`."""
    page = render_report(read_run(folder))
    # A file name may hold bytes that are not text; the page shows them as question marks.
    write_text(folder / PAGE, page.encode("utf-8", "replace").decode("utf-8"))
    return folder / PAGE


def run(folder: Path) -> int:
    """Write the report.html of a RUN, print its path and return the exit status: 0, or 2 after an error."""
    try:
        print(write_report(folder))
    except UserError as e:
        return print_error(e, verbose=False)
    except OSError as e:
        return print_error(UserError(f"{folder / PAGE}: cannot be written ({e.strerror})"), verbose=False)
    return 0
