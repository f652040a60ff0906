"""Counter-based noise: the generator's known answers, the distribution, and what a draw may depend on."""

import hashlib
import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentd_server import noise
from latentd_server.noise import Purpose, Run, labels, runs, word
from latentd_server.normal_quantile import log, normal_quantile
from latentd_server.quantile_table import write_normals
from scipy import special, stats

LARGE = 1_000_000
WORD = 2**64 - 1


def rows_of(seeds, samples, steps, purpose, stream=0):
    """Rows one by one."""
    rows = zip(seeds, samples, steps, strict=True)
    return [run for seed, sample, step in rows for run in runs(word(purpose, stream), seed, [sample], [step])]


def normals(seeds, samples, steps, purpose, size, stream=0):
    return noise.normals(rows_of(seeds, samples, steps, purpose, stream), size)


def uniforms(seeds, samples, steps, purpose, size, stream=0):
    return noise.uniforms(rows_of(seeds, samples, steps, purpose, stream), size)


def normals_of(words: np.ndarray) -> np.ndarray:
    out = np.empty(len(words), np.float32)
    write_normals(words, out)
    return out


def one_row(seed=0, sample=0, step=0, purpose=Purpose.STEP, size=LARGE):
    return normals([seed], [sample], [step], purpose, size)[0]


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 as in Random123: four words of 64 bits."""
    a, b, c, d = (counter >> 64 * i & WORD for i in range(4))
    low, high = key
    for _ in range(10):
        one, two = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = two >> 64 ^ b ^ low, two & WORD, one >> 64 ^ d ^ high, one & WORD
        low, high = low + 0x9E3779B97F4A7C15 & WORD, high + 0xBB67AE8584CAA73B & WORD
    return [a, b, c, d]


def words_of(blocks: list[int]) -> np.ndarray:
    """Words of 64 bits as words of 32, the low one first."""
    return np.array([half for each in blocks for half in (each & 0xFFFFFFFF, each >> 32)], np.uint64)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (0, (0, 0), [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]),
        (2**256 - 1, (WORD, WORD), [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]),
    ],
)
def test_known_answers(counter, key, answer):
    """The generator that the next test compares with gives the known answers of Random123 (kat_vectors)."""
    assert philox(counter, key) == answer


@pytest.mark.parametrize("purpose", Purpose)
def test_layout_of_the_counter(purpose):
    """A row's words are those of the counters that follow (row x blocks, other index), under the seed and purpose."""
    seed, sample, step, stream = -(3 << 40) - 5, 7, 11, 3
    row, other = (step, sample) if purpose in (Purpose.STEP, Purpose.SCORE) else (sample, step)
    first = 2 * row + (other << 64)
    key = (seed & WORD, int(purpose) + (stream << 8))
    expected = words_of(philox(first + 1, key) + philox(first + 2, key))
    assert np.array_equal(
        uniforms([seed], [sample], [step], purpose, 16, stream)[0],
        ((expected >> np.uint64(8)).astype(np.float64) / 2**24).astype(np.float32),
    )
    z = normals([seed], [sample], [step], purpose, 13, stream)[0]
    assert z.tobytes() == normals_of(expected.astype(np.uint32))[:13].tobytes()


def test_golden_bytes():
    """The bytes of a fixed draw never change: they are part of what a seed means."""
    seeds = [0, 1, -1, 2**63 - 1, -(2**63)]
    samples, steps = [0, 1, 2, 3, 2**31 - 1], [0, 999, 5, 2**31 - 1, 1]
    digest = hashlib.sha256()
    for value in range(8):
        for stream in (0, 1, 2, 2**20):
            digest.update(normals(seeds, samples, steps, Purpose(value), 5003, stream).astype("<f4").tobytes())
            digest.update(uniforms(seeds, samples, steps, Purpose(value), 5003, stream).astype("<f4").tobytes())
    digest.update(labels(5, np.arange(1000), np.array([0.2, 0.2, 1.0])).astype("<i8").tobytes())
    assert digest.hexdigest() == "2eba53a04c5464b3a15a65d7dfa052067759d0ef9e56db35521491e251e91873"


def test_stream_0_is_the_purpose_itself():
    """A purpose is its own word."""
    assert [word(purpose) for purpose in Purpose] == list(Purpose)


def test_no_two_streams_share_a_key():
    """The key's second half tells every purpose and stream apart, within 64 bits."""
    words = {word(purpose, stream) for purpose in Purpose for stream in range(300)} | {word(Purpose.SCORE, 2**24 - 1)}
    assert len(words) == 300 * len(Purpose) + 1
    assert max(words) < 2**64


@given(
    indices=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=30),
    purpose=st.sampled_from(Purpose),
    size=st.sampled_from([1, 8, 17]),
)
def test_runs_are_the_rows_that_were_asked_for(indices, purpose, size):
    """However indices lie, the rows are those of runs of one; as many as one call can make lie in one run."""
    samples, steps = [sample for sample, _ in indices], [step for _, step in indices]
    found = runs(word(purpose), 3, samples, steps)
    assert sum(run.length for run in found) == len(indices)
    assert all(not _continues(one, two) for one, two in itertools.pairwise(found))
    alone = normals([3] * len(samples), samples, steps, purpose, size)
    assert noise.normals(found, size).tobytes() == alone.tobytes()


def _continues(one: Run, two: Run) -> bool:
    return one[:2] == two[:2] and one.other == two.other and one.first + one.length == two.first


def test_what_is_drawn_together_is_one_run():
    """Many samples of a start, and many steps of a sample, are made in one call each."""
    assert runs(word(Purpose.START), 5, range(256)) == [Run(5, Purpose.START, 0, 0, 256)]
    assert runs(word(Purpose.STEP), 5, [9] * 8, range(3, 11)) == [Run(5, Purpose.STEP, 3, 9, 8)]


def test_threads_draw_at_once():
    """Threads that draw at the same time do not disturb each other."""
    expected = [one_row(seed=seed, size=5000).tobytes() for seed in range(4)]
    found: dict[int, set[bytes]] = {}

    def draw(seed: int) -> None:
        found[seed] = {one_row(seed=seed, size=5000).tobytes() for _ in range(200)}

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == [{each} for each in expected]


def test_bytes_do_not_depend_on_vector_code():
    """A process whose NumPy may use none of the CPU's vector extensions draws the same bytes."""
    program = (
        "import hashlib; from latentd_server.noise import *;"
        "print(hashlib.sha256(normals(runs(word(Purpose.STEP), 1, range(3)), 50_000).tobytes()).hexdigest())"
    )
    extensions = " ".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))
    plain = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NPY_DISABLE_CPU_FEATURES": extensions},
        capture_output=True,
        text=True,
        check=True,
    )
    drawn = noise.normals(runs(word(Purpose.STEP), 1, range(3)), 50_000)
    assert plain.stdout.strip() == hashlib.sha256(drawn.tobytes()).hexdigest()


def test_quantile_is_accurate():
    """The quantile is within 2e-15 (relative) of scipy's on its whole range, so its float32 is the nearest one."""
    draws = np.random.default_rng(0).integers(0, 2**32, 200_000)
    p = (np.concatenate([draws, [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]]) + 0.5) / 2**32
    exact = special.ndtri(p)
    quantile = normal_quantile(p)
    assert (np.abs(quantile - exact) <= 2e-15 * np.abs(exact)).all()
    assert np.mean(quantile.astype(np.float32) == exact.astype(np.float32)) > 0.9999
    assert np.array_equal(normal_quantile(1 - p), -quantile)


def test_table_is_accurate():
    """A normal is within 8e-8 of its word's quantile, or two units in the last place where that is more."""
    edges = [2**power + step for power in range(1, 32) for step in (-2, -1, 0, 1)] + [0, 2**31 - 1]
    draws = np.random.default_rng(0).integers(0, 2**32, 2_000_000, dtype=np.uint32)
    words = np.concatenate([draws, np.arange(2**20, dtype=np.uint32), np.array(edges, np.uint32)])
    words = np.concatenate([words, ~words])
    signed = words.view(np.int32) + 0.5
    exact = np.copysign(special.ndtri(np.abs(signed) / 2**32), signed)
    z = normals_of(words)
    assert (np.abs(z - exact) <= np.maximum(8e-8, 2 * np.spacing(np.abs(exact).astype(np.float32)))).all()
    assert np.abs(z).max() < 6.34
    assert normals_of(np.zeros(1, np.uint32))[0] == pytest.approx(-special.ndtri(2.0**-33))


def test_normals_are_as_often_above_as_below():
    """Rounding to float32 moves nothing to the other side of 0: the million words next to it, and their complements."""
    words = np.arange(2**31 - 2**20, 2**31, dtype=np.uint32)
    above, below = normals_of(words).astype(np.float64), normals_of(~words).astype(np.float64)
    assert abs((above + below).mean()) < 1e-9
    assert (above >= 0).all()
    assert (below <= 0).all()


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
    u = uniforms([1], [0], [0], Purpose.OUTPUT, LARGE)[0]
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
    size=st.sampled_from([1, 7, 8, 64, 1021]),
    purpose=st.sampled_from(Purpose),
    draw=st.sampled_from([normals, uniforms]),
)
def test_rows_do_not_see_each_other(rows, size, purpose, draw):
    """A row has the same bytes alone, in any crowd and at any place."""
    together = draw(*zip(*rows, strict=True), purpose, size)
    assert together.dtype == np.float32
    assert together.shape == (len(rows), size)
    for i, (seed, sample, step) in enumerate(rows):
        assert draw([seed], [sample], [step], purpose, size)[0].tobytes() == together[i].tobytes()


def test_rows_longer_than_a_chunk():
    """Rows that span the internal chunks, or lie across one's border, have the bytes of rows alone."""
    size, rows = 5 * 4096 + 10, range(3)
    together = normals(rows, rows, rows, Purpose.START, size)
    for i in rows:
        assert normals([i], [i], [i], Purpose.START, size).tobytes() == together[i].tobytes()


def test_nothing_to_draw():
    """No rows, or rows of no elements, are empty arrays."""
    assert normals([], [], [], Purpose.STEP, 4).shape == (0, 4)
    assert normals([1], [0], [0], Purpose.STEP, 0).shape == (1, 0)
    assert uniforms([1, 2], [0, 0], [0, 0], Purpose.STEP, 0).shape == (2, 0)


@pytest.mark.parametrize(
    ("samples", "steps", "message"),
    [
        ([-1], [0], "samples must be from 0 to 2147483647"),
        ([2**31], [0], "samples must be from 0 to 2147483647"),
        ([0], [2**31], "steps must be from 0 to 2147483647"),
        ([0], [-1], "steps must be from 0 to 2147483647"),
        ([0, 1], [0], "of one length"),
    ],
)
@pytest.mark.parametrize("purpose", [Purpose.START, Purpose.STEP])
def test_indices_out_of_range(samples, steps, message, purpose):
    """An index beyond its range is refused, not wrapped."""
    with pytest.raises(ValueError, match=message):
        runs(word(purpose), 0, samples, steps)


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
    assert [int(labels(9, np.array([i]), cumulative)[0]) for i in range(50)] == many.tolist()


@given(seed=st.integers(-(2**63), 2**63 - 1), first=st.integers(0, 2**31 - 100))
def test_labels_of_few_samples_are_those_of_many(seed, first):
    """For any seed and sample, who is asked for beside it changes no label."""
    cumulative = np.cumsum(np.full(1000, 1e-3))
    samples = first + np.arange(100)
    assert labels(seed, samples[:5], cumulative).tolist() == labels(seed, samples, cumulative)[:5].tolist()
