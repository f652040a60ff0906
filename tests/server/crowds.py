"""Random requests of every kind, and what their answers come to as bytes, by whatever road they were asked."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from bundles import CLASSES, LATENT, SHAPE, TIMESTEPS
from hypothesis import strategies as st
from latentd import tensor
from latentd.names import SAMPLERS
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import tensor_pb2

D, V, G, L = "tiny-diffusion", "tiny-vae", "tiny-gan", "tiny-latents"
METHODS = {"encode": "Encode", "decode": "Decode", "denoise_step": "DenoiseStep", "score": "Score"}


@dataclass(frozen=True)
class Asked:
    """A request, by its name in `StreamRequest`; a loop takes `steps` steps after it."""

    kind: str
    request: Any
    steps: int = 0


def _array(seed: int, *shape: int) -> tensor_pb2.Tensor:
    return tensor.encode(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


_seeds = st.integers(0, 3)
_counts = st.integers(1, 9)
_labels = st.integers(0, len(CLASSES) - 1)
_conditions = st.none() | st.builds(lambda label: pb.Condition(class_label=label), _labels)
_guidance = st.sampled_from([None, None, 1.0, 0.0, 2.5])
_starts = st.none() | st.builds(
    lambda seed, strength: pb.StartPoint(samples=_array(seed, 1, *SHAPE), strength=strength),
    _seeds,
    st.sampled_from([0.3, 0.8]),
)
_timesteps = st.lists(st.integers(0, TIMESTEPS - 1), min_size=1, max_size=8, unique=True).map(
    lambda values: sorted(values, reverse=True)
)
_DATA_TYPES = (0, tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_UINT8)


_knowns = st.none() | st.builds(
    lambda seed, mask: pb.KnownPixels(
        samples=_array(seed, 1, *SHAPE),
        mask=tensor.encode(np.random.default_rng(mask).integers(0, 2, (1, *SHAPE), "u1")),
    ),
    _seeds,
    _seeds,
)


@st.composite
def _walks(draw: st.DrawFn, *, previews: bool) -> pb.SampleRequest:
    """Of images, and of latents that are decoded; without previews what a loop may walk, which has no ends to it."""
    model = draw(st.sampled_from([D, D, L]))
    options = pb.DiffusionOptions(sampler=draw(st.sampled_from(SAMPLERS)), guidance_scale=draw(_guidance))
    if options.HasField("guidance_scale") and draw(st.booleans()):
        options.guidance_interval.min_timestep = draw(st.sampled_from([0, 20]))
        options.guidance_interval.max_timestep = draw(st.sampled_from([40, 75]))
    if (model == D or previews) and (start := draw(_starts)):
        options.start.CopyFrom(start)
        options.step_count = draw(st.integers(4, 10))
    elif draw(st.booleans()):
        options.timesteps.extend(draw(_timesteps))
    else:
        options.step_count = draw(st.integers(1, 12))
    if options.sampler == "ddim" and draw(st.booleans()):
        options.eta = 0.5
    if previews:
        options.preview_interval_steps = draw(st.integers(0, 3))
        if model == D and (known := draw(_knowns)):
            options.known.CopyFrom(known)
    mode = draw(st.sampled_from([0, pb.OUTPUT_MODE_DRAW, pb.OUTPUT_MODE_LATENT])) if previews and model == L else 0
    latent = model == L and (mode == pb.OUTPUT_MODE_LATENT or not previews)
    return pb.SampleRequest(
        model=model,
        seed=draw(_seeds),
        sample_count=draw(_counts),
        first_sample_index=draw(st.integers(0, 2)),
        condition=draw(_conditions),
        output_data_type=draw(st.sampled_from(_DATA_TYPES)) if previews and not latent else 0,
        output_mode=mode,
        diffusion=options,
    )


_one_shots = st.builds(
    lambda model, seed, count, mode: pb.SampleRequest(
        model=model, seed=seed, sample_count=count, output_mode=mode if model == V else 0
    ),
    st.sampled_from([V, G]),
    _seeds,
    _counts,
    st.sampled_from([0, pb.OUTPUT_MODE_DRAW]),
)
_encodes = st.builds(
    lambda model, seed, count, steps, condition: pb.EncodeRequest(
        model=model,
        samples=_array(seed, count, *SHAPE),
        seed=seed if model == V else None,
        condition=condition if model != V else None,
        diffusion=pb.DiffusionOptions(step_count=steps) if model != V else None,
    ),
    st.sampled_from([V, D, L]),
    _seeds,
    _counts,
    st.integers(1, 8),
    _conditions,
)
_decodes = st.builds(
    lambda model, seed, count, steps, label: pb.DecodeRequest(
        model=model,
        latents=_array(seed, count, *(SHAPE if model == D else (LATENT,))),
        seed=seed if model == V else None,
        condition=pb.Condition(class_label=label),
        diffusion=pb.DiffusionOptions(step_count=steps) if model in (D, L) else None,
    ),
    st.sampled_from([V, G, D, L]),
    _seeds,
    _counts,
    st.integers(1, 8),
    _labels,
)
_scores = st.builds(
    lambda model, seed, count, draws, label: pb.ScoreRequest(
        model=model,
        samples=_array(seed, count, *SHAPE),
        condition=pb.Condition(class_label=label),
        seed=None if model == G else seed,
        draw_count=0 if model == G else draws,
        timestep_count=2 + 5 * draws if model == D else 0,
    ),
    st.sampled_from([V, G, D]),
    _seeds,
    _counts,
    st.integers(1, 4),
    _labels,
)
_single_steps = st.builds(
    lambda seed, label, guidance, pairs: pb.DenoiseStepRequest(
        model=D,
        noisy_samples=_array(seed, len(pairs), *SHAPE),
        timesteps=[high for high, _ in pairs],
        next_timesteps=[low for _, low in pairs],
        condition=pb.Condition(class_label=label),
        guidance_scale=guidance,
        eta=0.5,
        seed=seed,
        step_index=seed,
    ),
    _seeds,
    _labels,
    _guidance,
    st.lists(st.tuples(st.integers(50, TIMESTEPS - 1), st.integers(-1, 49)), min_size=1, max_size=5),
)


def _loop(request: pb.SampleRequest, most: int) -> Asked:
    options = request.diffusion
    count = len(options.timesteps) or options.step_count
    if options.HasField("start"):
        count = 1  # how far up strength starts is the server's to say
    return Asked("open_denoise", request, min(count, most))


asked = st.one_of(
    st.builds(Asked, st.just("sample"), _walks(previews=True)),
    st.builds(Asked, st.just("sample"), _one_shots),
    st.builds(Asked, st.just("encode"), _encodes),
    st.builds(Asked, st.just("decode"), _decodes),
    st.builds(Asked, st.just("score"), _scores),
    st.builds(Asked, st.just("denoise_step"), _single_steps),
    st.builds(_loop, _walks(previews=False), st.integers(1, 12)),
)
"""Any request whose answer is a function of it."""

wrong = st.sampled_from(
    [
        Asked("sample", pb.SampleRequest(model=D, diffusion=pb.DiffusionOptions(sampler="ddmp"))),
        Asked("sample", pb.SampleRequest(model="no-such-model")),
        Asked("encode", pb.EncodeRequest(model=G, samples=_array(0, 1, *SHAPE))),
        Asked("decode", pb.DecodeRequest(model=V, latents=_array(0, 1, LATENT + 1))),
        Asked("score", pb.ScoreRequest(model=V)),
    ]
)
"""Requests that are refused."""

LONG = pb.SampleRequest(
    model=D,
    seed=9,
    sample_count=12,
    diffusion=pb.DiffusionOptions(sampler="heun", step_count=30, guidance_scale=2, preview_interval_steps=1),
)
"""One that is still under way when it is cancelled or its time is over."""


def messages(id_: int, each: Asked) -> Iterator[pb.StreamRequest]:
    """A request as messages of a stream."""
    yield pb.StreamRequest(id=id_, **{each.kind: each.request})
    for _ in range(each.steps):
        yield pb.StreamRequest(id=id_, take_step=pb.TakeStep(state_requested=True))


def parts(kind: str, answers: Iterable[Any]) -> dict[Any, bytes]:
    """Everything in the answers to one request that its bytes are promised for, by what it is.

    A preview that came is promised; which of them come is not, since late ones are left out.
    """
    found: dict[Any, bytes] = {}
    for number, answer in enumerate(answers):
        if kind == "sample":
            found |= _sample(answer)
        elif kind == "open_denoise":
            assert answer.timestep >= -1
            found["step", number] = _plain(answer.step) + bytes([answer.timestep + 1])
        else:
            found["answer"] = _plain(answer)
    return found


def _plain(answer: Any) -> bytes:
    """An answer without what it cost."""
    kept = type(answer)()
    kept.CopyFrom(answer)
    kept.ClearField("stats")
    data: bytes = kept.SerializeToString(deterministic=True)
    return data


def _sample(answer: pb.SampleResponse) -> dict[Any, bytes]:
    if answer.HasField("preview"):
        seen = answer.preview
        rows = tensor.decode(seen.estimates)
        return {
            ("preview", seen.completed_step_count, int(index)): row.tobytes()
            for index, row in zip(seen.sample_indices, rows, strict=True)
        }
    result = answer.result
    rows = tensor.decode(result.samples) if result.HasField("samples") else []
    latents = tensor.decode(result.latents) if result.HasField("latents") else [np.zeros(0)] * len(rows)
    labels = result.class_labels or [0] * len(rows)
    return {
        ("sample", int(index)): row.tobytes() + latent.tobytes() + bytes([label])
        for index, row, latent, label in zip(result.sample_indices, rows, latents, labels, strict=True)
    }


def equal(one: Mapping[Any, bytes], other: Mapping[Any, bytes]) -> bool:
    """Whether all that both have is equal, and both have all but previews."""
    keys = one.keys() | other.keys()
    return all(
        one.get(key) == other.get(key) or ("preview" in key and (key not in one or key not in other)) for key in keys
    )
