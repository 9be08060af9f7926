"""The version of this library, in a checkout too, which may have no metadata."""

__version__ = "0.1.0"
