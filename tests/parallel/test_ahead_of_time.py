"""What a compiled step needs and takes: on eight virtual devices, and on hand-made numbers."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tests.on_devices import printed_on
from tracevision_jax.parallel.ahead_of_time import Program, kernel_products, measure, memory
from tracevision_jax.parallel.flops import Flops
from tracevision_jax.parallel.hlo import executed, parse
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.topologies import topology

ROOT = Path(__file__).resolve().parents[2]
WIDTH, MLP, LAYERS, WORDS, TOKENS, ROWS = 16, 32, 2, 32, 12, 16
"""Of `tests.training.tiny` and its bucket."""


@pytest.fixture(scope="module")
def found() -> dict:
    """What `ahead_on_mesh.py` prints in a process of eight virtual devices."""
    return printed_on(8, "tests.parallel.ahead_on_mesh")


def test_collectives_of_a_sharded_scan_are_those_known_by_hand(found):
    uses = {use["kind"]: use for use in found["scan"]}
    assert set(uses) == {"all-reduce", "all-gather"}
    assert (uses["all-reduce"]["axes"], uses["all-reduce"]["times"]) == (["tensor"], 5)
    assert uses["all-reduce"]["whole"] == 16 * 32 * 4
    assert (uses["all-gather"]["axes"], uses["all-gather"]["times"]) == (["fsdp"], 5)
    assert uses["all-gather"]["whole"] == 8 * 32 * 4
    assert all(use["known"] for use in found["scan"])


def test_the_memory_of_a_step_is_parted_by_what_holds_it(found):
    hbm, held = found["outcome"]["hbm"], found["held"]
    assert {name: hbm[name] for name in held} == held
    parameters = 2 * WORDS * WIDTH + 2 * LAYERS * WIDTH * MLP + LAYERS * WIDTH + 4 * 3 * WIDTH
    assert parameters * 4 / 4 < held["parameters"] < parameters * 4 / 2  # most are in four slices
    assert 2 * held["parameters"] <= held["optimizer"] < 2 * held["parameters"] + 64  # two moments
    assert hbm["total"] >= sum(held.values())
    assert hbm["total"] <= sum(size for name, size in hbm.items() if name not in ("total", "capacity"))
    assert found["outcome"]["fits"]


def test_the_flops_of_the_compiled_step_are_those_that_were_counted(found):
    outcome = found["outcome"]
    forward = 2 * ROWS * TOKENS * (2 * LAYERS * WIDTH * MLP + WIDTH * WORDS) + 2 * ROWS * WIDTH * 3
    assert outcome["model_flops"] == 3 * forward
    assert outcome["recomputed_flops"] == outcome["kernel_flops"] == 0
    # Every chip does its share, and a little is done by several.
    assert 1.0 <= 8 * outcome["executed_flops"] / outcome["model_flops"] < 1.1
    assert outcome["intensity"] == pytest.approx(outcome["executed_flops"] / outcome["hbm_traffic"])


def test_the_step_communicates_along_each_axis_and_its_time_follows(found):
    outcome = found["outcome"]
    axes = {line["axes"] for line in outcome["collectives"]}
    assert any("tensor" in name for name in axes) and any("fsdp" in name for name in axes)
    assert all(line["trips_known"] for line in outcome["collectives"])
    times = outcome["roofline"]
    assert set(times["collectives"]) == axes
    assert times["not_overlapped"] == pytest.approx(
        max(times["compute"], times["hbm"]) + sum(times["collectives"].values())
    )
    assert 0 < times["mfu_not_overlapped"] < times["mfu_overlapped"] < 1


def test_temporaries_are_parted_into_what_is_known_and_the_rest():
    sizes = {"argument": 100, "output": 70, "alias": 60, "temp": 50}
    analysis = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    found = memory(analysis, {"parameters": 60, "batch": 30}, {"gradients": 20, "activations": 40})
    assert found == {
        "parameters": 60,
        "batch": 30,
        "gradients": 20,
        "activations": 30,  # an estimate never exceeds what the compiler needs
        "padding": 10,
        "temporaries": 0,
        "results": 10,
        "total": 160,
    }


def call_in(text: str):
    """The library's call that a program makes."""
    return next(step for step in executed(parse(text)) if step.instruction.opcode == "custom-call")


@pytest.mark.parametrize(
    ("name", "origin", "products"),
    [
        ("splash_mha_fwd_segmented_residuals", "jit(step)/vision/groups/full/attn", 2.0),
        ("splash_mha_fwd_segmented_residuals", "jit(step)/host.run/language/layers/attn", 2.0 * 5 / 8),
        ("splash_mha_dkv_segmented_no_residuals", "jit(step)/vision/groups/full/attn", 4.0),
        ("splash_mha_dq_segmented_no_residuals", "jit(step)/vision/groups/full/attn", 3.0),
        ("something_else", "jit(step)/vision", None),
    ],
)
def test_attention_kernels_are_counted_by_their_shapes(name, origin, products):
    """Two rows, 4 heads, 2,048 tokens, 128 channels; causal kernels leave out the blocks above the diagonal."""
    arrays = "bf16[2,4,2048,128]"
    text = (
        f"HloModule m\n\nENTRY %main (q: {arrays}, s: s32[2,2048,128]) -> {arrays} {{\n"
        f"  %q = {arrays} parameter(0)\n  %s = s32[2,2048,128] parameter(1)\n"
        f'  ROOT %y = {arrays} custom-call(%q, %s), custom_call_target="tpu_custom_call", '
        f'metadata={{op_name="{origin}/{name}"}}\n}}\n'
    )
    one = 2 * 2 * 4 * 2048 * 2048 * 128
    assert kernel_products(call_in(text)) == (None if products is None else products * one)


def test_of_kernels_on_cut_queries_the_one_that_sees_most_counts():
    """The second of two shards of 2,048 queries of 7 heads: of its four keys' blocks of 512 it sees 3 and 4."""
    queries, keys = "bf16[1,7,1024,128]", "bf16[1,2,2048,128]"
    text = (
        f"HloModule m\n\nENTRY %main (m: s8[1,2,4], q: {queries}, k: {keys}) -> {queries} {{\n"
        f"  %m = s8[1,2,4] parameter(0)\n  %q = {queries} parameter(1)\n  %k = {keys} parameter(2)\n"
        f'  ROOT %y = {queries} custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(step)/language/attn/splash_mha_fwd_segmented_residuals"}\n}\n'
    )
    assert kernel_products(call_in(text)) == 2 * 2 * 7 * 1024 * (3.5 * 512) * 128


@pytest.mark.parametrize(
    ("target", "mask", "products"),
    [
        ("__cudnn$fmhaScaleBiasSoftmax", "NO_MASK", 2.0),
        ("__cudnn$fmhaScaleBiasSoftmaxBackward", "NO_MASK", 5.0),
        ("__cudnn$fmhaSoftmax", "CAUSAL", 1.0),
    ],
)
def test_attention_by_cudnn_is_counted_by_its_scores_also_where_its_mask_is_larger_than_the_queries(
    target, mask, products
):
    queries, keys, bias = "bf16[1,4096,28,128]", "bf16[1,4096,4,128]", "bf16[1,1,4096,4096]"
    config = f'{{"intermediate_tensor_shape": {{"dimensions": ["1", "28", "4096", "4096"]}}, "mask_type": "{mask}"}}'
    text = (
        f"HloModule m\n\nENTRY %main (q: {queries}, k: {keys}, b: {bias}) -> {queries} {{\n"
        f"  %q = {queries} parameter(0)\n  %k = {keys} parameter(1)\n  %b = {bias} parameter(2)\n"
        f'  ROOT %y = {queries} custom-call(%q, %k, %k, %b), custom_call_target="{target}", '
        f'metadata={{op_name="jit(step)/language/attn"}}, backend_config={config}\n}}\n'
    )
    assert kernel_products(call_in(text)) == products * 2 * 28 * 4096 * 4096 * 128


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.50G of 15.75G hbm.", 25.5),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (304.75G) "
            "exceeds available HBM (95.74G).",
            304.75,
        ),
        ("RESOURCE_EXHAUSTED: something else", 0),
    ],
)
def test_what_a_program_that_does_not_fit_needs_is_an_outcome(message, gib):
    def lower():
        raise jax.errors.JaxRuntimeError(message)

    program = Program("train", lower, {"parameters": ()}, Flops(1.0, 2.0, 0.0, 0.0, {}), 8, 1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    outcome = measure(program, topology("v5p:1x1x1"), mesh)
    assert not outcome.fits and outcome.hbm["total"] == gib * 2**30
    assert outcome.reason and outcome.roofline is None
    json.dumps(outcome.to_json())


def test_a_program_for_other_chips_is_not_kept_in_the_cache_of_programs():
    setting = "jax_persistent_cache_min_compile_time_secs"
    before, seen = getattr(jax.config, setting), []

    def lower():
        seen.append(getattr(jax.config, setting))
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no matter")

    program = Program("train", lower, {}, Flops(1.0, 2.0, 0.0, 0.0, {}), 8, 1)
    measure(program, topology("v5p:1x1x1"), make_mesh(MeshConfig(), jax.devices()[:1]))
    assert seen == [float("inf")] and getattr(jax.config, setting) == before


def test_another_failure_of_the_compiler_is_no_outcome():
    def lower():
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    program = Program("train", lower, {}, Flops(1.0, 2.0, 0.0, 0.0, {}), 8, 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        measure(program, topology("v5p:1x1x1"), make_mesh(MeshConfig(), jax.devices()[:1]))
