"""The inverse of the normal distribution function, from operations that IEEE 754 rounds exactly.

NumPy does not promise equal bytes of `log`, `exp` or `cos` across versions and CPUs: its vector code and libm's
differ. Here are only + - * / sqrt, comparisons and the exact `frexp`, one rounding each (NumPy fuses none), so
equal input gives equal bytes wherever float64 does.

The approximation is Wichura's AS 241, routine PPND16 (Applied Statistics 37(3), 1988, pp. 477-484), relative error
about 1e-16 before rounding. Its third pair of polynomials, for p nearer to 0 or 1 than exp(-25), is left out: the
nearest that 32 random bits come is 2**-33.
"""

import numpy as np
from numpy.typing import NDArray

Float64s = NDArray[np.float64]

_CENTRE_END = 0.425  # of |p - 1/2|
# Numerator and denominator, from the constant up.
_CENTRE = np.array(
    [
        [3.3871328727963666080e0, 1.0],
        [1.3314166789178437745e2, 4.2313330701600911252e1],
        [1.9715909503065514427e3, 6.8718700749205790830e2],
        [1.3731693765509461125e4, 5.3941960214247511077e3],
        [4.5921953931549871457e4, 2.1213794301586595867e4],
        [6.7265770927008700853e4, 3.9307895800092710610e4],
        [3.3430575583588128105e4, 2.8729085735721942674e4],
        [2.5090809287301226727e3, 5.2264952788528545610e3],
    ]
)[:, :, None]
_TAIL = np.array(
    [
        [1.42343711074968357734e0, 1.0],
        [4.63033784615654529590e0, 2.05319162663775882187e0],
        [5.76949722146069140550e0, 1.67638483018380384940e0],
        [3.64784832476320460504e0, 6.89767334985100004550e-1],
        [1.27045825245236838258e0, 1.48103976427480074590e-1],
        [2.41780725177450611770e-1, 1.51986665636164571966e-2],
        [2.27238449892691845833e-2, 5.47593808499534494600e-4],
        [7.74545014278341407640e-4, 1.05075007164441684324e-9],
    ]
)[:, :, None]
_LOG_2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_ATANH = 1 / (2.0 * np.arange(9) + 1)  # of s^2: atanh(s) / s, to 1e-15 where `log` needs it


def normal_quantile(p: Float64s) -> Float64s:
    """The z for which P(N(0, 1) <= z) = p; [k] f64 from p in [exp(-25), 1 - exp(-25)], [k] f64."""
    q = p - 0.5
    z = q * _ratio(_CENTRE, np.maximum(_CENTRE_END**2 - q * q, 0))
    distance = np.abs(q)
    tail = np.nonzero(distance > _CENTRE_END)[0]
    r = np.sqrt(-log(0.5 - distance[tail]))
    z[tail] = np.copysign(_ratio(_TAIL, r - 1.6), q[tail])
    return z


def log(x: Float64s) -> Float64s:
    """The natural logarithm of positive, normal x = f 2^e, as e log 2 + 2 atanh((f - 1) / (f + 1))."""
    fraction, exponent = np.frexp(x)  # in [1/2, 1)
    small = fraction < _SQRT_HALF
    fraction = np.where(small, fraction + fraction, fraction)  # in [sqrt(1/2), sqrt(2))
    s = (fraction - 1) / (fraction + 1)
    logarithm: Float64s = (exponent - small) * _LOG_2 + 2 * s * _polynomial(_ATANH, s * s)
    return logarithm


def _ratio(coefficients: Float64s, x: Float64s) -> Float64s:
    values = _polynomial(coefficients, x)
    quotient: Float64s = values[0] / values[1]
    return quotient


def _polynomial(coefficients: Float64s, x: Float64s) -> Float64s:
    """Horner's rule; coefficients from the constant up, each a number, or [m, 1] for m polynomials at once."""
    value: Float64s = coefficients[-1] * x
    for coefficient in coefficients[-2:0:-1]:
        value += coefficient
        value *= x
    value += coefficients[0]
    return value
