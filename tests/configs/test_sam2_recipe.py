"""The recipe of the tiny SAM 2: it fits together, and every parameter of SAM and SAM 2 has a place on a mesh."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from configs import registry
from configs.sam2_demo import HELD_OUT_SEED
from data_loaders.clips import size_table
from data_loaders.plan import Lengths, Plan
from launch.train import parse
from tracevision_jax.hosts.sam import SegmentAnything
from tracevision_jax.hosts.sam_presets import SAM_PRESETS
from tracevision_jax.parallel.rules import PARAMETERS, spec_of
from tracevision_jax.systems.config_json import from_json, to_json
from tracevision_jax.training.optimizer import matrix_axes
from tracevision_jax.training.parameters import count, flatten


@pytest.fixture(scope="module")
def recipe():
    return registry.get("sam2_demo")


def test_clips_of_the_recipe_fill_its_steps_and_fit_its_bucket(recipe):
    entry = registry.system(recipe.system)
    system = entry.build(recipe)
    opened = registry.open_sources(recipe.data)
    assert len(opened[0]) == recipe.steps * recipe.rows[0]
    data = entry.data(recipe, system, opened[:1])
    few = size_table(data.records[0])[:64]
    plan = Plan(0, [Lengths("videos", few)], list(recipe.buckets), list(recipe.rows))
    assert not plan.too_long and plan.steps_in(1) == 64 // recipe.rows[0]
    batch = data.collate([data.make_row([data.records[0][0]])], recipe.buckets[0])
    spec = system.batch_spec(recipe.buckets[0], 1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), spec)


def test_what_is_held_out_has_another_seed(recipe):
    (held_out,) = recipe.evaluation.sources
    assert held_out.options["seed"] == HELD_OUT_SEED != recipe.data.sources[0].options["seed"]


def test_the_model_is_tiny_and_comes_back_from_json(recipe):
    system = registry.system(recipe.system).build(recipe)
    assert count(jax.eval_shape(system.init, jax.random.key(0))) < 2e6
    assert from_json(type(system.config), to_json(system.config)) == system.config


def test_fields_are_flags():
    recipe = parse(["sam2_demo", "--model.prompting.clicks", "5", "--rows", "4", "--buckets.0.frames", "6"]).recipe
    assert recipe.model.prompting.clicks == 5 and recipe.rows == (4,) and recipe.buckets[0].frames == 6


@pytest.mark.parametrize("name", ["sam_vit_b", "sam2.1_hiera_base_plus"])
def test_every_parameter_has_a_rule_and_the_encoders_blocks_are_cut(name):
    model = SegmentAnything(SAM_PRESETS[name])
    side = model.config.image_size
    shapes = flatten(
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), "float32"))["params"]
    )
    specs = {path: spec_of(path, leaf.shape, PARAMETERS) for path, leaf in shapes.items()}
    assert [path for path, spec in specs.items() if spec is None] == []
    cut = {path for path, spec in specs.items() if any(spec)}
    assert any(path.endswith("attn/qkv/kernel") for path in cut) and any("mlp/proj_in/kernel" in path for path in cut)
    assert spec_of("mask_decoder/iou_token", (1, 256), PARAMETERS) == P(None, None)


def test_muon_takes_matrices_for_matrices_and_leaves_convolutions():
    def axes(path, ndim):
        found = matrix_axes(path, ndim)
        return found if found is None else tuple(found)

    assert axes("vision_encoder/backbone/patch_embed/kernel", 4) is None
    assert axes("memory_encoder/memory_fuser_layers_0/depthwise_conv/kernel", 4) is None
    assert axes("mask_decoder/upscale_conv1/kernel", 4) is None
    assert axes("vision_encoder/backbone/blocks_3/attn/qkv/kernel", 4) == ((0,), (2, 3))
    assert axes("mask_decoder/output_hypernetworks_mlps/proj_in/kernel", 3) == ((1,), (2,))
    assert axes("memory_conditioning/memory_attention/layers/self_attn/o_proj/kernel", 4) == ((1, 2), (3,))
