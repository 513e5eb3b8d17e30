"""TraceVision (Sec. 3): Qwen2.5-VL, the TVP between its tower and its language model, and the light pixel decoder.

`TraceVisionModel` is the network; `TraceVision` is what the training loop and the sweep see (`protocol.py`). The
parameter tree is {host: {vision, language}, tvp, decoder}. The loss is Eq. 12: text + 1.0 refinement + 2.0 Dice.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.qwen25vl import Qwen25VL, Qwen25VLConfig, place_features
from tracevision_jax.layers.sharding import constrain
from tracevision_jax.nearest import suggest
from tracevision_jax.ops.cross_entropy import LogitParts, learned_first, token_cross_entropy
from tracevision_jax.ops.guided_attention import guided_attention_loss, sought_tokens
from tracevision_jax.records.batch import Batch, Bucket
from tracevision_jax.records.collate import empty_batch
from tracevision_jax.records.processor_config import ProcessorConfig
from tracevision_jax.records.vocabulary import SLOTS
from tracevision_jax.segmentation.losses import dice_per_mask, refinement_per_mask
from tracevision_jax.segmentation.pixel_decoder import SCALES, PixelDecoder, PixelDecoderConfig
from tracevision_jax.systems.protocol import Params, Scalars, State
from tracevision_jax.trajectory.fourier import bin_centres, line_features, plane_features
from tracevision_jax.trajectory.tokens import BINS, FIRST_BIN_OFFSET, added_tokens
from tracevision_jax.trajectory.tvp import TVP, TVPConfig, frame_time_windows
from tracevision_jax.vision.preprocess import VisionInputConfig
from tracevision_jax.vision.raster import features_on_square, unit_boxes, unit_centres

GUIDANCE_COEFFICIENT = 0.5
"""Weight of the loss on attention where `guided_layer` asks for it; ours."""
COEFFICIENTS = {"text": 1.0, "refinement": 1.0, "dice": 2.0}
"""lambda of Eq. 12, as Sec. F.4 sets them."""

STAGES: dict[str, str] = {
    "stage0": r"host/.*",
    "stage1": r"tvp/.*|host/language/added/.*",
    "stage1_5": r".*",
    "stage2": r"host/language/.*",
    "stage2_joint": r"host/language/.*|tvp/.*",
}
"""What each stage trains, as a pattern of parameter paths: Sec. 4.1; `stage2_joint` is the wording of Sec. 3.4 and
App. B. Stage 0 pretrains a host that was drawn at random; a released host starts at stage 1."""

GEOMETRY = ("patch", "merge", "temporal_patch", "window_units")
"""What the processor must know of the tower to cut pictures."""


@dataclasses.dataclass(frozen=True)
class TraceVisionConfig:
    """Everything that the parameters' shapes and the processor's rows depend on."""

    host: Qwen25VLConfig
    tvp: TVPConfig
    decoder: PixelDecoderConfig
    processor: ProcessorConfig
    feature_groups: tuple[int, int] = (2, 4)
    """After which groups of the tower the decoder reads: (shallow, deep)."""
    logit_chunk: int = 1024
    """Tokens whose logits exist at one time in the loss; 0 makes them all at once."""
    bin_reach: int = 0
    """Answers at temperature 0 take the coordinate bin with the most probability within so many bins of it; 0 compares
    single bins, as the released hosts' greedy decoding does."""
    unit_places: float = 0.0
    """Norm of the Fourier features of its place that each visual token brings to the language model. A pretrained host
    has learned to tell places apart from rotary phases alone and takes 0."""
    guided_layer: int | None = None
    """Layer of the language model, from 0, whose first head is taught during training to look at what the tokens of an
    answer are about (`ops/guided_attention.py`); it is for hosts that start from nothing."""

    def __post_init__(self):
        host, decoder = self.host, self.decoder
        if self.tvp.width != host.language.width or decoder.text_width != host.language.width:
            raise UserError(
                f"The TVP has width {self.tvp.width} and the decoder takes E_seg of width {decoder.text_width}; both "
                f"must be the language model's width {host.language.width}."
            )
        if not 0 <= self.bin_reach < BINS:
            raise UserError(f"bin_reach is {self.bin_reach}; a coordinate has {BINS} bins.")
        if self.bin_reach and self.processor.coordinates != "bins":
            raise UserError("bin_reach is for coordinates as bins; written digits have no neighbours.")
        if decoder.visual_width != host.vision.width:
            raise UserError(
                f"The pixel decoder takes features of width {decoder.visual_width}, the tower has {host.vision.width}."
            )
        if decoder.mask_size != self.processor.mask_size:
            raise UserError(
                f"The processor makes masks of side {self.processor.mask_size}, the decoder {decoder.mask_size}."
            )
        if SCALES * decoder.tokens_per_scale != SLOTS:
            raise UserError(
                f"The pixel decoder takes {SCALES} x {decoder.tokens_per_scale} codebook tokens; a mask has {SLOTS}."
            )
        if self.processor.max_traces > self.tvp.max_traces:
            raise UserError(
                f"Conversations may show {self.processor.max_traces} traces, the TVP tells {self.tvp.max_traces} apart."
            )
        if self.guided_layer is not None and not 0 <= self.guided_layer < host.language.layers:
            raise UserError(f"guided_layer is {self.guided_layer}; the layers are 0 to {host.language.layers - 1}.")
        for name in GEOMETRY:
            cut, taken = getattr(self.processor.vision, name), getattr(host.vision, name)
            if cut != taken:
                raise UserError(f"The processor cuts pictures with {name} {cut}, the tower takes {taken}.")


def tracevision_config(
    host: Qwen25VLConfig, first_added: int, decoder: PixelDecoderConfig | None = None, **changes: Any
) -> TraceVisionConfig:
    """The configuration that follows from a host: widths, added tokens and picture geometry filled in.

    Args:
        host: the released or toy host, without added tokens.
        first_added: number of ids of the host's tokenizer, where added tokens begin.
        decoder: sizes of the pixel decoder, widths filled in here.
        changes: other fields of `TraceVisionConfig`; `tvp` and `processor` may be dictionaries of their fields.
    """
    processor = dict(changes.pop("processor", {}))
    added = added_tokens(processor.get("coordinates", "bins"))
    language = dataclasses.replace(host.language, added_tokens=len(added), first_added=first_added)
    vision = host.vision
    decoder = dataclasses.replace(decoder or PixelDecoderConfig(), visual_width=vision.width, text_width=language.width)
    geometry = {name: getattr(vision, name) for name in GEOMETRY}
    inputs = dataclasses.replace(processor.pop("vision", VisionInputConfig()), **geometry)
    sizes: dict[str, Any] = {"width": language.width, "heads": language.heads, "mlp_width": language.width}
    tvp = TVPConfig(**sizes | dict(changes.pop("tvp", {})))
    rows: dict[str, Any] = {
        "mask_size": decoder.mask_size,
        "tokens_per_second": host.tokens_per_second,
        "max_traces": tvp.max_traces,
    }
    depths: dict[str, Any] = {"feature_groups": (max(vision.groups // 2, 1), vision.groups)}
    return TraceVisionConfig(
        host=dataclasses.replace(host, language=language),
        tvp=tvp,
        decoder=decoder,
        processor=ProcessorConfig(vision=inputs, **rows | processor),
        **depths | changes,
    )


class Context(NamedTuple):
    """What the language model is given, and what the decoder will need."""

    embeddings: Float[Array, "B T width"]
    shallow: Float[Array, "B F places visual"]
    deep: Float[Array, "B F places visual"]
    maps: list[dict[str, Array]]
    """Attention maps of the TVP's blocks, over rows of (B * C)."""


class TraceVisionModel(nn.Module):
    """The network."""

    config: TraceVisionConfig

    def setup(self):
        config = self.config
        dtype, param_dtype = (
            jnp.dtype(config.host.language.dtype),
            jnp.dtype(config.host.language.param_dtype),
        )
        self.host = Qwen25VL(config.host)
        self.tvp = TVP(config.tvp, dtype, param_dtype, config.host.language.remat)
        self.decoder = PixelDecoder(config.decoder, dtype, param_dtype)

    def context(self, batch: Batch) -> Context:
        """Encode the frames, fuse each conversation's trajectories with them, and write all into the tokens."""
        config = self.config
        vision = config.host.vision
        units, (shallow, deep) = self.host.encode_vision(batch.patches, batch.grid, config.feature_groups)
        rows, frames, count, width = units.shape
        conversations, points = batch.point_trace.shape[1:]
        xy, inside = unit_centres(batch.grid, batch.patches.shape[2], vision.window_units, vision.merge)

        def per_conversation(x):
            spread = jnp.broadcast_to(x[:, None], (rows, conversations, *x.shape[1:]))
            merged = spread.reshape(rows * conversations, *x.shape[1:])
            return constrain(merged, "batch", *(None,) * (merged.ndim - 1))

        embeddings = self.host.embed(batch.tokens)
        if config.unit_places:
            units = units + config.unit_places * plane_features(xy, width).astype(units.dtype)
        if not points:  # a bucket without trajectories: each conversation's visual features are the image's own
            visual = per_conversation(units).reshape(rows, conversations * frames * count, width)
            return Context(place_features(embeddings, visual, batch.visual_index), shallow, deep, [])
        owner = batch.frame_owner.reshape(rows * conversations, frames)
        fused, point_features, maps = self.tvp(
            per_conversation(units),
            per_conversation(xy),
            per_conversation(inside) & owner[..., None],
            frame_time_windows(per_conversation(batch.frame_times), owner),
            batch.points.reshape(rows * conversations, points, 3),
            batch.point_trace.reshape(rows * conversations, points),
        )
        visual = constrain(fused.reshape(rows, conversations * frames * count, width), "batch", None, None)
        embeddings = place_features(embeddings, visual, batch.visual_index)
        traced = point_features.reshape(rows, conversations * points, width)
        added = place_features(jnp.zeros_like(embeddings), traced, batch.point_index)
        return Context(embeddings + added, shallow, deep, maps)

    def hidden(self, batch: Batch, context: Context) -> Float[Array, "B T width"]:
        """Hidden states of every token after the final norm."""
        slot = self.config.processor.slot_tokens

        def by_conversation(x):
            return x.reshape(-1, slot, *x.shape[2:]) if slot else x

        hidden, _ = self.host.run(*map(by_conversation, (context.embeddings, batch.positions, batch.segments)))
        return hidden.reshape(context.embeddings.shape)

    def logits(self, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows vocabulary"]:
        """Logits over base and added tokens, float32."""
        return self.host.logits(hidden)

    def logit_parts(self, hidden: Float[Array, "*rows width"]) -> LogitParts:
        """Logits of base and added tokens apart, as the loss takes them."""
        return self.host.logit_parts(hidden)

    def guidance(
        self, batch: Batch, queries: Float[Array, "N t head_dim"], keys: Float[Array, "N t head_dim"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Sum and weight of the loss on one head's attention; a place is sought in every frame of a video.

        Rows are as the language model's layers saw them: conversations where these have slots of their own.
        """
        vision = self.config.host.vision
        boxes = unit_boxes(batch.grid, batch.patches.shape[2], vision.window_units, vision.merge)
        boxes = boxes.reshape(boxes.shape[0], -1, 4)
        index = batch.visual_index
        shown = jnp.take_along_axis(boxes, (jnp.maximum(index, 0) % boxes.shape[1])[..., None], axis=1)
        shown = jnp.where((index >= 0)[..., None], shown, 0.0)
        rows = queries.shape[:2]
        wanted = sought_tokens(batch.sought.reshape(*rows, 4), shown.reshape(*rows, 4))
        return guided_attention_loss(queries, keys, batch.segments.reshape(rows), wanted)

    def masks(
        self,
        shallow: Float[Array, "B F places visual"],
        deep: Float[Array, "B F places visual"],
        grid: Int[Array, "B F 2"],
        seg: Float[Array, "B K slots width"],
        frame: Int[Array, "B K"],
    ) -> Float[Array, "B K size size"]:
        """Mask logits of E_seg on the frames that they name (Eq. 5 and 16)."""
        config, vision = self.config.decoder, self.config.host.vision

        def square(features: Array, side: int) -> Array:
            return features_on_square(features, grid, side, vision.window_units, vision.merge)

        return self.decoder(square(deep, config.grid), square(shallow, 2 * config.grid), seg, frame)

    def __call__(self, batch: Batch) -> tuple[Array, Array]:
        """Hidden states and mask logits of a training batch; touches every parameter but the head's use.

        What is learned at a visual token (`UnitNamesPart`) is learned of the feature that enters there: behind the
        language model's layers it would be known where no later token can look it up.
        """
        context = self.context(batch)
        visual = (batch.visual_index >= 0)[..., None]
        hidden = jnp.where(visual, self.host.normed(context.embeddings), self.hidden(batch, context))
        if not batch.mask_slots.shape[1]:
            return hidden, jnp.zeros(batch.masks.shape, jnp.float32)
        slots = jnp.take_along_axis(hidden, batch.mask_slots.reshape(hidden.shape[0], -1)[..., None], axis=1)
        seg = constrain(slots.reshape(*batch.mask_slots.shape, -1), "batch", None, None, None)
        masks = self.masks(context.shallow, context.deep, batch.grid, seg, batch.mask_frame)
        return hidden, constrain(masks, "batch", None, None, None)

    def initialise(self, batch: Batch) -> Array:
        """Run every module once, to draw all parameters."""
        hidden, masks = self(batch)
        return self.logits(hidden).sum() + masks.sum()


@dataclasses.dataclass(frozen=True)
class TraceVision:
    """The system, see `protocol.py`."""

    config: TraceVisionConfig

    @property
    def model(self) -> TraceVisionModel:
        """The network's module."""
        return TraceVisionModel(self.config)

    @property
    def coefficients(self) -> Mapping[str, float]:
        """lambda of Eq. 12; the token accuracy is only reported."""
        guided = self.config.guided_layer is not None
        return COEFFICIENTS | ({"guidance": GUIDANCE_COEFFICIENT} if guided else {})

    def init(self, rng: jax.Array) -> Params:
        """Draw all parameters; coordinate bins start from Fourier features of their place."""
        slot = self.config.processor.slot_tokens or 8
        bucket = Bucket(tokens=slot, frames=1, windows=1, conversations=1, points=1, masks=1)
        batch = jax.tree.map(jnp.asarray, empty_batch(1, bucket, self.config.processor))
        return self.settle(self.model.init(rng, batch, method="initialise")["params"])

    def settle(self, params: Params) -> Params:
        """Set the bins' embedding and head rows to Fourier features at the norm of the host's own rows.

        What the TVP adds to trajectory tokens starts at the scale of the host's embeddings, too. Called on fresh
        parameters, and again where the host's are read from a checkpoint.
        """
        language = params["host"]["language"]
        embedding = language["embed"]["embedding"]
        scale = jnp.sqrt(jnp.mean(jnp.square(embedding.astype(jnp.float32))))
        if (tvp := params["tvp"]).get("out_scale") is not None:  # a TVP of no direction adds nothing
            params = params | {"tvp": tvp | {"out_scale": jnp.full_like(tvp["out_scale"], scale)}}
        if self.config.processor.coordinates != "bins":
            return params
        head = embedding if self.config.host.language.tied else language["head"]["kernel"].T
        added = dict(language["added"])
        for name, base in (("embedding", embedding), ("head", head)):
            norm = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(base.astype(jnp.float32)), -1)))
            places = norm * line_features(bin_centres(BINS), self.config.host.language.width)
            rows = jnp.asarray(added[name])
            added[name] = rows.at[FIRST_BIN_OFFSET:].set(places.astype(rows.dtype))
        host = params["host"] | {"language": language | {"added": added}}
        return params | {"host": host}

    def init_state(self) -> State:
        """Nothing lives between steps."""
        return ()

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> tuple[Scalars, Scalars, State]:
        """Eq. 12 to 15 as sums and weights: "text" over learned tokens, "refinement" and "dice" over masks."""
        del rng

        def apply(*inputs: Any, method: str) -> Any:
            return self.model.apply({"params": params}, *inputs, method=method)

        layer = self.config.guided_layer
        kept = [] if layer is None else ["intermediates"]
        (hidden, masks), seen = self.model.apply({"params": params}, batch, mutable=kept)
        most = self.config.processor.learned_tokens(hidden.shape[1])
        if most < hidden.shape[1]:
            hidden = constrain(hidden, "batch", None, "width")  # whole rows: any of their tokens may be learned
        learned, targets, weights = learned_first(most, hidden, batch.targets, batch.target_weights)
        text, correct = token_cross_entropy(
            constrain(learned, "batch", "tokens", "width"),
            targets,
            weights,
            lambda rows: apply(rows, method="logit_parts"),
            self.config.logit_chunk,
        )
        real = (batch.mask_group > 0).astype(jnp.float32)
        sums = {
            "text": text,
            "refinement": (real * refinement_per_mask(masks, batch.masks, batch.mask_group)).sum(),
            "dice": (real * dice_per_mask(masks, batch.masks)).sum(),
            "accuracy": correct,
        }
        tokens, targets = batch.target_weights.sum(), real.sum()
        weights = {"text": tokens, "refinement": targets, "dice": targets, "accuracy": tokens}
        if layer is not None:
            first = seen["intermediates"]["host"]["language"]["layers"]["attn"]
            queries, keys = first["first_queries"][0][layer], first["first_keys"][0][layer]
            sums["guidance"], weights["guidance"] = apply(batch, queries, keys, method="guidance")
        return sums, weights, state

    def trainable(self, stage: str) -> Callable[[str], bool]:
        """Tell from a parameter's path whether a stage of `STAGES` trains it.

        Raises:
            UserError: no such stage.
        """
        if stage not in STAGES:
            raise UserError(f"No stage '{stage}'.{suggest(stage, STAGES)} Stages: {', '.join(STAGES)}.")
        pattern = re.compile(STAGES[stage])
        return lambda path: pattern.fullmatch(path) is not None

    def batch_spec(self, bucket: Bucket, rows: int) -> Batch:
        """Shapes and dtypes of a batch."""
        batch = empty_batch(1, bucket, self.config.processor)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
