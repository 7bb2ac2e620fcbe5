"""Scores of answers against references, as texts in any script: exact match, BLEU and ROUGE."""

from __future__ import annotations

import importlib.metadata
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

# Scripts without spaces between words, by the first word of their characters' Unicode names.
HAN = ("CJK", "IDEOGRAPHIC")
SPACELESS = (*HAN, "HIRAGANA", "KATAKANA", "BOPOMOFO", "HALFWIDTH", "THAI", "LAO", "KHMER",
             "MYANMAR", "TIBETAN", "YI", "TAI", "BALINESE", "JAVANESE")  # fmt: skip
LONG = 4  # tokens of BLEU's longest n-grams
MANY = 0.2  # share of characters of such scripts among the words, from which BLEU counts characters
MOSTLY = 0.9  # share of Han among these, from which the text is Chinese
ROUGE = {"rouge1": 1, "rouge2": 2, "rougeL": 1}  # words that a reference must have


@lru_cache(maxsize=2**16)
def _script(char: str) -> str:
    return unicodedata.name(char, "").partition(" ")[0].split("-")[0]


def words(text: str) -> list[str]:
    """The words of a text, in lower case: runs of letters, marks and digits. In scripts without spaces
    between words each letter, with the marks on it, is a word. Of ASCII texts these are rouge-score's own
    words."""
    found: list[str] = []
    joins = marks = False  # whether a letter, and whether a mark, belongs to the last word
    for char in unicodedata.normalize("NFC", text).lower():
        category = unicodedata.category(char)
        if category[0] in "LN":
            alone = category[0] == "L" and _script(char) in SPACELESS
            if joins and not alone:
                found[-1] += char
            else:
                found.append(char)
            joins, marks = not alone, True
        elif category[0] == "M" and marks:
            found[-1] += char
        elif category != "Cf":  # a joiner, as within words of Hindi and Persian, separates nothing
            joins = marks = False
    return found


class Words:
    """rouge-score's interface of tokenizers, over `words`."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def bleu_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's name of the tokenizer that suits the references: `13a` for texts with spaces between words,
    `zh` for Chinese, `char` for Japanese, Thai and other scripts without spaces."""
    found = [word for reference in references for word in words(reference)]
    alone = [script for script in (_script(word[0]) for word in found) if script in SPACELESS]
    if len(alone) <= MANY * len(found):
        return "13a"
    return "zh" if sum(script in HAN for script in alone) >= MOSTLY * len(alone) else "char"


def _bleu(references: Sequence[str]):
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=bleu_tokenizer(references), references=[list(references)])


def exact_match(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    same = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
    return {"exact_match": 100 * same / len(answers)}


def bleu(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Undefined (None) where no answer, or no reference, has four tokens: there is no 4-gram to compare."""
    metric = _bleu(references)
    score = metric.corpus_score(list(answers), None)
    longest = max(len(metric.tokenizer(reference).split()) for reference in references)
    return {"bleu": score.score if score.totals[LONG - 1] and longest >= LONG else None}


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Means over rows whose reference has a word (two for rouge2); None where there are no such rows."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), tokenizer=Words())
    scores = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
    lengths, means = [len(words(r)) for r in references], {}
    for kind, least in ROUGE.items():
        values = [s[kind].fmeasure for s, length in zip(scores, lengths, strict=True) if length >= least]
        means[kind] = 100 * sum(values) / len(values) if values else None
    return means


# Name -> (answers, references) -> {what the table calls it: value}. perplexity is of tokens.
TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, float | None]]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge": rouge,
}


def scored_with(names: Sequence[str], references: Sequence[str]) -> dict[str, str]:
    """What BLEU and ROUGE of these references were computed with, and which rows are left out."""
    found = {}
    if "bleu" in names and references:
        found["bleu"] = str(_bleu(references).get_signature())
    if "rouge" in names and references:
        found["rouge"] = f"rouge-score {importlib.metadata.version('rouge-score')} over words of any script"
        lengths = [len(words(reference)) for reference in references]
        for kind, least in ROUGE.items():
            short = sum(length < least for length in lengths)
            if short:
                found["rouge"] += f"; {kind} leaves out {short:,}, whose reference has no {least} words"
    return found
