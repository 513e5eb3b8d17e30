"""Run by test_generation.py in a process of its own: generate on four virtual devices, print JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tracevision_jax.hosts.generation import Generator
from tracevision_jax.hosts.grammar import text_grammar
from tracevision_jax.hosts.sampling import sampling_settings
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.language.model import LanguageModel

CONFIG = LanguageConfig(
    vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48, mrope_sections=(2, 1, 1)
)


def generate(data: int, tensor: int) -> dict:
    """Generate with rows over `data` and heads over `tensor`; what a test compares."""
    mesh = jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    model = LanguageModel(CONFIG)
    params = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32), method="initialise")["params"]
    params = jax.device_put(jax.tree.map(lambda x: 3 * x, params), NamedSharding(mesh, P()))
    rules = {"batch": "data", "heads": "tensor", "kv_heads": "tensor"}
    generator = Generator(model, text_grammar(64, [63]), mesh, rules)
    lengths = np.array([3, 9, 12, 5], np.int32)
    embeddings = np.random.default_rng(0).normal(0, 0.3, (4, 12, 32)).astype(np.float32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32)[None, :, None], (4, 12, 3)).copy()
    shards, inner = [], generator._prefill

    def watched(*arguments):
        state = inner(*arguments)
        shards.append(state.cache.keys.addressable_shards[0].data.shape)
        return state

    generator._prefill = watched
    settings = sampling_settings(4, [0.0, 0.0, 1.0, 1.0], top_p=0.9)
    parts = generator.stream(params, embeddings, positions, lengths, every=5, max_new_tokens=12, settings=settings)
    *_, last = parts
    assert last.result is not None
    return {
        "answers": last.result.answers(),
        "log_probabilities": np.asarray(last.result.log_probabilities).tolist(),
        "cache_rows_on_a_device": shards[0][1],
        "cache_heads_on_a_device": shards[0][2],
        "programs": [inner._cache_size(), generator._decode._cache_size()],
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    print(json.dumps(generate(2, 2)))
