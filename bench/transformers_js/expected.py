"""What optimum's pipeline says of the first texts of a data folder's test split, for check.mjs.

python bench/transformers_js/expected.py BUNDLE DATA > expected.jsonl
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline


def main(bundle: str, data: str, count: int = 200) -> None:
    model = ORTModelForSequenceClassification.from_pretrained(bundle)
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(bundle))
    with (Path(data) / "test.jsonl").open(encoding="utf-8") as lines:
        for line in islice(lines, count):
            text = json.loads(line)["text"]
            print(json.dumps({"text": text, **classify(text)[0]}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
