"""A compiled model on disk: which files there are. safetensors and JSON, never pickle.

    config.json            model type "resq_compiled", quantization_config, and the configuration of the float original
    resq_graph.json        the quantized graph, one node a line (ir/serialize.py), and how each tensor is stored
    model*.safetensors     weights, packed codes, float32 scales (tensor_files.py); sharded with an index where large
    resq_recipe.yaml       the resolved options, as `--config` reads them
    README.md, generation_config.json, tokenizer files

Embeddings and lm_head are stored as they are computed, in float32.
"""

CONFIG, GRAPH, RECIPE, GENERATION, CARD = (
    "config.json", "resq_graph.json", "resq_recipe.yaml", "generation_config.json", "README.md",
)  # fmt: skip
TOKENIZER = "tokenizer_config.json"
