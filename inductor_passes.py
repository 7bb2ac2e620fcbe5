"""Rewritings of the compiler's graphs, by the hooks that torch's Inductor has for them."""

from __future__ import annotations

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph


class Inputs(CustomGraphPass):
    """Lets backward have the graph's inputs. Where Inductor rewrites dropout within a checkpointed layer it marks what
    that reads, sizes that vary among it, as to be computed again; up to torch 2.11 at least a size that is an input, and
    cannot be computed, was then missing in backward."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="placeholder"):
            node.meta.pop("recompute", None)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))
