import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from latentd_trainer import bundle as bundles
from latentd_trainer import verify
from latentd_trainer.checkpoint import RunRecord, build_family
from latentd_trainer.data import load
from latentd_trainer.export import write_bundle
from latentd_trainer.families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_the_networks_that_are_served_export_exactly_and_keep_their_rows(name: str, tmp_path: Path) -> None:
    """Each family's own networks, at the size of its recipe, equal torch and answer rows alike in any batch.

    Weights are random, as some start at zero and would answer nothing; `verify` then rebuilds the networks by the
    registry from the record alone.
    """
    info = load("digits").info
    family = build_family(name, {}, info, seed=0)
    spec = family.serving_spec()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (each for graph in spec.graphs for each in graph.module.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    record = RunRecord(name, {}, "digits", info, 0, "fp32", 1, 1, {})
    directory = write_bundle(spec, record, datetime(2026, 1, 2, tzinfo=UTC), models=tmp_path, name="tiny")
    proofs = bundles.read_record(directory)["export"]["parity"]
    assert proofs.keys() == {path.stem for path in directory.glob("*.onnx")}
    assert all(proof["row_invariant"] for proof in proofs.values()), json.dumps(proofs)
    checks = list(verify.check(directory))
    assert [each for each in checks if each.failures or each.skipped] == []
    assert sum(each.name == "equals torch" for each in checks) == len(proofs)
