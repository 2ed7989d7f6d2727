"""How the settings of a search are compared with those of its study."""

import pytest

from tuner.sweep import settings


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a=2 (was 1)"]),
        ({"a": 1}, {}, ["a=not set (was 1)"]),
        ({}, {"a": [1]}, ["a=[1] (was not set)"]),
        ({}, {"data.range": None}, []),  # a key that a later version has added, and nobody uses
        ({"data.range": None}, {}, []),
        ({"data.range": None}, {"data.range": 255}, ["data.range=255 (was null)"]),
    ],
)
def test_differences(before, now, said):
    assert settings.differences(before, now) == said


def test_images_are_of_the_same_config_if_a_key_that_is_null_is_new():
    data = {"_target_": "x", "root": "photos"}
    assert settings.images_key(data, []) == settings.images_key(data | {"range": None}, [])
    assert settings.images_key(data, []) != settings.images_key(data | {"range": 255}, [])
    assert settings.images_key(data, []) == settings.images_key(data | {"range": 255}, ["data.range"])
