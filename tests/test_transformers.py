"""Our mixers and hybrids against implementations not ours: those of transformers, in plain PyTorch, with our
weights copied over. Skipped without it: pip install -r tests/requirements.txt. Nothing is downloaded."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from export import TYPES, matrices_of, names
from model import ModelConfig, MoE, build, generate
from test_hybrid import far, scramble, weighted

pytest.importorskip("transformers", reason="transformers is not there: pip install -r tests/requirements.txt")
from transformers import Mamba2Config, NemotronHConfig, NemotronHForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.nemotron_h.modeling_nemotron_h import MIXER_TYPES

SMALL = ModelConfig(arch="gpt", n_embd=64, n_head=4, n_kv_head=2, head_dim=24, n_ffn=48, block_size=64,
                    vocab_size=80, rope_base=0.0, init_std=0.2, mamba_n_head=16, mamba_head_dim=8,
                    mamba_n_group=4, mamba_n_state=12, mamba_chunk=8, moe_n_expert=6, moe_n_active=2,
                    moe_aux_loss=0.0)
# Nemotron-H as transformers has it bounds time steps from below by time_step_min; the papers' models have no
# bound, and neither have we. Its MoE has no balance loss.
NEMOTRON = dict(
    vocab_size=80, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
    intermediate_size=48, mlp_hidden_act="relu2", mamba_num_heads=16, mamba_head_dim=8, n_groups=4,
    ssm_state_size=12, conv_kernel=4, chunk_size=8, time_step_min=1e-12, n_routed_experts=6,
    num_experts_per_tok=2, moe_intermediate_size=48, moe_shared_expert_intermediate_size=96,
    routed_scaling_factor=2.5, layer_norm_epsilon=1e-5, eos_token_id=None, use_cache=True)
pytestmark = pytest.mark.usefixtures("unfused")


def make(pattern, **changes):
    """Our model with every parameter at random, those that begin at a round number too."""
    model = build(replace(SMALL, pattern=pattern, **changes))
    scramble(model)
    for block in model.blocks:
        if isinstance(block.mixer, MoE):
            block.mixer.bias.normal_(std=0.2)
    return model


def renamed(names, ours):
    """{their name: tensor} of {our name: tensor}, of parameters or of gradients, by export.py's names."""
    found = {theirs: ours[name][rows] for theirs, name, rows in names if name in ours}
    return {name: t.t()[:, None] if name.endswith("conv1d.weight") else t for name, t in found.items()}


def copy_over(mixer, letter, theirs):
    theirs.load_state_dict(renamed(matrices_of(letter, mixer), mixer.state_dict()))     # strict: all are ours
    return theirs


def nemotron_mixer(letter):
    config = NemotronHConfig(layers_block_type=[TYPES[letter]], **NEMOTRON)
    config._attn_implementation = "sdpa"
    return MIXER_TYPES[TYPES[letter]](config, layer_idx=0)


def mamba2_mixer():
    config = Mamba2Config(num_heads=16, head_dim=8, hidden_size=64, state_size=12, expand=2, n_groups=4,
                          chunk_size=8, num_hidden_layers=1)
    return Mamba2Mixer(config, layer_idx=0)


def with_gradients(f, x, parameters):
    """y and the gradients of x and of named parameters, for a fixed gradient of y."""
    x = x.clone().requires_grad_()
    y = f(x)
    y = y[0] if isinstance(y, tuple) else y
    found = torch.autograd.grad(weighted(y), [x, *parameters.values()])
    return y.detach(), found[0], dict(zip(parameters, found[1:], strict=True))


def distances(mixer, letter, theirs, x):
    """{what: distance} of outputs and all gradients."""
    y, dx, dw = with_gradients(mixer, x, dict(mixer.named_parameters()))
    their_y, their_dx, their_dw = with_gradients(theirs, x, dict(theirs.named_parameters()))
    dw = renamed(matrices_of(letter, mixer), dw)
    assert set(dw) == set(their_dw)
    return {"y": far(y, their_y), "dx": far(dx, their_dx),
            **{name: far(dw[name], their_dw[name]) for name in dw}}


def wrong_copies(letter, theirs):
    """Their mixer with one mistake at a time, of those that leave all shapes as they are."""
    for name, change in {"M": (("conv1d.weight", lambda t: t.flip(-1)), ("D", torch.zeros_like),
                               ("A_log", lambda t: t.roll(1)), ("norm.weight", torch.ones_like)),
                         "*": (("q_proj.weight", lambda t: t.roll(24, 0)), ("k_proj.weight", lambda t: -t)),
                         "-": (("up_proj.weight", lambda t: -t),),
                         "E": (("gate.e_score_correction_bias", torch.zeros_like),
                               ("experts.up_proj", lambda t: t.roll(1, 0)),
                               ("gate.weight", lambda t: 0.9 * t))}[letter]:
        tensor = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
        before = tensor[name].detach().clone()
        tensor[name].data.copy_(change(before))
        yield name
        tensor[name].data.copy_(before)


@pytest.mark.parametrize(("letter", "make_theirs"), [
    ("M", mamba2_mixer), *((letter, lambda letter=letter: nemotron_mixer(letter)) for letter in "M*E-")],
    ids=("Mamba2Mixer", "NemotronHMamba2Mixer", "NemotronHAttention", "NemotronHMoE", "NemotronHMLP"))
def test_a_mixer_is_theirs(letter, make_theirs):
    """Outputs, gradients of the input and all weights, relative 1e-4. 21 tokens are two chunks and a half."""
    mixer, x = make(letter).blocks[0].mixer, torch.randn(2, 21, 64)
    theirs = copy_over(mixer, letter, make_theirs())
    found = distances(mixer, letter, theirs, x)
    assert max(found.values()) < 1e-4, found
    for name in wrong_copies(letter, theirs):
        assert distances(mixer, letter, theirs, x)["y"] > 1e-3, name
    if letter == "E":
        theirs.gate.routed_scaling_factor = 1.0
        assert distances(mixer, letter, theirs, x)["y"] > 1e-1


def nemotron(model):
    """NemotronHForCausalLM with a GPT's weights."""
    pattern = model.config.pattern
    theirs = NemotronHForCausalLM(NemotronHConfig(layers_block_type=[TYPES[s] for s in pattern], **NEMOTRON))
    theirs.load_state_dict(renamed(names_of(model), model.state_dict()))
    return theirs


def names_of(model):
    return [(theirs, *ours) for theirs, ours in names(model).items()]


@pytest.mark.parametrize("pattern", ["ME*-", "MEME*EM", "M-M*-"])
def test_a_hybrid_is_theirs(pattern):
    """Logits, gradients of the loss, and what is generated, with their cache and our state."""
    model = make(pattern)
    theirs, idx = nemotron(model), torch.randint(0, 80, (2, 38))
    model(idx[:, :-1], idx[:, 1:]).backward()
    logits = theirs(idx[:, :-1], use_cache=False).logits
    assert far(model(idx[:, :-1]), logits) < 1e-4
    F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    ours = renamed(names_of(model), {name: p.grad for name, p in model.named_parameters()})
    others = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(ours) == set(others)
    found = {name: far(ours[name], others[name]) for name in ours}
    assert max(found.values()) < 1e-4, found
    model.eval(), theirs.eval()
    prompt = idx[:, :11]
    said = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(generate(model, prompt, 20, temperature=0), said)
    with torch.no_grad():                           # controls: a mixer of the middle is wrong, or gone
        theirs.model.layers[1].norm.weight *= 1.1
        assert far(model(idx[:, :-1]), theirs(idx[:, :-1], use_cache=False).logits) > 1e-3
        del theirs.model.layers[1]
        assert far(model(idx[:, :-1]), theirs(idx[:, :-1], use_cache=False).logits) > 1e-1
