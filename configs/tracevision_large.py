"""TraceVision on Qwen2.5-VL-32B and 72B: the paper's three stages on larger hosts, which the paper does not train.

    tracevision convert --from Qwen2.5-VL-72B-Instruct --to checkpoints/qwen72b --verify
    tracevision train tracevision_72b_stage1 --init-from checkpoints/qwen72b --mesh.data 8 --mesh.fsdp 32
    tracevision compile tracevision_72b_stage1_5 --topology v5p:8x8x4

Hardware: 256 v5p chips or more, one row a chip: all three stages of both sizes fit, rows of images, with at most 59 of
95 GiB a chip (docs/scaling.md). Nothing has been trained; no result is known.
"""

import dataclasses

from configs.registry import register
from configs.tracevision import TraceVisionTraining
from configs.tracevision_7b import CONFIG, QWEN_TOKENS, STAGE1, STAGE1_5, STAGE2
from tracevision_jax.hosts.qwen25vl import preset
from tracevision_jax.systems.tracevision import tracevision_config

for _size in ("32b", "72b"):
    _config = dataclasses.replace(
        tracevision_config(preset(_size).with_precision("bfloat16", "float32", "full"), QWEN_TOKENS),
        processor=CONFIG.processor,
        logit_chunk=CONFIG.logit_chunk,
    )
    for _stage in (STAGE1, STAGE1_5, STAGE2):
        register(
            dataclasses.replace(
                _stage,
                name=_stage.name.replace("7b", _size),
                model=TraceVisionTraining(_config),
                rows=(256,),
            )
        )
