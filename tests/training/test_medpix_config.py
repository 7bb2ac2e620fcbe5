"""docs/configs/medpix.yaml trains a tiny Gemma 3 on made-up images with the columns of MedPix."""

from __future__ import annotations

import json
from pathlib import Path

from options.train import parse
from tests.helpers.image_folders import write_gemma_model
from tests.helpers.images import encode_image, put_on_hub, write_image_set
from tests.helpers.runs import full_run
from training.preflight import check_run

CONFIG = Path(__file__).parents[2] / "docs" / "configs" / "medpix.yaml"
SET = "mmoukouba/MedPix-Grouped-QA"


def medpix_rows(count: int) -> list[dict]:
    """Return rows of an image with two questions each."""
    return [
        {
            "image": encode_image(30 + i, 20, color=20 * i),
            "questions": ["What condition is shown?", f"Which plane is image {i}?"],
            "answers": ["A cyst." if i % 2 else "None.", "Axial."],
        }
        for i in range(count)
    ]


def test_the_config_trains(one_rank, monkeypatch, tmp_path):
    put_on_hub(
        monkeypatch,
        tmp_path / "cache",
        SET,
        write_image_set(tmp_path / SET.partition("/")[2], {"train": medpix_rows(10)}),
    )
    model, run = write_gemma_model(tmp_path / "model"), tmp_path / "run"
    given = ["--config", CONFIG, "--model_name", model, "--output_dir", run, "--world_size", 1]
    small = "--context_length 160 --lora_rank 4 --gradient_accumulation_steps 2 --max_steps 2"
    small = f"{small} --eval_every 1 --eval_share 0.2".split()
    job = check_run(parse([str(each) for each in (*given, *small)])[0])
    assert job.config.images == "true" and job.config.packing and job.config.dataset.startswith("medpix")
    assert len(job.rows) + len(job.evaluation.rows) == 20, "each question is a row with its image"
    assert not {ref.digest for ref in job.rows.images.refs} & {
        ref.digest for ref in job.evaluation.rows.images.refs
    }
    one_rank(full_run, job)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(0 < step["loss"] < 20 for step in steps)
    assert (run / "adapter_model.safetensors").is_file()
