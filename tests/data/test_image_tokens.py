"""Images in tokenized rows: their tokens, what is learned beside them, and rows cut before them."""

from __future__ import annotations

import base64
import dataclasses
import shutil

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data import row_text, tokenizing
from data.batches import StepSampler
from data.evaluation_sets import prepare_sets
from data.formats import Rendered
from data.image_digests import digest_whole_images
from data.image_files import find_image
from data.images import ImageRef
from data.pixels import read_pixels
from data.row_text import describe_examples, record_examples
from data.rows import MixedSet, digest_rows, join_sets
from data.tokenizing import tokenize, tokenize_dataset
from models.image_settings import read_fixed_images, read_patch_images
from monitoring.messages import describe_data
from options.config import Config
from options.errors import UserError
from tests.helpers.data_files import to_jsonl, write_file
from tests.helpers.image_folders import write_gemma_folder, write_qwen_folder
from tests.helpers.images import (
    BEGIN,
    END,
    PART,
    TEMPLATE,
    encode_image,
    image_options,
    image_tokenizer,
    stand_in,
    write_image,
)

SIZES = {"1.png": (16, 16), "4.png": (20, 30), "6.png": (48, 32), "12.png": (64, 48)}  # name: tokens of PART
FRAME = 6  # tokens around them: two line breaks, begin, end, two line breaks
TEXT_ROW = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}],
    "images": [],
}


@pytest.fixture(autouse=True)
def folder(tmp_path):
    for name, size in SIZES.items():
        write_image(tmp_path / name, *size)
    return tmp_path


def chat(*images: str) -> dict:
    """A conversation with a question and an answer for each image."""
    question = [{"type": "image"}, {"type": "text", "text": "Is it?"}]
    turns = [("user", question), ("assistant", "Yes.")] * len(images)
    return {"messages": [{"role": role, "content": text} for role, text in turns], "images": [*images]}


def read(folder, *rows: dict, **options):
    path = write_file(folder / "rows.jsonl", to_jsonl(rows))
    return tokenize_dataset(str(path), image_options(**options))


def count_parts(name: str) -> int:
    return int(name.removesuffix(".png"))


def expand(name: str) -> str:
    return f"\n\n{BEGIN}{PART * count_parts(name)}{END}\n\n"


def expected_ids(tokenizer, row: dict) -> list[int]:
    """The tokens as a processor makes them: the template's text, each image expanded, tokenized at once."""
    text, *others = tokenizer.apply_chat_template(row["messages"], tokenize=False).split(BEGIN)
    text += "".join(expand(name) + piece for name, piece in zip(row["images"], others, strict=True))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def split(rows) -> list[tuple[list[int], list[bool]]]:
    cuts = (values.tensor_split(rows.starts[1:-1]) for values in (rows.tokens, rows.learned))
    return [(tokens.tolist(), learned.tolist()) for tokens, learned in zip(*cuts, strict=True)]


def learned_text(tokenizer, ids: list[int], learned: list[bool]) -> str:
    return tokenizer.decode([i for i, is_learned in zip(ids, learned, strict=True) if is_learned])


def test_the_tokens_are_those_of_a_processor(folder):
    """The answers are learned, wherever their text has moved, and each row has its images."""
    tokenizer = image_tokenizer()
    given = [chat("1.png"), chat("4.png", "6.png"), TEXT_ROW, chat("6.png", "1.png", "1.png")]
    rows = read(folder, *given)
    assert len(rows) == 4 and rows.dropped == rows.cut == 0
    assert rows.image_id == tokenizer.convert_tokens_to_ids(PART)
    for i, ((ids, learned), row) in enumerate(zip(split(rows), given, strict=True)):
        assert ids == expected_ids(tokenizer, row)
        answers = "".join(f"{m['content']}<end_of_turn>" for m in row["messages"] if m["role"] == "assistant")
        assert learned_text(tokenizer, ids, learned) == answers
        assert [(ref.width, ref.height) for ref in rows.images.of_row(i)] == [SIZES[n] for n in row["images"]]


def test_gemma_3_gets_what_its_processor_makes(folder):
    """The tokens of transformers' processor for a row in a file, and the pixels that belong there."""
    config, processor = write_gemma_folder(folder)
    image_format = read_fixed_images(config, folder)
    row = chat("4.png", "12.png", "1.png")
    processor.tokenizer.chat_template = TEMPLATE
    rows = read(folder, row, TEXT_ROW, tokenizer=processor.tokenizer, image_format=image_format)
    text = processor.tokenizer.apply_chat_template(row["messages"], tokenize=False).removeprefix("<s>")
    expected = processor(
        text=text, images=[[Image.open(folder / name) for name in row["images"]]], return_tensors="pt"
    )
    assert split(rows)[0][0] == expected["input_ids"][0].tolist()
    pixels = image_format.arrange([read_pixels(ref, image_format) for ref in rows.images.of_row(0)])
    made = image_format.normalise(pixels.values, torch.float32)
    torch.testing.assert_close(made, expected["pixel_values"], rtol=0, atol=0)


def test_an_image_that_the_model_refuses(folder):
    """Qwen-VL takes none that is much longer than wide."""
    config, _ = write_qwen_folder(folder)
    write_image(folder / "long.png", 1000, 3)
    with pytest.raises(UserError, match=r"rows.jsonl:2: has an image of 1000 x 3 pixels; this model"):
        read(folder, TEXT_ROW, chat("long.png"), image_format=read_patch_images(config, folder))


def test_tokens_of_images_are_never_learned(folder):
    """Of a caption all is learned but the image."""
    tokenizer = image_tokenizer()
    ((ids, learned),) = split(read(folder, {"image": "4.png", "text": "A cat."}))
    assert tokenizer.decode(ids) == f"<s>{expand('4.png')}A cat.</s>"
    assert learned_text(tokenizer, ids, learned) == "A cat.</s>"


def test_a_row_is_cut_before_an_image(folder):
    """At every length a row has an image whole or not at all; else it is as long as it may be."""
    row, begin = chat("1.png", "6.png", "4.png"), image_tokenizer().convert_tokens_to_ids(BEGIN)
    ((whole, learned),) = split(read(folder, row))
    firsts = [i - 2 for i, token in enumerate(whole) if token == begin]
    ends = [first + FRAME + count_parts(name) for first, name in zip(firsts, row["images"], strict=True)]
    seen = set()
    for length in range(learned.index(True) + 1, len(whole) + 1):
        rows = read(folder, row, context_length=length)
        cut = next((a for a, b in zip(firsts, ends, strict=True) if a < length < b), length)
        assert split(rows) == [(whole[:cut], learned[:cut])]
        assert len(rows.images.of_row(0)) == len(rows.images.refs) == sum(end <= cut for end in ends)
        is_before_image = [each.reason.startswith("an image ends beyond") for each in rows.cut_reasons]
        assert is_before_image == [cut < length] * (length < len(whole))
        seen.add((len(rows.images.refs), cut < length))
    assert seen == {(1, False), (1, True), (2, False), (2, True), (3, False)}


def test_a_row_whose_answers_are_behind_the_cut(folder):
    """It is dropped, and counted by its reason."""
    rows = read(folder, TEXT_ROW, chat("12.png"), context_length=22)
    assert len(rows) == 1 and not rows.images.refs
    assert rows.describe_reasons()[0] == (
        "1 row dropped: an image before the answers ends beyond --context_length (row 2)"
    )


def test_an_image_that_does_not_fit(folder):
    """The line names its row, also if other rows would do."""
    message = r"^--dataset .*rows.jsonl:2: image 12.png 64x48 takes 18 tokens, more than --context_length 17"
    with pytest.raises(UserError, match=message):
        read(folder, TEXT_ROW, chat("12.png"), context_length=17)


def test_a_tokenizer_without_the_tokens_of_images(folder):
    """Their letters would be read as a text."""
    tokenizer = image_tokenizer()
    other = dataclasses.replace(stand_in(tokenizer), token_id=3)
    with pytest.raises(
        UserError, match=r":1: image 1.png 16x16 has 0 tokens of images where the model takes 1"
    ):
        read(folder, chat("1.png"), image_format=other)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Gemma's, with tokens of two and of four line breaks."""
    vocabulary = {t: i for i, t in enumerate(["<unk>", "\n", "\n\n", "\n\n\n\n", "a"])}
    merges = [("\n", "\n"), ("\n\n", "\n\n")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("a", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": [BEGIN, PART, END]})
    return tokenizer


def test_a_token_of_two_images():
    """The line breaks between two images are one token, which counts for the first."""
    tokenizer = merging_tokenizer()
    refs = [ImageRef("x.png", 0, None, *SIZES[name], "here") for name in ("1.png", "4.png")]
    example = Rendered(f"aa{BEGIN}{BEGIN}aa", [(0, 2)], needs_eos=False, images=refs)
    whole = tokenizer(f"aa{expand('1.png')}{expand('4.png')}aa")["input_ids"]
    assert (
        len(whole) == 16
    )  # with 1 + 1 + 1 + 1 + 1 tokens of the first image, and 1 + 4 + 1 + 1 of the second
    cuts = []
    for length in range(7, 17):
        rows = tokenize([example], tokenizer, length, "here", stand_in(tokenizer))
        assert rows.tokens.tolist() == whole[: len(rows.tokens)]
        cuts.append((len(rows.tokens), len(rows.images.refs)))
    assert cuts == [(7, 1)] * 7 + [(14, 2), (15, 2), (16, 2)]


def test_few_expanded_texts_exist_at_once(folder, monkeypatch):
    """They are many times as long as their rows, so the blocks are of their lengths."""
    sizes = []
    encode = tokenizing.encode
    monkeypatch.setattr(tokenizing, "BLOCK_CHARACTERS", 900)
    monkeypatch.setattr(
        tokenizing, "encode", lambda t, texts, a: sizes.append(sum(map(len, texts))) or encode(t, texts, a)
    )
    read(folder, *[chat("6.png")] * 12)
    assert len(sizes) == 3 and max(sizes) <= 900


def test_a_mixture_keeps_the_images_of_each_row(folder):
    """One of its sets has none."""
    parts = [read(folder, TEXT_ROW), read(folder, chat("4.png", "1.png"), TEXT_ROW, chat("6.png"))]
    rows = join_sets([*parts, parts[1]], [MixedSet("a", 1, 1), MixedSet("b", 3, 3), MixedSet("c", 3, 3)])
    names = [[ref.label.split()[0] for ref in rows.images.of_row(i)] for i in range(len(rows))]
    assert names == [[], *[["4.png", "1.png"], [], ["6.png"]] * 2]
    assert rows.count_image_tokens() == 2 * 11
    assert not join_sets(parts[:1] * 2, [MixedSet("a", 1, 1), MixedSet("b", 1, 1)]).images.refs


def test_the_digest_is_that_of_the_images(folder, tmp_path_factory):
    """Of their contents, wherever they are: another image of the same size makes another run of it."""
    digest = digest_rows(read(folder, chat("1.png"), chat("4.png")))
    copy = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    assert digest_rows(read(copy, chat("1.png"), chat("4.png"))) == digest
    write_image(copy / "4.png", *SIZES["4.png"], color=1)
    assert digest_rows(read(copy, chat("1.png"), chat("4.png"))) != digest


def test_shown_rows_say_what_an_image_is(folder, monkeypatch):
    """In the place of its tokens; also where a long row is recorded by its ends, within images."""
    rows = read(folder, chat("12.png", "6.png", "4.png"))
    (shown,) = describe_examples(rows, 1, image_tokenizer())
    labels = ["12.png 64x48, 12 tokens", "6.png 48x32, 6 tokens", "4.png 20x30, 4 tokens"]
    asked = "".join(
        f"<start_of_turn>user\n\n\n{BEGIN}<image: {label}>{END}\n\nIs it?<end_of_turn>\n"
        "<start_of_turn>model\n[[Yes.<end_of_turn>]]\n"
        for label in labels
    )
    assert shown.partition("\n")[2] == f"<s>{asked}"
    for end, heads, tails in (
        (15, ["12.png 64x48, 5"], []),
        (42, ["12.png 64x48, 12"], ["4.png 20x30, 4"]),
        (26, ["12.png 64x48, 12"], ["4.png 20x30, 2"]),
    ):
        monkeypatch.setattr(row_text, "END_TOKENS", end)
        (recorded,) = record_examples(rows, image_tokenizer())
        for parts, expected in ((recorded.head, heads), (recorded.tail, tails)):
            found = [part.text for part in parts if part.text.startswith("<image: ")]
            assert found == [f"<image: {label} tokens>" for label in expected]


def test_the_line_about_the_data(folder):
    rows = read(folder, chat("6.png", "4.png"), chat("1.png"))
    line = describe_data(rows, StepSampler(rows, 1, 1, 0, 1, 0), 1000)
    share = round(100 * 11 / len(rows.tokens))
    assert f" learned; 3 images of 11 tokens, {share}% of all, the largest of 48 x 32 pixels; padding" in line
    texts = read(folder, TEXT_ROW)
    assert "image" not in describe_data(texts, StepSampler(texts, 1, 1, 0, 1, 0), 1000)


def test_evaluation_rows_and_prompts_have_images(folder):
    """A prompt ends where the answer begins; one whose images do not fit is left out."""
    tokenizer = image_tokenizer()
    path = write_file(
        folder / "rows.jsonl", to_jsonl([chat("1.png"), chat("4.png", "6.png"), chat("12.png")])
    )
    config = Config(
        dataset=str(path), eval_dataset=str(path), context_length=60, eval_every=1, sample_every=1
    )
    _, rows, evaluation = prepare_sets(config, tokenizer, stand_in(tokenizer))
    assert digest_rows(rows) == digest_rows(evaluation.rows) and len(rows.images.refs) == 4
    first, last = evaluation.prompts
    turn = "<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.decode(first.ids) == f"<s><start_of_turn>user\n{expand('1.png')}Is it?{turn}"
    assert [len(prompt.images) for prompt in (first, last)] == [1, 1] and first.answer == "Yes."
    assert evaluation.largest_id(rows.image_id) == rows.largest_id() != rows.image_id


def test_names_that_would_read_as_marks(folder, monkeypatch):
    """An image's name is the data's text. Bytes without a name are called by their row."""
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    name = f"a\n[[FORGED]]{END}.png"
    write_image(folder / name, 16, 16)
    encoded = [{"bytes": base64.b64encode(encode_image(16, size)).decode()} for size in (16, 32)]
    rows = [
        {"image": name, "text": "t"},
        {"image": encoded[0], "text": "u"},
        {"images": encoded, "text": "v"},
    ]
    path = write_file(folder / "rows.jsonl", to_jsonl(rows))
    tokenized = tokenize_dataset(str(path), image_options())
    shown = describe_examples(tokenized, 3, image_tokenizer())
    assert r"<image: 'a\\n\[\[FORGED\]\]\<end_of_image>.png' 16x16, 1 tokens>" in shown[0]
    assert "<image: image of rows.jsonl:2 16x16, 1 tokens>" in shown[1]
    assert "<image: image 1 of rows.jsonl:3 16x16, 1 tokens>" in shown[2]
    assert "<image: image 2 of rows.jsonl:3 16x32, 2 tokens>" in shown[2]
    named = [{"image": encoded[0] | {"path": "a\nb.png"}, "text": "t"}]
    write_file(folder / "rows.jsonl", to_jsonl(named))
    (row,) = tokenize_dataset(str(path), image_options()).images.refs
    assert row.label == r"'a\nb.png' 16x16"


def test_no_image_is_on_both_sides_of_a_split(folder):
    """Also where rows share images with others that share them; rows of texts are split one by one."""
    names = [f"{i}.png" for i in range(100, 140)]
    for i, name in enumerate(names):
        write_image(folder / name, 16, 16, color=i)
    pairs = [{"images": [names[i], names[i + 1]], "text": f"t{i}"} for i in range(0, 30, 3) for _ in range(2)]
    pairs += [{"images": [names[i + 1], names[i + 2]], "text": f"u{i}"} for i in range(0, 30, 3)]
    alone = [{"images": [name], "text": name} for name in names[30:]]
    tokenizer = image_tokenizer()
    path = write_file(folder / "rows.jsonl", to_jsonl([*pairs, *alone]))
    config = Config(dataset=str(path), eval_share=0.25, eval_every=1, context_length=200)
    _, rows, evaluation = prepare_sets(config, tokenizer, stand_in(tokenizer))
    sides = [{ref.digest for ref in each.images.refs} for each in (rows, evaluation.rows)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
    assert 10 <= len(evaluation.rows) <= 12 and len(rows) + len(evaluation.rows) == 40
    folds = []
    for k in (1, 2, 3):
        in_fold = dataclasses.replace(config, eval_share=0, eval_fold=f"{k}/3")
        _, rows, evaluation = prepare_sets(in_fold, tokenizer, stand_in(tokenizer))
        sides = [{ref.digest for ref in each.images.refs} for each in (rows, evaluation.rows)]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
        folds.append(len(evaluation.rows))
    assert sum(folds) == 40 and max(folds) - min(folds) <= 3  # a group that shares an image has 3 rows
    same = write_file(
        folder / "rows.jsonl", to_jsonl([{"image": "1.png", "text": f"t{i}"} for i in range(8)])
    )
    with pytest.raises(
        UserError, match=r"^--eval_fold 1/2: 8 rows, some of which share images, make at most 1 f"
    ):
        in_fold = dataclasses.replace(config, dataset=str(same), eval_share=0, eval_fold="1/2")
        prepare_sets(in_fold, tokenizer, stand_in(tokenizer))
    with pytest.raises(UserError, match=r"^--eval_share 0.25: all rows show the same images"):
        prepare_sets(dataclasses.replace(config, dataset=str(same)), tokenizer, stand_in(tokenizer))


def test_images_that_begin_alike_are_different_ones(folder):
    """Those of equal sizes and beginnings are read whole; the same image in two files is one."""
    beginning = bytes(2**16)  # a BMP begins with its last line
    for i in range(8):
        Image.frombytes("L", (256, 512), bytes([i // 2]) * 2**16 + beginning).save(folder / f"{i}.bmp")
    refs = [find_image(str(folder / f"{i}.bmp"), "row") for i in range(8)]
    assert len({ref.digest for ref in refs}) == 1
    digests = [*digest_whole_images(refs).values()]
    assert len({*digests}) == 4 and digests[::2] == digests[1::2]
    path = write_file(
        folder / "a.jsonl", to_jsonl([{"image": f"{i}.bmp", "text": f"t{i}"} for i in range(8)])
    )
    tokenizer = image_tokenizer()
    config = Config(dataset=str(path), eval_share=0.25, eval_every=1, context_length=2000)
    _, rows, evaluation = prepare_sets(config, tokenizer, stand_in(tokenizer))
    assert (len(rows), len(evaluation.rows)) == (6, 2)
    first, second = (read_pixels_of(ref) for ref in evaluation.rows.images.refs)
    assert first == second


def read_pixels_of(ref) -> bytes:
    with Image.open(ref.path) as image:
        return image.tobytes()


def test_no_image_is_on_both_sides_of_a_mixture(folder):
    """An image may be in two of its sets, under two names."""
    for i in range(8):
        write_image(folder / f"a{i}.png", 16, 16, color=i)
        write_image(folder / f"b{i}.png", 16, 16, color=i)
    sets = [[{"image": f"{name}{i}.png", "text": f"{name}{i}"} for i in order]
            for name, order in (("a", range(8)), ("b", range(7, -1, -1)))]  # fmt: skip
    paths = [write_file(folder / f"{i}.jsonl", to_jsonl(rows)) for i, rows in enumerate(sets)]
    tokenizer = image_tokenizer()
    dataset = ",".join(map(str, paths))
    config = Config(dataset=dataset, eval_share=0.25, eval_every=1, context_length=200)
    _, rows, evaluation = prepare_sets(config, tokenizer, stand_in(tokenizer))
    sides = [{ref.digest for ref in each.images.refs} for each in (rows, evaluation.rows)]
    assert (len(sides[0]), len(sides[1])) == (6, 2) and not sides[0] & sides[1]
    assert [each.size for each in rows.sets] == [6, 6] and len(evaluation.rows) == 4
    for k in (1, 2, 3, 4):
        in_fold = dataclasses.replace(config, eval_share=0, eval_fold=f"{k}/4")
        _, rows, evaluation = prepare_sets(in_fold, tokenizer, stand_in(tokenizer))
        folds = [{ref.digest for ref in each.images.refs} for each in (rows, evaluation.rows)]
        assert (len(folds[0]), len(folds[1])) == (6, 2) and not folds[0] & folds[1]


def test_texts_of_a_model_of_images(folder):
    """Text alone gives the tokens that it gives a model of texts."""
    path = str(write_file(folder / "rows.jsonl", to_jsonl([{"question": "Is it?", "answer": "Yes."}])))
    rows, of_texts = (tokenize_dataset(path, image_options(**more)) for more in ({}, {"image_format": None}))
    assert rows.tokens.tolist() == of_texts.tokens.tolist() and not rows.images.refs


def test_a_tokenizer_that_makes_tokens_of_images_of_other_texts(folder):
    """Such as one that takes wide letters for plain ones. The tokens would be learned."""
    tokenizer = image_tokenizer(None)
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken(END, normalized=True)]})
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    row = {"prompt": "Say ", "completion": "\uff1cend_of_image\uff1e", "image": "1.png"}
    path = write_file(folder / "rows.jsonl", to_jsonl([row]))
    with pytest.raises(UserError, match=r"row 1: the tokenizer makes the id \d+ .* stands for an image"):
        tokenize_dataset(str(path), image_options(tokenizer))
