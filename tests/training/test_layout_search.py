"""The search over layouts: order, resuming, what is left out; meshes that fit and the nearest that do."""

import json

import jax
import pytest

from tests.parallel.small_tracevision import small_system
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.qwen25vl import preset
from tracevision_jax.parallel.mesh import DcnConfig, MeshConfig, meshes
from tracevision_jax.training.ahead_of_time import fitting_mesh, usual_mesh, why_not, with_remat
from tracevision_jax.training.layout_search import candidates, known, search


@pytest.fixture(scope="module")
def shapes():
    return jax.eval_shape(small_system().init, jax.random.key(0))


def outcome(mfu: float, fits: bool = True) -> dict:
    times = {"mfu_not_overlapped": mfu, "mfu_overlapped": mfu, "bound": "compute"}
    return {"fits": fits, "reason": "" if fits else "too large", "hbm": {"total": 2**30}, "roofline": times}


def test_remat_is_replaced_wherever_it_stands():
    host = with_remat(preset("7b"), "dots")
    assert (host.vision.remat, host.language.remat) == ("dots", "dots")
    assert with_remat(host, "dots") is host
    with pytest.raises(UserError, match="no remat policy 'most'"):
        with_remat(host, "most")


def test_meshes_are_all_that_multiply_to_the_chips():
    found = list(meshes(8, largest_tensor=2))
    assert {tuple(sizes.values()) for sizes in found} == {
        *((data, 8 // data, 1, 1) for data in (1, 2, 4, 8)),
        *((data, 4 // data, 2, 1) for data in (1, 2, 4)),
    }


def test_a_mesh_that_fits_is_taken_as_it_is(shapes):
    assert fitting_mesh(MeshConfig(data=-1, fsdp=4), 8, 16, 1, shapes) == MeshConfig(data=2, fsdp=4)


@pytest.mark.parametrize(
    ("asked", "rows", "reason", "nearest"),
    [
        (MeshConfig(data=1, fsdp=7), 8, "needs 7 devices", "--mesh.fsdp 8 "),
        (MeshConfig(data=1, fsdp=8), 4, "4 rows a batch cannot be shared", "--mesh.fsdp 4 --mesh.tensor 2"),
        (MeshConfig(data=1, fsdp=2, tensor=4), 8, "cannot be cut", "--mesh.fsdp 4 --mesh.tensor 2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_answered_with_the_nearest_that_does(shapes, asked, rows, reason, nearest):
    with pytest.raises(UserError) as found:
        fitting_mesh(asked, 8, rows, 1, shapes)
    assert reason in str(found.value)
    assert "The nearest mesh that fits 8 chips" in str(found.value) and nearest in str(found.value)


def test_a_mesh_keeps_its_declared_slices_or_names_the_nearest(shapes):
    asked = MeshConfig(data=2, fsdp=4, dcn=DcnConfig(fsdp=2))
    assert fitting_mesh(asked, 8, 16, 1, shapes, slices=2) == asked
    with pytest.raises(
        UserError, match=r"--mesh.dcn.fsdp 2 does not fit 4 slices.*--mesh.dcn.data 1 --mesh.dcn.fsdp 4"
    ):
        fitting_mesh(MeshConfig(data=1, fsdp=8, dcn=DcnConfig(fsdp=2)), 8, 16, 1, shapes, slices=4)
    with pytest.raises(
        UserError, match=r"(?s)4 slices cannot be shared by data 1 and fsdp 2.*--mesh.data 1 --mesh.fsdp 4"
    ):
        fitting_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2), 8, 16, 1, shapes, slices=4)
    assert {tuple(c.mesh.values()) for c in candidates(8, 1, shapes, (2.0,), ("full",), (1, 2), (1, 2), slices=8)} == {
        (1, 8, 1, 1),
        (2, 4, 1, 1),
    }


@pytest.mark.parametrize(("rows", "mesh"), [(8, (2, 4, 1, 1)), (2, (1, 2, 4, 1)), (3, (1, 1, 8, 1))])
def test_the_usual_mesh_cuts_parameters_into_whole_tiles_and_leaves_no_chip_out(shapes, rows, mesh):
    assert usual_mesh(rows, 8, 1, shapes).sizes == mesh  # 32 channels are four tiles of eight


def test_where_no_mesh_fits_other_rows_are_named(shapes):
    with pytest.raises(UserError, match="No mesh of 64 chips fits 3 rows"):
        fitting_mesh(MeshConfig(data=1, fsdp=64), 64, 3, 1, shapes)


def test_candidates_fit_and_come_smallest_first(shapes):
    found = candidates(8, 1, shapes, (2.0, 0.5), ("dots", "full"), (1, 2))
    assert [(c.rows, c.remat) for c in found][:2] == [(4, "full"), (4, "dots")]
    assert all(why_not(c.mesh, c.rows, 1, shapes) is None for c in found)
    # Half a row a chip needs two chips a row.
    assert {c.mesh["tensor"] for c in found if c.rows == 4} == {2}
    assert {c.mesh["data"] for c in found} == {1}
    both = candidates(8, 1, shapes, (2.0,), ("full",), (1,), copies=(1, 2))
    assert [(c.mesh["data"], c.mesh["fsdp"]) for c in both] == [(1, 8), (2, 4)]
    with pytest.raises(UserError, match="No layout of 8 chips fits"):
        candidates(8, 1, shapes, (0.1,), ("full",), (1,))


def test_a_search_goes_on_where_it_was_and_puts_the_best_first(tmp_path, shapes):
    tried = candidates(8, 1, shapes, (1.0, 2.0), ("full",), (1,))
    path, asked, lines = tmp_path / "found.jsonl", [], []

    def compile_it(candidate):
        asked.append(candidate.rows)
        return outcome(candidate.rows / 100)

    search(tried, "demo", path, compile_it, lines.append, limit=1)
    assert asked == [8] and "--limit 1 is reached" in lines[-1]
    with path.open("a") as file:
        file.write('{"key": "cut o')  # killed while it wrote
    assert len(known(path)) == 1
    found = search(tried, "demo", path, compile_it, lines.append)
    assert asked == [8, 16]
    assert [entry["candidate"]["rows"] for entry in found] == [16, 8]


def test_policies_that_compute_less_again_come_first_and_what_cannot_be_better_is_left_out(tmp_path, shapes):
    tried = candidates(8, 1, shapes, (1.0, 2.0), ("full", "dots"), (1,))
    bounds = {"full": 0.8, "dots": 0.95}
    asked, lines = [], []

    def search_with(speeds):
        def compile_it(candidate):
            asked.append((candidate.rows, candidate.remat))
            return outcome(speeds[candidate.remat])

        asked.clear()
        path = tmp_path / f"{speeds['dots']}.jsonl"
        return search(tried, "demo", path, compile_it, lines.append, bounds=bounds)

    # Dots may still get better than 0.7, and full is not out of the race.
    search_with({"dots": 0.7, "full": 0.6})
    assert asked == [(8, "dots"), (16, "dots"), (8, "full"), (16, "full")]
    search_with({"dots": 0.8, "full": 0.6})
    assert asked == [(8, "dots"), (16, "dots")]
    assert "left out, at most 80.0 % MFU and 80.0 % is found" in lines[-1]
    # What is known from before bounds the rest from the start.
    assert [entry["roofline"]["mfu_not_overlapped"] for entry in search_with({"dots": 0.8, "full": 0.6})] == [0.8, 0.8]
    assert asked == []


def test_the_best_of_what_does_not_fit_bounds_nothing(tmp_path, shapes):
    tried = candidates(8, 1, shapes, (1.0,), ("full", "dots"), (1,))
    asked = []

    def compile_it(candidate):
        asked.append(candidate.remat)
        return outcome(0.9 if candidate.remat == "dots" else 0.5, fits=candidate.remat == "full")

    bounds = {"full": 0.8, "dots": 0.95}
    found = search(tried, "demo", tmp_path / "found.jsonl", compile_it, lambda line: None, bounds=bounds)
    assert asked == ["dots", "full"]
    assert [entry["candidate"]["remat"] for entry in found] == ["full", "dots"]


def test_rows_may_be_shared_by_cutting_their_tokens(shapes):
    found = candidates(8, 1, shapes, (0.5,), ("full",), (1, 2), contexts=(1, 2))
    shared = {(c.mesh["tensor"], c.mesh["context"]) for c in found}
    assert shared == {(2, 1), (1, 2), (2, 2)}


def test_more_of_what_does_not_fit_is_not_tried(tmp_path, shapes):
    tried = candidates(8, 1, shapes, (1.0, 2.0), ("full", "dots"), (1,))
    asked = []

    def compile_it(candidate):
        asked.append((candidate.rows, candidate.remat))
        return outcome(0.5, fits=candidate.remat == "full")

    found = search(tried, "demo", tmp_path / "found.jsonl", compile_it, lambda line: None)
    assert asked == [(8, "full"), (8, "dots"), (16, "full")]
    assert [entry["fits"] for entry in found] == [True, True, False]
    assert all(
        json.loads(line)["key"].startswith("demo | ") for line in (tmp_path / "found.jsonl").read_text().splitlines()
    )
