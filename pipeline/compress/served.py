"""A model as it is run by whoever uses it: with a cache, by the code that an export brings.

The same module runs a factored model and a dense one, so that two of them differ in their matrices alone.
"""

import torch

from model.gpt2 import GPT2
from pipeline.compress.remote.configuration_krony import KronyConfig
from pipeline.compress.remote.modeling_krony import KronyForCausalLM


def serve(model: GPT2) -> KronyForCausalLM:
    """`model` behind the interface of transformers, in evaluation mode; it shares the tensors."""
    with torch.device("meta"):
        network = KronyForCausalLM(KronyConfig(spec=model.spec.to_json()))
    network.load_state_dict(model.state_dict(), strict=True, assign=True)
    network.eval()
    return network
