"""What holds for every test."""

from hypothesis import settings

# No test is decided by a clock: a loaded machine may take its time over an example.
settings.register_profile("untimed", parent=settings.default, deadline=None)
settings.load_profile("untimed")
