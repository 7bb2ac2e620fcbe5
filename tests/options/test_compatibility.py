"""Commands written for fsdp_qlora run unchanged: option names, choices, data sets, a published command."""

from __future__ import annotations

from data.sources import find_recipe
from options.config import FIELDS
from options.train import parse
from tests.helpers.fsdp_qlora import CHOICES, DATASETS, FSDP_QLORA, PUBLIC_COMMAND


def test_fsdp_qloras_options_are_all_here():
    assert set(FSDP_QLORA.split()) <= FIELDS.keys()
    for name, choices in CHOICES.items():
        assert set(choices.split()) <= set(FIELDS[name].metadata["choices"])


def test_fsdp_qloras_datasets_are_all_here():
    for name in DATASETS.split():
        recipe, _ = find_recipe(name)
        assert recipe.source or recipe.fill


def test_the_published_command_runs_unchanged():
    config, remarks = parse(PUBLIC_COMMAND.split())
    assert (config.train_type, config.dataset_samples, config.batch_size) == ("bnb_dora", 130, 4)
    assert config.output_dir == "../models/Llama-3-70b-ucg-bnb-QDoRA"
    assert len(remarks) == 1 and remarks[0].startswith("--reentrant_checkpointing: non-reentrant")
