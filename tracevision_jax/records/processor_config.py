"""`ProcessorConfig`: what a system needs to know of its host to lay out rows."""

import dataclasses
import math

from tracevision_jax.records.simplification import Simplification
from tracevision_jax.records.vocabulary import CoordinateFormat
from tracevision_jax.vision.preprocess import VisionInputConfig


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """What a system needs to know of its host to lay out rows."""

    vision: VisionInputConfig = VisionInputConfig()
    coordinates: CoordinateFormat = "bins"
    system_prompt: str = "You are a helpful assistant."
    """Empty: no system turn."""
    tokens_per_second: float = 2.0
    """Time scaling of the multimodal rotary positions."""
    mask_size: int = 256
    """Side of the decoder's masks."""
    max_points: int = 64
    """Keypoints of one trajectory; longer ones are thinned evenly after simplification."""
    max_traces: int = 8
    """Trajectories that the user may show in one conversation; the TVP tells no more of them apart."""
    simplification: Simplification = Simplification()
    linked: bool = False
    """Write the trajectory of an answer sentence by sentence, each part after the phrase that it goes to
    (`trajectory/linking.py`), instead of as one."""
    slot_tokens: int = 0
    """Tokens of a row that each conversation has to itself, so that attention may treat conversations as a batch axis
    instead of masking the square of a row; worth its padding where no block-sparse kernel serves (CPU). 0 packs
    tightly."""
    learned_share: float = 1.0
    """Largest share of a row's tokens that may be learned; the loss makes logits for no more than these."""

    answer_weighting: float = 0.0
    """Each of the n learned tokens of an answer weighs n ** -answer_weighting: 0 is the papers' mean over tokens, 0.5
    the square averaging of InternVL 2.5 (arXiv:2412.05271), 1 counts all answers alike, so that the many and noisy
    coordinates of a trajectory do not outweigh a name."""

    slot_words: bool = False
    """Whether the slots of a mask also learn the words of the phrase before it, in turn, all but the last one, which
    learns how the answer goes on. From scratch this is what makes E_seg tell targets apart; a pretrained host does
    without."""

    def answer_weight(self, tokens: int) -> float:
        """Weight of each of the learned tokens of an answer that has so many."""
        return float(max(tokens, 1)) ** -self.answer_weighting

    def learned_tokens(self, tokens: int) -> int:
        """How many tokens of a row of this length may be learned."""
        return min(tokens, math.ceil(tokens * self.learned_share))
