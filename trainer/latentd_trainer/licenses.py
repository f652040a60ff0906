"""Licences as cards name them: SPDX licence expressions, or SPDX's word for what is not known."""

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

UNKNOWN = "NOASSERTION"
"""What a card says where nobody has said anything (SPDX 2.3, clause 3.15)."""


def canonical(text: str) -> str:
    """A licence expression as SPDX writes it: `apache-2.0` becomes `Apache-2.0`; `UNKNOWN` stays.

    Raises:
        ValueError: it is no SPDX licence expression; the message says what is.
    """
    if text.strip().upper() == UNKNOWN:
        return UNKNOWN
    try:
        return canonicalize_license_expression(text)
    except InvalidLicenseExpression as error:
        raise ValueError(
            f"license {text!r}: must be an SPDX expression, as Apache-2.0, or LicenseRef- and a name where SPDX lists "
            f"none, or {UNKNOWN} where it is not known"
        ) from error
