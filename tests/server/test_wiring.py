"""A bundle whose graphs cannot answer its methods is refused at load, not at the first request."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import write_diffusion, write_echo, write_gan, write_vae
from google.protobuf.json_format import Parse
from latentd.names import BUNDLE_FILE
from latentd.v1 import bundle_pb2
from latentd_server import wiring

Bundle = bundle_pb2.Bundle
Source = bundle_pb2.NetworkInput
Meaning = bundle_pb2.NetworkOutput


def network(bundle: Bundle, file: str) -> bundle_pb2.Network:
    return next(entry for entry in bundle.networks if entry.file == file)


def without_scorer(bundle: Bundle) -> None:
    del bundle.networks[2]


def meaningless_decoder(bundle: Bundle) -> None:
    network(bundle, "decoder.onnx").outputs[0].meaning = Meaning.MEANING_PREDICTION


def encoder_without_latents(bundle: Bundle) -> None:
    network(bundle, "encoder.onnx").outputs[0].meaning = Meaning.MEANING_SAMPLE


def scorer_fed_latents(bundle: Bundle) -> None:
    network(bundle, "scorer.onnx").inputs[1].source = Source.SOURCE_LATENT


def half_a_range(bundle: Bundle) -> None:
    bundle.model.latent_spec.max_value = 0.5


def source_of_a_later_version(bundle: Bundle) -> None:
    network(bundle, "decoder.onnx").inputs[0].source = 99  # type: ignore[assignment]


def timeless_denoiser(bundle: Bundle) -> None:
    del bundle.networks[0].inputs[1]


def unknown_sampler(bundle: Bundle) -> None:
    bundle.model.diffusion.samplers.append("plms")


def no_sampler(bundle: Bundle) -> None:
    del bundle.model.diffusion.samplers[:]


def too_many_default_steps(bundle: Bundle) -> None:
    bundle.model.diffusion.default_step_count = 101


CASES: list[tuple[Callable[..., Path], Callable[[Bundle], None], str]] = [
    (write_vae, without_scorer, "Score needs a graph with ROLE_SCORER"),
    (write_vae, meaningless_decoder, "decoder.onnx: needs an output meaning MEANING_SAMPLE"),
    (write_vae, encoder_without_latents, "MEANING_LATENT_MEAN or MEANING_LATENT_PROBABILITY"),
    (write_vae, scorer_fed_latents, "scorer.onnx: takes an input from SOURCE_LATENT"),
    (write_vae, half_a_range, "latent_spec must have no range (a normal prior) or that of 0 to 1"),
    (write_vae, source_of_a_later_version, "takes an input from 99"),
    (write_diffusion, timeless_denoiser, "needs an input from SOURCE_TIMESTEP"),
    (write_diffusion, unknown_sampler, "samplers must name some of ddim"),
    (write_diffusion, no_sampler, "samplers must name some of ddim"),
    (write_diffusion, too_many_default_steps, "from 0 to 100"),
]


def read(directory: Path) -> Bundle:
    return Parse((directory / BUNDLE_FILE).read_text(), Bundle())


@pytest.mark.parametrize(("write", "spoil", "part"), CASES, ids=[case[1].__name__ for case in CASES])
def test_what_cannot_be_wired_is_named(write: Any, spoil: Any, part: str, tmp_path: Path) -> None:
    """The problem names the graph, or the field, and what it needs."""
    bundle = read(write(tmp_path))
    spoil(bundle)
    found = wiring.problems(bundle)
    assert any(part in problem for problem in found), found


@pytest.mark.parametrize("write", [write_vae, write_gan, write_diffusion, write_echo])
def test_a_whole_bundle_has_no_problems(write: Any, tmp_path: Path) -> None:
    """What the other tests serve is in order."""
    assert wiring.problems(read(write(tmp_path))) == []
