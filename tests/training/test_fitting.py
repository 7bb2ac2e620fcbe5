"""The changes that make a run fit, compared with a search of all combinations."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from functools import cache

import pytest

from launch.gpus import GPUS
from launch.memory import GIB
from monitoring.memory_model import MemoryEstimate
from options.config import Config
from options.errors import UserError
from options.resolve import resolve
from options.train import COMMAND
from training.fitting import ORDER, Search
from training.machine import RESERVED_GIB, Machine
from training.memory_changes import SHORTER_CONTEXT
from training.planned_model import open_planned_model
from training.planner import Estimator, resolve_on

LORA = "--model_name 1b --train_type lora --batch_size 4 --lora_rank 16"


open_model = cache(open_planned_model)


def search_on(options: str, peak_gib: float, gpus: int = 2, tokens: int = 1024) -> Search:
    """Return the search for a machine whose GPUs have room for a peak of `peak_gib`."""
    given = COMMAND.read(options.split())
    planned = open_model(given["model_name"])
    machine = Machine(GPUS["4090"], gpus, peak_gib + RESERVED_GIB)

    def resolve_with(machine: Machine, options: dict) -> Config:
        return resolve_on(machine, resolve(given | options)[0], planned)

    return Search(machine, tokens, False, resolve_with, Estimator(planned, machine.gpu))


def peak_of(search: Search, options: dict) -> float:
    """Return the peak in GiB with these options."""
    config = search.resolve(search.machine, options)
    return search.estimate(config, options.get("context_length", search.tokens)).peak / GIB


@pytest.fixture(scope="module")
def combinations() -> dict[tuple[int, ...], float]:
    """{positions in ORDER: peak} of all combinations of possible changes, each as strong as it can be."""
    search = search_on(LORA, 1.0)
    possible = [i for i, change in enumerate(ORDER) if search._apply([change])]
    return {
        positions: peak_of(search, search._apply([ORDER[i] for i in positions]))
        for size in range(1, len(possible) + 1)
        for positions in itertools.combinations(possible, size)
    }


@pytest.mark.parametrize("share", [0.95, 0.6, 0.3, 0.05])
def test_proposals_are_the_cheapest_that_suffice(share, combinations):
    """share: where the GPUs' memory lies between the run with all changes (0) and as it is (1)."""
    search = search_on(LORA, 1.0)
    now, least = peak_of(search, {}), min(combinations.values())
    limit = least + share * (now - least)
    search = search_on(LORA, limit)
    proposals = search.find()
    assert proposals
    for proposal in proposals:
        assert peak_of(search, proposal.options) == proposal.estimate.peak / GIB <= limit
        assert len(proposal.costs) <= len(proposal.options)
        for name in proposal.options:  # none can be left out
            fewer = {n: v for n, v in proposal.options.items() if n != name}
            with contextlib.suppress(UserError):  # one needs the other
                assert peak_of(search, fewer) > limit or name == "gradient_accumulation_steps"
    enough = [positions for positions, peak in combinations.items() if peak <= limit]
    costliest = min(max(positions) for positions in enough)
    assert ORDER[costliest].option == list(proposals[0].costs)[-1]
    singles = {ORDER[each[0]].option for each in enough if len(each) == 1}
    assert {option for p in proposals for option in p.costs if len(p.costs) == 1} == singles
    order = [max(i for i, c in enumerate(ORDER) if c.option in p.costs) for p in proposals]
    assert order == sorted(order), "the cheapest comes first"


def test_changes_are_as_mild_as_they_can_be():
    search = search_on(LORA, 0, gpus=1)
    two_rows = peak_of(search, {"batch_size": 2, "gradient_accumulation_steps": 2})
    search = search_on(LORA, two_rows, gpus=1)
    batch = next(p.options for p in search.find() if "batch_size" in p.options)
    assert batch == {"batch_size": 2, "gradient_accumulation_steps": 2}
    options = "--model_name 1b --train_type qlora --use_activation_cpu_offload --optimizer adamw_8bit"
    search = search_on(f"{options} --use_cpu_offload", 0, gpus=1, tokens=4096)
    search = search_on(f"{options} --use_cpu_offload", peak_of(search, {"context_length": 2000}), 1, 4096)
    (proposal,) = [p for p in search.find() if "context_length" in p.options]
    assert proposal.options == {"context_length": 1920} and proposal.costs == {
        SHORTER_CONTEXT.option: SHORTER_CONTEXT.costs
    }


def test_where_nothing_suffices():
    options = "--model_name 8b --train_type full"
    search = search_on(options, 0.05, gpus=1, tokens=4096)
    strongest = search.strongest()
    assert (
        search.find() == []
        and {"use_cpu_offload", "train_type", "context_length"} <= strongest.options.keys()
    )
    needed = strongest.estimate.peak / GIB
    assert search_on(options, needed, gpus=1, tokens=4096).find(), "what is said to be needed suffices"


def on_small_host(search: Search) -> Search:
    """Return the search on a host of 10 GiB, where weights in host memory take 20."""

    def with_host(config: Config, tokens: int) -> MemoryEstimate:
        host = 20 * GIB if config.use_cpu_offload else 0
        return dataclasses.replace(search.estimate(config, tokens), host=host)

    machine = dataclasses.replace(search.machine, host_gib=10)
    return dataclasses.replace(search, machine=machine, estimate=with_host, known={})


def test_what_the_host_cannot_hold_is_not_proposed():
    search = search_on("--model_name 8b --train_type bnb_dora", 7.0, gpus=1, tokens=2048)
    assert any("use_cpu_offload" in proposal.options for proposal in search.find())
    proposals = on_small_host(search).find()
    assert proposals and not any("use_cpu_offload" in proposal.options for proposal in proposals)
    assert "use_cpu_offload" not in on_small_host(search).strongest().options


def test_the_least_number_of_gpus():
    """Compared with one number after the other; the weights stay on the GPUs."""
    options = "--model_name 8b --train_type bnb_dora"
    on_gpus = search_on(options, 1.0)._apply([change for change in ORDER if not change.on_host])
    peaks = [peak_of(search_on(options, 1.0, gpus, 512), on_gpus) for gpus in range(1, 9)]
    assert peaks == sorted(peaks, reverse=True), "more GPUs need less of each"
    for limit in (peaks[3], peaks[1] + 0.01):
        search = search_on(options, limit, gpus=1, tokens=512)
        expected = next(n for n, peak in enumerate(peaks, 1) if peak <= limit)
        assert on_small_host(search).least_gpus() == expected
    assert search_on(options, 0.01, gpus=1, tokens=512).least_gpus() == 0
