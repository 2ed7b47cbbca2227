"""Write a trained run as packed NVFP4 weights, in the layouts that inference engines read, and read it back.

    python export.py out/ngpt_tiny out/packed                      compressed-tensors: nvfp4-pack-quantized
    python export.py out/gpt_tiny out/packed --layout=modelopt     that of NVIDIA's ModelOpt
    python export.py out/bf16 out/packed --recipe=ngpt             quantized by another recipe than the run's

A layer whose forward is in FP4 becomes, with the codes and scales of nvfp4.py:

    compressed_tensors      modelopt
    weight_packed           weight           (N, K/2) uint8, the low nibble is the even column
    weight_scale            weight_scale     (N, K/16) float8_e4m3fn; a square block's stands in 16 rows
    weight_global_scale     weight_scale_2   the tensor's, fp32: s_enc = 448 * 6 / amax (1,), or s_dec ()
    input_global_scale      input_scale      the same of its input, where the recipe fixes it

Where it does not, only the weights are in 4 bits for an engine (W4A16): a scale that is measured is no number
of the run. Experts become layers, experts.0.fc1 and so on, with one tensor scale. Linear layers in high
precision stand in the ignore list and are bf16, as autocast has them, but for routers; these and what is no
linear layer stay fp32: embedding, norms, nGPT's scales, Mamba's own. Names are those of model.py, of which an
engine needs an implementation, and tokenizer.json is ours.

Sources: github.com/vllm-project/compressed-tensors, github.com/NVIDIA/Model-Optimizer
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import nvfp4
from configs.config import check_choice
from data.run import UserError, command, naming, read_json, write_whole
from data.tokens import data_folder, load_tokenizer
from model import build
from nvfp4 import FORMATS, RECIPES, Both, Decoded, FP4Linear, Quantized
from papers import PaperConfig
from train import flatten, load_run, unflatten

LAYOUTS = {                                         # codes, block scales, the tensor's scale, the input's
    "compressed_tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}


def check_exportable(c):
    """raises UserError where the forward of a run is not what an engine computes."""
    cfg, form, other = c.fp4, FORMATS[c.fp4.format], "; name another recipe with --recipe="
    if "fprop" not in cfg.gemms or cfg.until is not None and "fprop" in cfg.switched:
        raise UserError(f"recipe={c.recipe}: its forward is, or ends, in high precision{other}")
    if not form.reads_as_nvfp4:
        raise UserError(f"fp4_format={cfg.format}: its codes and scales are not those of NVFP4{other}")
    if "fprop" in cfg.hadamard or cfg.occ is not None:
        raise UserError(f"recipe={c.recipe}: engines neither rotate (fp4_hadamard=fprop) nor split (fp4_occ) "
                        f"what enters a layer{other}")


def packed_layers(model):
    """{name: layer} of what is 4-bit in the forward. A mixture computes its router in fp32 in any case."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, FP4Linear) and not name.endswith("router")}


def names_of(name, layer):
    """Under which names a layer's matrices are written: one, or one for each expert."""
    parent, _, child = name.rpartition(".")
    experts = range(len(layer.weight)) if layer.weight.dim() == 3 else ()
    return [f"{parent}.{e}.{child}" for e in experts] or [name]


# ---------------------------------------------------------------- to tensors

def pack_layer(layer, layout):
    """[{part: tensor}] of a layer, or of each of its experts."""
    def tensor_scale(how):
        form, amax = FORMATS[how["format"]], how["amax"]
        amax = nvfp4.largest_magnitude(rows) if amax is None else torch.tensor(amax)
        s_enc, s_dec = nvfp4.tensor_scales(amax, form.top, form.target_of(how["unbiased"]))
        return s_enc.view(1) if layout == "compressed_tensors" else s_dec
    codes_at, scales_at, tensor_at, input_at = LAYOUTS[layout]
    for_x, for_w = (layer.cfg.operand(name, layer.keys) for name in ("fprop.x", "fprop.w"))
    rows, N = layer.filled_weight(), layer.out_features         # of all experts
    height = len(rows) // (len(layer.weight) if layer.weight.dim() == 3 else 1)
    q = nvfp4.quantize(rows, **for_w)
    scales = q.scale_of_lines()[..., 0].to(torch.float8_e4m3fn)
    shared = {tensor_at: tensor_scale(for_w)}
    if for_x["amax"] is not None:
        shared[input_at] = tensor_scale(for_x)
    return [{codes_at: codes[:N], scales_at: lines[:N], **shared}
            for codes, lines in zip(q.codes.split(height), scales.split(height), strict=True)]


def to_tensors(model, layout):
    """A converted model as {name: tensor}, and the names of its linear layers in high precision."""
    tensors, packed, kept = dict(model.state_dict()), packed_layers(model), []
    for name, layer in model.named_modules():
        if name in packed:
            del tensors[f"{name}.weight"]
            for full_name, parts in zip(names_of(name, layer), pack_layer(layer, layout), strict=True):
                tensors |= {f"{full_name}.{part}": t for part, t in parts.items()}
        elif isinstance(layer, torch.nn.Linear):
            kept.append(name)
            if not name.endswith("router"):
                tensors[f"{name}.weight"] = layer.weight.detach().bfloat16()
    return {name: t.clone() for name, t in tensors.items()}, kept               # none shares memory


def quantization_config(cfg, layout, kept):
    """{file: what it tells an engine of the tensors}"""
    inputs, weights = None, {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                             "symmetric": True, "dynamic": False}
    if cfg.input_amax is not None:                  # local: block scales are found on the way
        inputs = weights | {"dynamic": False if layout == "modelopt" else "local"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    if layout == "compressed_tensors":
        return {"config.json": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
                                "quantization_status": "compressed", "config_groups": groups,
                                "ignore": kept}}
    head = {"quant_algo": "NVFP4" if inputs else "W4A16_NVFP4", "group_size": 16}
    producer = {"name": "modelopt", "version": "0.39.0"}        # of the layout: readers insist on the name
    return {"config.json": {"quant_method": "modelopt", "producer": producer, **head,
                            "config_groups": groups, "ignore": kept},
            "hf_quant_config.json": {"producer": producer, "quantization": {
                **head, "kv_cache_quant_algo": None, "exclude_modules": kept}}}


# ---------------------------------------------------------------- and back

def unpack_layer(layer, parts, layout):
    """Have a layer compute with what pack_layer() made of it, in the forward alone. Returns its weight."""
    codes_at, scales_at, tensor_at, _ = LAYOUTS[layout]
    rows = 0, 0, 0, -layer.out_features % layer.cfg.whole_channels
    shape = *layer.weight.shape[:-2], -1, layer.in_features
    codes = torch.cat([F.pad(part[codes_at], rows) for part in parts])
    scales = torch.cat([F.pad(part[scales_at].view(torch.uint8), rows) for part in parts])
    s_dec = parts[0][tensor_at].view(())
    q = Quantized(codes, scales.view(torch.float8_e4m3fn),
                  s_dec.reciprocal() if layout == "compressed_tensors" else s_dec)
    how = layer.cfg.operand("fprop.w", layer.keys, torch.bfloat16, len(shape) == 3)
    given = q
    if how["decode"] is not None:
        given = Decoded(q.decode(how["decode"]).view(shape), q.s_dec)
    layer.quantize_weight = lambda: Both(given, None)
    return q.dequantize().view(shape)[..., :layer.out_features, :]


def from_tensors(model, tensors, layout):
    """Fill a converted model with what to_tensors() made of another."""
    tensors = dict(tensors)
    for name, layer in packed_layers(model).items():
        parts = [{part: tensors.pop(f"{full_name}.{part}", None) for part in LAYOUTS[layout]}
                 for full_name in names_of(name, layer)]
        tensors[f"{name}.weight"] = unpack_layer(layer, parts, layout)
    model.load_state_dict({name: t.float() for name, t in tensors.items()})
    return model.requires_grad_(False).eval()


# ---------------------------------------------------------------- files

def library():
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise UserError("safetensors is not there: pip install safetensors") from None
    return safetensors.torch


def export(run, folder, layout="compressed_tensors", recipe=None):
    """Write the run of a folder into a new one: config.json, with what an engine asks for beside the run's
    own fields, tokenizer.json and model.safetensors. Returns what was done, in words. raises UserError"""
    save, folder, said = library().save, Path(folder), []
    check_choice("layout", layout, LAYOUTS)
    if folder.exists():
        raise UserError(f"{folder} exists already; give another folder")
    model, _, c = load_run(run)
    if recipe is not None:
        check_choice("recipe", recipe, RECIPES)
        c = replace(c, recipe=recipe, fp4=PaperConfig(**vars(RECIPES[recipe])))
    check_exportable(c)
    try:
        tensors, kept = to_tensors(nvfp4.convert(model, c.fp4, report=said.append), layout)
    except ValueError as error:                     # sizes that do not divide into blocks
        raise UserError(str(error)) from None
    files = quantization_config(c.fp4, layout, kept)
    files["config.json"] = {"architectures": [type(model).__name__], **flatten(c),
                            "quantization_config": files["config.json"]}
    files = {name: json.dumps(found, indent=1).encode() for name, found in files.items()}
    files["tokenizer.json"] = Path(data_folder(c.dataset), "tokenizer.json").read_bytes()
    files["model.safetensors"] = save(tensors, metadata={"format": "pt"})
    with naming(folder):
        folder.mkdir(parents=True)
    write_whole({folder / name: lambda file, data=data: file.write(data) for name, data in files.items()})
    return f"{said[0]}; W4A{16 if c.fp4.input_amax is None else 4} as {layout} has it, in {folder}"


def load_export(folder):
    """(model, tokenizer, Config) of what export() wrote, for inference. Its forward in FP4 is bit for bit
    that of the run, if layers in high precision are rounded to bf16 there, as autocast does it. raises
    UserError"""
    load, path = library().load, Path(folder, "model.safetensors")
    settings = read_json(Path(folder, "config.json"))
    with naming(path):
        data = path.read_bytes()
    try:
        layout = settings["quantization_config"]["quant_method"].replace("-", "_")
        c = unflatten(settings)
        model = nvfp4.convert(build(c.model), c.fp4, report=lambda line: None)
        from_tensors(model, load(data), layout)
    except Exception as error:                      # of readers, of whatever the files hold
        raise UserError(f"{folder}: no export of this code ({type(error).__name__}: {error})") from None
    return model, load_tokenizer(folder), c


@command("export.py")
def main(argv):
    folders = [word for word in argv if not word.startswith("-")]
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in argv if word.startswith("-"))
    if "-h" in argv or "--help" in argv:
        print(__doc__.strip())
    elif len(folders) != 2 or flags.keys() - {"layout", "recipe"}:
        raise UserError("takes a run, a new folder, --layout= and --recipe= (-h says more), "
                        f"not {' '.join(argv) or 'nothing'}")
    else:
        print(export(*folders, **flags))


if __name__ == "__main__":
    main(sys.argv[1:])
