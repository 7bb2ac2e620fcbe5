"""The train types: what each quantizes, trains and saves. No other module compares their names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Meaning of a train type."""

    quantizer: str | None  # of the frozen linears of the layers: None, "bnb" or "hqq"
    adapter: str | None  # None, "lora" or "dora"
    expansion: bool = False  # whether new blocks are trained (Llama-Pro)
    lr: float = 2e-4  # default learning rate
    quantized_alternative: str = ""  # similar train type that needs less memory for weights; "" = none

    @property
    def hqq(self) -> bool:
        """Whether the frozen linears are quantized by HQQ."""
        return self.quantizer == "hqq"

    @property
    def saves(self) -> str:
        """Kind of result: an "adapter" in PEFT's format, or a whole "model" folder."""
        return "adapter" if self.adapter else "model"


METHODS = {
    "full": Method(None, None, lr=1e-5, quantized_alternative="bnb_dora"),
    "lora": Method(None, "lora", quantized_alternative="qlora"),
    "custom_lora": Method(None, "lora", quantized_alternative="qlora"),
    "dora": Method(None, "dora", quantized_alternative="bnb_dora"),
    "qlora": Method("bnb", "lora"),
    "custom_qlora": Method("bnb", "lora"),
    "bnb_dora": Method("bnb", "dora"),
    "hqq_lora": Method("hqq", "lora"),
    "hqq_dora": Method("hqq", "dora"),
    "llama_pro": Method(None, None, expansion=True, quantized_alternative="bnb_llama_pro"),
    "bnb_llama_pro": Method("bnb", None, expansion=True),
    "hqq_llama_pro": Method("hqq", None, expansion=True),
}

# Attribute of Method that an option needs: the train types that have it, in words.
NEEDS = {
    "adapter": "LoRA and DoRA",
    "hqq": "the hqq train types",
    "expansion": "the llama_pro train types",
    "quantizer": "quantized weights",
}

HQQ_BITS = (8, 4, 3, 2)
