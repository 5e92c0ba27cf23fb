"""Write a mixture-of-experts model with random weights and real dimensions, layer by layer, for benchmarks.

    python bench/make_model.py OUT               1.05 B parameters: six layers of Qwen3-30B-A3B, 32 experts
    python bench/make_model.py OUT --layers 2    a smaller one

Its tokenizer is that of assets/moe-3m, so that real text can be fed. Memory stays at one layer; files and
tensors are named as in a downloaded checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "moe-3m"
DTYPE = torch.bfloat16
STD = 0.02
# Large beside what layers add, so that tokens stay apart and all experts are chosen, as in models trained to balance:
# with small ones, later layers choose among a third of their experts.
EMBEDDING_STD = 1.0


def demo_config(num_layers: int, num_experts: int) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B's layer (D=2048, F=768, top-8, 32 query and 4 key-value heads of 128), fewer of them."""
    return Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=2048,
        moe_intermediate_size=768,
        intermediate_size=6144,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=num_experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=2,
        dtype=DTYPE,
        architectures=["Qwen3MoeForCausalLM"],
    )


def layer_tensors(config: Qwen3MoeConfig, layer_idx: int) -> dict[str, Tensor]:
    """One layer under its names in the checkpoint."""
    D, F = config.hidden_size, config.moe_intermediate_size
    q_dim, kv_dim = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
        "self_attn.q_proj": (q_dim, D),
        "self_attn.k_proj": (kv_dim, D),
        "self_attn.v_proj": (kv_dim, D),
        "self_attn.o_proj": (D, q_dim),
        "mlp.gate": (config.num_experts, D),
    }
    for e in range(config.num_experts):
        for matrix, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
            shapes[f"mlp.experts.{e}.{matrix}"] = shape
    return {f"model.layers.{layer_idx}.{name}.weight": _values(shape) for name, shape in shapes.items()}


def _values(shape: tuple[int, ...], std: float = STD) -> Tensor:
    """Ones for norms, else N(0, std); a GPU draws them a hundred times faster."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=DTYPE)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(shape, dtype=DTYPE, device=device).normal_(0, std).cpu()


def write_model(out: Path, config: Qwen3MoeConfig) -> int:
    """Write config, tokenizer and one shard a layer; return the number of parameters."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, out / name)
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    where: dict[str, str] = {}
    num_params = 0
    for shard_idx in range(L + 1):
        if shard_idx < L:
            tensors = layer_tensors(config, shard_idx)
        else:
            ends = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
            tensors = {
                name: _values(shape, EMBEDDING_STD if "embed" in name else STD)
                for name, shape in ends.items()
            }
        file_name = f"model-{shard_idx + 1:05d}-of-{L + 1:05d}.safetensors"
        save_file(tensors, out / file_name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file_name)
        num_params += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": num_params * DTYPE.itemsize}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_params


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    arguments = parser.parse_args()
    start_s = time.perf_counter()
    num_params = write_model(arguments.out, demo_config(arguments.layers, arguments.experts))
    print(f"{arguments.out}: {num_params / 1e6:,.0f}M parameters in {time.perf_counter() - start_s:.1f} s")


if __name__ == "__main__":
    main()
