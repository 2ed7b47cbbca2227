"""Write a trained run as a folder that transformers loads: from_pretrained(FOLDER), AutoTokenizer too.

    python export.py out/gpt_tiny out/hf                weights in BF16
    python export.py out/gpt_tiny out/hf --packed       linear layers as the run has them in 4 bits, packed as
                                                        compressed-tensors: nvfp4-pack-quantized

GPT is transformers' Arcee, a standard hybrid its NemotronH; of nGPT it has no class. Packed are the codes
and scales of nvfp4.py, (N, K/2) uint8 and (N, K/16) float8_e4m3fn, with weight_global_scale = 448 * 6 / amax.
Only weights are in 4 bits (W4A16), since a measured scale of an activation is no number of the run. Stacked
experts have no packed form there: they are written as the values of their codes.

Sources: transformers' modeling_arcee.py, modeling_nemotron_h.py; github.com/vllm-project/compressed-tensors
"""
import json
import sys
from pathlib import Path

import torch

import nvfp4
from data.run import UserError, command, naming, write_whole
from nvfp4 import FORMATS, FP4Linear
from train import load_run

# ---------------------------------------------------------------- what is called how

ALL = slice(None)
TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}        # NemotronH's


def matrices_of(letter, mixer):
    """[(their name, our name, rows of ours)] of a mixer's parameters."""
    if letter == "*":
        q, k = mixer.H * mixer.D, mixer.G * mixer.D
        rows = slice(q), slice(q, q + k), slice(q + k, None)
        qkv = [(f"{name}_proj.weight", "qkv.weight", part) for name, part in zip("qkv", rows, strict=True)]
        return [*qkv, ("o_proj.weight", "out.weight", ALL)]
    if letter == "-":
        return [("up_proj.weight", "fc1.weight", ALL), ("down_proj.weight", "fc2.weight", ALL)]
    if letter == "E":
        named = {"gate.weight": "router.weight", "gate.e_score_correction_bias": "bias",
                 "experts.up_proj": "experts.fc1.weight", "experts.down_proj": "experts.fc2.weight",
                 "shared_experts.up_proj.weight": "shared.fc1.weight",
                 "shared_experts.down_proj.weight": "shared.fc2.weight"}
    else:
        same = "in_proj.weight", "out_proj.weight", "dt_bias", "A_log", "D"
        named = {name: name for name in same} | {"conv1d.weight": "conv", "conv1d.bias": "conv_bias",
                                                 "norm.weight": "norm"}
    return [(theirs, ours, ALL) for theirs, ours in named.items()]


def names(model):
    """{their name: (our name, rows of ours)} of all parameters."""
    arcee = is_transformer(model.config)
    found = {f"model.{'embed_tokens' if arcee else 'embeddings'}.weight": ("embed.weight", ALL),
             f"model.{'norm' if arcee else 'norm_f'}.weight": ("norm.weight", ALL),
             "lm_head.weight": ("head.weight", ALL)}
    for i, (block, letter) in enumerate(zip(model.blocks, model.config.pattern, strict=True)):
        layer, norm, place = f"model.layers.{i}", "norm", "mixer"
        if arcee:                                   # a layer of theirs is two of our blocks
            layer, attends = f"model.layers.{i // 2}", letter == "*"
            norm = "input_layernorm" if attends else "post_attention_layernorm"
            place = "self_attn" if attends else "mlp"
        found[f"{layer}.{norm}.weight"] = f"blocks.{i}.norm.weight", ALL
        for theirs, ours, rows in matrices_of(letter, block.mixer):
            found[f"{layer}.{place}.{theirs}"] = f"blocks.{i}.mixer.{ours}", rows
    return found


def is_transformer(c):
    return c.pattern == "*-" * (len(c.pattern) // 2)


def settings(c, tokenizer):
    """Their config.json, but for quantization. raises UserError for what they have no class for"""
    if c.arch != "gpt":
        raise UserError("arch=ngpt: transformers has no class for it; export a run of arch=gpt")
    if c.activation != "relu2":
        raise UserError(f"activation={c.activation}: Arcee and NemotronH have relu2 alone")
    both = {"vocab_size": c.vocab_size, "hidden_size": c.n_embd, "num_attention_heads": c.n_head,
            "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "intermediate_size": c.n_ffn,
            "max_position_embeddings": c.block_size, "tie_word_embeddings": False, "dtype": "bfloat16",
            "bos_token_id": tokenizer.n_vocab - 1, "eos_token_id": tokenizer.n_vocab - 1}
    if is_transformer(c):
        if not c.rope_base:
            raise UserError("rope_base=0: Arcee has rotary positions always")
        rope = {"rope_type": "default", "rope_theta": c.rope_base}
        return both | {"model_type": "arcee", "architectures": ["ArceeForCausalLM"], "hidden_act": "relu2",
                       "num_hidden_layers": len(c.pattern) // 2, "rms_norm_eps": 1e-5,
                       "rope_parameters": rope}
    if c.rope_base:
        raise UserError(f"rope_base={c.rope_base:g}: NemotronH has no positions; train with rope_base=0")
    return both | {
        "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "mlp_hidden_act": "relu2",
        "layers_block_type": [TYPES[letter] for letter in c.pattern], "layer_norm_epsilon": 1e-5,
        "mamba_num_heads": c.mamba_n_head, "mamba_head_dim": c.mamba_head_dim, "n_groups": c.mamba_n_group,
        "ssm_state_size": c.mamba_n_state, "conv_kernel": c.mamba_conv, "chunk_size": c.mamba_chunk,
        "time_step_min": 1e-12, "n_routed_experts": c.moe_n_expert, "num_experts_per_tok": c.moe_n_active,
        "moe_intermediate_size": c.n_ffn, "moe_shared_expert_intermediate_size": c.moe_n_ffn_shared,
        "routed_scaling_factor": c.moe_scale}


# ---------------------------------------------------------------- tensors

def tensors_of(model):
    """({their name: tensor}, names of their linear layers that are not packed). Layers in FP4 are packed; of
    the rest matrices are bf16, all else is fp32."""
    weights, layers, found, kept = model.state_dict(), dict(model.named_modules()), {}, []
    quantized = {name: quantize(layer) for name, layer in layers.items() if isinstance(layer, FP4Linear)}
    for theirs, (ours, rows) in names(model).items():
        of, layer = ours.rpartition(".")[0], theirs.removesuffix(".weight")
        whole = weights[ours]
        tensor, N = whole[rows], whole.shape[-2] if whole.dim() > 1 else 0
        if of in quantized and tensor.dim() == 2:
            q, s_enc = quantized[of]
            scales = q.scale_of_lines()[..., 0].to(torch.float8_e4m3fn)
            found |= {f"{layer}.weight_packed": q.codes[:N][rows], f"{layer}.weight_scale": scales[:N][rows],
                      f"{layer}.weight_global_scale": s_enc.view(1)}
            continue
        if of in quantized:                         # experts
            tensor = quantized[of][0].dequantize().view(len(tensor), -1, tensor.shape[2])[:, :N]
        if theirs.endswith("conv1d.weight"):
            tensor = tensor.t()[:, None]
        elif tensor.dim() > 1 and not theirs.endswith("gate.weight"):
            tensor = tensor.bfloat16()
            if isinstance(layers.get(of), torch.nn.Linear):
                kept.append(layer)
        found[theirs] = tensor
    whole = torch.contiguous_format                 # and none shares memory
    return {name: tensor.clone(memory_format=whole) for name, tensor in found.items()}, kept


def quantize(layer):
    """(the weight as fprop has it, of experts all in one; its s_enc)"""
    how, rows = layer.cfg.operand("fprop.w", layer.keys), layer.filled_weight()
    form = FORMATS[how["format"]] if how else None
    if form is None or not form.reads_as_nvfp4 or how["signs"] is not None or layer.cfg.occ is not None:
        raise UserError("--packed: the forward of this recipe is not plain NVFP4; leave it out")
    amax = nvfp4.largest_magnitude(rows) if how["amax"] is None else torch.tensor(how["amax"])
    s_enc, _ = nvfp4.tensor_scales(amax, form.top, form.target)
    return nvfp4.quantize(rows, **how), s_enc


def quantization(kept):
    """What config.json says of packed weights."""
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
               "symmetric": True, "dynamic": False}
    return {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": kept,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


# ---------------------------------------------------------------- the tokenizer

def letters():
    """{byte: letter} under which byte-level BPE writes bytes: printable ones as they are, the others from 256
    on, as GPT-2 has it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def tokenizer_json(tokenizer):
    """A tiktoken.Encoding as the library tokenizers reads it. tiktoken joins any neighbours that spell a
    token; so each way to spell one in two is a merge, in the order of the tokens. Where none is, as of plain
    bytes, there is nothing to split for."""
    ranks, letter = tokenizer._mergeable_ranks, letters()

    def spelled(token):
        return "".join(letter[byte] for byte in token)
    merges = [[spelled(token[:i]), spelled(token[i:])] for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    special = [{"id": i, "content": text, "special": True, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False} for text, i in tokenizer._special_tokens.items()]
    split = {"type": "Split", "pattern": {"Regex": tokenizer._pat_str}, "behavior": "Isolated",
             "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "normalizer": None, "post_processor": None, "decoder": to_bytes,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes][not merges:]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "merges": merges,
                      "vocab": {spelled(token): rank for token, rank in ranks.items()}}}


# ---------------------------------------------------------------- the folder

def export(run, folder, packed=False):
    """Write the run of a folder into a new one. Returns what was done, in words. raises UserError"""
    folder, said = Path(folder), ["weights in bf16"]
    if folder.exists():
        raise UserError(f"{folder} exists already; give another folder")
    try:
        from safetensors.torch import save
    except ModuleNotFoundError:
        raise UserError("safetensors is not there: pip install safetensors") from None
    model, tokenizer, c = load_run(run)
    config = settings(model.config, tokenizer)
    if packed:
        if c.fp4.until is not None and "fprop" in c.fp4.switched or "fprop" not in c.fp4.gemms:
            raise UserError(f"recipe={c.recipe}: its forward is, or ends, in high precision; leave out "
                            "--packed")
        nvfp4.convert(model, c.fp4, report=said.append)
    tensors, kept = tensors_of(model)
    special = {f"{end}_token": text for text in tokenizer._special_tokens for end in ("bos", "eos")}
    files = {"config.json": config | ({"quantization_config": quantization(kept)} if packed else {}),
             "tokenizer.json": tokenizer_json(tokenizer),
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **special,
                                       "model_max_length": model.config.block_size}}
    files = {name: json.dumps(found, indent=1).encode() for name, found in files.items()}
    files["model.safetensors"] = save(tensors, metadata={"format": "pt"})
    with naming(folder):
        folder.mkdir(parents=True)
    write_whole({folder / name: lambda file, data=data: file.write(data) for name, data in files.items()})
    if c.model.document_start is not None:
        said[-1] += "; there a token sees the documents before its own, which the run hid"
    return f"{config['architectures'][0]}, {said[-1]}, in {folder}"


@command("export.py")
def main(argv):
    folders = [word for word in argv if not word.startswith("-")]
    flags = [word for word in argv if word.startswith("-")]
    if "-h" in argv or "--help" in argv:
        print(__doc__.strip())
    elif len(folders) != 2 or set(flags) - {"--packed"}:
        raise UserError("takes a run, a new folder and --packed (-h says more), "
                        f"not {' '.join(argv) or 'nothing'}")
    else:
        print(export(*folders, packed="--packed" in flags))


if __name__ == "__main__":
    main(sys.argv[1:])
