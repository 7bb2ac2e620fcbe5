"""Scores of answers against references in any script: exact match, BLEU and ROUGE."""

from __future__ import annotations

import importlib.metadata
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

# Scripts without spaces between words: the first word of their characters' Unicode names.
HAN = ("CJK", "IDEOGRAPHIC")
SPACELESS = (*HAN, "HIRAGANA", "KATAKANA", "BOPOMOFO", "HALFWIDTH", "THAI", "LAO", "KHMER",
             "MYANMAR", "TIBETAN", "YI", "TAI", "BALINESE", "JAVANESE")  # fmt: skip
BLEU_ORDER = 4  # tokens of BLEU's longest n-grams
SPACELESS_SHARE = 0.2  # BLEU counts characters if more than this share of the words is SPACELESS
HAN_SHARE = 0.9  # such a text is Chinese if at least this share of its SPACELESS words is Han
ROUGE_MIN_WORDS = {"rouge1": 1, "rouge2": 2, "rougeL": 1}  # words that a reference must have


@lru_cache(maxsize=2**16)
def _script(char: str) -> str:
    return unicodedata.name(char, "").partition(" ")[0].split("-")[0]


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words: runs of letters, marks and digits.

    In scripts without spaces each letter, with its marks, is a word. For ASCII texts the words are those of
    rouge-score.
    """
    found: list[str] = []
    joins = marks = False  # whether the next letter, and whether the next mark, belongs to the last word
    for char in unicodedata.normalize("NFC", text).lower():
        category = unicodedata.category(char)
        if category[0] in "LN":
            spaceless = category[0] == "L" and _script(char) in SPACELESS
            if joins and not spaceless:
                found[-1] += char
            else:
                found.append(char)
            joins, marks = not spaceless, True
        elif category[0] == "M" and marks:
            found[-1] += char
        elif category != "Cf":  # Cf: joiners inside words of Hindi and Persian; they separate nothing
            joins = marks = False
    return found


class RougeTokenizer:
    """Tokenizer interface of rouge-score over `split_words`."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def choose_bleu_tokenizer(references: Sequence[str]) -> str:
    """Return sacrebleu's name of the tokenizer that suits the references.

    `13a` for scripts with spaces, `zh` for Chinese, `char` for Japanese, Thai and other scripts without
    spaces.
    """
    found = [word for reference in references for word in split_words(reference)]
    spaceless = [script for script in (_script(word[0]) for word in found) if script in SPACELESS]
    if len(spaceless) <= SPACELESS_SHARE * len(found):
        return "13a"
    return "zh" if sum(script in HAN for script in spaceless) >= HAN_SHARE * len(spaceless) else "char"


def _make_bleu(references: Sequence[str]):
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=choose_bleu_tokenizer(references), references=[list(references)])


def exact_match(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Return {"exact_match": % of answers that equal their reference, apart from outer white space}."""
    same = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
    return {"exact_match": 100 * same / len(answers)}


def bleu(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Return {"bleu": corpus BLEU, 0 to 100, or None}.

    None if no answer, or no reference, has four tokens: there is no 4-gram to compare.
    """
    metric = _make_bleu(references)
    score = metric.corpus_score(list(answers), None)
    longest = max(len(metric.tokenizer(reference).split()) for reference in references)
    return {"bleu": score.score if score.totals[BLEU_ORDER - 1] and longest >= BLEU_ORDER else None}


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Return mean F1, 0 to 100, of rouge1, rouge2 and rougeL over references of ROUGE_MIN_WORDS, or None."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE_MIN_WORDS), tokenizer=RougeTokenizer())
    scores = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
    lengths, means = [len(split_words(r)) for r in references], {}
    for kind, min_words in ROUGE_MIN_WORDS.items():
        values = [s[kind].fmeasure for s, length in zip(scores, lengths, strict=True) if length >= min_words]
        means[kind] = 100 * sum(values) / len(values) if values else None
    return means


# {name: (answers, references) -> {row of the table: value}}. Perplexity is not here: it needs tokens.
TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, float | None]]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge": rouge,
}


def scored_with(metrics: Sequence[str], references: Sequence[str]) -> dict[str, str]:
    """Return {"bleu", "rouge": how it was computed, which rows it leaves out}, for those in `metrics`."""
    found = {}
    if "bleu" in metrics and references:
        found["bleu"] = str(_make_bleu(references).get_signature())
    if "rouge" in metrics and references:
        found["rouge"] = f"rouge-score {importlib.metadata.version('rouge-score')} over words of any script"
        lengths = [len(split_words(reference)) for reference in references]
        for kind, min_words in ROUGE_MIN_WORDS.items():
            short = sum(length < min_words for length in lengths)
            if short:
                found["rouge"] += f"; {kind} leaves out {short:,}, whose reference has no {min_words} words"
    return found
