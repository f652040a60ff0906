"""Pictures of a run, and what is shown while it trains."""

import io

import numpy as np
import pytest
from latentd_trainer import plots
from latentd_trainer.progress import Display
from PIL import Image
from rich.console import Console


def opened(png: bytes) -> np.ndarray:
    """Pixels of a PNG."""
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_grid_shows_every_image_in_its_place() -> None:
    """Images stand in rows, enlarged by whole pixels, -1 black and 1 white, with lines between them."""
    images = np.full((5, 1, 8, 8), -1, np.float32)
    images[4] = 1
    picture = opened(plots.grid(images, columns=2))
    factor = picture.shape[1] // 18
    assert picture.shape == (27 * factor, 18 * factor)
    assert (picture[: 8 * factor, : 8 * factor] == 0).all()
    assert (picture[18 * factor : 26 * factor, : 8 * factor] == 255).all()
    assert len(np.unique(picture[8 * factor])) == 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (4, "L")])
def test_grids_are_grey_or_coloured_as_the_images_are(channels: int, mode: str) -> None:
    """Three channels are colours; of any other number the first is shown."""
    assert Image.open(io.BytesIO(plots.grid(np.zeros((3, channels, 8, 8), np.float32), 2))).mode == mode


@pytest.mark.parametrize("lines", [1, 3, 500])
def test_loss_curves_have_a_panel_for_each_loss(lines: int) -> None:
    """Short and long logs are drawn, also where a loss is logged in some steps only."""
    log = [
        {"step": step, "losses": {"loss": 1 / step} | ({"penalty": 1.0} if step % 4 == 1 else {})}
        for step in range(1, lines + 1)
    ]
    picture = opened(plots.curves(log))
    assert picture.shape[0] == 480
    assert picture.std() > 0


def test_an_empty_log_draws_an_empty_picture() -> None:
    """There is nothing to draw, and nothing fails."""
    assert opened(plots.curves([])).size


def test_a_terminal_shows_a_bar_with_losses_and_time_left() -> None:
    """On a terminal progress is a bar, not lines."""
    console = Console(force_terminal=True, width=160, file=io.StringIO())
    display = Display(console)
    with display.running("gan", 0, 4):
        for step in range(1, 5):
            display.advance(step, {"generator": 0.5})
    shown = console.file.getvalue()
    assert "4/4" in shown
    assert "generator 0.5" in shown
    assert "left" in shown
    assert "\x1b[" in shown


def test_elsewhere_progress_is_twenty_plain_lines() -> None:
    """In a file or a pod's log there are no control characters, and a long run takes about twenty lines."""
    console = Console(force_terminal=False, width=160, file=io.StringIO())
    display = Display(console)
    with display.running("gan", 0, 1000):
        for step in range(1, 1001):
            display.advance(step, {"generator": 0.5})
    lines = console.file.getvalue().strip().splitlines()
    assert len(lines) == 20
    assert lines[-1].startswith("gan  1000/1000  generator 0.5")
    assert "\x1b" not in console.file.getvalue()
