"""Drawings of one figure each, of a color and a shape.

models/toy_vision is pretrained on such drawings, and datasets/toy_vision asks about them.
"""

import io
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 30, 36),
    "green": (30, 150, 50),
    "blue": (35, 70, 210),
    "yellow": (240, 210, 20),
    "black": (25, 25, 25),
    "purple": (125, 40, 160),
    "orange": (245, 130, 20),
    "pink": (245, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COMBINATIONS = tuple((color, shape) for color in COLORS for shape in SHAPES)
# No row to train on shows these. Each color and each shape has some, and all are in other combinations, too.
HELD_OUT = tuple(
    (color, shape) for i, color in enumerate(COLORS) for j, shape in enumerate(SHAPES) if (i + j) % 4 == 0
)
GROUNDS = ((255, 255, 255), (250, 245, 225), (225, 225, 225), (215, 235, 245))
SIDE = 64  # pixels
JITTER = 12  # of each part of a color, of 255, in the data set
# Corners of the shapes with straight edges: (degrees, distance from the center relative to the radius).
CORNERS = {
    "square": [(45 + 90 * i, 1.0) for i in range(4)],
    "triangle": [(-90 + 120 * i, 1.0) for i in range(3)],
    "star": [(-90 + 36 * i, 0.42 if i % 2 else 1.0) for i in range(10)],
    "cross": [(90 * i + turn, far) for i in range(4) for turn, far in ((-17, 1.0), (17, 1.0), (45, 0.41))],
}


@dataclass(frozen=True)
class Drawing:
    """A drawing, and what it shows. is_large: whether the figure is one of the larger ones."""

    image: Image.Image
    color: str
    shape: str
    is_large: bool

    def png(self) -> bytes:
        """Return the drawing as a PNG file."""
        file = io.BytesIO()
        self.image.save(file, "PNG", optimize=True)
        return file.getvalue()


def draw_figure(
    rng: random.Random, color: str, shape: str, side: int = SIDE, jitter: int = JITTER
) -> Drawing:
    """Return a figure of random size, place, angle and shade on a light ground.

    It is near the middle, so that a small model soon learns the shapes.

    Args:
        rng: where the random numbers come from.
        color, shape: one of COLORS, one of SHAPES.
        side: width and height of the drawing, in pixels.
        jitter: how far each part of the color may be from that of COLORS, of 255.
    """
    radius = rng.uniform(0.26, 0.42) * side
    center = [rng.uniform(0.44, 0.56) * side for _ in range(2)]
    shade = [min(max(part + rng.randint(-jitter, jitter), 0), 255) for part in COLORS[color]]
    image = Image.new("P", (side, side), 0)
    image.putpalette([*rng.choice(GROUNDS), *shade])
    canvas = ImageDraw.Draw(image)
    angle = rng.uniform(-12, 12)
    if shape in CORNERS:
        canvas.polygon([_place(center, radius, angle + turn, far) for turn, far in CORNERS[shape]], fill=1)
    else:
        canvas.circle(center, radius, fill=1)
    if shape == "ring":
        canvas.circle(center, 0.55 * radius, fill=0)
    return Drawing(image, color, shape, radius > 0.34 * side)


def _place(center: list[float], radius: float, degrees: float, far: float) -> tuple[float, float]:
    """Return the position of a corner, in pixels."""
    x, y = center
    turn = math.radians(degrees)
    return x + far * radius * math.cos(turn), y + far * radius * math.sin(turn)
