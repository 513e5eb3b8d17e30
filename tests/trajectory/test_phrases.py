"""The three providers of phrases: by rule, from a file, from a language model behind a local HTTP server."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import TimedWord
from tracevision_jax.trajectory.alignment import align_words
from tracevision_jax.trajectory.chat_endpoint import ChatEndpoint
from tracevision_jax.trajectory.phrases import (
    EndpointPhrases,
    FilePhrases,
    Phrase,
    PhraseProvider,
    RubricPhrases,
    check_phrases,
    locate,
    parse_reply,
    phrase_windows,
)

NARRATIVE = (
    "In the center of the image there is a man standing and holding a ball in his hand. On the right there "
    "is another man bending. In the background there is a fence, trees and building."
)


def scores(caption: str) -> list[tuple[str, int]]:
    return [(phrase.text, phrase.importance) for phrase in RubricPhrases().phrases(caption)]


# By rule


@pytest.mark.parametrize(
    ("phrase", "importance"),
    [
        ("red hat", 5),
        ("leftmost chair", 5),
        ("wooden table", 4),
        ("large window", 4),
        ("in the corner", 3),
        ("next to", 3),
        ("is", 1),
        ("the", 1),
    ],
)
def test_the_examples_of_the_papers_rubric_score_as_the_paper_says(phrase, importance):
    assert scores(phrase) == [(phrase, importance)]


def test_a_narrative_falls_into_the_usual_number_of_phrases():
    assert scores(NARRATIVE) == [
        ("In the center of the image", 3),
        ("there is", 1),
        ("a man standing and holding a ball in his hand", 4),
        ("On the right there is", 3),
        ("another man bending", 4),
        ("In the background there is", 3),
        ("a fence, trees and building", 4),
    ]


def test_a_longer_narrative_has_more_phrases_but_not_one_a_word():
    words = len((NARRATIVE * 3).split())
    assert 7 < len(scores(NARRATIVE * 3)) <= -(-words // 6)


@pytest.mark.parametrize("caption", ["", " \n", "...", "?!"])
def test_a_caption_without_words_has_no_phrases(caption):
    assert scores(caption) == []


def test_other_scripts_and_emoji_are_phrases_too():
    assert scores("一只狗在草地上。旁边有一个人。") == [("一只狗在草地上", 4), ("旁边有一个人", 4)]
    assert scores("🐶 runs") == [("🐶 runs", 4)]


@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from(NARRATIVE.split()), max_size=60).map(" ".join)))
def test_phrases_of_any_caption_are_ordered_disjoint_and_inside_it(caption):
    phrases = RubricPhrases().phrases(caption)
    check_phrases(caption, phrases)
    covered = {i for phrase in phrases for i in range(phrase.start_char, phrase.end_char)}
    words = [word for word in align_words(caption, []) if word.text]
    assert all(set(range(word.start_char, word.end_char)) <= covered for word in words)


# Windows


def test_a_phrase_lasts_from_its_first_heard_word_to_its_last():
    caption = "a red dog and cat"
    words = [TimedWord("a", 0.0, 1.0), TimedWord("dog", 2.0, 3.5), TimedWord("uh", 3.5, 4.0)]
    phrases = [Phrase("a red dog", 0, 9, 5), Phrase("and cat", 10, 17, 4)]
    windows = phrase_windows(phrases, align_words(caption, words))
    assert windows[0].tolist() == [0.0, 3.5]
    assert np.isnan(windows[1]).all()


# Finding phrases in a caption


def test_phrases_are_found_whatever_their_case_and_punctuation():
    caption = "A dog, on the grass; a dog!"
    found = locate(caption, [("a dog", 4), ("On the grass.", 3), ("A DOG", 5)])
    assert found == [Phrase("A dog", 0, 5, 4), Phrase("on the grass", 7, 19, 3), Phrase("a dog", 21, 26, 5)]


def test_phrases_that_are_not_there_or_overlap_are_left_out_and_order_is_the_captions():
    found = locate("a dog on the grass", [("the grass", 3), ("a cat", 5), ("dog on the", 2), ("a dog", 4)])
    assert [phrase.text for phrase in found] == ["a dog", "the grass"]


@pytest.mark.parametrize(
    ("phrases", "reason"),
    [
        ([Phrase("dog", 2, 5, 0)], "importance 0"),
        ([Phrase("dog", 2, 5, 6)], "importance 6"),
        ([Phrase("dogs", 2, 6, 3)], "outside a caption of 5"),
        ([Phrase("cat", 2, 5, 3)], "not what its characters say: 'dog'"),
        ([Phrase("a d", 0, 3, 3), Phrase("dog", 2, 5, 3)], "overlaps"),
        ([Phrase("", 2, 2, 3)], "outside"),
    ],
)
def test_phrases_that_do_not_fit_the_caption_are_refused(phrases, reason):
    with pytest.raises(UserError, match=reason):
        check_phrases("a dog", phrases)


# From a file


def write(folder, value, name="phrases.json"):
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


def test_a_file_gives_phrases_by_caption_and_by_id(tmp_path):
    entry = [{"text": "the dog", "importance": 5}, {"text": "on grass", "importance": 3}]
    provider = FilePhrases(write(tmp_path, {"The dog on grass.": entry, "17": entry[:1]}))
    assert isinstance(provider, PhraseProvider)
    assert provider.phrases("The dog on grass.") == [Phrase("The dog", 0, 7, 5), Phrase("on grass", 8, 16, 3)]
    assert provider.phrases("see the dog", "17") == [Phrase("the dog", 4, 11, 5)]


def test_places_in_a_file_are_taken_as_given(tmp_path):
    entry = [{"text": "dog", "importance": 5, "start_char": 6, "end_char": 9}]
    assert FilePhrases(write(tmp_path, {"a dog dog": entry[:0], "a dog,dog": entry})).phrases("a dog,dog") == [
        Phrase("dog", 6, 9, 5)
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not JSON"),
        ('{"a": [', "not JSON"),
        ('{"caption": "a"}\n{"caption": "b"}', r"not JSON.*\.jsonl"),
        ("[" * 100_000, "not JSON"),
        ("[]", "must hold an object"),
        ('{"a dog": {}}', "entry 'a dog' must be a list of phrases, not dict"),
        ('{"a dog": ["dog"]}', "phrase 0 must be"),
        ('{"a dog": [{"text": "dog"}]}', "importance None"),
        ('{"a dog": [{"text": "dog", "importance": 2.5}]}', "importance 2.5"),
        ('{"a dog": [{"text": "dog", "importance": true}]}', "importance True"),
        ('{"a dog": [{"text": "dog", "importance": 9}]}', "importance 9"),
        ('{"a dog": [{"text": "dog", "importance": 3, "start_char": 2}]}', "both start_char and end_char"),
    ],
)
def test_a_malformed_file_is_refused_when_it_is_opened(tmp_path, content, reason):
    with pytest.raises(UserError, match=reason):
        FilePhrases(write(tmp_path, content))


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        FilePhrases(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        FilePhrases(tmp_path / "bytes.json")


def test_what_a_file_lacks_or_misplaces_is_named(tmp_path):
    path = write(tmp_path, {"a dog": [{"text": "a cat", "importance": 3}], "7": []})
    with pytest.raises(UserError, match="no phrases for id '8' or caption 'a bird'"):
        FilePhrases(path).phrases("a bird", "8")
    with pytest.raises(UserError, match="'a cat' does not stand in the caption"):
        FilePhrases(path).phrases("a dog")


def test_json_lines_are_read_and_a_bad_line_is_named(tmp_path):
    good = json.dumps({"caption": "a dog", "phrases": [{"text": "dog", "importance": 4}]})
    assert FilePhrases(write(tmp_path, good + "\n", "p.jsonl")).phrases("a dog") == [Phrase("dog", 2, 5, 4)]
    for bad in ("{", "[]", '{"caption": "b"}'):
        with pytest.raises(UserError, match="line 2"):
            FilePhrases(write(tmp_path, good + "\n" + bad, "p.jsonl"))


# From an endpoint


@pytest.mark.parametrize(
    "reply",
    [
        "[the dog]: 5, [on grass]: 3",
        "Sure!\n[the dog]:5,\n[on grass] : 3.",
        "**[the dog]**: **5**, [on grass] - score 3",
        '"the dog": 5, "on grass": 3',
        "1. the dog: 5\n2. on grass: 3",
        "- the dog: 5\n- on grass: 3\n",
        "the dog: 5, on grass: 3",
        "[the dog]: 5.0, [on grass]: 3, [the sky]: 9, [x]: 0",
    ],
)
def test_answers_of_the_usual_forms_are_read(reply):
    assert parse_reply(reply) == [("the dog", 5), ("on grass", 3)]


@given(st.text(max_size=60))
def test_any_answer_is_read_as_phrases_of_valid_importance_or_as_none(reply):
    assert all(text and 1 <= score <= 5 for text, score in parse_reply(reply))


@contextmanager
def serve(*answers):
    """A chat endpoint on this machine that gives these answers in turn: texts, (status, body), bytes."""
    asked, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, json.loads(body), self.headers.get("Authorization")))
            answer = left.pop(0)
            status = 200
            if isinstance(answer, tuple):
                status, answer = answer
            elif isinstance(answer, str):
                answer = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_endpoint_is_asked_once_a_caption_and_its_answers_are_kept_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    cache = tmp_path / "cache" / "phrases.jsonl"
    with serve("[the dog]: 5, [on grass]: 3", "[A cat]: 4") as (url, asked):
        provider = EndpointPhrases(ChatEndpoint(url, "some-model"), cache)
        assert provider.phrases("The dog on grass.") == [
            Phrase("The dog", 0, 7, 5),
            Phrase("on grass", 8, 16, 3),
        ]
        assert provider.phrases("a cat") == [Phrase("a cat", 0, 5, 4)]
        assert provider.phrases("a cat") == [Phrase("a cat", 0, 5, 4)]
        assert provider.phrases("...") == []
    path, body, key = asked[0]
    assert (len(asked), path, body["model"], body["temperature"]) == (
        2,
        "/v1/chat/completions",
        "some-model",
        0,
    )
    assert "The dog on grass." in body["messages"][0]["content"] and key == "Bearer secret"
    # A new provider, and the file provider, read the cache; nothing is asked.
    nowhere = ChatEndpoint("http://127.0.0.1:9/v1", "some-model", attempts=1)
    assert EndpointPhrases(nowhere, cache).phrases("a cat") == [Phrase("a cat", 0, 5, 4)]
    assert FilePhrases(cache).phrases("a cat") == [Phrase("a cat", 0, 5, 4)]


def test_a_cache_cut_by_a_killed_process_loses_only_its_last_line(tmp_path):
    cache = tmp_path / "phrases.jsonl"
    with serve("[a dog]: 4", "[a cat]: 3", "[a cat]: 3") as (url, asked):
        provider = EndpointPhrases(ChatEndpoint(url, "m"), cache)
        provider.phrases("a dog")
        provider.phrases("a cat")
        cache.write_bytes(cache.read_bytes()[:-7])
        again = EndpointPhrases(ChatEndpoint(url, "m"), cache)
        again.phrases("a dog")
        again.phrases("a cat")
        assert len(asked) == 3
    last = EndpointPhrases(ChatEndpoint("http://127.0.0.1:9", "m", attempts=1), cache)
    assert last.phrases("a cat") == [Phrase("a cat", 0, 5, 3)]


def test_failures_that_may_pass_are_tried_again_with_longer_and_longer_pauses():
    pauses = []
    answers = [(503, b"busy"), (429, b"slow down"), b"not json", b'{"choices": []}', "[a dog]: 5"]
    with serve(*answers) as (url, asked):
        endpoint = ChatEndpoint(url, "m", attempts=5, pause_seconds=0.5, sleep=pauses.append)
        assert EndpointPhrases(endpoint).phrases("a dog") == [Phrase("a dog", 0, 5, 5)]
    assert len(asked) == 5 and pauses == [0.5, 1.0, 2.0, 4.0]


def test_a_refusal_is_reported_at_once_with_the_servers_words():
    with (
        serve((401, b"bad key")) as (url, asked),
        pytest.raises(UserError, match=r"refused the question: status 401 \(bad key\)"),
    ):
        EndpointPhrases(ChatEndpoint(url, "m")).phrases("a dog")
    assert len(asked) == 1


def test_an_endpoint_that_cannot_be_reached_or_is_too_slow_is_an_error_that_says_so():
    unreachable = ChatEndpoint("http://127.0.0.1:9/v1", "m", attempts=2, sleep=lambda seconds: None)
    with pytest.raises(UserError, match="no answer in 2 attempts"):
        EndpointPhrases(unreachable).phrases("a dog")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        slow = ChatEndpoint(url, "m", timeout_seconds=0.1, attempts=2, sleep=lambda seconds: None)
        with pytest.raises(UserError, match="timed out"):
            EndpointPhrases(slow).phrases("a dog")


@pytest.mark.parametrize("reply", ["I cannot do that.", "[a cat]: 5", "[a dog]: 5, [x]: 3, [y]: 2, [z]: 1"])
def test_answers_that_do_not_fit_the_caption_are_asked_again_and_then_refused(reply):
    with (
        serve(reply, reply) as (url, asked),
        pytest.raises(UserError, match="no readable phrases for 'a dog'"),
    ):
        EndpointPhrases(ChatEndpoint(url, "m")).phrases("a dog")
    assert len(asked) == 2


def test_settings_that_cannot_work_are_refused():
    for wrong in ({"url": "localhost:8000"}, {"attempts": 0}, {"timeout_seconds": 0.0}):
        with pytest.raises(UserError):
            ChatEndpoint(**({"url": "http://x/v1", "model": "m"} | wrong))
