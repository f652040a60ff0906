"""Larger networks by settings: what they hold, that they train and export, and which settings are refused."""

import contextlib
import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from latentd_trainer import bundle as bundles
from latentd_trainer import cli
from latentd_trainer.checkpoint import RunRecord, build_family, read_record
from latentd_trainer.data import DataInfo
from latentd_trainer.export import write_bundle
from latentd_trainer.families import Batch, Moment, load_family, preset_settings
from latentd_trainer.families.augmentation import mirrored
from latentd_trainer.families.sizes import PyramidSettings
from latentd_trainer.nets import Attention
from latentd_trainer.shard import Shard
from latentd_trainer.unet import UNet
from typer.testing import CliRunner

COLOUR = (3, 32, 32)
SHAPES = {"28x28": (1, 28, 28), "32x32": COLOUR, "32x32-large": COLOUR}
MILLIONS = {
    "vae": {"28x28": 4.5, "32x32": 11.1, "32x32-large": 35.6},
    "gan": {"28x28": 6.8, "32x32": 16.5, "32x32-large": 53.1},
    "diffusion": {"28x28": 4.6, "32x32": 6.8, "32x32-large": 35.4},
}
NARROW = {"width": 8, "attention_heads": 2, "timestep_count": 20, "hidden": 16, "latent": 4, "warm_up_steps": 0}


def info_of(shape: tuple[int, int, int]) -> DataInfo:
    """Data of this shape with ten classes."""
    return DataInfo("tiny", shape, 17, tuple("abcdefghij"), (0.1,) * 10, "0" * 64)


@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("name", MILLIONS)
def test_presets_have_the_size_they_claim(name: str, preset: str) -> None:
    """Each of the main families has every preset; its networks take the images it is named after and have attention."""
    kind = load_family(name)
    assert kind.presets.keys() == SHAPES.keys()
    with torch.device("meta"):
        family = kind(kind.config_type(**kind.presets[preset]), info_of(SHAPES[preset]))
    modules = family.modules.values()
    parameters = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert round(parameters / 1e6, 1) == MILLIONS[name][preset]
    assert all(any(isinstance(part, Attention) for part in module.modules()) for module in modules)


@pytest.mark.parametrize("name", MILLIONS)
def test_the_large_preset_trains_and_exports_when_it_is_narrow(name: str, tmp_path: Path) -> None:
    """The large preset's levels, blocks and attention at 8 channels: steps change the weights, and the graphs equal
    torch and keep every row's bytes in every batch.
    """
    kind = load_family(name)
    known = {entry.name for entry in dataclasses.fields(kind.config_type)}
    settings = {**kind.presets["32x32-large"], **{key: value for key, value in NARROW.items() if key in known}}
    family = build_family(name, settings, info_of(COLOUR), seed=0)
    before = {key: value.clone() for module in family.modules.values() for key, value in module.state_dict().items()}
    for step in range(3):  # what comes before two layers that start as zero gets a gradient in the third
        generator = torch.Generator().manual_seed(step)
        images = torch.rand((4, *COLOUR), generator=generator).mul(16).round() / 8 - 1
        losses = family.step(
            Batch(images, torch.arange(4)), Moment(step, 50, generator, Shard(), contextlib.nullcontext)
        )
        assert all(torch.isfinite(loss) for loss in losses.values())
    after = {key: value for module in family.modules.values() for key, value in module.state_dict().items()}
    assert any(not torch.equal(before[key], after[key]) for key in after if "query_key_value" in key)
    spec = family.serving_spec()
    generator = torch.Generator().manual_seed(0)
    for parameter in (each for graph in spec.graphs for each in graph.module.parameters()):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)  # away from layers that are zero
    record = RunRecord(name, settings, "tiny", family.info, 0, "fp32", 1, 1, {})
    written = write_bundle(spec, record, datetime(2026, 1, 2, tzinfo=UTC), models=tmp_path, name=f"tiny-{name}")
    proofs = bundles.read_record(written)["export"]["parity"]
    assert all(proof["row_invariant"] for proof in proofs.values()), json.dumps(proofs)


def test_a_preset_is_taken_by_name_and_changed_by_set(tmp_path: Path) -> None:
    """`fit --preset` trains with the preset's values, `--set` goes before them, and the run resumes by either."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(tmp_path / "data.npz", x=images, y=np.arange(40) % 2)
    arguments = ["fit", "gan", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "data.npz"), "--steps", "1"]
    arguments += ["--preset", "28x28", "--set", "width=8", "--set", "multipliers=1,2", "--set", "batch_size=4"]
    for extra in ([], ["--resume"]):
        result = CliRunner().invoke(cli.app, arguments + extra)
        assert result.exit_code == 0, result.output
    settings = read_record(tmp_path / "run").settings
    preset = load_family("gan").presets["28x28"]
    assert (settings["width"], settings["multipliers"]) == (8, "1,2")
    assert {key: settings[key] for key in ("latent", "hidden", "attention_levels")} == {
        key: preset[key] for key in ("latent", "hidden", "attention_levels")
    }


def test_settings_show_a_preset() -> None:
    """`settings --preset` shows the preset's values, and every listing names the presets."""
    result = CliRunner().invoke(cli.app, ["settings", "diffusion", "--preset", "32x32-large"])
    assert result.exit_code == 0
    assert "1,2,2,3" in result.output
    assert "presets: 28x28, 32x32, 32x32-large" in result.output


def test_an_unknown_preset_is_told_which_there_are() -> None:
    """The error lists the presets."""
    with pytest.raises(ValueError, match="unknown preset 'huge': must be one of 28x28, 32x32, 32x32-large"):
        preset_settings(load_family("vae"), "huge")
    with pytest.raises(ValueError, match="unknown preset '28x28': this family has none"):
        preset_settings(load_family("vae_gan"), "28x28")


def test_sizes_that_no_images_allow_are_all_named() -> None:
    """Widths, multipliers, levels, heads and blocks that can never be are refused in one error."""
    with pytest.raises(ValueError, match="width=12") as caught:
        load_family("vae").config_type(
            width=12, multipliers="1,0", blocks=-1, attention_levels="top", attention_heads=5
        )
    for text in ("multipliers='1,0'", "blocks=-1", "attention_levels='top'", "attention_heads=5"):
        assert text in str(caught.value)


def test_sizes_that_these_images_do_not_allow_are_named() -> None:
    """More levels than halvings are refused with how many there are."""
    settings = PyramidSettings(multipliers="1,2,2", attention_levels="2")
    assert settings.pyramid((1, 16, 16)).channels == (32, 64, 64)
    with pytest.raises(ValueError, match="multipliers='1,2,2': at most 2 for images of 8 x 8; attention_lev"):
        settings.pyramid((1, 8, 8))


def test_the_default_denoiser_keeps_its_weights() -> None:
    """The recipe for digits has the very parameters it had before sizes could be set: names and shapes are pinned."""
    network = UNet(PyramidSettings().pyramid((1, 8, 8)), 1000, 10)
    shapes = {key: tuple(value.shape) for key, value in network.named_parameters()}
    assert sum(parameter.numel() for parameter in network.parameters()) == 327_009
    assert shapes["middle.1.film.weight"] == (128, 128)
    assert shapes["up.0.first.2.weight"] == (32, 64, 3, 3)
    assert not [key for key in shapes if key.startswith("attend_")]


def test_mirroring_takes_a_share_and_nothing_else() -> None:
    """Each image is itself or its mirror image, about as many as asked for; without a share nothing is drawn."""
    images = torch.rand((400, 1, 2, 3), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    moment = Moment(0, 1, generator, Shard(), contextlib.nullcontext)
    assert mirrored(images, moment, 0.0) is images
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())
    result = mirrored(images, moment, 0.25)
    same = (result == images).flatten(1).all(1)
    turned = (result == images.flip(3)).flatten(1).all(1)
    assert bool((same | turned).all())
    assert 70 <= int((~same).sum()) <= 130
