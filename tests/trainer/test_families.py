"""What every family has in common: settings, sizes, steps, samples and graphs that export."""

import contextlib
import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from latentd_trainer import bundle as bundles
from latentd_trainer.checkpoint import RunRecord, build_family
from latentd_trainer.data import DataInfo
from latentd_trainer.export import write_bundle
from latentd_trainer.families import FAMILIES, Batch, Family, Moment, load_family, parse_settings
from latentd_trainer.pyramid import halvings
from latentd_trainer.shard import Shard
from torch import nn

TINY = {
    "vae": {"width": 8, "hidden": 16, "latent": 3},
    "gan": {"width": 8, "hidden": 16, "latent": 5, "inversion": 1.0},
    "vae_gan": {"width": 8, "hidden": 16, "latent": 3, "discriminator_steps": 0},
    "infogan": {"width": 8, "hidden": 16, "codes": 3, "noise": 5},
    "diffusion": {"width": 8, "timestep_count": 20},
    "helmholtz": {"lower": 6, "upper": 4, "draws": 3},
    "sigmoid_belief_net": {"lower": 5, "upper": 3, "sweeps": 1, "served_sweeps": 2},
    "predictability_minimization": {"units": 4, "hidden": 16, "predictor_hidden": 4},
    "naive_bayes": {"variance_floor": 0.01},
}
CONVOLUTIONAL = ("vae", "gan", "infogan", "vae_gan", "diffusion")
GAMES = ("gan", "infogan", "vae_gan")
FOLLOW_GRADIENTS = [name for name in FAMILIES if name != "naive_bayes"]


def info_of(shape: tuple[int, int, int], levels: int = 256) -> DataInfo:
    """Data of this shape with three classes."""
    return DataInfo("tiny", shape, levels, ("a", "b", "c"), (0.5, 0.25, 0.25), "0" * 64)


def tiny(name: str, shape: tuple[int, int, int] = (1, 8, 8), **settings: object) -> Family:
    """A tiny model of a family with fresh weights."""
    return build_family(name, TINY[name] | settings, info_of(shape), seed=0)


def one_step(family: Family, step: int = 0) -> dict[str, torch.Tensor]:
    """Losses of a step on random images, from a generator seeded by the step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand((6, *family.info.shape), generator=generator).mul(255).round() / 127.5 - 1
    labels = torch.randint(0, 3, (6,), generator=generator)
    return family.step(Batch(images, labels), Moment(step, 50, generator, Shard(), contextlib.nullcontext))


@pytest.mark.parametrize("name", FOLLOW_GRADIENTS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 10, 12), (1, 28, 28), (3, 32, 32)])
def test_a_step_and_samples_at_every_size(name: str, shape: tuple[int, int, int]) -> None:
    """Sizes that halve to 4 to 7 pixels train with finite losses, and samples have the data's shape and range."""
    family = tiny(name, shape)
    losses = one_step(family)
    assert all(torch.isfinite(value) and value.shape == () for value in losses.values())
    assert not any(value.requires_grad for value in losses.values())
    samples = family.sample(torch.tensor([0, 1, 2, 0]), seed=1)
    assert samples.shape == (4, *shape)
    assert samples.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_samples_follow_their_seed_and_label(name: str) -> None:
    """Equal seeds give equal samples; another seed or label gives others."""
    family = tiny(name)
    for module in (module for average in family.averages.values() for module in average.module.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.2)  # past the layers that start as zero
    labels = torch.tensor([0, 1, 2])
    first = family.sample(labels, seed=1)
    assert torch.equal(family.sample(labels, seed=1), first)
    assert not torch.equal(family.sample(labels, seed=2), first)
    assert not torch.equal(family.sample(labels.flip(0), seed=1)[0], first[0])


@pytest.mark.parametrize("name", FOLLOW_GRADIENTS)
def test_a_step_changes_every_network_and_average(name: str) -> None:
    """After three steps no trained tensor is where it was, and the averages have moved after them."""
    family = tiny(name, **({"width": 16} if name in CONVOLUTIONAL else {}))
    before = {key: module_state(module) for key, module in family.modules.items()}
    averages = {key: module_state(average.module) for key, average in family.averages.items()}
    for step in range(3):  # layers after one that starts as zero get a gradient from the second step on
        one_step(family, step)
    for key, module in family.modules.items():
        assert not [entry for entry, value in module_state(module).items() if torch.equal(value, before[key][entry])]
    for key, average in family.averages.items():
        moved = module_state(average.module)
        assert not [entry for entry, value in moved.items() if torch.equal(value, averages[key][entry])]
        assert not average.module.training


def module_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a module's parameters."""
    return {key: value.detach().clone() for key, value in module.named_parameters()}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_loss_falls_or_the_game_goes_on(name: str) -> None:
    """Thirty steps on one batch lower the loss; the discriminator of a game gets ahead of chance, 2 ln 2."""
    family = tiny(name, learning_rate=2e-3, **({} if name in GAMES else {"warm_up_steps": 0}))
    first = one_step(family)
    for _ in range(30):
        last = one_step(family)
    key = "discriminator" if name in GAMES else "loss"
    assert last[key] < 0.97 * first[key]


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_of_an_awkward_size_export_with_equal_bytes_in_every_batch(name: str, tmp_path: Path) -> None:
    """Colour images of 10 x 12, no multiple of a vector's width: parity with torch holds and rows keep their bytes."""
    family = tiny(name, (3, 10, 12))
    generator = torch.Generator().manual_seed(0)
    for module in (graph.module for graph in family.serving_spec().graphs):
        for parameter in module.parameters():  # away from layers that start as zero
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    record = RunRecord(name, dataclasses.asdict(family.config), "tiny", family.info, 0, "fp32", 1, 1, {})
    written = write_bundle(
        family.serving_spec(), record, datetime(2026, 1, 2, tzinfo=UTC), models=tmp_path, name="tiny"
    )
    proofs = bundles.read_record(written)["export"]["parity"]
    assert {role: proof["row_invariant"] for role, proof in proofs.items()} == dict.fromkeys(proofs, True)


@pytest.mark.parametrize(
    ("shape", "count"), [((1, 8, 8), 1), ((1, 28, 28), 2), ((3, 32, 32), 3), ((3, 64, 48), 3), ((1, 10, 12), 1)]
)
def test_networks_halve_down_to_small_maps(shape: tuple[int, int, int], count: int) -> None:
    """Images are halved until their shorter side is 4 to 7 or odd."""
    assert halvings(shape) == count


@pytest.mark.parametrize("shape", [(1, 9, 8), (1, 6, 6), (1, 4, 4), (1, 8, 64), (3, 34, 34), (1, 250, 250)])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_sizes_that_no_network_takes_are_refused(name: str, shape: tuple[int, int, int]) -> None:
    """Odd, tiny and badly divisible sizes are refused with the sizes that are allowed."""
    with pytest.raises(ValueError, match=f"images of {shape[1]} x {shape[2]}: both sides must be at least 8 and even"):
        tiny(name, shape)


def test_settings_parse_by_their_type() -> None:
    """Texts become the type of the default they replace; what is not given keeps its default."""
    config = parse_settings(load_family("gan").config_type, {"steps": "30", "learning_rate": "1e-3", "loss": "hinge"})
    assert (config.steps, config.learning_rate, config.loss, config.latent) == (30, 1e-3, "hinge", 32)


def test_every_wrong_setting_is_named() -> None:
    """Unknown names and texts of the wrong type are all in one error."""
    with pytest.raises(ValueError, match=r"unknown setting 'wings': must be one of .*; steps='many': must be int"):
        parse_settings(load_family("vae").config_type, {"wings": "2", "steps": "many"})


def test_an_unknown_family_is_told_which_there_are() -> None:
    """The error lists the families."""
    with pytest.raises(
        ValueError, match=r"unknown family 'flow': must be one of naive_bayes, .*, vae, gan, .*, diffusion"
    ):
        load_family("flow")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_setting_says_what_it_is(name: str) -> None:
    """`latentd-train settings` has a sentence for each setting, and the ones every family has are there."""
    fields = {entry.name: entry for entry in dataclasses.fields(load_family(name).config_type)}
    assert all(entry.metadata["help"] for entry in fields.values())
    assert {"steps", "batch_size"} <= set(fields)
