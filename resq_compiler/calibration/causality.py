"""Whether a captured graph is a causal decoder: asked of the graph, one weight in memory at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from resq_compiler.calibration import executor
from resq_compiler.frontend.checks import differing_texts, require_causal
from resq_compiler.ir import graph_tools


@torch.no_grad()
def check_causal_graph(gm: GraphModule, vocab_size: int, where: str) -> None:
    """Raise ModelError if a change of the last of three tokens changes the logits of the first two. where: what the model is called."""
    logits = graph_tools.output_args(gm.graph)[0]
    env: dict[Node, Any] = executor.first_tokens(gm, differing_texts(vocab_size))
    executor.Schedule(gm, [logits], env).run(env)
    require_causal(env[logits], where)
