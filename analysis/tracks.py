"""Which ranking a model belongs to: track M changes MLP weights alone, track A any matrix but the embeddings.

Models of two tracks are never ranked together: whoever may change more has it easier. On neither track are
dense controls, and models with another embedding table. Read from the structure that an init wrote beside
its weights, which says what the report of its matrices leaves out: missing blocks, narrower random layers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.store.artifacts import Store
from pipeline.store.records import Record

STRUCTURE = "config.json"
"""Where an init says what stands at each weight matrix."""

TRACKS = ("M", "A")
"""In the order of a table."""

NONE = ""
"""A model that is ranked with nobody."""


def tracks(store: Store, inits: Sequence[Record], problems: list[str]) -> dict[str, str]:
    """The track of each init by its address; one whose structure cannot be read is on none, and a problem."""
    found: dict[str, str] = {}
    for init in inits:
        if init.address in found:
            continue
        where = store.root.child(f"{init.address}/{init.attempt}")
        try:
            found[init.address] = track(json.loads(where.read_bytes(STRUCTURE))["model"])
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as err:
            found[init.address] = NONE
            problems.append(f"{init.address}/{STRUCTURE}: cannot be read ({err}), so it is on no track")
    return found


def track(model: Mapping[str, Any]) -> str:
    """`M`, `A` or nothing for the structure of a model (`ModelSpec.to_json`); KeyError if it is none."""
    arch, blocks = model["arch"], model["blocks"]
    if model["embedding"]["kind"] != "dense":
        return NONE
    head = arch["n_embd"] // arch["n_head"]
    if len(blocks) != arch["n_layer"] or any(_has_other_attention(block, head) for block in blocks):
        return "A"
    return "M" if any(_has_other_mlp(block, 4 * arch["n_embd"]) for block in blocks) else NONE


def _has_other_attention(block: Mapping[str, Any], head: int) -> bool:
    kinds = {block[matrix]["kind"] for matrix in ("attn_c_attn", "attn_c_proj")}
    return kinds != {"dense"} or (block["head_qk"], block["head_vo"]) != (head, head)


def _has_other_mlp(block: Mapping[str, Any], hidden: int) -> bool:
    kinds = {block[matrix]["kind"] for matrix in ("mlp_c_fc", "mlp_c_proj")}
    return kinds != {"dense"} or block["mlp_hidden"] != hidden
