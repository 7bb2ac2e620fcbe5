"""Graph passes for decoder layers, run by the hooks that torch's Inductor has for them.

Linears that read one x (the projections of attention, gate and up) each repeat what could be done once. Each
multiplies x with its own A, a matmul so narrow that reading x is its cost. In backward A's gradient reads x
again, and each linear adds its own gradient of x to the others'. In the modules, which transformers calls one
by one, the linears know nothing of each other. A layer's graph has all of them. There the passes merge their
A's into one, and their backward operators into one each (quantization/operators.py takes any number). With
checkpointing that saves a dozen kernels in each layer that go through all of x, or of its gradient.

The rewritten graph computes the same up to rounding: the gradients of x are summed within the matmuls, not
after them.

DoRA's magnitudes of gate and up need sums over all tokens of outputs times gradients of outputs. These are
the widest tensors of a layer. When the sums come last, all four are in memory at once, beside the gradient
that they are computed from. In backward's graph, a pass moves each such sum before the gradient, to the point
where the gradient's inputs are available. Then the gradient takes the memory of an output.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node, map_arg

from quantization import dora_operators, grouped_operators
from quantization import operators as linear4bit
from quantization.operator_registry import WITHOUT_GRADIENT

ops = torch.ops
SUM, MULTIPLY = ops.aten.sum.dim_IntList, ops.aten.mul.Tensor
LINEAR = ops.fsdp_finetune.linear4bit.default
ADAPTER_BACKWARD = ops.fsdp_finetune.adapter_backward.default
MARK_SAVED = ops.fsdp_finetune.mark_saved.default
LINEAR_BACKWARD = ops.fsdp_finetune.linear4bit_backward.default
VIEWS = {ops.aten.view.default, ops.aten._unsafe_view.default, ops.aten.reshape.default}
COPIES = {ops.aten.clone.default, ops.aten.alias.default}  # Inductor removes most of them later
CASTS = {ops.prims.convert_element_type.default, ops.aten._to_copy.default}


def _hash_files() -> bytes:
    """Return a hash of this file and the operators': a cached graph has their gradients as of then."""
    modules = linear4bit, dora_operators, grouped_operators
    return get_hash_for_files((__file__, *(module.__file__ for module in modules)))


class JointGraphPass(CustomGraphPass):
    """The pass over the joint graph of a layer's forward and backward, before it is partitioned."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place: merge casts, projections and gradients of linears that read one x."""
        unmark_inputs(graph)
        merge_casts(graph)
        for linears in _group_by_input(graph, LINEAR, x_argument=0, a_argument=9):
            merge_projections(graph, linears)
        for backwards in _group_by_input(graph, ADAPTER_BACKWARD, x_argument=1, a_argument=3):
            merge_adapter_backwards(graph, backwards)

    def uuid(self) -> bytes:
        return _hash_files()


class PartitionedGraphPass(CustomGraphPass):
    """The pass over the graph of forward, and over that of backward."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place: hoist sums, drop `mark_saved`, use operators without a gradient."""
        for total in graph.find_nodes(op="call_function", target=SUM):
            if total.args[1] == [0] and _operand(total, 0).target is MULTIPLY:
                hoist_sum(graph, total)
        for node in graph.find_nodes(op="call_function", target=MARK_SAVED):  # its tensor is saved by now
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        for node in graph.nodes:
            node.target = WITHOUT_GRADIENT.get(node.target, node.target)

    def uuid(self) -> bytes:
        return _hash_files()


def hoist_sum(graph: Graph, total: Node) -> None:
    """Hoist a sum of products over all tokens, with its elementwise factors, to just after its last input.

    Keep it where it is if its factors are inputs themselves, or come from a result with fewer elements: a
    norm's gradient, with one element for each token, is better computed once.
    """
    product = _operand(total, 0)
    elementwise, sources = {product}, set[Node]()
    pending, size = [product], product.meta["val"].numel()
    while pending:
        for node in pending.pop().all_input_nodes:
            if not _is_elementwise(node):
                sources.add(node)
            elif node not in elementwise:
                elementwise.add(node)
                pending.append(node)
    has_narrow_source = any(node.op != "placeholder" and _numel(node) != size for node in sources)
    computed = {node for node in elementwise if node.target not in VIEWS | CASTS | COPIES}
    if has_narrow_source or len(computed) == 1:  # the product itself
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    insertion_point = max(sources, key=order.__getitem__).next
    while insertion_point.op == "placeholder":
        insertion_point = insertion_point.next
    copies: dict[Node, Node] = {}
    with graph.inserting_before(insertion_point):
        for node in (*sorted(elementwise, key=order.__getitem__), total):
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    total.replace_all_uses_with(copies[total])
    graph.eliminate_dead_code()


def _operand(node: Node, i: int) -> Any:
    """Return argument i of a node, untyped: torch's type for it is whatever any operator may take."""
    return node.args[i]


def _numel(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else None


def _is_elementwise(node: Node) -> bool:
    """Return whether each result element depends on one element of each operand, and not on chance."""
    tags = getattr(node.target, "tags", ())
    is_random = torch.Tag.nondeterministic_seeded in tags
    return node.target in VIEWS | CASTS | COPIES or (torch.Tag.pointwise in tags and not is_random)


def unmark_inputs(graph: Graph) -> None:
    """Let backward use the graph's inputs, by removing their marks for recomputation.

    Where Inductor rewrites dropout within a checkpointed layer, it marks the operands for recomputation,
    dynamic sizes among them. A size that is an input cannot be recomputed, and was then missing in backward,
    up to torch 2.11 at least.
    """
    for node in graph.find_nodes(op="placeholder"):
        node.meta.pop("recompute", None)


def merge_casts(graph: Graph) -> None:
    """Merge equal casts of one x that `linear4bit` reads. Under autocast each linear casts x for itself."""
    casts: dict[tuple, Node] = {}
    for linear in graph.find_nodes(op="call_function", target=LINEAR):
        if (x := _operand(linear, 0)).target in CASTS:
            first = casts.setdefault((x.target, x.args, tuple(sorted(x.kwargs.items()))), x)
            if x is not first:
                x.replace_all_uses_with(first)


def merge_projections(graph: Graph, linears: list[Node]) -> None:
    """Merge h = x A^T of several linears into one matmul, if each h is made by a matmul."""
    matmuls = [matmul for linear in linears if (matmul := _find_projection(linear))]
    if len(matmuls) < len(linears):
        return
    first, a_list = matmuls[0], [_operand(linear, 9) for linear in linears]
    with graph.inserting_before(first):  # Inductor sorts the graph afterwards
        transpose = _operand(first, 1)
        a = _insert_like(graph, transpose, ops.aten.cat.default, a_list)
        a_transposed = _insert_like(graph, transpose, transpose.target, a, [1, 0])
        h = _insert_like(graph, first, first.target, first.args[0], a_transposed)
        h_list = _split(graph, h, 1, _lora_ranks(a_list))
    for matmul, own_h in zip(matmuls, h_list, strict=True):
        matmul.replace_all_uses_with(own_h)
        _update_reader_meta(own_h)


def merge_adapter_backwards(graph: Graph, backwards: list[Node]) -> None:
    """Replace the adapter_backward nodes of linears of one x by one, and if possible their x gradients too.

    The gradients of x stay apart if their sum contains others: from a linear between them that has no A, or
    where each linear cast x for itself. backwards: the nodes.
    """
    grads, h_list, a_list, b_list = ([_operand(node, i)[0] for node in backwards] for i in (0, 2, 3, 4))
    results = [{n.args[1]: n for n in node.users} for node in backwards]
    ranks = _lora_ranks(a_list)
    with graph.inserting_before(backwards[-1]):
        x = backwards[0].args[1]
        merged = _insert_like(graph, backwards[-1], ADAPTER_BACKWARD, grads, x, h_list, a_list, b_list)
        outputs = [_insert_like(graph, merged, operator.getitem, merged, i) for i in range(2 + len(b_list))]
        h_grad, a_grad, *b_grads = outputs
        a_grads = _split(graph, a_grad, 0, ranks)
        h_grads = _split(graph, h_grad, h_grad.meta["val"].dim() - 1, ranks)
    for result, *gradients in zip(results, h_grads, a_grads, b_grads, strict=True):
        for i, node in enumerate(gradients):
            if i in result:
                result[i].replace_all_uses_with(node)
    matmuls = [n for gradient in h_grads for n in gradient.users if n.target is LINEAR_BACKWARD]
    total = _find_sum(matmuls)
    if len(matmuls) != len(backwards) or total is None:
        return
    lists = ([value for n in matmuls for value in _operand(n, i)] for i in range(7))
    after, roundings = ([value for n in matmuls for value in _operand(n, i)] for i in (9, 10))
    with graph.inserting_before(matmuls[-1]):
        x_grad = _insert_like(graph, matmuls[-1], LINEAR_BACKWARD, *lists, h_grad, a_list, after, roundings)
    total.replace_all_uses_with(x_grad)


def _group_by_input(graph: Graph, target, x_argument: int, a_argument: int) -> list[list[Node]]:
    """Return the groups of two or more operators of one kind that have the same x, and an A.

    x_argument, a_argument: the indices of these two among the operator's arguments.
    """
    groups = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=target):
        if node.args[a_argument]:
            groups[node.args[x_argument]].append(node)
    return [group for group in groups.values() if len(group) > 1]


def _find_projection(linear: Node) -> Node | None:
    """Return the matmul x A^T whose result is a linear's h, or None if h is anything else."""
    h, a = _operand(linear, 8), _operand(linear, 9)
    while h.target in VIEWS:
        h = _operand(h, 0)
    if h.target is not ops.aten.mm.default:
        return None
    transposed = _operand(h, 1)
    return h if transposed.target is ops.aten.permute.default and transposed.args[0] is a else None


def _find_sum(nodes: Iterable[Node]) -> Node | None:
    """Return the node that is the sum of exactly these nodes, by additions of two, or None."""
    summands = set(nodes)
    while len(summands) > 1:
        for node in summands:
            user, *others = node.users or [node]
            is_addition = user.target is ops.aten.add.Tensor and not user.kwargs
            if not others and is_addition and set(user.args) <= summands:
                summands = summands.difference(user.args) | {user}
                break
        else:
            return None
    return summands.pop() if summands else None


def _lora_ranks(a_list: list[Node]) -> list[int]:
    return [a.meta["val"].shape[0] for a in a_list]


def _split(graph: Graph, node: Node, dim: int, sizes: list[int]) -> list[Node]:
    """Insert, and return, nodes that slice a node's result along a dimension into these sizes."""
    bounds = pairwise(accumulate(sizes, initial=0))
    return [_insert_like(graph, node, ops.aten.slice.Tensor, node, dim, *bound) for bound in bounds]


def _insert_like(graph: Graph, like: Node, target, *args) -> Node:
    """Insert a call of target(*args) marked as `like` is: forward or backward, saved or recomputed."""
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    _update_meta(node)
    return node


def _update_reader_meta(node: Node) -> None:
    """Update the meta of views and `linear4bit` nodes that depend on the strides of this node's result."""
    for user in node.users:
        if user.target in VIEWS:
            _update_meta(user)
            _update_reader_meta(user)
        elif user.target is LINEAR:
            _update_meta(user)


def _update_meta(node: Node) -> None:
    """Set a node's meta (fake result, strides) anew, by running its target on its operands' fake values."""
    operands = map_arg(node.args, lambda n: n.meta["val"])
    assert callable(node.target)
    node.meta["val"] = node.target(*operands)
    for name in ("tensor_meta", "eager_input_vals"):
        node.meta.pop(name, None)
    if node.target in (LINEAR, ADAPTER_BACKWARD, LINEAR_BACKWARD):
        node.meta["eager_input_vals"] = (operands, {})  # the strides that Inductor gives them
