"""What an exported file says about itself, in ONNX `metadata_props`.

Every field is one `m2mkd.<field>` key with a JSON value, so any program that reads ONNX can use it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from m2mkd.export.errors import ModelFileError

MoEForm = Literal["contrib", "sorted"]

FORMAT = 1
_PREFIX = "m2mkd."


@dataclass
class Metadata:
    """The facts needed to use an exported file.

    Attributes:
        task: Always `image-classification`.
        model: timm name of the network.
        preprocessing: timm data config (input_size, interpolation, mean, std, crop_pct, crop_mode);
            pixels are scaled to [0, 1] first.
        class_names: In the order of the logits.
        recipe: Digest of the recipe that trained the network.
        versions: Of the libraries when it was `trained` and when it was `exported`.
        target: Runtime the file is meant for, `cuda` or `cpu`.
        precision: Of weights and arithmetic, `fp32` or `fp16`; input and output are float32.
        opset: Version of the standard operators.
        moe_form: `contrib`, `sorted`, or None for networks without experts.
        activation: Activation of the experts as trained, or None.
        min_onnxruntime: Oldest ONNX Runtime that has all operators used.
        parity: What verification measured; None for a file that was not verified.
        data: Data section of the recipe, or None.
        format: Version of this list of fields.
    """

    task: str
    model: str
    preprocessing: dict[str, Any]
    class_names: list[str]
    recipe: str
    versions: dict[str, dict[str, str]]
    target: str
    precision: str
    opset: int
    moe_form: MoEForm | None
    activation: str | None
    min_onnxruntime: str
    parity: dict[str, Any] | None
    data: dict[str, Any] | None
    format: int = FORMAT

    def to_props(self) -> dict[str, str]:
        """The fields as ONNX metadata."""
        return {_PREFIX + item.name: json.dumps(getattr(self, item.name)) for item in fields(self)}


def read_metadata(props: Mapping[str, str], *, source: str) -> Metadata:
    """Reads the fields back; `source` is named in errors.

    Raises:
        ModelFileError: The file was not written by m2mkd, or by an incompatible version.
    """
    if _PREFIX + "format" not in props:
        raise ModelFileError(
            f"{source} was not written by `m2mkd export`: it has no m2mkd metadata; "
            "export the run to get a file that says how to use it"
        )
    try:
        found = {
            key.removeprefix(_PREFIX): json.loads(value)
            for key, value in props.items()
            if key.startswith(_PREFIX)
        }
        if found["format"] != FORMAT:
            raise ModelFileError(
                f"{source} has format {found['format']}, this version reads {FORMAT}; "
                "use the version of m2mkd that wrote it, or export again"
            )
        return Metadata(**found)
    except (TypeError, json.JSONDecodeError) as error:
        raise ModelFileError(f"metadata of {source} is damaged: {error}; export it again") from None
