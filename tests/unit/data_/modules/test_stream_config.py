"""Data modules take the fields of `StreamConfig` as arguments of their own: flat, typed, documented, no others."""

import dataclasses

import docstring_parser
import pytest
from jsonargparse import ArgumentParser

from data.modules.latents import LatentDataModule
from data.modules.online import EncodingDataModule
from data.modules.stream_config import StreamConfig
from data.modules.videos import VideoDataModule

FIELDS = {field.name: field for field in dataclasses.fields(StreamConfig)}
#: Module -> its arguments that are not those of `StreamConfig`, and those that are required.
MODULES = {
    LatentDataModule: ({"sample_latents"}, []),
    VideoDataModule: ({"frames", "height", "width", "deadline"}, []),
    EncodingDataModule: (
        {"base", "sample_latents", "dtype", "text_dtype", "max_text_tokens", "tiling", "deadline"},
        ["--data.base", "b"],
    ),
}


def parser(module: type) -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(module, "data")
    return made


@pytest.mark.parametrize("module", MODULES)
def test_every_field_is_an_argument_with_its_default_and_its_documentation(module):
    own, required = MODULES[module]
    made = parser(module)
    config = made.parse_args(["--data.shards", "a", *required]).data
    assert set(vars(config)) == FIELDS.keys() | own
    changed = {"val_batch_size": 8} if module is VideoDataModule else {}
    for name, field in FIELDS.items():
        if name != "shards":
            assert config[name] == changed.get(name, field.default), name
    shown = " ".join(made.format_help().split())
    for param in docstring_parser.parse(StreamConfig.__doc__ or "").params:
        if param.arg_name not in changed:
            assert " ".join(str(param.description).split()) in shown, param.arg_name


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    "wrong", [["--data.batch_sise", "3"], ["--data.batch_size", "three"], ["--data.passes", "1.5"]]
)
def test_unknown_arguments_and_other_types_are_refused(module, wrong):
    with pytest.raises(Exception, match=wrong[0].removeprefix("--")):
        parser(module).parse_args(["--data.shards", "a", *MODULES[module][1], *wrong])
