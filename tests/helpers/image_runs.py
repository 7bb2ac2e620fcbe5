"""Runs of tiny models on rows with images."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.image_folders import write_gemma_model, write_qwen_model
from tests.helpers.pictures import draw

SIZES = [(40, 60), (90, 30), (33, 70), (100, 100), (64, 48), (28, 28)]


def image_arguments(folder: Path, kind: str, *more: str) -> list[str]:
    """Write a tiny model and rows of 0 to 2 images; return the arguments of four steps on them."""
    model = folder / "model"
    write_gemma_model(model) if kind == "gemma3" else write_qwen_model(model, kind)
    rows = [{"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "No."}]}]
    for i, size in enumerate(SIZES):
        draw("RGB", size, seed=i).save(folder / f"{i}.png")
        names = [f"{j}.png" for j in range(max(i - 1, 0), i + 1)]
        question = [*({"type": "image"} for _ in names), {"type": "text", "text": f"What is {i}?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"Scan {i}."}]
        rows.append({"messages": messages, "images": names})
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    options = "--train_type bnb_dora --lora_rank 8 --lr 1e-3 --batch_size 2 --max_steps 4 --seed 3"
    return ["--model_name", str(model), "--dataset", str(data), *options.split(), *more]
