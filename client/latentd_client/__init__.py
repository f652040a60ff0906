"""The latentd client library: numpy in, numpy out, and every sample can be drawn again.

from latentd_client import Client

with Client("127.0.0.1:8500") as client:
    samples = client.sample("digits-diffusion", 16, seed=7, label=3)
    samples.save("threes.png")
"""

from latentd_client.aio import AsyncClient, AsyncDenoiseLoop
from latentd_client.channels import TLS
from latentd_client.errors import (
    Cancelled,
    ClientClosed,
    ClientForked,
    Code,
    DeadlineExceeded,
    DeadlineUnreachable,
    DeterminismChanged,
    Draining,
    FieldsInvalid,
    LatentdError,
    MessageTooLarge,
    MethodUnsupported,
    ModelFailed,
    ModelInUse,
    ModelLoading,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    ProtocolError,
    QuotaExceeded,
    ReaderTooSlow,
    RuntimeFailure,
    ServerUnavailable,
    Unauthenticated,
    Violation,
)
from latentd_client.model import Model
from latentd_client.results import (
    Accepted,
    Decoded,
    Encoded,
    Event,
    LoopStep,
    Preview,
    Samples,
    Scores,
    Stats,
    Step,
    VariationalTerms,
)
from latentd_client.retries import Retries
from latentd_client.sync import Client, DenoiseLoop

__all__ = [
    "TLS",
    "Accepted",
    "AsyncClient",
    "AsyncDenoiseLoop",
    "Cancelled",
    "Client",
    "ClientClosed",
    "ClientForked",
    "Code",
    "DeadlineExceeded",
    "DeadlineUnreachable",
    "Decoded",
    "DenoiseLoop",
    "DeterminismChanged",
    "Draining",
    "Encoded",
    "Event",
    "FieldsInvalid",
    "LatentdError",
    "LoopStep",
    "MessageTooLarge",
    "MethodUnsupported",
    "Model",
    "ModelFailed",
    "ModelInUse",
    "ModelLoading",
    "ModelNotFound",
    "Overloaded",
    "PermissionDenied",
    "Preview",
    "ProtocolError",
    "QuotaExceeded",
    "ReaderTooSlow",
    "Retries",
    "RuntimeFailure",
    "Samples",
    "Scores",
    "ServerUnavailable",
    "Stats",
    "Step",
    "Unauthenticated",
    "VariationalTerms",
    "Violation",
]
