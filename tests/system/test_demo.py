"""What `make demo` left behind: bundles that meet the bars, and pictures."""

from pathlib import Path

import pytest
from google.protobuf.json_format import Parse
from latentd.names import BUNDLE_FILE
from latentd.v1 import bundle_pb2
from latentd_trainer.bars import BARS
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = {family: ROOT / "models" / f"digits-{family}" / "1" for family in ("vae", "gan", "diffusion")}
PICTURES = (
    "samples-vae.png",
    "samples-gan.png",
    "samples-diffusion.png",
    "denoising.gif",
    "reconstruction-vae.png",
    "inversion-diffusion.png",
    "interpolation-vae.png",
    "denoise-steps.png",
)

pytestmark = pytest.mark.skipif(
    not all((directory / BUNDLE_FILE).exists() for directory in BUNDLES.values())
    or not all((ROOT / "out" / name).exists() for name in PICTURES),
    reason="`make demo` has not been run here",
)


@pytest.mark.parametrize("family", BUNDLES)
def test_the_demo_s_models_meet_their_bars(family: str) -> None:
    """Every figure in a card is at least as good as the bar that the project sets itself."""
    model = Parse((BUNDLES[family] / BUNDLE_FILE).read_text(), bundle_pb2.Bundle()).model
    bars = BARS[model.family]
    assert len(bars) >= 3
    assert [why for bar in bars if (why := bar.missed(model.card.metrics))] == []


@pytest.mark.parametrize("name", PICTURES)
def test_the_demo_s_pictures_show_something(name: str) -> None:
    """Every picture opens and uses most of the grey scale."""
    with Image.open(ROOT / "out" / name) as picture:
        darkest, brightest = picture.convert("L").getextrema()
    assert darkest < 30
    assert brightest > 225
