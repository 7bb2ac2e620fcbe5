"""generate.py: the answers are the trained model's and the base's, in the template of training."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import finished.generate
import generate
import models.dora
from data.formats import ALPACA
from finished import generation
from finished.conversation import Conversation
from finished.finished_run import load_model, open_base, open_run
from finished.generation import make_template
from finished.prompt_template import Answer, AnswerStreamer
from models.dora import DoRALinear, cached_norms
from models.lora import LoRALinear, adapters_off
from options.errors import UserError
from quantization.hqq import HQQ
from quantization.layer import Linear4bit
from quantization.nf4 import NF4
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import write_random_run
from tests.helpers.fsdp_qlora import PROMPT as STANFORD
from tests.helpers.layers import ALPHA, I, O, R, dora, fill_layer
from tests.helpers.logits import IDS
from tests.helpers.products import slow
from tests.helpers.runs import dense_state, transformers_model
from tests.helpers.tiny import OTHERS

QUESTION, NEW = "Say red.", 8
PENALTY = 3.0
ASKED = ["--prompt", QUESTION, "--max_new_tokens", NEW]


def test_bf16_is_that_of_the_chosen_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(UserError, match="no bf16"):
        finished.generate.check_precision("bf16", torch.device("cuda:1"))
    assert asked == [torch.device("cuda:1")]


@pytest.fixture
def answers_of(capsys):
    """answers_of(*argv) -> the answers that --json prints: {model: answer} for each prompt."""

    def answers_of(*argv) -> list[dict[str, dict]]:
        capsys.readouterr()  # of making a checkpoint
        status = generate.main([*map(str, argv), "--json"])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return [{a["model"]: a for a in json.loads(line)["answers"]} for line in shown.out.splitlines()]

    return answers_of


def greedy(model, tokenizer, text: str) -> tuple[str, int]:
    """Generate transformers' greedy answer without a cache. Return (text, number of tokens).

    The penalty keeps tiny models from repeating one token for ever, whatever their adapter.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=False,
            repetition_penalty=PENALTY,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
    return tokenizer.decode(out, skip_special_tokens=True), len(out)


def text_and_tokens(answer: dict) -> tuple[str, int]:
    return answer["text"], answer["tokens"]


@pytest.mark.parametrize(
    ("kind", "train_type"),
    [
        *slow([("llama_bias", "lora"), ("gemma2", "bnb_dora"), ("gemma3", "dora")]),
        ("llama_bias", "bnb_dora"),
        ("gemma3_wrapper", "bnb_dora"),
        pytest.param("mistral3", "qlora", marks=pytest.mark.slow),
        pytest.param("phi3", "hqq_lora", marks=pytest.mark.slow),
        ("qwen3_moe", "bnb_dora"),
        *slow((kind, "bnb_dora") for kind in OTHERS),
    ],
)
def test_answers_are_those_of_peft(
    kind, train_type, checkpoints, alpaca_file, one_rank, tmp_path, answers_of
):
    """Greedy, with our cache and without theirs, over the dequantized base; adapters off is the base."""
    args = args_for(checkpoints(kind), alpaca_file, train_type)
    write_random_run(one_rank, tmp_path / "run", args)
    ours = answers_of(tmp_path / "run", *ASKED, "--repetition_penalty", PENALTY)[0]
    base = transformers_model(checkpoints(kind), one_rank(dense_state, args)[0])
    model = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    tokenizer, text = AutoTokenizer.from_pretrained(checkpoints(kind)), ALPACA.format(instruction=QUESTION)
    assert text_and_tokens(ours[str(tmp_path / "run")]) == greedy(model, tokenizer, text)
    with model.disable_adapter():
        assert text_and_tokens(ours["base"]) == greedy(model, tokenizer, text)
    assert ours["base"]["text"] != ours[str(tmp_path / "run")]["text"]


@pytest.mark.parametrize("train_type", [*slow(["full"]), "bnb_llama_pro"])
def test_a_run_that_saved_a_model(train_type, checkpoints, alpaca_file, one_rank, tmp_path, answers_of):
    folder = checkpoints("llama_bias_pro" if train_type != "full" else "llama")
    write_random_run(one_rank, tmp_path / "run", args_for(folder, alpaca_file, train_type))
    ours = answers_of(tmp_path / "run", *ASKED, "--repetition_penalty", PENALTY)[0]
    tokenizer, text = AutoTokenizer.from_pretrained(folder), ALPACA.format(instruction=QUESTION)
    for name, origin in ((str(tmp_path / "run"), tmp_path / "run"), ("base", folder)):
        model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32, attn_implementation="eager")
        assert text_and_tokens(ours[name]) == greedy(model.eval(), tokenizer, text)
    alone = answers_of(tmp_path / "run", *ASKED, "--repetition_penalty", PENALTY, "--compare", "false")[0]
    assert alone == {str(tmp_path / "run"): ours[str(tmp_path / "run")]}
    with pytest.raises(UserError, match="was trained on another model than"):
        open_base(open_run(tmp_path / "run"), str(checkpoints("mistral")))


def test_adapters_are_switched_over_one_base(runs, answers_of, monkeypatch, tmp_path):
    """Each adapter answers as it does alone, in any order, and the base is loaded once."""
    (tmp_path / "p.txt").write_text(f"{QUESTION}\nSay nothing.\n")
    asked = ["--prompts", tmp_path / "p.txt", "--max_new_tokens", NEW, "--repetition_penalty", PENALTY]
    alone = {}
    for run in runs:
        for i, answers in enumerate(answers_of(run, *asked)):
            alone.update({(i, name): answer for name, answer in answers.items()})
    assert len({alone[0, str(run)]["text"] for run in runs} | {alone[0, "base"]["text"]}) == 4
    loads, original = [], generation.load_model
    monkeypatch.setattr(generation, "load_model", lambda *a: (loads.append(a), original(*a))[1])
    one, two, three = runs
    for order in ([three, one, two], [one, three]):
        together = {
            (i, n): a for i, answers in enumerate(answers_of(*order, *asked)) for n, a in answers.items()
        }
        assert together == {key: alone[key] for key in together} and len(together) == 2 * (1 + len(order))
    assert len(loads) == 2


def test_each_adapter_answers_in_the_precision_of_its_training(runs, tmp_path, monkeypatch):
    """The base answers in that of the first run, whichever adapter is loaded."""
    other = shutil.copytree(runs[0], tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub("(?m)^precision: .*", "precision: bf16", text))
    opened = [open_run(folder) for folder in (runs[2], other, runs[1])]
    models = generation.AnsweringModels(opened, None, torch.device("cpu"), "auto", compare=True)
    alone = {
        str(run.folder): load_model(run, models.device, dtype)
        for run, dtype in zip(opened, (torch.float32, torch.bfloat16, torch.float32), strict=True)
    }
    loads = []
    monkeypatch.setattr(generation, "load_model", lambda *a: (loads.append(a), load_model(*a))[1])
    for name in (*alone, "base", str(other), "base"):
        with models.activate(name):
            found = models.model(input_ids=IDS).logits
        expected = alone.get(name) or alone[str(runs[2])]
        with torch.inference_mode(), contextlib.nullcontext() if name in alone else adapters_off(expected):
            torch.testing.assert_close(found, expected(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    assert len(loads) == 5


def test_seeds_repeat(runs, answers_of):
    def texts(seed: int) -> list[str]:
        sampling = ["--temperature", "1.5", "--top_p", "0.95", "--top_k", "50", "--seed", seed]
        more = [*ASKED, "--prompt", QUESTION, "--compare", "false"]
        return [a["text"] for answers in answers_of(runs[0], *more, *sampling) for a in answers.values()]

    first = texts(1)
    assert first[0] == first[1], "each answer is seeded by itself"
    assert texts(1) == first
    greedy = answers_of(runs[0], *ASKED, "--compare", "false")[0][str(runs[0])]["text"]
    assert len({first[0], texts(2)[0], greedy}) == 3


def test_a_repetition_penalty_and_a_full_context(runs, answers_of):
    """A penalty below 1 favours repetition. The answer ends at the model's last position."""
    plain, other = (
        answers_of(runs[0], *ASKED, "--repetition_penalty", p)[0]["base"]["text"] for p in (1, 0.1)
    )
    there = set(ALPACA.format(instruction=QUESTION))
    assert set(other) <= there and not set(plain) <= there
    long = "x" * (512 - 5 - len(ALPACA.format(instruction="")) - 1)
    answer = answers_of(runs[0], "--prompt", long, "--compare", "false")[0][str(runs[0])]
    assert answer["tokens"] == 5 and not answer["ended"]


def test_a_base_that_was_moved(runs, checkpoints, tmp_path, answers_of):
    moved = shutil.copytree(checkpoints("llama_bias"), tmp_path / "moved")
    assert answers_of(runs[0], *ASKED, "--base_model", moved) == answers_of(runs[0], *ASKED)


@pytest.mark.parametrize("kept", [True, False])
def test_the_data_is_not_needed(kept, runs, tmp_path, answers_of, alpaca_file):
    """config.yaml keeps the format; if it does not, --dataset_format gives it."""
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    text = (copy / "config.yaml").read_text().replace(str(alpaca_file), str(tmp_path / "gone.jsonl"))
    assert "dataset_format: alpaca" in text
    text = text if kept else text.replace("dataset_format: alpaca", "dataset_format: auto")
    (copy / "config.yaml").write_text(text)
    asked = [*ASKED, "--compare", "false"]
    ours = answers_of(copy, *asked, *[] if kept else ["--dataset_format", "alpaca"])[0][str(copy)]
    assert ours == answers_of(runs[0], *asked)[0][str(runs[0])] | {"model": str(copy)}


def test_fields_of_prompts_that_are_not_read_are_told(runs, tmp_path, capsys):
    """The warning is on stderr: programs read stdout."""
    file = tmp_path / "ask.jsonl"
    file.write_text(
        '{"instruction": "Say 1.", "inputs": "2", "output": "1"}\n{"instruction": "Say 1.", "id": 7}\n'
    )
    asked = [str(runs[0]), "--prompts", str(file), "--max_new_tokens", "1", "--compare", "false", "--json"]
    assert generate.main(asked) == 0
    shown = capsys.readouterr()
    assert shown.err == "--prompts: fields that are not read: inputs, id\n"
    assert [json.loads(line)["prompt"]["instruction"] for line in shown.out.splitlines()] == ["Say 1."] * 2


def test_rows_with_the_data_s_names_as_prompts(runs, tmp_path, capsys):
    copy, file = shutil.copytree(runs[0], tmp_path / "copy"), tmp_path / "ask.jsonl"
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("columns: null", "columns: instruction=ask,output=reply"))
    file.write_text('{"ask": "Add.", "reply": "3", "id": 7}\n{"instruction": "Add.", "output": "3"}\n')
    asked = [str(copy), "--prompts", str(file), "--max_new_tokens", "1", "--compare", "false", "--json"]
    assert generate.main(asked) == 0
    shown = capsys.readouterr()
    assert shown.err == "--prompts: fields that are not read: id\n"
    rendered = [json.loads(line)["rendered"] for line in shown.out.splitlines()]
    assert rendered == [ALPACA.format(instruction="Add.")] * 2


def test_a_run_of_stanfords_prompt_is_asked_with_it(runs, tmp_path, capsys):
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    text = (copy / "config.yaml").read_text()
    text = text.replace("dataset_format: alpaca\n", "dataset_format: alpaca_stanford\n")
    (copy / "config.yaml").write_text(text)
    asked = ["--prompt", QUESTION, "--max_new_tokens", "1", "--compare", "false", "--json"]
    assert generate.main([str(copy), *asked]) == 0
    assert json.loads(capsys.readouterr().out)["rendered"] == STANFORD.format(instruction=QUESTION)


@pytest.mark.parametrize("precision", [*slow(["bf16"]), "bf16_autocast"])
def test_other_precisions(precision, runs, tmp_path, answers_of):
    """The precision is that of training, or --precision; only rounding differs."""
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    text = (copy / "config.yaml").read_text()
    assert "precision: auto" in text
    (copy / "config.yaml").write_text(text.replace("precision: auto", f"precision: {precision}"))
    auto = answers_of(copy, *ASKED)[0]
    assert {a["tokens"] for a in auto.values()} == {NEW}
    if precision == "bf16":
        assert answers_of(runs[0], *ASKED, "--precision", "bf16")[0]["base"] == auto["base"]
    assert (
        answers_of(copy, *ASKED, "--precision", "fp32")[0]["base"] == answers_of(runs[0], *ASKED)[0]["base"]
    )


# layers


@pytest.mark.parametrize("quantizer", [None, NF4(), HQQ(4)], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_switched_off_a_layer_is_its_base(kind, quantizer):
    """The same for a released layer, with the bias that DoRA moved."""
    weight, bias, x = torch.randn(O, I), torch.randn(O), torch.randn(5, I)
    linear = torch.nn.Linear(I, O)
    base = Linear4bit(linear, torch.float32, quantizer) if quantizer else linear
    layer = dora(base) if kind == "dora" else LoRALinear(base, (O, I), R, ALPHA / R, 0.0, torch.float32)
    fill_layer(layer, weight, bias)
    dequantized = base.weight.detach().clone()
    expected, tuned = x @ dequantized.T + bias, layer(x)
    with adapters_off(layer):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert (tuned - expected).abs().max() > 0.1
    assert torch.equal(layer(x), tuned)
    torch.testing.assert_close(layer.unwrap_base()(x), expected, rtol=1e-5, atol=1e-5)


def test_the_norm_is_taken_once_while_weights_are_fixed(monkeypatch):
    layer = fill_layer(
        dora(Linear4bit(torch.nn.Linear(I, O), torch.float32, NF4())), torch.randn(O, I), torch.zeros(O)
    )
    x, taken, original = torch.randn(5, I), [], models.dora.factored_norm
    expected = layer(x)
    monkeypatch.setattr(models.dora, "factored_norm", lambda *a: (taken.append(1), original(*a))[1])
    with torch.inference_mode(), cached_norms(layer):
        assert all(torch.equal(layer(x), expected) for _ in range(3)) and len(taken) == 1
    layer.lora_B.data = layer.lora_B.data * 2
    assert isinstance(layer, DoRALinear) and layer.last_norm is None
    assert not torch.equal(layer(x), expected), "outside of cached_norms it is computed again"


# templates


@pytest.fixture
def dialogue(monkeypatch, capsys):
    """dialogue(run, lines, *argv) -> (exit status, stdout, the prompts that the model got).

    Answers are " Yo1", " Yo2" ... instead of the model's.
    """

    def dialogue(run, typed: list[str], *argv):
        given = []

        def answer(self, template, prompt, sampling, stream=None):
            given.append(template.tokenizer.decode(prompt.ids))
            return Answer(f" Yo{len(given)}", 3, True)

        monkeypatch.setattr(generation.AnsweringModels, "generate_answer", answer)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        status = generate.main([str(run), *map(str, argv)])
        return status, capsys.readouterr().out, given

    return dialogue


def test_a_conversation_in_the_chat_template(chat_run, dialogue):
    status, out, given = dialogue(
        chat_run, ["Hi", "", "Bye", "/use 0", "Who?", "/new", "Hi", "/what", "/quit", "no"]
    )
    start = "<|im_start|>system\nBe kind.<|im_end|>\n"
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    turn = asked + "{}<|im_end|>\n"
    assert status == 0 and "base answers" in out
    assert out.count("/system TEXT, /undo, /reset, /use N or /quit") == 2  # at first, and after /what
    first, second = turn.format("Hi", "Yo1"), turn.format("Bye", "Yo2")
    assert given == [
        start + asked.format("Hi"),
        start + first + asked.format("Bye"),
        start + first + second + asked.format("Who?"),
        start + asked.format("Hi"),
    ]


START, ASK = "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_is_changed_by_commands(chat_run, dialogue):
    """The system prompt is in front of all turns from then on; /undo takes a question and its answer away."""
    typed = ["Hi", "/system Be brief.", "Bye", "/undo", "So?", "/undo", "/undo", "/undo", "A", "/system"]
    _, out, given = dialogue(
        chat_run, [*typed, "B", "/system Be loud.", "/reset", "C"], "--system", "Be odd."
    )
    first, brief = ASK.format("Hi") + "Yo1<|im_end|>\n", START.format("Be brief.")
    assert given == [
        START.format("Be odd.") + ASK.format("Hi"),
        brief + first + ASK.format("Bye"),
        brief + first + ASK.format("So?"),
        brief + ASK.format("A"),
        START.format("Be kind.")
        + ASK.format("A")
        + "Yo4<|im_end|>\n"
        + ASK.format("B"),  # the template's own
        START.format("Be loud.") + ASK.format("C"),
    ]
    assert out.count("the last question is taken back") == 3 and out.count("no question to take back") == 1


def test_a_dialogue_is_undone(runs, dialogue):
    typed = ["Hi", "Bye", "/undo", "So", "/system Be brief."]
    _, out, given = dialogue(runs[0], typed, "--dataset_format", "guanaco")
    assert given[2] == "<s>### Human: Hi### Assistant: Yo1### Human: So### Assistant:"
    assert "/system: only conversations have a system prompt" in out


def test_the_system_prompt_of_each_question(chat_run, tmp_path, capsys):
    """Also in place of a row's own. The prompt of a conversation ends before its last answer."""
    rows, turns = tmp_path / "rows.jsonl", [{"role": "user", "content": text} for text in ("Hi", "So?")]
    yes = {"role": "assistant", "content": "Yes"}
    conversations = [[turns[0]], [{"role": "system", "content": "Own."}, turns[0], yes, turns[1], yes]]
    rows.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations))
    asked = [
        "--prompt",
        "Bye",
        "--prompts",
        str(rows),
        "--max_new_tokens",
        "1",
        "--compare",
        "false",
        "--json",
    ]

    def prompts(*more: str) -> list[str]:
        assert generate.main([str(chat_run), *asked, *more]) == 0
        return [json.loads(line)["rendered"] for line in capsys.readouterr().out.splitlines()]

    history = ASK.format("Hi") + "Yes<|im_end|>\n" + ASK.format("So?")
    assert prompts()[2] == START.format("Own.") + history
    brief = START.format("Be brief.")
    assert prompts("--system", "Be brief.") == [
        brief + ASK.format("Bye"),
        brief + ASK.format("Hi"),
        brief + history,
    ]


def test_answers_that_repeat_a_word_are_cut_on_the_terminal(chat_run, monkeypatch, capsys):
    text = "A goose" + " goose" * 40
    monkeypatch.setattr(generation.AnsweringModels, "generate_answer", lambda *_: Answer(text, 41, False))
    asked = [str(chat_run), "--prompt", "Hi", "--compare", "false"]
    assert generate.main(asked) == 0
    assert "tuned: A goose goose goose ... (repeated) ...\n" in capsys.readouterr().out
    assert generate.main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["text"] == text


def test_the_template_s_end_of_a_turn_ends_an_answer(chat_run):
    template = make_template(open_run(chat_run), "auto")
    assert {template.tokenizer.decode([t]) for t in template.stop_ids} == {"</s>", "<|im_end|>"}


def test_a_conversation_between_markers(runs, dialogue):
    _, _, given = dialogue(runs[0], ["Hi", "Bye"], "--dataset_format", "guanaco")
    assert given == [
        "<s>### Human: Hi### Assistant:",
        "<s>### Human: Hi### Assistant: Yo1### Human: Bye### Assistant:",
    ]


def test_questions_one_by_one(runs, dialogue):
    _, out, given = dialogue(runs[0], ["Hi", "Bye"])
    assert given == ["<s>" + ALPACA.format(instruction=text) for text in ("Hi", "Bye")]
    assert "each question by itself" in out


def test_a_conversation_beyond_the_model(chat_run, dialogue):
    status, out, given = dialogue(chat_run, ["x" * 600, "Hi"])
    assert status == 0 and len(given) == 1 and "/reset begins another" in out


def test_rows_of_the_data_as_prompts(runs, chat_run, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "Add.", "input": "1 2", "output": "never shown"}) + '\n"Hi"\n')
    assert generate.main([str(runs[0]), "--prompts", str(rows), "--json", "--max_new_tokens", "2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["rendered"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert first["prompt"]["instruction"] == "Add." and "never shown" not in first["rendered"]
    assert second["rendered"] == ALPACA.format(instruction="Hi")
    turns = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "Hi"), ("assistant", "Yo"))]
    rows.write_text(json.dumps({"messages": turns}))
    assert generate.main([str(chat_run), "--prompts", str(rows), "--json", "--max_new_tokens", "2"]) == 0
    rendered = json.loads(capsys.readouterr().out)["rendered"]
    assert (
        rendered == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


# streaming and the terminal


def test_what_is_streamed_is_the_answer(runs, answers_of, monkeypatch, capsys):
    plain = answers_of(runs[0], *ASKED)[0][str(runs[0])]["text"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    assert generate.main([str(runs[0]), "--max_new_tokens", str(NEW)]) == 0
    out = capsys.readouterr().out
    assert f"> {finished.generate.make_printable(plain)} ...\n> \n" in out


@pytest.mark.parametrize("text", ["Yo### Human: what", "Yo ### Hum", "Yo", "### Human:", "Yo###"])
def test_a_stream_ends_before_the_next_question(text, runs):
    tokenizer = AutoTokenizer.from_pretrained(open_run(runs[0]).base)
    template, pieces = make_template(open_run(runs[0]), "guanaco"), []
    stream = AnswerStreamer(template, pieces.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for token in [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == text.partition("### Human:")[0]


@pytest.mark.parametrize("where", ["at the prompt", "in an answer"])
def test_ctrl_c_leaves(where, runs, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    if where == "at the prompt":
        monkeypatch.setattr("builtins.input", interrupted)
    else:
        monkeypatch.setattr(generation.AnsweringModels, "generate_answer", interrupted)
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert generate.main([str(runs[0])]) == 0
    assert "Traceback" not in capsys.readouterr().err
    if where == "in an answer":
        assert generate.main([str(runs[0]), "--prompt", "Hi"]) == 130


def test_columns():
    texts = {"base": "one two three four five", "tuned": "日本語日本語 x\n\nabcdefghijklm"}
    assert finished.generate.format_columns(texts, 23).splitlines() == [
        "base       | tuned",
        "---------- | ----------",
        "one two    | 日本語日本",
        "three four | 語 x",
        "five       |",
        "           | abcdefghij",
        "           | klm",
    ]


@pytest.mark.parametrize(
    ("tty", "columns", "beside"), [(True, 80, True), (True, 60, False), (False, 200, False)]
)
def test_columns_need_room(tty, columns, beside, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = finished.generate.format_answers("Q?", {"base": "a", "tuned": "b\nc\x1b[2J"})
    assert (
        ("a" in shown.splitlines()[3]) if beside else shown == "prompt: Q?\nbase: a\ntuned: b\n    c\ufffd[2J"
    )


def test_a_conversation_takes_nothing_down_before_the_answer(chat_run):
    conversation = Conversation(make_template(open_run(chat_run), "auto"))
    _, first = conversation.make_prompt("Hi")
    assert conversation.make_prompt("Hi")[1] == first
