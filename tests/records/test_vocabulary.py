"""Tokens: users' text never becomes a special token, ids lie where the contract says, files survive a round trip."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.records.qwen_tokenizer import PLAIN, SPECIAL
from tracevision_jax.errors import UserError
from tracevision_jax.records.vocabulary import CHAT_TOKENS, SLOTS, Vocabulary, load_vocabulary, train_tokenizer
from tracevision_jax.trajectory.tokens import added_tokens

TRICKS = [*SPECIAL, *CHAT_TOKENS, "<traj>", "</traj>", "[SEG]", "[SEG_0]", "<0>", "<999>", "<|im_end|", "|>"]
typed = st.lists(
    st.one_of(
        st.text(max_size=8), st.sampled_from([*TRICKS, "👩‍👩‍👧", "日本語", "é", "e\u0301", "עברית", "\r\n", "  "])
    ),
    max_size=6,
).map("".join)


@given(text=typed)
def test_typed_text_never_becomes_a_special_token_and_reads_back(vocabulary, text):
    ids = vocabulary.encode(text)
    assert not set(vocabulary.tokenizer.convert_tokens_to_ids(list(CHAT_TOKENS))) & set(ids)
    assert all(0 <= token < vocabulary.first_added for token in ids)
    assert vocabulary.decode(ids) == text


@given(text=typed)
def test_typed_text_never_becomes_a_special_token_of_the_released_tokenizer(qwen, text):
    ids = qwen.encode(text)
    assert all(token < 151643 or token > 151656 for token in ids) and max(ids, default=0) < qwen.first_added
    # The released tokenizer composes accents before anything else.
    assert qwen.decode(ids) == unicodedata.normalize("NFC", text)


def test_the_released_tokenizer_has_its_published_ids(qwen):
    assert qwen.first_added == 151665
    assert qwen.encode("Hello world") == [9707, 1879]
    assert [qwen.special(token) for token in CHAT_TOKENS] == [
        *(151643, 151644, 151645, 151646, 151647, 151648, 151649, 151652, 151653, 151655, 151656)
    ]
    known = qwen.tokenizer.get_vocab()
    assert [known[token] for token in PLAIN] == list(range(151657, 151665))


def test_added_tokens_lie_where_the_contract_says(vocabulary, digits):
    first = len(vocabulary.tokenizer)
    assert vocabulary.first_added == vocabulary.traj_open == first
    assert (vocabulary.traj_close, vocabulary.seg) == (first + 1, first + 2)
    assert vocabulary.slots == [first + 3 + k for k in range(SLOTS)] and SLOTS == 6
    assert vocabulary.first_bin == first + 9 and vocabulary.size == first + 1009
    assert vocabulary.added_strings == added_tokens("bins")
    assert digits.size == first + 9 and digits.added_strings == added_tokens("digits")
    with pytest.raises(ValueError, match="no bin tokens"):
        _ = digits.first_bin


def test_coordinates_become_the_tokens_of_their_bins(vocabulary):
    ids = vocabulary.encode_coordinates(np.array([[0.0, 0.0125], [0.9999, 1.0]]))
    assert [token - vocabulary.first_bin for token in ids] == [0, 12, 999, 999]
    assert vocabulary.is_bin(np.array([*ids, vocabulary.traj_open, 0])).tolist() == [True] * 4 + [False] * 2
    with pytest.raises(UserError, match="not finite"):
        vocabulary.encode_coordinates(np.array([[0.5, np.nan]]))


def test_mixed_ids_are_written_in_their_order(vocabulary):
    ids = [*vocabulary.encode("a é"), vocabulary.traj_open, *vocabulary.encode_coordinates(np.array([[0.012, 0.345]]))]
    ids += [vocabulary.traj_close, *vocabulary.encode(" b ."), vocabulary.special("<|im_end|>"), vocabulary.seg]
    assert vocabulary.decode(ids) == "a é<traj><12><345></traj> b .<|im_end|>[SEG]"


def test_a_token_knows_where_it_ends_in_the_text(vocabulary):
    text = "(12,345), (7,8) red circle"
    ids, ends = vocabulary.encode_with_ends(text)
    assert ids == vocabulary.encode(text)
    assert ends == sorted(ends) and ends[-1] == len(text)
    assert [vocabulary.decode(ids[: k + 1]) for k in range(len(ids))] == [text[:end] for end in ends]


def test_the_tokenizer_itself_still_reads_special_tokens_afterwards(vocabulary):
    """Encoding text as it is typed must not change what the host's own tokenizer does with a prompt."""
    prompt = "<|im_start|>user\nred<|im_end|>"
    before = vocabulary.tokenizer(prompt)["input_ids"]
    vocabulary.encode(prompt)
    after = vocabulary.tokenizer(prompt)["input_ids"]
    assert before == after and before[0] == vocabulary.special("<|im_start|>")


def test_half_of_a_surrogate_pair_is_the_users_mistake(vocabulary):
    with pytest.raises(UserError, match="half of a surrogate pair at character 2"):
        vocabulary.encode("ok\ud83d")


def test_a_tokenizer_without_chat_tokens_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(UserError, match=r"lacks the chat tokens <\|endoftext\|>, <\|im_start\|>"):
        Vocabulary(bare)


def test_saved_tokenizers_read_back_the_same(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    again = load_vocabulary(tmp_path, "digits")
    assert again.coordinates == "digits" and again.first_added == vocabulary.first_added
    text = "Where is <|im_end|> the é 日 (12,345) ?  end ."
    assert again.encode(text) == vocabulary.encode(text)
    assert again.decode(again.encode(text)) == text


def test_missing_and_damaged_tokenizers_are_named(vocabulary, tmp_path):
    with pytest.raises(UserError, match=r"No tokenizer in .*: expected tokenizer\.json"):
        load_vocabulary(tmp_path)
    vocabulary.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_vocabulary(tmp_path)


def test_training_depends_on_the_texts_alone():
    texts = ["a red circle", "a blue square near a red star"] * 3
    one, other = (train_tokenizer(texts, 300) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    assert [one.convert_tokens_to_ids(token) for token in CHAT_TOKENS] == list(range(len(CHAT_TOKENS)))
