"""Mistral Small 3.1 and later, and Ministral 3 (model_type mistral3): a wrapper, trained on text alone.

Its text model is Mistral's or Ministral 3's, as text_config says. The vision tower and its projector are not
loaded.
"""

from transformers.models.mistral3.modeling_mistral3 import Mistral3ForConditionalGeneration

from models import ministral3, mistral
from models.family import wrap_family

FAMILY = wrap_family(
    {"mistral": mistral.FAMILY, "ministral3": ministral3.FAMILY},
    Mistral3ForConditionalGeneration,
    unused=("model.vision_tower", "model.multi_modal_projector"),
)
