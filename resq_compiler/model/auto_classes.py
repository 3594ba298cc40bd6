"""Compiled models under transformers' Auto classes: `AutoModelForCausalLM.from_pretrained(directory)`.

The model type of a saved model is its own, so that transformers alone refuses it in clear words: under the model type of the float
original it would load, with a warning, as that model with random weights. Import resq_compiler.model (or anything of
resq_compiler that handles models) to register the type.
"""

from __future__ import annotations

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from resq_compiler.model.compiled_model import CompiledModel
from resq_compiler.storage.quantization_config import MODEL_TYPE


class ResqConfig(PreTrainedConfig):
    """config.json of a compiled model; the configuration of the float original is in `source_config`."""

    model_type = MODEL_TYPE


def register() -> None:
    """Teach the Auto classes the model type; calling it again changes nothing."""
    if MODEL_TYPE not in CONFIG_MAPPING:
        AutoConfig.register(MODEL_TYPE, ResqConfig)
        CompiledModel.config_class = ResqConfig
        AutoModelForCausalLM.register(ResqConfig, CompiledModel)


register()
