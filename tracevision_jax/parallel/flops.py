"""FLOPs of a program, counted from its products before any compiler has touched them.

The program is traced to a jaxpr, and every matrix product or convolution counts 2 x its multiplications, times the
lengths of the scans around it. What is elementwise counts nothing, as is usual for model FLOPs. Conventions:

- Forward and backward are the model's: a product costs once forward, and once more backward for each of its two
  operands that depends on what is trained. So a frozen tower costs no backward pass, and nothing is ever guessed as
  "6 x parameters x tokens".
- What rematerialisation computes again is counted apart (`recomputed`), and never part of the model's FLOPs.
- Causal attention costs the full square as traced (`forward`, `backward`, `recomputed`); `model` has it halved, which
  is what a kernel that leaves masked blocks out computes. `model_full_square` has it whole (the convention of PaLM).
- A while loop whose length the data decide (writing tokens) counts one turn.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from tracevision_jax.ops.attention import attention_mesh

CAUSAL = re.compile(r"language.*attn.*(bkqd|bkqs)")
"""Name stacks of the two products of causal attention (`ops/attention_call.py`) in a language model."""
MASKED_SHARE = 0.5
"""Of the square of causal attention that is masked."""
REFERENCE = "reference"
"""No platform, so that attention is traced plainly: kernels hide their products, and blocks for a CPU's caches compute
scores again."""


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of the traced program."""

    place: str
    """Names of the modules and scopes around it, joined by /."""
    flops: int
    """Trip counts included."""
    active: int
    """How many of its operands depend on what is trained."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one step over all chips together; see the module's text for the conventions."""

    forward: float
    backward: float
    recomputed: float
    causal: float
    """Of forward and backward: products of causal attention, full square."""
    parts: Mapping[str, float]
    """Forward and backward by part of the model."""
    recomputed_causal: float = 0.0
    """Of `recomputed`: products of causal attention, full square."""

    @property
    def model_full_square(self) -> float:
        """Forward and backward, causal attention whole."""
        return self.forward + self.backward

    @property
    def model(self) -> float:
        """Forward and backward, causal attention halved."""
        return self.model_full_square - MASKED_SHARE * self.causal

    @property
    def executed_full_square(self) -> float:
        """With what is computed again."""
        return self.model_full_square + self.recomputed

    @property
    def mfu_bound(self) -> float:
        """MFU that no compiled program can exceed: it multiplies all that is traced, of causal attention half at least.

        Were all else free, its step would take these products at peak. (Taps of convolutions that fall on padding are
        counted and need not be multiplied; they are of the model's FLOPs, too.)
        """
        least = self.model + self.recomputed - MASKED_SHARE * self.recomputed_causal
        return self.model / least if least else 1.0


def training_flops(loss: Callable[[Any, Any], Any], trained: Any, given: Any, parts: Sequence[str] = ()) -> Flops:
    """FLOPs of a loss and its gradient.

    Args:
        loss: (trained, given) -> scalar.
        trained: shapes of what the gradient is taken for.
        given: shapes of all else.
        parts: names to look for in the scopes, see `part_of`.
    """
    with attention_mesh(None, platform=REFERENCE):
        traced = jax.make_jaxpr(loss)(trained, given)
        gradient = jax.make_jaxpr(jax.grad(loss))(trained, given)
    count = len(jax.tree.leaves(trained))
    marks = [index < count for index in range(len(traced.jaxpr.invars))]
    found = list(products(traced, marks))
    return _summed(found, list(products(gradient)), parts)


def forward_flops(function: Callable[..., Any], *given: Any, parts: Sequence[str] = ()) -> Flops:
    """FLOPs of a program without a gradient."""
    with attention_mesh(None, platform=REFERENCE):
        traced = jax.make_jaxpr(function)(*given)
    return _summed(list(products(traced)), None, parts)


def _summed(found: Sequence[Product], gradient: Sequence[Product] | None, parts: Sequence[str]) -> Flops:
    """Add up the products of a program and, where it has one, those of its gradient (forward pass among them)."""
    forward = float(sum(product.flops for product in found))
    backward = float(sum(product.flops * product.active for product in found))
    causal = sum(product.flops * (1 + product.active) for product in found if CAUSAL.search(product.place))
    recomputed = recomputed_causal = 0.0
    if gradient is not None:
        executed = sum(product.flops for product in gradient)
        backward = min(backward, executed - forward)  # what only a stopped gradient sees is in no backward pass
        recomputed = max(executed - forward - backward, 0.0)
        square = sum(product.flops for product in gradient if CAUSAL.search(product.place))
        recomputed_causal = float(max(square - causal, 0))
    of_parts: dict[str, float] = {}
    for product in found:
        part = part_of(product.place, parts)
        of_parts[part] = of_parts.get(part, 0) + product.flops * (1 + product.active)
    return Flops(forward, backward, recomputed, float(causal), of_parts, recomputed_causal)


def part_of(place: str, parts: Sequence[str]) -> str:
    """The last of `parts` that is a whole word of the place before any other word follows; "other" for none."""
    words = re.split(r"[^\w]+", place)
    named = [word for word in words if word in parts]
    return named[0] if named else "other"


def products(closed: core.ClosedJaxpr, active: Sequence[bool] = ()) -> Iterator[Product]:
    """All products of a jaxpr; `active` marks the inputs that are trained (none by default)."""
    marks = list(active) or [False] * len(closed.jaxpr.invars)
    found: list[Product] = []
    _walk(closed.jaxpr, marks, "", 1, found)
    return iter(found)


def _walk(jaxpr: Any, active: Sequence[bool], place: str, times: int, found: list[Product]) -> list[bool]:
    """Append the products of a jaxpr, and tell which of its results depend on active inputs."""
    marks = dict(zip(jaxpr.invars, active, strict=True))

    def mark(variable: Any) -> bool:
        return not isinstance(variable, core.Literal) and marks.get(variable, False)

    for equation in jaxpr.eqns:
        inputs = [mark(variable) for variable in equation.invars]
        here = "/".join(filter(None, (place, str(equation.source_info.name_stack))))
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            flops = _dot(equation) if name == "dot_general" else _convolution(equation)
            found.append(Product(here, flops * times, sum(inputs[:2])))
            outputs = [any(inputs)]
        elif name == "scan":
            outputs = _scan(params, inputs, here, times, found)
        elif name == "while":
            outputs = _while(params, inputs, here, times, found)
        elif name == "cond":
            outputs = _cond(params, inputs, here, times, found)
        elif (inner := _inner(params)) is not None:
            outputs = _walk(inner, _fit(inputs, len(inner.invars)), here, times, found)
        elif name == "stop_gradient":
            outputs = [False] * len(equation.outvars)
        elif name == "pallas_call":
            raise ValueError(f"products of a kernel cannot be counted: trace the reference instead ({here})")
        else:
            outputs = [any(inputs)] * len(equation.outvars)
        for variable, is_active in zip(equation.outvars, outputs, strict=True):
            marks[variable] = is_active and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
    return [mark(variable) for variable in jaxpr.outvars]


def _inner(params: Mapping[str, Any]) -> Any:
    """The jaxpr that an equation calls once: jit, remat, custom derivatives, shard_map."""
    found = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
    return getattr(found, "jaxpr", found)


def _fit(inputs: Sequence[bool], count: int) -> list[bool]:
    """Marks for the last `count` inputs (custom derivatives may pass more in front)."""
    return list(inputs[len(inputs) - count :]) if len(inputs) >= count else [*inputs, *[False] * (count - len(inputs))]


def _scan_counts(params: Any) -> tuple[int, int]:
    """(constants, carried values) of a scan, which come before what it runs over; jax 0.11 has them as a tree."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants), len(carried)


def _scan(params: Any, inputs: list[bool], place: str, times: int, found: list[Product]) -> list[bool]:
    constants, carried = _scan_counts(params)
    body, marks = params["jaxpr"].jaxpr, list(inputs)
    while True:
        inner: list[Product] = []
        outputs = _walk(body, marks, place, times * params["length"], inner)
        carry = [a or b for a, b in zip(marks[constants : constants + carried], outputs[:carried], strict=True)]
        if carry == marks[constants : constants + carried]:
            found += inner
            return [*carry, *outputs[carried:]]
        marks[constants : constants + carried] = carry


def _while(params: Any, inputs: list[bool], place: str, times: int, found: list[Product]) -> list[bool]:
    before, constants = params["cond_nconsts"], params["body_nconsts"]
    given, carry = inputs[before : before + constants], inputs[before + constants :]
    while True:
        inner: list[Product] = []
        outputs = _walk(params["body_jaxpr"].jaxpr, [*given, *carry], place, times, inner)
        merged = [a or b for a, b in zip(carry, outputs, strict=True)]
        if merged == carry:
            found += inner
            return carry
        carry = merged


def _cond(params: Any, inputs: list[bool], place: str, times: int, found: list[Product]) -> list[bool]:
    """The costliest branch counts."""
    branches = []
    for branch in params["branches"]:
        inner: list[Product] = []
        branches.append((_walk(branch.jaxpr, inputs[1:], place, times, inner), inner))
    found += max((inner for _, inner in branches), key=lambda inner: sum(product.flops for product in inner))
    return [any(marks) for marks in zip(*(outputs for outputs, _ in branches), strict=True)]


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    """2 x results x taps; taps on padding count, which matters at the borders of small grids only."""
    numbers = equation.params["dimension_numbers"]
    kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    taps = math.prod(np.array(kernel)[list(numbers.rhs_spec[1:])].tolist())
    spread = math.prod(equation.params["lhs_dilation"])
    return 2 * math.prod(result) * taps // (spread * equation.params["batch_group_count"])
