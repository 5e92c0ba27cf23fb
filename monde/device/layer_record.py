"""What a kernel knows of a layer: one record, passed by value, so that kernels find it in constant memory.

FIELDS is the agreement: the C struct and the bytes are both made from it. Addresses and numbers are 64 bits wide,
the two constants of an activation doubles.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

# The layer's shape (hostcompute.layout); its residents, and its experts in the host's memory, 0 where those
# cannot be read from here; their places there, 0 where those are in the experts' order; scratch that the model's layers
# share; whether an expert can be cold, and the mailbox.
FIELDS = """
layer_idx num_experts num_slots d_model d_ffn gated activation
d_pad_k f_pad_k num_f_panels num_d_panels in_panel_bytes in_unit_bytes down_panel_bytes down_offset_bytes
slot_of_expert_E blobs_SB blob_bytes host_blobs host_blob_bytes place_of_expert_E gate_bias_SF up_bias_SF down_bias_SD heat_E
state x_TD slots_R is_later_R num_groups group_slot_G group_first_G group_pairs_R h_RF v_RD
rings mailbox_answered mailbox_failed mailbox_gpu_ns
mailbox_rung mailbox_cut mailbox_x mailbox_ids mailbox_weights mailbox_out mailbox_box_bytes
""".split()  # noqa: SIM905 (one name a line would take a page)
CONSTANTS = ("limit", "alpha")

_DTYPE = np.dtype([(name, np.int64) for name in FIELDS] + [(name, np.float64) for name in CONSTANTS])


def c_struct() -> str:
    """`struct Layer` in C++."""
    numbers = "".join(f"long long {name}; " for name in FIELDS)
    return f"struct Layer {{ {numbers}{''.join(f'double {name}; ' for name in CONSTANTS)}}};\n"


def layer_record(values: Mapping[str, int | float]) -> NDArray[np.void]:
    """The record [1], as CuPy passes it by value. Errors: KeyError unless `values` has every field, and only those."""
    record = np.zeros(1, _DTYPE)
    if missing := set(_DTYPE.names or ()) ^ set(values):
        raise KeyError(f"layer record: fields that differ: {sorted(missing)}")
    for name, value in values.items():
        record[name] = value
    return record
