"""A run as the demo leaves it, made up: stages' metrics, records of every task from true answers moved a little, and
a model that answers by rote. What the report makes of it can be told in advance.
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from data_loaders.sources.synthetic import SyntheticSource
from data_loaders.synthetic.config import COLOURS, SHAPES, SceneConfig
from evaluation.grounding_tasks import ReferBox, ReferSegment, TraceSegment
from evaluation.report_examples import Evaluated
from evaluation.sweep import Outcome, record_of
from evaluation.task import Prompt, Samples, Table, Task
from evaluation.trace_tasks import TraceCaptioning, TracedObject, TracePrediction
from tests.inference import tiny
from tracevision_jax.inference.answers import Answer, Box, Mask, Phrase, Trajectory
from tracevision_jax.inference.attention import BlockAttention
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.processor_config import ProcessorConfig
from tracevision_jax.records.sample import BoxPart, Conversation, MaskPart, PhrasePart, Sample, TracePart
from tracevision_jax.records.simplification import Simplification
from tracevision_jax.trajectory.checks import check_trace
from tracevision_jax.trajectory.simplify import plain

QUESTIONS = ("what", "trace_segment", "dialogue", "which_trace")
TASKS: tuple[Task, ...] = (
    TracedObject(tuple(COLOURS), SHAPES),
    TraceCaptioning(),
    TracePrediction(),
    ReferBox(),
    ReferSegment(),
    TraceSegment(),
)


def scenes(count: int, side: int = 64) -> SyntheticSource:
    """Held-out scenes with a question of each kind."""
    config = SceneConfig(height=(side, side), width=(side, side), questions=QUESTIONS, questions_per_scene=4)
    return SyntheticSource(1, count, config)


@functools.cache
def processor() -> Processor:
    """Of the demo's kind: a dozen keypoints a trace."""
    return Processor(tiny.vocabulary(), ProcessorConfig(max_points=14, simplification=Simplification(epsilon_px=2.0)))


def metrics_lines(steps: int = 100, parts: tuple[str, ...] = ("text", "accuracy")) -> list[dict]:
    """Lines of a training journal, one every ten steps."""
    lines = []
    for step in range(10, steps + 1, 10):
        falling = {"text": 6.0, "refinement": 0.7, "dice": 0.9}
        values = {
            part: 1 - 0.98 ** (step / 2) if part == "accuracy" else falling[part] * 0.97 ** (step / 5) for part in parts
        }
        times = {"tokens": 1000 * step, "tokens_per_second": 2000.0, "step_seconds": 0.5, "input_share": 0.1}
        rates = {"gradient_norm": 1.0, "learning_rate": 1e-3}
        lines.append({"kind": "train", "step": step, "epoch": 0, "loss": 1.0, "parts": values} | times | rates)
    return lines


def write_stages(run: Path, steps: int = 100) -> None:
    """All stages' metrics.jsonl."""
    everything = ("text", "refinement", "dice", "accuracy")
    for stage, parts in (
        ("stage0", ("text", "accuracy")),
        ("stage1", ("text", "accuracy")),
        ("stage1_5", everything),
        ("stage2", everything),
    ):
        lines = metrics_lines(steps, parts)
        if stage == "stage2":
            for step in (steps // 2, steps):
                lines.append({"kind": "evaluation", "step": step, "name": "held_out", "values": {"P@0.5": step / 120}})
        (run / stage).mkdir(parents=True, exist_ok=True)
        (run / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# Answers


def answer_of(*parts, size: tuple[int, int]) -> Answer:
    return Answer((), tuple(parts), (), "end", "", size)


def moved_answer(prompt: Prompt, random: np.random.Generator, noise: float) -> Answer:
    """The true answer of a prompt with its places moved; of a control, the answer to something else."""
    size = prompt.sample.size
    if prompt.control:
        return answer_of("A pink heart.", Trajectory(random.random((8, 2))), size=size)
    turn = prompt.conversation.turns[-1]
    parts = turn.parts if turn.role == "assistant" and turn.parts else _unsaid(prompt)
    return answer_of(*(_moved(part, random, noise) for part in parts), size=size)


def _unsaid(prompt: Prompt) -> list:
    """The truth of prompts that end with the question."""
    if "phrase" in prompt.truth:
        return [BoxPart(np.array(prompt.truth["truth"]))]
    points = np.concatenate(prompt.sample.strokes)
    return [TracePart(processor().keypoints(TracePart(points, prompt.sample.words), prompt.sample.size))]


def _moved(part, random: np.random.Generator, noise: float):
    if isinstance(part, BoxPart):
        return Box(np.clip(part.box + noise * random.standard_normal(4), 0, 1))
    if isinstance(part, TracePart):
        return Trajectory(np.clip(part.points[:, :2] + noise * random.standard_normal((len(part.points), 2)), 0, 1))
    if isinstance(part, PhrasePart):
        return Phrase(part.text)
    if isinstance(part, MaskPart):
        grid = Image.fromarray(part.mask[0].astype(np.float32)).resize((32, 32), Image.Resampling.BILINEAR)
        return Mask(np.asarray(grid)[None] * 10 - 5)
    return part


def evaluated(task: Task, samples: Samples, noise: float = 0.02) -> Evaluated:
    """Records of all prompts of a task, and its tables; captions' metrics as without Java."""
    random = np.random.default_rng(0)
    prompts = [prompt for index in range(len(samples)) for prompt in task.prompts(samples, index)]
    records = [record_of(task, prompt, moved_answer(prompt, random, noise), processor()) for prompt in prompts]
    tables = [captions_without_java()] if isinstance(task, TraceCaptioning) else task.tables(records)
    return Evaluated(task.name, task, Outcome(tables, records))


def captions_without_java() -> Table:
    """What a machine without Java gives."""
    names = ("BLEU-1", "CIDEr", "SPICE")
    return Table("Captions of traces", dict.fromkeys(names), dict.fromkeys(names, "there is no Java on this machine"))


# A model


class RoteModel:
    """Says the same to everything, and looks where the trace is; keeps the conversations that it was asked."""

    def __init__(self, text: str = "A red circle.", tvp: bool = True):
        self.text, self.tvp = text, tvp
        self.asked: list[Conversation] = []
        self.processor = SimpleNamespace(piece=self._piece, config=processor().config)
        parameters = {"host": {"kernel": np.zeros((10, 20))}, "tvp": {"kernel": np.zeros(7)}}
        self.engine = SimpleNamespace(generate=self._generate, params=parameters)

    def _piece(self, sample: Sample, conversations: list[Conversation], answer: bool) -> Conversation:
        assert not answer
        (conversation,) = conversations
        assert conversation.turns[-1].role == "user"
        self.asked.append(conversation)
        return conversation

    def _generate(self, pieces: list[Conversation], *, max_new_tokens: int, rows: int) -> list[Answer]:
        parts = (self.text, Trajectory(np.array([[0.2, 0.3], [0.7, 0.6]])))
        return [
            Answer((), parts if piece.task == "joint_caption_trace" else parts[:1], (), "end", "") for piece in pieces
        ]

    def describe(self, image: np.ndarray, trace: np.ndarray, *, max_new_tokens: int) -> Answer:
        return answer_of(self.text, size=image.shape[:2])

    def attention(self, image: np.ndarray, trace: np.ndarray) -> list[BlockAttention]:
        points = plain(check_trace(trace), image.shape[:2], 1.0)[:14]
        if not self.tvp:
            return [BlockAttention(None, None, points)]
        row, column = (np.mgrid[0:8, 0:8] + 0.5) / 8
        far = (points[:, :1, None] - column) ** 2 + (points[:, 1:2, None] - row) ** 2
        near = 1 / (0.002 + far**1.5)[None, :, None]
        return [
            BlockAttention(
                near / near.sum(axis=1, keepdims=True), near / near.sum(axis=(2, 3, 4), keepdims=True), points
            )
        ]
