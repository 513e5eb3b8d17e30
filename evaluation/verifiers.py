"""How models of each family are compared with the reference implementation, for `tracevision convert --verify`.

rows = VERIFIERS["sam2_video"](directory, config, lambda: params, print)
"""

from collections.abc import Callable

from evaluation.verify import StageError, verify_qwen25vl
from evaluation.verify_sam import verify_sam

VERIFIERS: dict[str, Callable[..., list[StageError]]] = {
    "qwen2_5_vl": verify_qwen25vl,
    "sam": verify_sam,
    "sam2": verify_sam,
    "sam2_video": verify_sam,
}
"""Family -> how it is compared."""
