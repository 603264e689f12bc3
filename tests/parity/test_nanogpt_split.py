"""Our split `nanogpt` is the one that nanoGPT makes with `datasets`."""

import datasets
import pytest

from pipeline.data.splits import NANOGPT_FRACTION, NANOGPT_SEED, nanogpt_validation


@pytest.mark.parametrize("documents", [2, 1_999, 2_000, 2_001, 12_345])
def test_the_split_of_nanogpt_is_that_of_datasets(documents):
    table = datasets.Dataset.from_dict({"position": list(range(documents))})
    split = table.train_test_split(test_size=NANOGPT_FRACTION, seed=NANOGPT_SEED, shuffle=True)
    validation = set(nanogpt_validation(documents).tolist())
    assert validation == set(split["test"]["position"])
    assert validation.isdisjoint(split["train"]["position"])
    assert len(validation) + len(split["train"]) == documents
