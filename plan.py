"""Say what a run of train.py takes and whether it fits, before anything is rented.

    python plan.py --model_name meta-llama/Meta-Llama-3-70B --gpus 2 --gpu 4090 --context_length 4096
    python plan.py --model_name 8b --gpu t4 --train_type qlora                      the longest rows that fit

It needs no GPU and no weights. docs/plan.md explains what it prints.
"""

from __future__ import annotations

import gc
import sys

from launch.program import print_error, quiet_libraries, run_command
from options.errors import UserError
from options.plan import Request, parse


def run(request: Request) -> int:
    """Print the plan. Return 0, or 2 for an error that the user can fix."""
    from training.make_plan import make_plan  # takes seconds, so after the options are parsed
    from training.plan_report import print_plan

    quiet_libraries()
    try:
        if request.plan.probe:
            probe(request)
        else:
            print_plan(make_plan(request))
    except UserError as e:
        return print_error(e, verbose=request.config.verbose)
    return 0


def probe(request: Request) -> None:
    """Print the plan, and what two steps of it take on this machine. Raises UserError."""
    from launch.apart import RankFunction
    from training import probe  # with the packages for data, whose import takes a second
    from training.make_plan import make_plan
    from training.plan_report import print_plan

    probe.check_gpus(request.plan)
    plan = make_plan(request)
    if not request.plan.json:
        print_plan(plan)  # the steps take a minute
    has_rows = "dataset" in request.given
    try_rank = RankFunction("train", "try_rank")
    found = probe.run_probe(plan.config, plan.planned, plan.tokens, has_rows, try_rank)
    if request.plan.json:
        print_plan(plan, measured=probe.as_json(found))
    else:
        print("", *probe.describe(found, plan.estimate), sep="\n")


def main(argv: list[str]) -> int:
    """Parse the options and run the command. Return the exit status."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    # transformers imports these where they are installed, for parts that a plan does not run. With hqq come
    # torch's compiler and a second more. scikit-learn needs scipy, and PEFT accelerate: both or none.
    sys.modules.update({"hqq": None, "scipy": None, "sklearn": None})  # type: ignore[dict-item]
    sys.modules.update({"peft": None, "accelerate": None})  # type: ignore[dict-item]
    gc.disable()  # it would look through all that is imported, again and again, and find nothing to free
    sys.exit(main(sys.argv[1:]))
