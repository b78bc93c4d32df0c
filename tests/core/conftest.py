from __future__ import annotations

from hypothesis import settings

# Machines that run tests are often busy: a slow example is no failure.
settings.register_profile("core", deadline=None)
settings.load_profile("core")
