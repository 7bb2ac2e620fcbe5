"""Rewriting the compiler's graphs of decoder layers, by the hook that torch's Inductor has for it.

Linears that read one x (the projections of attention, gate and up) do alone what can be done once. Each
multiplies x with its own A, a matmul so narrow that reading x is what it costs; in backward A's gradient
reads x again, and each adds its own gradient of x to the others'. In the modules, which transformers calls
one by one, they know nothing of each other. In the graph of a layer they stand side by side: here their A's
become one, and their operators of backward one each (quantization/operators.py takes any number). With
checkpointing that is a dozen kernels less in each layer that go through all of x, or of its gradient.

The rewritten graph computes the same up to rounding: sums of the gradients of x are formed in the matmuls,
not after them.

DoRA's magnitudes of gate and up need sums over all tokens of their outputs times the gradients of these, the
widest tensors that there are. Summed up afterwards, all four are in memory at once, beside the gradient that
they came from. In the graph of backward each such sum is formed first, from what the gradient is computed
from; then that takes the memory of an output.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node, map_arg

from quantization import operators as linear4bit

ops = torch.ops
SUM, MULTIPLY = ops.aten.sum.dim_IntList, ops.aten.mul.Tensor
LINEAR = ops.fsdp_finetune.linear4bit.default
ADAPTER_BACKWARD = ops.fsdp_finetune.adapter_backward.default
KEPT = ops.fsdp_finetune.kept.default
LINEAR_BACKWARD = ops.fsdp_finetune.linear4bit_backward.default
VIEWS = {ops.aten.view.default, ops.aten._unsafe_view.default, ops.aten.reshape.default}
SAME = {ops.aten.clone.default, ops.aten.alias.default}  # that elsewhere Inductor mostly does away with
CASTS = {ops.prims.convert_element_type.default, ops.aten._to_copy.default}


class LayerGraphs(CustomGraphPass):
    """Takes the joint graph of a layer's forward and backward, before it is divided."""

    def __call__(self, graph: Graph) -> None:
        inputs_are_there(graph)
        join_casts(graph)
        for linears in _by_x(graph, LINEAR, x=0, a=9):
            join_projections(graph, linears)
        for adapters in _by_x(graph, ADAPTER_BACKWARD, x=1, a=3):
            join_gradients(graph, adapters)

    def uuid(self) -> bytes:
        # Of the operators too: a graph that was cached with older ones of their gradients would be used for these.
        return get_hash_for_files((__file__, linear4bit.__file__))


class DividedGraphs(CustomGraphPass):
    """Takes the graphs of forward and backward, each by itself."""

    def __call__(self, graph: Graph) -> None:
        for total in graph.find_nodes(op="call_function", target=SUM):
            if total.args[1] == [0] and _operand(total, 0).target is MULTIPLY:
                sum_first(graph, total)
        for node in graph.find_nodes(op="call_function", target=KEPT):  # it has been
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        for node in graph.nodes:
            node.target = linear4bit.WITHOUT_GRADIENT.get(node.target, node.target)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, linear4bit.__file__))


def sum_first(graph: Graph, total: Node) -> None:
    """Moves a sum of products over all tokens to where all is there that its factors are computed from, element by
    element. Not if they are there themselves, or come from a result of fewer numbers: a norm's gradient, that has one for
    each token, is better computed once."""
    product = _operand(total, 0)
    elementwise, sources = {product}, set[Node]()
    left, size = [product], product.meta["val"].numel()
    while left:
        for node in left.pop().all_input_nodes:
            if not _is_elementwise(node):
                sources.add(node)
            elif node not in elementwise:
                elementwise.add(node)
                left.append(node)
    narrow = any(node.op != "placeholder" and _numbers(node) != size for node in sources)
    computed = {node for node in elementwise if node.target not in VIEWS | CASTS | SAME}
    if narrow or len(computed) == 1:  # the product itself
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    place = max(sources, key=order.__getitem__).next
    while place.op == "placeholder":
        place = place.next
    copies: dict[Node, Node] = {}
    with graph.inserting_before(place):
        for node in (*sorted(elementwise, key=order.__getitem__), total):
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    total.replace_all_uses_with(copies[total])
    graph.eliminate_dead_code()


def _operand(node: Node, i: int) -> Any:
    """Argument i of a node. torch's type for it is whatever any operator may take."""
    return node.args[i]


def _numbers(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else None


def _is_elementwise(node: Node) -> bool:
    """Whether each number of the result comes from one of each operand, and the same ones each time."""
    tags = getattr(node.target, "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags
    return node.target in VIEWS | CASTS | SAME or (torch.Tag.pointwise in tags and not random)


def inputs_are_there(graph: Graph) -> None:
    """Lets backward have the graph's inputs. Where Inductor rewrites dropout within a checkpointed layer it marks what
    that reads, sizes that vary among it, as to be computed again; up to torch 2.11 at least a size that is an input, and
    cannot be computed, was then missing in backward."""
    for node in graph.find_nodes(op="placeholder"):
        node.meta.pop("recompute", None)


def join_casts(graph: Graph) -> None:
    """Under autocast each linear rounds the fp32 x for itself: after this they have one x again."""
    casts: dict[tuple, Node] = {}
    for linear in graph.find_nodes(op="call_function", target=LINEAR):
        if (x := _operand(linear, 0)).target in CASTS:
            first = casts.setdefault((x.target, x.args, tuple(sorted(x.kwargs.items()))), x)
            if x is not first:
                x.replace_all_uses_with(first)


def join_projections(graph: Graph, linears: list[Node]) -> None:
    """h = x A^T of several linears in one matmul."""
    products = [product for linear in linears if (product := _product(linear))]
    if len(products) < len(linears):
        return
    first, shared = products[0], [_operand(linear, 9) for linear in linears]
    with graph.inserting_before(first):  # Inductor sorts the graph afterwards
        transposed = _operand(first, 1)
        a = _add(graph, transposed, ops.aten.cat.default, shared)
        h = _add(
            graph, first, first.target, first.args[0], _add(graph, transposed, transposed.target, a, [1, 0])
        )
        parts = _parts(graph, h, 1, _ranks(shared))
    for product, part in zip(products, parts, strict=True):
        product.replace_all_uses_with(part)
        _describe_readers(part)


def join_gradients(graph: Graph, adapters: list[Node]) -> None:
    """The gradients of several linears' A's and B's by one operator, and that of their x by another, unless that is the
    sum of others as well: of a linear between them that has no A, or of what was rounded for each."""
    grads, hs, shared, bs = ([_operand(node, i)[0] for node in adapters] for i in (0, 2, 3, 4))
    results = [{n.args[1]: n for n in node.users} for node in adapters]
    with graph.inserting_before(adapters[-1]):
        joint = _add(graph, adapters[-1], ADAPTER_BACKWARD, grads, adapters[0].args[1], hs, shared, bs)
        of_h, of_a, *of_bs = (_add(graph, joint, operator.getitem, joint, i) for i in range(2 + len(bs)))
        parts = _parts(graph, of_a, 0, _ranks(shared))
        of_hs = _parts(graph, of_h, of_h.meta["val"].dim() - 1, _ranks(shared))
    for result, *new in zip(results, of_hs, parts, of_bs, strict=True):
        for i, node in enumerate(new):
            if i in result:
                result[i].replace_all_uses_with(node)
    matmuls = [n for part in of_hs for n in part.users if n.target is LINEAR_BACKWARD]
    total = _sum_of(matmuls)
    if len(matmuls) != len(adapters) or total is None:
        return
    lists = ([value for n in matmuls for value in _operand(n, i)] for i in range(7))
    after = [value for n in matmuls for value in _operand(n, 9)]
    with graph.inserting_before(matmuls[-1]):
        of_x = _add(graph, matmuls[-1], LINEAR_BACKWARD, *lists, of_h, shared, after)
    total.replace_all_uses_with(of_x)


def _by_x(graph: Graph, target, x: int, a: int) -> list[list[Node]]:
    """The operators of this kind, two or more, that have the same x, and an A; x, a: the numbers of these arguments."""
    groups = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=target):
        if node.args[a]:
            groups[node.args[x]].append(node)
    return [group for group in groups.values() if len(group) > 1]


def _product(linear: Node) -> Node | None:
    """The matmul x A^T of which a linear has the result, if that is what it has."""
    h, a = _operand(linear, 8), _operand(linear, 9)
    while h.target in VIEWS:
        h = _operand(h, 0)
    if h.target is not ops.aten.mm.default:
        return None
    transposed = _operand(h, 1)
    return h if transposed.target is ops.aten.permute.default and transposed.args[0] is a else None


def _sum_of(nodes: Iterable[Node]) -> Node | None:
    """The node that is the sum of these, and of nothing else, by additions of two."""
    summands = set(nodes)
    while len(summands) > 1:
        for node in summands:
            user, *others = node.users or [node]
            if (
                not others
                and user.target is ops.aten.add.Tensor
                and set(user.args) <= summands
                and not user.kwargs
            ):
                summands = summands.difference(user.args) | {user}
                break
        else:
            return None
    return summands.pop() if summands else None


def _ranks(shared: list[Node]) -> list[int]:
    return [a.meta["val"].shape[0] for a in shared]


def _parts(graph: Graph, node: Node, dim: int, sizes: list[int]) -> list[Node]:
    """A node's result cut along a dimension."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    begins = [0, *ends[:-1]]
    return [
        _add(graph, node, ops.aten.slice.Tensor, node, dim, begin, end)
        for begin, end in zip(begins, ends, strict=True)
    ]


def _add(graph: Graph, like: Node, target, *args) -> Node:
    """A node with the marks of another: whether it is of forward or backward, kept or computed again."""
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    _describe(node)
    return node


def _describe_readers(node: Node) -> None:
    """`_describe` for what depends on how this node's result lies in memory."""
    for user in node.users:
        if user.target in VIEWS:
            _describe(user)
            _describe_readers(user)
        elif user.target is LINEAR:
            _describe(user)


def _describe(node: Node) -> None:
    """Sets anew what a node's meta says of its operands and its result."""
    operands = map_arg(node.args, lambda n: n.meta["val"])
    assert callable(node.target)
    node.meta["val"] = node.target(*operands)
    for name in ("tensor_meta", "eager_input_vals"):
        node.meta.pop(name, None)
    if node.target in (LINEAR, ADAPTER_BACKWARD, LINEAR_BACKWARD):
        node.meta["eager_input_vals"] = (operands, {})  # the strides that Inductor gives them
