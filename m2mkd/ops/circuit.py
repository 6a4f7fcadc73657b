"""Circuits: which receiver attends to which sender (NAC, arXiv 2210.08031 section 3).

Letters: U receivers, V senders, N edges, S signature width.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd.errors import NotFiniteError, ShapeError
from m2mkd.ops import _checks

# Cosines computed at once by `circuit_from_signatures`, so that memory stays linear in U + V.
_BLOCK = 1 << 22
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class Circuit:
    """A sparse graph from V senders to U receivers, by receiver and by sender.

    Edges are numbered by receiver, then by sender; an edge bias follows that order, so from a
    matrix it is `bias_UV[circuit.receiver_of_edge, circuit.sender]`. Circuits are immutable, equal
    where their edges are, and hashable. One that was built or moved in inference mode serves
    training too.

    Attributes:
        row_ptr: First edge of each receiver and N, [U + 1], int32.
        sender: Sender of each edge, [N], int32, rising within a receiver.
        receiver_of_edge: Receiver of each edge, [N], int32.
        col_ptr: First entry of each sender in the transpose and N, [V + 1], int32.
        receiver: Receiver of each entry of the transpose, [N], int32, rising within a sender.
        edge_id: Edge of each entry of the transpose, [N], int32.
    """

    row_ptr: Tensor
    sender: Tensor
    receiver_of_edge: Tensor
    col_ptr: Tensor
    receiver: Tensor
    edge_id: Tensor

    def __init__(self, row_ptr: Tensor, sender: Tensor, num_senders: int) -> None:
        """Checks a compressed sparse row graph and computes its transpose.

        Args:
            row_ptr: First edge of each receiver and N, [U + 1], int32.
            sender: Sender of each edge, [N], int32, strictly rising within a receiver.
            num_senders: V.

        Raises:
            ShapeError: A wrong shape, dtype or device, row_ptr that is not a rising list from 0 to
                N, a sender outside [0, V), unsorted senders, duplicate edges, or sizes that are
                negative or over int32.
        """
        _check_csr(row_ptr, sender, num_senders)
        self._hash: int | None = None
        # Tensors of inference mode could not be kept for a backward pass, and those of the caller
        # may change.
        with torch.inference_mode(False):
            self._fill(row_ptr, sender, num_senders)

    def _fill(self, row_ptr: Tensor, sender: Tensor, num_senders: int) -> None:
        num_receivers = row_ptr.shape[0] - 1
        receivers = torch.arange(num_receivers, device=row_ptr.device)
        receiver_of_edge = receivers.repeat_interleave(
            row_ptr.diff().long(), output_size=sender.shape[0]
        )
        _check_edges(receiver_of_edge, sender)
        edge_id = torch.argsort(sender, stable=True)
        counts = torch.bincount(sender.long(), minlength=num_senders)
        self.row_ptr = row_ptr.clone(memory_format=torch.contiguous_format)
        self.sender = sender.clone(memory_format=torch.contiguous_format)
        self.receiver_of_edge = receiver_of_edge.int()
        self.col_ptr = F.pad(counts.cumsum(0), (1, 0)).int()
        self.receiver = self.receiver_of_edge[edge_id]
        self.edge_id = edge_id.int()

    @staticmethod
    def from_edges(
        receiver: Tensor, sender: Tensor, num_receivers: int, num_senders: int
    ) -> "Circuit":
        """Builds a circuit from edges in any order.

        Args:
            receiver: Receiver of each edge, [N], integers in [0, num_receivers).
            sender: Sender of each edge, [N], integers in [0, num_senders).
            num_receivers: U.
            num_senders: V.

        Raises:
            ShapeError: Shapes, dtypes or devices that do not fit together, numbers out of range,
                duplicate edges, or sizes that are negative or over int32.
        """
        op = "Circuit.from_edges"
        _checks.check_rank(op, "receiver", receiver, "[N]", 1)
        _checks.check_rank(op, "sender", sender, "[N]", 1)
        _checks.check_together(op, "receiver", receiver, sender=sender)
        _checks.check_size(op, "N of sender", sender.shape[0], receiver.shape[0], "N of receiver")
        _check_count(op, "U", num_receivers)
        _check_count(op, "V", num_senders)
        _check_range(op, "receiver", receiver, num_receivers)
        _check_range(op, "sender", sender, num_senders)
        order = torch.argsort(receiver.long() * num_senders + sender.long())
        counts = torch.bincount(receiver.long(), minlength=num_receivers)
        return Circuit(F.pad(counts.cumsum(0), (1, 0)).int(), sender[order].int(), num_senders)

    @staticmethod
    def from_dense(mask_UV: Tensor) -> "Circuit":
        """Builds a circuit with an edge wherever the mask is true (not zero), [U, V].

        Raises:
            ShapeError: A mask that is not a matrix or has no values, or sizes over int32.
        """
        _checks.check_rank("Circuit.from_dense", "mask", mask_UV, "[U, V]", 2)
        _check_values("Circuit.from_dense", "mask", mask_UV)
        receiver, sender = mask_UV.nonzero(as_tuple=True)
        return Circuit.from_edges(receiver, sender, mask_UV.shape[0], mask_UV.shape[1])

    @property
    def num_receivers(self) -> int:
        """U."""
        return self.row_ptr.shape[0] - 1

    @property
    def num_senders(self) -> int:
        """V."""
        return self.col_ptr.shape[0] - 1

    @property
    def num_edges(self) -> int:
        """N."""
        return self.sender.shape[0]

    @property
    def density(self) -> float:
        """N / (U V), between 0 and 1; 0 without receivers or senders."""
        return self.num_edges / max(1, self.num_receivers * self.num_senders)

    @property
    def device(self) -> torch.device:
        """Where the circuit's tensors are."""
        return self.row_ptr.device

    def tensors(self) -> dict[str, Tensor]:
        """The circuit's tensors by attribute name."""
        return {name: getattr(self, name) for name in Circuit.__annotations__}

    def to(self, device: torch.device | str) -> "Circuit":
        """The circuit on another device; itself where it is there already."""
        if self.device == torch.device(device):
            return self
        moved = Circuit.__new__(Circuit)
        with torch.inference_mode(False):
            for name, tensor in self.tensors().items():
                setattr(moved, name, tensor.to(device))
        moved._hash = self._hash
        return moved

    def to_dense(self) -> Tensor:
        """The edges as a boolean matrix, [U, V]."""
        mask_UV = self.row_ptr.new_zeros(self.num_receivers, self.num_senders, dtype=torch.bool)
        mask_UV[self.receiver_of_edge.long(), self.sender.long()] = True
        return mask_UV

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Circuit)
            and self.num_senders == other.num_senders
            and torch.equal(self.row_ptr.cpu(), other.row_ptr.cpu())
            and torch.equal(self.sender.cpu(), other.sender.cpu())
        )

    def __hash__(self) -> int:
        if self._hash is None:
            digest = hashlib.blake2b(str(self.num_senders).encode(), digest_size=8)
            for tensor in (self.row_ptr, self.sender):
                digest.update(tensor.cpu().numpy().tobytes())
            self._hash = int.from_bytes(digest.digest(), "little") >> 1
        return self._hash

    def __repr__(self) -> str:
        return (
            f"Circuit({self.num_receivers} receivers, {self.num_senders} senders, "
            f"{self.num_edges} edges, density {self.density:.3f}, {self.device})"
        )


def _check_count(op: str, letter: str, count: int) -> None:
    if count < 0:
        raise ShapeError(f"{op}: {letter} is {count}; it cannot be negative")
    _checks.check_indexable(op, f"{letter} + 1", count + 1)


def _check_values(op: str, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ShapeError(
            f"{op}: {name} is on the meta device, which holds no values; build the circuit on "
            "another device and move it"
        )


def _check_range(op: str, name: str, index: Tensor, bound: int) -> None:
    if index.dtype not in _INTEGERS:
        raise ShapeError(f"{op}: {name} is {index.dtype}; use integers, such as torch.int32")
    _check_values(op, name, index)
    if index.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(index))
    if low < 0 or high >= bound:
        raise ShapeError(
            f"{op}: {name} numbers run from {low} to {high}; they must lie in [0, {bound})"
        )


def _check_csr(row_ptr: Tensor, sender: Tensor, num_senders: int) -> None:
    op = "Circuit"
    _checks.check_rank(op, "row_ptr", row_ptr, "[U + 1]", 1)
    _checks.check_rank(op, "sender", sender, "[N]", 1)
    _checks.check_indexable(op, "U + 1", row_ptr.shape[0])
    _check_count(op, "V", num_senders)
    _checks.check_indexable(op, "N", sender.shape[0])
    _checks.check_int32(op, "row_ptr", row_ptr)
    _checks.check_int32(op, "sender", sender)
    _checks.check_together(op, "row_ptr", row_ptr, sender=sender)
    if row_ptr.shape[0] == 0:
        raise ShapeError(f"{op}: row_ptr is empty; it has U + 1 entries, [0] without receivers")
    _check_values(op, "row_ptr", row_ptr)
    first, last = int(row_ptr[0]), int(row_ptr[-1])
    if first != 0 or last != sender.shape[0] or bool((row_ptr.diff() < 0).any()):
        raise ShapeError(
            f"{op}: row_ptr must rise from 0 to N={sender.shape[0]}; it starts with {first} and "
            f"ends with {last}"
        )
    _check_range(op, "sender", sender, num_senders)


def _check_edges(receiver: Tensor, sender: Tensor) -> None:
    """Raises ShapeError unless senders rise strictly within each receiver."""
    same = receiver[1:] == receiver[:-1]
    step = sender.diff()
    for bad, what in ((same & (step == 0), "twice"), (same & (step < 0), "out of order")):
        if bool(bad.any()):
            edge = int(bad.nonzero()[0]) + 1
            raise ShapeError(
                f"Circuit: receiver {int(receiver[edge])} has sender {int(sender[edge])} {what}; "
                "senders must rise within a receiver (Circuit.from_edges sorts them)"
            )


def circuit_from_signatures(
    receiver_sig_US: Tensor, sender_sig_VS: Tensor, truncation: float
) -> Circuit:
    """Links every receiver to the senders whose signatures are near: 1 - cosine <= truncation.

    Cosines are those of `edge_log_affinity`: half types are compared in float32, in an autocast
    region too.

    Args:
        receiver_sig_US: Signatures of receivers, [U, S], floating; no gradient is taken.
        sender_sig_VS: Signatures of senders, [V, S], in the same dtype.
        truncation: Largest distance of a link, in [0, 2]; 0.9 in the published models.

    Returns:
        The circuit, on the signatures' device.

    Raises:
        ShapeError: Shapes, dtypes or devices that do not fit together, or a truncation that is
            not in [0, 2].
        NotFiniteError: NaN or infinity among the signatures, which would leave latents unlinked.
    """
    op = "circuit_from_signatures"
    _checks.check_signatures(op, receiver_sig_US, sender_sig_VS)
    if not 0 <= truncation <= 2:
        raise ShapeError(f"{op}: {truncation=} is not in [0, 2], the range of 1 - cosine")
    _check_values(op, "receiver signatures", receiver_sig_US)
    if not bool(receiver_sig_US.isfinite().all() & sender_sig_VS.isfinite().all()):
        raise NotFiniteError(f"{op}: signatures hold NaN or infinity; look for a diverged loss")
    wide = _checks.compute_dtype(receiver_sig_US.dtype)
    receivers_US, senders_VS = (
        F.normalize(signatures.detach().to(wide), dim=1).double()
        for signatures in (receiver_sig_US, sender_sig_VS)
    )
    rows = max(1, _BLOCK // max(1, senders_VS.shape[0]))
    near = [
        # In float64, which neither autocast nor TensorFloat-32 makes coarser.
        (1 - (block_US @ senders_VS.T).to(wide) <= truncation).nonzero()
        + torch.tensor([i * rows, 0], device=block_US.device)
        for i, block_US in enumerate(receivers_US.split(rows))
    ]
    receiver, sender = torch.cat(near).unbind(1)
    return Circuit.from_edges(receiver, sender, receivers_US.shape[0], senders_VS.shape[0])
