"""What holds for every test."""

import os

from hypothesis import settings

# No test is decided by a clock: a loaded machine may take its time over an example.
settings.register_profile("untimed", parent=settings.default, deadline=None)
settings.load_profile("untimed")

# Servers that tests start leave nothing in the cache of whoever runs the tests.
os.environ["LATENTD_CACHE"] = "off"
