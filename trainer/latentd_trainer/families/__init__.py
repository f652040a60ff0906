"""One file for each family of generative models, and what all of them have in common.

`FAMILIES` names them. Importing this package is quick: torch comes in with `load_family`.
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import nn

    from latentd_trainer.data import DataInfo
    from latentd_trainer.optimization import Average, Updater
    from latentd_trainer.shard import Shard
    from latentd_trainer.spec import ServingSpec

FAMILIES = {
    "naive_bayes": "NaiveBayes",
    "sigmoid_belief_net": "SigmoidBeliefNet",
    "helmholtz": "HelmholtzMachine",
    "predictability_minimization": "PredictabilityMinimization",
    "vae": "Vae",
    "gan": "Gan",
    "infogan": "InfoGan",
    "vae_gan": "VaeGan",
    "diffusion": "Diffusion",
}
"""Every family by its name on the command line, and its class in the module of that name."""


T = TypeVar("T")


def setting(default: T, help: str) -> T:
    """A field of a family's configuration: its default is the recipe for digits, `help` is shown to people."""
    value: T = field(default=default, metadata={"help": help})
    return value


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one step: its part of the step's global batch."""

    images: torch.Tensor  # [n, C, H, W] f32 in [-1, 1]
    labels: torch.Tensor  # [n] i64


@dataclass(frozen=True)
class Moment:
    """Where in training a step is, and where its randomness comes from.

    The generator is seeded from (seed, step) alone and is the same in every process, so that a step does not
    depend on what ran before it. Draw for the whole global batch, then take `shard.rows` of the draw.
    """

    step: int  # from 0
    step_count: int
    generator: torch.Generator  # on the CPU
    shard: Shard
    autocast: Callable[[], AbstractContextManager[object]]  # for the networks' forward passes


class Family(ABC):
    """A model of one family while it is trained: networks, optimisers, averages.

    A family's class takes `(config, info)`, with its own `config_type`, and initialises its weights from torch's
    global generator. Everything that a checkpoint must hold is in `modules`, `frozen`, `averages`
    and `updaters`.
    """

    config_type: ClassVar[type[Any]]
    """A frozen dataclass of `setting`s, and of `steps` and `batch_size` (0 is all images) at least."""

    starts_from: ClassVar[str] = ""
    """The family whose trained run it goes on from; empty for one that starts with fresh weights."""

    inherited: ClassVar[Sequence[str]] = ()
    """Settings that it takes from that run."""

    takes_latents: ClassVar[bool] = False
    """Whether it may be trained on latents in place of images; `Batch.images` and `sample` are these then."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings that belong together, by name: recipes for other data than the defaults are for."""

    modules: Mapping[str, nn.Module]
    """What is trained."""
    frozen: Mapping[str, nn.Module]
    """What is served as it was given, untrained."""
    averages: Mapping[str, Average]
    """Moving averages of some of `modules`: what is served."""
    updaters: Mapping[str, Updater]
    """What trains them."""

    def __init__(self, config: Any, info: DataInfo) -> None:
        self.config = config
        self.info = info
        self.frozen = {}

    def start_from(self, trained: Family) -> None:
        """Take over what a run of the family `starts_from` has trained, with the settings in `inherited`."""
        raise TypeError(f"{type(self).__name__} starts with fresh weights")

    @abstractmethod
    def step(self, batch: Batch, moment: Moment) -> dict[str, torch.Tensor]:
        """Do one training step; return this process's part of the losses ([] f32, detached) by name."""

    @abstractmethod
    def sample(self, labels: torch.Tensor, seed: int) -> torch.Tensor:
        """Draw one sample for each label.

        This is the trainer's own sampler, for pictures and metrics. It shares no code with the server's, so that
        each can be tested against the other.

        Args:
            labels: [n] i64.
            seed: for all n draws.

        Returns:
            [n, C, H, W] f32 in [-1, 1] on the CPU.
        """

    @abstractmethod
    def serving_spec(self) -> ServingSpec:
        """The graphs to export, with averaged weights, and what a server must know of them."""


def load_family(name: str) -> type[Family]:
    """The class of the family with this name.

    Raises:
        ValueError: no family has this name; the message lists those there are.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}: must be one of {', '.join(FAMILIES)}")
    module = importlib.import_module(f"latentd_trainer.families.{name}")
    family: type[Family] = getattr(module, FAMILIES[name])
    return family


def preset_settings(family: type[Family], name: str) -> dict[str, str]:
    """The settings of a family's preset, as `NAME=VALUE` texts.

    Raises:
        ValueError: it has no preset of this name; the message lists those it has.
    """
    if name not in family.presets:
        known = f"must be one of {', '.join(family.presets)}" if family.presets else "this family has none"
        raise ValueError(f"unknown preset {name!r}: {known}")
    return {setting: str(value) for setting, value in family.presets[name].items()}


def below(config: Any, **least: float) -> list[str]:
    """A sentence for each of a configuration's fields that is not at least this much."""
    return [
        f"{name}={getattr(config, name)}: must be at least {bound}"
        for name, bound in least.items()
        if not getattr(config, name) >= bound  # false for NaN too
    ]


def outside(config: Any, **ranges: tuple[float, float]) -> list[str]:
    """A sentence for each of a configuration's fields that is not in this range, both ends included."""
    return [
        f"{name}={getattr(config, name)}: must be from {least} to {most}"
        for name, (least, most) in ranges.items()
        if not least <= getattr(config, name) <= most
    ]


def parse_settings(config_type: type[Any], settings: Mapping[str, str]) -> Any:
    """A configuration from `NAME=VALUE` texts; what is not given keeps its default.

    Raises:
        ValueError: unknown names or values that do not parse; the message lists all of them.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(config_type)}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, text in settings.items():
        if name not in fields:
            problems.append(f"unknown setting {name!r}: must be one of {', '.join(fields)}")
            continue
        kind: type[Any] = type(fields[name].default)
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            problems.append(f"{name}={text!r}: must be {'true or false' if kind is bool else kind.__name__}")
    if not problems:
        try:
            return config_type(**values)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems))
