"""Trajectories linked to phrases: for each sentence what it is about, and the keypoints from the time of saying it.

    links = link(keypoints, words, RubricPhrases())      # [("a red ring", points), ("a blue square", points)]

An answer that names what it goes to before it goes there is option b of the LBM paper's two ways to write a predicted
trajectory (facts of the metric; the other is one trajectory without names). To a small model it makes of the hard
question "which phrase is it now, and where is that?" two easy ones: which phrase comes next, and where it is.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tracevision_jax.trajectory.alignment import TimedText, align_words
from tracevision_jax.trajectory.phrases import Phrase, PhraseProvider, phrase_windows

_SENTENCE = re.compile(r"[^.!?;\u3002]*[.!?;\u3002]*\s*")


class Link(NamedTuple):
    """A phrase and the keypoints (x, y, t) that belong to it."""

    phrase: str
    points: Float[np.ndarray, "points 3"]


def subjects(caption: str, provider: PhraseProvider) -> list[tuple[Phrase, Phrase]]:
    """What each sentence is about, the first of its most important phrases, and the whole sentence.

    Sentences without phrases are left out.
    """
    phrases = provider.phrases(caption)
    found = []
    for match in _SENTENCE.finditer(caption):
        start, end = match.span()
        inside = [phrase for phrase in phrases if start <= phrase.start_char < end]
        if inside:
            subject = max(inside, key=lambda phrase: phrase.importance)
            found.append((subject, Phrase(match.group(), start, end, subject.importance)))
    return found


def link(points: Float[np.ndarray, "points 3"], words: Sequence[TimedText], provider: PhraseProvider) -> list[Link]:
    """Cut a trajectory where sentences begin; points before the first one belong to it.

    Sentences that were not heard, or in whose time no point falls, are left out; without any there is one link
    without a phrase.
    """
    caption = " ".join(word.text for word in words)
    about = subjects(caption, provider)
    begins = phrase_windows([sentence for _, sentence in about], align_words(caption, words))[:, 0]
    heard = np.flatnonzero(np.isfinite(begins))
    if not len(heard):
        return [Link("", points)]
    owner = np.maximum(np.searchsorted(begins[heard], points[:, 2], side="right") - 1, 0)
    links = [Link(about[index][0].text, points[owner == row]) for row, index in enumerate(heard)]
    return [one for one in links if len(one.points)]
