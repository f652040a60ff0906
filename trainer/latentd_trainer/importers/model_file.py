"""The YAML file that says what a model's graphs are: read and checked, every problem at once with its path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import yaml
from latentd import names
from latentd.v1 import model_pb2, tensor_pb2
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveInt, ValidationError, model_validator

from latentd_trainer import licenses
from latentd_trainer.contract import ALLOWED_MEANINGS, ALLOWED_SOURCES, REQUIRED_SOURCES, role_name
from latentd_trainer.importers import ImportingError
from latentd_trainer.importers.walk import Diffusion, Part
from latentd_trainer.importers.words import (
    MEANINGS,
    SOURCES,
    UNUSED,
    Family,
    LikelihoodKind,
    LikelihoodMeasure,
    Meaning,
    Method,
    Role,
    Source,
    words,
)
from latentd_trainer.spec import Likelihood as LikelihoodMessage
from latentd_trainer.spec import Role as Roles
from latentd_trainer.spec import Source as Sources

_Method = model_pb2.Model
_METHODS_OF_ROLE = {
    Roles.ROLE_DECODER: (_Method.METHOD_SAMPLE, _Method.METHOD_DECODE),
    Roles.ROLE_ENCODER: (_Method.METHOD_ENCODE,),
    Roles.ROLE_SCORER: (_Method.METHOD_SCORE,),
    Roles.ROLE_DENOISER: (
        _Method.METHOD_SAMPLE,
        _Method.METHOD_ENCODE,
        _Method.METHOD_DECODE,
        _Method.METHOD_DENOISE,
        _Method.METHOD_SCORE,
    ),
}


class Input(Part):
    """Where one input of a graph comes from. In a file `z: latent` is short for `z: {source: latent}`."""

    source: Source
    shape: tuple[PositiveInt, ...] | None = None  # without the batch axis; what the graph says if not given

    @property
    def is_integer(self) -> bool:
        """Whether it is one whole number a row."""
        return self.source in (Sources.SOURCE_TIMESTEP, Sources.SOURCE_CLASS_LABEL)

    @property
    def data_type(self) -> tensor_pb2.DataType.ValueType:
        """What its values must be."""
        return tensor_pb2.DATA_TYPE_INT64 if self.is_integer else tensor_pb2.DATA_TYPE_FLOAT32


def _short_input(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class GraphEntry(Part):
    """The inputs and outputs of one graph, whatever it is kept in."""

    inputs: dict[str, Annotated[Input, BeforeValidator(_short_input)]] = Field(min_length=1)
    outputs: dict[str, Meaning] = Field(min_length=1)


class OnnxEntry(GraphEntry):
    """A graph in an ONNX file, beside the model file."""

    file: Path


class TorchEntry(GraphEntry):
    """A graph that a function or a class makes: `package.module:name`, called with `arguments`."""

    module: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: Path | None = None  # safetensors, or .pt read as weights only; beside the model file


class SampleSpec(Part):
    """One sample."""

    range: tuple[float, float] = (-1.0, 1.0)
    levels: Annotated[int, Field(ge=2)] | None = None  # evenly spaced values that data have, as 256; else continuous
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None  # [C, H, W]; what the graphs say if not given
    sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = ()  # other [height, width] that a denoiser takes

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.range[0] < self.range[1]:
            raise ValueError(f"range must rise, got {list(self.range)}")
        return self


class LikelihoodEntry(Part):
    """What is known of ln p(sample), or why nothing is."""

    kind: LikelihoodKind
    measure: LikelihoodMeasure = LikelihoodMessage.MEASURE_UNSPECIFIED
    explanation: str = Field(min_length=1)

    def message(self) -> LikelihoodMessage:
        """As the card has it."""
        return LikelihoodMessage(kind=self.kind, measure=self.measure, explanation=self.explanation)


class Latents(Part):
    """What latents are drawn from where a request gives none."""

    prior: Literal["normal", "uniform"] = "normal"  # N(0, 1) or U[0, 1), for each element


def _class_name(value: Any) -> Any:
    # YAML reads `no`, `off` and `y` as truth values, which nobody means as names.
    if isinstance(value, bool):
        raise ValueError("must be a text; YAML reads words like yes and no as truth values, so put it in quotes")
    return str(value) if isinstance(value, int) else value


Entry = TypeVar("Entry", bound=GraphEntry)


class ModelFile(Part, Generic[Entry]):
    """Everything that a model file says."""

    name: str
    family: Family
    graphs: dict[Role, Entry] = Field(min_length=1)
    sample: SampleSpec = SampleSpec()
    latent: Latents = Latents()
    classes: tuple[Annotated[str, BeforeValidator(_class_name)], ...] = ()
    class_probabilities: tuple[float, ...] = ()
    methods: tuple[Method, ...] = ()  # what the graphs can answer if not given
    diffusion: Diffusion | None = None
    description: str = ""
    license: Annotated[str, AfterValidator(licenses.canonical)] = licenses.UNKNOWN  # of the weights
    dataset: str = ""
    dataset_license: Annotated[str, AfterValidator(licenses.canonical)] = licenses.UNKNOWN
    likelihood: LikelihoodEntry | None = None  # what the scorer tells if not given
    reference: str = ""  # the paper's address

    @model_validator(mode="after")
    def _whole(self) -> Self:
        problems = []
        if not names.is_name(self.name):
            problems.append(f"name {self.name!r} must match {names.NAME_PATTERN}, as my-vae does")
        if (Roles.ROLE_DENOISER in self.graphs) != (self.diffusion is not None):
            problems.append("a denoiser and `diffusion` must come together")
        for role, entry in self.graphs.items():
            problems += [f"graphs.{role_name(role)}.{text}" for text in self._place_problems(role, entry)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _place_problems(self, role: Role, entry: Entry) -> list[str]:
        """Sources and meanings that a graph of this role cannot have."""
        found = []
        takes, gives = ALLOWED_SOURCES[role], ALLOWED_MEANINGS[role] | {UNUSED}
        for name, said in entry.inputs.items():
            if said.source not in takes:
                found.append(f"inputs.{name}: a {role_name(role)} takes {', '.join(words(SOURCES, takes))}")
            elif said.source == Sources.SOURCE_CLASS_LABEL and not self.classes:
                found.append(f"inputs.{name}: takes labels, so `classes` must name them")
        for name, meaning in entry.outputs.items():
            if meaning not in gives:
                found.append(f"outputs.{name}: a {role_name(role)} gives {', '.join(words(MEANINGS, gives))}")
        given = {said.source for said in entry.inputs.values()}
        missing = words(SOURCES, REQUIRED_SOURCES[role] - given)
        return found + [f"inputs: one must come from {name}" for name in missing]

    def answered_methods(self) -> tuple[Method, ...]:
        """The methods that were asked for, or all that the graphs can answer."""
        if self.methods:
            return self.methods
        decoder = self.graphs.get(Roles.ROLE_DECODER)
        no_latents = decoder is not None and all(
            entry.source != Sources.SOURCE_LATENT for entry in decoder.inputs.values()
        )
        able = {method for role in self.graphs for method in _METHODS_OF_ROLE[role]}
        return tuple(sorted(able - ({_Method.METHOD_DECODE} if no_latents else set())))


class _Loader(yaml.SafeLoader):
    """YAML without objects, and without keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


Whole = TypeVar("Whole", bound=BaseModel)


def read(path: Path, schema: type[Whole]) -> Whole:
    """Read a model file.

    Raises:
        ImportingError: it cannot be read or is not what it must be; the message lists every problem by its path.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # derives from SafeLoader
    except OSError as error:
        raise ImportingError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ImportingError(f"{path}: is not YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ImportingError(f"{path}: must be a mapping with name, family and graphs at least")
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(f"- {_described(each)}" for each in error.errors())
        raise ImportingError(f"{path}:\n{problems}") from error


def _described(error: Any) -> str:
    """`graphs.decoder.inputs.z.source: must be one of ...`."""
    path = ".".join(str(part) for part in error["loc"] if part != "[key]")
    message = error["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message
