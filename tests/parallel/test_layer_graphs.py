"""Replayed layers compute what layers compute; which calls are replayed.

Without a GPU a replay calls the recorded function again (tests/helpers/layer_graphs.py). So all but CUDA's
own part is tested here; tests/gpu/test_layer_graphs.py has the rest.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn

from launch.memory import PeakMemory
from options.train import parse
from parallel import layer_graphs
from parallel.layer_graphs import (
    CALLS_BEFORE,
    MARKS_WATCHED,
    MAX_COUNTED,
    MAX_RECORDINGS,
    GpuWaits,
    PredictedMemory,
)
from parallel.layer_kinds import describe_kind, put_together, take_apart
from parallel.recorded_layer import NotRecordable
from quantization.layer import round_matmuls
from tests.helpers.compiled import EXTRA_GRAPHS, LAYERS
from tests.helpers.layer_graphs import Graphed, Layer, RepeatedCalls, graphed_run
from tests.helpers.layers import quantized
from tests.helpers.parity import arguments, assert_same

STEPS = ["--max_steps", "6", "--num_epochs", "4"]
# A recording has a forward and a backward. The first layer, whose input has no gradient, has a recording of
# its own, and the layer is compiled for it.
GRAPHS, COMPILED = 4, 2
COMPARED = 3  # replays to compare a layer: forward, another forward, and backward
# Each layer is compared in the fourth of six steps, and replayed from then on, in forward and backward.
REPLAYS = (COMPARED + 3 * 2) * LAYERS


@pytest.mark.parametrize(
    ("train_type", "options"),
    [
        ("bnb_dora", "--use_gradient_checkpointing true"),
        pytest.param("qlora", "--use_gradient_checkpointing false", marks=pytest.mark.slow),
    ],
)
def test_replayed_layers_follow_plain_ones(train_type, options, checkpoints, even_rows, plain_run, one_rank):
    args = [*arguments(checkpoints("llama_bias"), even_rows, train_type), "--batch_size", "4", *STEPS]
    expected = plain_run([*args, "--use_gradient_checkpointing", "false"])
    results, *counts, lines = one_rank(graphed_run, [*args, *options.split()])[0]
    assert counts == [GRAPHS, COMPILED + EXTRA_GRAPHS, REPLAYS], lines
    assert_same(expected, results)


# test_replayed_layers_follow_plain_ones has whole layers.
@pytest.mark.slow
def test_units_are_replayed_without_another_compilation(checkpoints, even_rows, plain_run, two_ranks):
    """FSDP gathers parameters to new addresses, and passes a layer's input on as a view."""
    args = [*arguments(checkpoints("llama"), even_rows, "qlora"), *STEPS]
    expected = plain_run([*args, "--batch_size", "4", "--use_gradient_checkpointing", "false"])
    for results, *counts, lines in two_ranks(graphed_run, [*args, "--batch_size", "2"]):
        assert counts == [GRAPHS, COMPILED + EXTRA_GRAPHS, REPLAYS], lines
        assert_same(expected, results)


@pytest.mark.slow
def test_frozen_layers_are_replayed_in_forward_only(checkpoints, even_rows, plain_run, one_rank):
    """The second and the last of five layers are trained. The first has nothing to differentiate."""
    args = [
        *arguments(checkpoints("llama_bias_pro"), even_rows, "hqq_llama_pro"),
        "--batch_size",
        "4",
        *STEPS,
    ]
    expected = plain_run([*args, "--use_gradient_checkpointing", "false"])
    results, *_, replays, lines = one_rank(graphed_run, [*args, "--use_activation_cpu_offload"])[0]
    assert replays > 0 and lines == ["--cuda_graphs: layers are replayed as CUDA graphs"]
    assert_same(expected, results)


def test_layers_that_are_alike_share_a_recording():
    graphed = Graphed(Layer(), Layer(), nn.Sequential(Layer()))
    graphed.call(CALLS_BEFORE)
    assert not graphed.graphs.recordings
    graphed.call()  # recorded, compared, and replayed
    assert len(graphed.graphs.recordings) == 2 and graphed.replays == (COMPARED + 2) * 3
    graphed.call(2)
    assert graphed.replays == (COMPARED + 3 * 2) * 3


def test_a_layer_that_differs_runs_as_ever():
    graphed = Graphed(Layer(), Layer(factor=2.0))
    graphed.call(CALLS_BEFORE + 3)
    assert graphed.replays == COMPARED * 2 + 3 * 2
    assert (
        "--cuda_graphs: a layer differs from the one that is recorded: it runs without graphs"
        in graphed.lines
    )


def test_a_rounded_layer_is_of_another_kind():
    """--base_matmul: a linear whose shape does not fit stays in 16 bits."""
    layers = [quantized(torch.randn(32, 64), torch.float32) for _ in range(3)]
    round_matmuls({"": layers[2]}, "int8")
    kinds = [describe_kind(layer) for layer in layers]
    assert kinds[0] == kinds[1] != kinds[2]


def test_parameters_may_move_and_change():
    """As FSDP moves them between forward and backward, and the optimizer changes them."""
    graphed = Graphed(Layer())
    graphed.call(CALLS_BEFORE + 2)
    layer = graphed.layers[0].linear
    for _ in range(3):
        layer.weight = nn.Parameter(torch.randn(4, 4))
        graphed.call()
    assert graphed.replays == COMPARED + 5 * 2


def test_a_few_shapes_are_recorded_and_others_run_as_ever():
    graphed = Graphed(Layer())
    for rows in range(1, MAX_RECORDINGS + 3):
        graphed.call(CALLS_BEFORE + 2, rows)
    assert len(graphed.graphs.recordings) == MAX_RECORDINGS
    assert graphed.replays == MAX_RECORDINGS * (COMPARED + 2 * 2)
    assert any("more than 4 kinds of micro-batches" in line for line in graphed.lines)
    graphed.call(1, rows=99)
    assert any("micro-batches of other shapes" in line for line in graphed.lines)
    graphed.call(1, rows=1)
    assert graphed.replays == MAX_RECORDINGS * (COMPARED + 2 * 2) + 2


def test_so_many_kinds_of_calls_are_counted():
    graphed = Graphed(Layer())
    for rows in range(1, MAX_COUNTED + 5):
        graphed.call(2, rows)
    assert len(graphed.layers[0].calls) == MAX_COUNTED


def test_another_value_of_an_argument_is_another_kind_of_call():
    graphed = Graphed(Layer())
    for scale in (2.0, 3.0, torch.full((4,), 4.0)):
        graphed.call(CALLS_BEFORE + 2, scale=scale)
    assert len(graphed.graphs.recordings) == 3 and graphed.replays == 3 * (COMPARED + 2 * 2)


def test_a_layer_in_another_mode_is_another_kind_of_call():
    graphed = Graphed(Layer())
    graphed.call(CALLS_BEFORE + 1)
    before = graphed.replays
    graphed.layers[0].eval()
    graphed.call(CALLS_BEFORE)
    assert graphed.replays == before


def test_a_parameter_that_is_frozen_after_the_recording_is_an_error():
    graphed = Graphed(Layer())
    graphed.call(CALLS_BEFORE + 1)
    graphed.layers[0].linear.bias.requires_grad_(False)
    result = graphed.layers[0](torch.randn(2, 4, requires_grad=True))
    with pytest.raises(AssertionError, match="frozen"):
        result.sum().backward()


def test_auto_leaves_room_at_the_peak_so_far_and_the_predicted_one(monkeypatch):
    monkeypatch.setattr(layer_graphs, "PEAK_MEMORY", peaks := PeakMemory())
    monkeypatch.setattr(layer_graphs, "gpu_room", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    # What was used, the peak that was predicted, and what graphs take; of 100.
    cases = ((80, 0, 0, True), (80, 0, 11, False), (80, 70, 9, True), (80, 85, 6, False), (95, 0, 0, False),
             (80, 0, 0, False))  # fmt: skip
    for peak, *predicted, has_room in cases:
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda peak=peak: peak)
        assert layer_graphs._has_room(PredictedMemory(*predicted)) == has_room
    assert peaks.by_phase == {"start": 95}


def with_rate(name: str) -> nn.Module:
    layer = Layer()
    setattr(layer, name, 0.1)
    return layer


@pytest.mark.parametrize(
    ("layer", "kwargs", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), {}, "it has dropout"),
        (with_rate("residual_dropout"), {"scale": 1.0}, "it has dropout"),  # Seed-OSS and Starcoder2
        (with_rate("jitter_noise"), {"scale": 1.0}, "it has dropout"),  # Mixtral
        (Layer(), {"scale": {1}}, "it is given a set"),
        (Layer(), {"scale": torch.ones(1, device="meta")}, "it is given tensors of several devices"),
    ],
)
def test_what_cannot_be_recorded_runs_as_ever(layer, kwargs, reason):
    graphed = Graphed(layer)
    x = torch.randn(2, 4)
    with mock.patch.object(Layer, "forward", lambda self, x, scale: self.linear(x)):
        for _ in range(CALLS_BEFORE + 3):
            graphed.layers[0](x, **kwargs)
    assert graphed.lines == [f"--cuda_graphs: a layer runs without graphs: {reason}"]
    assert graphed.replays == 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "there is no memory for it"),
        (
            RuntimeError("operation not permitted when stream is capturing\nmore"),
            "operation not permitted when",
        ),
        (NotRecordable("its result is a tuple"), "its result is a tuple"),
    ],
)
def test_a_recording_that_fails_is_not_tried_again(error, reason):
    graphed = Graphed(Layer(), Layer())
    with mock.patch.object(RepeatedCalls, "record", side_effect=error) as record:
        graphed.call(CALLS_BEFORE + 3)
    assert record.call_count == 1 and graphed.replays == 0
    assert len(graphed.lines) == 1 and f"a layer runs without graphs: {reason}" in graphed.lines[0]


def test_arguments_are_put_together_again():
    x, y = torch.ones(2), torch.zeros(3, dtype=torch.int64)
    value = [(x, None, 2), {"a": y, "b": [True, "c", partial(torch.add, x, alpha=2)]}]
    tensors: list[torch.Tensor] = []
    parts = take_apart(value, tensors)
    assert [t is each for t, each in zip(tensors, (x, y, x), strict=True)] == [True] * 3
    others = [t + 1 for t in tensors]
    again = put_together(parts, iter(others))
    assert again[0] == (others[0], None, 2) and again[1]["a"] is others[1]
    assert again[1]["b"][:2] == [True, "c"] and torch.equal(again[1]["b"][2](x), others[2] + 2 * x)
    assert take_apart(value, []) == parts and hash(parts) == hash(take_apart(value, []))
    for other in ([(x, None, 3), value[1]], [(x, None, 2.0), value[1]], [(y, None, 2), value[1]]):
        assert take_apart(other, []) != parts
    with pytest.raises(NotRecordable, match="it is given a set"):
        take_apart([{1}], [])


class NoisyLayer(Layer):
    def forward(self, x):
        return super().forward(x) + torch.rand_like(x)


def test_a_layer_with_hidden_dropout_is_refused_and_the_run_draws_what_it_did():
    drawn = []
    for calls_before in (CALLS_BEFORE, 100):
        torch.manual_seed(0)
        graphed = Graphed(NoisyLayer())
        with mock.patch.object(layer_graphs, "CALLS_BEFORE", calls_before):
            drawn.append([graphed.layers[0](torch.ones(2, 4)).sum() for _ in range(CALLS_BEFORE + 3)])
    assert drawn[0] == drawn[1]


def test_the_memory_of_a_recording_that_failed_is_freed():
    graphed = Graphed(Layer())
    with mock.patch.object(RepeatedCalls, "record", side_effect=torch.OutOfMemoryError("CUDA out of memory")):
        graphed.call(CALLS_BEFORE + 1)
    assert list(graphed.graphs.recordings.values()) == [None] and not graphed.graphs.slots.buffers


def test_first_layers_have_as_many_shapes_as_others():
    """Their input needs no gradient, so they have recordings of their own."""
    graphed = Graphed(Layer())
    for rows in range(1, MAX_RECORDINGS + 1):
        for needs_gradient in (True, False):
            for _ in range(CALLS_BEFORE + 1):
                graphed.layers[0](torch.randn(rows, 4, requires_grad=needs_gradient))
    assert len(graphed.graphs.recordings) == 2 * MAX_RECORDINGS and len(graphed.lines) == 2, graphed.lines


def test_auto_records_when_the_gpu_waits_and_has_room():
    waits, event = GpuWaits(), mock.Mock()
    with mock.patch.object(torch.cuda, "Event", return_value=event):
        waits.mark()
    for i in range(MARKS_WATCHED):
        event.query.return_value = i > MARKS_WATCHED // 2  # one less than half
        waits.mark()
    assert not waits.are_frequent()
    fast = Graphed(Layer())
    fast.graphs.waits = waits
    with mock.patch.object(GpuWaits, "mark", return_value=None):
        fast.call(CALLS_BEFORE + 3)
    assert not fast.graphs.recordings
    assert fast.lines == ["--cuda_graphs: the GPU rarely waits for the host: layers run without"]
    event.query.return_value = True
    waits.mark()
    assert waits.are_frequent()
    event.reset_mock()
    result = 2 * torch.ones(1, requires_grad=True)
    waits.mark_backward(result)
    assert not event.record.called  # until backward comes to the layer
    result.backward()
    assert event.query.called and event.record.called
    graphed = Graphed(Layer())
    graphed.graphs.waits = waits
    with mock.patch.object(layer_graphs, "_has_room", return_value=False) as asked:
        graphed.call(CALLS_BEFORE + 2)
    assert not graphed.graphs.recordings and "memory free" in graphed.lines[0]
    assert asked.call_count == 1 and not waits.are_frequent()  # it costs time, so waits are counted anew
    waits.waited.extend([True] * MARKS_WATCHED)
    with mock.patch.object(layer_graphs, "_has_room", return_value=True):
        graphed.call(2)
    assert graphed.replays == COMPARED + 2 * 2


@pytest.mark.parametrize(
    ("options", "world", "expected"),
    [
        ("", 1, "auto"),
        ("--cuda_graphs auto", 2, None),
        ("--profile", 1, None),
        ("--cuda_graphs true --profile", 2, "always"),
        ("--cuda_graphs false", 1, None),
    ],
)
def test_which_runs_have_graphs(options, world, expected, capsys):
    rank = mock.Mock(rank=0, world=world, device=torch.device("cuda"))
    config, _ = parse(["--model_name", "m", "--train_type", "qlora", "--verbose", *options.split()])
    with mock.patch.object(layer_graphs, "GraphMemory"):
        graphs = layer_graphs.make_layer_graphs(config, rank, PredictedMemory(5.0, 1.0))
    assert (graphs and ("auto" if graphs.waits else "always")) == expected
    assert not graphs or graphs.predicted == (5.0, 1.0)
    reason = {2: "several ranks", 1: "--profile is given"}[world]
    assert (reason in capsys.readouterr().out) is (expected is None and "false" not in options)
