"""Fast weight programmers: pluggable linear attention, and the experiments of Schlag, Irie, Schmidhuber (2021)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fwp-lightning")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
