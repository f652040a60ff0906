"""Samples as pictures: values, grids, animations, files."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentd.v1 import generation_service_pb2 as pb
from latentd_client import images
from latentd_client.results import Decoded, Samples, Stats
from PIL import Image


def samples(array: Any, value_range: tuple[float, float] = (-1.0, 1.0)) -> Samples:
    """A result that holds an array."""
    return Samples(
        array=np.asarray(array),
        value_range=value_range,
        indices=np.arange(len(array)),
        labels=np.arange(len(array)),
        latents=None,
        seed=7,
        model="toy@1",
        determinism_class="a",
        resolved_request=pb.SampleRequest(model="toy@1", seed=7),
        stats=Stats(),
    )


def test_the_value_range_maps_to_bytes() -> None:
    """The ends of the range are black and white, values outside are clipped, halves round to even."""
    array = np.array([-2, -1, 0, 1, 3, 1 / 255 - 1 + 1 / 255], np.float64).reshape(1, 1, 1, 6)
    assert images.to_uint8(array, (-1, 1)).ravel().tolist() == [0, 0, 128, 255, 255, 1]
    assert images.to_uint8(np.array([[[[0.5, 1.5, 2.5]]]]), (0, 255)).ravel().tolist() == [0, 2, 2]


def test_bytes_pass_unchanged() -> None:
    """UINT8 samples are the pixels."""
    array = np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2)
    np.testing.assert_array_equal(images.to_uint8(array, (0, 255)), np.moveaxis(array, 1, -1))


@pytest.mark.parametrize(
    ("shape", "pixels"), [((2, 1, 3, 4), (2, 3, 4)), ((2, 3, 3, 4), (2, 3, 4, 3)), ((2, 3, 4), (2, 3, 4))]
)
def test_channels_become_the_last_axis(shape: tuple[int, ...], pixels: tuple[int, ...]) -> None:
    """Grey images lose their channel axis, colour moves it last."""
    assert images.to_uint8(np.zeros(shape), (-1, 1)).shape == pixels


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (2, 5), (2, 1, 1, 1, 1)])
def test_what_is_no_image_says_so(shape: tuple[int, ...]) -> None:
    """Two channels, vectors and volumes cannot be shown."""
    with pytest.raises(ValueError, match="to make pictures"):
        images.to_uint8(np.zeros(shape), (-1, 1))


def test_an_empty_value_range_is_refused() -> None:
    """A model without a value range cannot be drawn by guesswork."""
    with pytest.raises(ValueError, match="value_range must rise"):
        images.to_uint8(np.zeros((1, 1, 2, 2)), (0, 0))


def test_a_grid_has_every_image_in_reading_order() -> None:
    """Cell (r, c) of the grid is image r * columns + c, enlarged without smoothing."""
    pixels = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3)
    canvas = images.grid_pixels(pixels, columns=2, scale=3)
    assert canvas.shape == (3 * 8 - 2, 2 * 11 - 2)
    for index in range(5):
        top, left = index // 2 * 8, index % 2 * 11
        cell = canvas[top : top + 6, left : left + 9]
        np.testing.assert_array_equal(cell, np.kron(pixels[index], np.ones((3, 3), np.uint8)))


def test_small_images_are_enlarged_until_they_can_be_seen() -> None:
    """64 digits of 8x8 make a picture of a few hundred pixels; photographs keep their size."""
    assert 300 < images.grid_pixels(np.zeros((64, 8, 8), np.uint8)).shape[1] < 600
    assert images.grid_pixels(np.zeros((4, 512, 512, 3), np.uint8)).shape == (1026, 1026, 3)


@pytest.mark.parametrize(("columns", "scale"), [(-1, 1), (1, 0)])
def test_impossible_grids_are_refused(columns: int, scale: int) -> None:
    """Columns and scale count from 1."""
    with pytest.raises(ValueError, match="at least 1"):
        images.grid_pixels(np.zeros((2, 2, 2), np.uint8), columns, scale)


def test_nothing_makes_no_grid() -> None:
    """A grid of no images says so."""
    with pytest.raises(ValueError, match="no images"):
        images.grid_pixels(np.zeros((0, 2, 2), np.uint8))


def test_pil_gives_one_picture_each() -> None:
    """`pil` keeps the size unless asked to enlarge."""
    pictures = samples(np.ones((2, 3, 4, 5), np.float32)).pil(scale=2)
    assert [picture.size for picture in pictures] == [(10, 8)] * 2
    assert pictures[0].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".bmp"])
def test_save_writes_the_grid(tmp_path: Path, ending: str) -> None:
    """Any ending Pillow knows is a picture of the grid."""
    path = samples(np.zeros((4, 1, 8, 8), np.float32)).save(tmp_path / f"a{ending}", columns=4, scale=2)
    with Image.open(path) as picture:
        assert picture.size == (4 * 18 - 2, 16)


def test_save_npz_keeps_every_array_and_the_facts(tmp_path: Path) -> None:
    """Arrays come back equal, and the facts say how to draw them again; nothing is pickled."""
    array = np.random.default_rng(0).standard_normal((3, 1, 2, 2)).astype(np.float32)
    path = samples(array).save(tmp_path / "a.npz")
    with np.load(path, allow_pickle=False) as loaded:
        np.testing.assert_array_equal(loaded["samples"], array)
        assert loaded["labels"].tolist() == [0, 1, 2]
        assert json.loads(str(loaded["facts"]))["request"] == {"model": "toy@1", "seed": "7"}


def test_save_npy_keeps_the_samples(tmp_path: Path) -> None:
    """`.npy` is the array alone."""
    array = np.ones((3, 1, 2, 2), np.float32)
    np.testing.assert_array_equal(np.load(samples(array).save(tmp_path / "a.npy")), array)


def test_a_file_without_ending_is_refused(tmp_path: Path) -> None:
    """The ending decides the format, so there must be one."""
    with pytest.raises(ValueError, match="needs an ending"):
        samples(np.ones((1, 1, 2, 2))).save(tmp_path / "a")


def test_facts_leave_out_the_start_point() -> None:
    """The bytes of an image-to-image start do not end up in a picture's text."""
    result = samples(np.ones((1, 1, 2, 2)))
    result.resolved_request.diffusion.start.samples.data = bytes(1000)
    result.resolved_request.diffusion.start.strength = 0.5
    assert result.facts()["request"]["diffusion"] == {"start": {"strength": 0.5}}
    assert len(result.resolved_request.diffusion.start.samples.data) == 1000


def test_notebooks_show_the_grid() -> None:
    """The rich display is a PNG of all samples."""
    png = samples(np.zeros((4, 1, 8, 8), np.float32))._repr_png_()
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.width > 200


def test_the_repr_does_not_print_arrays() -> None:
    """A result shows what it is, not its thousand numbers."""
    result = Decoded(array=np.zeros((500, 1, 9, 9)), value_range=(0, 1), latents=np.zeros(9), seed=None, stats=Stats())
    assert len(repr(result)) < 300


def test_a_gif_repeats_and_rests_on_its_last_frame(tmp_path: Path) -> None:
    """Frames share the duration, the last one is held."""
    frames = [Image.fromarray(np.full((4, 4), shade, np.uint8)) for shade in (0, 100, 255)]
    images.save_gif(frames, tmp_path / "a.gif", duration_s=1.0, hold_s=2.0)
    with Image.open(tmp_path / "a.gif") as animation:
        assert (animation.n_frames, animation.info["loop"]) == (3, 0)
        durations = []
        for index in range(3):
            animation.seek(index)
            durations.append(animation.info["duration"])
    assert durations == [500, 500, 2000]


def test_a_picture_reads_back_as_the_sample_it_was(tmp_path: Path) -> None:
    """Reading inverts writing: bytes to the model's range, channels first."""
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    array = images.read_picture(tmp_path / "a.png", (3, 4, 4), (-1, 1))
    assert (array.shape, array.dtype) == ((3, 4, 4), np.float32)
    np.testing.assert_array_equal(images.to_uint8(array[None], (-1, 1))[0], pixels)
    with pytest.raises(ValueError, match="must be 5 x 5 pixels, is 4 x 4"):
        images.read_picture(tmp_path / "a.png", (1, 5, 5), (-1, 1))
    with pytest.raises(ValueError, match="are not images"):
        images.read_picture(tmp_path / "a.png", (16,), (-1, 1))


def test_without_pillow_arrays_work_and_pictures_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pillow is an extra: everything but pictures works without it."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = samples(np.zeros((1, 1, 2, 2), np.float32))
    assert result.uint8().shape == (1, 2, 2)
    assert result.save(tmp_path / "a.npz").exists()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'latentd\[images\]'"):
        result.grid()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'latentd\[images\]'"):
        result.save(tmp_path / "a.png")


def test_stats_of_parts_add_up() -> None:
    """Evaluations add, durations are the slowest part's, the mean batch is weighted by evaluations."""
    merged = Stats.of_parts([Stats(1.0, 2.0, 10, 4.0), Stats(0.5, 3.0, 30, 8.0)])
    assert merged == Stats(1.0, 3.0, 40, 7.0)
    assert Stats.of_parts([]) == Stats()
