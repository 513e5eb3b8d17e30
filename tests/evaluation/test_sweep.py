"""The sweep: full batches, records as answers come, resumption, refusal of what does not belong, tables."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from rich.console import Console

from evaluation.sweep import Sweep
from evaluation.tables import as_json, markdown
from evaluation.task import Prompt, Table, another, without_words
from tests.evaluation.stub_engine import StubEngine
from tests.inference import tiny
from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import BadRecord, Conversation, Sample, TimedWord, TracePart, Turn

WORDS = ["star", "circle", "square", "red", "blue", "green"]


@dataclass(frozen=True)
class Numbered:
    """Samples 0 to n - 1, of which some cannot be read."""

    count: int
    bad: tuple[int, ...] = ()
    version: str = "1"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Sample:
        if index in self.bad:
            raise BadRecord("the picture is gone", "a.jpg", str(index))
        frames = np.full((1, 16, 16, 3), 20 * index % 256, np.uint8)
        return Sample(str(index), "numbered", frames, caption=WORDS[index % len(WORDS)])

    def fingerprint(self) -> str:
        return f"{self.count} {self.version}"


@dataclass(frozen=True)
class Naming:
    """Ask for a sample's caption; two prompts for every third sample, none for every fifth."""

    question: str = "name it"
    name = "naming"

    def budget(self, processor) -> int:
        return 16

    def prompts(self, samples, index: int) -> list[Prompt]:
        sample = samples[index]
        if index % 5 == 4:
            return []
        asked = Conversation("trace_qa", (Turn("user", (f"{self.question} {sample.caption}",)),))
        twice = 2 if index % 3 == 0 else 1
        return [Prompt(f"{index}.{k}", sample, asked, {"truth": sample.caption}) for k in range(twice)]

    def record(self, prompt, answer, processor):
        assert answer.size == (16, 16)
        return {"right": answer.text == prompt.truth["truth"]}

    def tables(self, records):
        right = sum(record["right"] for record in records)
        return [Table("Names", {"right": right / len(records), "asked": float(len(records))})]


def last_word(text: str, force: list[int]) -> list[int]:
    """Answer with the caption, which is the last word of the question."""
    return tiny.vocabulary().encode(text.split("<|im_end|>")[-2].split()[-1])


def sweep_of(folder, engine=None, **changes) -> Sweep:
    settings = {"model": "m", "rows": 4, "console": Console(quiet=True)} | changes
    return Sweep(engine or StubEngine(last_word), tiny.processor(), folder, **settings)


def lines_of(folder) -> list[str]:
    return (folder / "naming.jsonl").read_text().splitlines()


def test_every_prompt_is_asked_once_in_full_batches(tmp_path):
    engine = StubEngine(last_word)
    outcome = sweep_of(tmp_path, engine).run("naming", Naming(), Numbered(20))
    ids = [record["id"] for record in outcome.records]
    expected = [f"{i}.{k}" for i in range(20) if i % 5 != 4 for k in range(2 if i % 3 == 0 else 1)]
    assert sorted(ids) == sorted(expected) and len(set(ids)) == len(ids)
    assert all(record["right"] for record in outcome.records)
    assert engine.calls == [4] * (len(expected) // 4) + [len(expected) % 4][: len(expected) % 4]
    assert outcome.tables[0].values == {"right": 1.0, "asked": float(len(expected))}
    written = [json.loads(line) for line in lines_of(tmp_path)]
    assert list(written[0]) == ["fingerprint"] and written[1:] == outcome.records
    assert {"id", "sample", "control", "truth", "right", "text", "finished", "log_probability"} <= set(written[1])


def test_a_sweep_that_was_cut_short_asks_only_what_is_left(tmp_path):
    class Dying(StubEngine):
        def generate(self, pieces, **settings):
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().generate(pieces, **settings)

    with pytest.raises(KeyboardInterrupt):
        sweep_of(tmp_path, Dying(last_word)).run("naming", Naming(), Numbered(20))
    kept = lines_of(tmp_path)
    assert len(kept) == 1 + 3 * 4
    # A crash in the midst of a line, too.
    with (tmp_path / "naming.jsonl").open("a") as file:
        file.write(kept[-1][:17])
    engine = StubEngine(last_word)
    outcome = sweep_of(tmp_path, engine).run("naming", Naming(), Numbered(20))
    whole = sweep_of(tmp_path / "whole").run("naming", Naming(), Numbered(20))
    assert sum(engine.calls) == len(whole.records) - 12
    assert lines_of(tmp_path)[: len(kept)] == kept
    order = lambda records: sorted(records, key=lambda record: record["id"])  # noqa: E731
    assert order(outcome.records) == order(whole.records) and outcome.tables == whole.tables
    again = StubEngine(last_word)
    assert sweep_of(tmp_path, again).run("naming", Naming(), Numbered(20)).tables == whole.tables
    assert again.calls == []


def test_a_larger_limit_goes_on_and_a_smaller_one_counts_less(tmp_path):
    assert sweep_of(tmp_path).run("naming", Naming(), Numbered(20), limit=4).tables[0].values["asked"] == 6.0
    engine = StubEngine(last_word)
    assert sweep_of(tmp_path, engine).run("naming", Naming(), Numbered(20), limit=7).tables[0].values["asked"] == 9.0
    assert sum(engine.calls) == 3
    assert sweep_of(tmp_path).run("naming", Naming(), Numbered(20), limit=2).tables[0].values["asked"] == 3.0


@pytest.mark.parametrize(
    ("changes", "task", "samples", "differing"),
    [
        ({"model": "another"}, Naming(), Numbered(20), "model"),
        ({}, Naming("what is it"), Numbered(20), "task"),
        ({}, Naming(), Numbered(20, version="2"), "data"),
    ],
)
def test_results_of_something_else_are_not_mixed_in(changes, task, samples, differing, tmp_path):
    sweep_of(tmp_path).run("naming", Naming(), Numbered(20), limit=3)
    before = lines_of(tmp_path)
    with pytest.raises(UserError, match=rf"something else \({differing} differ\)"):
        sweep_of(tmp_path, **changes).run("naming", task, samples, limit=3)
    assert lines_of(tmp_path) == before


@pytest.mark.parametrize("damage", ["not json\n", "3\n", '{"no": "id"}\n'])
def test_a_damaged_file_is_refused(damage, tmp_path):
    sweep_of(tmp_path).run("naming", Naming(), Numbered(20), limit=3)
    with (tmp_path / "naming.jsonl").open("a") as file:
        file.write(damage)
    with pytest.raises(UserError, match="is damaged"):
        sweep_of(tmp_path).run("naming", Naming(), Numbered(20), limit=3)


def test_a_record_that_stands_twice_is_refused(tmp_path):
    sweep_of(tmp_path).run("naming", Naming(), Numbered(20), limit=3)
    last = lines_of(tmp_path)[-1]
    with (tmp_path / "naming.jsonl").open("a") as file:
        file.write(last + "\n")
    with pytest.raises(UserError, match="twice"):
        sweep_of(tmp_path).run("naming", Naming(), Numbered(20), limit=3)


def test_bad_samples_are_left_out_counted_and_told(tmp_path):
    console = Console(record=True, quiet=False, file=(tmp_path / "log").open("w"), width=120)
    sweep = sweep_of(tmp_path, console=console)
    outcome = sweep.run("naming", Naming(), Numbered(10, bad=(0, 3)))
    assert outcome.skipped == {"the picture is gone": 2}
    assert not any(record["sample"] in ("0", "3") for record in outcome.records)
    assert "naming: 2 samples left out: the picture is gone" in console.export_text()


def test_another_sample_is_found_round_the_end_and_past_bad_ones():
    samples = Numbered(5, bad=(0,))
    assert another(samples, 4, lambda sample: True).id == "1"
    assert another(samples, 1, lambda sample: sample.id == "3").id == "3"
    assert another(samples, 1, lambda sample: False) is None
    assert another(Numbered(1), 0, lambda sample: True) is None


def test_blind_traces_lose_their_words_and_nothing_else():
    trace = TracePart(np.zeros((2, 3)), (TimedWord("a", 0.0, 1.0),))
    asked = Conversation("trace_qa", (Turn("user", ("x", trace)), Turn("assistant", ("y",))))
    blind = without_words(asked)
    assert blind.turns[0].parts[1].words == () and blind.turns[0].parts[1].points is trace.points
    assert (blind.turns[0].parts[0], blind.turns[1]) == ("x", asked.turns[1])


def test_tables_say_why_a_number_is_missing():
    table = Table(
        "Captions", {"BLEU-1": 0.51234, "SPICE": None, "METEOR": None}, {"SPICE": "no Java", "METEOR": "no Java"}
    )
    text = markdown({"ln_coco": [table], "empty": []}, "checkpoint x")
    assert "| BLEU-1 | 0.5123 |" in text and "| SPICE | - |" in text
    assert "SPICE, METEOR: not computed; no Java." in text and "No sample served this benchmark." in text
    assert (
        json.loads(json.dumps(as_json({"ln_coco": [table]}), allow_nan=False))["ln_coco"][0]["values"]["SPICE"] is None
    )
