"""Mamba-2, the mixture of experts and decoding with a state: each against its definition written out, with
controls that must fail; the papers' sizes; experts in FP4 against quantize() and plain products."""
import copy
import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model as model_file
import nvfp4
import train
from model import (ExpertLinear, ModelConfig, MoE, build, count_parameters, flops_per_token,
                   gather, generate, ssm, ssm_chunked, unit)
from nvfp4 import FORMATS, OPERANDS, RECIPES, FP4Config, FP4Linear
from papers import PaperConfig
from runs import REPO
from test_model import tokens
from test_nvfp4 import PLACE, as_paper, quantized, run

# every size a multiple of 16, as FP4 wants it: in_proj makes 128 z, 128 + 2 * 64 x B C and 16 dt
SMALL = ModelConfig(pattern="ME*-", n_embd=64, n_head=4, n_kv_head=2, n_ffn=48, block_size=32, vocab_size=80,
                    mamba_n_head=16, mamba_head_dim=8, mamba_n_group=4, mamba_n_state=16, mamba_chunk=8,
                    moe_n_expert=4, moe_n_active=2)
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.usefixtures("unfused")
both_archs = pytest.mark.parametrize("arch", ["gpt", "ngpt"])
both_precisions = pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)],
                                          ids=str)


def make(arch="gpt", **changes):
    return build(replace(SMALL, arch=arch, **changes))


def make_mixer(letter, arch="gpt", **changes):
    return make(arch, pattern=letter, **changes).blocks[0].mixer


def far(a, b):
    """Largest distance of a from b, relative to the largest of b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))         # where b is zero so must a be


def weighted(y):
    """A sum over y that gives it a fixed gradient, everywhere another one."""
    return (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)).sum()


def scramble(module):
    """Move every parameter that begins at a round number away from it, so that none can be forgotten."""
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn_like(p)


# ---------------------------------------------------------------- the state space model

def ssm_inputs(dtype, T, G, speed, b=2, H=4, P=3, N=5):
    """x, dt, A, B, C, h; dt up to speed, A from -1 to -16 as a model begins."""
    x, B, C = torch.randn(b, T, H, P), torch.randn(b, T, G, N), torch.randn(b, T, G, N)
    inputs = x, speed * torch.rand(b, T, H), -torch.linspace(1, 16, H), B, C, torch.randn(b, H, P, N)
    return [t.to(dtype).requires_grad_() for t in inputs]


def with_gradients(scan, inputs):
    """y, the last h and the gradients of all inputs."""
    y, h = scan(*inputs)
    return [y, h, *torch.autograd.grad(weighted(y) + weighted(h), inputs)]


@both_precisions
def test_chunks_are_the_recurrence(dtype, bound):
    """Outputs, state, and the gradients of all inputs, with a state before the first token or none, and with
    documents that begin anywhere or none. Steps of 4 units let a chunk of 128 tokens fade by e^-4000 in some
    heads: there the differences of what has been summed up still have their digits."""
    sizes = (1, 8), (7, 8), (16, 8), (21, 8), (21, 1), (21, 64)
    for (T, L), G, given, parts in itertools.product(sizes, (1, 2, 4), (False, True), (False, True)):
        inputs = ssm_inputs(dtype, T, G, speed=0.1)[:6 if given else 5]
        begins = torch.rand(2, T) < 0.2 if parts else None
        want = with_gradients(functools.partial(ssm, begins=begins), inputs)
        got = with_gradients(functools.partial(ssm_chunked, L=L, begins=begins), inputs)
        assert all(far(a, b) < bound for a, b in zip(got, want, strict=True)), (T, L, G, given, parts)
    for speed in (0.01, 1, 4):
        inputs = ssm_inputs(dtype, 150, 2, speed)
        want = with_gradients(ssm, [t.detach().double().requires_grad_() for t in inputs])
        got = with_gradients(lambda *a: ssm_chunked(*a, L=128), inputs)
        assert [far(a, b) < bound for a, b in zip(got, want, strict=True)] == [True] * 8, speed


def test_wrong_recurrences_are_noticed():
    x, dt, A, B, C, h = ssm_inputs(torch.float64, 21, 2, speed=0.1)
    y, last = ssm_chunked(x, dt, A, B, C, h, L=8)
    before = dt.roll(1, 1)                          # a decay off by one step, the input's weight as it was
    halves = [ssm(x[:, span], dt[:, span], A, B[:, span], C[:, span], h)
              for span in (slice(0, 10), slice(10, 21))]
    for wrong in (ssm(x * (dt / before)[..., None], before, A, B, C, h), ssm(x, dt, A, B, C),
                  ssm(x, dt, A, B.flip(2), C, h), ssm(x, dt, A, C, B, h), ssm(x, dt, A.flip(0), B, C, h),
                  (torch.cat([half[0] for half in halves], 1), halves[1][1])):         # state not carried
        assert far(wrong[0], y) > 1e-2 and far(wrong[1], last) > 1e-2
    assert all(far(a, b) < 1e-10 for a, b in zip(ssm(x, dt, A, B, C, h), (y, last), strict=True))


# ---------------------------------------------------------------- Mamba-2, written out in float64

def mamba_reference(mixer, x, wrong=None):
    """The mixer token by token, from its parameters; wrong: one of the mistakes below."""
    p = {name: value.detach().double() for name, value in mixer.named_parameters()}
    z, xBC, dt = (x.double() @ p["in_proj.weight"].t()).split(
        [mixer.H * mixer.P, sum(mixer.parts), mixer.H], -1)
    W, T = len(p["conv"]), x.size(1)
    kernel = p["conv"].flip(0) if wrong == "convolution reversed" else p["conv"]
    xBC = F.silu(p["conv_bias"] + F.conv1d(F.pad(xBC.transpose(1, 2), (W - 1, 0)), kernel.t()[:, None],
                                           groups=xBC.size(-1)).transpose(1, 2))
    x, B, C = (t.unflatten(-1, (n, -1)) for t, n in
               zip(xBC.split(mixer.parts, -1), (mixer.H, mixer.G, mixer.G), strict=True))
    B, C = (t.repeat_interleave(mixer.H // mixer.G, 2) for t in (B, C))
    dt = F.softplus(dt + p["dt_bias"])
    fade = (-(dt.roll(1, 1) if wrong == "decay of the step before" else dt) * p["A_log"].exp()).exp()
    h, y = x.new_zeros(len(x), mixer.H, mixer.P, mixer.N), []
    for t in range(T):
        h = fade[:, t, :, None, None] * h
        h = h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        y.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
    y = torch.stack(y, 1)
    y = y if wrong == "no skip" else y + p["D"][:, None] * x
    gate, groups = F.silu(z), 1 if wrong == "one group" else mixer.G

    def norm(y):
        y = y.unflatten(-1, (groups, -1))
        return (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2)
    y = norm(y.flatten(2)) * gate if wrong == "norm before gate" else norm(y.flatten(2) * gate)
    y = y * p["norm"]
    return (unit(y) if hasattr(mixer, "normalize_inputs") else y) @ p["out_proj.weight"].t()


@both_archs
def test_mamba_is_the_papers(arch):
    mixer, x = make_mixer("M", arch), torch.randn(2, 21, 64)
    scramble(mixer)
    assert far(mixer(x), mamba_reference(mixer, x)) < 1e-5
    for wrong in ("no skip", "convolution reversed", "decay of the step before", "norm before gate",
                  "one group"):
        assert far(mixer(x), mamba_reference(mixer, x, wrong)) > 1e-3, wrong


@both_archs
def test_decays_begin_where_the_paper_says(arch):
    """A from 1 to 16, dt from 0.001 to 0.1, D and the norm 1. None is drawn as matrices are."""
    mixer = make_mixer("M", arch, mamba_n_head=256, mamba_head_dim=4)
    A, dt = mixer.A_log.detach().exp(), F.softplus(mixer.dt_bias.detach())
    assert 1 <= float(A.min()) < 2 and 15 < float(A.max()) <= 16
    assert 0.999e-3 < float(dt.min()) < 2e-3 and 0.05 < float(dt.max()) < 0.1001
    assert abs(float(dt.log().mean()) - math.log(0.01)) < 0.25                  # even in the logarithm
    assert (mixer.D == 1).all() and (mixer.norm == 1).all()
    for drawn in (mixer.conv, mixer.conv_bias):
        assert 0.4 < float(drawn.detach().abs().max()) <= 0.5                   # 1 / sqrt(4 tokens)


# ---------------------------------------------------------------- documents kept apart

START = 79


def documents(*lengths):
    """Documents of so many tokens, each begun by START."""
    return [torch.cat([torch.tensor([[START]]), torch.randint(0, START, (1, n - 1))], 1) for n in lengths]


def logits_and_gradients(model, pieces):
    """Of sequences, the logits one after the other, and the gradients of a loss that is a sum over tokens."""
    y = torch.cat([model(piece) for piece in pieces], 1)
    return [y, *torch.autograd.grad(weighted(y), model.parameters())]


@both_precisions
@both_archs
def test_packed_documents_are_each_alone(arch, dtype, bound, monkeypatch):
    """Logits and all gradients. Positions are each document's own, for nGPT scales queries after it rotates
    them, channel by channel. The balance loss is left out, which is one of a sequence, of all its documents.
    """
    if dtype == torch.float64:                      # what is computed in fp32 at least
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for pattern, changes in (("*-", {}), ("*-", {"rope_base": 0.0}), ("M", {}), ("ME*-", {})):
        model = make(arch, pattern=pattern, document_start=START, moe_aux_loss=0.0, **changes).to(dtype)
        scramble(model)
        parts = documents(9, 3, 12)
        want = logits_and_gradients(model, parts)
        got = logits_and_gradients(model, [torch.cat(parts, 1)])
        assert all(far(a, b) < bound for a, b in zip(got, want, strict=True)), (pattern, changes)
        model.config = replace(model.config, document_start=None)               # control
        y = model(torch.cat(parts, 1))
        assert far(y[:, :9], want[0][:, :9]) < bound and far(y[:, 9:], want[0][:, 9:]) > 1e-2


# ---------------------------------------------------------------- decoding with a state

PIECES = (5, 1, 1, 4, 1, 7, 1)                      # tokens fed at once: a prompt, single ones, several again


def states(model):
    return [{} for _ in model.blocks]


def step_by_step(f, x, pieces=PIECES, state=None):
    """f fed with pieces of x (B, T, ...) and one state, side by side again."""
    state = {} if state is None else state
    assert x.size(1) == sum(pieces)
    return torch.cat([f(piece, state=state) for piece in x.split(pieces, 1)], 1)


@torch.no_grad()
@both_archs
def test_a_mixer_step_by_step_is_the_whole(arch):
    for letter, changes in (("*", {}), ("*", {"n_kv_head": 4}), ("*", {"rope_base": 0.0}), ("M", {}),
                            ("M", {"mamba_conv": 1}), ("-", {}), ("E", {})):
        mixer, x = make_mixer(letter, arch, **changes).eval(), torch.randn(2, sum(PIECES), 64)
        scramble(mixer)
        whole, state = mixer(x), {}
        for pieces in (PIECES, (1,) * 20, (2, 18)):
            assert far(step_by_step(mixer, x, pieces), whole) < 1e-5, (letter, changes, pieces)
        mixer(x[:, :5], state=state)
        assert set(state) == {"*": {"k", "v", "tokens"}, "M": {"window", "h"}}.get(letter, set())
        for name in state:                          # control: an entry of the state that is not carried
            idle = name == "tokens" and not mixer.rope_base or name == "window" and len(mixer.conv) == 1
            forgotten = state | {name: 0 * state[name]}
            assert (far(mixer(x[:, 5:], state=forgotten), whole[:, 5:]) > 1e-3) != idle, (letter, name)


@torch.no_grad()
@both_archs
@pytest.mark.parametrize("document_start", [None, START])
def test_a_model_step_by_step_is_the_whole(arch, document_start):
    """Each sequence has its own documents, which go on from piece to piece. A copy of states goes its own
    way."""
    model = make(arch, pattern="ME*M-*", document_start=document_start).eval()
    scramble(model)
    idx = torch.cat([torch.cat(documents(*lengths), 1) for lengths in ((4, 5, 11), (7, 13))])
    whole = model(idx)
    for pieces in (PIECES, (1,) * 20, (9, 11)):
        assert far(step_by_step(model, idx, pieces, states(model)), whole) < 1e-5
    first = states(model)
    step_by_step(model, idx[:, :11], (5, 1, 5), first)
    second, third, fourth = (copy.deepcopy(first) for _ in range(3))
    model(tokens(T=9), state=third)
    a, b = (model(idx[:, 11:], state=state) for state in (first, second))
    assert torch.equal(a, b) and far(a, whole[:, 11:]) < 1e-5
    assert far(model(idx[:, 11:], state=first), whole[:, 11:]) > 1e-3           # control: it has gone on
    if document_start:                              # control: it is not known where the documents began
        for state in fourth:
            state["starts"] = torch.zeros_like(state["starts"])
        assert far(model(idx[:, 11:], state=fourth), whole[:, 11:]) > 1e-2


@torch.no_grad()
@both_archs
def test_beyond_block_size_attention_slides(arch):
    """Token t sees itself and the block_size - 1 before it, as if the sequence began there: rotations depend
    on distances alone, in nGPT as long as s_qk, which comes after them, is one for a pair of channels."""
    mixer, x = make_mixer("*", arch, block_size=8), torch.randn(2, 20, 64)
    y = step_by_step(mixer, x, (8, 1, 1, 4, 6))
    for window in (7, 8, 9):
        alone = [mixer(x[:, max(0, t + 1 - window):t + 1])[:, -1:] for t in range(20)]
        distance = far(y, torch.cat(alone, 1))
        assert distance < 1e-5 if window == 8 else distance > 1e-3


def stateless(model, idx, n_tokens, generator=None, window=None):
    """generate() without a state: the whole sequence, or its last window tokens, for every token. The
    likeliest, or with a generator drawn from all at temperature 1."""
    for _ in range(n_tokens):
        logits = model(idx if window is None else idx[:, -window:])[:, -1]
        token = (logits.argmax(-1, keepdim=True) if generator is None
                 else torch.multinomial(logits.softmax(-1), 1, generator=generator))
        idx = torch.cat([idx, token], 1)
    return idx


@torch.no_grad()
@both_archs
def test_generate_is_the_loop_without_a_state(arch):
    model, fed, seeds = make(arch, init_std=0.2).eval(), [], torch.Generator()
    for n_prompt in (1, 20):
        prompt = tokens(2, n_prompt)
        want = stateless(model, prompt, 8)
        assert torch.equal(generate(model, prompt, 8, temperature=0), want)
        assert torch.equal(generate(model, prompt, 8, top_k=1), want)
        got = generate(model, prompt, 8, 1.0, top_k=0, generator=seeds.manual_seed(1))
        want, other = (stateless(model, prompt, 8, seeds.manual_seed(seed)) for seed in (1, 2))
        assert torch.equal(got, want) and not torch.equal(got, other)
    hook = model.register_forward_pre_hook(lambda _, args: fed.append(args[0].size(1)))
    generate(model, prompt, 5)
    hook.remove()
    assert fed == [20, 1, 1, 1, 1]                  # what a state is for


@torch.no_grad()
def test_generate_beyond_block_size():
    """A prompt's last block_size tokens are read. One layer of attention is the loop over the last block_size
    tokens."""
    model = make("ngpt", pattern="*-", block_size=8, s_z_init=20.0, alpha_init=0.5).eval()
    whole = build(replace(model.config, block_size=64)).eval()
    whole.load_state_dict(model.state_dict())
    prompt, seeds = tokens(2, 5), torch.Generator()

    def drawn(prompt):
        return generate(model, prompt, 40, 1.0, top_k=0, generator=seeds.manual_seed(1))[:, -40:]
    for window in (7, 8, 9):
        want = stateless(whole, prompt, 40, seeds.manual_seed(1), window)
        assert torch.equal(drawn(prompt), want[:, -40:]) == (window == 8)
    longer = F.pad(prompt, (0, 3), value=7)
    assert torch.equal(drawn(F.pad(longer, (9, 0), value=7)), drawn(longer))
    assert not torch.equal(drawn(longer), drawn(prompt))


# ---------------------------------------------------------------- the mixture of experts, token by token

def expert_mlp(mlp, x, fc1, fc2):
    """An expert's MLP on one token, from its own two matrices: relu(W1 x)^2, in nGPT rescaled and unit."""
    hidden = fc1 @ x
    if hasattr(mlp, "s_u"):
        hidden = hidden * mlp.s_u.weight * mlp.root
    hidden = F.relu(hidden).square()
    return fc2 @ (hidden / hidden.norm() if hasattr(mlp, "s_u") else hidden)


def moe_reference(mixer, x, wrong=None):
    """The formula of MoE, expert by expert for each token; wrong: one of the mistakes below."""
    y = []
    for token in x.flatten(0, 1):
        s = (mixer.router.weight @ token).sigmoid()
        chosen = (s + (0 if wrong == "no bias" else mixer.bias)).argsort(descending=True)[:mixer.K]
        weights = s + mixer.bias if wrong == "bias in the weights" else s
        total = weights.sum() if wrong == "shares of all" else weights[chosen].sum()
        out = 0 if wrong == "no shared" else expert_mlp(
            mixer.shared, token, mixer.shared.fc1.weight, mixer.shared.fc2.weight)
        for e in chosen:
            weight = weights[e] / total * (1 if wrong == "no scale" else mixer.scale)
            e = (e + 1) % mixer.E if wrong == "another expert" else e
            out = out + weight * expert_mlp(mixer.experts, token, mixer.experts.fc1.weight[e],
                                            mixer.experts.fc2.weight[e])
        y.append(out)
    return torch.stack(y).view_as(x)


def gradients(y, x, mixer):
    """Of x and all parameters, by name."""
    named = {"x": x, **dict(mixer.named_parameters())}
    return dict(zip(named, torch.autograd.grad(weighted(y), named.values()), strict=True))


@both_archs
def test_mixture_is_the_papers(arch):
    """Output and all gradients, of router, experts and shared expert; an expert nobody chose gets zeros."""
    mixer = make_mixer("E", arch, moe_n_expert=5, init_std=0.2)
    scramble(mixer)
    mixer.bias.copy_(torch.tensor([0.4, 0.1, -0.1, 0.2, -9.0]))                 # nobody chooses the last
    exact, x = copy.deepcopy(mixer).double(), torch.randn(2, 9, 64, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    y, want = mixer(x), moe_reference(exact, x64)
    assert far(y, want) < 1e-5
    got, want = gradients(y, x, mixer), gradients(want, x64, exact)
    for name in want:
        assert far(got[name], want[name]) < 2e-5 and got[name].abs().max() > 0, name
    assert got["experts.fc1.weight"][4].abs().max() == got["experts.fc2.weight"][4].abs().max() == 0
    assert all((got[f"experts.fc{i}.weight"][e] != 0).any() for i in (1, 2) for e in range(4))
    for wrong in ("no scale", "bias in the weights", "no bias", "no shared", "shares of all",
                  "another expert"):
        assert far(y, moe_reference(exact, x64, wrong)) > 1e-2, wrong


def test_sorting():
    """Each choice has a row of its own, within its expert's rows, in order of its tokens; each expert's begin
    at a multiple of every format's block, but of those that test_a_format_for_no_experts has; how many rows
    there are depends on the number of tokens alone."""
    assert all(MoE.multiple % form.block == 0 for name, form in FORMATS.items() if fits(name))
    assert MoE.multiple % len(nvfp4.SIGNS) == 0     # nor does a rotation mix experts
    mixer = make_mixer("E", moe_n_expert=5, moe_n_active=2)
    for n in (1, 15, 16, 17, 100):
        sizes = set()
        for skew in (0, 1, 3, 50):                  # at last all tokens choose the same two
            chosen = (torch.randn(n, 5) + skew * torch.arange(5)).topk(2).indices
            row_of, choice_of, ends = mixer.sort(chosen)
            begins = torch.cat([ends.new_zeros(1), ends[:-1]])
            assert ends.dtype == torch.int32 and int(ends[-1]) == len(choice_of)
            assert (ends % 32 == 0).all() and (begins <= ends).all()
            assert ((begins[chosen] <= row_of) & (row_of < ends[chosen])).all()
            for e in range(5):                      # close together, in order
                rows = row_of[chosen == e]
                assert torch.equal(rows, begins[e] + torch.arange(len(rows)))
            assert torch.equal(choice_of[row_of.flatten()], torch.arange(2 * n))
            assert int((choice_of == 2 * n).sum()) == len(choice_of) - 2 * n
            sizes.add(len(choice_of))
        assert len(sizes) == 1


def test_router_and_scan_stay_in_fp32_under_autocast():
    """Bit for bit: of the two mixers autocast reaches linear layers and experts only. The state is fp32."""
    router, x = make_mixer("E"), torch.randn(2, 21, 64)
    scan, projected = make_mixer("M"), torch.randn(2, 21, 400)
    results = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            state = {}
            results.append([*router.route(x), scan.mix(projected, state), state["h"], state["window"]])
            assert (router.router(x).dtype == torch.bfloat16) is autocast       # control
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        y = scan.mix(projected.bfloat16(), state := {})
    assert y.dtype == torch.bfloat16 and state["h"].dtype == torch.float32


# ---------------------------------------------------------------- balance

def test_the_bias_moves_against_the_load_and_evens_it_out():
    """A stream that likes some experts: with the bias the busiest soon has its share and 10 % more at most,
    without it more than twice its share. All choices are counted, in training only, and over all ranks."""
    for rate in (0.01, 0.0):
        mixer, skew, late = make_mixer("E", moe_n_expert=8, moe_bias_rate=rate), torch.randn(64), 0
        mixer.router.weight.data.normal_(std=0.05)
        for step in range(150):
            mixer(torch.randn(2, 128, 64) + skew)
            mixer.after_forward()
            load, before = mixer.load.clone(), mixer.bias.clone()
            found = mixer.after_step(lambda load: load)
            assert int(load.sum()) == 2 * 128 * 2 and (mixer.load == 0).all()
            assert torch.equal(mixer.bias, before + rate * (load.mean() - load).sign())
            assert found == pytest.approx({"load_max": float(load.max()) / 64,
                                           "bias_max": float(mixer.bias.abs().max())})
            late = late + load * (step >= 130)
        busiest = float(late.max() / late.mean())
        assert busiest < 1.1 if rate else busiest > 2
    mixer.eval()(torch.randn(2, 64, 64))
    mixer.after_forward()
    assert (mixer.load == 0).all()
    mixer.bias_rate = 0.5
    mixer.after_step(lambda load: torch.arange(8.0))                            # what the ranks add up to
    assert mixer.bias.tolist() == [0.5] * 4 + [-0.5] * 4


def balance_loss(s, chosen, E, coefficient):
    """coefficient E sum_e (share of choices) (mean share of s), mean over sequences: s (B, T, E)."""
    losses = []
    for s_b, chosen_b in zip(s, chosen, strict=True):
        f = torch.stack([(chosen_b == e).double().mean() for e in range(E)])
        losses.append(coefficient * E * (f * (s_b / s_b.sum(-1, keepdim=True)).mean(0)).sum())
    return sum(losses) / len(losses)


def test_the_balance_loss_is_felt_but_not_seen():
    """Its value in the loss is 0, its gradient that of the formula, for each sequence by itself."""
    mixer = make_mixer("E", init_std=0.2, moe_aux_loss=0.3)
    x = torch.randn(3, 8, 64) + 2 * torch.randn(3, 1, 64)   # sequences of different tastes
    x.requires_grad_()
    mixer(x)
    assert float(mixer.aux.detach()) == 0
    got = torch.autograd.grad(mixer.aux, (mixer.router.weight, x))
    w, x64 = mixer.router.weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    s = (x64 @ w.t()).sigmoid()
    chosen = (s + mixer.bias).topk(2).indices
    want = torch.autograd.grad(balance_loss(s, chosen, 4, 0.3), (w, x64), retain_graph=True)
    assert all(far(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    as_one = s.flatten(0, 1)[None], chosen.flatten(0, 1)[None]
    wrong = torch.autograd.grad(balance_loss(*as_one, 4, 0.3), w)
    assert far(got[0], wrong[0]) > 1e-2 and far(got[0], -want[0]) > 1
    mixer.eval()(x)
    assert mixer.aux is None


def test_the_model_adds_its_mixers_losses():
    """The reported loss does not change, the gradients of the routers do."""
    model, idx = make("ngpt", pattern="EE"), tokens(T=33)
    routers, found = [block.mixer.router.weight for block in model.blocks], []
    for weight in (0.0, 1.0):
        for block in model.blocks:
            block.mixer.aux_loss = weight
        loss = model(idx[:, :-1], idx[:, 1:])
        found.append([loss.detach(), *torch.autograd.grad(loss, routers)])
    copy.deepcopy(model)                            # nothing is left that forbids it
    assert torch.equal(found[0][0], found[1][0])
    assert all(far(a, b) > 1e-2 for a, b in zip(found[1][1:], found[0][1:], strict=True))


# ---------------------------------------------------------------- experts in FP4

def fits(format):
    """Whether no two experts share a block."""
    return FORMATS[format].block <= MoE.multiple


def fitting(cfg):
    """Rotated in runs that no two experts share: of 32, where a recipe has longer ones."""
    return replace(as_paper(cfg), hadamard_size=min(as_paper(cfg).hadamard_size, MoE.multiple))


# OCC and DGE: test_nvfp4.py, test_vector_wise_experts
EXPERTS = {**{name: fitting(cfg) for name, cfg in RECIPES.items()
              if fits(cfg.format) and not as_paper(cfg).occ},
           "all stochastic": FP4Config(stochastic=OPERANDS),
           "rotated, fresh signs": PaperConfig(hadamard=nvfp4.GEMMS, hadamard_signs="fresh"),
           "weights 1x16": FP4Config(square_weights=False), "only fprop": FP4Config(gemms=("fprop",)),
           "only backward": FP4Config(gemms=("dgrad", "wgrad"))}
# one for each path: formats, a second one in the backward, codes used again, rotations, GEMMs left out
USUAL = ("bf16", "nvfp4", "mxfp4", "quartet2", "tetrajet2", "rotated, fresh signs", "only fprop",
         "only backward")
GROUPS = ((0, 1, 15, 16, 17), (0, 0, 40, 0, 0), (33, 32, 31, 2, 0))


def sorted_batch(sizes, K=64, N=96):
    """x (M, K) of unit rows and dy (M, N), sorted by expert as MoE does it, zeros between; and ends."""
    chosen = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[:, None]
    mixer = make_mixer("E", moe_n_expert=len(sizes), moe_n_active=1)
    _, choice_of, ends = mixer.sort(chosen[torch.randperm(len(chosen))])
    x, dy = unit(torch.randn(sum(sizes), K)), torch.randn(sum(sizes), N)
    return gather(x, choice_of), gather(dy, choice_of), ends


def expert_layer(cfg, E=5, K=64, N=96, index=5):
    linear = ExpertLinear(E, K, N, bias=False)
    linear.weight.data.copy_(unit(torch.randn(E, N, K)))
    layer = cfg.layer(linear, cfg, index)
    nvfp4.set_step(layer, *PLACE)
    return layer


def expert_by_expert(layer, x, dy, ends, autocast=False):
    """y, dx, dw, each with sum |a||b| of its products, in float64: the sorted matrices, padding and all, and
    the weights of all experts as one, quantized once; then for each expert a product of its own parts."""
    cfg, w, dtype = as_paper(layer.cfg), layer.weight.detach(), torch.bfloat16 if autocast else torch.float32
    x, dy = x.to(dtype), dy.to(dtype)
    E, N, _ = w.shape
    spans = list(itertools.pairwise([0, *ends.tolist()]))

    def operand(name, t):
        if name.split(".")[0] not in cfg.gemms:
            return t.to(dtype).double()
        q = quantized(layer, name, t)
        return q.decode().double() * q.s_dec.double()
    w = w.flatten(0, 1)
    x_rows, w_rows = operand("fprop.x", x), operand("fprop.w", w)
    if cfg.reuse_codes:
        x, w = (quantized(layer, "fprop.x", x).dequantize(dtype),
                quantized(layer, "fprop.w", w).dequantize())
    dy_rows, w_columns = operand("dgrad.dy", dy), operand("dgrad.w", w.t())
    dy_columns, x_columns = operand("wgrad.dy", dy.t()), operand("wgrad.x", x.t())
    results = []
    for product in (lambda a, b: a @ b.t(), lambda a, b: a.abs() @ b.abs().t()):
        results.append((
            torch.cat([product(x_rows[i:j], w_rows[e * N:(e + 1) * N]) for e, (i, j) in enumerate(spans)]),
            torch.cat([product(dy_rows[i:j], w_columns[:, e * N:(e + 1) * N])
                       for e, (i, j) in enumerate(spans)]),
            torch.stack([product(dy_columns[:, i:j], x_columns[:, i:j]) for i, j in spans])))
    return list(zip(*results, strict=True))


def agree(got, want, autocast=False):
    """Within what the order of at most 128 fp32 additions can do, 128 * 2^-24 < 1e-5 of sum |a||b|; and where
    the result is bf16, or without FP4 so are the summands of dw, one rounding more."""
    return [bool(((g.double() - exact).abs() <= 1e-5 * size + (2**-8 if autocast else 0) * exact.abs()).all())
            for g, (exact, size) in zip(got, want, strict=True)]


@pytest.mark.parametrize("autocast", (False, True), ids=("fp32", "autocast"))
@pytest.mark.parametrize("name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.long)
                                  for name in EXPERTS])
def test_expert_layer_is_a_layer_for_each_expert(name, autocast):
    """y, dx and dw, for groups of 0, 1, 15, 16, 17 and more tokens, and all of them at one expert."""
    layer = expert_layer(EXPERTS[name])
    for sizes in GROUPS:
        x, dy, ends = sorted_batch(sizes)
        got, want = run(layer, x, dy, ends, autocast=autocast), expert_by_expert(layer, x, dy, ends, autocast)
        assert agree(got, want, autocast) == [True] * 3, sizes
        assert [len(t) for t in got] == [len(x), len(x), 5] and got[2].dtype == torch.float32
        assert all((dw == 0).all() == (n == 0) for dw, n in zip(got[2], sizes, strict=True))
        assert (got[0][(x == 0).all(1)] == 0).all() and (got[1][(dy == 0).all(1)] == 0).all()
    x, dy, ends = sorted_batch(GROUPS[0])           # controls
    got, want = run(layer, x, dy, ends, autocast=autocast), expert_by_expert(layer, x, dy, ends, autocast)
    assert not any(agree([0.98 * g for g in got], want, autocast))
    assert not any(agree(run(layer, x, dy, (ends + 32).clamp(max=len(x)), autocast=autocast), want, autocast))
    if layer.cfg.gemms:
        nvfp4.set_step(layer, PLACE[0], PLACE[1] + 1)
        used = {name.split(".")[0] for name in layer.cfg.stochastic} & set(layer.cfg.gemms)
        fresh = set(layer.cfg.hadamard) if as_paper(layer.cfg).hadamard_signs == "fresh" else set()
        assert [not ok for ok in agree(run(layer, x, dy, ends, autocast=autocast), want, autocast)] == [
            gemm in used | fresh for gemm in nvfp4.GEMMS]
        with nvfp4.high_precision(layer):
            got = run(layer, x, dy, ends, autocast=autocast)
        layer.cfg = RECIPES["bf16"]
        assert agree(got, expert_by_expert(layer, x, dy, ends, autocast), autocast) == [True] * 3


@pytest.mark.parametrize("name", [name for name in FORMATS if not fits(name)])
def test_a_format_for_no_experts(name):
    """Its blocks would have tokens of two; where wgrad is in high precision there are none of tokens. A model
    leaves its experts out with --fp4_skip."""
    cfg = FP4Config(format=name, square_weights=False)
    with pytest.raises(ValueError, match=f"fp4_format={name}: .*at most, not 64, .*--fp4_skip"):
        expert_layer(cfg)
    layer = expert_layer(replace(cfg, gemms=("fprop", "dgrad")), N=128)
    x, dy, ends = sorted_batch(GROUPS[0], N=128)
    assert agree(run(layer, x, dy, ends), expert_by_expert(layer, x, dy, ends)) == [True] * 3


def test_what_an_expert_layer_keeps_of_its_input_is_4_bit():
    layer, (x, dy, ends) = expert_layer(RECIPES["nvfp4"]), sorted_batch((50, 60, 0, 1, 2))
    kept = []

    def keep(t):
        kept.append((t.dtype, t.numel()))
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x.requires_grad_(), ends)
    y.backward(dy)
    assert (torch.uint8, x.numel() // 2) in kept
    assert not any(dtype.is_floating_point and n in (x.numel(), y.numel()) for dtype, n in kept)


# ---------------------------------------------------------------- whole models in FP4, and compiled

def train_steps(model, n, normalize=True):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(n):
        nvfp4.set_step(model, 0, step)
        idx = tokens(T=33)
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        if normalize:
            model.normalize_()


WRITERS = "out", "out_proj", "fc2"


def norm_errors(model):
    """Largest distance from 1 of the norms along the residual stream, of every weight that touches it but
    the router's."""
    errors = {}
    for name, p in model.named_parameters():
        layer = name.removesuffix(".weight").rpartition(".")[2]
        if p.dim() > 1 and layer not in ("router", "conv"):
            axis = -2 if layer in WRITERS else -1
            assert p.shape[axis] == model.config.n_embd, name
            errors[name] = float((p.detach().norm(dim=axis) - 1).abs().max())
    assert len(errors) == 12
    return errors


@torch.no_grad()
def inputs_of(model):
    """Rows that enter each linear layer of the blocks, without the zeros between experts' tokens."""
    seen = {}

    def look(module, args):
        seen[names[module]] = args[0].flatten(0, -2)
    layers = [m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    names = {m: name for name, m in model.named_modules()}
    hooks = [m.register_forward_pre_hook(look) for m in layers]
    model(tokens())
    for hook in hooks:
        hook.remove()
    assert len(seen) == 10                          # of the router forward() is not called
    for name, x in seen.items():
        filled = (x != 0).any(1)
        assert filled.sum() >= 64 and bool(filled.all()) == (".experts." not in name), name
        seen[name] = x[filled]
    return seen


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_everything_is_on_the_sphere_after_steps_in_fp4(activation):
    """Weights along the residual stream, experts' one by one; rows that enter FP4 GEMMs, so that they are
    within [-1, 1]; the stream after each block."""
    model = nvfp4.convert(make("ngpt", activation=activation), RECIPES["ngpt"], report=lambda line: None)
    train_steps(model, 3)
    assert max(norm_errors(model).values()) < 1e-5
    for name, x in inputs_of(model).items():
        assert float(x.abs().max()) <= 1 + EPS and ((x.norm(dim=-1) - 1).abs() < 1e-5).all(), name
    h = model.embed(tokens())
    for block in model.blocks:
        h = block(h)
        assert ((h.norm(dim=-1) - 1).abs() < 1e-5).all()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    model.normalize_()
    for name, p in model.named_parameters():        # router, convolution, decays and gains are left alone
        assert (far(p, before[name]) < 1e-5) is (name in norm_errors(model)), name


def test_what_leaves_the_sphere_otherwise():
    """Weights without normalize_(); without normalize_inputs what enters the output projections."""
    model = make("ngpt")
    train_steps(model, 3, normalize=False)
    assert all(error > 1e-3 for error in norm_errors(model).values())
    model = make("ngpt", normalize_inputs=False)
    train_steps(model, 3)
    seen = inputs_of(model)
    assert max(float(x.abs().max()) for x in seen.values()) > 1
    for name, x in seen.items():
        assert ((x.norm(dim=-1) - 1).abs().max() > 1e-2) == name.endswith(WRITERS), name


def test_compiled_blocks_give_the_same():
    """Loss and load bit for bit, and all gradients, the balance loss's among them; each block is one graph.
    In fp32, where no rounding can amplify the order of additions; test_compile.py has FP4."""
    model, idx, found = make("ngpt", pattern="ME", moe_aux_loss=1.0), tokens(T=33), []
    mixture = model.blocks[1].mixer
    for compile_it in (False, True):
        for block in model.blocks if compile_it else ():
            block.compile(backend="eager", fullgraph=True)
        loss = model(idx[:, :-1], idx[:, 1:])
        found.append([loss.detach(), mixture.load.clone(), *torch.autograd.grad(loss, model.parameters())])
        mixture.load.zero_()
    eager, compiled = found
    assert all(map(torch.equal, eager[:2], compiled[:2]))
    assert all(far(a, b) < 1e-5 and (a != 0).any() for a, b in zip(compiled, eager, strict=True))


# ---------------------------------------------------------------- the papers' sizes

def read_config(name):
    return train.load_config([str(REPO / "configs" / f"{name}.py")])


def parts(c):
    """Numbers of a mixer of each kind, those that meet a token and those that do not, by the papers."""
    C, inner, groups = c.n_embd, c.mamba_n_head * c.mamba_head_dim, 2 * 8 * 128
    mamba = (C * (2 * inner + groups + c.mamba_n_head) + 5 * (inner + groups)   # in_proj; conv of 4, its bias
             + 3 * c.mamba_n_head + inner + inner * C)                          # A, dt, D; norm; out_proj
    attention = C * (c.n_head + 2 * c.n_kv_head) * 128 + c.n_head * 128 * C
    expert, shared = 2 * C * c.n_ffn, 2 * C * 2 * c.n_ffn
    return {"M": (mamba, 0), "*": (attention, 0), "-": (expert, 0),
            "E": (C * c.moe_n_expert + c.moe_n_active * expert + shared,
                  (c.moe_n_expert - c.moe_n_active) * expert)}


@pytest.mark.parametrize(("name", "letters", "total", "active", "with_embedding"), [
    ("hybrid_30b", (23, 23, 6, 0), 31.6, 3.2, 3.6), ("ngpt_hybrid_30b", (23, 23, 6, 0), 31.6, 3.2, 3.6),
    ("nemotron_12b", (28, 0, 6, 28), 12.3, 11.6, 12.3), ("hybrid_600m", (6, 5, 1, 0), 0.59, 0.26, 0.40),
    ("ngpt_hybrid_600m", (6, 5, 1, 0), 0.59, 0.26, 0.40)])
def test_the_papers_sizes(name, letters, total, active, with_embedding):
    """In billions, to the digits that the papers give; the parts of each count; and FLOPs, from the meta
    device: 6 for each weight of a GEMM that a token meets, and the scans of Mamba and attention."""
    model = model_file.outline(read_config(name).model)
    c = model.config
    assert tuple(c.pattern.count(letter) for letter in "ME*-") == letters
    embedding = c.vocab_size * c.n_embd
    met, idle = (sum(parts(c)[letter][i] for letter in c.pattern) for i in (0, 1))
    extra = (len(c.pattern) + 1) * c.n_embd         # weights of norms
    if c.arch == "ngpt":                            # alpha; s_u of two MLPs in a mixture, s_qk; s_z
        scales = {"E": 3 * c.n_ffn, "-": c.n_ffn, "*": c.n_head * 128, "M": 0}
        extra = len(c.pattern) * c.n_embd + sum(scales[letter] for letter in c.pattern) + c.vocab_size
    counts = 2 * embedding + met + idle + extra, embedding + met + extra
    assert count_parameters(model) == counts
    digits = 2 if total < 1 else 1
    assert [round(n / 1e9, digits) for n in (*counts, counts[1] + embedding)] == [total, active,
                                                                                  with_embedding]
    T, L, inner = c.block_size, c.mamba_chunk, c.mamba_n_head * c.mamba_head_dim
    no_gemm = 5 * (inner + 2048) + 3 * c.mamba_n_head + inner
    scan = L * (1024 + inner) + 2 * inner * 128     # C B^T and its product with x; in and out of the states
    assert flops_per_token(model) == (6 * (embedding + met) + letters[0] * 6 * (scan - no_gemm)
                                      + letters[2] * 12 * c.n_head * 128 * T)


@pytest.mark.parametrize(("name", "kept"), [
    ("ngpt_hybrid_30b", range(44, 52)), ("ngpt_hybrid_600m", ()), ("nemotron_12b", (0, 1, *range(54, 62))),
    ("hybrid_tiny", (7,)), pytest.param("hybrid_30b", range(44, 52), marks=pytest.mark.long),
    pytest.param("hybrid_600m", (), marks=pytest.mark.long),
    pytest.param("ngpt_hybrid_tiny", (), marks=pytest.mark.long)])
def test_the_papers_layers_in_fp4(name, kept):
    """Sizes fit all formats. Blocks in high precision are those of the papers, beside routers and head."""
    c = read_config(name)
    for recipe in RECIPES.values():                 # a block of each kind, the first ones
        few = model_file.outline(replace(c.model, pattern="".join(dict.fromkeys(c.model.pattern))))
        skip = (*recipe.skip, *([] if fits(recipe.format) else ["*experts*"]))
        nvfp4.convert(few, replace(fitting(recipe), skip=skip, tail=0.0), report=lambda line: None)
    model = model_file.outline(c.model)
    nvfp4.convert(model, c.fp4, report=lambda line: None)
    for layer, m in model.named_modules():
        if isinstance(m, torch.nn.Linear):
            block = int(layer.split(".")[1]) if layer != "head" else None
            assert isinstance(m, FP4Linear) == (
                block is not None and block not in kept and "router" not in layer), layer
