"""The version, for the build and for run folders."""

__version__ = "0.1.0"
