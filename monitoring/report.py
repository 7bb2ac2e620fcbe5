"""Writes report.html of a RUN, or compare.html of several: pages for a browser.

train.py writes report.html at the end of a run, report.py both at any time. The pages show files of the RUNs:
config.yaml, metrics.jsonl, run.json, and samples.jsonl if it exists. monitoring/run_files.py reads them,
monitoring/report_page.py and monitoring/compare_page.py make the pages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from files.atomic_writes import write_text
from launch.program import print_error
from monitoring.compare_page import render_comparison
from monitoring.comparison import check_same_data, compare, describe_data_differences
from monitoring.report_page import render_report
from monitoring.run_files import read_run
from options.errors import UserError
from options.report import PAGE, Options


def write_report(folder: Path, page: Path | None = None) -> Path:
    """Write the report of a RUN and return its path. Raises OSError, and UserError as `read_run`.

    page: the path to write to; None = report.html in the RUN.
    """
    return _write(page or folder / PAGE, render_report(read_run(folder)))


def write_comparison(folders: Sequence[Path], page: Path, allow_different_data: bool = False) -> list[str]:
    """Write a page that compares RUNs. Return lines about data that are not the same in all of them.

    Raises OSError, and UserError as `read_run`, and for runs of different data unless these are allowed.
    """
    runs = compare([read_run(folder) for folder in folders])
    if not allow_different_data:
        check_same_data(runs)
    _write(page, render_comparison(runs, page))
    return describe_data_differences(runs)


def _write(page: Path, text: str) -> Path:
    """Write a page and return its path."""
    # A file name may hold bytes that are not text; the page shows them as question marks.
    write_text(page, text.encode("utf-8", "replace").decode("utf-8"))
    return page


def run(options: Options) -> int:
    """Write the page, print its path and return the exit status: 0, or 2 after an error."""
    try:
        if len(options.runs) == 1:
            write_report(options.runs[0], options.page)
        else:
            for line in write_comparison(options.runs, options.page, options.different_data):
                print(line, file=sys.stderr)  # stdout has the page's path alone
        print(options.page)
    except UserError as e:
        return print_error(e, verbose=False)
    except OSError as e:
        return print_error(UserError(f"{options.page}: cannot be written ({e.strerror})"), verbose=False)
    return 0
