"""`edgekd quantize`: settings as options, and what a user is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgekd.cli import main


def invoke(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.usefixtures("one_thread")
def test_options_are_settings_of_the_stage(make_model, text_data: Path, tmp_path: Path) -> None:
    out = invoke(
        "quantize", make_model("bert"), "--data", text_data, "--sequence", 16, "--lowering", "int4_weights",
        "--rounding", "adaptive", "--set", "tolerance=0.9", "--set", "group=16", "--out", tmp_path / "small",
        "--json", "-q",
    )  # fmt: skip
    [candidate] = json.loads(out)["details"]["candidates"]
    assert candidate["lowering"] == "int4_weights"
    told = json.loads((tmp_path / "small" / "config.json").read_text())["edgekd"]["quantization"]
    assert told["lowering"] == "int4_weights"
    assert (told["weights"]["method"], told["weights"]["group"]) == ("gptq", 16)
    again = invoke(
        "quantize", tmp_path / "small", "--data", text_data, "--sequence", 16, "--out", tmp_path / "twice", code=2
    )
    assert "already quantized to int4_weights" in again
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lowering", "int3"], "unknown lowering 'int3'"),
        (["--weight-bits", "3"], "weight_bits"),
        (["--set", "smooth=2"], "smooth"),
        (["--epochs", "-1"], "epochs"),
        (["--rounding", "up"], "rounding"),
    ],
)
def test_wrong_options_are_named(options, said, make_model, text_data: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["quantize", str(make_model("bert")), "--data", str(text_data), "--out", str(tmp_path / "x"), *options]
    )
    assert done.exit_code in (1, 2)
    assert said in done.output
