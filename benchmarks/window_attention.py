"""Window attention of the vision tower beside attention over the full square: `python -m benchmarks.window_attention`.

One layer's attention at Qwen2.5-VL's sizes (16 heads of 80 channels, windows of 64 patches), forward, float32, the
best of three times. Windows are a batch axis, so both time and products grow with their number, not with its square.
"""

import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from tracevision_jax.ops.attention import attention
from tracevision_jax.parallel.flops import forward_flops
from tracevision_jax.vision.config import VISION_PRESETS

COUNTS = (4, 16, 48, 96)
"""Windows of a frame; a frame of the 7B recipe has 96."""


def cost(sets: int, tokens: int) -> tuple[float, float]:
    """(GFLOPs, seconds) of attention within `sets` sets of so many tokens."""
    config = VISION_PRESETS["7b"]
    x = jax.random.normal(jax.random.key(0), (sets, tokens, config.heads, config.head_dim))
    run = jax.jit(lambda x: attention(x, x, x, q_segments=jnp.ones((sets, tokens), jnp.int32)))
    jax.block_until_ready(run(x))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - start)
    return forward_flops(lambda x: attention(x, x, x), x).forward / 1e9, min(times)


def main() -> None:
    """Print the table."""
    table = Table(title=f"attention of one layer and frame, {jax.devices()[0].device_kind}")
    for name in ("windows", "GFLOPs in windows", "full square", "ms in windows", "full square"):
        table.add_column(name, justify="right")
    slots = VISION_PRESETS["7b"].slots
    for count in COUNTS:
        (flops, seconds), (square, whole) = cost(count, slots), cost(1, count * slots)
        table.add_row(str(count), f"{flops:.2f}", f"{square:.2f}", f"{1e3 * seconds:.1f}", f"{1e3 * whole:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
