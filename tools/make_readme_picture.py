"""Draw docs/speed_memory.svg, the README's picture: speed against memory, this program beside its peers.

python -m tools.make_readme_picture

The figures are copied from docs/benchmarks.md, which says how each was measured; tests/test_readme.py asserts
that docs/ still has them. The background is opaque, so the picture is readable on light and on dark pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PICTURE = Path(__file__).parent.parent / "docs" / "speed_memory.svg"


@dataclass(frozen=True)
class Point:
    """One measured run.

    Attributes:
        peak_gib: the most GPU memory that torch had allocated, in GiB.
        label: text beside the point; the figures follow it.
        offset: from the point to the label's middle, in points (1/72 inch). With a negative x the label is on
            the point's left.
    """

    peak_gib: float
    tokens_per_second: int
    label: str
    offset: tuple[int, int]


@dataclass(frozen=True)
class System:
    """The runs of one program.

    Attributes:
        earlier: whether they were measured earlier, on other machines; such points are hollow.
    """

    colour: str
    points: tuple[Point, ...]
    earlier: bool = False


# docs/benchmarks.md, results of the 8B shape on one H200, 2026-11-25: QLoRA of rank 64 on all linears, 4 rows
# of 2,048 tokens. The comments name the rows.
SYSTEMS = (
    System(
        "#1a56b0",
        (
            # "qlora, `--use_cpu_offload`", machine C.
            Point(3.78, 6377, "fsdp-finetune, CPU offload\n", (10, -10)),
            # "qlora" with and without gradient checkpointing, beside TRL; ours, `--precision auto`.
            Point(9.57, 12296, "fsdp-finetune\n", (-9, 9)),
            Point(41.52, 16358, "fsdp-finetune, no gradient checkpointing\n", (-9, 5)),
        ),
    ),
    System(
        "#b3430a",
        (
            # The same work, "TRL + PEFT + Liger".
            Point(9.84, 9421, "TRL with PEFT and Liger\n", (9, -10)),
            Point(41.08, 13447, "TRL with PEFT and Liger, no gradient checkpointing\n", (-9, 5)),
        ),
    ),
    # unsloth (its own checkpointing, and none) and torchtune, measured by scripts of their own before
    # benchmarks.run existed.
    System(
        "#23703a",
        (
            Point(9.99, 11032, "unsloth ", (9, 6)),
            Point(38.2, 15680, "unsloth, no gradient checkpointing ", (-9, -4)),
        ),
        earlier=True,
    ),
    System("#7a2f8f", (Point(10.96, 10704, "torchtune ", (9, -3)),), earlier=True),
)

TITLE = "QLoRA of an 8B model on one H200: up is faster, left needs less memory"
HOLLOW = "hollow points: measured earlier, on other machines of this kind"
TICKS = (4, 8, 16, 24, 32, 48)  # GiB


def draw(path: Path) -> None:
    """Write the README's plot of tokens/s against peak GPU memory as an SVG, with its text kept as text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "readme", "font.size": 10}):
        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained", facecolor="white")
        for system in SYSTEMS:
            axes.plot(
                [point.peak_gib for point in system.points],
                [point.tokens_per_second for point in system.points],
                color=system.colour,
                marker="o",
                markersize=8,
                markerfacecolor="white" if system.earlier else system.colour,
                linestyle="",
            )
            for point in system.points:
                axes.annotate(
                    f"{point.label}{point.tokens_per_second:,} tokens/s, {point.peak_gib} GiB",
                    (point.peak_gib, point.tokens_per_second),
                    point.offset,
                    textcoords="offset points",
                    ha="right" if point.offset[0] < 0 else "left",
                    va="center",
                    color=system.colour,
                    fontsize=9,
                )
        axes.annotate(HOLLOW, (0.99, 0.03), xycoords="axes fraction", ha="right", color="#555555", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axes.minorticks_off()
        axes.set(xlim=(3.2, 52), ylim=(0, 18500), title=TITLE)
        axes.set(xlabel="peak GPU memory, GiB (log scale)", ylabel="tokens/s per GPU")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(PICTURE)
