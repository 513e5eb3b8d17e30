"""Run by test_arrays.py: how much resident memory loading takes above the arrays, in bytes.

The kernel's peak of the process (VmHWM) is reset before loading. Compiled programs and jax's own memory are
not what is asked for: a first load of another checkpoint of the same shapes pays for them, and its arrays are
freed.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks.resident_memory import peak_above
from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.vision.config import QwenVisionConfig
from tracevision_jax.weights import native, qwen25vl
from tracevision_jax.weights.conversion import to_native
from tracevision_jax.weights.families import load_host
from tracevision_jax.weights.safetensors_io import TensorPlan, write_sharded

CONFIG = Qwen25VLConfig(
    vision=QwenVisionConfig(out_width=512, width=48, heads=3, mlp_width=76, groups=2, window_blocks=1),
    language=LanguageConfig(
        vocab_size=4000,
        width=512,
        layers=4,
        heads=32,
        kv_heads=2,
        head_dim=16,
        mlp_width=4096,
        mrope_sections=(2, 3, 3),
    ),
)


def write_checkpoint(folder: Path) -> int:
    """Write a Hugging Face directory, and return the bytes of its largest tensor."""
    shapes = qwen25vl.table(CONFIG).torch_shapes
    kind = np.dtype(np.float32)
    plans = [
        TensorPlan(name, shape, kind, lambda shape=shape: iter([np.full(shape, 0.5, kind)]))
        for name, shape in shapes.items()
    ]
    folder.mkdir()
    write_sharded(folder, "model", plans, 10**12)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    return max(plan.bytes for plan in plans)


def main(folder: Path, form: str) -> None:
    """Print the measurements."""
    largest = write_checkpoint(folder / "in")
    if form == "native":
        to_native(folder / "in", folder / "native", qwen25vl.FAMILY).run()
        native.MAX_BLOCK_BYTES = largest // 2
    source = folder / ("in" if form == "hugging_face" else "native")
    _, warm_up = load_host(source)
    del warm_up
    loaded = []
    peak = peak_above(lambda: loaded.append(load_host(source)[1]))
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    print(json.dumps({"largest": largest, "arrays": arrays, "above": peak - arrays}))


main(Path(sys.argv[1]), sys.argv[2])
