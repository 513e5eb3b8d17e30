"""Caption metrics as COCO's evaluation computes them: BLEU-1..4, METEOR, ROUGE-L, CIDEr, SPICE.

The counting is pycocoevalcap's (Chen et al., arXiv 1504.00325): corpus BLEU with the closest reference
length, ROUGE-L with beta 1.2, CIDEr-D with document frequencies from the references of the scored set itself
(raw scale 0 to 10; papers often print it times 100), METEOR 1.5 from added statistics, SPICE 1.0.

    scores = score_captions({"a": "a dog runs"}, {"a": ["a dog is running", "the dog runs"]})
    scores.values["CIDEr"], scores.reasons.get("SPICE")

All metrics of one call see the same tokens:
- "ptb", the default and what published tables use, is the Stanford PTB tokenizer, lower-cased, less
  pycocoevalcap's list of punctuation. It needs Java; without Java every metric is None with that reason.
- "simple" needs no Java: lower-cased words, punctuation dropped, "don't" and "t-shirt" each one word where
  PTB makes "do n't". It agrees with PTB on plain words alone, so its scores belong in tables of their own.
  METEOR and SPICE, Java programs themselves, run on these tokens where Java is found.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from evaluation.metrics import java_programs
from evaluation.metrics.java_programs import ProgramError

Tokenizer = Literal["ptb", "simple"]

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")

# What COCO's evaluation drops. Its brackets are in capitals though tokens are in lower case by then, so that
# brackets stay, in published numbers and here.
PTB_PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
_SIMPLE_WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")


class CaptionScores(NamedTuple):
    """Scores of a set of captions."""

    values: dict[str, float | None]
    """Every name of `METRICS`, in that order; None is what could not be computed."""
    reasons: dict[str, str]
    """Why, for each None."""
    tokenizer: Tokenizer
    """What split captions into tokens, for all metrics alike."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know."""

    def as_json(self) -> dict[str, Any]:
        """The values under their names, then how they came about."""
        how = {"tokenizer": self.tokenizer, "reasons": self.reasons, "notes": list(self.notes)}
        return {**self.values, **how}


def score_captions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer = "ptb",
    java_timeout_s: float = 1800.0,
) -> CaptionScores:
    """Score one predicted text an id against the id's reference texts.

    Each Java program (tokenizer, METEOR, SPICE) gets `java_timeout_s` seconds before it counts as failed.

    Raises:
        ValueError: no captions, ids that differ between the sides, an id without references, or an unknown
            tokenizer.
    """
    if tokenizer not in get_args(Tokenizer):
        raise ValueError(f"the tokenizer must be one of {get_args(Tokenizer)}, not {tokenizer!r}")
    if not references or predictions.keys() != references.keys() or not all(references.values()):
        raise ValueError("predictions and references must hold the same ids, each with a reference or more")
    ids = list(references)
    texts = [predictions[name] for name in ids] + [text for name in ids for text in references[name]]
    try:
        tokens = tokenize(texts, tokenizer, java_timeout_s)
    except ProgramError as error:
        why = f"{error}; all metrics use its tokens. Install Java, or ask for the tokenizer 'simple'"
        return CaptionScores(dict.fromkeys(METRICS), dict.fromkeys(METRICS, why), tokenizer)
    predicted, rest = tokens[: len(ids)], iter(tokens[len(ids) :])
    true = [[next(rest) for _ in references[name]] for name in ids]

    values: dict[str, float | None] = dict(_without_java(predicted, true))
    reasons: dict[str, str] = {}
    programs: dict[str, Callable[..., float]] = {"METEOR": java_programs.meteor, "SPICE": java_programs.spice}
    for name, program in programs.items():
        try:
            values[name] = program(predicted, true, java_timeout_s)
        except ProgramError as error:
            values[name], reasons[name] = None, str(error)
    notes = ()
    if len(ids) == 1:
        notes = ("CIDEr of a single caption is 0 by construction: its weights come from the scored set.",)
    return CaptionScores({name: values[name] for name in METRICS}, reasons, tokenizer, notes)


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, java_timeout_s: float = 1800.0) -> list[str]:
    """Texts as the metrics see them: tokens in lower case joined by blanks, punctuation dropped.

    Raises:
        ProgramError: "ptb" was asked for and its Java program did not run.
    """
    if tokenizer == "simple":
        return [" ".join(_SIMPLE_WORD.findall(text.lower())) for text in texts]
    return [
        " ".join(token for token in line.split(" ") if token not in PTB_PUNCTUATION)
        for line in java_programs.tokenize(texts, java_timeout_s)
    ]


def _without_java(predicted: Sequence[str], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """The metrics that pycocoevalcap computes in Python, on tokenized captions."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates = {number: [text] for number, text in enumerate(predicted)}
    truths = {number: list(texts) for number, texts in enumerate(true)}
    bleu, _ = Bleu(4).compute_score(truths, candidates, verbose=0)
    rouge, _ = Rouge().compute_score(truths, candidates)
    cider, _ = Cider().compute_score(truths, candidates)
    named_bleu = {f"BLEU-{order}": float(value) for order, value in enumerate(bleu, start=1)}
    return {**named_bleu, "ROUGE-L": float(rouge), "CIDEr": float(cider)}
