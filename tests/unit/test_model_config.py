"""Sizes: every published count to the digit, from integers and from tensors; a spec survives JSON."""

from dataclasses import replace

import pytest
import torch

from model.algebra.shapes import legal_shapes
from model.config import (
    SIZES,
    BlockSpec,
    GPT2Config,
    Kron,
    LowRank,
    ModelError,
    ModelSpec,
    SplitQKV,
)
from model.gpt2 import GPT2

GPT2_SMALL = ModelSpec.dense(SIZES["gpt2"])
TOY = ModelSpec.dense(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=64, vocab_size=97))


def with_mlp(first, terms=1, *, scales=False, spec=GPT2_SMALL):
    d, h = spec.arch.n_embd, spec.arch.n_inner
    up = Kron(m1=first[0], n1=first[1], m2=d // first[0], n2=h // first[1], terms=terms, scales=scales)
    return spec.with_matrices(
        {
            f"h.{i}.mlp.{role}": matrix
            for i in range(len(spec.blocks))
            for role, matrix in (("c_fc", up), ("c_proj", up.transposed()))
        }
    )


def with_ranks(mlp, qkv=None, out=None):
    roles = {"mlp.c_fc": mlp, "mlp.c_proj": mlp} | ({"attn.c_attn": qkv, "attn.c_proj": out} if qkv else {})
    return GPT2_SMALL.with_matrices(
        {f"h.{i}.{role}": LowRank(rank=rank) for i in range(12) for role, rank in roles.items()}
    )


def with_widths(k, r=None):
    change = {"mlp_hidden": k} | ({"head_qk": r, "head_vo": r, "qkv_bias": "query"} if r else {})
    return replace(GPT2_SMALL, blocks=tuple(replace(block, **change) for block in GPT2_SMALL.blocks))


def kngpt2(*, tied):
    square = Kron(m1=768, n1=384, m2=1, n2=2)
    up = Kron(m1=768, n1=1536, m2=1, n2=2)
    roles = {"attn.q": square, "attn.k": square, "attn.v": square, "attn.c_proj": square, "mlp.c_fc": up}
    roles["mlp.c_proj"] = up.transposed()
    spec = GPT2_SMALL.with_matrices(
        {f"h.{i}.{role}": m for i in range(1, 12, 2) for role, m in roles.items()}
    )
    return replace(spec, embedding=Kron(m1=50257, n1=384, m2=1, n2=2), tied=tied)


COUNTS = [
    ("GPT-2", GPT2_SMALL, 124_439_808, 123_653_376),
    ("67M", with_mlp((32, 64)), 67_893_504, 67_107_072),
    ("80M-2", with_mlp((256, 1024), 2), 80_400_048, 79_613_616),
    ("81M", with_mlp((768, 768)), 81_972_576, 81_186_144),
    ("85M", with_mlp((768, 1024)), 86_691_144, 85_904_712),
    ("92M-4", with_mlp((256, 1024), 4), 92_983_392, 92_196_960),
    ("92M-4 with scales", with_mlp((256, 1024), 4, scales=True), 92_983_488, 92_197_056),
    ("96M", with_mlp((384, 3072)), 96_128_304, 95_341_872),
    ("96M of full rank", with_mlp((768, 1536)), 96_128_304, 95_341_872),
    ("DistilGPT2", replace(GPT2_SMALL, blocks=GPT2_SMALL.blocks[::2]), 81_912_576, 81_126_144),
    ("KnGPT2-style, tied", kngpt2(tied=True), 83_907_530, 83_121_098),
    ("KnGPT2-style, untied", kngpt2(tied=False), 122_504_906, 121_718_474),
    ("rank 153 in the MLP", with_ranks(153), 81_917_184, 81_130_752),
    ("low rank everywhere", with_ranks(307, 288, 192), 81_954_048, 81_167_616),
    ("narrow MLP", with_widths(769), 81_963_276, 81_176_844),
    ("narrow MLP and heads", with_widths(1538, 32), 81_967_896, 81_181_464),
    ("nothing narrow, no key or value bias", with_widths(3072, 64), 124_421_376, 123_634_944),
]


@pytest.mark.parametrize(("name", "spec", "total", "without_wpe"), COUNTS, ids=[row[0] for row in COUNTS])
def test_counts_are_exact_from_integers_and_from_tensors(name, spec, total, without_wpe):
    with torch.device("meta"):
        model = GPT2(spec)
    assert spec.num_parameters() == total == model.num_parameters()
    assert total == sum(p.numel() for p in model.parameters())
    assert spec.num_parameters("krony_no_wpe") == without_wpe == model.num_parameters("krony_no_wpe")
    assert spec.num_parameters("non_embedding") == model.num_parameters("non_embedding")


def test_published_sizes_count_as_published():
    expected = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }
    assert {name: ModelSpec.dense(size).num_parameters() for name, size in SIZES.items()} == expected


def test_every_shape_costs_what_the_algebra_says():
    for shape in legal_shapes(768, 3072):
        for terms in {1, min(4, shape.max_terms), shape.max_terms}:
            kron = Kron(m1=shape.m1, n1=shape.n1, m2=shape.m2, n2=shape.n2, terms=terms)
            cost = kron.cost(768, 3072)
            assert cost == (shape.params(terms), min(shape.macs(terms)), shape.rank_bound(terms))
            assert kron.transposed().cost(3072, 768).params == cost.params
            assert kron.max_terms == shape.max_terms


def test_multiplications_are_those_of_the_fact_sheet():
    assert GPT2_SMALL.macs_per_token() == 123_532_032 == GPT2_SMALL.macs_per_token("materialize")
    dense = GPT2_SMALL.macs_per_token(context=1024)
    assert dense == 123_532_032 + 12 * 1536 * 1025 // 2
    limits = {
        (32, 64, 1): 1.68,
        (256, 1024, 2): 1.16,
        (768, 768, 1): 1.47,
        (256, 1024, 4): 0.87,
        (384, 3072, 1): 1.27,
    }
    for (m1, n1, terms), limit in limits.items():
        assert dense / with_mlp((m1, n1), terms).macs_per_token(context=1024) == pytest.approx(
            limit, abs=0.005
        )
    assert with_mlp((32, 64)).macs_per_token("materialize") == 123_532_032
    tied = kngpt2(tied=True)
    assert kngpt2(tied=False).macs_per_token() - tied.macs_per_token() == 50257 * 768 - (768 + 384 * 50257)


def test_a_spec_survives_json():
    spec = kngpt2(tied=True).with_matrices({"h.0.mlp.c_fc": LowRank(rank=7)})
    import json

    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert isinstance(ModelSpec.from_json(spec.to_json()).blocks[1].attn_c_attn, SplitQKV)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("arch", "n_layer"), "12", r"model\.arch\.n_layer is '12', expected int"),
        (("arch", "n_layer"), True, r"model\.arch\.n_layer is True, expected int"),
        (("arch", "colour"), 1, r"model\.arch has unknown key 'colour'"),
        (("blocks",), {}, r"model\.blocks is dict, expected a list"),
        (("blocks", 0, "mlp_c_fc"), {"kind": "wavelet"}, r"model\.blocks\[0\]\.mlp_c_fc\.kind is 'wavelet'"),
        (("blocks", 0, "mlp_c_fc"), {"kind": "low_rank"}, r"model\.blocks\[0\]\.mlp_c_fc lacks key 'rank'"),
        (("blocks", 0, "mlp_c_fc"), {"kind": "low_rank", "rank": 33}, r"h\.0\.mlp\.c_fc: rank 33"),
        (("blocks", 0, "qkv_bias"), "none", r"qkv_bias is 'none', expected one of 'all', 'query'"),
        (("blocks", 0, "mlp_hidden"), 129, r"block 0: .*at most \(128, 16, 16\)"),
        (("blocks", 1, "source"), 0, r"kept blocks \[0, 0\]"),
        (("tied",), 1, r"model\.tied is 1, expected bool"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(path, value, message):
    data = TOY.to_json()
    data["blocks"] = list(data["blocks"])
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ModelError, match=message):
        ModelSpec.from_json(data)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GPT2Config(n_embd=30, n_head=4), "multiple of n_head"),
        (lambda: GPT2Config(n_layer=0), "at least 1"),
        (lambda: Kron(m1=4, n1=4, m2=2, n2=1, terms=3), "choose 1 to 2 terms"),
        (lambda: Kron(m1=0, n1=4, m2=2, n2=1), "at least 1"),
        (
            lambda: TOY.with_matrices({"h.0.mlp.c_fc": Kron(m1=16, n1=64, m2=2, n2=3)}),
            "32x192 matrix, not 32x128",
        ),
        (lambda: TOY.with_matrices({"h.2.mlp.c_fc": LowRank(rank=1)}), "names no weight matrix"),
        (lambda: TOY.with_matrices({"h.0.mlp.up": LowRank(rank=1)}), "is no weight matrix"),
        (lambda: replace(TOY, embedding=Kron(m1=1, n1=16, m2=97, n2=2)), "B must have one row"),
        (lambda: replace(TOY, blocks=()), "kept blocks"),
    ],
)
def test_an_impossible_structure_cannot_exist(build, message):
    with pytest.raises(ModelError, match=message):
        build()


def test_sites_are_named_and_sized_like_the_modules():
    spec = replace(
        TOY,
        blocks=(
            TOY.blocks[0],
            BlockSpec(source=1, mlp_hidden=50, head_qk=7, head_vo=9, attn_c_attn=SplitQKV()),
        ),
    )
    model = GPT2(spec)
    for site in spec.sites():
        layer = model.site(site.name)
        assert (layer.n_in, layer.n_out, layer.n_bias) == (site.n_in, site.n_out, site.n_bias)
        assert sum(p.numel() for p in layer.parameters()) == site.cost.params
