"""Every error a user can meet. Messages say where, what was expected, what came, and what to do next."""

from __future__ import annotations


class ResqError(Exception):
    """Base of all errors raised on purpose by resq_compiler."""

    def __init__(self, message: str = "", *, node: str | None = None):
        """node: the name of the graph node that the message is about, which dumps mark."""
        super().__init__(message)
        self.node = node


class ConfigError(ResqError):
    """An option, a recipe or a command-line value is not usable."""


class ModelError(ResqError):
    """The model cannot be loaded or is not a decoder this compiler takes."""


class CaptureError(ResqError):
    """torch.export could not turn the model into one graph."""


class TopologyError(ResqError):
    """The graph has a structure that is not understood."""


class DataError(ResqError):
    """Calibration or evaluation data is empty, too short, out of vocabulary or not finite."""


class QuantError(ResqError):
    """A tensor cannot be quantized as asked."""


class PassError(ResqError):
    """A pass failed."""


class VerifyError(PassError):
    """A graph is malformed, or an exact pass changed the model's outputs."""


class CheckpointError(ResqError):
    """A compiled-model directory is damaged, foreign, or from a newer format."""


class ProcessError(ResqError):
    """Another of the processes that share a compile ended, or does not answer."""


class BackendError(ResqError):
    """A backend cannot lower or run the graph."""


class DumpError(ResqError):
    """A directory is not a dump, is one of another version, or cannot be written."""
