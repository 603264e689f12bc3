# SPDX-License-Identifier: Apache-2.0
"""The configuration of a compressed GPT-2 that was exported by krony.

`spec` says what stands at every weight matrix; the sizes that other libraries ask for follow from it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig


class KronyConfig(PretrainedConfig):  # type: ignore[misc] # transformers has no types here
    """`spec`: arch (stock sizes), blocks (widths and matrices of each), embedding, tied."""

    model_type = "krony"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    has_no_defaults_at_init = True

    def __init__(self, spec: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        # The head is the token table itself, not a second tensor that transformers would have to tie.
        super().__init__(**{**kwargs, "tie_word_embeddings": False})
        if spec is None:  # transformers makes an empty one to compare with
            return
        arch = spec["arch"]
        self.spec = dict(spec)
        self.use_cache = kwargs.get("use_cache", True)
        self.vocab_size = arch["vocab_size"]
        self.hidden_size = arch["n_embd"]
        self.num_attention_heads = arch["n_head"]
        self.num_hidden_layers = len(spec["blocks"])
        self.max_position_embeddings = arch["n_ctx"]
