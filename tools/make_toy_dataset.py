"""Write datasets/toy.jsonl, the small instruction data set of the demo.

A model of a million parameters (models/toy_base) learns it in about a minute. So rows are short, answers are
regular, and the same few hundred words recur in all tasks. Subtraction and comparison are not among the
tasks: the model gets many of them wrong. Every fact is asked in two phrasings: the model sees it more than
once per epoch, and about half of all rows carry their subject in the `input` column. Running the script again
gives the same bytes.

Usage: python tools/make_toy_dataset.py [OUTPUT]
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from itertools import pairwise, permutations
from operator import itemgetter
from pathlib import Path

Row = dict[str, str]
Fact = tuple[str, ...]  # the words that fill in a phrasing, then the answer
Phrasing = str  # a format string: "instruction", or "instruction | input"

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "datasets" / "toy.jsonl"
MIN_ROWS, MAX_INSTRUCTION_WORDS, MAX_OUTPUT_WORDS = 700, 12, 8


def split_list(text: str) -> list[str]:
    """Split a comma-separated list that may run over several lines."""
    return [" ".join(item.split()) for item in text.split(",")]


def parse_facts(text: str) -> list[Fact]:
    """Parse facts written as "question=answer, question=answer"."""
    return [tuple(item.split("=")) for item in split_list(text)]


# Word tasks share these, so that a tiny vocabulary meets each of them often.
WORDS = split_list("cat, dog, cow, hen, pig, sun, hat, red, book, tree, milk, fish, bird, frog")
DAYS = split_list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = split_list("""
    January, February, March, April, May, June, July, August, September, October, November, December""")
NUMBERS = split_list("one, two, three, four, five, six, seven, eight, nine, ten")

# Only pairs whose members have one plain opposite each: both directions are asked.
OPPOSITES = parse_facts("""
    hot=cold, big=small, up=down, day=night, good=bad, happy=sad, fast=slow, wet=dry, full=empty, in=out,
    on=off, black=white, clean=dirty""")
PLURALS = parse_facts("""
    cat=cats, dog=dogs, book=books, tree=trees, box=boxes, bus=buses, baby=babies, cherry=cherries,
    leaf=leaves, wolf=wolves, knife=knives, man=men, child=children, foot=feet, tooth=teeth, mouse=mice,
    goose=geese, sheep=sheep""")
PAST_TENSES = parse_facts("""
    walk=walked, play=played, help=helped, wash=washed, look=looked, jump=jumped, like=liked, stop=stopped,
    cry=cried, go=went, eat=ate, see=saw, run=ran, give=gave, take=took, make=made, drink=drank,
    sleep=slept, swim=swam, say=said""")
CAPITALS = parse_facts("""
    France=Paris, Spain=Madrid, Italy=Rome, Germany=Berlin, Japan=Tokyo, China=Beijing, Egypt=Cairo,
    Greece=Athens, Peru=Lima, Cuba=Havana, Norway=Oslo, Russia=Moscow""")
COLORS = parse_facts("""
    grass=green, snow=white, milk=white, blood=red, coal=black, the sun=yellow, the sky=blue,
    a lemon=yellow, a banana=yellow, a carrot=orange, a cherry=red, a leaf=green, a crow=black,
    a cloud=white""")
SOUNDS = parse_facts("""
    cow=moo, dog=woof, cat=meow, duck=quack, sheep=baa, pig=oink, horse=neigh, lion=roar, bee=buzz,
    snake=hiss, owl=hoot, hen=cluck""")
YOUNG = parse_facts("""
    dog=puppy, cat=kitten, cow=calf, horse=foal, sheep=lamb, pig=piglet, hen=chick, duck=duckling,
    goose=gosling, lion=cub, bear=cub, frog=tadpole""")
LEGS = parse_facts("""
    cow=4, dog=4, cat=4, horse=4, lion=4, hen=2, duck=2, bird=2, owl=2, bee=6, ant=6, spider=8, fish=0,
    snake=0""")
FRENCH = parse_facts("""
    cat=chat, dog=chien, house=maison, water=eau, bread=pain, milk=lait, red=rouge, blue=bleu, green=vert,
    book=livre, sun=soleil, hello=bonjour""")
SPANISH = parse_facts("""
    cat=gato, dog=perro, house=casa, water=agua, bread=pan, milk=leche, red=rojo, blue=azul, green=verde,
    book=libro, sun=sol, hello=hola""")
CATEGORIES = parse_facts("""
    apple=fruit, banana=fruit, lemon=fruit, cherry=fruit, pear=fruit, cat=animal, cow=animal, horse=animal,
    lion=animal, frog=animal, car=vehicle, bus=vehicle, train=vehicle, truck=vehicle""")
COMPLETIONS = parse_facts("""
    Fish live in=water, We read a=book, We sleep in a=bed, We see with our=eyes, Bees make=honey,
    We hear with our=ears, Cows give us=milk, Hens lay=eggs, Birds fly in the=sky, Fire is very=hot,
    Ice is very=cold, We smell with our=nose, We walk with our=feet, We cut bread with a=knife,
    We wash our hands with=soap, A week has seven=days, We sleep at=night, We bite with our=teeth""")
ADVICE = parse_facts("""
    before eating=Wash your hands., after using the toilet=Wash your hands.,
    before cooking=Wash your hands., when you cough=Cover your mouth., when you sneeze=Cover your mouth.,
    before going to bed=Brush your teeth., after breakfast=Brush your teeth.,
    when you are thirsty=Drink some water., when you are hot=Drink some water.,
    when you are tired=Get some sleep., when you ride a bike=Wear a helmet.,
    when you sit in a car=Wear a seat belt., before crossing the road=Look both ways.,
    when you feel very sick=See a doctor., when your tooth hurts=See a dentist.,
    when it is cold outside=Wear a warm coat.""")
HEALTHY = parse_facts("""
    eat fruit=Yes, drink water=Yes, walk every day=Yes, sleep at night=Yes, wash your hands=Yes,
    brush your teeth=Yes, smoke=No, sit all day=No, eat only candy=No, never sleep=No,
    drink dirty water=No, never wash your hands=No""")
# The digits of TOY_PROMPT in options/config.py: no row sorts them, so the demo ends with a new question.
HELD_OUT_DIGITS = set("478")
WORD_LISTS = split_list("""
    dog cat hen, hen dog cat, cat hen dog, cow cat dog, pig cow hen, hen pig cow, bird frog fish,
    frog fish bird, fish bird frog, red book hat, tree milk sun, sun tree milk""")


def pair_with_next(names: Iterable[str]) -> list[Fact]:
    """Make facts that pair each name with the one after it."""
    return list(pairwise(names))


def apply_rule(words: Iterable[str], rule: Callable[[str], str]) -> list[Fact]:
    """Make facts that pair each word with the rule's result for it."""
    return [(word, rule(word)) for word in words]


def sort_words(text: str) -> str:
    """Sort the words or digits of the text in ascending order."""
    return " ".join(sorted(text.split()))


def mix(items: Iterable[str]) -> list[str]:
    """Return the items in the order of their hashes: mixed, but always the same."""
    return sorted(items, key=lambda item: hashlib.sha256(item.encode()).digest())


def pick_number_lists(count: int) -> list[str]:
    """Return lists of three digits, "4 1 6", of all possible orders. None has HELD_OUT_DIGITS."""
    lists = (" ".join(digits) for digits in permutations("123456789", 3) if set(digits) != HELD_OUT_DIGITS)
    return mix(lists)[:count]


def swap(facts: Iterable[Fact]) -> list[Fact]:
    """Swap question and answer of two-part facts."""
    return [(answer, question) for question, answer in facts]


def add_article(noun: str) -> str:
    """Put "a" or "an" before the noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def make_rows(facts: Iterable[Fact], *phrasings: Phrasing) -> list[Row]:
    """Make two rows for each fact, cycling through the phrasings so that all are used equally often.

    In a phrasing {0}, {1} are the words of the fact, and {a} is the first of them with its article.
    """
    rows = []
    for i, (*words, answer) in enumerate(facts):
        for j in (i, i + 1):
            text = phrasings[j % len(phrasings)].format(*words, a=add_article(words[0]))
            instruction, _, given = text.partition(" | ")
            rows.append({"instruction": instruction, "input": given, "output": answer})
    return rows


def word_tasks() -> dict[str, list[Row]]:
    """Return {task: rows} of tasks on single words: meaning, form, letters."""
    capitals = apply_rule(WORDS, str.upper)
    first, last = apply_rule(WORDS, itemgetter(0)), apply_rule(WORDS, itemgetter(-1))
    spelled = apply_rule(WORDS, " ".join)
    repeated = [(word, NUMBERS[n - 1], " ".join([word] * n)) for word in WORDS[:6] for n in (2, 3)]
    ordered = apply_rule(WORD_LISTS, sort_words)
    both_ways = OPPOSITES + swap(OPPOSITES)
    return {
        "opposite": make_rows(
            both_ways, "What is the opposite of {0}?", "Give the opposite of the word. | {0}"
        ),
        "plural": make_rows(PLURALS, "What is the plural of {0}?", "Give the plural of the word. | {0}"),
        "past tense": make_rows(PAST_TENSES, "What is the past tense of {0}?", "Give the past tense. | {0}"),
        "uppercase": make_rows(capitals, "Write {0} in uppercase.", "Write the word in uppercase. | {0}"),
        "lowercase": make_rows(
            swap(capitals), "Write {0} in lowercase.", "Write the word in lowercase. | {0}"
        ),
        "first letter": make_rows(first, "What is the first letter of {0}?", "Give the first letter. | {0}"),
        "last letter": make_rows(last, "What is the last letter of {0}?", "Give the last letter. | {0}"),
        "spelling": make_rows(
            spelled, "Spell the word. | {0}", "How do you spell {0}?", "Spell the word {0}."
        ),
        "repeat": make_rows(repeated, "Say {0} {1} times.", "Repeat the word {1} times. | {0}"),
        "sort words": make_rows(
            ordered, "Sort the words from a to z. | {0}", "Put these words in order: {0}"
        ),
        "French": make_rows(FRENCH, "Translate the word to French. | {0}", "What is {0} in French?"),
        "Spanish": make_rows(SPANISH, "Translate the word to Spanish. | {0}", "What is {0} in Spanish?"),
    }


def number_tasks() -> dict[str, list[Row]]:
    """Return {task: rows} of tasks on small numbers and on things in a fixed order."""
    small = range(1, 5)
    sums = [(str(a), str(b), str(a + b)) for a in small for b in small]
    parities = [(str(n), "odd" if n % 2 else "even") for n in range(1, 11)]
    ordered = apply_rule(pick_number_lists(40), sort_words)
    counts = [(str(n), " ".join(map(str, range(1, n + 1)))) for n in range(2, 9)]
    digits = [(str(n), name) for n, name in enumerate(NUMBERS, start=1)]
    after_number = pair_with_next(map(str, range(1, 13)))
    after_letter = pair_with_next("abcdefghij")
    after_day, after_month = pair_with_next([*DAYS, DAYS[0]]), pair_with_next([*MONTHS, MONTHS[0]])
    return {
        "sum": make_rows(sums, "What is {0} plus {1}?", "Add the numbers. | {0} {1}"),
        "even or odd": make_rows(parities, "Is {0} even or odd?", "Is the number even or odd? | {0}"),
        "sort numbers": make_rows(
            ordered, "Sort from small to large. | {0}", "Put these numbers in order: {0}"
        ),
        "count up": make_rows(counts, "Count to {0}.", "Count from 1 to the number. | {0}"),
        "number to word": make_rows(digits, "Write the number as a word. | {0}", "Write {0} as a word."),
        "word to number": make_rows(
            swap(digits), "Write the word as a number. | {0}", "Write {0} as a number."
        ),
        "next number": make_rows(after_number, "What number comes after {0}?", "Give the next number. | {0}"),
        "next letter": make_rows(after_letter, "What letter comes after {0}?", "Give the next letter. | {0}"),
        "next day": make_rows(after_day, "What day comes after {0}?", "Give the next day. | {0}"),
        "day before": make_rows(swap(after_day), "What day comes before {0}?", "Give the day before. | {0}"),
        "next month": make_rows(after_month, "What month comes after {0}?", "Give the next month. | {0}"),
    }


def world_tasks() -> dict[str, list[Row]]:
    """Return {task: rows} of tasks on properties of things and on health."""
    # "Is an apple a fruit or an animal?": the wrong choice alternates between the two other categories, and
    # so does the order of the choices; otherwise "the first one" would always be right.
    choices = []
    for i, (thing, kind) in enumerate(CATEGORIES):
        other = [name for name in ("fruit", "animal", "vehicle") if name != kind][i % 2]
        first, second = (kind, other) if i // 2 % 2 else (other, kind)
        choices.append((thing, add_article(first), add_article(second), kind))
    return {
        "capital": make_rows(
            CAPITALS, "What is the capital of {0}?", "Name the capital of the country. | {0}"
        ),
        "color": make_rows(COLORS, "What color is {0}?", "Name the color of the thing. | {0}"),
        "animal sound": make_rows(
            SOUNDS, "What sound does {a} make?", "Give the sound of the animal. | {0}", "What does {a} say?"
        ),
        "young animal": make_rows(
            YOUNG, "What is the young of {a} called?", "Name the young of the animal. | {0}"
        ),
        "legs": make_rows(LEGS, "How many legs does {a} have?", "Give the number of legs. | {0}"),
        "category": make_rows(choices, "Is {a} {1} or {2}?", "What kind of thing is this? | {0}"),
        "completion": make_rows(COMPLETIONS, "Complete the sentence. | {0}", "What word comes next? {0}"),
        "advice": make_rows(ADVICE, "What should you do {0}?", "Give a health tip. | {0}"),
        "healthy": make_rows(HEALTHY, "Is it healthy to {0}?", "Is this healthy? | {0}"),
    }


def check_rows(rows: list[Row]) -> None:
    """Raise ValueError if a question repeats, a text is not plain, too long or empty, or rows are too few."""
    seen = set()
    for row in rows:
        question = (row["instruction"], row["input"])
        if question in seen:
            raise ValueError(f"asked twice: {question}")
        seen.add(question)
        words = len(row["instruction"].split())
        if words > MAX_INSTRUCTION_WORDS or not 1 <= len(row["output"].split()) <= MAX_OUTPUT_WORDS:
            raise ValueError(f"too long, or empty: {row}")
        if not all(text.isascii() and text == text.strip() for text in row.values()):
            raise ValueError(f"not plain trimmed ASCII: {row}")
    if len(rows) < MIN_ROWS:
        raise ValueError(f"only {len(rows)} rows, {MIN_ROWS} wanted")


def main() -> None:
    """Write the rows in a fixed shuffled order and print the number of rows of each task."""
    parser = argparse.ArgumentParser(description="Write the toy instruction data set.")
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT_OUTPUT)
    output = parser.parse_args().output

    tasks = word_tasks() | number_tasks() | world_tasks()
    rows = [row for task in tasks.values() for row in task]
    check_rows(rows)
    lines = mix(map(json.dumps, rows))  # no random generator: the order depends on nothing but the rows
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(line + "\n" for line in lines), encoding="ascii", newline="\n")

    for name, task in tasks.items():
        print(f"{len(task):5}  {name}")
    print(f"{len(rows):5}  rows in {len(tasks)} tasks, written to {output}")


if __name__ == "__main__":
    main()
