"""TraceVision's parameter tree, stages, start values and configurations, at toy size and at the paper's."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems.conftest import DECODER, drawn, tiny_host, tiny_system
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.qwen25vl import preset
from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.collate import collate
from tracevision_jax.systems.tracevision import STAGES, TraceVision, tracevision_config
from tracevision_jax.training.optimizer import OptimizerConfig, make_optimizer
from tracevision_jax.training.step import create_state
from tracevision_jax.trajectory.fourier import bin_centres, line_features, plane_features

RELEASED_7B = 8_292_166_656
"""Parameters of Qwen2.5-VL-7B-Instruct."""


def paths(tree) -> dict[str, tuple[int, ...]]:
    """Parameter paths joined by '/', with shapes."""
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def shapes(system):
    return jax.eval_shape(system.init, jax.random.key(0))


def host_tree(v, c) -> dict[str, tuple[int, ...]]:
    """The host's parameters as the contract of the project names them."""
    tree = {"vision/patch_embed/kernel": (v.patch_dim, v.width)}
    block = {
        "norm1/scale": (v.width,),
        "norm2/scale": (v.width,),
        "attn/qkv/kernel": (v.width, 3, v.heads, v.head_dim),
        "attn/qkv/bias": (3, v.heads, v.head_dim),
        "attn/proj/kernel": (v.heads, v.head_dim, v.width),
        "attn/proj/bias": (v.width,),
        **{f"mlp/{name}/kernel": (v.width, v.mlp_width) for name in ("gate", "up")},
        **{f"mlp/{name}/bias": (v.mlp_width,) for name in ("gate", "up")},
        "mlp/down/kernel": (v.mlp_width, v.width),
        "mlp/down/bias": (v.width,),
    }
    tree |= {f"vision/groups/window/{name}": (v.groups, v.window_blocks, *shape) for name, shape in block.items()}
    tree |= {f"vision/groups/full/{name}": (v.groups, *shape) for name, shape in block.items()}
    merged = v.merge**2 * v.width
    tree |= {
        "vision/merger/norm/scale": (v.width,),
        "vision/merger/fc1/kernel": (merged, merged),
        "vision/merger/fc1/bias": (merged,),
        "vision/merger/fc2/kernel": (merged, c.width),
        "vision/merger/fc2/bias": (c.width,),
        "language/embed/embedding": (c.vocab_size, c.width),
        "language/added/embedding": (c.added_tokens, c.width),
        "language/added/head": (c.added_tokens, c.width),
        "language/final_norm/scale": (c.width,),
    }
    projections = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
    layer = {
        "attn_norm/scale": (c.width,),
        "mlp_norm/scale": (c.width,),
        **{f"attn/{name}/kernel": (c.width, heads, c.head_dim) for name, heads in projections.items()},
        **{f"attn/{name}/bias": (heads, c.head_dim) for name, heads in projections.items()},
        "attn/o/kernel": (c.heads, c.head_dim, c.width),
        **{f"mlp/{name}/kernel": (c.width, c.mlp_width) for name in ("gate", "up")},
        "mlp/down/kernel": (c.mlp_width, c.width),
    }
    tree |= {f"language/layers/{name}": (c.layers, *shape) for name, shape in layer.items()}
    return tree if c.tied else tree | {"language/head/kernel": (c.width, c.vocab_size)}


@pytest.mark.parametrize("size", ["tiny", "3b", "7b", "72b"])
def test_the_tree_is_the_contracts(size, shapes):
    """{host: {vision, language}, tvp, decoder} with every name and shape of the host; the 3B one is tied."""
    if size == "tiny":
        config = tiny_system().config
    else:
        config = tracevision_config(preset(size), 151665)
        shapes = jax.eval_shape(TraceVision(config).init, jax.random.key(0))
    assert set(shapes) == {"host", "tvp", "decoder"}
    assert paths(shapes["host"]) == host_tree(config.host.vision, config.host.language)


def test_the_papers_size_is_built_and_counted():
    """Qwen2.5-VL-7B with a TVP of two blocks and a decoder of at most 12.5 M parameters."""
    system = TraceVision(tracevision_config(preset("7b"), 151665))
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    counts = {name: sum(math.prod(s) for s in paths(shapes[name]).values()) for name in shapes}
    added = sum(math.prod(s) for name, s in paths(shapes["host"]).items() if "/added/" in name)
    counts = {"host": counts["host"] - added, "added tokens": added, "tvp": counts["tvp"], "decoder": counts["decoder"]}
    print("7B: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    assert counts["host"] == RELEASED_7B
    assert added == 2 * 1009 * 3584
    assert counts["decoder"] <= 12_500_000
    assert counts["tvp"] < 0.05 * RELEASED_7B
    config = system.config
    assert (config.tvp.blocks, config.tvp.width, config.decoder.mask_size) == (2, 3584, 256)
    assert config.feature_groups == (2, 4) and config.host.language.first_added == 151665
    spec = system.batch_spec(Bucket(tokens=4096, frames=2, windows=96, conversations=6, points=128, masks=12), 8)
    assert spec.patches.shape == (8, 2, 96, 64, 1176) and spec.masks.shape == (8, 12, 256, 256)


ADDED = {"host/language/added/embedding", "host/language/added/head"}


def test_each_stage_trains_what_the_paper_says(system, shapes):
    """Sec. 4.1; stage 2 in the wording of Sec. 3.4 and App. B is `stage2_joint`."""
    every = set(paths(shapes))
    trained = {stage: {path for path in every if system.trainable(stage)(path)} for stage in STAGES}
    of = {top: {path for path in every if path.startswith(top)} for top in ("host/", "tvp/", "decoder/")}
    language = {path for path in every if path.startswith("host/language/")}
    print("stage 1 trains: " + ", ".join(sorted(trained["stage1"])))
    assert trained == {
        "stage0": of["host/"],
        "stage1": of["tvp/"] | ADDED,
        "stage1_5": every,
        "stage2": language,
        "stage2_joint": language | of["tvp/"],
    }
    assert language > ADDED and of["tvp/"] and of["decoder/"]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_frozen_parameters_have_neither_gradient_nor_optimizer_state(system, shapes, stage):
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state, frozen = jax.eval_shape(lambda params: create_state(system, params, optimizer, stage, 0), shapes)
    chosen = {path for path in paths(shapes) if system.trainable(stage)(path)}
    assert set(paths(state.trained)) == chosen
    assert set(paths(frozen)) == set(paths(shapes)) - chosen
    size = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert kept == 2 * size, "two moments of what is trained, nothing of the rest"


def test_an_unknown_stage_suggests_the_nearest(system):
    with pytest.raises(UserError, match=r"No stage 'stage15'\. Did you mean 'stage1_5'\? Stages: stage0, "):
        system.trainable("stage15")


@pytest.mark.parametrize("tied", [False, True])
def test_bins_start_from_fourier_features_at_the_norm_of_the_hosts_rows(vocabulary, tied):
    config = tracevision_config(tiny_host(vocabulary, tied=tied), vocabulary.first_added, DECODER, tvp={"heads": 2},
                                processor={"vision": tiny_system().config.processor.vision})  # fmt: skip
    system = TraceVision(config)
    before = drawn(system)
    before["host"]["language"]["embed"]["embedding"] *= 3
    after = system.settle(before)
    language, base = after["host"]["language"], before["host"]["language"]
    tables = {"embedding": base["embed"]["embedding"]}
    tables["head"] = tables["embedding"] if tied else base["head"]["kernel"].T
    features = line_features(bin_centres(1000), 16)
    for name, table in tables.items():
        rows = np.asarray(language["added"][name])
        norm = np.sqrt((table**2).sum(-1).mean())
        assert np.allclose(np.linalg.norm(rows[9:], axis=-1), norm, rtol=1e-5)
        assert np.allclose(rows[9:], norm * features, atol=1e-4)
        assert (rows[:9] == base["added"][name][:9]).all()
    assert np.allclose(after["tvp"]["out_scale"], np.sqrt((tables["embedding"] ** 2).mean()), rtol=1e-5)
    changed = {path for path, leaf in _leaves(before).items() if not np.array_equal(leaf, _leaves(after)[path])}
    assert changed == ADDED | {"tvp/out_scale"}


def _leaves(tree) -> dict[str, np.ndarray]:
    return {
        "/".join(key.key for key in path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_written_numbers_add_no_bins(vocabulary):
    config = tracevision_config(tiny_host(vocabulary), vocabulary.first_added, DECODER, tvp={"heads": 2},
                                processor={"coordinates": "digits"})  # fmt: skip
    assert config.host.language.added_tokens == 9 and config.processor.coordinates == "digits"
    system = TraceVision(config)
    before = drawn(system)
    after = system.settle(before)
    assert (after["host"]["language"]["added"]["head"] == before["host"]["language"]["added"]["head"]).all()


def test_batch_specs_are_the_shapes_of_batches(system, pieces):
    bucket = Bucket(tokens=96, frames=2, windows=4, conversations=3, points=6, masks=4)
    spec = system.batch_spec(bucket, 3)
    batch = collate([[piece] for piece in pieces], bucket, system.config.processor)
    for name, value in vars(batch).items():
        assert (vars(spec)[name].shape, vars(spec)[name].dtype) == (value.shape, value.dtype), name


def test_the_configuration_follows_from_the_host(system, vocabulary):
    config = system.config
    assert config.tvp.width == config.decoder.text_width == config.host.language.width == 16
    assert config.decoder.visual_width == config.host.vision.width == 8
    assert config.processor.mask_size == config.decoder.mask_size == 12
    assert config.processor.vision.patch == 4 and config.feature_groups == (1, 2)
    assert config.host.language.first_added == vocabulary.first_added


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("tvp", {"width": 32}, "TVP has width 32 .* must be the language model's width 16"),
        ("tvp", {"max_traces": 3}, "may show 8 traces, the TVP tells 3 apart"),
        ("decoder", {"visual_width": 4}, "features of width 4, the tower has 8"),
        ("decoder", {"tokens_per_scale": 2}, "2 x 2 codebook tokens; a mask has 6"),
        ("decoder", {"grid": 4}, "masks of side 12, the decoder 16"),
        ("processor", {"mask_size": 10}, "masks of side 10, the decoder 12"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(system, part, changes, reason):
    other = dataclasses.replace(getattr(system.config, part), **changes)
    with pytest.raises(UserError, match=reason):
        dataclasses.replace(system.config, **{part: other})


def test_pictures_must_be_cut_as_the_tower_takes_them(system):
    vision = dataclasses.replace(system.config.processor.vision, patch=8)
    rows = dataclasses.replace(system.config.processor, vision=vision)
    with pytest.raises(UserError, match="cuts pictures with patch 8, the tower takes 4"):
        dataclasses.replace(system.config, processor=rows)


@pytest.mark.parametrize(
    ("changes", "coordinates", "reason"),
    [
        ({"bin_reach": 1000}, "bins", "bin_reach is 1000; a coordinate has 1000 bins"),
        ({"bin_reach": -1}, "bins", "bin_reach is -1"),
        ({"bin_reach": 5}, "digits", "written digits have no neighbours"),
    ],
)
def test_a_reach_that_no_coordinate_has_is_refused(system, changes, coordinates, reason):
    rows = dataclasses.replace(system.config.processor, coordinates=coordinates)
    with pytest.raises(UserError, match=reason):
        dataclasses.replace(system.config, processor=rows, **changes)


def test_parameters_are_drawn_from_the_key_alone(system):
    one, same, other = (jax.jit(system.init)(jax.random.key(seed)) for seed in (0, 0, 1))
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True))
    assert not jnp.array_equal(one["decoder"]["token_in"]["kernel"], other["decoder"]["token_in"]["kernel"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_guided_layer_that_is_not_there_is_refused(system, layer):
    with pytest.raises(UserError, match=f"guided_layer is {layer}; the layers are 0 to 1"):
        dataclasses.replace(system.config, guided_layer=layer)


def test_visual_tokens_can_bring_their_places(system, params, pieces):
    """The difference to plain features is the Fourier features of the units' centres, in every conversation."""
    bucket = Bucket(tokens=136, frames=1, windows=4, conversations=2, points=6, masks=4)
    batch = jax.tree.map(jnp.asarray, collate([[pieces[1]]], bucket, system.config.processor))
    placed = TraceVision(dataclasses.replace(system.config, unit_places=3.0))
    plain, moved = (one.model.apply({"params": params}, batch, method="context").embeddings for one in (system, placed))
    visual = np.asarray(batch.visual_index[0]) >= 0
    features = np.asarray(moved - plain)[0]
    assert np.allclose(np.linalg.norm(features[visual], axis=-1), 3.0, atol=1e-4) and not features[~visual].any()
    centres = np.array([[x, y] for y in (0.25, 0.75) for x in (1 / 6, 0.5, 5 / 6)])
    assert np.allclose(features[visual], 3.0 * plane_features(jnp.asarray(centres), 16), atol=1e-5)
