"""Configurations as JSON and back."""

import copy
import dataclasses
import json

import pytest

from tests.inference import tiny
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.qwen25vl import preset
from tracevision_jax.systems.config_json import from_json, to_json
from tracevision_jax.systems.tracevision import TraceVisionConfig, tracevision_config


@pytest.fixture
def content() -> dict:
    return copy.deepcopy(to_json(tiny.system().config))


@pytest.mark.parametrize("size", ["3b", "7b", "72b"])
def test_every_size_survives_the_round_trip(size):
    config = tracevision_config(preset(size), 151665, processor={"coordinates": "digits"})
    assert from_json(TraceVisionConfig, json.loads(json.dumps(to_json(config)))) == config


def test_all_mistakes_are_named_at_once(content):
    content["tvp"]["blokcs"] = content["tvp"].pop("blocks")
    content["host"]["language"]["layers"] = "two"
    content["feature_groups"] = [1]
    content["decoder"]["grid"] = True
    content["processor"]["coordinates"] = "polar"
    del content["processor"]["vision"]["patch"]
    with pytest.raises(UserError) as caught:
        from_json(TraceVisionConfig, content, "config.json")
    lines = str(caught.value).splitlines()
    assert lines[0] == "config.json does not fit TraceVisionConfig:"
    assert sorted(line.strip() for line in lines[1:]) == [
        "decoder.grid: is True, must be a int",
        "feature_groups: has 1 entries, must have 2",
        "host.language.layers: is 'two', must be a int",
        "processor.coordinates: is 'polar', must be 'bins' or 'digits'",
        "processor.vision.patch: is missing",
        "tvp.blocks: is missing",
        "tvp.blokcs: is no field of TVPConfig. Did you mean 'blocks'?",
    ]


def test_values_that_cannot_be_together_are_the_users_mistake(content):
    content["tvp"]["width"] = 40
    with pytest.raises(UserError, match="impossible model: The TVP has width 40"):
        from_json(TraceVisionConfig, content)


@pytest.mark.parametrize("value", [None, 3, [], "x"])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(UserError, match="must be an object of TraceVisionConfig's fields"):
        from_json(TraceVisionConfig, value)


def test_another_class_is_refused(content):
    content["tvp"][""] = "LanguageConfig"
    with pytest.raises(UserError, match="tvp: is a LanguageConfig, must be a TVPConfig"):
        from_json(TraceVisionConfig, content)


def test_whole_numbers_serve_for_floats_and_what_json_cannot_hold_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Small:
        rate: float = 0.5

    assert from_json(Small, {"rate": 2}) == Small(2.0)
    with pytest.raises(TypeError):
        to_json(Small(object()))
