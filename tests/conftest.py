"""Timings never gate a test: a busy machine must not fail a property."""

from hypothesis import settings

settings.register_profile("monde", deadline=None)
settings.load_profile("monde")
