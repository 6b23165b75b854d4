"""Time and energy of text-to-video generation: measured, attributed and modelled."""

__version__ = "0.1.0"
