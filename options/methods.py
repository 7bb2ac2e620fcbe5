"""The train types: what each quantizes, trains and saves. Nothing else compares their names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What a train type means. quantizer: None, "bnb" or "hqq" (the frozen linears of the layers);
    adapter: None, "lora" or "dora"; expansion: train new blocks (Llama-Pro); lr: its default; packed: the
    train type to take instead where 16-bit weights need too much memory, "" if there is none."""

    quantizer: str | None
    adapter: str | None
    expansion: bool = False
    lr: float = 2e-4
    packed: str = ""

    @property
    def hqq(self) -> bool:
        return self.quantizer == "hqq"

    @property
    def saves(self) -> str:
        """What the run leaves: an "adapter" in PEFT's format, or a whole "model" folder."""
        return "adapter" if self.adapter else "model"


METHODS = {
    "full": Method(None, None, lr=1e-5, packed="bnb_dora"),
    "lora": Method(None, "lora", packed="qlora"),
    "custom_lora": Method(None, "lora", packed="qlora"),
    "dora": Method(None, "dora", packed="bnb_dora"),
    "qlora": Method("bnb", "lora"),
    "custom_qlora": Method("bnb", "lora"),
    "bnb_dora": Method("bnb", "dora"),
    "hqq_lora": Method("hqq", "lora"),
    "hqq_dora": Method("hqq", "dora"),
    "llama_pro": Method(None, None, expansion=True, packed="bnb_llama_pro"),
    "bnb_llama_pro": Method("bnb", None, expansion=True),
    "hqq_llama_pro": Method("hqq", None, expansion=True),
}

# What an option `needs`, an attribute of Method, in words.
NEEDS = {
    "adapter": "LoRA and DoRA",
    "hqq": "the hqq train types",
    "expansion": "the llama_pro train types",
    "quantizer": "quantized weights",
}

HQQ_BITS = (8, 4, 3, 2)
