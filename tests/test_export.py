"""Proofs for export.py: transformers computes from what is written what we compute, and tokenizers reads text
as we do. They are skipped without: pip install -r tests/requirements.txt. Nothing is downloaded."""
import json
import sys

import pytest
import torch

import nvfp4
import train
from data.tokens import bpe_encoding, load_tokenizer, prepare, train_bpe
from export import export, main, tokenizer_json
from model import generate
from runs import flags_of, refusal_of
from test_data import ENGLISH, FOREIGN
from test_hybrid import far

MISSING = "is not there: pip install -r tests/requirements.txt"
HYBRID = {"pattern": "ME*-M", "rope_base": 0, "mamba_n_head": 16, "mamba_head_dim": 4, "mamba_n_group": 2,
          "mamba_n_state": 16, "mamba_chunk": 8, "moe_n_expert": 4, "n_ffn": 48}
KINDS = {"Arcee": {}, "Arcee, grouped heads": {"n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_layer": 2},
         "NemotronH": HYBRID}
pytestmark = pytest.mark.usefixtures("unfused")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(field=value, ...) -> the folder of a tiny run of GPT, of 20 steps at a rate that moves all weights."""
    data = tmp_path_factory.mktemp("data")
    prepare([ENGLISH], [ENGLISH[:5000]], data, "a test", vocab_size=300)

    def folder(**changes):
        out_dir = tmp_path_factory.mktemp("run")
        settings = {"arch": "gpt", "recipe": "nvfp4", "fp4_tail": 0, "n_ffn": 64, "block_size": 64,
                    "batch_size": 4, "max_steps": 20, "learning_rate": 0.02, **changes}
        train.main(flags_of(data, out_dir, **settings))
        return out_dir
    return folder


def loaded(folder, dtype):
    import transformers
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return theirs.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def as_written(folder, packed):
    """Our model with its matrices as export() writes them, computing in fp32."""
    model, tokenizer, c = train.load_run(folder)
    converted = nvfp4.convert(train.load_run(folder)[0], c.fp4, report=lambda line: None) if packed else model
    with torch.no_grad():
        for (name, layer), other in zip(list(model.named_modules()), converted.modules(), strict=True):
            if isinstance(other, nvfp4.FP4Linear):
                rows = nvfp4.quantize(other.filled_weight(), **other.cfg.operand("fprop.w", other.keys))
                values = rows.dequantize().unflatten(0, (*layer.weight.shape[:-2], -1))
                layer.weight.copy_(values[..., :layer.weight.shape[-2], :])
                if layer.weight.dim() == 2:
                    continue
            if isinstance(layer, torch.nn.Linear | torch.nn.Embedding) and not name.endswith("router"):
                layer.weight.copy_(layer.weight.bfloat16())
    return model.eval(), tokenizer


@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same(run, tmp_path, kind, packed):
    """Logits and greedy text. A control: without one norm's weights it does not.

    error   of sums in fp32: 1e-4. What is packed it unpacks to bf16, and computes in bf16: a rounding of 2^-9
            of each value that enters or leaves one of up to 12 layers, 2^-5 of the largest logit
    """
    for library in ("transformers", "safetensors", *["compressed_tensors"] * packed):
        pytest.importorskip(library, reason=f"{library} {MISSING}")
    folder = run(**KINDS[kind])
    said = export(folder, tmp_path / "hf", packed)
    assert kind.split(",")[0] in said
    theirs, their_tokenizer = loaded(tmp_path / "hf", torch.bfloat16 if packed else torch.float32)
    model, tokenizer = as_written(folder, packed)
    idx = torch.tensor([tokenizer.encode_ordinary(ENGLISH[i:])[:40] for i in (100, 3000)])
    assert their_tokenizer(ENGLISH[100:400])["input_ids"][:40] == idx[0].tolist()
    with torch.no_grad():
        logits, bound = theirs(idx).logits.float(), 2**-5 if packed else 1e-4
        assert far(logits, model(idx)) < bound
        text = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=12, do_sample=False,
                               eos_token_id=None)
        if not packed:
            assert torch.equal(text, generate(model, idx, 12, temperature=0))
        final = theirs.model.norm if hasattr(theirs.model, "norm") else theirs.model.norm_f
        final.weight.mul_(torch.linspace(0.5, 1.5, len(final.weight)))
        assert far(theirs(idx).logits.float(), model(idx)) > 2 * bound


def test_packed_codes_are_those_of_the_forward(run, tmp_path):
    """Bit for bit: each row of q, k and v as rows of our one matrix; the head is not packed."""
    load = pytest.importorskip("safetensors.torch", reason=f"safetensors {MISSING}").load_file
    folder = run(n_kv_head=1, document_start=-1)
    assert "a token sees the documents before its own" in export(folder, tmp_path / "hf", packed=True)
    found = load(tmp_path / "hf/model.safetensors")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    model, _, c = train.load_run(folder)
    layer = nvfp4.convert(model, c.fp4, report=lambda line: None).blocks[0].mixer.qkv
    q = nvfp4.quantize(layer.weight.detach(), **layer.cfg.operand("fprop.w", layer.keys))
    start = 0
    for name, rows in (("q", 32), ("k", 16), ("v", 16)):
        at = f"model.layers.0.self_attn.{name}_proj.weight"
        assert torch.equal(found[f"{at}_packed"], q.codes[start:start + rows])
        assert torch.equal(found[f"{at}_scale"].float(), q.scale_of_lines()[start:start + rows, :, 0])
        assert found[f"{at}_global_scale"] == 448 * 6 / layer.weight.detach().abs().max()
        start += rows
    assert config["quantization_config"]["ignore"] == ["lm_head"] and "lm_head.weight" in found


@pytest.mark.parametrize("name", ["bpe", "bytes", "gpt2"])
def test_tokenizers_reads_text_as_we_do(name):
    """Among it white space of all kinds, foreign letters, a long word. A control: merges in another order."""
    tokenizers = pytest.importorskip("tokenizers", reason=f"tokenizers {MISSING}")
    try:
        ours = bpe_encoding(train_bpe(ENGLISH, 700)) if name == "bpe" else load_tokenizer(name)
    except train.UserError:
        pytest.skip("GPT-2's tokens are not here")
    found = tokenizer_json(ours)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(found))
    text = ENGLISH[:20000] + FOREIGN.replace("<|endoftext|>", "") + "a" * 300 + " " * 70 + "\n\n\t x"
    ids = theirs.encode(text).ids
    assert ids == ours.encode_ordinary(text) and theirs.decode(ids) == text
    if name == "bpe":
        assert theirs.encode("a<|endoftext|>b").ids == [97, ours.eot_token, 98]
        found["model"]["merges"] = found["model"]["merges"][::-1]
        assert tokenizers.Tokenizer.from_str(json.dumps(found)).encode(text).ids != ids


@pytest.mark.parametrize(("changes", "packed", "message"), [
    ({"arch": "ngpt", "recipe": "ngpt"}, False, "arch=ngpt: transformers has no class for it"),
    ({"activation": "swiglu"}, False, "activation=swiglu: Arcee and NemotronH have relu2 alone"),
    ({"rope_base": 0}, False, "rope_base=0: Arcee has rotary positions always"),
    (HYBRID | {"rope_base": 100}, False, "rope_base=100: NemotronH has no positions"),
    ({"recipe": "bf16"}, True, "recipe=bf16: its forward is, or ends, in high precision; leave out --packed"),
    ({"fp4_until": 0.9}, True, "in high precision"),
    ({"recipe": "ufp4"}, True, "the forward of this recipe is not plain NVFP4"),
    ({"fp4_occ": 0.99}, True, "the forward of this recipe is not plain NVFP4")])
def test_what_cannot_be_written_is_one_line(run, tmp_path, changes, packed, message):
    pytest.importorskip("safetensors", reason=f"safetensors {MISSING}")
    line = refusal_of(main, [run(max_steps=1, **changes), tmp_path / "hf", *["--packed"] * packed])
    assert message in line and not (tmp_path / "hf").exists()


def test_mistakes_of_the_command_are_one_line(tmp_path, monkeypatch):
    assert "takes a run, a new folder and --packed" in refusal_of(main, ["one", "two", "--layout=modelopt"])
    assert f"{tmp_path} exists already" in refusal_of(main, ["none", tmp_path])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal_of(main, ["none", tmp_path / "new"])
