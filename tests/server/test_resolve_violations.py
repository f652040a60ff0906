"""What is wrong with a request is found at the door: all of it, by path, with what is allowed."""

from typing import Any

import numpy as np
import pytest
from bundles import LATENT, SHAPE, TIMESTEPS, write_diffusion
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import tensor_pb2
from latentd_server import loops, resolve
from latentd_server.failures import FieldsInvalidError, MethodUnsupportedError
from latentd_server.plans import Limits

LIMITS = Limits(max_samples=8, max_steps=50, max_evaluations=200)
NAN, INF = float("nan"), float("inf")


def images(count: int = 2, value: float = 0.0) -> tensor_pb2.Tensor:
    return tensor.encode(np.full((count, *SHAPE), value, np.float32))


def latents(count: int = 2) -> tensor_pb2.Tensor:
    return tensor.encode(np.zeros((count, LATENT), np.float32))


def violations(method: str, request: Any, servable: Any) -> dict[str, str]:
    """Paths and descriptions of what `resolve` finds wrong."""
    fresh = (0,) if method in ("sample", "open_loop") else ()
    with pytest.raises(FieldsInvalidError) as caught:
        getattr(resolve, method)(request, servable, *fresh, LIMITS)
    return {violation.path: violation.description for violation in caught.value.violations}


def diffusion(**options: Any) -> pb.SampleRequest:
    return pb.SampleRequest(diffusion=pb.DiffusionOptions(**options))


def condition(**fields: Any) -> pb.Condition:
    return pb.Condition(**fields)


D, V, G = "tiny-diffusion", "tiny-vae", "tiny-gan"
Sample, Encode, Decode, Denoise, Score = (
    pb.SampleRequest,
    pb.EncodeRequest,
    pb.DecodeRequest,
    pb.DenoiseStepRequest,
    pb.ScoreRequest,
)

CASES = [
    # method, model, request, path, part of the description
    ("sample", V, Sample(sample_count=-1), "sample_count", "from 1 to 8, or 0 for 1; got -1"),
    ("sample", V, Sample(sample_count=9), "sample_count", "got 9"),
    ("sample", V, Sample(first_sample_index=-1), "first_sample_index", "from 0 to 2147483647; got -1"),
    ("sample", V, Sample(first_sample_index=2**31 - 1, sample_count=2), "first_sample_index", "to 2147483646"),
    ("sample", V, Sample(temperature=NAN), "temperature", "from 0 to 1000; got nan"),
    ("sample", V, Sample(temperature=-0.5), "temperature", "got -0.5"),
    ("sample", V, Sample(temperature=INF), "temperature", "got inf"),
    ("sample", V, Sample(diffusion=pb.DiffusionOptions()), "diffusion", "must be unset: this is no diffusion model"),
    ("sample", V, Sample(output_data_type=99), "output_data_type", "FLOAT32, FLOAT16 or UINT8; got 99"),
    ("sample", V, Sample(output_data_type=4), "output_data_type", "got DATA_TYPE_INT64"),
    ("sample", V, Sample(output_mode=7), "output_mode", "unset, MEAN or DRAW; got 7"),
    ("sample", G, Sample(output_mode=2), "output_mode", "nothing to draw"),
    ("sample", D, Sample(output_mode=2), "output_mode", "must be unset or MEAN"),
    ("sample", D, Sample(temperature=1), "temperature", "must be unset: this is a diffusion model"),
    ("sample", V, Sample(condition=condition(class_label=3)), "condition.class_label", "from 0 to 2; got 3"),
    ("sample", D, Sample(condition=condition(class_label=-1)), "condition.class_label", "from 0 to 2; got -1"),
    (
        "sample",
        D,
        Sample(sample_count=3, condition=condition(class_labels=[0, 1])),
        "condition.class_labels",
        "must hold 3 labels, one for each row; got 2",
    ),
    (
        "sample",
        D,
        Sample(sample_count=8, condition=condition(class_labels=[0, 1, 2, 0, 1, 2, 0, 9])),
        "condition.class_labels[7]",
        "from 0 to 2; got 9",
    ),
    (
        "sample",
        D,
        Sample(condition=condition(class_label=0, class_labels=[0])),
        "condition.class_labels",
        "must be empty where class_label is set",
    ),
    ("sample", D, Sample(condition=condition(codes=[1.0])), "condition.codes", "takes no continuous codes"),
    ("sample", D, diffusion(sampler="plms"), "diffusion.sampler", "must be one of ddim, ddpm"),
    ("sample", D, diffusion(sampler="x" * 10_000), "diffusion.sampler", "..."),
    ("sample", D, diffusion(step_count=-3), "diffusion.step_count", "from 1 to 50, or 0 for 10; got -3"),
    ("sample", D, diffusion(step_count=51), "diffusion.step_count", "got 51"),
    ("sample", D, diffusion(eta=1.5), "diffusion.eta", "from 0 to 1; got 1.5"),
    ("sample", D, diffusion(eta=NAN), "diffusion.eta", "got nan"),
    ("sample", D, diffusion(sampler="heun", eta=0.0), "diffusion.eta", "must be unset for heun"),
    ("sample", D, diffusion(guidance_scale=NAN), "diffusion.guidance_scale", "got nan"),
    ("sample", D, diffusion(guidance_scale=1e9), "diffusion.guidance_scale", "from -1000 to 1000"),
    ("sample", D, diffusion(preview_interval_steps=-1), "diffusion.preview_interval_steps", "got -1"),
    ("sample", D, diffusion(timesteps=[50, 50]), "diffusion.timesteps[1]", "fall strictly; 50 follows 50"),
    ("sample", D, diffusion(timesteps=[90, 40, 60]), "diffusion.timesteps[2]", "fall strictly; 60 follows 40"),
    ("sample", D, diffusion(timesteps=[TIMESTEPS]), "diffusion.timesteps[0]", "from 0 to 99; got 100"),
    ("sample", D, diffusion(timesteps=[5, -1]), "diffusion.timesteps[1]", "from 0 to 99; got -1"),
    ("sample", D, diffusion(timesteps=range(60, 0, -1)), "diffusion.timesteps", "at most 50 timesteps; got 60"),
    ("sample", D, diffusion(timesteps=[9, 3], step_count=5), "diffusion.step_count", "0 or 2, the number of timesteps"),
    ("sample", D, diffusion(start=pb.StartPoint(samples=images(1), strength=0)), "diffusion.start.strength", "above 0"),
    ("sample", D, diffusion(start=pb.StartPoint(samples=images(1), strength=NAN)), "diffusion.start.strength", "nan"),
    ("sample", D, diffusion(start=pb.StartPoint()), "diffusion.start.samples", "must be set"),
    (
        "sample",
        D,
        Sample(sample_count=4, diffusion=pb.DiffusionOptions(start=pb.StartPoint(samples=images(2)))),
        "diffusion.start.samples.shape",
        "must hold 1 sample, or 4, one for each sample; got 2",
    ),
    (
        "sample",
        D,
        Sample(sample_count=8, diffusion=pb.DiffusionOptions(step_count=50)),
        "sample_count",
        "8 samples of 50 evaluations each make 400; at most 200",
    ),
    ("open_loop", D, diffusion(preview_interval_steps=2), "diffusion.preview_interval_steps", "must be 0"),
    (
        "encode",
        V,
        Encode(samples=tensor_pb2.Tensor(shape=[1])),
        "samples.data_type",
        "must be one of FLOAT32, FLOAT16, UINT8, INT64, got 0",
    ),
    ("encode", V, Encode(samples=images(9)), "samples.shape", "[n, 1, 4, 4] with n from 1 to 8; got n = 9"),
    ("encode", V, Encode(samples=images(0)), "samples.shape", "got n = 0"),
    (
        "encode",
        V,
        Encode(samples=tensor.encode(np.zeros((2, 16), np.float32))),
        "samples.shape",
        "must be [n, 1, 4, 4]; got [2, 16]",
    ),
    (
        "encode",
        V,
        Encode(samples=tensor.encode(np.zeros((1, *SHAPE), np.int64))),
        "samples.data_type",
        "must be FLOAT32, FLOAT16, or UINT8 whose 0..255 mean -1..1; got DATA_TYPE_INT64",
    ),
    ("encode", V, Encode(samples=tensor_pb2.Tensor(data_type=1, shape=[1, *SHAPE])), "samples.data", "64 bytes"),
    ("encode", V, Encode(samples=images(1, NAN)), "samples.data", "16 of 16 are NaN or infinite, first [0, 0, 0, 0]"),
    ("encode", V, Encode(samples=images(1, -INF)), "samples.data", "must be finite"),
    (
        "encode",
        V,
        Encode(samples=images(), condition=condition(class_label=0)),
        "condition.class_label",
        "no class label",
    ),
    ("encode", V, Encode(samples=images(), forward_timestep=3), "forward_timestep", "no diffusion model"),
    ("encode", D, Encode(samples=images(), forward_timestep=100, seed=1), "forward_timestep", "from 0 to 99; got 100"),
    ("encode", D, Encode(samples=images(), forward_timestep=1), "seed", "must be set with forward_timestep"),
    ("encode", D, Encode(samples=images(), seed=1), "seed", "must be unset: DDIM inversion is deterministic"),
    ("encode", D, Encode(samples=images(), diffusion=pb.DiffusionOptions(eta=0.5)), "diffusion.eta", "unset or 0"),
    (
        "encode",
        D,
        Encode(samples=images(), diffusion=pb.DiffusionOptions(sampler="heun")),
        "diffusion.sampler",
        "must be one of ddim",
    ),
    (
        "encode",
        D,
        Encode(samples=images(), diffusion=pb.DiffusionOptions(preview_interval_steps=1)),
        "diffusion.preview_interval_steps",
        "only Sample",
    ),
    (
        "encode",
        D,
        Encode(samples=images(), diffusion=pb.DiffusionOptions(guidance_scale=2)),
        "condition.class_label",
        "guidance needs a class",
    ),
    ("decode", V, Decode(latents=latents(), output_mode=2), "seed", "must be set for OUTPUT_MODE_DRAW"),
    (
        "decode",
        V,
        Decode(latents=tensor.encode(np.zeros((1, LATENT), np.uint8))),
        "latents.data_type",
        "must be FLOAT32 or FLOAT16; got DATA_TYPE_UINT8",
    ),
    ("decode", V, Decode(latents=latents(), diffusion=pb.DiffusionOptions()), "diffusion", "no diffusion model"),
    ("decode", D, Decode(latents=images(), diffusion=pb.DiffusionOptions(sampler="ddpm")), "seed", "fresh noise"),
    ("decode", D, Decode(latents=images(), output_mode=2, seed=1), "output_mode", "must be unset or MEAN"),
    (
        "denoise_step",
        D,
        Denoise(noisy_samples=images()),
        "timesteps",
        "must hold 1 value or 2, one for each row; got 0",
    ),
    ("denoise_step", D, Denoise(noisy_samples=images(), timesteps=[1, 2, 3]), "timesteps", "got 3"),
    ("denoise_step", D, Denoise(noisy_samples=images(), timesteps=[3, 100]), "timesteps[1]", "from 0 to 99; got 100"),
    ("denoise_step", D, Denoise(noisy_samples=images(), timesteps=[-1]), "timesteps[0]", "got -1"),
    (
        "denoise_step",
        D,
        Denoise(noisy_samples=images(), timesteps=[9, 5], next_timesteps=[3, 5]),
        "next_timesteps[1]",
        "from -1 (clean data) to 4, below row 1's timestep; got 5",
    ),
    (
        "denoise_step",
        D,
        Denoise(noisy_samples=images(), timesteps=[9], next_timesteps=[1], eta=0.5),
        "seed",
        "must be set where eta is above 0",
    ),
    ("denoise_step", D, Denoise(noisy_samples=images(), timesteps=[9], eta=-1), "eta", "from 0 to 1; got -1"),
    ("denoise_step", D, Denoise(noisy_samples=images(), timesteps=[9], step_index=-1), "step_index", "got -1"),
    (
        "denoise_step",
        D,
        Denoise(noisy_samples=images(), timesteps=[9], guidance_scale=3),
        "condition.class_label",
        "guidance needs a class",
    ),
    (
        "denoise_step",
        D,
        Denoise(noisy_samples=tensor.encode(np.zeros((1, *SHAPE), np.uint8)), timesteps=[9]),
        "noisy_samples.data_type",
        "FLOAT32 or FLOAT16; got DATA_TYPE_UINT8",
    ),
    ("score", V, Score(samples=images(), draw_count=-1), "draw_count", "or 0 for 16; got -1"),
    (
        "score",
        V,
        Score(samples=images(), draw_count=1000),
        "draw_count",
        "2 rows x 3 classes x 1000 draws make 6000 evaluations; at most 200",
    ),
    ("score", V, Score(samples=images(), timestep_count=4), "timestep_count", "only the bound of a diffusion model"),
    (
        "score",
        D,
        Score(samples=images(), draw_count=-1),
        "draw_count",
        "must be from 1 to 21474836, or 0 for 1; got -1",
    ),
    ("score", D, Score(samples=images(), timestep_count=1), "timestep_count", "from 2 to 100, or 0 for 100; got 1"),
    ("score", D, Score(samples=images(), timestep_count=101), "timestep_count", "from 2 to 100, or 0 for 100; got 101"),
    (
        "score",
        D,
        Score(samples=images(), draw_count=3),
        "timestep_count",
        "2 rows x 3 draws x 100 timesteps make 600 evaluations; at most 200",
    ),
    ("score", G, Score(samples=images()), "condition.class_label", "judges samples of a class"),
    (
        "score",
        G,
        Score(samples=images(), condition=condition(class_label=0), draw_count=5),
        "draw_count",
        "must be 0 or 1: this score is exact",
    ),
]


@pytest.mark.parametrize(("method", "model", "request_", "path", "part"), CASES)
def test_a_wrong_field_is_named_with_what_is_allowed(
    method: str, model: str, request_: Any, path: str, part: str, held: dict[str, Any]
) -> None:
    """Each wrong field is reported under its path, and the report says what is allowed or what was got."""
    found = violations(method, request_, held[model])
    assert path in found, found
    assert part in found[path]
    assert len(found[path]) < 300


def test_a_tensor_that_is_missing_is_asked_for(held: dict[str, Any]) -> None:
    """Whoever forgets one is told that it must be set, and not of which type it is not."""
    half = diffusion(known=pb.KnownPixels(samples=images(1)))
    assert violations("sample", half, held[D]) == {
        "diffusion.known.mask": "must be set: it says where samples are known"
    }
    assert violations("sample", diffusion(start=pb.StartPoint()), held[D]) == {"diffusion.start.samples": "must be set"}
    assert violations("encode", Encode(), held[V]) == {"samples": "must be set"}


def test_an_unknown_sampler_hides_nothing_else(held: dict[str, Any]) -> None:
    """What is wrong beside the sampler is told in the same answer; only `eta`, which is the sampler's, waits."""
    options = pb.DiffusionOptions(sampler="plms", eta=7, step_count=-1, preview_interval_steps=-1)
    options.known.mask.CopyFrom(images(1, NAN))
    found = violations("sample", Sample(model=D, diffusion=options), held[D])
    assert found.keys() == {
        "diffusion.sampler",
        "diffusion.step_count",
        "diffusion.preview_interval_steps",
        "diffusion.known.samples",
        "diffusion.known.mask.data",
    }


def test_every_violation_is_reported_at_once(held: dict[str, Any]) -> None:
    """One answer names everything that is wrong, so a caller fixes a request in one go."""
    request = Sample(
        sample_count=-1,
        first_sample_index=-1,
        temperature=1.0,
        output_data_type=4,
        output_mode=2,
        condition=condition(class_label=9, codes=[1.0]),
        diffusion=pb.DiffusionOptions(
            step_count=-1,
            eta=2,
            guidance_scale=NAN,
            preview_interval_steps=-1,
            start=pb.StartPoint(strength=2, samples=images(3)),
        ),
    )
    assert set(violations("sample", request, held[D])) == {
        "sample_count",
        "first_sample_index",
        "temperature",
        "output_data_type",
        "output_mode",
        "condition.class_label",
        "condition.codes",
        "diffusion.step_count",
        "diffusion.eta",
        "diffusion.guidance_scale",
        "diffusion.preview_interval_steps",
        "diffusion.start.strength",
        "diffusion.start.samples.shape",
    }


def test_a_label_is_required_where_there_is_no_unconditional_network(tmp_path: Any) -> None:
    """DenoiseStep without a label needs a network trained with dropped labels."""
    from doors import servables

    write_diffusion(tmp_path, guidance=False)
    servable = servables(tmp_path)[D]
    found = violations("denoise_step", Denoise(noisy_samples=images(), timesteps=[9]), servable)
    assert "no unconditional network" in found["condition.class_label"]
    found = violations("sample", diffusion(guidance_scale=2), servable)
    assert "not trained for guidance" in found["diffusion.guidance_scale"]
    resolve.sample(diffusion(guidance_scale=1), servable, 0, LIMITS)


@pytest.mark.parametrize(
    ("method", "model", "request_", "name"),
    [
        ("encode", G, Encode(samples=images()), "Encode"),
        ("denoise_step", V, Denoise(), "DenoiseStep"),
        ("open_loop", G, Sample(), "DenoiseStep"),
    ],
)
def test_a_method_the_model_lacks_is_refused_with_what_it_has(
    method: str, model: str, request_: Any, name: str, held: dict[str, Any]
) -> None:
    """The refusal names the method and what the model supports in its place."""
    fresh = (0,) if method == "open_loop" else ()
    with pytest.raises(MethodUnsupportedError) as caught:
        getattr(resolve, method)(request_, held[model], *fresh, LIMITS)
    assert caught.value.method == name
    assert name not in caught.value.supported
    assert "Sample" in caught.value.supported


@pytest.mark.parametrize(
    ("step", "path", "part"),
    [
        (pb.TakeStep(next_timestep=99), "next_timestep", "from -1 to 98; got 99"),
        (pb.TakeStep(next_timestep=-2), "next_timestep", "got -2"),
        (pb.TakeStep(noisy_samples=images(3)), "noisy_samples.shape", "n from 1 to 2"),
        (pb.TakeStep(noisy_samples=images(1)), "noisy_samples.shape", "must hold 2 samples, as many as the loop"),
        (pb.TakeStep(noisy_samples=images(2, NAN)), "noisy_samples.data", "must be finite"),
    ],
)
def test_a_wrong_step_of_a_loop_is_named(step: Any, path: str, part: str, held: dict[str, Any]) -> None:
    """A step is checked like any request."""
    loop, position = resolve.open_loop(Sample(sample_count=2), held[D], 0, LIMITS)
    with pytest.raises(FieldsInvalidError) as caught:
        loops.take_step(step, loop, position)
    assert caught.value.violations[0].path == path
    assert part in caught.value.violations[0].description


@pytest.mark.parametrize(
    ("method", "name", "request_", "path"),
    [
        ("sample", V, Sample(condition=condition(class_labels=[-1] * 10_000)), "condition.class_labels"),
        ("denoise_step", D, Denoise(noisy_samples=images(), timesteps=[-1] * 10_000), "timesteps"),
    ],
)
def test_very_many_wrong_values_are_counted_not_listed(
    method: str, name: str, request_: Any, path: str, held: dict[str, Any]
) -> None:
    """One request cannot keep the server busy with describing it: the first are named, the rest are a number."""
    found = violations(method, request_, held[name])
    assert f"{path}[0]" in found
    assert found[path].startswith("9936 more values are not from 0 to")
    assert len(found) < 100
