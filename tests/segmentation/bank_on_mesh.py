"""A scan over frames that fills banks; run in a process of four virtual devices, one for each video and object.

Prints one JSON line: whether a scan over frames gives the banks and readings of a single device, which part of the
memories a device holds, and the collectives of the compiled program.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tracevision_jax.segmentation.memory_bank import empty, insert, read
from tracevision_jax.segmentation.sam_config import MemoryConfig

TINY = MemoryConfig(width=8, memory_width=4, frames=4, max_pointers=5, store_dtype="float32")
"""Three recent frames, four recent pointers."""
COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"


def content(time: int, thing: int = 0) -> tuple[float, float]:
    """What a frame leaves in the memory and in the pointer of an object: numbers that tell where they come from."""
    return time + 100.0 * thing + 1, -(time + 100.0 * thing + 1)


def entry(config: MemoryConfig, time, things: int):
    """The same as arrays; `time` may be traced."""
    number = jnp.asarray(time, jnp.float32) + 100.0 * jnp.arange(things) + 1
    memory = jnp.broadcast_to(number[:, None, None, None], (things, 1, 1, config.memory_width))
    return memory, jnp.broadcast_to(-number[:, None], (things, config.width))


def tracked(bank, config: MemoryConfig, times, reverse):
    """Readings and the bank of a scan over frames; the first is a conditioning frame."""

    def body(bank, time):
        reading = read(bank, time, config, reverse=reverse)
        first = jnp.broadcast_to(time == times[0], (len(bank.memory_times),))
        return insert(bank, time, *entry(config, time, len(bank.memory_times)), first), reading

    return jax.lax.scan(body, bank, times)


def main() -> None:
    mesh = jax.make_mesh((2, 2), ("videos", "objects"), axis_types=(AxisType.Auto,) * 2)
    bank = empty(TINY, 2, 1, 1, conditioning=2)
    banks = jax.tree.map(lambda x: jnp.stack([x, x]), bank)
    times, reverse = jnp.stack([jnp.arange(8), jnp.arange(30, 22, -1)]), jnp.array([False, True])

    def run(banks, times, reverse):
        return jax.vmap(lambda bank, times, reverse: tracked(bank, TINY, times, reverse))(banks, times, reverse)

    alone = jax.jit(run)(banks, times, reverse)
    split = NamedSharding(mesh, PartitionSpec("videos", "objects"))
    by_video = NamedSharding(mesh, PartitionSpec("videos"))
    readings = NamedSharding(mesh, PartitionSpec("videos", None, "objects"))
    given = jax.device_put(banks, split), jax.device_put(times, by_video), jax.device_put(reverse, by_video)
    program = jax.jit(run, out_shardings=(split, readings)).lower(*given).compile()
    found = program(*given)
    equal = jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), found, alone))
    memories = found[0].memories
    report = {
        "devices": len(jax.devices()),
        "equal": equal,
        "share": memories.addressable_shards[0].data.size / memories.size,
        "collectives": sorted(set(re.findall(COLLECTIVES, program.as_text()))),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
