"""The parameters of a Qwen2.5-VL from its state dictionary, written out by hand: what the table must give."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig

State = Mapping[str, np.ndarray]


def linear(state: State, name: str, outputs: Sequence[int], inputs: Sequence[int]) -> dict[str, np.ndarray]:
    """A torch linear map (out, in) as a kernel (in..., out...) and a bias (out...)."""
    kernel = {"kernel": state[f"{name}.weight"].T.reshape(*inputs, *outputs)}
    return kernel | ({"bias": state[f"{name}.bias"].reshape(outputs)} if f"{name}.bias" in state else {})


def stacked(trees: Sequence) -> dict | np.ndarray:
    """Equal trees with their leaves stacked along a new first axis."""
    if isinstance(trees[0], np.ndarray):
        return np.stack(trees)
    return {key: stacked([tree[key] for tree in trees]) for key in trees[0]}


def mlp(state: State, name: str, width: int, hidden: int) -> dict:
    """Gate, up and down."""
    return {
        "gate": linear(state, f"{name}.gate_proj", [hidden], [width]),
        "up": linear(state, f"{name}.up_proj", [hidden], [width]),
        "down": linear(state, f"{name}.down_proj", [width], [hidden]),
    }


def expected_parameters(state: State, config: Qwen25VLConfig) -> dict:
    """All parameters; `state` has the names on disk."""
    v, c = config.vision, config.language

    def block(number: int) -> dict:
        name = f"visual.blocks.{number}"
        return {
            "norm1": {"scale": state[f"{name}.norm1.weight"]},
            "attn": {
                "qkv": linear(state, f"{name}.attn.qkv", [3, v.heads, v.head_dim], [v.width]),
                "proj": linear(state, f"{name}.attn.proj", [v.width], [v.heads, v.head_dim]),
            },
            "norm2": {"scale": state[f"{name}.norm2.weight"]},
            "mlp": mlp(state, f"{name}.mlp", v.width, v.mlp_width),
        }

    def layer(number: int) -> dict:
        name = f"model.layers.{number}"
        heads = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
        attention = {
            key: linear(state, f"{name}.self_attn.{key}_proj", [count, c.head_dim], [c.width])
            for key, count in heads.items()
        }
        attention["o"] = linear(state, f"{name}.self_attn.o_proj", [c.width], [c.heads, c.head_dim])
        return {
            "attn_norm": {"scale": state[f"{name}.input_layernorm.weight"]},
            "attn": attention,
            "mlp_norm": {"scale": state[f"{name}.post_attention_layernorm.weight"]},
            "mlp": mlp(state, f"{name}.mlp", c.width, c.mlp_width),
        }

    def of_each_group(make: Callable[[int], dict | np.ndarray]) -> dict | np.ndarray:
        return stacked([make(group * (v.window_blocks + 1)) for group in range(v.groups)])

    merged = v.merge**2 * v.width
    language = {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "layers": stacked([layer(number) for number in range(c.layers)]),
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    if not c.tied:
        language["head"] = {"kernel": state["lm_head.weight"].T}
    return {
        "vision": {
            "patch_embed": {"kernel": state["visual.patch_embed.proj.weight"].reshape(v.width, v.patch_dim).T},
            "groups": {
                "window": of_each_group(lambda first: stacked([block(first + n) for n in range(v.window_blocks)])),
                "full": of_each_group(lambda first: block(first + v.window_blocks)),
            },
            "merger": {
                "norm": {"scale": state["visual.merger.ln_q.weight"]},
                "fc1": linear(state, "visual.merger.mlp.0", [merged], [merged]),
                "fc2": linear(state, "visual.merger.mlp.2", [v.out_width], [merged]),
            },
        },
        "language": language,
    }
