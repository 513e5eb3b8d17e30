"""The engine: rules in both directions, splits and stacks, and everything that is wrong reported at once."""

import numpy as np
import pytest

from tracevision_jax.weights.engine import CheckpointMismatch, Part, Rule, Table, flatten, unflatten
from tracevision_jax.weights.sources import DictSource

SIZES = {"heads": 2, "size": 3, "width": 4, "groups": 2, "three": 3}


def to_flax(table: Table, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    leaves = {path: np.zeros(shape, np.int64) for path, shape in table.flax_shapes.items()}
    for move in table.moves:
        place = tuple(slice(a, a + n) for a, n in zip(move.start, move.shape, strict=True))
        leaves[move.path][place] = move.to_flax(tensors[move.name])
    return leaves


def to_torch(table: Table, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {name: np.empty(shape, np.int64) for name, shape in table.torch_shapes.items()}
    for move in table.moves:
        place = tuple(slice(a, a + n) for a, n in zip(move.start, move.shape, strict=True))
        move.layout.fill_torch(tensors[move.name], leaves[move.path][place])
    return tensors


def numbered(table: Table) -> dict[str, np.ndarray]:
    """Tensors of the table, every element another number."""
    offset, tensors = 0, {}
    for name, shape in table.torch_shapes.items():
        count = int(np.prod(shape))
        tensors[name] = np.arange(offset, offset + count).reshape(shape)
        offset += count
    return tensors


def assert_round_trip(table: Table) -> dict[str, np.ndarray]:
    tensors = numbered(table)
    leaves = to_flax(table, tensors)
    back = to_torch(table, leaves)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
    return leaves


def test_a_joined_axis_is_taken_apart_and_moved():
    rule = Rule("q.weight", "q/kernel", "(heads size) width -> width heads size")
    table = Table([rule], SIZES)
    leaves = assert_round_trip(table)
    tensor = numbered(table)["q.weight"]
    assert leaves["q/kernel"].shape == (4, 2, 3)
    assert leaves["q/kernel"][1, 1, 2] == tensor[1 * 3 + 2, 1]


def test_layers_are_stacked_along_leading_axes_in_any_order():
    layers = {(0,): (0, 0), (1,): (0, 1), (2,): (1, 0), (3,): (1, 1)}
    table = Table([Rule("blocks.{}.w", "groups/w", "size width -> width size", layers)], SIZES)
    leaves = assert_round_trip(table)
    assert leaves["groups/w"].shape == (2, 2, 4, 3)
    np.testing.assert_array_equal(leaves["groups/w"][1, 0], numbered(table)["blocks.2.w"].T)


def test_one_tensor_is_split_over_several_parameters():
    """As InternLM2 keeps q, k and v in one matrix: two queries, a key and a value in each group."""
    sizes = SIZES | {"one": 1}

    def rule(path: str, start: int, stop: int) -> Rule:
        part = Part("slots", start, stop, 4)
        return Rule("wqkv", path, "(groups slots size) width -> width groups slots size", torch_part=part)

    table = Table([rule("q", 0, 2), rule("k", 2, 3), rule("v", 3, 4)], sizes)
    leaves = assert_round_trip(table)
    tensor = numbered(table)["wqkv"].reshape(2, 4, 3, 4)
    np.testing.assert_array_equal(leaves["k"][:, :, 0], np.moveaxis(tensor[:, 2], -1, 0))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        "q": (4, 2, 2, 3),
        "k": (4, 2, 1, 3),
        "v": (4, 2, 1, 3),
    }


def test_several_tensors_are_stacked_into_one_parameter():
    rules = [
        Rule(
            f"layers.{{}}.{name}",
            "qkv",
            "(three heads size) width -> width three heads size",
            {(0,): (0,), (1,): (1,)},
            flax_part=Part("three", place, place + 1, 3),
        )
        for place, name in enumerate("qkv")
    ]
    table = Table(rules, SIZES)
    leaves = assert_round_trip(table)
    assert leaves["qkv"].shape == (2, 4, 3, 2, 3)
    expected = numbered(table)["layers.1.v"].reshape(2, 3, 4)
    np.testing.assert_array_equal(leaves["qkv"][1, :, 2], np.moveaxis(expected, -1, 0))


@pytest.mark.parametrize(
    "rules",
    [
        [Rule("a", "x", "width -> width"), Rule("b", "x", "width -> width")],
        [Rule("a", "x", "width -> width"), Rule("a", "y", "width -> width")],
        [Rule("a.{}", "x", "width -> width", {(0,): (0,), (1,): (2,)})],
        [Rule("a", "x", "width -> width", torch_part=Part("width", 0, 2, 4))],
        [Rule("a", "x", "width -> width", flax_part=Part("width", 0, 3, 4))],
        [
            Rule("a", "x", "width -> width", torch_part=Part("width", 0, 3, 4)),
            Rule("a", "y", "width -> width", torch_part=Part("width", 2, 4, 4)),
        ],
        [Rule("a", "x", "width size -> width")],
        [Rule("a", "x", "width unknown -> unknown width")],
        [Rule("a", "x", "(width size) -> (width size)", flax_part=Part("width", 0, 4, 4))],
    ],
    ids=["twice_into", "twice_from", "gap", "rest", "early", "overlap", "axes", "length", "joined"],
)
def test_rules_that_repeat_or_leave_out_anything_are_refused(rules):
    with pytest.raises(ValueError, match=r"rules|axes|length|alone"):
        Table(rules, SIZES)


def test_every_difference_is_reported_at_once():
    layers = {(n,): (n,) for n in range(3)}
    table = Table([Rule("l.{}.w", "w", "size -> size", layers), Rule("b", "b", "width -> width")], SIZES)
    state = {
        "l.0.w": np.zeros(3),
        "l.2.w": np.zeros(7),
        "b": np.zeros((4, 1)),
        "c": np.zeros(1),
        "d": np.zeros(1),
    }
    with pytest.raises(CheckpointMismatch) as caught:
        table.check_tensors(DictSource(state).tensors, "some/place")
    error = caught.value
    assert error.missing == ["l.1.w"] and error.unexpected == ["c", "d"]
    assert error.misshaped == ["b: [4, 1], expected [4]", "l.2.w: [7], expected [3]"]
    for part in ("some/place", "l.1.w", "    c\n", "    d\n", "[4, 1]", "[7]"):
        assert part in str(error)


def test_a_repeated_tensor_is_allowed_only_in_its_own_shape():
    table = Table([Rule("e", "e", "width size -> width size")], SIZES, same={"head": "e"})
    table.check_tensors(DictSource({"e": np.zeros((4, 3)), "head": np.zeros((4, 3))}).tensors, "x")
    table.check_tensors(DictSource({"e": np.zeros((4, 3))}).tensors, "x")
    with pytest.raises(CheckpointMismatch, match="head"):
        table.check_tensors(DictSource({"e": np.zeros((4, 3)), "head": np.zeros((3, 4))}).tensors, "x")


def test_trees_are_flattened_and_built_again():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
