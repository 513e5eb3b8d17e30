"""The demo's longer recipe: its model also learns to find what a phrase names, for boxes and for traces of captions.

    tracevision demo --long --out runs/long

Hardware: 2 CPU cores, about 35 minutes when idle. Against the demo's own recipe it has three helps more
(docs/architecture.md, "A place is looked up by its phrase"): a guided head, places of visual tokens with the released
base of mRoPE, and trajectories that name where they go; and three times the steps, which these need: within 15 minutes
they cost names and masks more than they bring.
"""

import dataclasses
import functools

from configs.tracevision_demo import BASE, PLAIN_SCENES, asked, demo_recipe

LANGUAGE = dataclasses.replace(BASE.host.language, rope_theta=10_000.0)
GUIDED = dataclasses.replace(
    BASE,
    host=dataclasses.replace(BASE.host, language=LANGUAGE),
    processor=dataclasses.replace(BASE.processor, linked=True),
    unit_places=3.0,
    guided_layer=2,
)
UNGUIDED = dataclasses.replace(GUIDED, guided_layer=None)

long_recipe = functools.partial(demo_recipe, base=GUIDED, family="tracevision_long")

STAGE0 = long_recipe(
    "stage0",
    ((PLAIN_SCENES, ("plain_names+plain_objects",)),),
    slot=208,
    rows=16,
    steps=1800,
    learning_rate=0.012,
    seed=0,
)
STAGE1 = long_recipe(
    "stage1",
    ((asked("what", "what", "what"), ("trace_qa+trace_qa+trace_qa",)),),
    slot=200,
    rows=16,
    steps=90,
    learning_rate=0.003,
    seed=10,
    points=42,
    # With the language model frozen, the TVP would bend the visual tokens to draw attention.
    base=UNGUIDED,
)
STAGE1_5 = long_recipe(
    "stage1_5",
    (
        (
            asked("what", "what", "trace_segment", "segment"),
            ("trace_qa+trace_segment+refer_segment", "trace_from_caption+refer_box"),
        ),
        (
            asked("what", "what"),
            ("caption_from_trace+refer_segment", "plain_objects+refer_box+trace_qa"),
        ),
    ),
    slot=200,
    rows=16,
    steps=1500,
    learning_rate=0.012,
    vision_rate=0.3,
    seed=20,
    points=42,
    masks=3,
)
STAGE2 = long_recipe(
    "stage2",
    (
        (asked("dialogue", "what"), ("dialogue", "trace_qa")),
        (
            asked("which_trace", "what", "trace_segment"),
            ("trace_qa+trace_segment", "trace_from_caption+refer_box"),
        ),
    ),
    slot=200,
    rows=16,
    steps=90,
    learning_rate=1e-3,
    seed=30,
    points=56,
    masks=3,
)
