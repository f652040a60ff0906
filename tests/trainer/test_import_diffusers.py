"""Diffusers folders, imported: schedules, what is said of schedulers that walk otherwise, and what is refused.

That what is served is what diffusers draws is shown in tests/system/test_imported_pipelines.py.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LDMPipeline,
    PNDMScheduler,
    UNet2DModel,
    VQModel,
)
from latentd.v1 import model_pb2
from latentd_server import bundle as server_bundle
from latentd_trainer import bundle as bundles
from latentd_trainer import cli, importers
from latentd_trainer.bundle import BundleError
from latentd_trainer.importers import ImportingError, diffusers_folder, diffusers_schedulers, noise_schedules
from latentd_trainer.importers.diffusers_folder import Wishes
from latentd_trainer.importers.diffusers_networks import Denoiser
from typer.testing import CliRunner

# NumPy says this of torch tensors, which diffusers gives to np.array.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
SPEC = model_pb2.DiffusionSpec


def unet(**options: Any) -> UNet2DModel:
    """One level of 4 x 4, without attention."""
    kept: dict[str, Any] = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "mid_block_type": None} | options
    return UNet2DModel(
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        **kept,
    )


@pytest.fixture
def walk_of(tmp_path: Path) -> Callable[..., diffusers_schedulers.Walk]:
    """Saves a scheduler and reads it."""

    def read(scheduler: Any, step_count: int | None = None) -> diffusers_schedulers.Walk:
        scheduler.save_pretrained(tmp_path)
        return diffusers_schedulers.read(str(tmp_path), type(scheduler).__name__, step_count)

    return read


@pytest.mark.parametrize("kind", noise_schedules.KINDS)
def test_schedules_by_name_are_those_of_diffusers(kind: str) -> None:
    """Our betas of each name, in float64, are diffusers' in float32."""
    scheduler = DDPMScheduler(num_train_timesteps=50, beta_schedule=kind, beta_start=0.002, beta_end=0.03)
    ours = noise_schedules.betas(kind, 50, 0.002, 0.03)
    assert ours == pytest.approx(scheduler.betas.double().numpy(), rel=2e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": np.linspace(0.01, 0.4, 30).tolist()},
    ],
    ids=lambda settings: next(iter(settings.values())) if "beta_schedule" in settings else "trained_betas",
)
def test_levels_are_the_scheduler_s(settings: dict[str, Any], walk_of: Callable[..., Any]) -> None:
    """alpha^2 is the scheduler's alphas_cumprod at every timestep, whatever made its betas."""
    scheduler = DDPMScheduler(num_train_timesteps=30, **settings)
    spec = walk_of(scheduler).spec
    assert np.square(spec.alphas) == pytest.approx(scheduler.alphas_cumprod.numpy(), rel=1e-5)
    assert np.square(spec.alphas) + np.square(spec.sigmas) == pytest.approx(1, abs=1e-12)


def test_zero_terminal_snr_is_kept(walk_of: Callable[..., Any]) -> None:
    """Betas rescaled to zero terminal SNR end at alpha 0."""
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert walk_of(DDIMScheduler(num_train_timesteps=30, **options)).spec.alphas[-1] == 0


@pytest.mark.parametrize(
    ("kind", "options", "sampler", "steps"),
    [
        (DDPMScheduler, {"num_train_timesteps": 80}, "ddpm", 80),
        (DDIMScheduler, {}, "ddim", 50),
        (DPMSolverMultistepScheduler, {}, "dpmpp-2m", 50),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "dpmpp-2m-sde", 50),
        (EulerDiscreteScheduler, {}, "euler", 50),
        (HeunDiscreteScheduler, {}, "heun", 50),
        (PNDMScheduler, {}, "dpmpp-2m", 50),
    ],
)
def test_each_scheduler_has_its_sampler(
    kind: Any, options: dict[str, Any], sampler: str, steps: int, walk_of: Callable[..., Any]
) -> None:
    """The scheduler's own sampler is the default and all others are there; DDPM takes all its steps."""
    spec = walk_of(kind(**options)).spec
    assert spec.samplers[0] == sampler
    assert len(set(spec.samplers)) == 7
    assert spec.default_step_count == steps
    assert walk_of(kind(**options), 9).spec.default_step_count == 9


def test_predictions_and_clipping_are_read(walk_of: Callable[..., Any]) -> None:
    """prediction_type, clip_sample and clip_sample_range come over."""
    walk = walk_of(DDPMScheduler(prediction_type="sample", clip_sample_range=2.0))
    assert (walk.spec.prediction, walk.spec.clip_denoised, walk.clip_range) == (SPEC.PREDICTION_SAMPLE, True, 2.0)
    walk = walk_of(DDPMScheduler(prediction_type="v_prediction", clip_sample=False))
    assert (walk.spec.prediction, walk.spec.clip_denoised, walk.clip_range) == (SPEC.PREDICTION_V, False, None)


@pytest.mark.parametrize(
    ("kind", "options", "note"),
    [
        (DDIMScheduler, {"steps_offset": 1}, "spaced 'leading' (offset 1)"),
        (DDIMScheduler, {"set_alpha_to_one": False}, "ends at timestep 0"),
        (DDPMScheduler, {"variance_type": "fixed_large"}, "served DDPM has the posterior's"),
        (DDPMScheduler, {"thresholding": True}, "dynamic thresholding"),
        (DPMSolverMultistepScheduler, {"solver_order": 3}, "of order 3 (midpoint); served is 2 (midpoint)"),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, "as Karras et al. do"),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}, "as Karras et al. do"),
        (PNDMScheduler, {}, "PNDMScheduler is not served; the default sampler is dpmpp-2m"),
    ],
)
def test_what_is_served_otherwise_is_said(
    kind: Any, options: dict[str, Any], note: str, walk_of: Callable[..., Any]
) -> None:
    """Each setting that makes diffusers walk otherwise gives a note."""
    assert note in "\n".join(walk_of(kind(**options)).notes)


def test_a_scheduler_that_walks_as_served_gives_no_notes(walk_of: Callable[..., Any]) -> None:
    """Trailing timesteps and defaults else: nothing to say."""
    assert walk_of(DDPMScheduler(timestep_spacing="trailing")).notes == []
    assert walk_of(DPMSolverMultistepScheduler(timestep_spacing="trailing")).notes == []


def test_schedulers_that_cannot_be_served_are_refused(walk_of: Callable[..., Any]) -> None:
    """Flow matching and learned variances are refused with what is allowed."""
    with pytest.raises(ImportingError, match="scheduler FlowMatchEulerDiscreteScheduler: must be one of DDPM"):
        walk_of(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ImportingError, match="variance_type 'learned_range': learned variances cannot be served"):
        walk_of(DDPMScheduler(variance_type="learned_range"))


@pytest.mark.parametrize("none", [None, 0, 2, 3])
def test_labels_count_the_classes_without_the_unconditional_one(none: int | None) -> None:
    """Label -1 is the unconditional class wherever it stands, and the others keep their order."""
    torch.manual_seed(0)
    network = unet(num_class_embeds=4).eval()
    rows = [row for row in range(4) if row != none]
    x, t = torch.randn(4, 1, 4, 4), torch.tensor([0, 5, 9, 3])
    with torch.no_grad():
        expected = {row: network(x, t, class_labels=torch.full((4,), row)).sample for row in range(4)}
        denoiser = Denoiser(network, 10, none)
        for label, row in enumerate(rows):
            assert torch.allclose(denoiser(x, t, torch.full((4,), label)), expected[row], atol=1e-6)
        if none is not None:
            assert torch.allclose(denoiser(x, t, torch.full((4,), -1)), expected[none], atol=1e-6)


def imported(folder: Path, pipeline: Any, **wishes: Any) -> list[Path]:
    """The bundles of a pipeline."""
    pipeline.save_pretrained(folder / "pipeline")
    written, _ = diffusers_folder.run(folder / "pipeline", Wishes("own", **wishes), models=folder / "models")
    return written


def test_a_pipeline_becomes_a_bundle_that_the_server_reads(tmp_path: Path) -> None:
    """Shape, classes, guidance, range and notes are those of the pipeline and the wishes."""
    pipeline = DDPMPipeline(unet(num_class_embeds=3), DDPMScheduler(num_train_timesteps=20))
    (written,) = imported(
        tmp_path, pipeline, class_names=("a", "b"), unconditional_class=2, license="MIT", step_count=5
    )
    model = server_bundle.read(written).message.model
    assert (list(model.sample_spec.shape), model.sample_spec.min_value, model.sample_spec.max_value) == (
        [1, 4, 4],
        -1,
        1,
    )
    assert (list(model.class_names), model.diffusion.guidance_supported) == (["a", "b"], True)
    assert (model.diffusion.default_step_count, model.card.license) == (5, "MIT")
    assert "spaced 'leading'" in bundles.read_record(written)["notes"][0]


def test_a_pipeline_may_be_served_at_other_sizes(tmp_path: Path) -> None:
    """Proved against torch at each; a pipeline over latents is refused."""
    pipeline = DDPMPipeline(unet(), DDPMScheduler(num_train_timesteps=20))
    (written,) = imported(tmp_path, pipeline, sizes=((8, 4),))
    assert [(size.height, size.width) for size in server_bundle.read(written).message.model.sample_sizes] == [(8, 4)]
    assert list(bundles.read_record(written)["export"]["parity"]["denoiser"]["sizes"]) == ["8x4"]
    latent = LDMPipeline(autoencoder("kl"), unet(in_channels=2, out_channels=2), DDIMScheduler(num_train_timesteps=20))
    with pytest.raises(ImportingError, match="sizes: must be empty"):
        imported(tmp_path / "latent", latent, sizes=((8, 4),))


@pytest.mark.parametrize(
    ("head", "license", "dataset"),
    [
        ("license: apache-2.0\ndatasets:\n- mnist\n- digits", "Apache-2.0", "mnist, digits"),
        ("license: creativeml-openrail-m", "LicenseRef-creativeml-openrail-m", ""),
        ("license: other\nlicense_name: house rules\ndatasets: mnist", "LicenseRef-house-rules", "mnist"),
        ("license: other", "NOASSERTION", ""),
        ("library_name: diffusers", "NOASSERTION", ""),
        (None, "NOASSERTION", ""),
    ],
)
def test_the_pipeline_s_model_card_tells_its_licence(
    head: str | None, license: str, dataset: str, tmp_path: Path
) -> None:
    """A hub's words become SPDX expressions; what nobody has said is not known."""
    if head is not None:
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A pipeline\n")
    said = diffusers_folder._model_card(tmp_path)
    assert (said.license, said.dataset) == (license, dataset)


def test_a_damaged_model_card_is_named(tmp_path: Path) -> None:
    """Not guessed at and not passed over."""
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ImportingError, match=r"README\.md: is no model card"):
        diffusers_folder._model_card(tmp_path)


def autoencoder(kind: str) -> Any:
    """One of each kind, for images of 8 x 8 and latents of 4 x 4."""
    options: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "in_channels": 1,
        "out_channels": 1,
        "mid_block_add_attention": False,
    }
    if kind == "vq":
        return VQModel(latent_channels=2, num_vq_embeddings=8, **options)
    return AutoencoderKL(latent_channels=2, sample_size=8, **options)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_an_autoencoder_becomes_a_bundle_beside(kind: str, tmp_path: Path) -> None:
    """NAME-vae encodes and decodes what NAME walks over, and NAME's bundle names it: its samples are images."""
    torch.manual_seed(0)
    network = unet(in_channels=2, out_channels=2)
    pipeline = LDMPipeline(autoencoder(kind), network, DDIMScheduler(num_train_timesteps=20, clip_sample=False))
    vae, diffusion = imported(tmp_path, pipeline)
    model = server_bundle.read(vae).message.model
    assert model.name == "own-vae@1"
    assert (list(model.sample_spec.shape), list(model.latent_spec.shape)) == ([1, 8, 8], [2, 4, 4])
    assert set(model.methods) == {model_pb2.Model.METHOD_ENCODE, model_pb2.Model.METHOD_DECODE}
    walked = server_bundle.read(diffusion).message.model
    assert (walked.sample_spec, list(walked.latent_spec.shape)) == (model.sample_spec, [2, 4, 4])
    assert (walked.latent_space.decoder, walked.latent_space.decoder_digest) == (model.name, model.digest)


def index(folder: Path, **parts: Any) -> Path:
    """A folder with nothing but an index that names these parts."""
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Own"} | parts))
    return folder


def test_folders_that_are_no_pipeline_of_ours_are_refused(tmp_path: Path) -> None:
    """No index, broken ones and parts that cannot be served are refused, all parts at once."""

    def refusal() -> str:
        with pytest.raises(ImportingError) as caught:
            diffusers_folder.run(tmp_path, Wishes("own"), models=tmp_path / "models")
        return str(caught.value)

    assert "model_index.json: cannot be read: No such file or directory; must be a pipeline's folder" in refusal()
    (tmp_path / "model_index.json").write_text("{")
    assert "is not JSON" in refusal()
    index(
        tmp_path, unet=["diffusers", "UNet2DConditionModel"], text_encoder=["transformers", "CLIP"], vae=["own", "VAE"]
    )
    said = refusal()
    for part in (
        "unet: must be a UNet2DModel, is UNet2DConditionModel",
        "scheduler: must be there",
        "text_encoder: CLIP cannot be served",
        "vae: must be one of AutoencoderKL, VQModel, is VAE",
    ):
        assert part in said
    index(tmp_path, unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "DDPMScheduler"])
    assert "unet: cannot be loaded: " in refusal()


NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "learned variance": ({"out_channels": 2}, {}, "unet: takes 1 channels and gives 2"),
    "noise levels": ({"time_embedding_type": "fourier"}, {}, "unet: is told noise levels (fourier time embedding)"),
    "classes by embedding": ({"class_embed_type": "identity"}, {}, "unet: class_embed_type 'identity': must be absent"),
    "no size": ({"sample_size": None}, {}, "unet: does not say the size of its samples; give one"),
    "no such class": (
        {"num_class_embeds": 3},
        {"unconditional_class": 3},
        "the unconditional class must be one of the network's 3 classes, from 0; got 3",
    ),
    "names": ({"num_class_embeds": 3}, {"class_names": ("a", "b")}, "2 class names for 3 classes"),
    "names of nothing": ({}, {"class_names": ("a",)}, "1 class names for 0 classes"),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_that_cannot_be_served_are_refused(kind: str, tmp_path: Path) -> None:
    """Each kind of network or wish that does not fit is refused in words, and nothing is written."""
    options, wishes, expected = NETWORKS[kind]
    with pytest.raises(ImportingError) as caught:
        imported(tmp_path, DDPMPipeline(unet(**options), DDPMScheduler(num_train_timesteps=20)), **wishes)
    assert expected in str(caught.value)
    assert not (tmp_path / "models").exists()


def test_noise_alone_says_nothing_to_a_network_of_eps(tmp_path: Path) -> None:
    """Zero terminal SNR with eps prediction is refused by the contract."""
    scheduler = DDIMScheduler(num_train_timesteps=20, rescale_betas_zero_snr=True)
    with pytest.raises(BundleError, match="the last may be 0 unless eps is predicted"):
        imported(tmp_path, DDPMPipeline(unet(), scheduler))


def test_without_diffusers_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra is not installed the command names it."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in ("diffusers_folder", "diffusers_schedulers"):
        monkeypatch.delitem(sys.modules, f"latentd_trainer.importers.{name}")
        monkeypatch.delattr(importers, name)
    done = CliRunner().invoke(cli.app, ["import", "diffusers", ".", "--name", "own"])
    assert (done.exit_code, done.stderr) == (2, "latentd-train: needs diffusers: pip install 'latentd[diffusers]'\n")


def test_the_command_prints_bundles_and_notes(tmp_path: Path) -> None:
    """`import diffusers` takes the size it is given, prints the directory, and the notes on standard error."""
    DDPMPipeline(unet(sample_size=None), DDPMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "pipeline")
    arguments = [
        "import",
        "diffusers",
        str(tmp_path / "pipeline"),
        "--name",
        "own",
        "--models",
        str(tmp_path / "models"),
    ]
    done = CliRunner().invoke(cli.app, [*arguments, "--size", "6x4"])
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "models" / "own" / "1"))
    assert "note: the scheduler's timesteps are spaced 'leading'" in done.stderr
    assert list(bundles.read(tmp_path / "models" / "own" / "1").model.sample_spec.shape) == [1, 6, 4]
    wrong = CliRunner().invoke(cli.app, [*arguments, "--size", "6"])
    assert (wrong.exit_code, "--size 6: must be HxW, as 32x32" in wrong.stderr) == (2, True)
