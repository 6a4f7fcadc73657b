"""Why an export or an ONNX file was refused, one class per kind."""

from m2mkd.errors import ExportError


class UnsupportedModelError(ExportError):
    """A model or setting that the ONNX forms cannot express."""


class ConversionError(ExportError):
    """PyTorch's exporter failed."""


class InventoryError(ExportError):
    """The graph does not hold the operators, or the precision, that were asked for."""


class LayoutError(ExportError):
    """Expert weights that are missing or not laid out as the runtime reads them."""


class RuntimeLoadError(ExportError):
    """ONNX Runtime is missing, or refuses the file."""


class InterfaceError(ExportError):
    """Inputs or outputs of the file have other names, types or shapes than stated."""


class ParityError(ExportError):
    """The file computes other values than the PyTorch model."""


class ActivationError(ParityError):
    """Values differ because the runtime's GELU is the tanh form and the model's is not."""


class AgreementError(ExportError):
    """The file chooses other classes than the PyTorch model."""


class ModelFileError(ExportError):
    """An ONNX file that is missing, damaged, or was not written by m2mkd."""
