"""Loading training data, and what is said of data that cannot be loaded."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from latentd_trainer.data import UNLABELLED, DataError, batch_indices, load, scale
from PIL import Image


def images(count: int, *shape: int) -> np.ndarray:
    """Random 8-bit images."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def idx(array: np.ndarray, kind: int = 0x08) -> bytes:
    """An IDX file's bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def test_digits_are_split_once_and_for_all() -> None:
    """The embedded digits keep 8 x 8 pixels and 17 levels, and are split 1437 to 360 with every class in its share."""
    digits = load("digits")
    assert digits.train.pixels.shape == (1437, 1, 8, 8)
    assert digits.test.pixels.shape == (360, 1, 8, 8)
    assert (digits.info.levels, digits.info.class_names) == (17, tuple("0123456789"))
    assert np.bincount(digits.test.labels).min() >= 35
    assert digits.info.sha256 == "6a812af8365b27b7ec02d34500f780068c2c6659fd92ac09c86758d8ab34538c"
    assert sum(digits.info.class_probabilities) == pytest.approx(1)


def test_the_test_split_shares_no_image_with_the_training_split(tmp_path: Path) -> None:
    """Every image is in one of the splits, and none in both."""
    np.savez(tmp_path / "set.npz", x=np.arange(100, dtype=np.uint8).reshape(100, 1, 1).repeat(64, 1).reshape(100, 8, 8))
    loaded = load(str(tmp_path / "set.npz"))
    train, test = (split.pixels[:, 0, 0, 0].tolist() for split in (loaded.train, loaded.test))
    assert sorted(train + test) == list(range(100))
    assert len(test) == 20


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_scale_maps_the_levels_onto_minus_one_to_one(levels: int) -> None:
    """The darkest level is -1, the lightest 1, and the steps between are equal."""
    scaled = scale(np.arange(levels, dtype=np.uint8), levels)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, np.linspace(-1, 1, levels), atol=1e-6)


def test_every_epoch_visits_every_image_once_in_a_new_order() -> None:
    """Batches walk through permutations of the data, across the ends of epochs too."""
    walked = np.concatenate([batch_indices(step, 8, 20, seed=1) for step in range(5)])
    assert sorted(walked[:20]) == sorted(walked[20:]) == list(range(20))
    assert walked[:20].tolist() != walked[20:].tolist()


def test_a_batch_may_be_larger_than_the_data() -> None:
    """A batch of several epochs holds every image as often as it should."""
    assert np.bincount(batch_indices(3, 30, 10, seed=0)).tolist() == [3] * 10


@pytest.mark.parametrize(
    ("stored", "shape"),
    [((40, 8, 10), (1, 8, 10)), ((40, 3, 8, 10), (3, 8, 10)), ((40, 8, 10, 3), (3, 8, 10))],
)
def test_npz_layouts(tmp_path: Path, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Images may lie as [n, H, W], [n, C, H, W] or [n, H, W, C]; labels become indices into the sorted class names."""
    np.savez(tmp_path / "set.npz", images=images(*stored), labels=np.arange(40) % 2 * 5 + 2)
    loaded = load(str(tmp_path / "set.npz"))
    assert loaded.info.shape == shape
    assert loaded.info.class_names == ("2", "7")
    assert set(loaded.train.labels) == {0, 1}
    assert loaded.info.levels == 256


def test_npz_with_its_own_test_part(tmp_path: Path) -> None:
    """Arrays x_train, y_train, x_test, y_test keep their split; `levels` says how many grey levels there are."""
    np.savez(
        tmp_path / "set.npz",
        x_train=images(12, 8, 8) % 4,
        y_train=np.arange(12) % 3,
        x_test=images(3, 8, 8) % 4,
        y_test=np.arange(3),
        levels=4,
    )
    loaded = load(str(tmp_path / "set.npz"))
    assert (len(loaded.train.labels), loaded.test.labels.tolist(), loaded.info.levels) == (12, [0, 1, 2], 4)


def test_npz_without_labels_is_one_class(tmp_path: Path) -> None:
    """Unlabelled data train a model of one class."""
    np.savez(tmp_path / "set.npz", x=images(10, 8, 8))
    loaded = load(str(tmp_path / "set.npz"))
    assert loaded.info.class_names == (UNLABELLED,)
    assert set(loaded.train.labels) == {0}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 8, 8))}, "pixels must be integers .* found float64"),
        ({"x": images(4, 8)}, r"images must have shape .* found \[4, 8\]"),
        ({"x": images(4, 8, 8), "y": np.zeros(3, int)}, "4 images but 3 labels"),
        ({"x": images(4, 8, 8), "y": np.zeros(4)}, "labels must be integers .* found float64"),
        ({"x": images(4, 8, 8), "y": np.arange(4)}, "every class needs at least 2 images"),
        ({"x": images(4, 8, 8), "levels": 4}, "pixels must be from 0 to 3"),
        ({"x": images(4, 8, 8), "levels": 1}, "`levels` must be one integer from 2 to 256"),
        ({"x": images(4, 8, 8), "levels": [256, 256]}, r"one integer from 2 to 256, found int64 \[256, 256\]"),
        ({"x": images(40, 8, 8), "y": np.arange(40)}, r"too few in: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 30 more$"),
        ({"pictures": images(4, 8, 8)}, "must hold arrays named x and y.*found pictures"),
        ({"x": np.array([{}])}, "without pickled objects"),
        ({"x": images(0, 8, 8)}, "there are no images"),
        (
            {
                "x_train": images(4, 8, 8),
                "y_train": np.zeros(4, int),
                "x_test": images(2, 8, 8),
                "y_test": np.ones(2, int),
            },
            r"test labels \[1\] do not occur",
        ),
        ({"x_train": images(4, 8, 8), "y_train": np.zeros(4, int), "x_test": images(2, 8, 8)}, "no y_test"),
        ({"x_train": images(4, 8, 8), "x_test": images(2, 8, 6)}, "test images are"),
    ],
)
def test_npz_that_cannot_be_trained_on(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    """Each defect of an .npz file is named, with the file and what is allowed."""
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(DataError, match=f"(?s)wrong.*{message}"):
        load(str(tmp_path / "wrong.npz"))


def test_truncated_npz(tmp_path: Path) -> None:
    """A file cut short is named."""
    np.savez(tmp_path / "cut.npz", x=images(10, 8, 8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    with pytest.raises(DataError, match=r"cut\.npz: cannot be read"):
        load(str(tmp_path / "cut.npz"))


def test_bare_array_in_npz(tmp_path: Path) -> None:
    """A .npy array under the name of an archive is told from one."""
    with open(tmp_path / "bare.npz", "wb") as file:
        np.save(file, images(4, 8, 8))
    with pytest.raises(DataError, match=r"bare\.npz: holds one bare array"):
        load(str(tmp_path / "bare.npz"))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx_folder(tmp_path: Path, separator: str, zipped: bool) -> None:
    """A folder with MNIST's file names in either spelling, gzip or not, keeps MNIST's split."""
    parts = {
        "train-images-idx3-ubyte": images(20, 28, 28),
        "train-labels-idx1-ubyte": (np.arange(20) % 2).astype(np.uint8),
        "t10k-images-idx3-ubyte": images(6, 28, 28),
        "t10k-labels-idx1-ubyte": (np.arange(6) % 2).astype(np.uint8),
    }
    for name, array in parts.items():
        data = idx(array)
        name = name.replace("-idx", f"{separator}idx") + (".gz" if zipped else "")
        (tmp_path / name).write_bytes(gzip.compress(data) if zipped else data)
    loaded = load(str(tmp_path))
    assert loaded.info.shape == (1, 28, 28)
    np.testing.assert_array_equal(loaded.train.pixels[:, 0], parts["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(loaded.test.labels, parts["t10k-labels-idx1-ubyte"])


def test_idx_file_with_labels_beside_it(tmp_path: Path) -> None:
    """One file of images finds its labels, gzipped or not, and is split."""
    (tmp_path / "my-images.idx3-ubyte").write_bytes(idx(images(20, 8, 8)))
    (tmp_path / "my-labels.idx1-ubyte.gz").write_bytes(gzip.compress(idx((np.arange(20) % 2 + 3).astype(np.uint8))))
    loaded = load(str(tmp_path / "my-images.idx3-ubyte"))
    assert loaded.info.class_names == ("3", "4")
    assert (len(loaded.train.labels), len(loaded.test.labels)) == (16, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a-images-idx3-ubyte", idx(images(4, 8, 8))[:-1], r"header says \[4, 8, 8\], 256 bytes, but 255 follow"),
        ("a-images-idx3-ubyte", idx(images(4, 8, 8))[:9], "cut short"),
        ("a-images-idx3-ubyte", idx(np.zeros((4, 8, 8), np.float32), 0x0D), "unsigned bytes .* found type 0x0d"),
        ("a-images-idx3-ubyte", idx(images(4, 8)), "expected 3 axes, found 2"),
        ("a-images-idx3-ubyte.gz", gzip.compress(idx(images(4, 8, 8)))[:-20], "cut short"),
        ("a-images-idx3-ubyte.gz", b"no gzip", "cannot be read"),
        ("notes.txt", b"no images here", "neither .npz, nor an IDX file, nor a folder"),
    ],
)
def test_idx_that_cannot_be_trained_on(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Each defect of an IDX file is named, with the file."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*({message})"):
        load(str(tmp_path / name))


def test_idx_test_images_without_labels(tmp_path: Path) -> None:
    """Labels for one part and not for the other are refused."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images(4, 8, 8)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images(4, 8, 8)))
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte: training images have labels, these have none"):
        load(str(tmp_path))


def test_image_folder_takes_classes_from_subfolders(tmp_path: Path) -> None:
    """Subfolders, sorted by name, are the classes; hidden files are passed over."""
    for name, grey in (("dark", 10), ("light", 200)):
        (tmp_path / name).mkdir()
        for index in range(5):
            Image.new("L", (10, 8), grey).save(tmp_path / name / f"{index}.png")
    (tmp_path / ".DS_Store").write_bytes(b"")
    loaded = load(str(tmp_path))
    assert loaded.info.class_names == ("dark", "light")
    assert loaded.info.shape == (1, 8, 10)
    assert loaded.train.pixels[loaded.train.labels == 1].mean() == 200


def test_image_folder_without_subfolders_is_one_class(tmp_path: Path) -> None:
    """Images right in the folder are unlabelled; colour gives three channels, first axis."""
    for index in range(5):
        Image.new("RGB", (8, 8), (255, 0, 1)).save(tmp_path / f"{index}.png")
    loaded = load(str(tmp_path))
    assert loaded.info.class_names == (UNLABELLED,)
    assert loaded.train.pixels[0, :, 0, 0].tolist() == [255, 0, 1]


def test_every_defect_of_an_image_folder_is_told_at_once(tmp_path: Path) -> None:
    """Unreadable, truncated, transparent and odd-sized images, an empty class and a stray file are all named."""
    for name in ("a", "b", "empty", "a/nested"):
        (tmp_path / name).mkdir()
    for index in range(3):
        Image.new("L", (8, 8), index).save(tmp_path / "a" / f"{index}.png")
    Image.fromarray(images(1, 64, 64)[0]).save(tmp_path / "b" / "cut.png")
    (tmp_path / "b" / "cut.png").write_bytes((tmp_path / "b" / "cut.png").read_bytes()[:1000])
    Image.new("RGBA", (8, 8)).save(tmp_path / "b" / "clear.png")
    Image.new("L", (8, 9)).save(tmp_path / "b" / "tall.png")
    (tmp_path / "b" / "readme.txt").write_text("hello")
    (tmp_path / "stray.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        load(str(tmp_path))
    lines = str(caught.value).splitlines()
    for name in ("empty: empty", "nested: a folder", "cut.png: unreadable", "clear.png: image mode RGBA"):
        assert sum(name in line for line in lines) == 1, name
    assert any("tall.png: shape [1, 9, 8]" in line and "same size" in line for line in lines)
    assert any("readme.txt: unreadable" in line for line in lines)
    assert any("stray.png: lies beside" in line for line in lines)


def test_many_defects_are_cut_to_a_readable_number(tmp_path: Path) -> None:
    """Of many broken images ten are named, and the rest counted."""
    for index in range(13):
        (tmp_path / f"{index:02}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"(?s)09\.png.*and 3 more$"):
        load(str(tmp_path))


def test_what_the_system_refuses_is_told(tmp_path: Path) -> None:
    """A name that is too long, as any other refusal of the system, is an error in words."""
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        load(str(tmp_path / ("a" * 300)))


def test_empty_folder_and_missing_path(tmp_path: Path) -> None:
    """An empty folder and a path to nothing are named."""
    with pytest.raises(DataError, match="no images in this folder"):
        load(str(tmp_path))
    with pytest.raises(DataError, match="no such file or folder"):
        load(str(tmp_path / "missing"))
