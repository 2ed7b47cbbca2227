"""Proofs for export.py: what is written is what a layer's forward multiplies with, bit for bit, and a library
of others reads it as we do. That is compressed-tensors, and files need safetensors: tests of them are skipped
without (pip install -r tests/requirements.txt).
"""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nvfp4  # noqa: E402
import train  # noqa: E402
from data.run import UserError  # noqa: E402
from export import LAYOUTS, export, from_tensors, load_export, quantization_config, to_tensors  # noqa: E402
from model import ModelConfig, build  # noqa: E402
from nvfp4 import FORMATS, RECIPES  # noqa: E402
from papers import PaperConfig  # noqa: E402

MISSING = "is not there: pip install -r tests/requirements.txt"
GPT = ModelConfig(arch="gpt", n_layer=2, n_embd=48, n_head=2, n_ffn=64, block_size=16, vocab_size=40)
HYBRID = replace(GPT, pattern="ME*-", mamba_n_head=8, mamba_head_dim=8, mamba_n_group=2, mamba_n_state=12,
                 mamba_chunk=8, moe_n_expert=3)     # in_proj has N = 184, to be filled up
MODELS = {
    "square blocks": (GPT, RECIPES["nvfp4"]),
    "row blocks": (GPT, replace(RECIPES["nvfp4"], square_weights=False, tail=0.5)),
    "four over six": (GPT, RECIPES["quartet2"]),
    "fixed scales": (replace(GPT, arch="ngpt"), RECIPES["ngpt"]),
    "hybrid": (HYBRID, RECIPES["nvfp4"]),
    "normalized hybrid": (replace(HYBRID, arch="ngpt"), RECIPES["ngpt"]),
}
pytestmark = pytest.mark.usefixtures("unfused")


def make(kind, seed=1):
    """A model of MODELS, with parameters at random, converted."""
    torch.manual_seed(seed)
    c, cfg = MODELS[kind]
    model = build(c)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.1 * torch.randn_like(p)
    return nvfp4.convert(model, cfg, report=lambda line: None).eval()


@torch.no_grad()
def logits(model):
    nvfp4.set_step(model, seed=0, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        return model(torch.arange(32).view(2, 16) % 40)


def wrongly(codes, scales, scale):
    """The same with one mistake each: nibbles swapped, block scales turned round, the other tensor scale."""
    return (codes >> 4 | codes << 4, scales, scale), \
           (codes, scales.view(torch.uint8).flip(1).view(scales.dtype), scale), \
           (codes, scales, scale.reciprocal())


def quantized(tensors, layout):
    """{layer: its codes, block scales and tensor scale} of what is in 4 bits."""
    codes_at, scales_at, tensor_at, _ = LAYOUTS[layout]
    layers = [name.removesuffix(f".{tensor_at}") for name in tensors if name.endswith(tensor_at)]
    return {layer: [tensors[f"{layer}.{part}"] for part in (codes_at, scales_at, tensor_at)]
            for layer in layers if f"{layer}.{codes_at}" in tensors}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_round_trip_is_bit_for_bit(kind, layout):
    """Each weight as fprop gets it, and the logits."""
    model = make(kind)
    tensors, kept = to_tensors(model, layout)
    other = from_tensors(make(kind, seed=2), tensors, layout)
    assert torch.equal(logits(other), logits(model))
    pairs = list(zip(nvfp4.fp4_layers(model), nvfp4.fp4_layers(other), strict=True))
    assert pairs and all(torch.equal(a.quantized.rows.dequantize(), b.quantized.rows.dequantize())
                         for a, b in pairs)
    assert set(kept) == {name for name, m in model.named_modules()
                         if isinstance(m, torch.nn.Linear) and not isinstance(m, nvfp4.FP4Linear)}
    n_matrices = sum(len(a.weight) if a.weight.dim() == 3 else 1 for a, _ in pairs)
    assert len(quantized(tensors, layout)) == n_matrices
    name, right = next(iter(quantized(tensors, layout).items()))
    for wrong in wrongly(*right):
        parts = {f"{name}.{part}": t for part, t in zip(LAYOUTS[layout], wrong, strict=False)}
        changed = from_tensors(make(kind, seed=2), tensors | parts, layout)
        assert not torch.equal(logits(changed), logits(model)), parts


@pytest.mark.parametrize("kind", MODELS)
def test_shapes_and_tensor_scales_are_those_of_the_layouts(kind):
    """weight_global_scale is top * 6 / amax, rounded once, and weight_scale_2 its reciprocal, rounded again:
    together 2^-23 at most from amax / (6 * top)."""
    model, (_, cfg) = make(kind), MODELS[kind]
    theirs, nvidia = (quantized(to_tensors(model, layout)[0], layout) for layout in LAYOUTS)
    top, weights = FORMATS[cfg.format].top, dict(model.named_parameters())
    for name, (codes, scales, s_enc) in theirs.items():
        *parent, expert, child = name.split(".")
        w = weights.get(f"{name}.weight")
        if w is None:                               # an expert, whose scale is that of all
            w = weights[".".join([*parent, child, "weight"])]
        N, K = w.shape[-2:]
        assert (codes.shape, codes.dtype) == ((N, K // 2), torch.uint8)
        assert (scales.shape, scales.dtype) == ((N, K // 16), torch.float8_e4m3fn)
        amax = w.abs().max().double() if cfg.weight_amax is None else torch.tensor(cfg.weight_amax).double()
        assert s_enc.shape == (1,) and s_enc == (top * 6 / amax).float()
        assert nvidia[name][2].shape == () and abs(nvidia[name][2].double() * top * 6 / amax - 1) <= 2**-23
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                   for a, b in zip((codes, scales), nvidia[name], strict=False))


@pytest.mark.parametrize("kind", MODELS)
def test_compressed_tensors_reads_the_same_weights(kind):
    """It divides the block scale by s_enc where we multiply by s_dec = 1 / s_enc, before the code where we do
    it after, each rounded in fp32: 4 roundings, so that the two are 4 * 2^-24 apart at most before both are
    rounded to its bf16. Its own order of rounding, done here, it equals bit for bit."""
    pytest.importorskip("compressed_tensors", reason=f"compressed-tensors {MISSING}")
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
    from compressed_tensors.quantization import QuantizationConfig
    model, (_, cfg) = make(kind), MODELS[kind]
    tensors, kept = to_tensors(model, "compressed_tensors")
    said = quantization_config(cfg, "compressed_tensors", kept)["config.json"]
    known = QuantizationConfig.model_validate(said)
    scheme = known.config_groups["group_0"]
    assert known.format == "nvfp4-pack-quantized" and known.ignore == kept

    def read(codes, scales, scale):
        parts = {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": scale}
        return NVFP4PackedCompressor.decompress(parts, scheme)["weight"]
    from_nvidia = ModelOptNvfp4Converter(ignore=kept, targets=["re:.*"]).process(
        to_tensors(model, "modelopt")[0])
    for name, (codes, scales, s_enc) in quantized(tensors, "compressed_tensors").items():
        theirs = read(codes, scales, s_enc)
        q = nvfp4.Quantized(codes, scales, s_enc[0].reciprocal())
        grid = q._replace(scales=torch.ones_like(scales, dtype=torch.float32)).decode(torch.float32)
        lines = (scales.float() / s_enc).repeat_interleave(16, 1)
        assert torch.equal(theirs, (grid * lines).bfloat16())
        ours = q.dequantize()
        ends = [(ours * (1 + d)).bfloat16() for d in (-2.0**-22, 2.0**-22)]
        assert ((torch.minimum(*ends) <= theirs) & (theirs <= torch.maximum(*ends))).all()
        assert (theirs == ours.bfloat16()).float().mean() > 0.99
        for wrong in wrongly(codes, scales, s_enc):
            assert (read(*wrong) == theirs).float().mean() < 0.9, name
        assert torch.equal(from_nvidia[f"{name}.weight_packed"], codes)
        assert abs(from_nvidia[f"{name}.weight_global_scale"] / s_enc - 1) <= 2**-23


# ---------------------------------------------------------------- files

@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """(field=value, ...) -> the folder of a tiny run of two steps."""
    def folder(**changes):
        out_dir = tmp_path_factory.mktemp("run")
        settings = {"out_dir": out_dir, "dataset": dataset, "n_layer": 1, "n_embd": 32, "n_head": 2,
                    "block_size": 16, "batch_size": 2, "max_steps": 2, "eval_iters": 1, "sample_tokens": 0,
                    "device": "cpu", "compile": False, **changes}
        train.main([f"--{name}={value}" for name, value in settings.items()])
        return out_dir
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("recipe", "named", "engine"), [("ngpt", None, "W4A4"), ("bf16", "nvfp4", "W4A16")])
def test_a_run_through_files(run, tmp_path, layout, recipe, named, engine):
    pytest.importorskip("safetensors", reason=f"safetensors {MISSING}")
    folder, out = run(recipe=recipe), tmp_path / "packed"
    assert f"head in high precision; {engine} as {layout}" in export(folder, out, layout, named)
    model, tokenizer, c = load_export(out)
    original, _, own = train.load_run(folder)
    assert c == replace(own, recipe=named or recipe, fp4=PaperConfig(**vars(RECIPES[named or recipe])))
    nvfp4.convert(original, c.fp4, report=lambda line: None)
    assert torch.equal(logits(model), logits(original))
    assert tokenizer.n_vocab == original.config.vocab_size
    names = ["config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in out.iterdir()) == [name for name in names
                                                           if layout == "modelopt" or "hf_" not in name]
    with pytest.raises(UserError, match="exists already"):
        export(folder, out, layout, named)
    (out / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="no export of this code"):
        load_export(out)


@pytest.mark.parametrize(("changes", "message"), [
    ({"recipe": "mxfp4", "fp4_hadamard_size": 16}, "fp4_format=mxfp4: its codes and scales are not those of"),
    ({"recipe": "ufp4"}, "fp4_format=ufp4: its codes and scales are not those of NVFP4; name another recipe"),
    ({"recipe": "bf16"}, "recipe=bf16: its forward is, or ends, in high precision; name another recipe"),
    ({"fp4_until": 0.9}, "in high precision"),
    ({"fp4_hadamard": "fprop", "fp4_square_weights": False}, "engines neither rotate"),
    ({"fp4_occ": 0.99}, "engines neither rotate")])
def test_what_no_engine_computes_is_refused_in_one_line(run, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("export.library", lambda: torch)
    with pytest.raises(UserError, match=message) as refused:
        export(run(**changes), tmp_path / "packed")
    assert "\n" not in str(refused.value) and not (tmp_path / "packed").exists()


def test_without_the_library_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        export("none", tmp_path / "packed")
