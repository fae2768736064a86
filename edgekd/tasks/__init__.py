"""What a model is for: from examples to tensors, loss, metric and the inputs of its ONNX graph."""

from edgekd.tasks.batching import batches
from edgekd.tasks.score import correct, score_interval
from edgekd.tasks.table import TASKS, example_feeds, get_task, infer_task
from edgekd.tasks.task import Encoded, Processor, Task

__all__ = [
    "TASKS",
    "Encoded",
    "Processor",
    "Task",
    "batches",
    "correct",
    "example_feeds",
    "get_task",
    "infer_task",
    "score_interval",
]
