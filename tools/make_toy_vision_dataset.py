"""Write datasets/toy_vision, small drawings with questions about their colors and shapes.

The drawings of the test split combine colors and shapes as no row of the train split does. Running the script
again gives the same rows; the bytes of the PNG files in them depend on Pillow's version.

Usage: python -m tools.make_toy_vision_dataset [FOLDER]
"""

import argparse
import base64
import json
import random
from collections.abc import Iterable
from pathlib import Path

from tools.make_toy_dataset import add_article
from tools.toy_drawings import COMBINATIONS, HELD_OUT, Drawing, draw_figure

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "datasets" / "toy_vision"
DRAWINGS = {"train": 7, "test": 4}  # of each combination
SHOWN = {"train": [pair for pair in COMBINATIONS if pair not in HELD_OUT], "test": list(HELD_OUT)}
ABOUT_COLOR = ("What color is the figure?", "Which color does it have?", "Name the color.")
ABOUT_SHAPE = ("What shape is the figure?", "Which shape does it have?", "Name the shape.")
ABOUT_BOTH = ("What is drawn here?", "What does the picture show?", "Name the color and the shape.")


def ask(rng: random.Random, drawing: Drawing) -> dict[str, str]:
    """Return {question: answer}: one about the color, one about the shape, one about both."""
    return {
        rng.choice(ABOUT_COLOR): drawing.color,
        rng.choice(ABOUT_SHAPE): drawing.shape,
        rng.choice(ABOUT_BOTH): f"{add_article(drawing.color)} {drawing.shape}",
    }


def draw_rows(rng: random.Random, combinations: Iterable[tuple[str, str]], count: int) -> list[dict]:
    """Return rows, `count` of each combination, in random order."""
    rows = []
    for color, shape in combinations:
        for _ in range(count):
            drawing = draw_figure(rng, color, shape)
            asked = ask(rng, drawing)
            image = {"bytes": base64.b64encode(drawing.png()).decode("ascii")}
            rows.append({"image": image, "questions": list(asked), "answers": list(asked.values())})
    rng.shuffle(rows)
    return rows


def main() -> None:
    """Write both splits and print their numbers of rows."""
    parser = argparse.ArgumentParser(description="Write the data set of drawings.")
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT_OUTPUT)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(DRAWINGS.items()):
        rows = draw_rows(random.Random(seed), SHOWN[split], count)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (output / f"{split}.jsonl").write_text(lines, encoding="ascii", newline="\n")
        print(f"{len(rows):5}  drawings in {output / split}.jsonl")


if __name__ == "__main__":
    main()
