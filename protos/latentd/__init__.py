"""The contract of latentd: what two of its processes must agree on. Imports none of our other packages."""

__version__ = "0.1.0"
