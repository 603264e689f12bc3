"""Legal factor shapes: how many, what they cost, which rank they reach, and what an illegal one is told."""

import csv
import os
import re
from pathlib import Path

import pytest

from model.algebra.shapes import (
    KronShape,
    check_terms,
    divisors,
    kron_shape,
    legal_shapes,
    nearest_shapes,
    parse_shape,
    rank_warning,
)
from model.config import ModelError

PROJECT = Path(__file__).resolve().parents[2]
GOLDEN = PROJECT / "tests" / "golden" / "kron_shapes.csv"
T0 = 67_816_704  # GPT-2 small without its 24 MLP matrices


def rows_of(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text().splitlines()))


def check_row(row: dict[str, str]) -> None:
    shape = KronShape(*(int(row[key]) for key in ("m1", "n1", "m2", "n2")))
    b_first, a_first = shape.macs()
    assert shape in legal_shapes(768, 3072)
    assert shape.params() == int(row["factor_params"])
    assert T0 + 24 * shape.params() == int(row["model_params_k1"])
    assert shape.rank_bound() == int(row["max_rank_k1"])
    assert shape.max_terms == int(row["k_max"])
    assert min(b_first, a_first) / (768 * 3072) == pytest.approx(float(row["flops_ratio_k1"]), abs=1e-5)
    if b_first != a_first:
        assert shape.cheaper_order == {"A": "a_first", "B": "b_first"}[row["first"]]


def test_all_shapes_of_a_gpt2_mlp_matrix():
    shapes = legal_shapes(768, 3072)
    full = [shape for shape in shapes if shape.rank_bound() == 768]
    assert len(shapes) == len(set(shapes)) == 396
    assert len(full) == 88
    sizes = [shape.params() for shape in full]
    assert len(set(sizes)) == 29
    assert min(sizes) == 3072
    assert all(sizes.count(size) >= 2 for size in sizes)
    assert all(shape.rows == 768 and shape.cols == 3072 for shape in shapes)


@pytest.mark.parametrize("row", rows_of(GOLDEN), ids=lambda row: f"{row['m1']}x{row['n1']}")
def test_golden_shapes(row: dict[str, str]):
    check_row(row)


def test_the_whole_table_of_shapes():
    shared = Path(os.environ.get("KRONY_SHARED", str(PROJECT.parent / "shared")))
    table = shared / "design" / "kron_shapes.csv"
    if not table.is_file():
        pytest.skip("no table of all shapes: set KRONY_SHARED to a folder that holds design/kron_shapes.csv")
    rows = rows_of(table)
    assert len(rows) == 396
    for row in rows:
        check_row(row)


def test_published_model_sizes_follow_from_the_shapes():
    assert T0 + 24 * kron_shape(768, 3072, (768, 768)).params() == 81_972_576
    assert T0 + 24 * kron_shape(768, 3072, (384, 3072)).params() == 96_128_304
    assert T0 + 24 * kron_shape(768, 3072, (256, 1024)).params(4, scales=True) == 92_983_392 + 96


def test_the_contraction_order_decides_the_saving():
    shape = KronShape(384, 3072, 2, 1)
    assert shape.macs() == (1_180_416, 2_365_440)
    assert shape.cheaper_order == "b_first"
    assert shape.transposed().cheaper_order == "a_first"
    assert min(shape.transposed().macs()) == min(shape.macs())
    assert shape.macs(3) == (3 * 1_180_416, 3 * 2_365_440)


def test_an_illegal_shape_names_its_neighbours():
    with pytest.raises(
        ModelError, match=re.escape("first factor 700x768 does not fit a 768x3072 weight")
    ) as caught:
        kron_shape(768, 3072, (700, 768))
    assert "768x768" in str(caught.value)
    assert "\n" not in str(caught.value)
    for first in ((0, 768), (768, -4), (1000, 1000)):
        with pytest.raises(ModelError, match="nearest legal first factors"):
            kron_shape(768, 3072, first)
    nearest = nearest_shapes(768, 3072, (760, 760), count=2)
    assert nearest[0] == KronShape(768, 768, 1, 4)


@pytest.mark.parametrize("text", ["768x768", "(768x768)", "(768x768)(1x4)", " (768x768) (1x4) "])
def test_a_shape_can_be_read(text: str):
    assert parse_shape(768, 3072, text) == KronShape(768, 768, 1, 4)
    assert parse_shape(768, 3072, str(KronShape(768, 768, 1, 4))) == KronShape(768, 768, 1, 4)


@pytest.mark.parametrize("text", ["768", "768*768", "768x768x3", "(768x768)(2x2)", ""])
def test_other_text_is_refused(text: str):
    with pytest.raises(ModelError, match="factor shape"):
        parse_shape(768, 3072, text)


def test_too_many_terms_are_refused():
    shape = KronShape(768, 768, 1, 4)
    check_terms(shape, 1)
    check_terms(shape, 4)
    for terms in (0, -1, 5):
        with pytest.raises(ModelError, match=rf"{terms} terms of \(768x768\)\(1x4\): choose 1 to 4"):
            check_terms(shape, terms)


def test_a_shape_that_loses_rank_is_reported():
    thin = KronShape(384, 3072, 2, 1)
    assert thin.rank_bound() == 384
    assert rank_warning(KronShape(768, 1536, 1, 2)) == ""
    assert "rank 384 of 768" in rank_warning(thin)
    assert rank_warning(thin, 2) == ""
    assert "4 terms" in rank_warning(KronShape(256, 64, 3, 48), 3)
    with pytest.raises(ModelError, match="rank 384 of 768"):
        rank_warning(thin, strict=True)


def test_sides_below_one_cannot_exist():
    with pytest.raises(ModelError, match="at least 1"):
        KronShape(0, 1, 1, 1)


def test_divisors():
    assert divisors(1) == (1,)
    assert divisors(36) == (1, 2, 3, 4, 6, 9, 12, 18, 36)
    assert (len(divisors(768)), len(divisors(3072))) == (18, 22)


def test_shapes_load_no_torch(python):
    done = python("-c", "import model.algebra.shapes, sys; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
