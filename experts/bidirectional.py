"""Encoders: models that read a text in both directions and cannot write one, such as BERT and sentence encoders."""

from __future__ import annotations

import inspect
from typing import Any


def is_encoder(config: Any) -> bool:
    """Whether models of this configuration are encoders.

    Most encoders can also be configured as decoders (`is_decoder`), and transformers then has a causal language model
    for them.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

    if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_MAPPING:
        return False
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return masked or bool(getattr(config, "use_bidirectional_attention", False))


def encoder_arguments(config: Any) -> dict[str, Any]:
    """What the body of an encoder is built with.

    Without its pooler, a layer for classification that many files lack: transformers would draw one at random.
    """
    from transformers import MODEL_MAPPING

    if not is_encoder(config):
        return {}
    takes = inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
