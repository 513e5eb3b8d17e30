"""The metrics of boxes and masks as jitted programs, for sweeps that keep predictions on the accelerator.

Only counts and IoUs leave the device; `masks.giou`, `masks.ciou` and `boxes.precision_at` finish on the host.
The arithmetic is that of `boxes.py` and `masks.py` themselves. Batched over any leading axes and free of
communication, so a batch sharded over a mesh stays where it is.

    intersections, unions = mask_areas(logits > 0, true_masks)
"""

import jax

from evaluation.metrics import boxes, masks

mask_areas = jax.jit(masks.areas)
mask_ious = jax.jit(masks.iou, static_argnames="union_epsilon")
box_ious = jax.jit(boxes.iou_pairs)
box_gious = jax.jit(boxes.giou_pairs)
box_cious = jax.jit(boxes.ciou_pairs)
