"""The programs that answer, ready to be compiled: they are there, hold what they should, and cost what can be known."""

import dataclasses

import jax
import pytest

from tests.parallel.small_tracevision import BUCKET, small_system
from tracevision_jax.inference.ahead_of_time import answer_mesh, answer_programs
from tracevision_jax.ops.attention import IMPLEMENTATIONS
from tracevision_jax.parallel.ahead_of_time import measure
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.topologies import topology

ROWS, NEW = 2, 16


@pytest.fixture(scope="module")
def programs():
    """Of the small system, on a mesh of one."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return mesh, {
        program.name.split(",")[0]: program for program in answer_programs(small_system(), BUCKET, ROWS, NEW, mesh)
    }


def test_chips_share_a_model_as_far_as_its_key_heads_go():
    assert answer_mesh(small_system(), 8) == MeshConfig(data=4, tensor=2)
    assert answer_mesh(small_system(), 3) == MeshConfig(data=3, tensor=1)


def test_encode_prefill_and_decode_are_there(programs):
    _, found = programs
    assert list(found) == ["encode", "prefill", "decode"]
    assert [program.tokens for program in found.values()] == [ROWS * BUCKET.tokens, ROWS * BUCKET.tokens, ROWS]


def test_a_token_costs_one_turn_of_the_loop(programs):
    """Products of a token with every matrix of the language model, and attention to the whole cache."""
    _, found = programs
    c = small_system().config.host.language
    columns = c.vocab_size + c.added_tokens  # the base's columns of no token are in its product, and masked after it
    layer = 2 * c.head_dim * (c.heads + c.kv_heads) + 3 * c.mlp_width
    matrices = c.layers * c.width * layer + c.width * columns
    cache = 64  # places: 32 + 16, up to a whole step of the cache's size
    attention = c.layers * 2 * c.heads * c.head_dim * cache
    assert found["decode"].flops.model_full_square == 2 * ROWS * (matrices + attention)


def test_causal_attention_is_halved_in_a_prompt_and_not_for_a_token(programs):
    _, found = programs
    assert found["prefill"].flops.causal > 0 and found["decode"].flops.causal == 0
    assert set(found["prefill"].flops.parts) == set(found["decode"].flops.parts) == {"language"}


@pytest.mark.parametrize("name", ["encode", "prefill", "decode"])
def test_a_program_is_traced_anew_for_the_chips_it_is_for(programs, name, monkeypatch):
    """Counting traces it for this machine; what is compiled must ask for the kernels of its mesh."""
    mesh, found = programs
    meshes = []

    def watched(call, placement):
        meshes.append(placement.mesh)
        return "not here"

    first, *others = IMPLEMENTATIONS
    replaced = (dataclasses.replace(first, why_not=watched), *others)
    monkeypatch.setattr("tracevision_jax.ops.attention.IMPLEMENTATIONS", replaced)
    found[name].lower()
    assert meshes and all(seen is mesh for seen in meshes)


def test_decode_compiles_and_holds_parameters_and_cache(programs):
    mesh, found = programs
    outcome = measure(found["decode"], topology("h100:1x1"), mesh)
    c = small_system().config.host.language
    assert outcome.fits and outcome.hbm["cache"] == 2 * c.layers * ROWS * 64 * c.kv_heads * c.head_dim * 4 + ROWS * 4
    assert outcome.collectives == ()
    # The loop's turn, and nothing but small things around it.
    assert outcome.model_flops <= outcome.executed_flops < 1.5 * outcome.model_flops + 1e6
