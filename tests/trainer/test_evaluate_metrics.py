import numpy as np
import pytest
from latentd_trainer import metrics
from scipy import ndimage, stats


def normal_rows(mean: np.ndarray, covariance: np.ndarray, count: int = 200) -> np.ndarray:
    """Rows whose sample mean and covariance are exactly these."""
    rows = np.random.default_rng(0).standard_normal((count, len(mean)))
    rows -= rows.mean(0)
    whitened = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_commuting_covariances() -> None:
    """For diagonal covariances it is |m1 - m2|^2 + sum (s1 - s2)^2."""
    one = normal_rows(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    other = normal_rows(np.array([1.0, 1.0, 0.0]), np.diag([4.0, 4.0, 0.25]))
    assert metrics.frechet_distance(one, other) == pytest.approx((1 + 4) + (1 + 0 + 6.25))


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    """It agrees with the matrix square root of the product, taken by its eigenvalues, and is symmetric."""
    generator = np.random.default_rng(1)
    first, second = (factor @ factor.T + np.eye(4) for factor in generator.standard_normal((2, 4, 4)))
    expected = np.trace(first + second) - 2 * np.sqrt(np.linalg.eigvals(first @ second).real).sum()
    one, other = normal_rows(np.zeros(4), first), normal_rows(np.zeros(4), second)
    assert metrics.frechet_distance(one, other) == pytest.approx(expected)
    assert metrics.frechet_distance(other, one) == pytest.approx(expected)


def test_frechet_distance_to_itself_is_zero_even_without_full_rank() -> None:
    """Features that never fire, as ReLU's may not, do not disturb it."""
    rows = normal_rows(np.zeros(3), np.diag([1.0, 2.0, 3.0])) @ np.eye(3, 6)
    assert metrics.frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_needs_two_rows() -> None:
    """One row fits no normal."""
    with pytest.raises(ValueError, match="needs two rows on each side, got 1 and 3"):
        metrics.frechet_distance(np.zeros((1, 2)), np.zeros((3, 2)))


def brute_force(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """The definitions, word for word, one pair at a time."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(rows: np.ndarray, index: int) -> float:
        return sorted(distance(rows[index], rows[j]) for j in range(len(rows)) if j != index)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    generated_radii = [radius(generated, j) for j in range(len(generated))]
    inside = [[distance(r, g) < real_radii[i] for g in generated] for i, r in enumerate(real)]
    precision = np.mean([any(inside[i][j] for i in range(len(real))) for j in range(len(generated))])
    recall = np.mean([any(distance(r, g) < generated_radii[j] for j, g in enumerate(generated)) for r in real])
    density = sum(map(sum, inside)) / (k * len(generated))
    coverage = np.mean([any(row) for row in inside])
    return float(precision), float(recall), float(density), float(coverage)


@pytest.mark.parametrize("seed", range(5))
def test_neighbourhoods_agree_with_their_definitions(seed: int) -> None:
    """Precision, recall, density and coverage equal what the papers' definitions give pair by pair."""
    generator = np.random.default_rng(seed)
    real, generated = generator.standard_normal((30, 3)), 0.8 * generator.standard_normal((25, 3)) + 0.3
    found = metrics.neighbourhoods(real, generated, 3)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(
        brute_force(real, generated, 3)
    )


def test_a_dropped_mode_shows_in_recall_and_coverage_only() -> None:
    """Samples of one of two real clusters are all precise, and reach half of the real images."""
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((2, 300, 2)) + np.array([[[-20.0, 0]], [[20.0, 0]]])
    samples = generator.standard_normal((300, 2)) + np.array([-20.0, 0])
    found = metrics.neighbourhoods(np.concatenate([left, right]), samples)
    assert found.precision > 0.95
    assert found.density == pytest.approx(1, abs=0.1)
    assert found.recall == pytest.approx(0.5, abs=0.02)
    assert found.coverage == pytest.approx(0.5, abs=0.02)


def test_an_outlier_among_real_images_raises_precision_but_hardly_density() -> None:
    """What density and coverage were made for: one far real image makes a huge ball that any sample is in."""
    generator = np.random.default_rng(0)
    real = np.concatenate([generator.standard_normal((200, 2)), [[100.0, 100.0]]])
    samples = generator.standard_normal((200, 2)) + 30
    found = metrics.neighbourhoods(real, samples)
    assert found.precision == 1
    assert found.density == pytest.approx(1 / metrics.NEIGHBOURS)
    assert found.coverage == pytest.approx(1 / 201)


def test_neighbourhoods_need_more_rows_than_neighbours() -> None:
    """With five rows there is no fifth other row."""
    with pytest.raises(ValueError, match="needs more than k = 5 rows on each side, got 9 and 5"):
        metrics.neighbourhoods(np.zeros((9, 2)), np.zeros((5, 2)))


def test_copies_have_a_neighbour_ratio_of_zero_and_new_images_of_one() -> None:
    """Copied training rows are at distance 0; rows of the same distribution are as far as held-out ones."""
    train, held_out, new = np.random.default_rng(0).standard_normal((3, 500, 4))
    assert metrics.nearest_neighbour_ratio(train[:300], train, held_out) == 0
    assert metrics.nearest_neighbour_ratio(new, train, held_out) == pytest.approx(1, abs=0.1)


def test_held_out_copies_cannot_be_a_reference() -> None:
    """If held-out rows lie on training rows, the ratio has no denominator, and the error says so."""
    rows = np.arange(6.0).reshape(3, 2)
    with pytest.raises(ValueError, match="held-out rows are copies of training rows"):
        metrics.nearest_neighbour_ratio(rows, rows, rows)


def test_class_histogram_distance_is_total_variation() -> None:
    """Half of the sum of differences in share; sizes may differ."""
    one, other = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0, 0, 0, 1, 2])
    assert metrics.class_histogram_distance(one, other, 4) == pytest.approx(0.5 * (0.25 + 0.375 + 0.125))
    assert metrics.class_histogram_distance(one, one, 4) == 0
    assert metrics.class_histogram_distance(one, np.array([3]), 4) == 1


def test_agreement_is_the_share_of_equal_labels() -> None:
    """Three of four agree."""
    assert metrics.agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 0])) == 0.75


def test_bits_per_dimension_of_a_uniform_distribution() -> None:
    """A uniform guess over 16 levels costs 4 bits a pixel."""
    assert metrics.bits_per_dimension(-64 * np.log(16), 64) == pytest.approx(4)


def test_importance_weighting_tightens_the_bound_to_the_evidence() -> None:
    """With log weights N(m, s^2), one draw gives m in the mean, many give ln E w = m + s^2 / 2; no overflow."""
    weights = np.random.default_rng(0).normal(-1000, 0.5, (5000, 40)).astype(np.float32)
    bounds = metrics.importance_weighted_bound(weights)
    assert bounds.shape == (40,)
    assert bounds.mean() == pytest.approx(-1000 + 0.125, abs=0.01)
    assert metrics.importance_weighted_bound(weights[:1]) == pytest.approx(weights[0])


def test_normal_divergence_agrees_with_its_definition() -> None:
    """The closed form equals the integral of q ln(q / p), and is averaged over rows."""
    mean, log_variance = np.array([[0.5, 0.0], [0.5, 1.0]]), np.array([[-1.0, 0.0], [-1.0, 0.0]])
    found = metrics.normal_divergence(mean, log_variance)
    q, p = stats.norm(0.5, np.exp(-0.5)), stats.norm()
    assert found[0] == pytest.approx(q.expect(lambda x: q.logpdf(x) - p.logpdf(x)))
    assert found[1] == pytest.approx(0.25)


def test_mutual_information_of_units() -> None:
    """A copy shares ln 2, a noisy copy what Bernoulli entropies say, and independent units nothing in the mean."""
    generator = np.random.default_rng(0)
    coin = generator.random(40_000) < 0.5
    noisy = coin ^ (generator.random(40_000) < 0.1)
    assert metrics.pairwise_mutual_information(np.stack([coin, coin], 1)) == pytest.approx(np.log(2), abs=1e-3)
    shared = np.log(2) + 0.1 * np.log(0.1) + 0.9 * np.log(0.9)
    assert metrics.pairwise_mutual_information(np.stack([coin, noisy], 1)) == pytest.approx(shared, abs=0.01)
    few = [metrics.pairwise_mutual_information(generator.random((50, 12)) < 0.4) for _ in range(40)]
    assert abs(np.mean(few)) < 5e-4  # without the correction 1 / 100
    constant = np.stack([coin[:100], np.ones(100, bool)], 1)
    assert metrics.pairwise_mutual_information(constant) == pytest.approx(-1 / 200)
    with pytest.raises(ValueError, match="needs two units, got 1"):
        metrics.pairwise_mutual_information(coin[:, None])


def test_codes_near_their_ends_are_counted() -> None:
    """Half of these lie within .1 of 0 or of 1."""
    assert metrics.near_binary_share(np.array([[0.0, 0.05, 0.2], [0.5, 0.95, 0.85]])) == 0.5


def test_laplacian_power_is_that_of_scipy_s_laplacian() -> None:
    """Over inner pixels, every channel; zero for a plane, and lower for a blurred image."""
    images = np.random.default_rng(0).uniform(-1, 1, (3, 2, 6, 5)).astype(np.float32)
    expected = ndimage.laplace(images.astype(np.float64), axes=(2, 3))[:, :, 1:-1, 1:-1]
    assert metrics.laplacian_power(images) == pytest.approx(np.square(expected).mean(), rel=1e-5)
    blurred = ndimage.gaussian_filter(images, (0, 0, 1, 1))
    assert metrics.laplacian_power(blurred) < 0.3 * metrics.laplacian_power(images)
    plane = np.add.outer(np.arange(6.0), 2 * np.arange(5.0))[None, None]
    assert metrics.laplacian_power(plane) == pytest.approx(0)


def test_laplacian_power_needs_inner_pixels() -> None:
    """Two pixels on a side have none."""
    with pytest.raises(ValueError, match="3 x 3 pixels or more, got 2 x 8"):
        metrics.laplacian_power(np.zeros((1, 1, 2, 8)))
