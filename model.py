"""GPT, nGPT and hybrids: one residual stream, a pattern of mixers over it, two rules for adding to it.

A pattern names the mixers in order: "*" attention, "-" MLP, "M" Mamba-2, "E" mixture of experts; "*-*-" is a
transformer of two layers. A rule says how a mixer's output joins the stream: pre-norm (GPT),
h + f(rmsnorm(h)), or the step on the hypersphere (nGPT), where the stream has norm 1 and so has every row
that enters a linear layer. The standard mixers stand first and are complete without nGPT; nGPT replaces the
mixers, the rule and the head by normalized ones. Each mixer tells which axis of its weights is the residual
stream, how the weights begin, what they cost, and what it remembers from token to token. A new mixer is a
class and a letter in GPT.mixers and NGPT.mixers. Nothing here knows of 4 bits; only the mixture of experts
takes grouped() and EXPERT_TOKENS from nvfp4.py.

Letters
    B T C    batch, time (tokens), channels of the residual stream (n_embd)
    H G D    query heads, key/value heads (n_kv_head), channels of a head (head_dim)
    F V      hidden channels of the MLP (n_ffn), vocabulary
    H P G N  in Mamba-2: heads, channels of a head, groups of heads, size of the state; B and C, there, are
             what a token writes with and reads with, and L is the length of a chunk
    E K      experts, experts chosen for a token
    unit(x)  x / ||x|| along the last axis: Norm in the papers

Sources: 2410.01131 (nGPT), 2605.06067 appendix A (nGPT with normalized GEMM inputs: what makes it natively
4-bit), 2405.21060 (Mamba-2), 2512.20848 (the mixture of experts of Nemotron 3 Nano).

    python model.py configs/ngpt_1b.py --n_layer=10    describe a model: parameters, FLOPs, memory, layers;
                                                       --ranks=8: and what each of them keeps
    python model.py out/ngpt_tiny "The state of"       sample from a run; flags of Sampling may follow, as in
                                                       --temperature=0 --n_tokens=50
"""
import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configs.config import Count, NotNegative, Positive, Size, Some, help_fields, read_settings, unflatten
from data.run import UserError, command, load_checkpoint, newest_checkpoint
from data.tokens import data_folder, load_tokenizer
from nvfp4 import EXPERT_TOKENS, grouped
from ranks import read_parts

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class ModelConfig:
    arch: Literal["gpt", "ngpt"] = "ngpt"           # gpt: pre-norm transformer; ngpt: normalized transformer
    n_layer: Annotated[int, 1, 1000] = 4            # transformer layers, each "*-", where pattern is None
    pattern: str | None = None                      # letters of GPT.mixers in order; None: "*-" * n_layer
    n_embd: Size = 256                              # channels of the residual stream
    n_head: Size = 4                                # query heads
    n_kv_head: Size | None = None                   # key/value heads (GQA); None: n_head
    head_dim: Size | None = None                    # channels of a head; None: n_embd / n_head
    n_ffn: Size | None = None                       # hidden channels of the MLP; None: 4 * n_embd
    activation: Literal["relu2", "swiglu"] = "relu2"  # relu2: relu(x)^2; swiglu: u * silu(v)
    block_size: Count = 256                         # tokens of context
    document_start: Annotated[int, -1, 2**32] | None = None  # token that hides all before; -1: the dataset's
    vocab_size: Annotated[int, 1, 2**32] | None = None  # None: that of the dataset
    rope_base: NotNegative = 10000.0                # base of the rotary positions; 0: no positions
    init_std: Positive | None = None                # of weights; None: 0.02 (gpt) or 1/sqrt(n_embd) (ngpt)
    normalize_inputs: bool = True                   # ngpt: unit-norm inputs for output projections as well
    s_z_init: Positive = 1.0                        # ngpt: what multiplies the cosines, at the start
    alpha_init: Positive = 0.05                     # ngpt: size of a step on the sphere, at the start
    # Mamba-2
    mamba_n_head: Size | None = None                # heads; None: 2 * n_embd / mamba_head_dim
    mamba_head_dim: Size = 64                       # channels of a head
    mamba_n_group: Size = 8                         # groups of heads that share B and C
    mamba_n_state: Size = 128                       # channels of a head's state
    mamba_conv: Size = 4                            # tokens that the convolution sees
    mamba_chunk: Size = 128                         # tokens in a chunk: speed and memory, not the result
    # mixture of experts, each an MLP with n_ffn hidden channels
    moe_n_expert: Size = 8                          # experts that tokens are routed to
    moe_n_active: Size = 2                          # experts of a token
    moe_n_ffn_shared: Size | None = None            # hidden channels of the shared expert; None: 2 * n_ffn
    moe_scale: NotNegative = 2.5                    # what the routing weights of a token sum up to
    moe_bias_rate: NotNegative = 1e-3               # a step of the router's bias, against the load
    moe_aux_loss: NotNegative = 1e-4                # weight of the balance loss of a sequence

    def resolve(self):
        """The config with every None that depends on other fields filled in. raises UserError where sizes do
        not fit each other; the range of each stands in its type."""
        if not self.vocab_size:
            raise UserError("vocab_size=None must be a number to build a model; set it")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}; or set "
                             "head_dim")
        n_ffn = self.n_ffn or 4 * self.n_embd
        c = replace(self,
                    pattern=self.pattern or "*-" * self.n_layer,
                    n_kv_head=self.n_kv_head or self.n_head,
                    head_dim=self.head_dim or self.n_embd // self.n_head,
                    n_ffn=n_ffn,
                    moe_n_ffn_shared=self.moe_n_ffn_shared or 2 * n_ffn,
                    mamba_n_head=self.mamba_n_head or max(1, 2 * self.n_embd // self.mamba_head_dim),
                    init_std=self.init_std or (0.02 if self.arch == "gpt" else self.n_embd**-0.5))
        if c.n_head % c.n_kv_head:
            raise UserError(f"n_head={c.n_head} must be a multiple of n_kv_head={c.n_kv_head}")
        if "M" in c.pattern and c.mamba_n_head % c.mamba_n_group:
            raise UserError(f"mamba_n_head={c.mamba_n_head} must be a multiple of "
                            f"mamba_n_group={c.mamba_n_group}")
        if c.moe_n_active > c.moe_n_expert:
            raise UserError(f"moe_n_active={c.moe_n_active} must be moe_n_expert={c.moe_n_expert} at most")
        if c.document_start is not None and not 0 <= c.document_start < c.vocab_size:
            raise UserError(f"document_start={c.document_start} must be a token, from 0 to "
                            f"vocab_size={c.vocab_size} - 1; train.py finds the one that -1 stands for")
        if c.head_dim % 2 and c.rope_base:
            raise UserError(f"head_dim={c.head_dim} must be even for rotary positions; or set rope_base=0")
        return c


# ---------------------------------------------------------------- small pieces

def unit(x):
    """x / ||x|| along the last axis, computed in fp32; a zero vector stays zero."""
    return F.normalize(x.float(), dim=-1, eps=1e-6).to(x.dtype)


def rope_tables(positions, D, base):
    """cos and sin of position * base^(-2i/D), for positions (..., T): each (..., T, D/2) fp32."""
    frequency = base ** (-torch.arange(0, D, 2, device=positions.device).float() / D)
    angle = positions.float()[..., None] * frequency
    return angle.cos(), angle.sin()


@torch.compiler.assume_constant_result
def rope_table(T, D, base, device):
    """rope_tables() of the first T positions. A compiled graph keeps the result: to find cosines for each
    element, layer and micro-batch would take a GPU a fifth of its time."""
    return rope_tables(torch.arange(T, device=device), D, base)


def rope(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + D/2}) of x (B, H, T, D) by their position's angle; norms stay."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Scale(nn.Module):
    """A learned vector that starts at init, while its parameter starts at stored: weight * (init / stored).

    Adam moves every parameter by about the learning rate a step, whatever its size, so a small stored value
    makes the vector learn faster, by init / stored. source: 2410.01131 section 2.5
    """

    def __init__(self, n, init, stored):
        super().__init__()
        self.weight = nn.Parameter(torch.full((n,), float(stored)))
        self.gain = init / stored

    def forward(self):
        return self.weight * self.gain


# ---------------------------------------------------------------- mixers: attention and MLP

class Mixer(nn.Module):
    """Base class of mixers. One whose weights are linear layers defines forward(), reads() and writes().

    forward(x, state)   x (B, T, C) -> (B, T, C)
    state   None in training. In decoding: a dict that belongs to this mixer. It is empty before the first
            token, and the mixer keeps in it whatever it needs of earlier tokens. Where documents are kept
            apart there is always a dict, with state["starts"] (B, n): for each of the n tokens so far, x
            included, the position at which its document began
    """
    waits = False                                   # whether forward() waits for a GPU; then no CUDA graph

    def reads(self):
        """[(weight, its axis along the residual stream), ...] of layers that read the stream."""
        raise NotImplementedError

    def writes(self):
        """[(weight, its axis along the residual stream), ...] of layers that write to the stream."""
        raise NotImplementedError

    def stream_weights(self):
        """All weights that touch the stream, with their axis: nGPT normalizes them."""
        return self.reads() + self.writes()

    def matrices(self):
        """The weights of GEMMs, in order: drawn at random, under weight decay, 6 FLOPs a token for each of
        their numbers. Stacked ones are among them; kernels of convolutions, gains and biases are not."""
        linear = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        known = {id(weight) for weight in linear}
        return linear + [weight for weight, _ in self.stream_weights() if id(weight) not in known]

    def init_(self, std):
        """Draw the weights that write to the stream anew, with std. Called after all matrices were drawn."""
        for weight, _ in self.writes():
            nn.init.normal_(weight, std=std)

    def idle(self):
        """How many numbers of its matrices take no part in the GEMMs of a token."""
        return 0

    def flops(self, T):
        """FLOPs of forward and backward for one of T tokens."""
        return 6 * (sum(weight.numel() for weight in self.matrices()) - self.idle())

    def after_forward(self):
        """Called once a forward; forward() itself runs twice in a checkpointed block. Returns None, or a
        scalar loss that is added to the model's."""

    def after_step(self, total):
        """Called after every optimizer step; total(x) adds x up over the ranks. Returns {name: number} for
        the log."""
        return {}


class Attention(Mixer):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.H, self.G, self.D = c.n_head, c.n_kv_head, c.head_dim
        self.rope_base, self.block_size = c.rope_base, c.block_size
        self.qkv = nn.Linear(c.n_embd, (self.H + 2 * self.G) * self.D, bias=False)
        self.out = nn.Linear(self.H * self.D, c.n_embd, bias=False)

    def reads(self):
        return [(self.qkv.weight, -1)]

    def writes(self):
        return [(self.out.weight, -2)]

    def flops(self, T):
        """Scores and mixing too, their masked half included, as is the custom (2204.02311 appendix B)."""
        return super().flops(T) + 12 * self.H * self.D * T

    def heads(self, qkv, state):
        """The output of qkv -> q (B, H, T, D), k and v (B, G, T, D); q and k rotated by their positions."""
        B, T, _ = qkv.size()
        q, k, v = qkv.view(B, T, -1, self.D).transpose(1, 2).split([self.H, self.G, self.G], 1)
        if self.rope_base:
            cos, sin = self.rotations(T, state, qkv.device)
            q, k = rope(q, cos, sin), rope(k, cos, sin)
        return q, k, v

    def rotations(self, T, state, device):
        """cos and sin of the angles by which T tokens are rotated, (T, D/2) or (B, 1, T, D/2)."""
        if state is None:
            return rope_table(T, self.D, self.rope_base, device)
        before = state.get("tokens", 0)
        positions = torch.arange(before, before + T, device=device)
        if "starts" in state:
            positions = (positions - state["starts"][:, -T:])[:, None]          # (B, 1, T)
        return rope_tables(positions, self.D, self.rope_base)

    def mix(self, q, k, v, state):
        """softmax(q k^T / sqrt(D)) v with the heads side by side: (B, T, H D). With a state, queries also see
        the keys in it; a query sees block_size keys at most, itself included."""
        mask = None
        if state is not None:
            if "k" in state:
                k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
            S, T = k.size(2), q.size(2)             # S keys; query i is token S - T + i of them
            age = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
            mask = (age >= 0) & (age < self.block_size)
            if "starts" in state:
                starts = state["starts"][:, -S:]
                mask = mask & (starts[:, -T:, None] == starts[:, None])[:, None]            # (B, 1, T, S)
            state.update(k=k[:, :, -self.block_size:], v=v[:, :, -self.block_size:],
                         tokens=state.get("tokens", 0) + T)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.H != self.G)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x, state=None):
        return self.out(self.mix(*self.heads(self.qkv(x), state), state))


class MLP(Mixer):
    """Two linear layers around relu(x)^2, or SwiGLU's three (the first two as one) around u * silu(v).

    The silu is on v, the second half of fc1's output; in Megatron's checkpoints it is on the first.
    """

    def __init__(self, c, linear=nn.Linear):
        super().__init__()
        self.swiglu = c.activation == "swiglu"
        self.fc1 = linear(c.n_embd, c.n_ffn * (2 if self.swiglu else 1), bias=False)
        self.fc2 = linear(c.n_ffn, c.n_embd, bias=False)

    def reads(self):
        return [(self.fc1.weight, -1)]

    def writes(self):
        return [(self.fc2.weight, -2)]

    def activate(self, hidden):
        """(B, T, F or 2F) -> (B, T, F)."""
        if self.swiglu:
            u, v = hidden.chunk(2, -1)
            return u * F.silu(v)
        return F.relu(hidden).square()

    def forward(self, x, state=None, *more):
        """more: what the linear layers ask for beside x, as those of experts do."""
        return self.fc2(self.activate(self.fc1(x, *more)), *more)


# ---------------------------------------------------------------- Mamba-2

FORGET = -1000.0                                    # exp() of it is 0 in fp64 too; -inf - -inf would be NaN


def log_decay(dt, A, begins):
    """dt A (b, T, H); where a document begins, of begins (b, T), nothing of the past is left."""
    return dt * A if begins is None else torch.where(begins[..., None], FORGET, dt * A)


def ssm(x, dt, A, B, C, h=None, begins=None):
    """The state space model of Mamba-2, one token at a time: its definition.

        h <- exp(dt_t A) h + dt_t x_t B_t^T        a head's state (P, N), a sum of the past that decays
        y_t = h C_t

    x (b, T, H, P)      inputs of a batch of b; dt (b, T, H) > 0, time steps, and A (H,) < 0 set the decay
    B, C (b, T, G, N)   how a token is written and read; H / G heads share them
    h (b, H, P, N)      the state before the first token; None: zeros
    begins (b, T)       whether the state is forgotten before a token; None: never
    returns             y (b, T, H, P) and the last h
    source              2405.21060 section 2
    """
    B, C = (t.repeat_interleave(x.size(2) // t.size(2), 2) for t in (B, C))     # (B, T, H, N)
    h = x.new_zeros(*x.shape[:1], *x.shape[2:], B.size(-1)) if h is None else h
    a, y = log_decay(dt, A, begins), []
    for t in range(x.size(1)):
        decay, update = a[:, t].exp(), dt[:, t, :, None] * x[:, t]
        h = decay[:, :, None, None] * h + update[..., None] * B[:, t, :, None]
        y.append((h @ C[:, t, :, :, None]).squeeze(-1))
    return torch.stack(y, 1), h


def running_sum(a):
    """torch.cumsum along the last axis, as a matrix product: GPUs have no deterministic cumsum. In fp64,
    because a difference of two long sums loses its digits in fp32."""
    ones = torch.ones(a.size(-1), a.size(-1), dtype=torch.float64, device=a.device)
    return a.double() @ ones.triu()


def decays(total, dtype):
    """How much of token j's input is left at token i: exp(a_(j+1) + ... + a_i) for j <= i, 0 for j > i.
    total (..., L) is the running sum of a -> (..., L, L). Papers call it the exponential of the segment sum.
    """
    difference = (total[..., :, None] - total[..., None, :]).to(dtype)
    return difference.masked_fill(torch.ones_like(difference, dtype=torch.bool).triu(1), -math.inf).exp()


def ssm_chunked(x, dt, A, B, C, h=None, L=128, begins=None):
    """The same by matrix products: ssm() unrolled within chunks of L tokens, and from chunk to chunk.

    Within a chunk y_i = sum_(j<=i) (C_i . B_j) decay_ij dt_j x_j, like attention without a softmax. What a
    chunk adds to the state is one product, too; and states decay from chunk to chunk as inputs do from token
    to token. Subscripts: b batch, c chunk, i j tokens of a chunk, g group, r head of a group, p n the state.
    source: 2405.21060 section 6
    """
    (b, T, H, P), (G, N) = x.shape, B.shape[2:]
    L = min(L, T)
    padding = -T % L                                # filled up with dt = 0, which changes no state
    x, dt, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) for t in (x, dt, B, C))
    begins = None if begins is None else F.pad(begins, (0, padding))
    a = log_decay(dt, A, begins).view(b, -1, L, G, H // G).permute(0, 1, 3, 4, 2)    # b c g r i
    x = (x * dt[..., None]).view(b, -1, L, G, H // G, P)                        # b c i g r p
    B, C = (t.view(b, -1, L, G, N) for t in (B, C))                             # b c i g n
    total = running_sum(a)
    decay = decays(total, x.dtype)                                              # b c g r i j
    within = torch.einsum("bcign,bcjgn->bcgij", C, B)[:, :, :, None] * decay
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", within, x)

    to_end = decay[..., -1, :].permute(0, 1, 4, 2, 3)[..., None]                 # b c j g r 1
    added = torch.einsum("bcjgn,bcjgrp->bcgrpn", B, x * to_end)
    first = added.new_zeros(b, H, P, N) if h is None else h
    states = torch.cat([first.view(b, 1, G, H // G, P, N), added], 1)           # what each chunk adds
    whole = running_sum(F.pad(total[..., -1].permute(0, 2, 3, 1), (1, 0)))      # b g r c
    states = torch.einsum("bgrcd,bdgrpn->bcgrpn", decays(whole, x.dtype), states)   # there before each chunk
    since = total.to(x.dtype).exp().permute(0, 1, 4, 2, 3)[..., None]           # b c i g r 1
    y = y + since * torch.einsum("bcign,bcgrpn->bcigrp", C, states[:, :-1])
    return y.reshape(b, -1, H, P)[:, :T], states[:, -1].reshape(b, H, P, N)


class Mamba(Mixer):
    """Mamba-2: a linear layer makes gate z, input x, B, C and time step dt of each token; x, B and C pass a
    short causal convolution and a silu; ssm(), with a state for each head; D x is added, so that a token also
    goes straight through; y silu(z) is normalized in G groups; a linear layer.

    All but the two linear layers is fp32. source: 2405.21060 section 7
    """

    def __init__(self, c):
        super().__init__()
        self.H, self.P, self.G, self.N = c.mamba_n_head, c.mamba_head_dim, c.mamba_n_group, c.mamba_n_state
        self.L, inner = c.mamba_chunk, self.H * self.P
        self.parts = inner, self.G * self.N, self.G * self.N                    # x, B, C
        self.in_proj = nn.Linear(c.n_embd, inner + sum(self.parts) + self.H, bias=False)
        self.conv = nn.Parameter(torch.empty(c.mamba_conv, sum(self.parts)))  # its last row: the token itself
        self.conv_bias = nn.Parameter(torch.empty(sum(self.parts)))
        self.A_log = nn.Parameter(torch.empty(self.H))
        self.dt_bias = nn.Parameter(torch.empty(self.H))
        self.D = nn.Parameter(torch.ones(self.H))
        self.norm = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, c.n_embd, bias=False)

    def reads(self):
        return [(self.in_proj.weight, -1)]

    def writes(self):
        return [(self.out_proj.weight, -2)]

    @torch.no_grad()
    def init_(self, std):
        """-A from 1 to 16, dt from 0.001 to 0.1: memories of 1 / (-A dt) = 0.6 to 1,000 tokens. source:
        2405.21060's code"""
        super().init_(std)
        bound = len(self.conv)**-0.5
        self.conv.uniform_(-bound, bound)
        self.conv_bias.uniform_(-bound, bound)
        self.A_log.uniform_(1, 16).log_()
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias.copy_(dt + (-(-dt).expm1()).log())                         # softplus(dt_bias) = dt

    def flops(self, T):
        """ssm_chunked() too, but for its products from chunk to chunk, which are few."""
        L = min(self.L, T)
        products = L * (self.G * self.N + self.H * self.P) + 2 * self.H * self.P * self.N
        return super().flops(T) + 6 * products

    def convolve(self, x, state):
        """A causal convolution of each channel: (B, T, channels) -> the same, fp32."""
        W, T = len(self.conv), x.size(1)
        before = state.get("window") if state else None
        x = F.pad(x, (0, 0, W - 1, 0)) if before is None else torch.cat([before, x], 1)
        taps = [x[:, i:i + T] for i in range(W)]
        if state and "starts" in state:             # a tap in another document is zero
            starts = F.pad(state["starts"], (W - 1, 0))[:, 1 - W - T:]
            taps = [taps[i] * (starts[:, i:i + T] == starts[:, W - 1:])[..., None] for i in range(W)]
        if state is not None:
            state["window"] = x[:, T:]
        return self.conv_bias + sum(self.conv[i] * taps[i] for i in range(W))

    def mix(self, zxBCdt, state):
        """What in_proj makes of x (B, T, C) -> what out_proj reads, (B, T, H P)."""
        b, T, _ = zxBCdt.shape
        z, xBC, dt = zxBCdt.split([self.parts[0], sum(self.parts), self.H], -1)
        with torch.autocast(zxBCdt.device.type, enabled=False):
            x, B, C = F.silu(self.convolve(xBC, state).float()).split(self.parts, -1)
            x, (B, C) = x.view(b, T, self.H, self.P), (t.view(b, T, self.G, self.N) for t in (B, C))
            dt = F.softplus(dt.float() + self.dt_bias)
            A, h = -self.A_log.float().exp(), state.get("h") if state else None
            begins = None
            if state and "starts" in state:
                n = state["starts"].size(1)
                begins = state["starts"][:, -T:] == torch.arange(n - T, n, device=x.device)     # (B, T)
            y, h = ssm_chunked(x, dt, A, B, C, h, self.L, begins)
            if state is not None:
                state["h"] = h
            y = (y + self.D[:, None] * x).flatten(2) * F.silu(z.float())
            y = F.rms_norm(y.unflatten(-1, (self.G, -1)), (y.size(-1) // self.G,), eps=1e-5).flatten(2)
            return (y * self.norm).to(z.dtype)

    def forward(self, x, state=None):
        return self.out_proj(self.mix(self.in_proj(x), state))


# ---------------------------------------------------------------- mixture of experts

@torch.library.custom_op("model::grouped_mm", mutates_args=())
def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """nvfp4.grouped() in high precision, opaque to torch.compile and with a backward by the same products."""
    return grouped(F.linear, a, b, ends)


@grouped_mm.register_fake
def _(a, b, ends):
    return a.new_empty((len(a), b.size(1)) if b.dim() == 3 else (len(ends), len(a), len(b)))


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def grouped_mm_backward(ctx, dy):
    a, b, ends = ctx.saved_tensors
    return grouped_mm(dy, b.mT, ends), grouped_mm(dy.t(), a.t(), ends), None


grouped_mm.register_autograd(grouped_mm_backward, setup_context=keep_for_backward)


class ExpertLinear(nn.Linear):
    """A linear layer for each of n_expert experts: weight (E, N, K). The rows of x (M, K) are sorted by
    expert; ends (E,) int32 says where each one's end, the last at M."""

    def __init__(self, n_expert, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(self.weight.new_empty(n_expert, *self.weight.shape))

    def forward(self, x, ends):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return grouped_mm(x, self.weight.to(x.dtype), ends)


def gather(x, index):
    """Rows of x (n, C) at index (...), zeros where index is n."""
    return torch.where((index < len(x))[..., None], x[index.clamp(max=len(x) - 1)], 0)


class Reorder(torch.autograd.Function):
    """gather(x, index) whose backward is a gather too, so that sums have one order on any device.

    index (m,)    row j of the result is row index[j] of x (n, C); n: zeros
    back (n, k)   row i of x went to rows back[i] of the result; m: to none
    """

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return gather(x, index)

    @staticmethod
    def backward(ctx, dy):
        return gather(dy, *ctx.saved_tensors).sum(1), None, None


class MoE(Mixer):
    """A mixture of experts: each token meets K of E MLPs, chosen and weighted by a router, and a shared one.

        s = sigmoid(W x)                            in fp32
        chosen = the K largest of s + bias
        y = shared(x) + sum_chosen scale s_e / (sum_chosen s) expert_e(x)

    No token is dropped: we sort choices by expert, and all experts are one grouped GEMM. Two things spread
    the load. After each step we raise the bias of an expert that had fewer tokens than the mean, by
    moe_bias_rate, and lower the others (2408.15664); the bias enters the choice, never the weights. And each
    sequence has a loss, in the gradient but not in the reported loss:
        aux = moe_aux_loss E sum_e (share of choices of e) (mean share of s_e)
    source: 2512.20848
    """
    mlp = MLP
    waits = True                                    # for how many tokens each expert has
    multiple = EXPERT_TOKENS                        # an expert's rows are filled up with zeros to this

    def __init__(self, c):
        super().__init__()
        self.E, self.K, self.scale = c.moe_n_expert, c.moe_n_active, c.moe_scale
        self.bias_rate, self.aux_loss = c.moe_bias_rate, c.moe_aux_loss
        self.router = nn.Linear(c.n_embd, self.E, bias=False)
        self.experts = self.mlp(c, functools.partial(ExpertLinear, self.E))
        self.shared = self.mlp(replace(c, n_ffn=c.moe_n_ffn_shared))
        self.register_buffer("bias", torch.zeros(self.E))
        self.register_buffer("load", torch.zeros(self.E), persistent=False)     # choices since the last step

    def reads(self):
        return self.experts.reads() + self.shared.reads()

    def writes(self):
        return self.experts.writes() + self.shared.writes()

    def idle(self):
        return sum(w.numel() for w in self.experts.matrices()) * (self.E - self.K) // self.E

    def route(self, x):
        """x (B, T, C) -> the experts of each token and their weights, (B T, K) each."""
        with torch.autocast(x.device.type, enabled=False):
            s = F.linear(x.float(), self.router.weight.float()).sigmoid()       # (B, T, E)
        chosen = (s + self.bias).topk(self.K).indices
        weights = s.gather(-1, chosen)
        weights = self.scale * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        self.aux = self.count = None
        if self.training:
            count = F.one_hot(chosen, self.E).sum(2).float()                    # (B, T, E)
            self.count = count.sum((0, 1))
            share = s / (s.sum(-1, keepdim=True) + 1e-20)
            aux = self.aux_loss * self.E * (count.mean(1) / self.K * share.mean(1)).sum(-1).mean()
            self.aux = aux - aux.detach()           # 0, with a gradient
        return chosen.flatten(0, 1), weights.flatten(0, 1)

    def sort(self, chosen):
        """Sort choices by expert, the rows of each filled up with zeros to a multiple. chosen (n, K) ->

        row_of (n, K)       the row of each choice
        choice_of (rows,)   the choice in each row; n K: none, a row of zeros
        ends (E,) int32     where the rows of each expert end

        With a multiple of 2 and experts 1, 0, 1 chosen, row_of is 2, 0, 3 and choice_of is 1, none, 0, 2. The
        number of rows depends on n alone, so nothing waits for the router.
        """
        choices = chosen.flatten()
        count = F.one_hot(choices, self.E).sum(0)
        padded = (count + self.multiple - 1) // self.multiple * self.multiple
        order = choices.argsort(stable=True)
        shift = (padded - count).cumsum(0) - (padded - count)                   # zeros before each expert
        rows = torch.arange(len(order), device=order.device) + shift[choices[order]]
        most = len(order) + (self.multiple - 1) * min(self.E, len(order))
        n_rows = most // self.multiple * self.multiple
        row_of = torch.empty_like(order).scatter(0, order, rows)
        choice_of = torch.full((n_rows,), len(order), device=order.device).scatter(0, rows, order)
        ends = padded.cumsum(0).to(torch.int32)
        ends[-1] = n_rows                           # the zeros at the end are the last expert's
        return row_of.view_as(chosen), choice_of, ends

    def after_forward(self):
        if self.count is not None:
            self.load += self.count
        aux, self.aux, self.count = self.aux, None, None
        return aux

    @torch.no_grad()
    def after_step(self, total):
        load = total(self.load)                     # load_max: tokens of the busiest over its fair share
        self.bias += self.bias_rate * (load.mean() - load).sign()
        found = {"load_max": float(load.max() / load.mean()), "bias_max": float(self.bias.abs().max())}
        self.load.zero_()
        return found

    def forward(self, x, state=None):
        chosen, weights = self.route(x)
        row_of, choice_of, ends = self.sort(chosen)
        tokens = Reorder.apply(x.flatten(0, 1), choice_of // self.K, row_of)
        y = self.experts(tokens, None, ends)        # rows
        y = Reorder.apply(y, row_of.flatten(), choice_of[:, None]).view(*chosen.shape, -1)
        y = (y * weights[:, :, None]).sum(1)        # (B T, C)
        return self.shared(x) + y.view_as(x)


# ---------------------------------------------------------------- GPT

class PreNormBlock(nn.Module):
    """h <- h + f(rmsnorm(h))"""

    def __init__(self, c, mixer):
        super().__init__()
        self.norm = nn.RMSNorm(c.n_embd, eps=1e-5)
        self.mixer = mixer

    def forward(self, h, state=None):
        return h + self.mixer(self.norm(h), state)


def run_again(block, state, h):
    """A block under activation checkpointing. It runs twice, so it gets a copy of the state each time."""
    return block(h, state and dict(state))


class GPT(nn.Module):
    """The standard transformer: pre-norm residual blocks, RMSNorm, untied embedding and head, no biases.

    forward idx (B, T) int64 -> logits (B, T, V) or, with targets (B, T), the mean cross-entropy in nats, ();
    state, for decoding: a list of dicts, one for each block, empty before the first token
    """
    mixers = {"*": Attention, "-": MLP, "M": Mamba, "E": MoE}
    block = PreNormBlock
    activation_checkpointing = False                # keep a block's input alone, and compute the rest twice

    def __init__(self, config):
        super().__init__()
        self.config = c = config.resolve()
        if set(c.pattern) - set(self.mixers):
            known = " and ".join(f"{symbol} ({mixer.__name__})" for symbol, mixer in self.mixers.items())
            raise UserError(f"pattern={c.pattern} must consist of {known}")
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(self.block(c, self.mixers[symbol](c)) for symbol in c.pattern)
        self.norm = nn.RMSNorm(c.n_embd, eps=1e-5)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """Gaussian; smaller where a block writes to the stream: its variance is not to grow with depth."""
        c = self.config
        for weight in self.matrices():
            nn.init.normal_(weight, std=c.init_std)
        for block in self.blocks:
            block.mixer.init_(c.init_std / math.sqrt(len(c.pattern)))

    def matrices(self):
        """Embedding, the mixers' matrices, head, in order: what weight decay acts on."""
        mixers = [weight for block in self.blocks for weight in block.mixer.matrices()]
        return [self.embed.weight, *mixers, self.head.weight]

    def logits(self, h):
        return self.head(self.norm(h))

    def loss(self, h, targets):
        return F.cross_entropy(self.logits(h).float().flatten(0, 1), targets.flatten())

    def forward(self, idx, targets=None, state=None):
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens must fit block_size={self.config.block_size}; crop them")
        if self.config.document_start is not None:
            state = self.find_documents(idx, state or [{} for _ in self.blocks])
        h = self.embed(idx)                         # (B, T, C)
        for i, block in enumerate(self.blocks):
            own = state and state[i]
            if self.activation_checkpointing and torch.is_grad_enabled():
                again = functools.partial(run_again, block, own)
                h = checkpoint(again, h, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, own)
        found = self.logits(h) if targets is None else self.loss(h, targets)
        for block in self.blocks:
            aux = block.mixer.after_forward()
            if aux is not None and targets is not None:
                found = found + aux
        return found

    def find_documents(self, idx, state):
        """The state with starts in it, of the tokens before idx (B, T) and of these."""
        before = state[0].get("starts", idx[:, :0])
        place = torch.arange(before.size(1), before.size(1) + idx.size(1), device=idx.device)
        starts = torch.where(idx == self.config.document_start, place, 0)
        starts = torch.cat([before, starts], 1).cummax(1).values
        for own in state:
            own["starts"] = starts
        return state

    def normalize_(self):
        """Called after every optimizer step: a standard transformer has nothing to normalize."""

    def after_step(self, total=lambda x: x):
        """Called after every optimizer step: what mixers do then, and {name: number} for the log, the largest
        of all mixers. total(x) adds x up over the ranks."""
        found = {}
        for block in self.blocks:
            for name, value in block.mixer.after_step(total).items():
                found[name] = max(value, found.get(name, value))
        return found


# ---------------------------------------------------------------- nGPT

class NormalizedAttention(Attention):
    """Attention of unit vectors: softmax(sqrt(D) (s q)(s k)^T) v, and a unit vector into the projection.

    s is learned, one per query channel. q gets all of s^2 D, since query heads with an s each may share one
    key, and since mix() divides by sqrt(D). source: 2605.06067 appendix A
    """

    def __init__(self, c):
        super().__init__(c)
        self.normalize_inputs = c.normalize_inputs
        self.s_qk = Scale(self.H * self.D, init=1.0, stored=c.init_std)

    def forward(self, x, state=None):
        q, k, v = self.heads(self.qkv(x), state)
        s = self.s_qk().view(self.H, 1, self.D)
        y = self.mix((unit(q) * (s * s * self.D)).to(q.dtype), unit(k), v, state)
        return self.out(unit(y) if self.normalize_inputs else y)


class NormalizedMLP(MLP):
    """The hidden is rescaled by s_u sqrt(C), since a product of unit vectors is about 1/sqrt(C), and made a
    unit vector before fc2. In SwiGLU u gets s_u and v, inside the silu, s_v sqrt(C). source: 2605.06067
    appendix A. The experts of a mixture share one s_u; the shared expert, of another width, has its own.
    """

    def __init__(self, c, linear=nn.Linear):
        super().__init__(c, linear)
        self.normalize_inputs = c.normalize_inputs
        self.s_u = Scale(c.n_ffn, init=1.0, stored=1.0)
        self.s_v = Scale(c.n_ffn, init=1.0, stored=1.0) if self.swiglu else None
        self.root = math.sqrt(c.n_embd)

    def forward(self, x, state=None, *more):
        hidden = self.fc1(x, *more)
        if self.swiglu:
            scale = torch.cat([self.s_u(), self.s_v() * self.root])
        else:
            scale = self.s_u() * self.root
        hidden = self.activate((hidden * scale).to(hidden.dtype))
        return self.fc2(unit(hidden) if self.normalize_inputs else hidden, *more)


class NormalizedMamba(Mamba):
    """Mamba-2 with a unit vector into out_proj. The gated norm stays, but at the start its eps, 1e-5, is as
    large as what it normalizes: in_proj's outputs are cosines, about 1 / sqrt(C)."""

    def __init__(self, c):
        super().__init__(c)
        self.normalize_inputs = c.normalize_inputs

    def forward(self, x, state=None):
        y = self.mix(self.in_proj(x), state)
        return self.out_proj(unit(y) if self.normalize_inputs else y)


class NormalizedMoE(MoE):
    """Experts and the shared expert are normalized MLPs; the router is not normalized."""
    mlp = NormalizedMLP


class HypersphereBlock(nn.Module):
    """h <- unit(h + |a| (unit(f(h)) - h)): a step from h towards the mixer's output, back onto the sphere.

    a is learned, one per channel, and starts at alpha_init: 2410.01131's 0.05 is meant for 20 layers and
    more, and "about 1 / layers" in general. The stream h has norm 1 before and after. Because f's output is
    normalized, the norm of its last GEMM's input changes nothing: normalize_inputs changes the range, not the
    model, but for experts, whose outputs are added up first. source: 2605.06067 appendix A

    We leave h alone, as 2410.01131 does. 2605.06067's code normalizes it once more: its norm being 1, that is
    the same value and another gradient along h, seen by the embedding only, since the unit() of the step
    before lets nothing along h through.
    """

    def __init__(self, c, mixer):
        super().__init__()
        self.mixer = mixer
        self.alpha = Scale(c.n_embd, init=c.alpha_init, stored=c.init_std)

    def forward(self, h, state=None):
        f = unit(self.mixer(h, state).float())
        return unit(h + self.alpha().abs() * (f - h))


class NGPT(GPT):
    """The normalized transformer: every vector that enters a linear layer, and every weight row or column
    along the residual stream, has norm 1. There is no RMSNorm; normalize_() follows every optimizer step.
    """
    mixers = {"*": NormalizedAttention, "-": NormalizedMLP, "M": NormalizedMamba, "E": NormalizedMoE}
    block = HypersphereBlock

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.Identity()                   # the stream is normalized already
        c = self.config                             # s_z learns at one speed, wherever it starts
        self.s_z = Scale(c.vocab_size, init=c.s_z_init, stored=c.s_z_init * c.init_std)
        self.normalize_()

    def logits(self, h):
        """(B, T, V): cosines, times a learned scale for each token of the vocabulary. We scale the weight: to
        scale logits would take a pass over all of them, and a sum over them in the backward."""
        return F.linear(h, self.head.weight * self.s_z()[:, None])

    @torch.no_grad()
    def normalize_(self):
        """Divide every GEMM weight by its L2 norm along the residual stream (C), in place. We find norms in
        fp64: ranks that share a weight add its squares up in another order, and fp32 would show it.

        Rows of what reads from the stream (and of embedding and head), columns of what writes to it.
        source: 2605.06067 appendix A
        """
        weights = [(self.embed.weight, 1), (self.head.weight, 1)]
        for block in self.blocks:
            weights += block.mixer.stream_weights()
        for weight, axis in weights:
            norm = torch.linalg.vector_norm(weight, dim=axis, keepdim=True, dtype=torch.float64)
            weight.div_((norm + 1e-6).to(weight.dtype))


def build(config):
    """A model from its ModelConfig, with the weights of torch's current seed."""
    return {"gpt": GPT, "ngpt": NGPT}[config.arch](config)


def outline(config):
    """The model on the meta device: all shapes, no memory."""
    with torch.device("meta"):
        return build(config)


def compile_blocks(model, **how):
    """Have torch.compile fuse what lies between the GEMMs, block by block: equal ones share a compilation."""
    for block in model.blocks:
        block.compile(dynamic=False, **how)
    model.loss = torch.compile(model.loss, dynamic=False, **how)


# ---------------------------------------------------------------- counting

def count_parameters(model):
    """(all, all but the embedding and idle experts): the second takes part in a GEMM for every token."""
    total = sum(p.numel() for p in model.parameters())
    return total, total - model.embed.weight.numel() - sum(block.mixer.idle() for block in model.blocks)


def training_bytes(model):
    """Bytes of what training keeps for every parameter, in fp32: weight, gradient, two moments of Adam."""
    return 4 * 4 * sum(p.numel() for p in model.parameters())


def rank_bytes(parallel, model, n_ranks):
    """Bytes that one of n ranks holds of weights, gradients and moments; fewer where codes are gathered.

    zero2   1/n of everything, and weights and gradients whole
    fsdp    1/n of everything, and weights and gradients of the largest block, embedding, head and last norm
    """
    state = training_bytes(model)
    if parallel == "ddp" or n_ranks == 1:
        return state
    blocks = [training_bytes(block) for block in model.blocks]
    whole = state if parallel == "zero2" else max(blocks) + state - sum(blocks)
    return state / n_ranks + whole / 2


def flops_per_token(model, T=None):
    """FLOPs of forward and backward for one of T tokens (None: block_size): those of the mixers, and 6 per
    weight of the head."""
    mixers = sum(block.mixer.flops(T or model.config.block_size) for block in model.blocks)
    return mixers + 6 * model.head.weight.numel()


def describe(config, n_ranks=1):
    """The model in text, from the meta device: nothing is allocated, so any size will do."""
    model = outline(config)
    c, (total, active) = model.config, count_parameters(model)
    embedding = model.embed.weight.numel()
    pattern = c.pattern if len(c.pattern) <= 60 else c.pattern[:57] + "..."
    lines = [f"{c.arch}  {pattern}  C={c.n_embd} H={c.n_head} G={c.n_kv_head} D={c.head_dim} F={c.n_ffn} "
             f"V={c.vocab_size} T={c.block_size}",
             f"parameters     {total:,} ({active:,} active; {active + embedding:,} with the embedding)",
             f"FLOPs/token    {flops_per_token(model):.3g} (forward + backward)",
             f"training state {training_bytes(model) / 2**30:.2f} GiB (fp32 weights, gradients, moments)"]
    if n_ranks > 1:
        kept = [f"{way} {rank_bytes(way, model, n_ranks) / 2**30:.2f}" for way in ("ddp", "zero2", "fsdp")]
        lines.append(f"of {n_ranks} ranks".ljust(15) + f"each keeps {', '.join(kept)} GiB at most of it")
    lines += ["", f"{'linear layer':28s} {'out':>8s} {'in':>8s} {'weights':>14s}"]
    matrices = {id(weight) for weight in model.matrices()} - {id(model.embed.weight)}
    for name, p in model.named_parameters():
        if id(p) in matrices:
            out, into = p.shape[-2:]
            lines.append(f"{name.removesuffix('.weight'):28s} {out:8d} {into:8d} {p.numel():14,}")
    return "\n".join(lines)


# ---------------------------------------------------------------- sampling

@torch.no_grad()
def generate(model, idx, n_tokens, temperature=0.8, top_k=50, n_vocab=None, generator=None):
    """Append n_tokens to idx (B, T) int64, each drawn from the top_k likeliest (0: from all) of the first
    n_vocab; a temperature below 1e-6 takes the likeliest.

    The prompt, of which block_size tokens are read at most, leaves a state, and each token after it costs one
    token. Beyond block_size attention sees that many tokens, the last; their keys know of older ones, and
    their positions go on counting. Mamba's state forgets none.
    """
    state, new = [{} for _ in model.blocks], idx[:, -model.config.block_size:]
    for _ in range(n_tokens):
        logits = model(new, state=state)[:, -1, :n_vocab].float()               # (B, V)
        if temperature < 1e-6:
            token = logits.argmax(-1, keepdim=True)
        else:
            if top_k:
                smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            token = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
        idx, new = torch.cat([idx, token], 1), token
    return idx


def sample_text(model, tokenizer, prompt="", n_tokens=200, seed=0, **kw):
    """Text continued from a prompt (an empty one starts a document)."""
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.n_vocab - 1]          # the last: <|endoftext|>
    idx = torch.tensor([ids], device=model.embed.weight.device)
    generator = torch.Generator(idx.device).manual_seed(seed)
    n_vocab = tokenizer.n_vocab                     # the model's may be larger, rounded up for speed
    out = generate(model, idx, n_tokens, n_vocab=n_vocab, generator=generator, **kw)[0].tolist()
    return tokenizer.decode(out if prompt else out[1:])


# ---------------------------------------------------------------- the command line

OWNERS = (("", ModelConfig),)


@dataclass(frozen=True)
class Sampling:
    n_tokens: Count = 200                           # length of the text, in tokens
    temperature: NotNegative = 0.8                  # of the choice; 0: the likeliest token
    top_k: Some = 50                                # choose among so many tokens; 0: among all
    seed: Annotated[int, 0, 2**64 - 1] = 0          # of the choice


def load_model(folder):
    """The trained model of a run in high precision, its tokenizer, and the run's config: (model, tokenizer,
    {field: value}). raises UserError"""
    path = newest_checkpoint(folder)
    saved = load_checkpoint(path)
    try:
        model = build(ModelConfig(**unflatten(saved["config"], OWNERS)))
        if path.is_dir():
            saved["model"] = model.state_dict()
            read_parts(path, {f"model/{name}": tensor for name, tensor in saved["model"].items()}, saved)
        model.load_state_dict(saved["model"])
        if not Path(folder, "tokenizer.json").exists():         # a run of an earlier version
            folder = data_folder(saved["config"]["dataset"])
        tokenizer = load_tokenizer(folder, saved["origin"])
    except (UserError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: {error}") from None
    return model.eval(), tokenizer, saved["config"]


def first_model(config, folder, tokenizer):
    """The model that a run begins with: with the weights of torch's current seed or, where a folder is given,
    of the run there, which must have this tokenizer. raises UserError"""
    model = build(config)
    if folder:
        there, theirs, _ = load_model(folder)
        for name, value in vars(there.config).items():
            mine = getattr(model.config, name)
            if value != mine and name not in ("block_size", "document_start", "mamba_chunk"):
                raise UserError(f"init_from={folder}: has {name}={value}, not {mine}; give the same")
        if theirs.name != tokenizer.name:
            raise UserError(f"init_from={folder}: its tokens are {theirs.name}, not {tokenizer.name}; "
                            f"prepare the text with --tokenizer={folder}")
        model.load_state_dict(there.state_dict())
    return model


@command("model.py")
def main(argv):
    if not argv or "-h" in argv or "--help" in argv:
        print(f"{__doc__.strip()}\n{help_fields((*OWNERS, ('', Sampling)))}")
    elif argv[0].endswith(".py") or argv[0].startswith("-"):
        flag = next((word for word in argv if word.startswith("--ranks=")), "--ranks=1")
        n_ranks = flag.removeprefix("--ranks=")
        if not n_ranks.isdecimal() or int(n_ranks) < 1:
            raise UserError(f"{flag} must be a number of ranks, as in --ranks=8")
        settings, _ = read_settings([word for word in argv if word != flag], OWNERS, partial=True)
        print(describe(ModelConfig(**settings), int(n_ranks)))
    else:
        settings, words = read_settings(argv[1:], (("", Sampling),), files=False)
        model, tokenizer, _ = load_model(argv[0])
        print(sample_text(model, tokenizer, " ".join(words), **settings))


if __name__ == "__main__":
    main(sys.argv[1:])
