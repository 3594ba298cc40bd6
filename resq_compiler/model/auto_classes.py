"""Compiled models under transformers' Auto classes: `AutoModelForCausalLM.from_pretrained(directory)`.

The model type of a saved model is its own, so that transformers alone refuses it in clear words: under the model type of the float
original it would load, with a warning, as that model with random weights. Import resq_compiler.model (or anything of
resq_compiler that handles models) to register the type.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from resq_compiler.model.compiled_model import CompiledModel
from resq_compiler.storage.quantization_config import MODEL_TYPE, QUANT_METHOD


class ResqConfig(PreTrainedConfig):
    """config.json of a compiled model; the configuration of the float original is in `source_config`."""

    model_type = MODEL_TYPE


class ResqQuantizationConfig(QuantizationConfigMixin):
    """The quantization_config of a saved model, for tools that ask transformers what it means; loading does not need it."""

    def __init__(self, **values: Any):
        self.__dict__.update(values)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]


def register() -> None:
    """Teach the Auto classes the model type and the quantization method; calling it again changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(ResqQuantizationConfig)
    if MODEL_TYPE not in CONFIG_MAPPING:
        AutoConfig.register(MODEL_TYPE, ResqConfig)
        CompiledModel.config_class = ResqConfig
        AutoModelForCausalLM.register(ResqConfig, CompiledModel)


register()
