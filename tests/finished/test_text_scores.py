"""finished/text_scores.py: scores against values computed by hand, in several scripts."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from finished.text_scores import (
    ROUGE_MIN_WORDS,
    bleu,
    choose_bleu_tokenizer,
    exact_match,
    rouge,
    scored_with,
    split_words,
)
from tests.helpers.programs import ROOT


def test_exact_match():
    assert exact_match(["a ", "\nb", "c", "D"], ["a", "b", "d", "d"]) == {"exact_match": 50.0}


def test_bleu():
    """By hand: 1 to 4-gram precisions 5/6, 3/5, 2/4, 1/3 at equal lengths.

    Then four right words of five: only the brevity penalty, exp(1 - 5/4).
    """
    found = bleu(["the cat sat on the mat"], ["the cat sat on a mat"])["bleu"]
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert bleu(["a b c d"], ["a b c d e"])["bleu"] == pytest.approx(100 * 0.7788008)


def test_rouge():
    """Both texts have 6 words: 5 are common, 3 of 5 pairs, and 5 in order.

    The second row is equal, and has no pairs.
    """
    found = rouge(["the cat sat on the mat", "yes"], ["the cat sat on a mat", "yes"])
    assert found == pytest.approx(
        {"rouge1": 50 * (5 / 6 + 1), "rouge2": 100 * 3 / 5, "rougeL": 50 * (5 / 6 + 1)}
    )


# Scripts

# reference, answer; the words of both by hand; BLEU's tokenizer, and its tokens by hand where they differ
TEXTS = {
    "Chinese": (
        "我昨天在北京吃了饭。", "我昨天在上海吃了饭。", "我 昨 天 在 北 京 吃 了 饭",
        "我 昨 天 在 上 海 吃 了 饭", "zh", "我 昨 天 在 北 京 吃 了 饭 。", "我 昨 天 在 上 海 吃 了 饭 。"),
    "Japanese": (
        "東京でラーメンを食べた", "東京でラーメンを見た", "東 京 で ラ ー メ ン を 食 べ た",
        "東 京 で ラ ー メ ン を 見 た", "char", None, None),
    "Thai": (
        "แมวกินปลา", "แมวกินน้ำ", "แ ม ว กิ น ป ล า", "แ ม ว กิ น น้ ำ",
        "char", "แ ม ว ก ิ น ป ล า", "แ ม ว ก ิ น น ้ ำ"),
    "Hindi": (
        "मैं कल दिल्ली में बड़े घर गया।", "मैं कल दिल्ली में छोटे घर गया।", "मैं कल दिल्ली में बड़े घर गया",
        "मैं कल दिल्ली में छोटे घर गया", "13a", "मैं कल दिल्ली में बड़े घर गया।", "मैं कल दिल्ली में छोटे घर गया।"),
    "Arabic": (
        "ذهبت أمس إلى المدرسة مع أخي الكبير", "ذهبت أمس إلى المدرسة مع أخي الصغير",
        "ذهبت أمس إلى المدرسة مع أخي الكبير", "ذهبت أمس إلى المدرسة مع أخي الصغير", "13a", None, None),
    "Russian": (
        "Вчера я ходил в большой Парк.", "Вчера я ходил в большой лес.", "вчера я ходил в большой парк",
        "вчера я ходил в большой лес", "13a", "Вчера я ходил в большой Парк .",
        "Вчера я ходил в большой лес ."),
    "Chinese and English": (
        "请在2024年安装 Python 3.11 版本", "请在2024年安装 Python 3.12 版本",
        "请 在 2024 年 安 装 python 3 11 版 本",
        "请 在 2024 年 安 装 python 3 12 版 本", "zh",
        "请 在 2024 年 安 装 Python 3.11 版 本",
        "请 在 2024 年 安 装 Python 3.12 版 本"),
}  # fmt: skip


def grams(tokens: list[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def common(one: list[str], other: list[str], n: int) -> int:
    return (grams(one, n) & grams(other, n)).total()


def bleu_by_hand(answer: list[str], reference: list[str]) -> float:
    shares = [common(answer, reference, n) / grams(answer, n).total() for n in (1, 2, 3, 4)]
    return 100 * math.prod(shares) ** 0.25 * math.exp(min(0, 1 - len(reference) / len(answer)))


def in_order(one: list[str], other: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + in_order(one[1:], other[1:])
    return max(in_order(one[1:], other), in_order(one, other[1:]))


@pytest.mark.parametrize("case", TEXTS)
def test_scripts(case):
    reference, answer, *by_hand, name, of_reference, of_answer = TEXTS[case]
    right, given = (text.split() for text in by_hand)
    assert [split_words(reference), split_words(answer)] == [right, given]
    pairs = {kind: grams(right, n).total() + grams(given, n).total() for kind, n in ROUGE_MIN_WORDS.items()}
    assert rouge([answer], [reference]) == pytest.approx({
        "rouge1": 200 * common(given, right, 1) / pairs["rouge1"],
        "rouge2": 200 * common(given, right, 2) / pairs["rouge2"],
        "rougeL": 200 * in_order(given, right) / pairs["rougeL"],
    })  # fmt: skip
    assert choose_bleu_tokenizer([reference]) == name
    tokens = (of_answer or by_hand[1]).split(), (of_reference or by_hand[0]).split()
    assert bleu([answer], [reference])["bleu"] == pytest.approx(bleu_by_hand(*tokens)) != 0
    same = bleu([reference], [reference]) | rouge([reference], [reference])
    assert same == pytest.approx(dict.fromkeys(same, 100.0))
    assert f"|tok:{name}|" in scored_with(("bleu",), [reference])["bleu"]


def test_one_text_in_two_spellings():
    """A letter and its accent as two characters; a joiner that only shapes letters, as in Persian."""
    assert split_words("Cafe\u0301") == split_words("caf\u00e9") == ["caf\u00e9"]
    assert split_words("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645") == [
        "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645"
    ]
    assert split_words("\u0301a") == ["a"] and split_words("+ \U0001f642 ...") == []


def test_english_scores_are_those_of_rouge_score():
    rows = [json.loads(line) for line in (ROOT / "datasets" / "toy.jsonl").read_text().splitlines()]
    texts = [f"{row['instruction']} {row['output']}" for row in rows[:60]]
    texts += [
        "Don't stop_now - it's 3.5x faster!",
        "The \u201cquoted\u201d words\u2014and a list:\n1. One,\n2. Two.",
    ]
    from rouge_score.rouge_scorer import RougeScorer  # not on the machines that only run GPU tests

    scorer = RougeScorer(list(ROUGE_MIN_WORDS))
    for answer, reference in zip(texts, texts[7:] + texts[:7], strict=True):
        theirs = {kind: 100 * score.fmeasure for kind, score in scorer.score(reference, answer).items()}
        assert rouge([answer], [reference]) == pytest.approx(theirs)
    assert choose_bleu_tokenizer(texts) == "13a"


# What is undefined


def test_bleu_without_four_tokens_is_undefined():
    assert bleu(["yes", "no"], ["yes", "no"]) == {"bleu": None}
    assert bleu(["so it is"], ["yes it is so , and why"]) == {"bleu": None}
    assert bleu(["yes it is so , and why"], ["it is so"]) == {"bleu": None}
    assert bleu([""], ["yes it is so"]) == {"bleu": None}
    assert bleu(["\u5317\u4eac\u5e02"], ["\u5317\u4eac\u5e02"]) == {"bleu": None}
    assert bleu(["\u5317\u4eac\u5e02\u4eba"] * 2, ["\u5317\u4eac\u5e02\u4eba", "x"])["bleu"] > 0


def test_rouge_leaves_out_what_it_cannot_measure():
    answers, references = ["+", "yes", "the cat", ""], ["+", "yes", "the cat", "a dog"]
    assert rouge(answers, references) == pytest.approx({"rouge1": 200 / 3, "rouge2": 50.0, "rougeL": 200 / 3})
    description = scored_with(("rouge",), references)["rouge"]
    assert (
        "; rouge1 leaves out 1, " in description
        and "; rouge2 leaves out 2, whose reference has no 2 words" in description
    )
    assert rouge(["+"], ["+"]) == {"rouge1": None, "rouge2": None, "rougeL": None}
