"""Step time and MFU at best, from published peaks: what a chip must compute, move through HBM, and send.

Each resource takes its own time: products at the peak of the matrix units, HBM traffic at the peak of HBM, collectives
along each mesh axis at the peak of the links they use. Compute and HBM always overlap. With collectives overlapped the
step takes the longest of all; not overlapped, collectives come on top, axis after axis. Truth lies between, and above
both, since no program reaches a peak.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds a step."""

    compute: float
    hbm: float
    collectives: Mapping[str, float]
    """By mesh axes, such as "fsdp" or "data+fsdp"."""
    model: float
    """What the model's own FLOPs alone would take at peak."""

    @property
    def communication(self) -> float:
        """All collectives, one after the other."""
        return sum(self.collectives.values(), 0.0)

    @property
    def overlapped(self) -> float:
        """The step when collectives hide behind compute."""
        return max(self.compute, self.hbm, *self.collectives.values(), 0.0)

    @property
    def not_overlapped(self) -> float:
        """The step when nothing hides collectives."""
        return max(self.compute, self.hbm) + self.communication

    @property
    def mfu_overlapped(self) -> float:
        """Model FLOPs over peak FLOPs of that time."""
        return self.model / self.overlapped if self.overlapped else 0.0

    @property
    def mfu_not_overlapped(self) -> float:
        """Model FLOPs over peak FLOPs of that time."""
        return self.model / self.not_overlapped if self.not_overlapped else 0.0

    @property
    def bound(self) -> str:
        """The term that takes longest: "compute", "hbm" or "collectives over AXES"."""
        terms = {"compute": self.compute, "hbm": self.hbm}
        terms |= {f"collectives over {axes}": seconds for axes, seconds in self.collectives.items()}
        return max(terms, key=lambda name: terms[name])


def roofline(
    model_flops: float,
    executed_flops: float,
    hbm_bytes: float,
    sent_bytes: Mapping[str, float],
    *,
    peak_flops: float,
    hbm_bandwidth: float,
    link_bandwidths: Mapping[str, float],
) -> Roofline:
    """Times of one chip.

    Args:
        model_flops: the model's, one chip's share.
        executed_flops: what one chip really multiplies: with recomputation, padding and what is computed twice.
        hbm_bytes: read and written by one chip.
        sent_bytes: by one chip, along each set of mesh axes.
        peak_flops: FLOP/s.
        hbm_bandwidth: bytes/s.
        link_bandwidths: bytes/s that a chip can send along each set of mesh axes.

    Raises:
        KeyError: a set of axes without a bandwidth.
    """
    return Roofline(
        compute=executed_flops / peak_flops,
        hbm=hbm_bytes / hbm_bandwidth,
        collectives={axes: sent / link_bandwidths[axes] for axes, sent in sent_bytes.items()},
        model=model_flops / peak_flops,
    )
