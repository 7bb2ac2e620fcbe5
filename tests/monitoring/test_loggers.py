"""What wandb and TensorBoard get of a run, read back from their own files."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from data.images import ImageRef
from files.output_folder import check_output, clear_output
from monitoring.loggers import NoLogger, Sample, public_facts, public_options
from monitoring.metrics import Metrics
from monitoring.progress import ProgressLines
from monitoring.sample_images import find_copies, write_copies
from monitoring.tensorboard_logger import TensorboardLogger
from monitoring.tracking import Tracker, make_tracker
from monitoring.wandb_logger import WandbLogger
from options.errors import UserError
from options.train import parse
from tests.helpers.here import SINGLE_RANK
from tests.helpers.programs import ROOT, metrics, small
from tests.helpers.resuming import fill
from tests.helpers.runs import full_run, make_job
from tests.helpers.wandb_files import wandb_records

SAMPLED = "--eval_share 0.2 --eval_every 2 --sample_every 2 --sample_tokens 4 --world_size 1".split()
SECRET = "hf_secret0token"


@pytest.fixture
def start(checkpoints, alpaca_file, one_rank, tmp_path):
    """start(log_to, ...) -> RUN of 4 steps with two evaluations and three samplings of three prompts."""

    def start(log_to: str, *more: str) -> Path:
        args = small(checkpoints, alpaca_file, tmp_path / "out", "--log_to", log_to, *SAMPLED, *more)
        one_rank(full_run, make_job(SINGLE_RANK, args))
        return tmp_path / "out"

    return start


def samples_of(folder: Path) -> list[list]:
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return [[line["step"], line["prompt"], line["text"]] for line in lines]


def best_of(folder: Path) -> tuple[float, int]:
    return min((m["eval_loss"], m["step"]) for m in metrics(folder) if "eval_loss" in m)


def test_wandb_gets_steps_samples_best_and_facts(start, monkeypatch):
    """And no token, and no path of this machine: of options only the last parts."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    folder = start("wandb", "--project_name", "p", "--name", "n", "--group", "g")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file)
    (described,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (described.project, described.display_name, described.run_group) == ("p", "n", "g")
    items = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    history = [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in row} for row in items]
    logged = {row["_step"]: row for row in history}
    assert list(logged) == [0, 1, 2, 3, 4] and len(history) == 5
    for line in metrics(folder):
        assert {name: logged[line["step"]][name] for name in line if name != "step"} == {
            name: value for name, value in line.items() if name != "step"
        }
        assert ("eval_loss" in logged[line["step"]]) == ("eval_loss" in line)
    summary = {u.key: json.loads(u.value_json) for r in records for u in r.summary.update if u.key}
    assert (summary["best_eval_loss"], summary["best_step"]) == best_of(folder)
    updates = [described.config]
    updates += [r.config for r in records if r.WhichOneof("record_type") == "config"]
    config = {u.key: json.loads(u.value_json) for part in updates for u in part.update}
    facts = json.loads((folder / "run.json").read_text())
    for section in ("data", "model", "hardware", "versions"):
        assert config[section] == facts[section]
    for name, gib in facts["memory"].items():
        assert summary[f"memory_{name}"] == gib
    assert (config["train_type"], config["lora_rank"]) == ("bnb_dora", 8)
    assert "first_rows" in facts and "first_rows" not in config
    assert (config["output_dir"], config["dataset"]) == ("out", "alpaca.jsonl")
    tables = [json.loads(p.read_text()) for p in sorted(file.parent.glob("files/media/table/*.json"))]
    longest = max(tables, key=lambda table: len(table["data"]))
    assert longest["columns"] == ["step", "prompt", "answer"] and len(tables) == 3
    assert longest["data"] == samples_of(folder) and len(longest["data"]) == 9
    sent = [file, *(p for p in file.parent.glob("files/**/*") if p.is_file())]
    for part in (SECRET, str(folder), str(ROOT), sys.executable):
        assert not [p for p in sent if part.encode() in p.read_bytes()], part


def events_of(folder: Path):
    """Return TensorBoard's reader of the events below a RUN; it keeps all of them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0})
    return reader.Reload()


def texts_of(reader, tag: str) -> dict[int, str]:
    return {e.step: e.tensor_proto.string_val[0].decode() for e in reader.Tensors(f"{tag}/text_summary")}


def test_tensorboard_gets_every_step(start):
    folder = start("tensorboard")
    reader, lines = events_of(folder), metrics(folder)
    assert set(reader.Tags()["scalars"]) == {name for line in lines for name in line} - {"step"}
    for name in reader.Tags()["scalars"]:
        found = {e.step: e.value for e in reader.Scalars(name)}
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert found == pytest.approx(expected, rel=1e-6) and len(reader.Scalars(name)) == len(expected)
    options = yaml.safe_load(texts_of(reader, "options")[0])
    assert (options["train_type"], options["output_dir"]) == ("bnb_dora", "out")
    assert json.loads(texts_of(reader, "facts")[0])["versions"]["torch"] == torch.__version__
    samples = samples_of(folder)
    for i in range(3):
        shown = texts_of(reader, f"samples/{i + 1}")
        assert list(shown) == [0, 2, 4]
        for step, prompt, answer in samples[i::3]:
            indented = ["".join(f"    {n}" for n in t.splitlines(True)) for t in (prompt, answer)]
            assert shown[step] == "prompt\n\n{}\n\nanswer\n\n{}".format(*indented)


def test_no_folder_of_this_machine_is_sent(tmp_path, monkeypatch):
    """Each set of a mixture, the adapter, and names within reasons are sent as their last part."""
    secret = tmp_path / "secret folder"
    (secret / "chats").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "chats/part-1.jsonl"):
        (secret / name).write_text("{}\n")
    monkeypatch.chdir(secret)
    mixture = f"toy*0.5,{secret}/b.jsonl*0.25,chats*0.25"
    given = {"dataset": mixture, "eval_dataset": f"{secret}/a.jsonl,{secret}/chats/part-*.jsonl"}
    given |= {
        "sample_prompts": f"{secret}/chats/",
        "adapter": f"{secret}/run",
        "output_dir": "../secret folder/out",
    }
    options = public_options(parse([f"--{name}={value}" for name, value in given.items()])[0])
    expected = {"dataset": "toy*0.5,b.jsonl*0.25,chats*0.25", "eval_dataset": "a.jsonl,part-*.jsonl"}
    expected |= {"sample_prompts": "chats", "adapter": "run", "output_dir": "out"}
    assert {name: options[name] for name in given} == expected
    hub = "owner/set:main:train@v1,owner/other"
    assert public_options(parse(["--dataset", hub])[0])["dataset"] == hub
    names = ["toy", str(secret / "b.jsonl"), "../secret folder/chats", f"{secret}/gone.jsonl"]
    reasons = [{"reason": f"no answer, in {name}", "rows": 1, "first": [1]} for name in names]
    facts = {"data": {"sets": [{"name": name} for name in names], "drop_reasons": reasons}}
    sent = public_facts(facts | {"model": {"adapter": f"{secret}/run"}, "first_rows": [{"set": names[1]}]})
    short = ["toy", "b.jsonl", "chats", "gone.jsonl"]
    assert [each["name"] for each in sent["data"]["sets"]] == short
    assert [each["reason"] for each in sent["data"]["drop_reasons"]] == [f"no answer, in {n}" for n in short]
    assert sent["model"] == {"adapter": "run"} and "secret" not in json.dumps([sent, options])
    hub_adapter = {"model": {"adapter": "owner/adapter@main"}}
    assert public_facts(hub_adapter) == hub_adapter


def write_sample(folder: Path, colors: list[tuple]) -> Sample:
    """Return a sample whose images have these colors, with copies in the RUN, and write it there."""
    refs = []
    for color in colors:
        path = folder / f"{'-'.join(map(str, color))}.png"
        Image.new("RGB", (300, 150), color).save(path)
        refs.append(ImageRef(str(path), 0, None, 300, 150, "", name=f"/home/me/{path.name}"))
    images = write_copies(folder, refs)
    sample = Sample(f"q{len(colors)}", "a", find_copies(folder, images))
    line = {"step": 0, "prompt": sample.prompt, "text": "a", "images": images}
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return sample


COLORS = [(200, 0, 0), (0, 0, 200)]


def test_wandb_gets_the_images_of_samples(tmp_path, monkeypatch):
    """Also those of samples before a resume; a name that is not one of a copy is none."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    write_sample(tmp_path, COLORS[:1])
    secret = [{"label": "x", "copy": f"../{COLORS[0]}.png"}]
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 0, "prompt": "q", "text": "a", "images": secret}) + "\n")
    config, _ = parse(["--output_dir", str(tmp_path), "--log_to", "wandb"])
    logger = WandbLogger(config, tmp_path, None)
    both = write_sample(tmp_path, COLORS)
    for number in (1, 2):
        logger.log_samples(number, [both, Sample("q0", "a")])
    logger.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    tables = [r.artifact for r in wandb_records(file) if r.WhichOneof("record_type") == "artifact"]
    files = {each.path: Path(each.local_path) for each in tables[-1].manifest.contents}
    table = json.loads(files.pop("samples.table.json").read_text())
    assert table["columns"] == ["step", "prompt", "answer", "image 1", "image 2"]
    colors = []
    for row in table["data"]:
        cells = [cell for cell in row[3:] if cell]
        assert all(
            "/" not in cell["caption"] and (cell["width"], cell["height"]) == (160, 80) for cell in cells
        )
        colors.append([Image.open(files[cell["path"]]).getpixel((9, 9)) for cell in cells])
    rounded = [[tuple(round(value, -1) for value in color) for color in row] for row in colors]
    assert rounded == [COLORS[:1], [], COLORS, [], COLORS, []]


def test_tensorboard_gets_the_images_of_samples_once(tmp_path):
    pytest.importorskip("tensorboard")
    config, _ = parse(["--output_dir", str(tmp_path)])
    logger = TensorboardLogger(config, tmp_path, steps_done=0)
    both = write_sample(tmp_path, COLORS)
    for number in (1, 2):
        logger.log_samples(number, [Sample("q0", "a"), both])
    logger.finish()
    reader = events_of(tmp_path)
    assert list(texts_of(reader, "samples/2")) == [1, 2]
    assert reader.Tags()["images"] == ["samples/2/image_1", "samples/2/image_2"]
    for tag, color in zip(reader.Tags()["images"], COLORS, strict=True):
        (event,) = reader.Images(tag)
        shown = Image.open(io.BytesIO(event.encoded_image_string))
        assert event.step == 1 and shown.size == (160, 80)
        assert tuple(round(value, -1) for value in shown.getpixel((9, 9))) == color


def step(number: int, loss: float = 1.0, **more) -> Metrics:
    values = dict.fromkeys(("epoch", "lr", "grad_norm", "step_seconds", "tokens_per_second"), 1.0)
    values |= dict.fromkeys(("tokens", "trained_tokens", "memory_allocated_gib", "memory_reserved_gib"), 1)
    return Metrics(step=number, loss=loss, **values, **more)


def losses_of(folder: Path) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in events_of(folder).Scalars("loss")]


def test_a_resumed_run_doubles_no_step(tmp_path):
    """A start that was killed after step 5 goes on from the checkpoint of step 3."""
    pytest.importorskip("tensorboard")
    config, _ = parse(["--output_dir", str(tmp_path)])
    for steps, loss in (((1, 2, 3, 4, 5), 1.0), ((4, 5, 6), 2.0)):
        logger = TensorboardLogger(config, tmp_path, steps_done=steps[0] - 1)
        for number in steps:
            logger.log(step(number, loss))
            logger.log_samples(number, [Sample("q", f"{loss}")])
        logger.finish()
    assert losses_of(tmp_path) == [(i, 1.0) for i in (1, 2, 3)] + [(i, 2.0) for i in (4, 5, 6)]
    assert list(texts_of(events_of(tmp_path), "samples/1")) == [1, 2, 3, 4, 5, 6]


def test_a_bad_step_has_no_loss(tmp_path, caplog):
    """As in metrics.jsonl, where it is null; nothing is printed of it."""
    pytest.importorskip("tensorboard")
    config, _ = parse(["--output_dir", str(tmp_path)])
    logger = TensorboardLogger(config, tmp_path, steps_done=0)
    for number, loss in ((1, 1.0), (2, math.nan), (3, 3.0)):
        logger.log(step(number, loss, bad_steps=1))
    logger.finish()
    assert losses_of(tmp_path) == [(1, 1.0), (3, 3.0)] and not caplog.records
    assert [e.step for e in events_of(tmp_path).Scalars("bad_steps")] == [1, 2, 3]


def test_a_full_disk_costs_a_warning(small_disk, capsys):
    """Steps are logged again once there is room."""
    pytest.importorskip("tensorboard")
    config, _ = parse(["--output_dir", str(small_disk), "--log_to", "tensorboard"])
    tracker = make_tracker(config, 0, 9, {})
    tracker.log(step(1))
    tracker.logger.writer.flush()
    fill(small_disk)
    tracker.log(step(2))
    tracker.log_samples(2, [Sample("q", "a")])
    (small_disk / "others").unlink()
    tracker.log(step(3))
    tracker.finish()
    printed = capsys.readouterr().out
    assert printed.count("WARNING: --log_to tensorboard: No space left") == 2, printed
    assert [number for number, _ in losses_of(small_disk)] == [1, 3]


def test_a_disk_that_fills_up_during_a_write(tmp_path, monkeypatch):
    """It ends the writing thread, whose error the next step has; then a new file is begun."""
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    config, _ = parse(["--output_dir", str(tmp_path)])
    logger = TensorboardLogger(config, tmp_path, steps_done=0)
    logger.log(step(1))
    logger.writer.flush()
    with monkeypatch.context() as patch:
        patch.setattr("threading.excepthook", lambda args: None)

        def fail(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(RecordWriter, "write", fail)
        with pytest.raises(OSError, match="No space left"):
            for _ in range(1000):
                logger.log(step(2))
    logger.log(step(3))
    logger.finish()
    assert [number for number, _ in losses_of(tmp_path)] == [1, 3]


def test_events_of_an_earlier_run_are_removed(tmp_path):
    """They would be drawn as the new run's; a link is not followed."""
    (tmp_path / "out" / "tensorboard").mkdir(parents=True)
    events = tmp_path / "out" / "tensorboard" / "events.out.tfevents.1.host.2.0"
    for path in (events, events.with_name("notes")):
        path.touch()
    clear_output(tmp_path / "out")
    assert [p.name for p in events.parent.iterdir()] == ["notes"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").symlink_to(events.parent)
    with pytest.raises(UserError, match="its tensorboard is a symbolic link"):
        check_output(tmp_path / "other", overwrite=True)


class Recorder(NoLogger):
    """Records what is logged as the best step; the disk may be full for single steps."""

    def __init__(self, full_at: int = 0):
        self.best, self.full_at = [], full_at

    def log(self, metrics):
        if metrics.step == self.full_at:
            raise OSError(28, "No space left on device")

    def log_best(self, metrics):
        self.best.append((metrics.step, metrics.eval_loss))


def test_the_best_evaluation(tmp_path, capsys):
    """The first of equal ones; a NaN is none. A resumed run tells a new logger of it."""
    (tmp_path / "metrics.jsonl").touch()
    losses = [None, 2.0, math.nan, 1.5, 1.5, 1.6, 1.0, 1.2, 0.5]
    steps = [step(i, eval_loss=loss) for i, loss in enumerate(losses, 1)]
    logger = Recorder(full_at=7)
    tracker = Tracker(tmp_path, [], ProgressLines(9, None), logger)
    for each in steps:
        tracker.log(each)
    assert logger.best == [(2, 2.0), (4, 1.5), (9, 0.5)]  # step 7 could not be logged
    assert capsys.readouterr().out.count("it lacks this step, training goes on") == 1
    resumed = Tracker(tmp_path, steps[:8], ProgressLines(9, None), again := Recorder())
    resumed.log_facts("{}")
    resumed.log(steps[8])
    assert again.best == [(7, 1.0), (9, 0.5)]
