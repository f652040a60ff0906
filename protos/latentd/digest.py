"""What identifies a bundle: a digest over everything that can change a served byte."""

import hashlib
import json

from google.protobuf.json_format import MessageToDict

from latentd.v1 import bundle_pb2


def bundle_digest(bundle: bundle_pb2.Bundle) -> str:
    """`sha256:` and 64 hex digits over the bundle without its card, its own digest and output-only fields.

    The graphs enter through the digests in `networks`. The card is left out, so that adding evaluation
    results does not make a new model of the same weights.
    """
    identity = bundle_pb2.Bundle()
    identity.CopyFrom(bundle)
    for field in ("digest", "state", "failure_reason", "determinism", "card"):
        identity.model.ClearField(field)
    text = json.dumps(MessageToDict(identity), sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
