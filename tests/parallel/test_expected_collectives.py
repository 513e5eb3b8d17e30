"""Which collectives a training step of TraceVision needs, why, and how many: any other one fails here by name.

The layout that they follow from: rows are cut over data and fsdp, weights over fsdp on the side of the residual
stream and over tensor on heads and MLP columns (`parallel/rules.py`); tokens are cut over context, and what knows
nothing of each other (frames, masks) over fsdp and context. What is gathered and summed of parameters is one layer at
a time, so its sizes are those of a layer. Origins are alternatives where versions of jax name an operation otherwise.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from tests.on_devices import printed_on

MESH = {"fsdp": 4, "tensor": 2}
"""Along both axes that parameters are cut over."""
MESH_OF_TOKENS = {"fsdp": 4, "context": 2}
"""Of two sizes: where as many chips lie along context as along fsdp, the partitioner brings a weight from one to the
other before it gathers it, in a program of a single product, too."""
WIDTH = 32
"""Of the residual streams of `small_tracevision`: language model, tower and TVP."""
MERGED = 4 * WIDTH
"""Of the tower's units where they are merged."""
LOOKUPS = 2
"""Arrays that are looked up in cut tables: tokens' embeddings, and places of trajectory points."""
LAYERS = 2
"""Of the language model."""
BLOCKS = 2
"""Of the TVP."""


SUMS_OVER_TENSOR = 2 * 8 + 1 + 4 * 6 + 2 + 2 * 11
"""Two language layers: 2 forward (attention, MLP), 1 again for the backward pass, and 5 back to the residual stream
(q, k, v, gate, up: the CPU's compiler sums each). The head: 1 back. Four blocks of the tower: 2, 1, and 3 back (qkv,
gate, up). The merger: 1 and 1. Two TVP blocks: 3 forward, 1 again, and 7 back (q, k, v of both directions, FFN)."""


class Expected(NamedTuple):
    """A kind of collective that the layout needs."""

    why: str
    kind: str
    axes: tuple[str, ...]
    arrays: str
    """Pattern of its arrays, or one of `LAYER` and `SLICE`."""
    origin: str
    """Pattern of where the program says it comes from."""


LAYER = "a layer of a parameter, cut over tensor alone"
SLICE = "a layer of a parameter, cut over fsdp, too"
SCALAR = r"f32\[\]|s32\[\]"
MULTIPLIES = r"/dot_general$|^state\.trained.*kernel|\(dynamic_index_in_dim\)/squeeze$|/remat2$|logit_parts/transpose$"
"""A product, or what a weight is where it is gathered before one: an argument, a layer of a stack, one that a
rematerialised block is given, one that is transposed. Tables that rows are looked up in are no kernels."""
NUMBERS = "sums of the loss, its weights and the gradient's norm"
GATHERED = "a weight's slices, where it multiplies"
GRADIENT = "the gradient of a parameter over all rows"
INDICES = "which rows of a table to look up"
EXCHANGED = "slices of looked-up rows for whole rows"
OVER_FSDP = (
    Expected(NUMBERS, "all-reduce", ("fsdp",), SCALAR, ""),
    Expected(GATHERED, "all-gather", ("fsdp",), LAYER, MULTIPLIES),
    Expected(INDICES, "all-gather", ("fsdp",), r"(s32|pred)\[.+\]", r"embed|^batch\.tokens$"),
    Expected(INDICES, "all-gather", ("fsdp",), r"f32\[16,4,2\]", r"tvp\._embed"),
    Expected(EXCHANGED, "all-to-all", ("fsdp",), r"f32\[.+\]", r"embed/.*constraint$"),
    Expected(GRADIENT, "all-reduce", ("fsdp",), LAYER, ""),
)
EXPECTED = (
    *OVER_FSDP,
    Expected(NUMBERS, "all-reduce", ("tensor",), SCALAR, ""),
    Expected(NUMBERS, "all-reduce", ("fsdp", "tensor"), SCALAR, ""),
    Expected(
        "a sum over heads or MLP columns", "all-reduce", ("tensor",), rf"f32\[\d+,(\d+,)+({WIDTH}|{MERGED})\]", ""
    ),
    Expected("rows that lie in another slice of the vocabulary", "all-reduce", ("tensor",), r"f32\[8,48,8\]", ""),
    Expected("softmax over a cut vocabulary", "all-reduce", ("tensor",), r"f32\[2,48\]", r"logits|reduce|jvp\(\)"),
)
CONTEXT = ("context",)
OF_TOKENS = "the gradient of a parameter, or of a slice, over the tokens of a row"
SEEN = "keys and values of causal attention, which later tokens see"
SEGMENTS = "which conversation a key is of"
SEEN_BACK = "gradients of keys and values from the tokens that saw them"
ASKED = "what trajectory points ask of visual tokens: softmax and mix, and their gradients"
UNITS = "visual tokens of frames, for the row that they are of"
NAMED = "visual tokens that any token of the row may name"
NAMED_BACK = "their gradients, and those of trajectory points, from the tokens that name them"
OF_FRAMES = "gradient of what is known of frames, from their visual tokens"
SLOTS = "hidden states at a mask's slots, wherever in the row"
SLOTS_BACK = "their gradients, from where the mask is decoded"
FEATURES = "features of frames for masks of the same row, and their gradients"
MASKS = "masks for the loss of the row that they are of"
EXPECTED_WITH_CONTEXT = (
    *OVER_FSDP,
    # Two rows a chip: 48 tokens, 2 key heads of 8 channels.
    Expected(SEEN, "all-gather", CONTEXT, r"f32\[2,48,2,8\]", r"language/.*layers/attn/sharding_constraint$"),
    Expected(SEGMENTS, "all-gather", CONTEXT, r"(s32|pred)\[2,48\]", r"layers/attn/(eq|and)$"),
    Expected(SEEN_BACK, "all-reduce", CONTEXT, r"f32\[2,2,(8,48|48,8)\]", r"checkpoint/layers/attn/.*bkqs"),
    # Their 4 conversations: 96 visual tokens, 4 points, 4 heads of 8 channels; and their 4 frames of 48 units.
    Expected(ASKED, "all-reduce", CONTEXT, r"f32\[4,4,4(,8)?\]|f32\[4,4,8,4\]", r"tvp/"),
    Expected(UNITS, "all-gather", CONTEXT, r"f32\[4,48,32\]", r"encode_vision/vision/"),
    Expected(NAMED, "all-gather", CONTEXT, r"f32\[4,96,32\]", r"tvp/"),
    Expected(NAMED_BACK, "all-reduce", CONTEXT, r"f32\[2,(192|8),32\]", r"take_along_axis\)/scatter-add"),
    Expected(OF_FRAMES, "all-gather", CONTEXT, r"f32\[4,4,2,4\]", r"tvp/reduce_sum$"),
    # Their 6 masks of 6 slots, on grids of 8 and 4.
    Expected(SLOTS, "all-reduce", CONTEXT, r"f32\[2,18,32\]", r"take_along_axis\)/gather$"),
    Expected(SLOTS_BACK, "all-gather", CONTEXT, r"f32\[6,6,32\]", r"masks/decoder/"),
    Expected(FEATURES, "all-gather", CONTEXT, r"f32\[(4|2,2),(8,8|4,4),16\]", r"masks/decoder/decoder\._neck/"),
    Expected(MASKS, "all-gather", CONTEXT, r"f32\[6,16,16\]", r"masks/decoder/"),
    Expected(NUMBERS, "all-reduce", CONTEXT, SCALAR, ""),
    Expected(NUMBERS, "all-reduce", ("fsdp", "context"), SCALAR, ""),
    Expected(OF_TOKENS, "all-reduce", CONTEXT, SLICE, ""),
    Expected(GRADIENT, "all-reduce", ("fsdp", "context"), LAYER, ""),
)
ALONG_CONTEXT = {
    SEEN: 2 * 2 * LAYERS,  # both, again for the backward pass
    SEGMENTS: 2,  # ids and which of them are tokens, once for all layers
    SEEN_BACK: 2 * LAYERS,
    ASKED: 10 * BLOCKS,  # Eq. 4: maximum, sum, mix, each again, back through the sum, queries; Eq. 3: keys, values
    UNITS: 1,
    NAMED: 2,  # there and, as gradients, back
    NAMED_BACK: 2,
    OF_FRAMES: 1,
    SLOTS: 1,
    SLOTS_BACK: 1,
    FEATURES: 2 * 2,  # of two scales
    MASKS: 1,
}
"""How often."""


def compiled(mesh: dict[str, int]) -> dict:
    """What `collectives_on_mesh.py` prints in a process of virtual devices."""
    module = "tests.parallel.collectives_on_mesh"
    flags = "--xla_backend_optimization_level=0"
    return printed_on(math.prod(mesh.values()), module, json.dumps(mesh), flags=flags)


@pytest.fixture(scope="module")
def found() -> dict:
    """On `MESH`."""
    return compiled(MESH)


@pytest.fixture(scope="module")
def found_with_context() -> dict:
    """On `MESH_OF_TOKENS`."""
    return compiled(MESH_OF_TOKENS)


def layers_of(path: str, shape: list[int]) -> int:
    """How many layers a stacked parameter holds."""
    return math.prod(shape[: stacked(path)])


def stacked(path: str) -> int:
    """How many of a parameter's axes, the first ones, are layers."""
    return 2 if "/groups/window/" in path else 1 if "/layers/" in path or "/groups/" in path else 0


def sizes_of(parameters: dict[str, list], cut: Mapping[str, int]) -> set[tuple[int, ...]]:
    """Sizes, sorted, of a layer of each parameter on a chip, cut over these axes of the mesh."""
    found = set()
    for path, (shape, spec) in parameters.items():
        axes = spec or [""] * len(shape)
        sizes = [size // cut.get(axis, 1) for size, axis in zip(shape, axes, strict=True)]
        found.add(tuple(sorted(sizes[stacked(path) :])))
    return found


def is_like(array: str, wanted: str, sizes: Mapping[str, set[tuple[int, ...]]]) -> bool:
    """Whether an array is what `Expected.arrays` says; `sizes` holds those of `LAYER` and `SLICE`."""
    if wanted not in sizes:
        return re.fullmatch(wanted, array) is not None
    return array.startswith("f32[") and tuple(sorted(map(int, re.findall(r"\d+", array[4:])))) in sizes[wanted]


def counted(found: dict, mesh: dict[str, int], table: tuple[Expected, ...]) -> tuple[Counter, list[str]]:
    """(how often each reason occurs, trip counts included; what has no reason)."""
    cut = {axis: size for axis, size in mesh.items() if axis in ("tensor", "fsdp")}
    whole = {axis: size for axis, size in cut.items() if axis != "fsdp"}
    sizes = {LAYER: sizes_of(found["parameters"], whole), SLICE: sizes_of(found["parameters"], cut)}
    reasons, others = Counter(), []
    for use in found["collectives"]:
        for array in use["arrays"][:1] if use["kind"] == "all-to-all" else use["arrays"]:
            reason = next(
                (
                    expected.why
                    for expected in table
                    if (use["kind"], tuple(use["axes"])) == (expected.kind, expected.axes)
                    and is_like(array, expected.arrays, sizes)
                    and re.search(expected.origin, use["origin"])
                ),
                None,
            )
            if reason is None:
                where = f"{use['kind']} over {'+'.join(use['axes'])}"
                others.append(f"{where} of {array} x {use['times']}: {use['origin']}")
            else:
                reasons[reason] += use["times"]
    return reasons, others


def check_over_fsdp(reasons: Counter, parameters: dict[str, list]) -> None:
    """Counts that any mesh with fsdp has."""
    arrays = {path: layers_of(path, shape) for path, (shape, _) in parameters.items()}
    weights = sum(
        arrays[path] for path, (_, spec) in parameters.items() if "fsdp" in spec and not re.search("embed|bins$", path)
    )
    # Forward and backward; the head, and the tower's first and last products, are not computed again.
    assert weights <= reasons[GATHERED] <= 2 * weights, (weights, reasons[GATHERED])
    # Each once, whole layers of a stack apart.
    assert reasons[GRADIENT] <= sum(arrays.values())
    assert reasons[OF_TOKENS] <= sum(arrays.values())
    assert reasons[EXCHANGED] == 2 * LOOKUPS  # there and, as gradients, back
    assert reasons[INDICES] == LOOKUPS


def test_a_step_has_the_collectives_that_its_layout_needs_and_no_other(found):
    reasons, others = counted(found, MESH, EXPECTED)
    assert others == []
    check_over_fsdp(reasons, found["parameters"])
    assert 0 < reasons["a sum over heads or MLP columns"] <= SUMS_OVER_TENSOR


def test_a_step_whose_tokens_are_cut_has_the_collectives_that_it_needs_and_no_other(found_with_context):
    reasons, others = counted(found_with_context, MESH_OF_TOKENS, EXPECTED_WITH_CONTEXT)
    assert others == []
    check_over_fsdp(reasons, found_with_context["parameters"])
    assert {reason: reasons[reason] for reason in ALONG_CONTEXT} == ALONG_CONTEXT


def test_chips_along_context_share_all_the_work(found_with_context):
    """Every product of the step is computed once by all chips together, so each of two along context does half."""
    found = found_with_context
    print(f"executed {found['executed']:.5e}, counted {found['counted']:.5e}")
    assert 1 <= found["executed"] / found["counted"] < 1.01
