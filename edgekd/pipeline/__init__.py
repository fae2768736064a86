"""The whole way: prepare, run the stages, check their promises, export, measure, judge, bundle, report."""

from edgekd.pipeline.alone import run_alone
from edgekd.pipeline.compress import Result, compress
from edgekd.pipeline.evaluate import evaluate
from edgekd.pipeline.setup import Setup, prepare

__all__ = ["Result", "Setup", "compress", "evaluate", "prepare", "run_alone"]
