"""TraceVision at demo size on synthetic scenes: a random host is pretrained (stage 0), then the paper's three stages.

    tracevision demo                                      # all four, then evaluation and a report
    tracevision train tracevision_demo_stage0             # or one by one
    tracevision train tracevision_demo_stage1 --init-from runs/tracevision_demo_stage0
    tracevision demo --long --out runs/long               # the longer recipe, tracevision_long.py

Hardware: 2 CPU cores, about 12 minutes for the four stages. What to expect stands in the report that `make demo`
writes, and in the README.

Everything is the real thing but its size: Qwen2.5-VL's tower (2 groups of a window and a full block), mRoPE with a
base that suits grids of 4 x 4 visual tokens, TVP, codebook, pixel decoder. What helps a host that starts from nothing
is switched on here and said in docs/architecture.md. Conversations have slots of their own in a row, since attention
over a packed row costs its square on a CPU.
"""

import dataclasses

from configs.registry import register
from configs.tracevision import SCENES_TOKENIZER, TraceVisionTraining
from data_loaders.synthetic.config import SceneConfig
from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.simplification import Simplification
from tracevision_jax.records.vocabulary import CHAT_TOKENS
from tracevision_jax.segmentation.pixel_decoder import PixelDecoderConfig
from tracevision_jax.systems.tracevision import TraceVisionConfig, tracevision_config
from tracevision_jax.training.optimizer import OptimizerConfig
from tracevision_jax.training.recipe import CheckpointConfig, DataConfig, EvaluationConfig, SourceEntry, TrainRecipe
from tracevision_jax.vision.config import QwenVisionConfig
from tracevision_jax.vision.preprocess import VisionInputConfig

HELD_OUT_SEED = 1_000_003
SIDE_PX = 96
EVALUATE_EVERY = 280
"""Steps; a stage that is no longer is not evaluated on the way, which would take longer than to train it."""
TOKENS = 480
"""Of the tokenizer."""

SCENES = SceneConfig(
    height=(SIDE_PX, SIDE_PX),
    width=(SIDE_PX, SIDE_PX),
    objects=(4, 5),
    named=(2, 3),
    shapes=("circle", "square", "triangle", "cross", "ring"),
    backgrounds=("plain", "gradient"),
    textured=0.1,
    overlap=0.05,
    brief=True,
    words_per_second=(3.0, 4.0),
)
PLAIN_SCENES = dataclasses.replace(SCENES, objects=(3, 6), named=(6, 6), narrative=False)
"""Of stage 0: every object is named, nothing is traced."""

HOST = Qwen25VLConfig(
    vision=QwenVisionConfig(
        out_width=96,
        width=128,
        heads=4,
        mlp_width=256,
        groups=2,
        window_blocks=1,
        patch=12,
        window_units=2,
        rope_theta=100.0,
    ),
    language=LanguageConfig(
        vocab_size=TOKENS,
        width=96,
        layers=4,
        heads=2,
        kv_heads=2,
        head_dim=48,
        mlp_width=192,
        mrope_sections=(8, 8, 8),
        rope_theta=8.0,
    ),
    **{
        field: CHAT_TOKENS.index(token)
        for field, token in {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
            "pad_token": "<|endoftext|>",
        }.items()
    },
    end_tokens=(CHAT_TOKENS.index("<|im_end|>"), CHAT_TOKENS.index("<|endoftext|>")),
)

BASE = tracevision_config(
    HOST,
    TOKENS,
    PixelDecoderConfig(width=64, heads=4, mlp_width=128, token_hidden=128, grid=8, fine_upsamplings=2),
    tvp={"heads": 4},
    processor={
        "vision": VisionInputConfig(min_pixels=48 * 48, max_pixels=SIDE_PX * SIDE_PX),
        "simplification": Simplification(epsilon_px=2.0),
        "max_points": 14,
        "learned_share": 0.6,
        "answer_weighting": 0.5,
        "slot_words": True,
    },
    logit_chunk=0,
    bin_reach=25,
)


def demo_recipe(
    stage: str,
    mixture: tuple[tuple[SceneConfig, tuple[str, ...]], ...],
    *,
    slot: int,
    rows: int,
    steps: int,
    learning_rate: float,
    seed: int,
    points: int = 0,
    masks: int = 0,
    vision_rate: float = 1.0,
    base: TraceVisionConfig = BASE,
    family: str = "tracevision_demo",
) -> TrainRecipe:
    """One stage: kinds of scenes with the dialogues to have about each, each dialogue in a slot of `slot` tokens."""
    config = dataclasses.replace(base, processor=dataclasses.replace(base.processor, slot_tokens=slot))
    sources = tuple(
        SourceEntry("synthetic", tasks=tasks, options={"seed": seed + number, "count": rows * steps, "config": scenes})
        for number, (scenes, tasks) in enumerate(mixture)
    )
    held_out = tuple(
        dataclasses.replace(source, options=source.options | {"seed": HELD_OUT_SEED, "count": 64}) for source in sources
    )
    conversations = max(len(tasks) for _, tasks in mixture)
    bucket = Bucket(slot * conversations, 1, 4, conversations, points, masks)
    return register(
        TrainRecipe(
            name=f"{family}_{stage}",
            system="tracevision",
            model=TraceVisionTraining(config, SCENES_TOKENIZER),
            stage=stage,
            data=DataConfig(sources=sources, workers=1, prefetch=6),
            buckets=(bucket,),
            rows=(rows,),
            steps=steps,
            optimizer=OptimizerConfig(
                method="muon",
                learning_rate=learning_rate,
                warmup=0.05,
                final_share=0.05,
                beta2=0.98,
                multipliers=(("^host/vision", vision_rate),) if vision_rate != 1 else (),
            ),
            checkpoint=CheckpointConfig(every=0, keep=1),
            evaluation=EvaluationConfig(
                every=EVALUATE_EVERY,
                samples=64,
                pictures=2 if masks else 0,
                sources=held_out if steps > EVALUATE_EVERY else (),
            ),
            log_every=10,
        )
    )


def asked(*kinds: str) -> SceneConfig:
    """Scenes with one question of each kind."""
    return dataclasses.replace(SCENES, questions=kinds, questions_per_scene=len(kinds))


STAGE0 = demo_recipe(
    "stage0",
    ((PLAIN_SCENES, ("plain_names+plain_objects",)),),
    slot=208,
    rows=16,
    steps=280,
    learning_rate=0.012,
    seed=0,
)
STAGE1 = demo_recipe(
    "stage1",
    ((asked("what", "what", "what"), ("trace_qa+trace_qa+trace_qa",)),),
    slot=200,
    rows=16,
    steps=30,
    learning_rate=0.003,
    seed=10,
    points=42,
)
STAGE1_5 = demo_recipe(
    "stage1_5",
    (
        (
            asked("what", "what", "trace_segment", "segment"),
            ("trace_qa+trace_segment+refer_segment", "trace_from_caption+trace_qa"),
        ),
        (
            asked("what", "what"),
            ("caption_from_trace+refer_segment", "refer_box+trace_qa+trace_qa"),
        ),
    ),
    slot=200,
    rows=16,
    steps=540,
    learning_rate=0.012,
    vision_rate=0.3,
    seed=20,
    points=42,
    masks=3,
)
STAGE2 = demo_recipe(
    "stage2",
    (
        # Boxes and masks of phrases both: asked for one of them alone, it soon gives it to whoever asks for the other.
        (asked("dialogue", "what"), ("dialogue", "trace_qa+refer_segment")),
        (
            asked("which_trace", "what", "trace_segment"),
            ("trace_qa+trace_segment", "trace_from_caption+refer_box"),
        ),
    ),
    slot=192,
    rows=16,
    steps=30,
    learning_rate=1e-3,
    seed=30,
    points=56,
    masks=4,
)
