"""What decode's kernels know of a layer."""

from __future__ import annotations

from monde.device.record import Record

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
LAYER = Record("Layer", FIELDS, CONSTANTS)
