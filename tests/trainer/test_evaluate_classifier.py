from pathlib import Path

import numpy as np
import pytest
import torch
from latentd_trainer import classifier
from latentd_trainer.data import Dataset, load


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "STEPS", 40)


@pytest.mark.usefixtures("_few_steps")
def test_a_short_training_already_tells_digits_apart(digits: Dataset, tmp_path: Path) -> None:
    """Forty steps put most held-out digits into their class, and features have the width they say."""
    yardstick = classifier.load_or_train(digits, tmp_path)
    assert yardstick.accuracy > 0.8
    reading = yardstick.read(np.zeros((3, 1, 8, 8), np.float32))
    assert reading.features.shape == (3, classifier.FEATURES)
    assert reading.labels.shape == (3,)


@pytest.mark.usefixtures("_few_steps")
def test_the_second_time_it_comes_from_the_cache(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same data and seed nothing is trained again, and the weights are the same; another seed is another."""
    first = classifier.load_or_train(digits, tmp_path)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(classifier, "train", lambda *_: pytest.fail("was trained again"))
    second = classifier.load_or_train(digits, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True))
    monkeypatch.undo()
    monkeypatch.setattr(classifier, "STEPS", 2)
    classifier.load_or_train(digits, tmp_path, seed=1)
    assert len(list(tmp_path.iterdir())) == 2
    assert file.exists()


@pytest.mark.usefixtures("_few_steps")
def test_training_is_the_same_every_time_and_leaves_torch_alone(digits: Dataset, tmp_path: Path) -> None:
    """Equal seeds give equal bytes, whatever torch's own generator and thread count are, and neither is changed."""
    files = []
    for index in range(2):
        torch.manual_seed(index)
        before = torch.get_rng_state()
        classifier.load_or_train(digits, tmp_path / str(index))
        assert torch.equal(torch.get_rng_state(), before)
        (file,) = (tmp_path / str(index)).iterdir()
        files.append((file.name, file.read_bytes()))
    assert files[0] == files[1]


@pytest.mark.usefixtures("_few_steps")
def test_a_damaged_cache_is_replaced(digits: Dataset, tmp_path: Path) -> None:
    """A truncated file is not trusted: the classifier is trained again and the file made whole."""
    classifier.load_or_train(digits, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    assert classifier.load_or_train(digits, tmp_path).accuracy > 0.8
    assert file.read_bytes() == whole


@pytest.mark.parametrize(("shape", "classes"), [((1, 4, 4), 3), ((3, 28, 28), 2), ((1, 32, 20), 100), ((2, 7, 9), 5)])
def test_it_adapts_to_the_images(shape: tuple[int, int, int], classes: int) -> None:
    """Any number of channels, size and number of classes gives features and logits."""
    network = classifier.Classifier(shape, classes)
    images = torch.zeros(2, *shape)
    assert network.features(images).shape == (2, classifier.FEATURES)
    assert network(images).shape == (2, classes)


def test_shifts_move_about_half_of_the_images_by_a_pixel() -> None:
    """Every image is the original or its content a pixel further, black behind it, and channels move together."""
    images = torch.arange(2 * 4 * 5, dtype=torch.float32).reshape(1, 2, 4, 5).repeat(400, 1, 1, 1)
    shifted = classifier._shift(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0], (1, 1, 1, 1), value=-1.0)
    allowed = [padded[:, top : top + 4, left : left + 5] for top in range(3) for left in range(3)]
    counts = [sum(torch.equal(image, each) for image in shifted) for each in allowed]
    assert sum(counts) == 400
    assert 180 < counts[4] < 265  # half, and a ninth of the other half
    assert min(counts) > 5
