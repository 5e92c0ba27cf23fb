"""How large a model is: the numbers that the memory plan adds up, from shapes alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from hostcompute import ExpertSpec
from hostcompute.backends.select import choose
from hostcompute.topology import machine_memory_bytes
from monde.config import MOVING, MondeConfig
from monde.device.mailbox import DecodeSize
from monde.executors.decode import MAX_DECODE_TOKENS, MAX_DECODE_TOPK
from monde.executors.prefill_size import PrefillSize
from monde.executors.ranked_model import RankedModel
from monde.models.beside import shared_experts
from monde.models.cache_size import CacheSize, cache_size
from monde.models.experts import ExpertsModule
from monde.planning.budget import LayerSize, MemoryPlan, ModelSize, Spread, plan_memory
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.formats import format_of
from monde.planning.placement import Values, equal_hits, place_by_time
from monde.profile_store import profile_of, this_machine
from monde.routing.heat import Heat
from monde.sizes import format_bytes
from monde.weights.packing import TORCH_DTYPES
from monde.weights.slots import bias_sizes, slot_bytes

# Live at the peak of one decoder layer, in fp32 vectors of the model dim per token: residual, normalised
# input, query, key, value, attention output, and the routed result of device and host.
_LIVE_VECTORS = 8
# And where one expert, or a dense layer, gets every token: gate, up, act(gate) and their product in fp32,
# and one more in the weights' type on its way.
_LIVE_HIDDEN_VECTORS = 5
# torch gives cuBLAS and cuBLASLt 32 MiB each on Hopper, a quarter of that before; once more for the second stream that
# shared experts run on.
_LIBRARY_BYTES = 64 * 2**20
# A captured step's private pool rounds every block up to 2 MiB; a few shapes of step are captured.
_GRAPH_BYTES = 32 * 2**20
# What configurations call the number of experts per token.
TOPK_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "moe_topk",
    "moe_top_k",
    "top_k",
)
# Of architectures whose configurations do not say it.
_FIXED_TOPK = {"switch_transformers": 1, "nllb-moe": 2}
_GPU_SHARE = 0.9  # of what is free: the rest covers the CUDA context's growth and the allocator's fragments


def resolve_device(config: MondeConfig) -> torch.device:
    """The device of the dense weights. Errors: ValueError when it is absent."""
    if config.device is None and config.mesh is not None:
        return _device_of(config.mesh)
    if config.device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f'device: {config.device} was asked for and this machine has no usable GPU; use device="cpu"'
            )
        device, num_gpus = torch.device("cuda", device.index or 0), torch.cuda.device_count()
        if device.index >= num_gpus:
            have = "cuda:0 alone" if num_gpus == 1 else f"cuda:0 to cuda:{num_gpus - 1}"
            raise ValueError(f"device: {device} was asked for and this machine has {have}; name one it has")
    if config.mesh is not None and config.mesh.device_type != device.type:
        raise ValueError(
            f"mesh: it is one of {config.mesh.device_type} and dense weights are asked to run on {device}; leave "
            f'device out, or make the mesh with init_device_mesh("{device.type}", ...)'
        )
    return device


def _device_of(mesh: DeviceMesh) -> torch.device:
    """Making a mesh of GPUs has set each rank's own as current."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if mesh.device_type == "cuda"
        else torch.device("cpu")
    )


def plan_for(
    model: nn.Module,
    modules: Sequence[ExpertsModule],
    config: MondeConfig,
    device: torch.device,
    ranked: RankedModel | None = None,
) -> MemoryPlan:
    """What goes where under the budget, of this rank where there are several.

    Errors: BudgetError, ValueError for a budget above the machine.
    """
    on_gpu = device.type == "cuda"
    held_bytes = {"cuda": 0, "cpu": 0, "meta": 0}
    for tensor in (*model.parameters(), *model.buffers()):
        held_bytes[tensor.device.type] = held_bytes.get(tensor.device.type, 0) + tensor.nbytes
    gpu_bytes = config.gpu_memory
    if on_gpu:
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        if gpu_bytes is None:
            gpu_bytes = int((torch.cuda.mem_get_info(device)[0] + held_bytes["cuda"]) * _GPU_SHARE)
        elif gpu_bytes > total_bytes:
            wanted, have = format_bytes(gpu_bytes), format_bytes(total_bytes)
            raise ValueError(f"gpu_memory: {wanted} is more than the {have} of {device}; ask for less")
    elif gpu_bytes and config.device is None:
        raise ValueError(
            f"gpu_memory: {format_bytes(gpu_bytes)} were asked for and this machine has no usable GPU; leave "
            'gpu_memory out, or set device="cpu" to have the CPU stand in for it'
        )
    elif gpu_bytes and gpu_bytes > machine_memory_bytes():
        wanted, have = format_bytes(gpu_bytes), format_bytes(machine_memory_bytes())
        raise ValueError(f"gpu_memory: {wanted} is more than the {have} of this machine; ask for less")
    host_bytes = config.host_memory
    if host_bytes is None:
        host_bytes = int(psutil.virtual_memory().available) + held_bytes["cpu"]
        if ranked is not None:
            host_bytes //= ranked.ranks.cores.num_processes
    size = model_size(model, modules, config, on_gpu, ranked)
    wants_moves = config.residency in MOVING
    if wants_moves and gpu_bytes and choose(config.cpu_backend).name != "native":
        wants_moves = False
        warnings.warn(
            "residency is static: only the native host backend keeps experts in the form of slots; "
            'use cpu_backend="native"',
            RuntimeWarning,
            stacklevel=3,
        )
    spread = _spread_by_time(config, modules, model.config, ranked)
    return plan_memory(size, on_gpu, gpu_bytes or 0, host_bytes, wants_moves, spread)


def _spread_by_time(
    config: MondeConfig, modules: Sequence[ExpertsModule], model_config: Any, ranked: RankedModel | None
) -> Spread | None:
    """Slots where they save most seconds a step, over all layers, by the heat file or as if experts were equally popular.

    None: evenly, where that is asked for, where nothing says how many experts a token takes, and over ranks that hold
    every layer in two forms, of which a batch uses one.
    """
    num_topk = topk_of(model_config.get_text_config(), model_config)
    if config.residency == "uniform" or (ranked is not None and len(ranked.ways) > 1):
        return None
    if config.heat_file is None and num_topk is None:
        return None
    heat = None if config.heat_file is None else Heat.load(config.heat_file)
    specs = [module.spec for module in modules] if ranked is None else ranked.specs

    def spread(layers: tuple[LayerSize, ...], free_bytes: int) -> tuple[int, ...]:
        if free_bytes == 0:
            return (0,) * len(layers)
        if heat is not None:
            heat.check("this model", [layer.num_experts for layer in layers])
            hits_L: Values = heat.hits_per_step_L
        else:
            assert num_topk is not None
            # Of a whole layer's experts a rank may hold some: each is as popular as all.
            hits_L = [
                equal_hits(module.spec.num_experts, num_topk, config.max_batch)[: layer.num_experts]
                for module, layer in zip(modules, layers, strict=True)
            ]
        profile = profile_of(this_machine())
        cost_L = [CostModel(profile, shape_of(spec)) for spec in specs]
        return tuple(p.num_resident for p in place_by_time(hits_L, cost_L, layers, free_bytes))

    return spread


def shape_of(spec: ExpertSpec) -> ExpertShape:
    weight_format = format_of(str(TORCH_DTYPES[spec.dtype]).removeprefix("torch."))
    return ExpertShape(
        spec.d_model, spec.d_ffn, spec.gated, weight_format.bits, weight_format=weight_format.name
    )


def topk_of(*configs: Any) -> int | None:
    """Experts per token, of the first configuration that says so."""
    for config in configs:
        for source in (config, getattr(config, "ffn_config", None)):
            for name in TOPK_NAMES:
                value = getattr(source, name, None)
                if isinstance(value, int) and value > 0:
                    return value
    return next((k for k in (_FIXED_TOPK.get(getattr(c, "model_type", "")) for c in configs) if k), None)


def check_topk(config: Any, modules: Sequence[ExpertsModule]) -> None:
    """Errors: ValueError where a token takes more experts than a layer has."""
    fewest = min(module.spec.num_experts for module in modules)
    for source in (config.get_text_config(), config):
        for name in TOPK_NAMES:
            num_topk = getattr(source, name, None)
            if name != "top_k" and isinstance(num_topk, int) and num_topk > fewest:  # top_k may be sampling's
                raise ValueError(
                    f"the configuration says {name}={num_topk} and has layers of {fewest} experts; correct config.json"
                )


def model_size(
    model: nn.Module,
    modules: Sequence[ExpertsModule],
    config: MondeConfig,
    on_gpu: bool,
    ranked: RankedModel | None = None,
) -> ModelSize:
    """The sizes of `model` at the longest context and largest batch of `config`; all ranks have such batches."""
    check_topk(model.config, modules)
    expert_names = {module.full_name(param) for module in modules for param in module.param_names()}
    # Before weights are loaded, those that will be one tensor are two.
    params, tied = dict(model.named_parameters()), getattr(model, "all_tied_weights_keys", None) or {}
    dense = [p for name, p in params.items() if name not in expert_names and tied.get(name) not in params]
    dense_bytes = sum(t.nbytes for t in (*dense, *model.buffers()))
    itemsize_bytes = max((p.element_size() for p in dense), default=4)
    text_config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    d_model = max(module.spec.d_model for module in modules)
    d_hidden = max(_first(text_config, "intermediate_size"), *(module.spec.d_ffn for module in modules))
    num_tokens = config.max_context * config.max_batch
    specs = [module.spec for module in modules] if ranked is None else ranked.specs
    num_ranks = 1 if ranked is None else ranked.ranks.size
    # Over ranks, rows of all of them arrive, and partial sums in fp32 leave and arrive.
    gathered_bytes = 0 if ranked is None else num_ranks * (itemsize_bytes + 4 + 4) * d_model
    x_bytes = itemsize_bytes if ranked is None else 4  # sums of a part are fp32
    # Where it cannot be tried, every layer is taken for one with full attention.
    cache = cache_size(model, modules) or CacheSize(attended_values(text_config) * itemsize_bytes, 0)
    return ModelSize(
        dense_bytes=dense_bytes,
        kv_bytes_per_token=cache.per_token_bytes,
        state_bytes=config.max_batch * cache.per_sequence_bytes,
        act_bytes_per_token=4 * (_LIVE_VECTORS * d_model + _LIVE_HIDDEN_VECTORS * d_hidden) + gathered_bytes,
        logits_bytes=4 * config.max_batch * (getattr(text_config, "vocab_size", None) or 0),
        staging_bytes_per_token=num_ranks * (itemsize_bytes + 4) * d_model,
        num_tokens=num_tokens,
        layers=tuple(map(_layer_size, specs)),
        library_bytes=_LIBRARY_BYTES * (2 if any(shared_experts(model, modules)) else 1)
        + _decode_bytes(specs)
        + _prefill_bytes(specs, x_bytes, num_ranks * num_tokens, 4 * _LIVE_HIDDEN_VECTORS * d_hidden)
        if on_gpu
        else 0,
    )


def _decode_bytes(specs: Sequence[ExpertSpec]) -> int:
    """Scratch of the decode kernels, and the memory of captured steps besides what they compute in."""
    size = DecodeSize.of(specs, MAX_DECODE_TOKENS, MAX_DECODE_TOPK)
    return size.scratch_bytes + _GRAPH_BYTES


def _prefill_bytes(
    specs: Sequence[ExpertSpec], x_bytes: int, num_tokens: int, hidden_bytes_per_token: int
) -> int:
    """Staging, scratch and what a chunk of a prompt takes beyond what a dense layer's hidden values would."""
    size = PrefillSize.of(specs, x_bytes, num_tokens, MAX_DECODE_TOPK)
    return size.fixed_bytes + max(0, size.workspace_bytes - num_tokens * hidden_bytes_per_token)


def _layer_size(spec: ExpertSpec) -> LayerSize:
    bias_values = (spec.num_matrices - 1) * spec.d_ffn + spec.d_model if spec.has_bias else 0
    return LayerSize(
        spec.num_experts,
        spec.expert_bytes + bias_values * spec.dtype.itemsize_bytes,
        slot_bytes(spec),
        kept_bytes=4 * sum(bias_sizes(spec).values()),
    )


def attended_values(text_config: Any, without: frozenset[str] = frozenset()) -> int:
    """Keys and values that attention goes over for one token of context, in all layers but those of the kinds
    `without`, in transformers' names.

    A decoder behind an encoder keeps those of its own tokens and, of its cross-attention, those of the prompt.
    """
    if text_config.is_encoder_decoder and decoder_layers_of(text_config):
        return 2 * decoder_layers_of(text_config) * _kv_values_of_layer(text_config)
    if text_config.is_heterogeneous:
        return sum(map(_kv_values_of_layer, text_config.per_layer_config))
    kinds = getattr(text_config, "layer_types", None)
    num_layers = _first(text_config, "num_hidden_layers", "num_layers", default=1)
    if isinstance(kinds, list):
        num_layers = sum(kind not in without for kind in kinds)
    return num_layers * _kv_values_of_layer(text_config)


def encoder_layers_of(config: Any) -> int:
    """0 where the configuration does not say."""
    return _first(config, "encoder_layers", "num_layers")


def decoder_layers_of(config: Any) -> int:
    """0 where the configuration does not say."""
    return _first(config, "decoder_layers", "num_decoder_layers")


@dataclass(frozen=True)
class Heads:
    """Attention of one layer: query heads, the query heads that share a key and value, and the dim of each."""

    num_heads: int
    num_repeats: int
    head_dim: int


def heads_of(config: Any) -> Heads:
    first = partial(_first, config)
    num_heads = first("num_attention_heads", "num_heads", "n_heads", default=1)
    num_kv_heads = num_heads if first("qk_head_dim") else first("num_key_value_heads", default=num_heads)
    head_dim = first("head_dim", "d_kv", default=first("hidden_size", "d_model") // num_heads)
    return Heads(num_heads, max(1, num_heads // num_kv_heads), head_dim)


def _kv_values_of_layer(config: Any) -> int:
    """Keys and values of one layer for one token."""
    heads = heads_of(config)
    # Multi-head latent attention expands its latents to keys and values of all heads.
    key_dim, value_dim = _first(config, "qk_head_dim"), _first(config, "v_head_dim")
    if key_dim and value_dim:
        return heads.num_heads * (key_dim + value_dim)
    num_kv_heads = _first(config, "num_key_value_heads", default=heads.num_heads)
    return num_kv_heads * 2 * heads.head_dim


def _first(config: Any, *names: str, default: int = 0) -> int:
    """The first of these settings that is a positive number."""
    values = (getattr(config, name, None) for name in names)
    return int(next((v for v in values if isinstance(v, int) and v > 0), default))
