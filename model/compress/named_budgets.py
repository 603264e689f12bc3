"""The caps at which methods are compared, by name. Integers only, loads no torch.

A name stands for a share of the MLP weights: that of a Kronecker shape on GPT-2 small, with everything else
whole. So a name means the same on every size of GPT-2, and on GPT-2 small it is the number below.
"""

from collections.abc import Mapping

from model.config import SIZES, ModelError, ModelSpec

NAMED_BUDGETS: Mapping[str, int] = {
    "B104": 103_176_192,
    "B96": 96_128_304,
    "B89": 89_000_448,
    "B82": 81_972_576,
    "B72": 71_783_424,
    "B68": 68_213_376,
}
"""Most unique parameters of GPT-2 small, the tied table once, `wpe` included."""

MAIN_BUDGETS = ("B96", "B82", "B72", "B68")
"""The budgets of the main comparison; the other two complete the curve."""


def named_cap(name: str, spec: ModelSpec) -> int:
    """The cap of that name for a dense model; ModelError for a name that is none.

    All that is not an MLP weight matrix stays, and of those the share that it is on GPT-2 small, rounded
    down.
    """
    if name not in NAMED_BUDGETS:
        raise ModelError(f"{name!r} is no budget; choose from {', '.join(NAMED_BUDGETS)}, or give a number")
    small = ModelSpec.dense(SIZES["gpt2"])
    kept = NAMED_BUDGETS[name] - small.num_parameters() + _mlp_weights(small)
    weights = _mlp_weights(spec)
    return spec.num_parameters() - weights + weights * kept // _mlp_weights(small)


def _mlp_weights(spec: ModelSpec) -> int:
    """Entries of all MLP matrices when dense."""
    return sum(site.n_in * site.n_out for site in spec.sites() if ".mlp." in site.name)
