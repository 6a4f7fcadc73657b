"""Running an exported file with ONNX Runtime; needs no PyTorch.

Letters: B batch, C classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m2mkd.export.errors import ModelFileError, RuntimeLoadError
from m2mkd.export.metadata import Metadata, read_metadata

INPUT, OUTPUT = "image", "logits"
_QUIET = 3  # ONNX Runtime's log level for errors only

Floats = npt.NDArray[np.float32]


class OnnxClassifier:
    """An exported file, loaded.

    Attributes:
        metadata: What the file says about itself.
        provider: The execution provider that runs it.
    """

    def __init__(self, path: Path) -> None:
        """Loads a file on the best provider present.

        Raises:
            RuntimeLoadError: ONNX Runtime is missing, or refuses the file.
            ModelFileError: The file is missing or was not written by m2mkd.
        """
        self._session = open_session(path)
        self.provider: str = self._session.get_providers()[0]
        props: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.metadata: Metadata = read_metadata(props, source=str(path))

    def logits(self, images: Floats) -> Floats:
        """Maps prepared images [B, channels, H, W], float32, to logits [B, C], float32."""
        return run_session(self._session, images)

    def probabilities(self, images: Floats) -> Floats:
        """Maps prepared images [B, channels, H, W], float32, to probabilities [B, C], float32."""
        logits = self.logits(images)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        result: Floats = weights / weights.sum(axis=1, keepdims=True)
        return result


def open_session(path: Path, *, use_cuda: bool = True) -> Any:
    """Opens an ONNX Runtime session.

    Args:
        path: An ONNX file.
        use_cuda: Run on CUDA where ONNX Runtime has it; otherwise always on the CPU.

    Raises:
        RuntimeLoadError: ONNX Runtime is missing, or refuses the file.
        ModelFileError: There is no such file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeLoadError(
            f"ONNX Runtime cannot be imported ({error}); `pip install m2mkd[serve]`, or m2mkd[gpu] "
            "for CUDA"
        ) from error
    if not path.is_file():
        raise ModelFileError(f"{path} does not exist, or is not a file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    providers = ["CUDAExecutionProvider"] if use_cuda and has_cuda else []
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=[*providers, "CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime's errors have no common base class
        reason = " ".join(str(error).split())
        raise RuntimeLoadError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {reason}; a damaged file "
            "has to be copied or exported again"
        ) from error


def run_session(session: Any, images: Floats) -> Floats:
    """Runs images [B, channels, H, W] through a session and returns logits [B, C].

    Raises:
        RuntimeLoadError: The runtime stops with an error.
    """
    try:
        (logits,) = session.run([OUTPUT], {INPUT: images})
    except Exception as error:  # the runtime's errors have no common base class
        reason = " ".join(str(error).split())
        raise RuntimeLoadError(
            f"ONNX Runtime failed on a batch {images.shape}: {reason}"
        ) from error
    result: Floats = logits
    return result
