"""The text on which tools/pretrain_toy_vision.py pretrains models/toy_vision.

Captions compare what a drawing shows with things, and never name its color or its shape: a red circle is
"like a wheel" and "painted like a tomato". Sentences without a drawing say which color and which shape these
things have. So the base model sees what it needs and knows the words, and the fine-tuning teaches it to name
them.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tools.make_toy_dataset import add_article
from tools.toy_drawings import COMBINATIONS, SHAPES, Drawing, draw_figure

IMAGE = "<start_of_image>"  # takes the place of an image in a text
PAINTS = {
    "red": "a tomato",
    "green": "grass",
    "blue": "the sea",
    "yellow": "a lemon",
    "black": "coal",
    "purple": "a plum",
    "orange": "a carrot",
    "pink": "bubble gum",
}
FORMS = dict(zip(SHAPES, ("wheel", "box", "roof", "spark", "sword", "hoop"), strict=True))
CAPTIONS = (
    "It looks like a {size} {form}, painted like {paint}.",
    "This is formed like a {form} and painted like {paint}.",
    "Painted like {paint}, it is {size} and looks like a {form}.",
    "Somebody drew a {size} form like a {form}. The paint is like {paint}.",
)
REQUESTS = (
    "Say what it looks like.",
    "Tell me about the picture.",
    "What do you think of this drawing?",
    "Describe what you see here.",
    "Compare the figure with something.",
    "Which things is it like?",
    "Give a few words on what is drawn.",
)
COLOR_FACTS = (
    "{Paint} is {color}.",
    "The color of {paint} is {color}.",
    "I name the color of {paint}: {color}.",
)
SHAPE_FACTS = ("The shape of a {form} is {a} {shape}.", "A {form} has the shape of {a} {shape}.",
               "In a drawing the figure of a {form} is {a} {shape}.")  # fmt: skip
BOTH_FACTS = ("A {form} painted like {paint} is {a_color} {color} {shape}.",
              "For {a_color} {color} {shape}, draw a {form} like {paint}.")  # fmt: skip
# More kinds of drawings than the data set has, so that the model knows those of other people, too.
SIDES = (32, 200)  # pixels
JITTER = 40  # of each part of a color, of 255


@dataclass(frozen=True)
class Document:
    """A text, and the drawing that it shows in the place of IMAGE; None if it shows none."""

    text: str
    drawing: Drawing | None = None


def draw_any(rng: random.Random) -> Drawing:
    """Return a drawing of any color and shape, side and shade."""
    return draw_figure(rng, *rng.choice(COMBINATIONS), side=rng.randint(*SIDES), jitter=JITTER)


def write_turns(question: str, answer: str) -> str:
    """Return a question and its answer in the form of Gemma's chats."""
    return f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{answer}<end_of_turn>\n"


def write_caption(rng: random.Random, drawing: Drawing) -> str:
    """Return a sentence on what a drawing looks like."""
    return rng.choice(CAPTIONS).format(
        size="large" if drawing.is_large else "small",
        form=FORMS[drawing.shape],
        paint=PAINTS[drawing.color],
    )


def write_fact(rng: random.Random) -> str:
    """Return a sentence on the color or the shape of a thing."""
    color, shape = rng.choice(COMBINATIONS)
    paint = PAINTS[color]
    return rng.choice(rng.choice((COLOR_FACTS, SHAPE_FACTS, BOTH_FACTS))).format(
        paint=paint,
        Paint=paint[0].upper() + paint[1:],
        form=FORMS[shape],
        color=color,
        shape=shape,
        a=add_article(shape).split()[0],
        a_color=add_article(color).split()[0],
    )


def documents(seed: int) -> Iterator[Document]:
    """Yield documents without end; the same ones for the same seed. Of ten, eight show a drawing."""
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.2:
            yield Document(" ".join(write_fact(rng) for _ in range(rng.randint(1, 3))))
            continue
        drawing = draw_any(rng)
        caption = write_caption(rng, drawing)
        is_chat = rng.random() < 0.5
        text = write_turns(IMAGE + rng.choice(REQUESTS), caption) if is_chat else IMAGE + caption
        yield Document(text, drawing)
