"""The committed stubs load on this protobuf runtime and carry messages."""

import importlib
import warnings
from pathlib import Path

import latentd.v1
import numpy as np
import pytest
from latentd import tensor
from latentd.v1 import generation_service_pb2

STUBS = sorted(path.stem for path in Path(latentd.v1.__path__[0]).glob("*_pb2*.py"))


@pytest.mark.parametrize("stub", STUBS)
def test_a_stub_loads_without_a_warning(stub: str) -> None:
    """Each generated module imports cleanly: the runtime neither refuses it nor calls it outdated."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(importlib.import_module(f"latentd.v1.{stub}"))


def test_every_proto_has_its_stubs() -> None:
    """Each .proto has messages in a stub, and each service file its methods in another."""
    protos = {path.stem for path in Path(latentd.v1.__path__[0]).glob("*.proto")}
    assert protos
    assert set(STUBS) == {f"{proto}_pb2" for proto in protos} | {
        f"{proto}_pb2_grpc" for proto in protos if proto.endswith("_service")
    }


def test_a_request_survives_the_wire() -> None:
    """A nested message with a tensor comes back equal."""
    request = generation_service_pb2.SampleRequest(model="m@1", seed=-1, condition={"codes": [0.5]})
    request.diffusion.start.samples.CopyFrom(tensor.encode(np.arange(6, dtype=np.float16).reshape(2, 3)))
    assert generation_service_pb2.SampleRequest.FromString(request.SerializeToString()) == request
