"""The TVP against its equations, written a second time point by point, and what it must leave alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.trajectory.tvp import TVP, TVPConfig, frame_time_windows

CONFIG = TVPConfig(width=16, heads=2, mlp_width=24, blocks=2, bins=50, max_traces=3, position_width=8)
ROWS, FRAMES, UNITS, POINTS = 3, 2, 5, 6
INFINITE = np.inf


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """A video of two frames with two traces, a still with one, and a still without any."""
    random = np.random.default_rng(seed)
    valid = np.ones((ROWS, FRAMES, UNITS), bool)
    valid[1:, 1] = False
    valid[2, 0, 3:] = False
    trace = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [0] * POINTS])
    points = random.random((ROWS, POINTS, 3)) * [1, 1, 2] * (trace > 0)[..., None]
    windows = np.full((ROWS, FRAMES, 2), [-INFINITE, INFINITE])
    windows[0] = [[-INFINITE, 1.0], [1.0, INFINITE]]
    return {
        "visual": random.normal(size=(ROWS, FRAMES, UNITS, CONFIG.width)).astype(np.float32),
        "visual_xy": random.random((ROWS, FRAMES, UNITS, 2)).astype(np.float32),
        "visual_valid": valid,
        "frame_windows": windows.astype(np.float32),
        "points": points.astype(np.float32),
        "point_trace": trace.astype(np.int32),
    }


def drawn(config: TVPConfig) -> dict:
    """Parameters with nothing at its start value: no gamma is 0, no norm 1."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(TVP(config).init, jax.random.key(0), **inputs())["params"]

    def draw(path, leaf):
        noise = random.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.3 * noise
        return noise / np.sqrt(leaf.shape[0]) if path[-1].key == "kernel" else 0.5 * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def applied(config: TVPConfig):
    """The jitted module on parameters and `inputs`."""
    return jax.jit(lambda params, given: TVP(config).apply({"params": params}, **given))


def run(config: TVPConfig, params: dict, given: dict[str, np.ndarray]):
    return jax.device_get(applied(config)(params, given))


@functools.cache
def fresh(config: TVPConfig) -> dict:
    """Parameters as a run starts with them."""
    return jax.jit(TVP(config).init)(jax.random.key(0), **inputs())["params"]


# A second implementation, of one row, over what is there; padding does not exist in it.


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def waves(x: float, width: int, cycles: float) -> np.ndarray:
    count = width // 2
    frequency = [0.5 * (cycles / 0.5) ** (k / (count - 1)) for k in range(count)]
    angles = [2 * math.pi * f * x for f in frequency]
    return np.array([*map(math.sin, angles), *map(math.cos, angles)]) / math.sqrt(count)


def place(xy) -> np.ndarray:
    halves = [waves(c, CONFIG.position_width // 2, CONFIG.position_cycles) for c in xy]
    return np.concatenate(halves) / math.sqrt(2)


def cross(p, queries, keys, query_places, key_places, bias):
    """Attention query by query and head by head; returns (outputs, weights (heads, q, k))."""
    heads, size = CONFIG.heads, CONFIG.width // CONFIG.heads
    kernel = {name: np.asarray(p[name]["kernel"], np.float64) for name in ("q", "k", "v", "place", "o")}
    out, weights = np.zeros_like(queries), np.zeros((heads, len(queries), len(keys)))
    for i, (query, at) in enumerate(zip(queries, query_places, strict=True)):
        for h in range(heads):
            q = query @ kernel["q"][:, h] + at @ kernel["place"][:, h]
            scores = []
            for j, (key, where) in enumerate(zip(keys, key_places, strict=True)):
                k = key @ kernel["k"][:, h] + where @ kernel["place"][:, h]
                scores.append(q @ k / math.sqrt(size) + bias(h, i, j))
            exp = np.exp(np.array(scores) - max(scores))
            weights[h, i] = exp / exp.sum()
            out[i] += (
                sum(w * (key @ kernel["v"][:, h]) for w, key in zip(weights[h, i], keys, strict=True)) @ kernel["o"][h]
            )
    return out, weights


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive(params, given, row: int, direction: str = "both"):
    """Eq. 3 and 4 block by block; returns (visual of the valid units, features of the points, maps)."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    frame, unit = np.nonzero(given["visual_valid"][row])
    count = int((given["point_trace"][row] > 0).sum())
    image = given["visual"][row][frame, unit].astype(np.float64)
    points = given["points"][row][:count].astype(np.float64)
    traced = []
    for (x, y, t), number in zip(points, given["point_trace"][row], strict=False):
        bins = [min(int(c * CONFIG.bins), CONFIG.bins - 1) for c in (x, y)]
        time = waves(t / CONFIG.time_scale_seconds, CONFIG.width, 64.0) * math.sqrt(CONFIG.width) * p["time_scale"]
        traced.append(p["x_bins"][bins[0]] + p["y_bins"][bins[1]] + time + p["trace_index"][number - 1])
    traced = np.array(traced)
    image_places = [place(xy) for xy in given["visual_xy"][row][frame, unit]]
    point_places = [place(xy) for xy in points[:, :2]]

    def bias(head: int, i: int, j: int) -> float:
        start, end = given["frame_windows"][row][frame[i]]
        return 0.0 if start <= points[j, 2] < end else -math.log1p(math.exp(p["time_bias"][head]))

    maps = []
    for index in range(CONFIG.blocks):
        b = p[f"block_{index}"]
        block = {}
        if direction in ("both", "trace_to_vision"):
            queries = norm(image, b["enhance_visual_norm"]["scale"])
            keys = norm(traced, b["enhance_trace_norm"]["scale"])
            change, block["trace_to_vision"] = cross(b["enhance"], queries, keys, image_places, point_places, bias)
            image = image + b["gamma"] * change
        if direction in ("both", "vision_to_trace"):
            queries = norm(traced, b["refine_trace_norm"]["scale"])
            keys = norm(image, b["refine_visual_norm"]["scale"])
            change, block["vision_to_trace"] = cross(
                b["refine"], queries, keys, point_places, image_places, lambda h, i, j: bias(h, j, i)
            )
            hidden = gelu(norm(traced, b["ffn_norm"]["scale"]) @ b["ffn_in"]["kernel"] + b["ffn_in"]["bias"])
            traced = traced + change + hidden @ b["ffn_out"]["kernel"] + b["ffn_out"]["bias"]
        maps.append(block)
    return image, norm(traced, p["out_norm"]["scale"]) * p["out_scale"], maps


@pytest.mark.parametrize("direction", ["both", "trace_to_vision", "vision_to_trace"])
def test_the_module_is_equations_3_and_4_and_an_ablation_leaves_out_just_its_half(direction):
    config = dataclasses.replace(CONFIG, direction=direction)
    params, given = drawn(config), inputs()
    visual, features, maps = run(config, params, given)
    for row in (0, 1):
        expected_visual, expected_features, expected_maps = naive(params, given, row, direction)
        valid, count = given["visual_valid"][row], len(expected_features)
        assert np.allclose(visual[row][valid], expected_visual, atol=2e-5)
        assert np.allclose(features[row, :count], expected_features, atol=2e-5)
        assert len(maps) == len(expected_maps) == CONFIG.blocks
        for ours, theirs in zip(maps, expected_maps, strict=True):
            assert ours.keys() == theirs.keys()
            flat = valid.reshape(-1)
            if "trace_to_vision" in theirs:
                assert np.allclose(ours["trace_to_vision"][row][:, flat, :count], theirs["trace_to_vision"], atol=1e-5)
            if "vision_to_trace" in theirs:
                assert np.allclose(ours["vision_to_trace"][row][:, :count, flat], theirs["vision_to_trace"], atol=1e-5)


def test_an_ablated_half_has_no_parameters():
    def names(direction):
        blocks = drawn(dataclasses.replace(CONFIG, direction=direction))
        return set(blocks.get("block_0", {}))

    enhance = {"gamma", "enhance", "enhance_visual_norm", "enhance_trace_norm"}
    refine = {"refine", "refine_trace_norm", "refine_visual_norm", "ffn_norm", "ffn_in", "ffn_out"}
    assert names("both") == enhance | refine
    assert names("trace_to_vision") == enhance
    assert names("vision_to_trace") == refine
    assert names("none") == set()


def test_without_the_enhancement_visual_features_stay_bit_identical():
    given = inputs()
    for direction in ("vision_to_trace", "none"):
        config = dataclasses.replace(CONFIG, direction=direction)
        visual, features, _ = run(config, drawn(config), given)
        assert visual.tobytes() == given["visual"].tobytes()
        assert (np.abs(features).sum() == 0) == (direction == "none")


def test_without_a_trace_visual_features_stay_bit_identical():
    given = inputs()
    visual, features, _ = run(CONFIG, drawn(CONFIG), given)
    assert visual[2].tobytes() == given["visual"][2].tobytes()
    assert (features[2] == 0).all()
    assert np.abs(visual[:2] - given["visual"][:2]).max() > 0.1


def test_fresh_parameters_leave_visual_features_alone_but_can_learn_to_change_them():
    given = inputs()
    params = fresh(CONFIG)
    visual, features, _ = run(CONFIG, params, given)
    assert visual.tobytes() == given["visual"].tobytes()
    assert np.abs(features[0, :5]).max() > 0
    assert all((params[f"block_{k}"]["gamma"] == 0).all() for k in range(CONFIG.blocks))

    def loss(params):
        return (applied(CONFIG)(params, given)[0] ** 2).sum()

    gradient = jax.grad(loss)(params)
    assert all(np.abs(gradient[f"block_{k}"]["gamma"]).min() > 0 for k in range(CONFIG.blocks))


def test_padding_of_points_units_frames_and_rows_changes_nothing():
    given, params = inputs(), drawn(CONFIG)
    visual, features, _ = run(CONFIG, params, given)
    random = np.random.default_rng(5)
    more = {"rows": 2, "frames": 1, "units": 2, "points": 3}
    axes = {
        "visual": ("rows", "frames", "units", ""),
        "visual_xy": ("rows", "frames", "units", ""),
        "visual_valid": ("rows", "frames", "units"),
        "frame_windows": ("rows", "frames", ""),
        "points": ("rows", "points", ""),
        "point_trace": ("rows", "points"),
    }
    padded = {}
    for name, value in given.items():
        # What stands in padded places means nothing, so it is noise here.
        room = [size + more.get(axis, 0) for size, axis in zip(value.shape, axes[name], strict=True)]
        noise = (
            random.random(room).astype(value.dtype) * 10 if value.dtype == np.float32 else np.zeros(room, value.dtype)
        )
        noise[tuple(slice(size) for size in value.shape)] = value
        padded[name] = noise
    wide_visual, wide_features, _ = run(CONFIG, params, padded)
    kept = wide_visual[:ROWS, :FRAMES, :UNITS]
    assert np.abs(kept - visual)[given["visual_valid"]].max() < 2e-6
    assert np.abs(wide_features[:ROWS, :POINTS] - features).max() < 2e-6
    assert (wide_features[:ROWS, POINTS:] == 0).all() and (wide_features[ROWS:] == 0).all()
    assert (wide_visual[ROWS:] == padded["visual"][ROWS:]).all()


def test_traces_may_change_places_with_their_numbers_but_not_without():
    given, params = inputs(), drawn(CONFIG)
    visual, features, _ = run(CONFIG, params, given)
    order = np.array([3, 4, 0, 1, 2, 5])
    moved = given | {"points": given["points"][:, order], "point_trace": given["point_trace"][:, order]}
    moved_visual, moved_features, _ = run(CONFIG, params, moved)
    assert np.allclose(moved_visual[0], visual[0], atol=2e-6)
    assert np.allclose(moved_features[0], features[0][order], atol=2e-6)
    renumbered = given | {"point_trace": np.array([0, 2, 1], np.int32)[given["point_trace"]]}
    other_visual, other_features, _ = run(CONFIG, params, renumbered)
    assert np.abs(other_visual[0] - visual[0]).max() > 1e-2
    assert np.abs(other_features[0] - features[0]).max() > 1e-2


def test_maps_are_weights_that_sum_to_one_over_what_is_there():
    given = inputs()
    _, _, maps = run(CONFIG, drawn(CONFIG), given)
    real, valid = given["point_trace"] > 0, given["visual_valid"].reshape(ROWS, -1)
    for block in maps:
        to_vision, to_trace = block["trace_to_vision"], block["vision_to_trace"]
        assert to_vision.shape == (ROWS, CONFIG.heads, FRAMES * UNITS, POINTS)
        assert to_trace.shape == (ROWS, CONFIG.heads, POINTS, FRAMES * UNITS)
        asked = valid & real.any(1)[:, None]
        assert np.allclose(to_vision.sum(-1), asked[:, None], atol=1e-6)
        assert np.allclose(to_trace.sum(-1), real[:, None], atol=1e-6)
        assert (to_vision.swapaxes(2, 3)[~np.broadcast_to(real[:, None], (ROWS, CONFIG.heads, POINTS))] == 0).all()
        assert (
            to_trace.swapaxes(2, 3)[~np.broadcast_to(valid[:, None], (ROWS, CONFIG.heads, FRAMES * UNITS))] == 0
        ).all()


def test_gradients_are_finite_also_where_there_is_no_point():
    given = inputs()
    given = given | {"point_trace": np.zeros_like(given["point_trace"])}

    def loss(params, visual):
        fused, features, _ = applied(CONFIG)(params, given | {"visual": visual})
        return (fused**2).sum() + (features**2).sum()

    with jax.debug_nans(True):
        by_params, by_visual = jax.grad(loss, (0, 1))(drawn(CONFIG), given["visual"])
    assert np.allclose(by_visual, 2 * given["visual"])
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(by_params))


def test_a_frame_attends_more_to_points_of_its_own_time():
    params = fresh(CONFIG)
    same = np.zeros((1, 2, 1, CONFIG.width), np.float32) + 0.5
    given = {
        "visual": same,
        "visual_xy": np.full((1, 2, 1, 2), 0.5, np.float32),
        "visual_valid": np.ones((1, 2, 1), bool),
        "frame_windows": np.array([[[-INFINITE, 1.0], [1.0, INFINITE]]], np.float32),
        # Times that look alike to a point's embedding, so that the windows alone make the difference.
        "points": np.array([[[0.5, 0.5, 0.999], [0.5, 0.5, 1.0]]], np.float32),
        "point_trace": np.ones((1, 2), np.int32),
    }
    _, _, maps = run(CONFIG, params, given)
    weights = maps[0]["trace_to_vision"][0]
    penalty = np.exp(-np.log1p(np.exp(2.0)))
    assert np.allclose(weights[:, 0, 1] / weights[:, 0, 0], penalty, rtol=0.1)
    assert np.allclose(weights[:, 1, 0] / weights[:, 1, 1], penalty, rtol=0.1)
    back = maps[0]["vision_to_trace"][0]
    assert (back[:, 0, 0] > back[:, 0, 1]).all() and (back[:, 1, 1] > back[:, 1, 0]).all()


def test_time_windows_part_a_video_and_leave_stills_open():
    times = jnp.asarray([[0.0, 1.0, 2.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    owner = jnp.asarray([[True, True, True, False], [True, True, False, False], [False, True, True, False]])
    windows = np.asarray(frame_time_windows(times, owner))
    inf = INFINITE
    assert windows[0, :3].tolist() == [[-inf, 1], [1, 2.5], [2.5, inf]]
    assert windows[1, :2].tolist() == [[-inf, inf], [-inf, inf]]
    assert windows[2, 1:3].tolist() == [[-inf, 1], [1, inf]], "a video after another conversation's still"


def test_with_fresh_parameters_a_point_looks_at_its_own_place():
    """Peaks of both attentions, heads averaged, on a grid of 8 x 8 units of noise; none without position features."""
    random = np.random.default_rng(0)
    side, count, width = 8, 20, 512
    row, col = np.divmod(np.arange(side * side), side)
    xy = np.stack([(col + 0.5) / side, (row + 0.5) / side], -1)[None, None]
    chosen = random.permutation(side * side)[:count]
    given = {
        "visual": random.normal(size=(1, 1, side * side, width)).astype(np.float32),
        "visual_xy": xy.astype(np.float32),
        "visual_valid": np.ones((1, 1, side * side), bool),
        "frame_windows": np.array([[[-INFINITE, INFINITE]]], np.float32),
        "points": np.concatenate([xy[0, 0, chosen], np.zeros((count, 1))], -1)[None].astype(np.float32),
        "point_trace": np.ones((1, count), np.int32),
    }

    def attention(gain: float) -> tuple[np.ndarray, np.ndarray]:
        config = TVPConfig(width=width, heads=16, mlp_width=16, blocks=1, bins=100, position_gain=gain)
        params = jax.jit(TVP(config).init)(jax.random.key(3), **given)["params"]
        maps = run(config, params, given)[2][0]
        return maps["vision_to_trace"][0].mean(0), maps["trace_to_vision"][0].mean(0)

    to_vision, to_trace = attention(TVPConfig.position_gain)
    assert (to_vision.argmax(-1) == chosen).all()
    assert (to_vision[np.arange(count), chosen] > 10 / side**2).all()
    assert (to_trace[chosen].argmax(-1) == np.arange(count)).all()
    blind, _ = attention(0.0)
    assert (blind[np.arange(count), chosen] < 3 / side**2).all()


def test_points_are_embedded_in_the_bins_of_their_tokens():
    from tracevision_jax.trajectory.tokens import from_bins

    given, params = inputs(), drawn(dataclasses.replace(CONFIG, bins=1000))
    config = dataclasses.replace(CONFIG, bins=1000)
    nudged = {name: value.copy() for name, value in given.items()}
    bins = np.random.default_rng(2).integers(0, 1000, (ROWS * POINTS, 2))
    given["points"][..., :2] = from_bins(bins).reshape(ROWS, POINTS, 2)
    nudged["points"] = given["points"] + [0.0004, -0.0004, 0]
    nudged["points"] = nudged["points"].astype(np.float32)
    params = params | {"x_bins": params["x_bins"] * 100, "y_bins": params["y_bins"] * 100}
    _, at_centre, _ = run(config, params, given)
    _, inside, _ = run(config, params, nudged)
    assert np.abs(inside - at_centre).max() < 0.05, "the same bins, places a little apart"


def test_sizes_that_do_not_fit_each_other_are_refused():
    with pytest.raises(UserError, match="the heads must divide the width"):
        TVPConfig(width=16, heads=3)
    with pytest.raises(UserError, match="position features of width 6"):
        TVPConfig(width=16, heads=2, position_width=6)
