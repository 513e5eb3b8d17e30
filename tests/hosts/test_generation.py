"""Generation on the real language model at tiny size: against `transformers`, the uncached forward, and
itself in other batches, other chunks and other shapes."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.hosts import generation_on_mesh
from tests.hosts.test_grammar import structures, vocabulary_of
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.generation import BUDGET_USED, ENDED, RUNNING, Generated, Generator
from tracevision_jax.hosts.grammar import Grammar, answer_grammar, text_grammar
from tracevision_jax.hosts.sampling import sampling_settings
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.language.model import LanguageModel
from tracevision_jax.records.vocabulary import GAP

TINY = LanguageConfig(
    vocab_size=150,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=48,
    mrope_sections=(2, 1, 1),
)
END = [148, 149]


def text_positions(rows: int, width: int) -> np.ndarray:
    return np.broadcast_to(np.arange(width, dtype=np.int32)[None, :, None], (rows, width, 3)).copy()


class Tiny:
    """A model with drawn weights, and prompts of different lengths for it."""

    def __init__(self, config: LanguageConfig = TINY, grammar: Grammar | None = None, params=None):
        self.model = LanguageModel(config)
        initialise = functools.partial(self.model.init, method="initialise")
        self.params = params or initialise(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
        self.generator = Generator(self.model, grammar or text_grammar(config.output_size, END))
        self.config = config

    def prompts(self, lengths: list[int], width: int, seed: int = 0):
        """(embeddings, positions, lengths); row i is the same for any batch and width."""
        tokens = np.zeros((len(lengths), width), np.int32)
        for row, length in enumerate(lengths):
            tokens[row, :length] = np.random.default_rng([seed, row]).integers(0, 140, length)
        return self.embedded(tokens, lengths)

    def embedded(self, tokens: np.ndarray, lengths: list[int]):
        embeddings = self.model.apply({"params": self.params}, jnp.asarray(tokens), method="embed")
        # Padding holds garbage on purpose.
        padding = np.arange(tokens.shape[1]) >= np.array(lengths)[:, None]
        embeddings = np.where(padding[..., None], 17.0, np.asarray(embeddings)).astype(np.float32)
        return embeddings, text_positions(*tokens.shape), np.array(lengths, np.int32)

    def generate(self, prompts, **options) -> Generated:
        return self.generator.generate(self.params, *prompts, **options)


@functools.cache
def tiny() -> Tiny:
    return Tiny()


def from_qwen2(reference: Qwen2ForCausalLM) -> dict:
    """The tiny reference's weights in our tree."""
    c = reference.config
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}

    def stacked(name: str, reshape=lambda x: x.T) -> np.ndarray:
        return np.stack([reshape(state[f"model.layers.{i}.{name}"]) for i in range(c.num_hidden_layers)])

    attention = {
        name: {
            "kernel": stacked(f"self_attn.{name}_proj.weight", lambda x, n=n: x.T.reshape(x.shape[1], n, -1)),
            "bias": stacked(f"self_attn.{name}_proj.bias", lambda x, n=n: x.reshape(n, -1)),
        }
        for name, n in heads.items()
    }
    out = stacked("self_attn.o_proj.weight", lambda x: x.T.reshape(heads["q"], -1, x.shape[0]))
    return {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "layers": {
            "attn_norm": {"scale": stacked("input_layernorm.weight")},
            "attn": {**attention, "o": {"kernel": out}},
            "mlp_norm": {"scale": stacked("post_attention_layernorm.weight")},
            "mlp": {part: {"kernel": stacked(f"mlp.{part}_proj.weight")} for part in ("gate", "up", "down")},
        },
        "final_norm": {"scale": state["model.norm.weight"]},
        "head": {"kernel": state["lm_head.weight"].T},
    }


def test_greedy_tokens_of_a_padded_batch_are_those_of_transformers_prompt_by_prompt() -> None:
    torch.manual_seed(0)
    reference = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=150, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    for name, tensor in reference.named_parameters():
        spread = 0.1 if tensor.ndim == 1 else 1.5 * tensor.shape[-1] ** -0.5
        tensor.data.normal_(0, spread).add_(1.0 if "norm" in name else 0.0)
    ours = Tiny(params=from_qwen2(reference))
    lengths = [1, 5, 17, 24, 9, 12, 3, 20]
    tokens = np.zeros((8, 24), np.int32)
    expected, scores = [], []
    for row, length in enumerate(lengths):
        tokens[row, :length] = np.random.default_rng(row).integers(0, 140, length)
        prompt = torch.tensor(tokens[row : row + 1, :length].astype(np.int64))
        made = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False,
            eos_token_id=END, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        expected.append(made.sequences[0, length:].tolist())
        logits = torch.stack([step[0] for step in made.logits]).log_softmax(-1)
        scores.append(logits[torch.arange(len(expected[-1])), made.sequences[0, length:]].numpy())
    result = ours.generate(ours.embedded(tokens, lengths), max_new_tokens=32)
    finished = [ENDED if answer[-1] in END else BUDGET_USED for answer in expected]
    assert set(finished) == {ENDED, BUDGET_USED}, "the prompts no longer test both ways to stop"
    np.testing.assert_array_equal(result.finish, finished)
    for row, answer in enumerate(expected):
        np.testing.assert_array_equal(np.asarray(result.tokens)[row, : len(answer)], answer)
        assert not np.asarray(result.tokens)[row, len(answer) :].any()
        assert result.answers()[row] == [token for token in answer if token not in END]
        np.testing.assert_allclose(np.asarray(result.log_probabilities)[row, : len(answer)], scores[row], atol=2e-5)


def test_tokens_and_hidden_states_are_those_of_the_uncached_forward_after_a_picture() -> None:
    """Positions jump at visual tokens; the answer goes on from the largest one of any axis."""
    t = tiny()
    lengths = [12, 20]
    embeddings, positions, lengths = t.prompts(lengths, 24)
    positions[0, 4:8] = [[4, 4, 4], [4, 4, 5], [4, 9, 4], [4, 9, 5]]  # a tall picture: the height leads
    positions[0, 8:12] = np.arange(10, 14)[:, None]
    positions[1, 18:20] = [[18, 18, 25], [18, 18, 26]]  # the prompt ends in a wide one
    positions[:, 20:] = 99
    result = t.generate((embeddings, positions, lengths), max_new_tokens=10)
    variables = {"params": t.params}
    for row, following in enumerate([14, 27]):
        count, length = int(result.lengths[row]), int(lengths[row])
        assert count > 3
        answer = jnp.asarray(result.tokens)[row : row + 1, :count]
        whole = jnp.concatenate(
            [embeddings[row : row + 1, :length], t.model.apply(variables, answer, method="embed")], axis=1
        )
        places = np.concatenate([positions[row, :length], np.repeat(following + np.arange(count)[:, None], 3, axis=1)])
        hidden, _ = t.model.apply(variables, whole, jnp.asarray(places[None]), jnp.ones(whole.shape[:2], jnp.int32))
        logits = np.asarray(t.model.apply(variables, hidden, method="logits"))[0]
        np.testing.assert_array_equal(logits[length - 1 : -1].argmax(-1), answer[0])
        kept = np.asarray(result.hidden)[row]
        np.testing.assert_allclose(kept[:count], hidden[0, length:], rtol=1e-4, atol=1e-5)
        assert not kept[count:].any()


def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone() -> None:
    t = tiny()
    lengths = [3, 24, 11, 1]
    together = t.generate(t.prompts(lengths, 24), max_new_tokens=16)
    embeddings, positions, _ = t.prompts(lengths, 24)
    for row, (length, width) in enumerate(zip(lengths, [3, 24, 24, 3], strict=True)):
        alone = t.generate(
            (
                embeddings[row : row + 1, :width],
                positions[row : row + 1, :width],
                np.array([length], np.int32),
            ),
            max_new_tokens=16,
        )
        assert alone.answers()[0] == together.answers()[row]
        np.testing.assert_allclose(alone.hidden[0], together.hidden[row], rtol=1e-4, atol=1e-5)


def test_sampled_answers_do_not_depend_on_the_other_rows_or_the_padding() -> None:
    t = tiny()
    settings = sampling_settings(3, temperature=1.0, top_k=20, top_p=0.9, seed=5)
    together = t.generate(t.prompts([6, 9, 4], 24), max_new_tokens=16, settings=settings)
    wider = t.generate(t.prompts([6, 9, 4], 40), max_new_tokens=16, settings=settings)
    embeddings, positions, lengths = t.prompts([6, 9, 4], 9)
    alone = t.generate(
        (embeddings[1:2], positions[1:2], lengths[1:2]),
        max_new_tokens=16,
        settings=sampling_settings(1, temperature=1.0, top_k=20, top_p=0.9, seed=6),
    )
    assert together.answers() == wider.answers()
    assert alone.answers()[0] == together.answers()[1]
    assert len(set(map(tuple, together.answers()))) == 3


@pytest.mark.parametrize("every", [1, 5, 16, 100])
def test_streaming_gives_bit_for_bit_the_answers_of_one_call(every: int) -> None:
    t = tiny()
    prompts = t.prompts([5, 17, 8], 24)
    options = {
        "max_new_tokens": [11, 16, 7],
        "settings": sampling_settings(3, temperature=[0.0, 1.0, 0.7], seed=2),
    }
    whole = t.generate(prompts, **options)
    parts = list(t.generator.stream(t.params, *prompts, every=every, **options))
    assert [part.result is not None for part in parts] == [False] * (len(parts) - 1) + [True]
    for found, expected in zip(jax.tree.leaves(parts[-1].result), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(found, expected)
    joined = [[token for part in parts for token in part.tokens[row]] for row in range(3)]
    assert joined == whole.answers()
    if every == 5:
        assert len(parts) > 1


def test_nothing_is_recompiled_inside_a_bucket_and_streaming_shares_the_program() -> None:
    t = Tiny()
    prefills, decodes = t.generator._prefill._cache_size, t.generator._decode._cache_size
    t.generate(t.prompts([5, 17], 24), max_new_tokens=30)
    assert (prefills(), decodes()) == (1, 1)
    t.generate(t.prompts([1, 24], 24, seed=1), max_new_tokens=[17, 32])
    t.generate(t.prompts([9, 9], 24), max_new_tokens=20, settings=sampling_settings(2, 0.9, 7, 0.8, seed=4))
    t.generate(t.prompts([9, 9], 24), max_new_tokens=20, force=[[1, 2, 3], [4]])
    list(t.generator.stream(t.params, *t.prompts([2, 3], 24), max_new_tokens=25, every=4))
    assert (prefills(), decodes()) == (1, 1)
    # A somewhat wider prompt has a prefill of its own, but the same cache and so the same loop.
    t.generate(t.prompts([9, 28], 28), max_new_tokens=32)
    assert (prefills(), decodes()) == (2, 1)
    t.generate(t.prompts([9, 9], 24), max_new_tokens=33)
    assert (prefills(), decodes()) == (3, 2)


def test_the_loops_state_is_donated_and_all_of_it_is_used() -> None:
    t = tiny()
    seen = []
    inner = t.generator._decode

    def watched(params, state, *rest):
        seen.append(state)
        return inner(params, state, *rest)

    t.generator._decode = watched
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            t.generate(t.prompts([5, 6], 24), max_new_tokens=4)
    finally:
        t.generator._decode = inner
    assert seen[0].cache.keys.is_deleted() and seen[0].result.hidden.is_deleted()


def test_every_row_stops_at_its_own_budget_and_a_padding_row_writes_nothing() -> None:
    t = tiny()
    lengths = [5, 6, 7, 0]
    full = t.generate(t.prompts(lengths, 24), max_new_tokens=[16, 16, 16, 0])
    short = t.generate(t.prompts(lengths, 24), max_new_tokens=[3, 16, 1, 0])
    assert full.lengths[0] > 3 and full.lengths[2] > 1
    assert short.answers() == [full.answers()[0][:3], full.answers()[1], full.answers()[2][:1], []]
    assert short.finish[0] == short.finish[2] == short.finish[3] == BUDGET_USED
    assert np.isfinite(np.asarray(short.hidden)).all()


def test_the_loop_ends_with_the_last_row() -> None:
    t = tiny()
    part = next(t.generator.stream(t.params, *t.prompts([5], 24), max_new_tokens=16, force=[7, END[0]], every=16))
    assert part.tokens == [[7]] and part.result is not None
    assert part.result.finish[0] == ENDED != RUNNING
    assert np.asarray(part.result.tokens)[0].tolist() == [7, END[0], *[0] * 14]
    assert (np.asarray(part.result.log_probabilities)[0, :2] < 0).all()


@functools.cache
def tracing(style: str) -> Tiny:
    vocabulary = vocabulary_of(style)
    config = LanguageConfig(
        **{
            **dataclasses.asdict(TINY),
            "vocab_size": vocabulary.first_added + 9,
            "added_tokens": len(vocabulary.added_strings),
            "first_added": vocabulary.first_added,
        }
    )
    return Tiny(config, answer_grammar(vocabulary, max_points=4))


@pytest.mark.parametrize("style", ["bins", "digits"])
def test_forced_beginnings_and_all_that_follows_parse(style: str) -> None:
    t, vocabulary = tracing(style), vocabulary_of(style)
    box = vocabulary.special("<|box_start|>")
    beginnings = [[vocabulary.traj_open], [box], [vocabulary.seg], [], [*vocabulary.encode("at "), box]] * 8
    budgets = [31, 32, 20, 8, 30] * 8
    result = t.generate(
        t.prompts([4 + row % 9 for row in range(40)], 16),
        max_new_tokens=budgets,
        settings=sampling_settings(40, temperature=1.5),
        force=beginnings,
    )
    kinds = []
    for answer, beginning, budget in zip(result.answers(), beginnings, budgets, strict=True):
        assert answer[: len(beginning)] == beginning and len(answer) <= budget
        kinds += structures(vocabulary, answer, max_points=4)[:1]
    assert {"<traj>", "<|box_start|>", "[SEG]"} <= set(kinds)


def test_between_forced_tokens_the_model_closes_what_they_opened() -> None:
    t, vocabulary = tracing("bins"), vocabulary_of("bins")
    end, opened = vocabulary.special("<|im_end|>"), [*vocabulary.marked("a ring"), vocabulary.traj_open]
    outline = [*opened, GAP, *opened, GAP, end]
    lengths = [4, 9, 6]
    result = t.generate(t.prompts(lengths, 16), max_new_tokens=40, force=[outline, [], outline])
    alone = t.generate(t.prompts(lengths, 16), max_new_tokens=40)
    assert result.answers()[1] == alone.answers()[1], "other rows are free"
    for row in (0, 2):
        answer = result.answers()[row]
        stretches = "".join(f"<{token}>" for token in answer)
        points = rf"((?!<{vocabulary.traj_close}>)<\d+>)+<{vocabulary.traj_close}>"
        part = "".join(f"<{token}>" for token in opened)
        assert re.fullmatch(f"{part}{points}{part}{points}", stretches)
        assert result.finish[row] == ENDED and int(result.tokens[row, len(answer)]) == end
        assert structures(vocabulary, answer, max_points=4).count("<traj>") == 2


def test_forced_tokens_that_the_budget_has_no_room_for_are_left_out() -> None:
    t, vocabulary = tracing("bins"), vocabulary_of("bins")
    opened = [*vocabulary.marked("a ring"), vocabulary.traj_open]
    budget = 2 * len(opened) + 5  # room for both, if the first were closed at once
    result = t.generate(t.prompts([4], 16), max_new_tokens=budget, force=[*opened, GAP, *opened])
    (answer,) = result.answers()
    assert answer[: len(opened)] == opened and len(answer) <= budget
    assert structures(vocabulary, answer, max_points=4).count("<traj>") == 1, "what was opened is closed"


def test_the_slots_of_a_mask_have_hidden_states_even_at_the_very_end_of_the_budget() -> None:
    t, vocabulary = tracing("bins"), vocabulary_of("bins")
    result = t.generate(t.prompts([4], 16), max_new_tokens=7, force=[vocabulary.seg])
    assert result.answers()[0] == [vocabulary.seg, *vocabulary.slots]
    states = np.asarray(result.hidden)[0, 1:7]
    assert (np.linalg.norm(states, axis=-1) > 1e-3).all()
    assert len(np.unique(states.round(5), axis=0)) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 5000}, "at most 2048"),
        ({"max_new_tokens": 8, "force": [[1], [2], [3]]}, "3 forced beginnings for 2 rows"),
        ({"max_new_tokens": [8, 2], "force": [1, 2, 3]}, "at most 2 tokens cannot begin"),
        ({"max_new_tokens": 8, "force": [151]}, "not in the vocabulary"),
        ({"max_new_tokens": 8, "force": [1, GAP, 151]}, "not in the vocabulary"),
        ({"max_new_tokens": 4, "force": [1, GAP, 1, 2, 3]}, "at most 2 tokens cannot begin"),
    ],
)
def test_what_cannot_be_generated_is_refused(options: dict, message: str) -> None:
    t = tiny()
    with pytest.raises(UserError, match=message):
        t.generate(t.prompts([5, 6], 24), **options)


def test_parts_without_steps_are_refused() -> None:
    t = tiny()
    with pytest.raises(UserError, match="at least one step"):
        next(t.generator.stream(t.params, *t.prompts([5], 24), max_new_tokens=8, every=0))


def test_bfloat16_answers_are_those_of_its_own_uncached_forward() -> None:
    t = Tiny(dataclasses.replace(TINY, dtype="bfloat16"), params=tiny().params)
    embeddings, positions, lengths = t.prompts([9], 12)
    result = t.generate((embeddings, positions, lengths), max_new_tokens=12)
    assert np.asarray(result.hidden).dtype == jnp.bfloat16
    answer = jnp.asarray(result.tokens)[:, : int(result.lengths[0])]
    variables = {"params": t.params}
    whole = jnp.concatenate(
        [embeddings[:, :9], t.model.apply(variables, answer, method="embed").astype(jnp.float32)], axis=1
    )
    places, segments = jnp.asarray(text_positions(*whole.shape[:2])), jnp.ones(whole.shape[:2], jnp.int32)
    hidden, _ = t.model.apply(variables, whole, places, segments)
    logits = np.asarray(t.model.apply(variables, hidden, method="logits"))[0, 8:-1]
    # Sums of bfloat16 products are grouped differently with a cache, so a near tie may go either way.
    chosen = np.take_along_axis(logits, np.asarray(answer)[0][:, None], axis=-1)[:, 0]
    assert answer.shape[1] > 5
    assert (logits.max(-1) - chosen < 0.03 * logits.std()).all()


def test_a_grammar_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="149 tokens, the model 150"):
        Generator(tiny().model, text_grammar(149, [1]))


def test_rows_split_over_devices_give_the_answers_of_one_device() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, generation_on_mesh.__file__],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    split, whole = json.loads(done.stdout), generation_on_mesh.generate(1, 1)
    assert split["answers"] == whole["answers"]
    np.testing.assert_allclose(split["log_probabilities"], whole["log_probabilities"], atol=1e-5)
    assert split["cache_rows_on_a_device"] == 2, "rows are split over data"
    assert split["cache_heads_on_a_device"] == 1, "heads are split over tensor"
    assert split["programs"] == [1, 1], "streaming under a mesh compiles once"
