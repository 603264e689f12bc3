"""Twenty steps of two tiny models have the losses that they always had.

After a change that is meant to change them: `python tests/golden/test_golden_losses.py` writes the file anew.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).with_name("losses.json")
TRAIN = {"log_every": 1, "val_every": 5}


def losses(lab, run: Path) -> dict[str, list[float]]:
    rows = lab.fit(lab.request(run, **TRAIN)).rows
    return {name: [row[name] for row in rows if name in row] for name in ("loss", "val_loss", "grad_norm")}


@pytest.mark.parametrize("model", ["dense", "kronecker"])
def test_losses_of_twenty_steps(lab, tmp_path, model):
    expected = json.loads(GOLDEN.read_text())[model]
    found = losses(type(lab).build(tmp_path / "lab", model=model), tmp_path / "run")
    assert len(expected["loss"]) == 20
    for name, tolerance in (("loss", 1e-4), ("val_loss", 1e-4), ("grad_norm", 1e-3)):
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, err_msg=f"{model} {name}")


def write() -> None:
    """Replace the golden file by what the code gives now."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from train_lab import Lab

    with tempfile.TemporaryDirectory() as folder:
        found = {
            model: losses(Lab.build(Path(folder) / model, model=model), Path(folder) / f"run-{model}")
            for model in ("dense", "kronecker")
        }
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    write()
