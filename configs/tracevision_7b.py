"""TraceVision on Qwen2.5-VL-7B as in the paper: stages 1, 1.5 and 2 (Sec. 4.1, App. B).

    tracevision convert --from Qwen2.5-VL-7B-Instruct --to checkpoints/qwen7b --verify
    tracevision train tracevision_7b_stage1 --init-from checkpoints/qwen7b --data.root /data/ln --mesh.fsdp 16
    tracevision train tracevision_7b_stage1_5 --init-from runs/tracevision_7b_stage1 --data.root /data --mesh.fsdp 16
    tracevision train tracevision_7b_stage2 --init-from runs/tracevision_7b_stage1_5 --data.root /data --mesh.fsdp 16

Hardware: the paper trains on 16 A800 (80 GB) for about 3 days in all. Compiled ahead of time, all three stages fit 16
A100 of 80 GB and 256 chips of v5p, v5e or v6e (docs/scaling.md). Expected (Table 9c, after each stage): RefCOCO 89.2,
90.1, 90.4 P@0.5; LBM 0.165, 0.128, 0.117 on Localized Narratives COCO val. None of it has been reproduced here. The
paper names no optimizer: AdamW without weight decay, cosine with 3 % warm-up are ours. Sources whose readers come later
stand in the mixtures of stages 1.5 and 2, and say so at start.
"""

import dataclasses

from configs.registry import register
from configs.tracevision import TraceVisionTraining
from tracevision_jax.hosts.qwen25vl import preset
from tracevision_jax.records.batch import Bucket
from tracevision_jax.systems.tracevision import tracevision_config
from tracevision_jax.training.optimizer import OptimizerConfig
from tracevision_jax.training.recipe import CheckpointConfig, DataConfig, SourceEntry, TrainRecipe
from tracevision_jax.vision.preprocess import VisionInputConfig

QWEN_TOKENS = 151_665
"""Ids of Qwen2.5-VL's tokenizer; added tokens follow."""

CONFIG = tracevision_config(
    preset("7b").with_precision("bfloat16", "float32", "full"),
    QWEN_TOKENS,
    processor={"vision": VisionInputConfig(max_pixels=1280 * 28 * 28), "learned_share": 0.6},
    # All learned tokens of an image's row at once: each chunk more gathers the head and sums its gradient once more.
    logit_chunk=2560,
)

IMAGE = Bucket(tokens=4096, frames=2, windows=96, conversations=6, points=128, masks=12)
VIDEO = Bucket(tokens=8192, frames=24, windows=48, conversations=4, points=128, masks=48)

NARRATIVE_TASKS = ("caption_from_trace", "trace_from_caption", "joint_caption_trace")


def narratives(dataset: str, tasks: tuple[str, ...] = NARRATIVE_TASKS) -> SourceEntry:
    """A train split of Localized Narratives."""
    return SourceEntry("localized_narratives", tasks=tasks, options={"dataset": dataset, "split": "train"})


STAGE1 = register(
    TrainRecipe(
        name="tracevision_7b_stage1",
        system="tracevision",
        model=TraceVisionTraining(CONFIG),
        stage="stage1",
        data=DataConfig(sources=(narratives("coco"),), workers=8),
        buckets=(IMAGE,),
        rows=(256,),
        epochs=1,
        optimizer=OptimizerConfig(learning_rate=4e-5),
        checkpoint=CheckpointConfig(every=500),
    )
)

STAGE1_5 = register(
    dataclasses.replace(
        STAGE1,
        name="tracevision_7b_stage1_5",
        stage="stage1_5",
        data=DataConfig(
            sources=(
                *(narratives(dataset) for dataset in ("coco", "ade20k", "flickr30k", "open_images")),
                SourceEntry("video_localized_narratives", tasks=("caption_from_trace", "trace_qa")),
                SourceEntry("panoptic_narrative_grounding", tasks=("refer_segment",)),
                SourceEntry("refcoco", tasks=("refer_box", "refer_segment")),
            ),
            workers=8,
        ),
        buckets=(IMAGE, VIDEO),
        rows=(128,),  # the paper's batch, videos too: one mesh serves both shapes
        epochs=3,
    )
)

STAGE2 = register(
    dataclasses.replace(
        STAGE1_5,
        name="tracevision_7b_stage2",
        stage="stage2",
        data=DataConfig(
            sources=(
                SourceEntry("riln", tasks=("trace_qa", "dialogue")),
                SourceEntry("reasoning_segmentation", tasks=("refer_segment",)),
                SourceEntry("coco_interactive", tasks=("trace_segment",)),
            ),
            workers=8,
        ),
        epochs=1,
        optimizer=OptimizerConfig(learning_rate=2e-5),
    )
)
