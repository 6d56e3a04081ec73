"""One process of the test with two: trains with a selection and writes down what it saw."""

import json
import os
import sys
from pathlib import Path

from hf_efficiency import DataSelectionCallback
from tests.integrations.transformers import test_selection


def main():
    out = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    callback = DataSelectionCallback("loss", warmup=2, low=0.0, high=0.5)
    rows, _, _ = test_selection.train(test_selection.build_dataset(), out, callback, max_steps=8, learning_rate=0.0)
    found = {"rows": rows, "chosen": callback.selection.indices.tolist(), "start": callback.report["start"]}
    (out / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
