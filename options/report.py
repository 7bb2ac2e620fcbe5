"""Options of report.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from options.command_line import Command
from options.declaration import argument, option
from options.errors import UserError
from options.run_folders import check_runs

PAGE, COMPARISON = "report.html", "compare.html"


@dataclass(frozen=True)
class Options:
    """The options of report.py."""

    # fmt: off
    runs: list[Path] = argument("RUN", "the --output_dir of a run of train.py; several are compared on one"
        " page", several=True)
    out: Path | None = option(None, "Result", f"page to write; unset = {PAGE} in the RUN, or, of several"
        f" RUNs, {COMPARISON} in the current folder")
    different_data: bool = option(False, "Result", "also compare runs that were trained or evaluated on"
        " different data, which are refused otherwise: their losses mean different things")
    # fmt: on

    @property
    def page(self) -> Path:
        """The page to write."""
        return self.out or (Path(COMPARISON) if len(self.runs) > 1 else self.runs[0] / PAGE)


COMMAND = Command(
    "report.py",
    "RUN [RUN ...] [--out PAGE.html] [--different_data BOOL]",
    f"Make RUN/{PAGE} from the files of a RUN, or a page that compares several RUNs.",
    Options,
)


def parse(argv: list[str]) -> Options:
    """Return the options in `argv`. Raises UserError if they are wrong; exits 0 on --help."""
    given = COMMAND.read(argv)
    folders = check_runs([str(run) for run in given["runs"]])
    options = Options(**given | {"runs": [Path(folder) for folder in folders]})
    if options.different_data and len(folders) == 1:
        raise UserError("--different_data has no effect on a single RUN")
    page = options.page
    if page.suffix != ".html":
        raise UserError(f"--out {page}: is no name of a page; it ends with .html")
    if page.is_dir():
        raise UserError(f"--out {page}: is a folder; name a file")
    if not page.parent.is_dir():
        raise UserError(f"--out {page}: there is no folder {page.parent}")
    return options
