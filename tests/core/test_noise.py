"""Counter-based noise: the generator's known answers, the distribution, and what a draw may depend on."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentd_server.noise import Purpose, labels, normals, philox, uniforms, word
from latentd_server.normal_quantile import log, normal_quantile
from scipy import special, stats

LARGE = 1_000_000


def indices(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def one_row(seed=0, sample=0, step=0, purpose=Purpose.STEP, size=LARGE):
    return normals(indices(seed), indices(sample), indices(step), purpose, size)[0]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, answer):
    """Philox4x32-10 gives the known answers of Random123 (kat_vectors), in every element of an array."""
    columns = np.ones(3, dtype=np.uint64)
    words = philox(np.outer(counter, columns).astype(np.uint64), np.outer(key, columns).astype(np.uint64))
    assert words.tolist() == np.outer(answer, columns).tolist()


def test_layout_of_the_counter():
    """A row's words are those of counter (block, step, sample, purpose) under the seed's two halves."""
    seed, sample, step = -(3 << 40) - 5, 7, 11
    key = np.array([[seed & 0xFFFFFFFF], [(seed >> 32) & 0xFFFFFFFF]], dtype=np.uint64)
    words = [
        philox(np.array([[block], [step], [sample], [Purpose.OUTPUT]], dtype=np.uint64), key)[:, 0] for block in (0, 1)
    ]
    expected = (np.concatenate(words) >> np.uint64(8)).astype(np.float64) / 2**24
    drawn = uniforms(indices(seed), indices(sample), indices(step), Purpose.OUTPUT, 8)
    assert np.array_equal(drawn, expected[None].astype(np.float32))


FIRST_PURPOSES = [Purpose(value) for value in range(7)]
"""Those that the two digests below were taken of; purposes that were added since have digests of their own."""


def test_golden_bytes():
    """The bytes of a fixed draw never change: they are part of what a seed means."""
    seeds = indices(0, 1, -1, 2**63 - 1, -(2**63))
    samples, steps = indices(0, 1, 2, 3, 2**31 - 1), indices(0, 999, 5, 2**31 - 1, 1)
    digest = hashlib.sha256()
    for purpose in FIRST_PURPOSES:
        digest.update(normals(seeds, samples, steps, purpose, 5003).astype("<f4").tobytes())
        digest.update(uniforms(seeds, samples, steps, purpose, 5003).astype("<f4").tobytes())
    digest.update(labels(5, np.arange(1000), np.array([0.2, 0.2, 1.0])).astype("<i8").tobytes())
    assert digest.hexdigest() == "e028f62c036b29b6376dbdcb200a669c5ff43471e3969f5cda59d471f8e23180"
    known = hashlib.sha256(normals(seeds, samples, steps, Purpose.KNOWN, 5003).astype("<f4").tobytes())
    assert known.hexdigest() == "b6e9c127a8befcb5991aa49bdcab1f1df9dbb3a5c97ce7e333b114557a48e78b"


def test_golden_bytes_of_streams():
    """Stream 0 is the purpose itself; the bytes of the others never change either."""
    seeds, samples, steps = indices(0, -1, 5), indices(0, 2, 2**31 - 1), indices(0, 5, 1)
    digest = hashlib.sha256()
    for purpose in FIRST_PURPOSES:
        alone = uniforms(seeds, samples, steps, purpose, 1001)
        assert uniforms(seeds, samples, steps, np.full(3, word(purpose)), 1001).tobytes() == alone.tobytes()
        for stream in (1, 2, 2**20):
            words = np.full(3, word(purpose, stream))
            digest.update(normals(seeds, samples, steps, words, 1001).astype("<f4").tobytes())
            digest.update(uniforms(seeds, samples, steps, words, 1001).astype("<f4").tobytes())
    assert digest.hexdigest() == "17027288b8314c0e33f9a041f42b8320fece674ae6536682df94ee56616cc5ab"


def test_no_two_streams_share_a_counter():
    """The counter's last word tells every purpose and stream apart, within 32 bits."""
    words = {word(purpose, stream) for purpose in Purpose for stream in range(300)} | {word(Purpose.SCORE, 2**24 - 1)}
    assert len(words) == 300 * len(Purpose) + 1
    assert max(words) < 2**32


def test_bytes_do_not_depend_on_vector_code():
    """A process whose NumPy may use none of the CPU's vector extensions draws the same bytes."""
    program = (
        "import hashlib, numpy as np; from latentd_server.noise import *; i = np.arange(3);"
        "print(hashlib.sha256(normals(i, i, i, Purpose.STEP, 50_000).tobytes()).hexdigest())"
    )
    extensions = " ".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))
    plain = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NPY_DISABLE_CPU_FEATURES": extensions},
        capture_output=True,
        text=True,
        check=True,
    )
    i = np.arange(3)
    assert plain.stdout.strip() == hashlib.sha256(normals(i, i, i, Purpose.STEP, 50_000).tobytes()).hexdigest()


def test_quantile_is_accurate():
    """The quantile is within 2e-15 (relative) of scipy's on its whole range, so its float32 is the nearest one."""
    draws = np.random.default_rng(0).integers(0, 2**32, 200_000)
    p = (np.concatenate([draws, [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]]) + 0.5) / 2**32
    exact = special.ndtri(p)
    quantile = normal_quantile(p)
    assert (np.abs(quantile - exact) <= 2e-15 * np.abs(exact)).all()
    assert np.mean(quantile.astype(np.float32) == exact.astype(np.float32)) > 0.9999
    assert np.array_equal(normal_quantile(1 - p), -quantile)


def test_log_is_accurate():
    """The logarithm is within 4 units in the last place of libm's where the quantile needs it."""
    x = np.exp(np.linspace(-25, np.log(0.075), 100_000))
    assert (np.abs(log(x) - np.log(x)) <= 4 * np.spacing(np.abs(np.log(x)))).all()


def test_normals_are_normal():
    """A million draws pass Kolmogorov-Smirnov and have the moments and tails of N(0, 1)."""
    z = one_row(seed=1).astype(np.float64)
    assert stats.kstest(z, "norm").pvalue > 0.01
    assert abs(z.mean()) < 4 / np.sqrt(LARGE)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / LARGE)
    assert abs(stats.skew(z)) < 4 * np.sqrt(6 / LARGE)
    assert abs(stats.kurtosis(z)) < 4 * np.sqrt(24 / LARGE)
    beyond = LARGE * 2 * stats.norm.sf(4)
    assert abs((np.abs(z) > 4).sum() - beyond) < 4 * np.sqrt(beyond)


def test_uniforms_are_uniform():
    """A million draws pass Kolmogorov-Smirnov on [0, 1) and lie on the grid of 2**-24."""
    u = uniforms(indices(1), indices(0), indices(0), Purpose.OUTPUT, LARGE)[0]
    assert stats.kstest(u.astype(np.float64), "uniform").pvalue > 0.01
    assert u.min() >= 0
    assert u.max() < 1
    assert np.array_equal(u * 2**24, np.floor(u * 2**24))


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 1 << 32}, {"seed": -1}, {"sample": 1}, {"step": 1}, {"purpose": Purpose.START}],
    ids=str,
)
def test_streams_are_independent(other):
    """Draws that differ in seed, sample, step or purpose are uncorrelated, element by element and block by block."""
    one, two = one_row(), one_row(**other)
    assert abs(np.corrcoef(one, two)[0, 1]) < 4 / np.sqrt(LARGE)
    assert abs(np.corrcoef(one[4:], two[:-4])[0, 1]) < 4 / np.sqrt(LARGE)
    assert abs(np.corrcoef(one**2, two**2)[0, 1]) < 4 / np.sqrt(LARGE)


def test_elements_are_independent():
    """Neighbouring elements of a row are uncorrelated at the lags within and between blocks."""
    z = one_row()
    for lag in range(1, 9):
        assert abs(np.corrcoef(z[lag:], z[:-lag])[0, 1]) < 4 / np.sqrt(LARGE)


INT64 = st.integers(-(2**63), 2**63 - 1)
INDEX = st.integers(0, 2**31 - 1)


@given(
    rows=st.lists(st.tuples(INT64, INDEX, INDEX), min_size=1, max_size=6),
    size=st.sampled_from([1, 3, 4, 64, 1021]),
    purpose=st.sampled_from(Purpose),
    draw=st.sampled_from([normals, uniforms]),
)
def test_rows_do_not_see_each_other(rows, size, purpose, draw):
    """A row has the same bytes alone, in any crowd, at any place, and as a prefix of a longer row."""
    seeds, samples, steps = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    together = draw(seeds, samples, steps, purpose, size)
    assert together.dtype == np.float32
    assert together.shape == (len(rows), size)
    for i in range(len(rows)):
        alone = draw(seeds[i : i + 1], samples[i : i + 1], steps[i : i + 1], purpose, size + 5)
        assert alone[0, :size].tobytes() == together[i].tobytes()


def test_rows_longer_than_a_chunk():
    """Rows that span the internal chunks, or lie across one's border, have the bytes of rows alone."""
    size = 4 * 4096 + 10
    rows = np.arange(3)
    together = normals(rows, rows, rows, Purpose.START, size)
    for i in range(3):
        one = rows[i : i + 1]
        assert normals(one, one, one, Purpose.START, size).tobytes() == together[i].tobytes()


def test_nothing_to_draw():
    """No rows, or rows of no elements, are empty arrays."""
    assert normals(indices(), indices(), indices(), Purpose.STEP, 4).shape == (0, 4)
    assert normals(indices(1), indices(0), indices(0), Purpose.STEP, 0).shape == (1, 0)


@pytest.mark.parametrize(
    ("samples", "steps", "message"),
    [
        (indices(-1), indices(0), "samples must be from 0 to 2147483647"),
        (indices(0), indices(2**31), "steps must be from 0 to 2147483647"),
        (indices(0, 1), indices(0), "of one length"),
    ],
)
def test_indices_out_of_range(samples, steps, message):
    """An index that does not fit its counter word is refused, not wrapped."""
    with pytest.raises(ValueError, match=message):
        normals(indices(0), samples, steps, Purpose.STEP, 4)


def test_labels_follow_their_distribution():
    """Labels have the given probabilities (chi-square), and a class of probability zero is never drawn."""
    probabilities = np.array([0.0, 0.1, 0.0, 0.5, 0.4, 0.0])
    drawn = labels(3, np.arange(100_000), np.cumsum(probabilities))
    counts = np.bincount(drawn, minlength=6)
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], 100_000 * probabilities[possible]).pvalue > 0.01


def test_labels_of_unnormalised_distribution():
    """Only the proportions count: a running sum that ends in 1/2 gives the labels of one that ends in 1."""
    samples, cumulative = np.arange(10_000), np.cumsum(np.full(10, 0.1))
    assert np.array_equal(labels(1, samples, cumulative / 2), labels(1, samples, cumulative))


def test_label_depends_on_its_own_sample_alone():
    """Sample i has the same label whichever others are asked for."""
    cumulative = np.linspace(0.1, 1, 10)
    many = labels(9, np.arange(50), cumulative)
    assert [int(labels(9, indices(i), cumulative)[0]) for i in range(50)] == many.tolist()


@given(seed=st.integers(-(2**63), 2**63 - 1), first=st.integers(0, 2**31 - 100))
def test_labels_of_few_samples_are_those_of_many(seed, first):
    """One number at a time or all in arrays, for any seed and sample: both ways of counting give the same labels."""
    cumulative = np.cumsum(np.full(1000, 1e-3))
    samples = first + np.arange(100)
    assert labels(seed, samples[:5], cumulative).tolist() == labels(seed, samples, cumulative)[:5].tolist()
