"""What calls return: numpy arrays with what is needed to understand, show, keep and repeat them.

Arrays have the batch as their first axis and are read-only views of the received bytes; copy to change them.
Results compare by identity: arrays have no single truth value.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from google.protobuf.json_format import MessageToDict
from latentd.v1 import generation_service_pb2 as generation_pb2
from numpy.typing import NDArray

from latentd_client import images

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[Any]
_T_co = TypeVar("_T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Stats:
    """What a response cost the server. Never part of the determinism promise."""

    queue_s: float = 0.0  # from admission to the first batch
    compute_s: float = 0.0  # sum of the batches it rode in
    evaluations: int = 0  # rows of network calls
    mean_batch_size: float = 0.0

    @classmethod
    def of_parts(cls, parts: "Sequence[Stats]") -> "Stats":
        """The cost of parts that ran side by side: evaluations add up, durations are those of the slowest."""
        evaluations = sum(part.evaluations for part in parts)
        weighted = sum(part.mean_batch_size * part.evaluations for part in parts)
        return cls(
            queue_s=max((part.queue_s for part in parts), default=0.0),
            compute_s=max((part.compute_s for part in parts), default=0.0),
            evaluations=evaluations,
            mean_batch_size=weighted / evaluations if evaluations else 0.0,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageBatch:
    """Samples that can be looked at, if they are images."""

    array: Array = field(repr=False)  # [n, *sample]
    value_range: tuple[float, float]  # smallest and largest value of a sample; (0, 255) for uint8

    def __len__(self) -> int:
        return len(self.array)

    def uint8(self) -> NDArray[np.uint8]:
        """Pixels, `[n, H, W]` or `[n, H, W, 3]`."""
        return images.to_uint8(self.array, self.value_range)

    def pil(self, scale: int = 1) -> "list[Image]":
        """One Pillow image for each sample."""
        return images.to_pil(self.uint8(), scale)

    def grid(self, columns: int | None = None, scale: int | None = None) -> "Image":
        """All samples in one Pillow image; small ones are enlarged unless `scale` says how much."""
        return images.grid(self.uint8(), columns, scale)

    def facts(self) -> dict[str, Any]:
        """What is known of the samples beside their values, as plain JSON types."""
        return {"shape": list(self.array.shape), "dtype": str(self.array.dtype), "value_range": list(self.value_range)}

    def arrays(self) -> dict[str, Array]:
        """The arrays that `save` puts into an .npz file."""
        return {"samples": self.array}

    def save(self, path: str | Path, *, columns: int | None = None, scale: int | None = None) -> Path:
        """Write the samples: `.npz` (every array and the facts), `.npy` (the samples) or a picture (the grid).

        A PNG carries the facts as text, so that it can be made again.

        Raises:
            ValueError: the file name has no ending, or not one that Pillow can write.
        """
        path = Path(path)
        match path.suffix.lower():
            case ".npz":
                arrays: dict[str, Any] = self.arrays()
                np.savez(path, facts=np.array(json.dumps(self.facts())), **arrays)
            case ".npy":
                np.save(path, self.array, allow_pickle=False)
            case ".png":
                text = {"latentd": json.dumps(self.facts())}
                path.write_bytes(images.png_bytes(self.grid(columns, scale), text))
            case "":
                raise ValueError(f"{path}: needs an ending: .npz, .npy, .png or another that Pillow writes")
            case _:
                self.grid(columns, scale).save(path)
        return path

    def _repr_png_(self) -> bytes:
        return images.png_bytes(self.grid())


@dataclass(frozen=True)
class Accepted:
    """How the server understood a request for samples."""

    model: str  # canonical, NAME@VERSION
    seed: int
    determinism_class: str  # equal strings promise equal bytes for equal requests
    queue_depth: int  # requests ahead when this one was admitted
    resolved_request: generation_pb2.SampleRequest = field(repr=False)  # every default filled in


@dataclass(frozen=True, kw_only=True, eq=False)
class Preview(ImageBatch):
    """A look at samples under way: `array` is the current estimate of x0, `[k, *sample]`."""

    indices: NDArray[np.int64]  # [k]
    completed_steps: int
    total_steps: int


class Reproducer(Protocol[_T_co]):
    """What `Samples.reproduce` needs: a `Client` or an `AsyncClient`."""

    def reproduce(self, samples: "Samples") -> _T_co:
        """Draw the same samples again."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples(ImageBatch):
    """Finished samples: all of a request, or those that arrived together."""

    indices: NDArray[np.int64] = field(repr=False)  # [n]; which samples of the request these are
    labels: NDArray[np.int64] | None  # [n]; None for a model without classes
    latents: Array | None = field(repr=False)  # [n, *latent]; what they were decoded from, if anything
    seed: int
    model: str  # canonical, NAME@VERSION
    determinism_class: str
    resolved_request: generation_pb2.SampleRequest = field(repr=False)
    stats: Stats

    def reproduce(self, client: Reproducer[_T_co]) -> _T_co:
        """Draw the same samples again, here or on another server: `await` it with an `AsyncClient`.

        The bytes are equal if the `determinism_class` of the answer is.
        """
        return client.reproduce(self)

    def facts(self) -> dict[str, Any]:
        """What is known of the samples beside their values, as plain JSON types."""
        request = generation_pb2.SampleRequest()
        request.CopyFrom(self.resolved_request)
        if request.diffusion.HasField("start"):
            request.diffusion.start.ClearField("samples")
        if request.diffusion.HasField("known"):
            request.diffusion.ClearField("known")
        return super().facts() | {
            "model": self.model,
            "seed": self.seed,
            "labels": None if self.labels is None else self.labels.tolist(),
            "determinism_class": self.determinism_class,
            "request": MessageToDict(request),
        }

    def arrays(self) -> dict[str, Array]:
        """The arrays that `save` puts into an .npz file."""
        optional = {"labels": self.labels, "latents": self.latents}
        return super().arrays() | {name: array for name, array in optional.items() if array is not None}


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded(ImageBatch):
    """Samples made from given latents."""

    latents: Array = field(repr=False)  # [n, *latent]; what they were decoded from
    seed: int | None  # None if nothing was drawn
    stats: Stats

    def arrays(self) -> dict[str, Array]:
        """The arrays that `save` puts into an .npz file."""
        return super().arrays() | {"latents": self.latents}


@dataclass(frozen=True, eq=False)
class Encoded:
    """Latents of given samples, and the posterior q(latent | sample) where the model has one."""

    array: Array = field(repr=False)  # [n, *latent]
    mean: Array | None = field(repr=False)  # [n, *latent]; a diagonal normal posterior
    log_variance: Array | None = field(repr=False)  # [n, *latent]; natural logarithm
    probability: Array | None = field(repr=False)  # [n, *latent] for units, [n, classes] for a class posterior
    seed: int | None  # None if nothing was drawn
    stats: Stats
    class_probability: Array | None = field(default=None, repr=False)  # [n, classes], beside latents

    @property
    def latents(self) -> Array:
        """Another name of `array`."""
        return self.array

    def __len__(self) -> int:
        return len(self.array)


@dataclass(frozen=True, kw_only=True, eq=False)
class Step(ImageBatch):
    """One evaluation of a denoiser: `array` is the estimate of x0, `[n, *sample]`."""

    noise: Array | None = field(repr=False)  # [n, *sample]; the estimate of eps; a loop may leave it out
    state: Array | None = field(repr=False)  # [n, *sample]; x at the timestep stepped to; None if no step was taken
    stats: Stats

    @property
    def denoised(self) -> Array:
        """Another name of `array`."""
        return self.array


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopStep(Step):
    """One step of a denoising loop."""

    state: Array = field(repr=False)  # [n, *sample]; x at `timestep`
    timestep: int  # where the loop now stands, -1 at the end


@dataclass(frozen=True, eq=False)
class VariationalTerms:
    """What a diffusion model's bound consists of, in nats: value = -(prior + diffusion + reconstruction)."""

    prior: NDArray[np.float64]  # [n]; L_T
    diffusion: NDArray[np.float64]  # [n]; L_1 + ... + L_{T-1}
    reconstruction: NDArray[np.float64]  # [n]; L_0


@dataclass(frozen=True, eq=False)
class Scores:
    """One number for each sample."""

    values: NDArray[np.float64]  # [n]
    kind: str  # log-likelihood (nats), evidence-lower-bound (nats) or real-probability
    stats: Stats
    dimensions: int  # elements of a sample
    terms: VariationalTerms | None = None  # diffusion models only

    @property
    def bits_per_dimension(self) -> NDArray[np.float64] | None:
        """A likelihood or a bound as bits for each element, lower being better, [n]; None for an opinion."""
        if self.kind == "real-probability":
            return None
        return -self.values / (self.dimensions * math.log(2))

    @property
    def array(self) -> NDArray[np.float64]:
        """Another name of `values`."""
        return self.values

    def __len__(self) -> int:
        return len(self.values)


Event = Accepted | Preview | Samples
"""What a stream of samples consists of."""
