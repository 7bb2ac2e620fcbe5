"""Options that decide the rows of an optimizer step: those of a --config file that typed ones displace.

E = --effective_batch_size, B = --batch_size, A = --gradient_accumulation_steps: E = B x A x processes.
"""

from __future__ import annotations

from collections.abc import Set

E, B, A = "effective_batch_size", "batch_size", "gradient_accumulation_steps"


def displaced_options(in_file: Set[str], typed: Set[str], is_run: bool) -> Set[str]:
    """Return the options of a --config file that follow from the others, and so are not read.

    config.yaml of a run with E records all three. They agree only for its number of processes, and until one
    of them is typed.

    Args:
        in_file: names of the options in the file.
        typed: names of those on the command line, which win.
        is_run: whether the file is the config.yaml of a RUN; three numbers of any other file must agree.
    """
    given = in_file | typed
    if not {E, B, A} <= given or not (is_run or typed & {E, B, A, "world_size"}):
        return set()
    if {B, A} <= typed:
        return {E} - typed
    return {B if A in typed else A} & in_file
