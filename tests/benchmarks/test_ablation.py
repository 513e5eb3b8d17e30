"""The ablation's variants and table; training them takes hours and is `make ablation`."""

import jax
import pytest

from benchmarks import ablation
from configs import registry
from tracevision_jax.errors import UserError


def test_variants_change_one_thing_each():
    base = ablation._recipe("stage1_5", 0, 1.0, lambda config: config).model.config
    for name, (_, change) in ablation.VARIANTS.items():
        config = change(base)
        assert config.host == base.host and config.decoder == base.decoder
        changed = [config.tvp != base.tvp, config.processor.simplification != base.processor.simplification]
        assert sum(changed) == (0 if name == "both" else 1), name
    directions = {name: change(base).tvp.direction for name, (_, change) in ablation.VARIANTS.items()}
    assert {directions[name] for name in ("both", "none", "trace_to_vision", "vision_to_trace")} == {
        *("both", "none", "trace_to_vision", "vision_to_trace")
    }


@pytest.mark.parametrize("name", ["none", "trace_to_vision", "vision_to_trace"])
def test_systems_of_every_direction_can_be_drawn(name):
    recipe = ablation._recipe("stage1_5", 0, 1.0, ablation.VARIANTS[name][1])
    system = registry.system(recipe.system).build(recipe)
    params = jax.eval_shape(system.init, jax.random.key(0))
    blocks = params["tvp"].get("block_0", {})
    assert bool(blocks) == ("out_scale" in params["tvp"]) == (name != "none")


@pytest.mark.parametrize("name", ["uniform", "plain"])
def test_other_simplifications_keep_as_many_keypoints_as_the_semantic_one(name):
    base = ablation._recipe("stage1_5", 0, 1.0, lambda config: config).model.config
    how = ablation.VARIANTS[name][1](base).processor.simplification
    assert how.as_semantic and how.method == name and how.epsilon_px == base.processor.simplification.epsilon_px


def test_seeds_train_on_other_scenes_and_length_scales_the_steps():
    one, other = (ablation._recipe("stage1_5", seed, 0.5, lambda config: config) for seed in (0, 2))
    assert one.steps == round(0.5 * ablation.get("tracevision_demo_stage1_5").steps) == other.steps
    assert (one.seed, other.seed) == (0, 2)
    for left, right in zip(one.data.sources, other.data.sources, strict=True):
        assert right.options["seed"] == left.options["seed"] + 200
        assert left.options["count"] == one.steps * one.rows[0]


def test_the_table_has_means_and_ranges_over_seeds():
    results = {"both/0": {"named": 0.9, "ciou": 0.5}, "both/1": {"named": 0.8}, "none/0": {"named": 0.25}}
    text = ablation.table(results, ablation.Args(seeds=2))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == "| variant | seeds | named | ciou |"
    assert lines[1].endswith("| 2 | 0.850 (0.800 to 0.900) | 0.500 |")
    assert lines[2] == "| no TVP | 1 | 0.250 | - |"
    assert len(lines) == 3


def test_an_unknown_variant_is_refused(tmp_path):
    with pytest.raises(UserError, match="no variant bothe; there are both, none"):
        ablation.run(ablation.Args(out=tmp_path, variants=("bothe",)))
    assert not list(tmp_path.iterdir())
