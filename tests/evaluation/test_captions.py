"""Caption metrics: published numbers, values by hand, and Java that is missing, broken or stuck."""

import math
import shutil
import stat
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.metrics import java_programs
from evaluation.metrics.captions import METRICS, score_captions, tokenize
from evaluation.metrics.java_programs import ProgramError

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no program named java")

PREDICTIONS = {"a": "The dog, running fast!", "b": "two cats"}
REFERENCES = {"a": ["the dog is running fast"], "b": ["two cats", "some animals on a mat"]}

# Of the example files of Maluuba/nlg-eval, whose tokens are the words between blanks. They hold plain words
# only, so that both tokenizers yield the very same tokens.
PUBLISHED = {
    "BLEU-1": 0.550000,
    "BLEU-2": 0.428174,
    "BLEU-3": 0.284043,
    "BLEU-4": 0.201143,
    "METEOR": 0.295797,
    "ROUGE-L": 0.522104,
    "CIDEr": 1.242192,
}


@pytest.fixture
def published_captions(shared_data):
    lines = {
        name: (shared_data / "captions" / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2")
    }
    predictions = {str(number): text for number, text in enumerate(lines["hyp"])}
    pairs = zip(lines["ref1"], lines["ref2"], strict=True)
    return predictions, {str(number): list(texts) for number, texts in enumerate(pairs)}


@pytest.fixture
def java(tmp_path, monkeypatch):
    """Put a program named `java` on the PATH that is the given shell script; given None, none at all."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(script=None):
        if script is not None:
            program = folder / "java"
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
            monkeypatch.setenv("PATH", str(folder), prepend=":")
        else:
            monkeypatch.setenv("PATH", str(folder))

    return install


@needs_java
def test_the_published_numbers_are_reproduced_with_ptb_tokens(published_captions):
    scores = score_captions(*published_captions)
    assert scores.tokenizer == "ptb"
    assert {name: scores.values[name] for name in PUBLISHED} == pytest.approx(PUBLISHED, abs=1e-6)


def test_the_published_numbers_need_no_java_but_for_meteor(published_captions, java):
    java(None)
    scores = score_captions(*published_captions, tokenizer="simple")
    expected = {name: value for name, value in PUBLISHED.items() if name != "METEOR"}
    assert {name: scores.values[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert scores.values["METEOR"] is None and "needs Java" in scores.reasons["METEOR"]


def test_the_scores_of_captions_made_here_are_those_of_the_definitions(java):
    """Prediction a has 4 of 4 words, 2 of 3 pairs, no triple; b is perfect. 6 words predicted, 5 + 2 true."""
    java(None)
    scores = score_captions(PREDICTIONS, REFERENCES, tokenizer="simple")
    brevity = math.exp(1 - 7 / 6)
    assert scores.values["BLEU-1"] == pytest.approx(brevity, abs=1e-6)
    assert scores.values["BLEU-2"] == pytest.approx(brevity * math.sqrt((2 + 1) / (3 + 1)), abs=1e-6)
    assert scores.values["BLEU-3"] == pytest.approx(0, abs=1e-4)
    precision, recall = 4 / 4, 4 / 5
    rouge = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert scores.values["ROUGE-L"] == pytest.approx((rouge + 1) / 2, abs=1e-9)


def test_cider_of_captions_made_here_is_that_of_the_definition(java):
    """A caption equal to its only reference gets 10 for each order of n-grams it has, over four orders."""
    java(None)
    predictions = {"a": "red green blue sky", "b": "one two", "c": "nothing alike"}
    references = {"a": ["red green blue sky"], "b": ["one two"], "c": ["quite different words here"]}
    scores = score_captions(predictions, references, tokenizer="simple")
    assert scores.values["CIDEr"] == pytest.approx((10 + 10 * 2 / 4 + 0) / 3)


@needs_java
def test_ptb_drops_punctuation_keeps_lines_and_splits_contractions():
    texts = [
        "A man, walking.",
        "",
        "Don't stop!",
        "\U0001f600",
        "café 中文",
        "one\u2028two\x0bthree\r\nfour\x85",
    ]
    expected = ["a man walking", "", "do n't stop", "", "café 中文", "one two three four"]
    assert tokenize(texts, "ptb") == expected


@needs_java
def test_meteor_runs_on_captions_made_here_empty_ones_included():
    assert java_programs.meteor(["a dog runs", "", "x ||| y"], [["a dog runs"], ["a", ""], ["x y"]], 300.0) > 0.5


@given(st.lists(st.text(max_size=30), max_size=5))
def test_simple_tokens_are_lower_case_words(texts):
    tokens = tokenize(texts, "simple")
    assert len(tokens) == len(texts)
    assert all(token.strip(".,!?()'\"-") == token != "" for line in tokens for token in line.split())
    assert tokenize(["The t-shirt, isn't it?"], "simple") == ["the t-shirt isn't it"]


def test_without_java_every_metric_is_null_with_the_reason(java):
    java(None)
    scores = score_captions(PREDICTIONS, REFERENCES)
    assert list(scores.values) == list(METRICS) and set(scores.values.values()) == {None}
    assert set(scores.reasons) == set(METRICS)
    assert "no program named java" in scores.reasons["BLEU-1"] and "simple" in scores.reasons["BLEU-1"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'Unable to locate a Java Runtime.' >&2; exit 1",
            "exit status 1: Unable to locate a Java Runtime.",
        ),
        ("exit 3", "exit status 3: no message"),
        ("echo one line", "returned 1 lines for 5 texts"),
        ("kill -9 $$", "exit status -9"),
    ],
)
def test_a_java_that_fails_makes_all_null_with_what_it_said(java, script, reason):
    java(script)
    scores = score_captions(PREDICTIONS, REFERENCES)
    assert set(scores.values.values()) == {None}
    assert reason in scores.reasons["CIDEr"]


def test_a_java_that_hangs_is_stopped_with_its_children(java):
    java("sleep 60 & wait")
    start = time.monotonic()
    scores = score_captions(PREDICTIONS, REFERENCES, java_timeout_s=0.3)
    assert time.monotonic() - start < 20
    assert scores.reasons["METEOR"].startswith("the PTB tokenizer was stopped after 0.3 s")


def test_a_meteor_that_dies_hangs_or_babbles_is_null_and_the_rest_is_scored(java):
    for script, reason in (
        ("read line; echo oops >&2; exit 2", "METEOR failed with exit status 2: oops"),
        ("sleep 60", "METEOR was stopped after 0.3 s"),
        ("while read line; do echo words; echo words; echo words; done", "instead of a score"),
    ):
        java(script)
        scores = score_captions(PREDICTIONS, REFERENCES, tokenizer="simple", java_timeout_s=0.3)
        assert scores.values["METEOR"] is None and reason in scores.reasons["METEOR"]
        assert scores.values["BLEU-1"] is not None


def test_spice_says_that_its_models_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(java_programs, "_folder", lambda: tmp_path)
    with pytest.raises(ProgramError, match="get_stanford_models"):
        java_programs.spice(["a dog"], [["a dog"]], 10.0)


@pytest.mark.parametrize(
    ("written", "outcome"),
    [
        ('[{"scores": {"All": {"f": 0.25}}}, {"scores": {"All": {"f": 0.75}}}]', 0.5),
        ('[{"scores": {"All": {"f": 0.25}}}]', "1 scores for 2 captions"),
        ("not json", "no readable scores"),
    ],
)
def test_spice_with_models_is_the_mean_of_what_it_writes(tmp_path, monkeypatch, java, written, outcome):
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in java_programs.CORENLP_JARS:
        (tmp_path / "spice" / "lib" / name).touch()
    monkeypatch.setattr(java_programs, "_folder", lambda: tmp_path)
    # java -D... -Xmx8G -jar JAR QUESTIONS -out ANSWERS: the seventh argument is where scores are expected.
    java(f"cat > \"$7\" <<'END'\n{written}\nEND")
    if isinstance(outcome, float):
        assert java_programs.spice(["a", "b"], [["a"], ["b"]], 10.0) == outcome
    else:
        with pytest.raises(ProgramError, match=outcome):
            java_programs.spice(["a", "b"], [["a"], ["b"]], 10.0)


def test_a_single_caption_comes_with_a_note_on_cider(java):
    java(None)
    scores = score_captions({"a": "a dog"}, {"a": ["a dog"]}, tokenizer="simple")
    assert scores.values["CIDEr"] == 0 and "by construction" in scores.notes[0]
    assert score_captions(PREDICTIONS, REFERENCES, tokenizer="simple").notes == ()


def test_an_empty_prediction_scores_zero(java):
    java(None)
    scores = score_captions({"a": "", "b": "..."}, {"a": ["a dog"], "b": ["two cats"]}, tokenizer="simple")
    present = [value for value in scores.values.values() if value is not None]
    assert present == pytest.approx([0] * 6)


@pytest.mark.parametrize(
    ("predictions", "references"),
    [({}, {}), ({"a": "x"}, {"b": ["x"]}), ({"a": "x"}, {"a": []}), ({"a": "x", "b": "y"}, {"a": ["x"]})],
)
def test_ids_that_differ_are_refused(predictions, references):
    with pytest.raises(ValueError, match="same ids"):
        score_captions(predictions, references)


def test_nothing_is_printed(java, capfd):
    java(None)
    score_captions(PREDICTIONS, REFERENCES, tokenizer="simple")
    assert capfd.readouterr() == ("", "")
