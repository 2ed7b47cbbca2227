"""GPT is the standard transformer, nGPT is the paper's: invariants, formulas, and controls that must fail."""
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model as model_file
import nvfp4
import train
from data.tokens import load_tokenizer
from model import (ModelConfig, build, count_parameters, describe,
                   flops_per_token, generate, rope, rope_tables, sample_text, training_bytes, unit)
from runs import REPO, refusal_of

SMALL = ModelConfig(n_layer=2, n_embd=64, n_head=4, n_kv_head=2, n_ffn=96, block_size=32, vocab_size=80)
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.usefixtures("unfused")


def make(arch="ngpt", **changes):
    return build(replace(SMALL, arch=arch, **changes))


def tokens(B=2, T=32):
    return torch.randint(0, 80, (B, T))


def close(a, b, bound):
    """Whether a and b agree within bound relative to the largest of b."""
    return bool((a - b).abs().max() <= bound * b.abs().max())


def scramble(module):
    """Move what begins at a round number away from it, so that none can be forgotten; of either sign."""
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
                p.mul_(torch.randn_like(p) + 0.5)


# ---------------------------------------------------------------- nGPT's formulas, written out in float64

def attention_scores(q, k, scale):
    """Causal softmax(scale q k^T): q (B, H, T, D), k (B, H, T, D)."""
    T = q.size(2)
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    return scores.softmax(-1)


def heads_reference(mixer, x):
    """q, k, v (B, H, T, D) with positions, key/value heads repeated, by complex rotation; x float64."""
    B, T, _ = x.size()
    qkv = (x @ mixer.qkv.weight.double().t()).view(B, T, -1, mixer.D).transpose(1, 2)
    q, k, v = qkv[:, :mixer.H], qkv[:, mixer.H:mixer.H + mixer.G], qkv[:, mixer.H + mixer.G:]
    half = mixer.D // 2
    angle = torch.arange(T)[:, None] * mixer.rope_base ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(z):
        z = torch.complex(z[..., :half].contiguous(), z[..., half:].contiguous()) * turn
        return torch.cat([z.real, z.imag], -1)

    repeat = mixer.H // mixer.G
    return rotate(q), rotate(k).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)


def unit64(x):
    return x / x.norm(dim=-1, keepdim=True)


def test_normalized_attention_is_the_papers():
    mixer = make().blocks[0].mixer
    scramble(mixer)
    x = unit(torch.randn(2, 32, 64))
    q, k, v = heads_reference(mixer, x.double())
    s = (mixer.s_qk.weight.double() * 64**0.5).view(mixer.H, 1, mixer.D)        # stored scaled by 1/sqrt(C)
    q, k = unit64(q) * s, unit64(k) * s
    y = (attention_scores(q, k, math.sqrt(mixer.D)) @ v).transpose(1, 2).flatten(2)
    expected = unit64(y) @ mixer.out.weight.double().t()
    assert close(mixer(x).double(), expected, 1e-5)
    wrong = (attention_scores(q, k, 1 / math.sqrt(mixer.D)) @ v).transpose(1, 2).flatten(2)
    assert not close(mixer(x).double(), unit64(wrong) @ mixer.out.weight.double().t(), 1e-2)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_normalized_mlp_is_the_papers(activation):
    mixer = make(activation=activation).blocks[1].mixer
    scramble(mixer)
    x = unit(torch.randn(2, 32, 64))
    hidden, s_u = x.double() @ mixer.fc1.weight.double().t(), mixer.s_u.weight.double()
    if activation == "swiglu":
        u, v = hidden.chunk(2, -1)
        hidden = u * s_u * F.silu(v * mixer.s_v.weight.double() * 8)
    else:
        hidden = F.relu(hidden * s_u * 8).square()
    assert close(mixer(x).double(), unit64(hidden) @ mixer.fc2.weight.double().t(), 1e-5)
    assert not close(mixer(x).double(), hidden @ mixer.fc2.weight.double().t(), 1e-2)


def test_residual_step_is_the_papers():
    block = make().blocks[1]
    scramble(block)
    h = unit(torch.randn(2, 32, 64))
    f, a = block.mixer(h).double(), block.alpha.weight.double() * 0.05 * 64**0.5
    expected = unit64(h.double() + a.abs() * (unit64(f) - unit64(h.double())))
    assert close(block(h).double(), expected, 1e-5)
    signed = unit64(h.double() + a * (unit64(f) - unit64(h.double())))
    assert not close(block(h).double(), signed, 1e-3)


def test_normalizing_the_gemm_inputs_changes_nothing_but_their_range():
    """unit(W unit(x)) = unit(W x): the residual step normalizes the mixer's output anyway."""
    with_norms = make()
    scramble(with_norms)
    without = make(normalize_inputs=False)
    without.load_state_dict(with_norms.state_dict())
    idx = tokens()
    assert close(without(idx), with_norms(idx), 1e-5)
    for block in (*without.blocks, *with_norms.blocks):     # control: without that last norm the two differ
        block.forward = lambda h, _, block=block: unit(h + block.alpha().abs() * (block.mixer(h) - h))
    assert not close(without(idx), with_norms(idx), 1e-3)


@pytest.mark.parametrize("s_z, alpha", ((1.0, 0.05), (16.0, 0.4)))
def test_effective_initial_scales_and_their_speed(s_z, alpha):
    """s_z and alpha begin where the config says. s_z moves by one speed wherever it begins, 1/init_std = 8
    for n_embd = 64, and so does s_qk; alpha, as 2410.01131 stores it, by a speed that grows with its
    beginning."""
    model = make(s_z_init=s_z, alpha_init=alpha)
    attention = model.blocks[0]
    for scale, start, speed in ((model.s_z, s_z, 8), (attention.mixer.s_qk, 1, 8),
                                (attention.alpha, alpha, 8 * alpha)):
        assert torch.allclose(scale(), torch.full_like(scale.weight, start))
        scale.weight.data.add_(0.001)
        assert torch.allclose(scale(), torch.full_like(scale.weight, start + 0.001 * speed))


# ---------------------------------------------------------------- GPT is standard

def test_gpt_is_the_textbook_transformer():
    model = make("gpt").double()
    idx = tokens()
    h = F.embedding(idx, model.embed.weight)

    def rms(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    for attention, mlp in zip(model.blocks[0::2], model.blocks[1::2], strict=True):
        q, k, v = heads_reference(attention.mixer, rms(h, attention.norm))
        y = (attention_scores(q, k, 1 / math.sqrt(16)) @ v).transpose(1, 2).flatten(2)
        h = h + y @ attention.mixer.out.weight.t()
        h = h + F.relu(rms(h, mlp.norm) @ mlp.mixer.fc1.weight.t()).square() @ mlp.mixer.fc2.weight.t()
    expected = rms(h, model.norm) @ model.head.weight.t()
    assert close(model(idx), expected, 1e-5)        # rope runs in fp32
    assert not close(model(idx), rms(h, model.norm) @ model.embed.weight.t(), 1e-1)


@pytest.mark.parametrize(("recipe", "exact"), [("bf16", True), ("ngpt", True), ("nvfp4", False)])
def test_the_past_does_not_see_the_future(recipe, exact):
    """Nor in FP4 where tensor scales are fixed: a row's quantization then depends on that row alone. Where
    they are measured, a large row moves the rounding of all others."""
    cfg = replace(nvfp4.RECIPES[recipe], tail=0.0)
    model = nvfp4.convert(make(), cfg, report=lambda line: None)
    nvfp4.set_step(model, 0, 0)
    idx = torch.randint(0, 79, (2, 32))
    changed = idx.clone()
    changed[:, 20] = 79
    with torch.no_grad():
        model.embed.weight[79] *= 1.7
        a, b = model(idx), model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) is exact and not torch.equal(a[:, 20], b[:, 20])


def test_rope_depends_on_distance_only_and_keeps_norms():
    cos, sin = rope_tables(torch.arange(32), 16, 10000.0)
    q, k = torch.randn(16).expand(1, 1, 32, 16), torch.randn(16).expand(1, 1, 32, 16)
    scores = (rope(q, cos, sin) @ rope(k, cos, sin).transpose(-1, -2))[0, 0]    # (T, T)
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        assert float((diagonal - diagonal[0]).abs().max()) < 20 * EPS * float(q.norm() * k.norm())
    assert float(scores.diagonal(-1)[0] - scores.diagonal(0)[0]) != 0
    assert close(rope(q, cos, sin).norm(dim=-1), q.norm(dim=-1), 10 * EPS)


# ---------------------------------------------------------------- mixers

@pytest.mark.parametrize("arch", ["gpt", "ngpt"])
def test_matrices_are_decayed_and_described_and_nothing_else_is(arch):
    """Those of GEMMs, stacked ones of experts too; not kernels of convolutions, decays, gains and biases."""
    model = make(arch, pattern="ME*-", mamba_head_dim=16)
    names = {p: name for name, p in model.named_parameters()}
    matrices = [f"blocks.{i}.mixer.{name}.weight" for i, name in (
        (0, "in_proj"), (0, "out_proj"), (1, "router"), (1, "experts.fc1"), (1, "experts.fc2"),
        (1, "shared.fc1"), (1, "shared.fc2"), (2, "qkv"), (2, "out"), (3, "fc1"), (3, "fc2"))]
    decayed, others = (group["params"] for group in
                       train.make_optimizer(model, train.make_config({})).param_groups)
    assert sorted(names[p] for p in decayed) == sorted(["embed.weight", *matrices, "head.weight"])
    assert {names[p] for p in others} == {*names.values()} - {names[p] for p in decayed}
    described = re.findall(r"^(\S+) +\d+ +\d+ +[\d,]+$", describe(model.config), re.M)
    assert [f"{name}.weight" for name in described] == [*matrices, "head.weight"]
    assert re.search(r"^blocks.1.mixer.experts.fc2 +64 +96 +49,152$", describe(model.config), re.M)


def test_training_state_is_what_a_step_leaves():
    model, idx = make(), tokens()
    optimizer = train.make_optimizer(model, train.make_config({}))
    model(idx, idx).backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    kept = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
    assert training_bytes(model) == sum(t.numel() * t.element_size() for t in kept)
    state = f"training state {training_bytes(model) / 2**30:.2f} GiB"
    assert state in describe(model.config)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_weights_are_drawn_in_the_order_that_old_runs_began_with(activation):
    """All matrices in their order, then once more, smaller, what writes to the stream: bit for bit."""
    model = make("gpt", activation=activation)
    expected, std = make("gpt", activation=activation), 0.02
    torch.manual_seed(1)
    model.init_weights()
    torch.manual_seed(1)
    for m in expected.modules():
        if isinstance(m, (torch.nn.Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(m.weight, std=std)
    for block in expected.blocks:
        writer = block.mixer.out if hasattr(block.mixer, "out") else block.mixer.fc2
        torch.nn.init.normal_(writer.weight, std=std / math.sqrt(4))
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


# ---------------------------------------------------------------- loss, counting, sampling, errors

@pytest.mark.parametrize("arch", ["gpt", "ngpt"])
def test_loss_is_the_mean_cross_entropy_and_starts_near_uniform(arch):
    model, idx = make(arch), tokens(T=33)
    log_p = model(idx[:, :-1]).double().log_softmax(-1)
    expected = -log_p.gather(-1, idx[:, 1:, None]).mean()
    assert close(model(idx[:, :-1], idx[:, 1:]).double(), expected, 1e-6)
    assert abs(float(expected) - math.log(80)) < 0.2


def test_counts():
    model = make()
    per_layer = 64 * (4 + 2 * 2) * 16 + 64 * 64 + 2 * 64 * 96                   # qkv, out, fc1 and fc2
    scales = 2 * (64 + 64 + 64 + 96)                                            # alpha twice, s_qk, s_u
    assert count_parameters(model)[0] == 2 * 80 * 64 + 2 * per_layer + scales + 80
    assert count_parameters(model)[0] - count_parameters(model)[1] == 80 * 64
    assert flops_per_token(model) == 6 * (2 * per_layer + 80 * 64) + 12 * 2 * 64 * 32
    assert f"{count_parameters(model)[0]:,}" in describe(model.config)


def test_a_sample_stays_within_the_tokenizer():
    model, tokenizer = make(vocab_size=300).eval(), load_tokenizer("bytes")
    with torch.no_grad():
        model.head.weight[256:] = model.head.weight[:44]                        # as likely as real tokens
    assert generate(model, tokens(1, 5), 99, top_k=0).max() >= 256              # control: they would be drawn
    assert len(sample_text(model, tokenizer, "a", n_tokens=99, top_k=0)) > 1


@pytest.mark.parametrize(("changes", "says"), [
    ({"vocab_size": None}, "vocab_size"), ({"n_head": 5}, "head_dim"), ({"n_kv_head": 3}, "n_kv_head"),
    ({"head_dim": 15}, "head_dim"),
    ({"pattern": "*x"}, r"^pattern=\*x must consist of \* \(Attention\) and - \(MLP\) and")])
def test_sizes_that_do_not_fit_are_one_line(changes, says):
    with pytest.raises(ValueError, match=says) as error:
        make("gpt", **changes)
    assert "\n" not in str(error.value)


def test_too_long_an_input_is_one_line():
    with pytest.raises(ValueError, match="block_size=32"):
        make()(tokens(T=33))


# ---------------------------------------------------------------- the command

def test_a_model_is_described_from_a_config_file_and_flags(tmp_path, capsys):
    (tmp_path / "a.py").write_text("batch_size = 3\nn_layer = 3\nvocab_size = 80\n")
    model_file.main([str(tmp_path / "a.py"), "--n_embd=64"])
    assert capsys.readouterr().out == describe(ModelConfig(n_layer=3, vocab_size=80, n_embd=64)) + "\n"
    model_file.main(["-h"])
    assert "\n  --pattern  " in capsys.readouterr().out
    for argv, says in ((["--batch_size=3"], "command line: no field is called batch_size; did you mean b"),
                       (["configs/gpt_tin.py"], "no such config file; did you mean configs/gpt_tiny.py?"),
                       (["--vocab_size=9", "--pattern=x"], "pattern=x must consist of"),
                       ([str(tmp_path)], "ckpt.pt: no checkpoint there")):
        assert says in refusal_of(model_file.main, argv)


def test_a_run_is_sampled_without_the_training_code(tiny, tmp_path):
    """From what is in its folder and in its dataset's, from another folder, in a process of its own."""
    train.main(tiny(tmp_path / "run", max_steps=1))
    command = [sys.executable, "-X", "importtime", REPO / "model.py", tmp_path / "run", "ab", "cd"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("ab cd") and len(done.stdout) > 100
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"train", "papers", "analyze"} & imported
    assert {"torch", "configs.config", "data.tokens"} <= imported               # control


def test_sampling_takes_flags(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(model_file, "load_model", lambda folder: (folder, "tokenizer", {}))
    monkeypatch.setattr(model_file, "sample_text", lambda *what, **how: asked.append((what, how)) or "text")
    model_file.main(["out/run", "--temperature=0", "The", "state", "--n_tokens=5"])
    assert asked == [(("out/run", "tokenizer", "The state"), {"temperature": 0.0, "n_tokens": 5})]
    for flag, says in (("--temprature=0", "no field is called temprature; did you mean temperature?"),
                       ("--top_k=-1", "top_k=-1"), ("--n_tokens", "must be given as --n_tokens=VALUE")):
        assert says in refusal_of(model_file.main, ["out/run", flag])
