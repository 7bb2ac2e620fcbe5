"""The sharding strategies: who holds a copy of the model, and how long gathered weights stay.

wrapping.py applies them with FSDP2; the model of memory counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

from options.config import Config


@dataclass(frozen=True)
class Strategy:
    """A --sharding_strategy.

    Attributes:
        replicas: Who holds a copy of the model: "one" (all ranks together), "groups" (each group of
            --hybrid_shard_size ranks) or "ranks" (each rank).
        reshard_after_forward: Free the gathered parameters between forward and backward. Otherwise they stay:
            one all-gather less, for the memory of the whole model.
    """

    replicas: str
    reshard_after_forward: bool

    def ranks_per_copy(self, world: int, group_size: int) -> int:
        """Return the number of ranks that share one copy. group_size: --hybrid_shard_size."""
        return {"one": world, "groups": group_size, "ranks": 1}[self.replicas]


STRATEGIES = {
    "full_shard": Strategy("one", reshard_after_forward=True),
    "shard_grad_op": Strategy("one", reshard_after_forward=False),
    "hybrid_full_shard": Strategy("groups", reshard_after_forward=True),
    "hybrid_shard_grad_op": Strategy("groups", reshard_after_forward=False),
    # Nothing is sharded: "gathering" copies one unit at a time.
    "ddp": Strategy("ranks", reshard_after_forward=True),
}


def shards_of(config: Config) -> int:
    """Return the number of ranks that share one copy of the model. config: with its world_size."""
    return STRATEGIES[config.sharding_strategy].ranks_per_copy(config.world_size, config.hybrid_shard_size)
