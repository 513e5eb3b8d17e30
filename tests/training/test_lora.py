"""Training through low-rank adapters: what moves, what is exported, what it costs; any system through one wrapper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel.small_tracevision import small_batch, small_system
from tests.systems.tiny_sam2 import clip_batch, sam2_of_two_heads
from tests.training.test_loop import RECIPE, Source, lines_of, params_of
from tests.training.tiny import random_batch
from tests.training.tiny_linear import LinearSystem
from tracevision_jax.errors import UserError
from tracevision_jax.layers.lora import LoRAConfig, is_adapter, merged
from tracevision_jax.parallel.flops import training_flops
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.rules import PARAMETERS, partition_specs
from tracevision_jax.systems.adapted import Adapted, with_adapters
from tracevision_jax.systems.config_json import to_json
from tracevision_jax.training.ahead_of_time import step_flops, training_program
from tracevision_jax.training.loop import fit
from tracevision_jax.training.parameters import flatten, merge, split, unflatten
from tracevision_jax.training.recipe import check
from tracevision_jax.training.step import total_loss

LORA = LoRAConfig(rank=4, alpha=8.0, targets=(r"layers/mlp/(up|down)/kernel$",))
ADAPTED = dataclasses.replace(RECIPE, lora=LORA)
EVERY = LoRAConfig(rank=2, targets=(r"(language/layers|vision/(groups|merger)|tvp)/.*kernel$",))


def train(directory, recipe=ADAPTED, **arguments):
    return fit(LinearSystem(), recipe, Source(), directory, **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with adapters and a frozen language model: (folder, what evaluators were given)."""
    directory, seen = tmp_path_factory.mktemp("lora"), []

    def look(params, step):
        seen.append(jax.device_get(flatten(params)))
        return {"numbers": 1.0}

    train(directory, evaluators={"look": look})
    return directory, seen


def test_adapters_and_what_the_stage_trains_move_and_the_export_has_them_in_its_kernels(finished):
    directory, seen = finished
    drawn = flatten(jax.jit(Adapted(LinearSystem(), LORA).init)(jax.random.key(0)))
    trained = params_of(directory)
    assert not any(map(is_adapter, trained))
    moved = {path for path, leaf in trained.items() if not np.array_equal(leaf, drawn[path])}
    layers = "language/layers/mlp"
    assert moved == {f"{layers}/up/kernel", f"{layers}/down/kernel", "language/head/kernel"}
    for name in ("up", "down"):
        path = f"{layers}/{name}/kernel"
        change = np.asarray(trained[path], np.float64) - np.asarray(drawn[path], np.float64)
        assert all(np.linalg.matrix_rank(matrix, tol=1e-5) == 4 for matrix in change)
    assert seen[-1].keys() == trained.keys()
    jax.tree.map(np.testing.assert_array_equal, seen[-1], dict(trained))


def test_the_loss_falls_through_adapters_alone(tmp_path):
    recipe = dataclasses.replace(
        ADAPTED, lora=dataclasses.replace(LORA, rank=8), optimizer=dataclasses.replace(RECIPE.optimizer, warmup=0.0)
    )

    class OneBatch(Source):
        def batches(self, start):
            first = next(iter(super().batches(0)))
            for step in range(start, self.steps):
                yield dataclasses.replace(first, step=step)

    class Frozen(LinearSystem):
        def trainable(self, stage):
            return lambda path: False

    fit(Frozen(), recipe, OneBatch(steps=60), tmp_path)
    losses = [line["loss"] for line in lines_of(tmp_path, "train")]
    assert losses[-1] < 0.6 * losses[0]


def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path):
    fit(LinearSystem(), ADAPTED, Source(interrupt_at=5), tmp_path)
    train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, dict(params_of(tmp_path)), dict(params_of(finished[0])))


def test_the_next_run_starts_from_the_merged_model(finished, tmp_path):
    recipe = dataclasses.replace(RECIPE, init_from=str(finished[0]), name="next")
    fit(LinearSystem(), recipe, Source(), tmp_path)
    path = "language/layers/mlp/up/kernel"
    np.testing.assert_array_equal(params_of(tmp_path)[path], params_of(finished[0])[path])


def test_a_recipe_without_adapters_is_the_system_itself():
    system = LinearSystem()
    assert with_adapters(system, LoRAConfig()) is system


def test_mistakes_are_refused_before_anything_is_trained(tmp_path):
    wrong = dataclasses.replace(ADAPTED, lora=dataclasses.replace(LORA, targets=("mlp/sideways/kernel",)))
    with pytest.raises(UserError, match="'mlp/sideways/kernel' matches no kernel"):
        train(tmp_path, wrong)
    with pytest.raises(UserError, match=r"lora\.rank is -1"):
        check(dataclasses.replace(ADAPTED, lora=LoRAConfig(rank=-1)))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_recipe_with_adapters_travels_as_json():
    assert to_json(ADAPTED)["lora"]["rank"] == 4


@pytest.fixture(scope="module")
def tracevision():
    """(system, parameters whose adapters have a say, batch)."""
    system = Adapted(small_system(), EVERY)
    rng, shapes = np.random.default_rng(0), flatten(jax.eval_shape(system.init, jax.random.key(0)))
    leaves = {path: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype) for path, leaf in shapes.items()}
    return system, unflatten(leaves), jax.tree.map(jnp.asarray, small_batch(2))


def loss_of(system, params, batch):
    sums, weights, _ = system.loss(params, system.init_state(), batch, jax.random.key(0))
    return total_loss(system.coefficients, sums, weights)


def test_tracevision_with_merged_kernels_is_tracevision_with_adapters(tracevision):
    system, params, batch = tracevision
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda params: loss_of(system, params, batch))(params)
        alone = jax.jit(lambda params: loss_of(system.base, params, batch))
        np.testing.assert_allclose(ours, alone(merged(params, EVERY)), rtol=1e-5)
        assert abs(ours - alone(merged(params, dataclasses.replace(EVERY, alpha=1e-3)))) > 1e-2


def test_every_adapter_of_tracevision_is_cut_as_its_kernel_is(tracevision):
    _, params, _ = tracevision
    sizes = {"data": 1, "fsdp": 2, "tensor": 2, "context": 1}
    specs = flatten(partition_specs(params, sizes, PARAMETERS))
    for path, spec in specs.items():
        if path.endswith("lora_a"):
            kernel, other = specs[path.replace("lora_a", "kernel")], specs[path.replace("lora_a", "lora_b")]
            assert spec[-1] is None
            stacked = len(spec) + len(other) - 2 - len(kernel)
            assert other[stacked] is None
            assert tuple(spec[:-1]) + tuple(other[stacked + 1 :]) == tuple(kernel), path


def test_frozen_kernels_cost_no_gradient_and_adapters_are_thin():
    """Products of a step, each 2 x tokens x in x out: forward, back to what came in, and back to what is trained."""
    base, c = LinearSystem(), LinearSystem().config
    tokens, thin = 4 * RECIPE.buckets[0].tokens, 2 * c.layers * LORA.rank * (c.width + c.mlp_width)
    layers, head = 2 * c.layers * c.width * c.mlp_width, c.width * c.vocab_size
    for system, wanted in ((base, 3 * (layers + head)), (Adapted(base, LORA), 2 * (layers + head) + head + 3 * thin)):
        trains = system.trainable("all")
        trained, frozen = split(jax.eval_shape(system.init, jax.random.key(0)), trains)
        given = frozen, system.batch_spec(RECIPE.buckets[0], 4)

        def loss(trained, given, system=system):
            return loss_of(system, merge(trained, given[0]), given[1])

        assert training_flops(loss, trained, given, ["language"]).model == 2 * tokens * wanted


def test_the_program_compiled_ahead_of_time_has_each_adapter_once():
    base, bucket, mesh = LinearSystem(), RECIPE.buckets[0], make_mesh(MeshConfig(), jax.devices()[:1])
    recipe = dataclasses.replace(ADAPTED, stage="all")
    program = training_program(base, recipe, bucket, 4, mesh)
    assert program.flops == step_flops(base, recipe, bucket, 4)
    adapted, given = Adapted(base, LORA), jax.tree.map(jnp.asarray, random_batch(4))
    trained, frozen = split(jax.eval_shape(adapted.init, jax.random.key(0)), adapted.trainable("all"))
    wanted = training_flops(
        lambda trained, given: loss_of(adapted, merge(trained, given[0]), given[1]), trained, (frozen, given), []
    )
    assert program.flops.model == wanted.model
    assert program.lower().compile() is not None


def test_sam2_is_adapted_by_the_same_wrapper():
    config = LoRAConfig(rank=2, targets=(r"vision_encoder/.*/(qkv|proj|proj_in|proj_out)/kernel$",))
    system = Adapted(sam2_of_two_heads(), config)
    params = jax.eval_shape(system.init, jax.random.key(0))
    trains = system.trainable("all")
    kernels = [path for path in flatten(params) if config.matches(path)]
    assert kernels and not any(map(trains, kernels))
    assert sum(map(is_adapter, flatten(params))) == 2 * len(kernels)
    partition_specs(params, {"data": 1, "fsdp": 2, "tensor": 2, "context": 1}, PARAMETERS)
    batch = jax.tree.map(jnp.asarray, clip_batch(rows=1))
    assert jax.eval_shape(lambda params: loss_of(system, params, batch), params).shape == ()
