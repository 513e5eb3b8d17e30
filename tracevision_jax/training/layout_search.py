"""Which batch, rematerialisation and mesh train a recipe fastest on a topology: tries them, keeps what was found.

Every outcome is a line of a JSON-lines file, so a search that was stopped goes on where it was, and one with other
candidates adds to it. It is a branch and bound: what a policy computes again is known before anything is compiled, and
with it the MFU that none of its candidates can exceed (`Flops.mfu_bound`). Policies with the highest bound come first,
and not compiled is

- a candidate whose bound is no higher than the best MFU that was found;
- more rows a chip than do not fit already, on the same mesh with the same policy, or with a policy that keeps more.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tracevision_jax.errors import UserError
from tracevision_jax.parallel.mesh import meshes
from tracevision_jax.parallel.rules import PARAMETERS, Rule
from tracevision_jax.training.ahead_of_time import why_not

KEEPS = ("full", "dots", "none")
"""Remat policies, those that keep the least first."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layout to try."""

    rows: int
    remat: str
    mesh: Mapping[str, int]

    def key(self, about: str) -> str:
        """What names its line; `about` names recipe, bucket and topology."""
        sizes = " ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        return f"{about} | {self.rows} rows | remat {self.remat} | {sizes}"


def candidates(
    devices: int,
    accumulation: int,
    shapes: Any,
    rows_per_chip: Sequence[float],
    remats: Sequence[str],
    tensors: Sequence[int],
    copies: Sequence[int] = (1,),
    contexts: Sequence[int] = (1,),
    rules: tuple[Rule, ...] = PARAMETERS,
    slices: int = 1,
) -> list[Candidate]:
    """All that fit, the smallest batches and the policies that keep the least first.

    Args:
        devices: number of chips.
        accumulation: microbatches of an update.
        shapes: the model's parameters.
        rows_per_chip: of the global batch; below 1 several chips share a row, which `tensor` and `context` do.
        remats: policies.
        tensors: sizes of the axis `tensor`.
        copies: sizes of the axis `data`, each with all parameters; `fsdp` takes the chips that are left.
        contexts: sizes of the axis `context`.
        rules: sharding of the parameters.
        slices: of TPU, that the chips are on.

    Raises:
        UserError: none fits.
    """
    asked = {"tensor": tensors, "data": copies, "context": contexts}
    shards = [
        sizes
        for sizes in meshes(devices, max(tensors), max(contexts))
        if all(sizes[axis] in wanted for axis, wanted in asked.items())
    ]
    found = []
    for per_chip in sorted(rows_per_chip):
        rows = round(devices * per_chip)
        fitting = [
            sizes for sizes in shards if rows and why_not(sizes, rows, accumulation, shapes, rules, slices) is None
        ]
        found += [Candidate(rows, remat, sizes) for remat in sorted(remats, key=KEEPS.index) for sizes in fitting]
    if not found:
        raise UserError(
            f"No layout of {devices} chips fits: rows a chip {list(rows_per_chip)}, tensor {list(tensors)}, data "
            f"{list(copies)}, context {list(contexts)}. More rows or a larger tensor or context make more layouts "
            "possible."
        )
    return found


def known(path: Path) -> dict[str, dict[str, Any]]:
    """Outcomes of earlier searches by key; a last line that was cut off is dropped."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["key"]] = entry
    return found


def search(
    tried: Sequence[Candidate],
    about: str,
    path: Path,
    outcome_of: Callable[[Candidate], Mapping[str, Any]],
    say: Callable[[str], None],
    limit: int = 0,
    bounds: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Try candidates, policies with the highest bound first, and return all outcomes, the best first.

    Args:
        tried: in the order of `candidates`, which is kept within a policy.
        about: names recipe, bucket and topology.
        path: the file of outcomes.
        outcome_of: compiles a candidate; JSON values as `Outcome.to_json` gives them.
        say: takes a line about each.
        limit: compile at most so many; 0 for all.
        bounds: the MFU that no candidate of a remat policy exceeds; 1 where it is not known.
    """
    found, compiled = known(path), 0

    def bound(candidate: Candidate) -> float:
        return (bounds or {}).get(candidate.remat, 1.0)

    tried = sorted(tried, key=bound, reverse=True)
    for number, candidate in enumerate(tried, 1):
        key = candidate.key(about)
        place = f"[{number}/{len(tried)}] {key.removeprefix(about + ' | ')}"
        if key in found:
            say(f"{place}: known, {verdict(found[key])}")
            continue
        if hopeless(candidate, tried, about, found):
            say(f"{place}: left out, a smaller one does not fit")
            continue
        best = max(map(speed, outcomes(tried, about, found)), default=0.0)
        if bound(candidate) <= best:
            say(f"{place}: left out, at most {100 * bound(candidate):.1f} % MFU and {100 * best:.1f} % is found")
            continue
        if limit and compiled == limit:
            say(f"{place}: not tried, --limit {limit} is reached; the same command again goes on from here")
            break
        entry = {"key": key, "candidate": dataclasses.asdict(candidate), **outcome_of(candidate)}
        compiled += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        found[key] = entry
        say(f"{place}: {verdict(entry)}")
    return sorted(outcomes(tried, about, found), key=lambda entry: (not entry["fits"], -speed(entry)))


def outcomes(tried: Sequence[Candidate], about: str, found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is known of these candidates, in their order."""
    return [found[key] for candidate in tried if (key := candidate.key(about)) in found]


def hopeless(
    candidate: Candidate, tried: Sequence[Candidate], about: str, found: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Whether a smaller candidate on the same mesh is known not to fit."""
    smaller: Iterator[Candidate] = (
        other
        for other in tried
        if other.mesh == candidate.mesh
        and other.rows <= candidate.rows
        and KEEPS.index(other.remat) <= KEEPS.index(candidate.remat)
    )
    return any(not found[key]["fits"] for other in smaller if (key := other.key(about)) in found)


def speed(entry: Mapping[str, Any]) -> float:
    """MFU with collectives not overlapped; 0 for what does not fit."""
    times = entry.get("roofline")
    return times["mfu_not_overlapped"] if times and entry["fits"] else 0.0


def verdict(entry: Mapping[str, Any]) -> str:
    """An outcome in a few words."""
    if not entry["fits"]:
        return f"does not fit ({entry['reason']})"
    gib = entry["hbm"]["total"] / 2**30
    times = entry["roofline"]
    shown = f"{100 * times['mfu_not_overlapped']:.1f} % MFU, {100 * times['mfu_overlapped']:.1f} % overlapped"
    return f"{gib:.1f} GiB, {shown}, bound by {times['bound']}" if math.isfinite(gib) else "fits"
