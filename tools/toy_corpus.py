"""The text on which tools/pretrain_toy_base.py pretrains the demo's base model.

A grammar written for this project generates it: short stories, facts, conversations, numbers and notes from a
school, in whole English sentences. The facts of the demo's data (tools/make_toy_dataset.py) are among many
others. They are told in sentences, never as an instruction with its answer, so that the fine-tuning has
something to teach. The same seed gives the same text.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

from tools import make_toy_dataset as toy
from tools.make_toy_dataset import (
    Fact,
    add_article,
    apply_rule,
    pair_with_next,
    parse_facts,
    split_list,
    swap,
)

NAMES = split_list("""
    Tom, Anna, Ben, Lucy, Sam, Mia, Leo, Emma, Max, Nora, Jack, Ella, Paul, Rosa, Otto, Lily""")
GIRLS = {"Anna", "Lucy", "Mia", "Emma", "Nora", "Ella", "Rosa", "Lily"}
PLACES = split_list("park, garden, school, lake, farm, market, forest, beach, kitchen, village")
ANIMALS = split_list("dog, cat, cow, horse, sheep, pig, hen, duck, goose, bird, frog, mouse, bear, owl")
THINGS = split_list("book, hat, ball, box, apple, lemon, cherry, cup, coat, flower, stone, shoe, letter")
QUALITIES = split_list("big, small, old, new, red, blue, green, white, black, happy, clean, wet, good, quiet")
FEELINGS = split_list("happy, sad, tired, hungry, thirsty, cold, proud, sick, glad, busy")
VERBS = parse_facts("""
    found=find, saw=see, took=take, carried=carry, washed=wash, painted=paint, dropped=drop, liked=like,
    lost=lose, wanted=want, gave back=give back, looked for=look for, talked about=talk about""")
MORE_PLURALS = parse_facts("""
    cow=cows, pig=pigs, hen=hens, hat=hats, bird=birds, frog=frogs, horse=horses, duck=ducks, lion=lions,
    bear=bears, owl=owls, bee=bees, apple=apples, car=cars, ball=balls, cup=cups, coat=coats, shoe=shoes,
    flower=flowers, stone=stones, letter=letters, fox=foxes, dish=dishes, glass=glasses, wish=wishes,
    lady=ladies, city=cities, story=stories, berry=berries, puppy=puppies, wife=wives, life=lives,
    shelf=shelves, woman=women, fish=fish, deer=deer""")
MORE_OPPOSITES = parse_facts("""
    old=new, long=short, high=low, open=closed, rich=poor, loud=quiet, light=dark, hard=soft, near=far,
    early=late, first=last, left=right, strong=weak, young=old, love=hate, win=lose""")
MORE_PAST = parse_facts("""
    ask=asked, talk=talked, paint=painted, carry=carried, drop=dropped, want=wanted, find=found, lose=lost,
    come=came, know=knew, write=wrote, read=read, sing=sang, buy=bought, think=thought, bring=brought""")
MORE_CAPITALS = parse_facts("""
    Poland=Warsaw, Austria=Vienna, Portugal=Lisbon, Sweden=Stockholm, Kenya=Nairobi, Chile=Santiago,
    Canada=Ottawa, India=Delhi, Turkey=Ankara, Ireland=Dublin""")
LESSONS = split_list("""
    The note describes a task, The teacher writes an instruction, Each instruction describes one task,
    The list below is an instruction that describes a task, The answer completes the request,
    The input provides further context, A good response appropriately completes the request,
    Each picture is paired with an input that provides further context, Write a response to the letter,
    The task below is paired with a picture, An instruction is a request, A response is an answer,
    Read the instruction and then write, The context provides what the request does not say,
    Below is a list of these words, Put these words in order and write them below,
    How do we spell these words, The second task is as long as the first one, Spell the word below,
    The next task comes after these, Give the number a name, Sort the words and the numbers,
    Complete the sentence with a word, Translate the words and repeat them, Say the words again,
    Subtract and add the numbers, Add and subtract the numbers, Give a health tip,
    Name the thing and say what kind of thing it is, Write the word in uppercase and in lowercase,
    Count the numbers and name the letter, It is healthy to eat an apple, Is the number even or odd,
    What comes before and what comes after, Give the young animal a name, Repeat the sound of the animal,
    What should you do when you are sick, The capital is a city of the country""")
HEADINGS = split_list("""
    A story:, Words:, Numbers:, Animals, At school, A letter:, Notes, Today:, Instruction, Response, Input""")

WORDS = sorted({*toy.WORDS, *THINGS, *ANIMALS})
OPPOSITES = toy.OPPOSITES + MORE_OPPOSITES
MORE_DAYS, MORE_MONTHS = [*toy.DAYS, toy.DAYS[0]], [*toy.MONTHS, toy.MONTHS[0]]
DIGITS = [(str(n), name) for n, name in enumerate(toy.NUMBERS, start=1)]
REPEATED = [
    (f"{word} {toy.NUMBERS[n - 1]} times", " ".join([word] * n)) for word in toy.WORDS for n in (2, 3)
]

# Facts, what they are about, and more sentences that tell them. {0} and {1} are the parts of a fact, and {a}
# is {0} with its article.
FACTS: tuple[tuple[Sequence[Fact], str, list[str]], ...] = (
    (toy.PLURALS + MORE_PLURALS, "the plural of {0}", [
        "I see one {0} and you see two {1}.", "One {0}, many {1}."]),
    (OPPOSITES + swap(OPPOSITES), "the opposite of {0}", ["What is not {0} is {1}.", "It was {0}, not {1}."]),
    (toy.PAST_TENSES + MORE_PAST, "the past tense of {0}", ["Today they {0} and yesterday they {1}."]),
    (toy.CAPITALS + MORE_CAPITALS, "the capital of {0}", [
        "{1} is a city in {0}.", "I live in {1}, in {0}."]),
    (toy.COLORS, "the color of {0}", ["{0} is {1}.", "Paint {0} in {1}."]),
    (toy.SOUNDS, "the sound of {a}", ["The {0} says {1}.", "{1}, says the {0}."]),
    (toy.YOUNG, "the young of {a}", ["A young {0} is called a {1}.", "The {1} is with its mother, the {0}."]),
    (toy.LEGS, "the number of legs of {a}", ["The {0} has {1} legs.", "The {0} stands on {1} legs."]),
    (toy.FRENCH, "the French word for {0}", ["{1} is French and means {0}.", "In French {0} is {1}."]),
    (toy.SPANISH, "the Spanish word for {0}", ["{1} is Spanish and means {0}.", "In Spanish {0} is {1}."]),
    (toy.CATEGORIES, "the kind of {a}", ["The {0} belongs to the kind {1}.", "It is {a}, a kind of {1}."]),
    (toy.COMPLETIONS, "the word after {0}", ["{0} {1}.", "We all know it: {0} {1}."]),
    (toy.ADVICE, "the tip {0}", ["{0}, it is good to do this: {1}.", "{1}. That is good {0}."]),
    (toy.HEALTHY, "what doctors say if you {0}", ["Should you {0}? {1}, say the doctors."]),
    (pair_with_next(MORE_DAYS), "the day after {0}", ["First it is {0}, then {1}."]),
    (swap(pair_with_next(MORE_DAYS)), "the day before {0}", ["Today is {0}, and yesterday was {1}."]),
    (pair_with_next(MORE_MONTHS), "the month after {0}", ["First it is {0}, then {1}."]),
    (pair_with_next("abcdefghijklmnopqrstuvwxyz"), "the letter after {0}", ["First {0}, then {1}."]),
    (DIGITS, "the word for the number {0}", ["I have {0} apples. Yes, {1} apples."]),
    (swap(DIGITS), "the number of the word {0}", ["The word {0} means {1}."]),
    (apply_rule(WORDS, str.upper), "the word {0} in uppercase", ["The sign says {1}, and that means {0}."]),
    (swap(apply_rule(WORDS, str.upper)), "the word {0} in lowercase", ["{0} is a loud {1}."]),
    (apply_rule(WORDS, itemgetter(0)), "the first letter of {0}", ["The word {0} begins with {1}."]),
    (apply_rule(WORDS, itemgetter(-1)), "the last letter of {0}", ["The word {0} ends with {1}."]),
    (apply_rule(WORDS, " ".join), "the letters of {0}", ["The word {0} is spelled {1}."]),
    (REPEATED, "the text {0}", ["Say {0}: {1}."]),
)  # fmt: skip


def capitalize(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def tell_story(rng: random.Random) -> str:
    """Return a story of two people, a place, an animal and a thing."""
    name, friend = rng.sample(NAMES, 2)
    pronoun, possessive = ("she", "her") if name in GIRLS else ("he", "his")
    place, animal, thing = rng.choice(PLACES), rng.choice(ANIMALS), rng.choice(THINGS)
    (did, do), (did_too, _) = rng.sample(VERBS, 2)
    quality, other = rng.sample(QUALITIES, 2)
    feeling, later = rng.sample(FEELINGS, 2)
    day, month = rng.choice(toy.DAYS), rng.choice(toy.MONTHS)
    begin = rng.choice([
        f"One day {name} went to the {place} with {friend}.",
        f"On {day} {name} was in the {place}.",
        f"{name} lives near the {place}. In {month} {pronoun} went there with {friend}.",
        f"Once there was {add_article(quality)} {animal} in the {place}.",
    ])  # fmt: skip
    middle = [
        f"{name} {did} {add_article(thing)}.",
        f"There {pronoun} saw {add_article(other)} {animal}.",
        f"The {animal} was {feeling}, and {name} was {later}.",
        f"{friend} {did_too} the {quality} {thing}.",
        f'"I did not {do} the {thing}," said {friend}.',
        f'"Look at the {animal}!" said {name}. "It is {quality}."',
        f"{capitalize(pronoun)} put the {thing} in {possessive} box.",
        f"The {animal} ran to the {thing} and sat on it.",
        f"They gave the {animal} some {rng.choice(['water', 'milk', 'bread', 'fish'])}.",
    ]
    end = rng.choice([
        f"At night {name} was {later} and went to bed.",
        f"Then they all went home, and {friend} was {later}.",
        f"After that the {animal} was {name}'s friend.",
        f"{name} and {friend} will come again on {day}.",
    ])  # fmt: skip
    return " ".join([begin, *rng.sample(middle, rng.randint(2, 4)), end])


@dataclass(frozen=True)
class Item:
    """Something to know: what it is about, the answer, and sentences that tell it."""

    topic: str
    answer: str
    told: list[str]


def draw_fact(rng: random.Random) -> Item:
    """Return a fact of a random kind."""
    facts, topic, phrasings = rng.choice(FACTS)
    question, answer = rng.choice(facts)
    parts = (question, answer.removesuffix("."))
    article = add_article(question)
    told = [capitalize(phrasing.format(*parts, a=article)) for phrasing in phrasings]
    return Item(topic.format(question, a=article), parts[1], told)


def draw_sum(rng: random.Random) -> Item:
    """Return a sum or a difference."""
    a, b = rng.randint(0, 6), rng.randint(0, 6)
    if rng.random() < 0.5:
        topic = rng.choice((f"{a} plus {b}", f"the sum of {a} and {b}"))
        return Item(topic, str(a + b), [f"If you add {a} and {b} you have {a + b}."])
    topic = rng.choice((f"{a + b} minus {b}", f"the difference of {a + b} and {b}"))
    return Item(topic, str(a), [f"If you subtract {b} from {a + b} you have {a}."])


def draw_order(rng: random.Random) -> Item:
    """Return three digits or words and their order."""
    if rng.random() < 0.8:
        kind, direction, things = (
            "numbers",
            "from small to large",
            list(map(str, rng.sample(range(1, 10), 3))),
        )
    else:
        kind, direction, things = "words", "from a to z", rng.sample(toy.WORDS, 3)
    mixed, ordered = " ".join(things), " ".join(sorted(things))
    topic = rng.choice((f"the order of the {kind} {mixed}", f"the {kind} {mixed} {direction}"))
    return Item(topic, ordered, [f"In order the {kind} {mixed} are {ordered}."])


def draw_number(rng: random.Random) -> Item:
    """Return a fact on the size, the parity, the successor or the counting of numbers."""
    n, other = rng.sample(range(1, 13), 2)
    counted = " ".join(map(str, range(1, min(n, 9) + 1)))
    parity = "odd" if n % 2 else "even"
    larger = "Yes" if n > other else "No"
    return rng.choice((
        Item(f"the number after {n}", str(n + 1), [f"First {n}, then {n + 1}."]),
        Item(f"the numbers from 1 to {min(n, 9)}", counted, [f"We count to {min(n, 9)}: {counted}."]),
        Item(f"the parity of {n}", parity, [f"The number {n} is {parity}."]),
        Item(f"if {n} is larger than {other}", larger, [f"Is {other} less than {n}? {larger}."]),
        Item(f"the larger number of {n} and {other}", str(max(n, other)),
             [f"{max(n, other)} is larger than {min(n, other)}."]),
    ))  # fmt: skip


DRAWS, DRAW_WEIGHTS = (draw_fact, draw_sum, draw_order, draw_number), (70, 8, 12, 10)


def tell_items(rng: random.Random) -> str:
    """Return what somebody tells: facts and numbers, each in a sentence."""
    sentences = []
    for draw in rng.choices(DRAWS, DRAW_WEIGHTS, k=rng.randint(3, 6)):
        item = draw(rng)
        verb = " is" if item.topic.startswith("the ") else ":"
        sentences.append(rng.choice((f"{capitalize(item.topic)}{verb} {item.answer}.", *item.told)))
    return rng.choice((" ", " ", "\n")).join(sentences)


def tell_conversation(rng: random.Random) -> str:
    """Return what two people ask each other, and their answers, in sentences."""
    name, friend = rng.sample(NAMES, 2)
    sentences = []
    for draw in rng.choices(DRAWS, DRAW_WEIGHTS, k=rng.randint(2, 4)):
        item = draw(rng)
        sentences.append(rng.choice((
            f'"Do you know {item.topic}?" asked {name}. "{item.answer}," said {friend}.',
            f"{name} asked for {item.topic}. {friend} wrote: {item.answer}.",
            f"{capitalize(item.topic)}? {friend} said {item.answer}.",
            f"Tell me {item.topic}: {item.answer}.",
        )))  # fmt: skip
    return rng.choice((" ", " ", "\n")).join(sentences)


def tell_lessons(rng: random.Random) -> str:
    """Return notes from a school, in the words in which instructions are written."""
    return " ".join(f"{sentence}." for sentence in rng.sample(LESSONS, rng.randint(3, 5)))


KINDS, KIND_WEIGHTS = (tell_story, tell_items, tell_conversation, tell_lessons), (15, 35, 45, 5)


def documents(seed: int) -> Iterator[str]:
    """Yield documents without end; the same ones for the same seed. Some have a heading above their text."""
    rng = random.Random(seed)
    while True:
        text = rng.choices(KINDS, KIND_WEIGHTS)[0](rng)
        blank = rng.choice(("\n", "\n\n"))
        yield f"### {rng.choice(HEADINGS)}{blank}{text}" if rng.random() < 0.4 else text
