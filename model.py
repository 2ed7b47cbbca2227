"""GPT and nGPT: one residual stream, a pattern of mixers over it, and two rules for adding to it.

A pattern names the mixers in order: "*" attention, "-" MLP; "*-*-" is a transformer of two layers. A rule
says how a mixer's output joins the stream: pre-norm (GPT), h + f(rmsnorm(h)), or the step on the hypersphere
(nGPT), where the stream has norm 1 and so has every row that enters a linear layer. GPT stands first and is
complete without nGPT; nGPT replaces the mixers, the rule and the head by normalized ones. A mixer alone
knows its weights: which axis of theirs is the residual stream, how they begin, what they cost. A new one is a
class, and its letter in GPT.mixers and NGPT.mixers. Nothing here knows of 4 bits.

Letters
    B T C    batch, time (tokens), channels of the residual stream (n_embd)
    H G D    query heads, key/value heads (n_kv_head), channels of a head (head_dim)
    F V      hidden channels of the MLP (n_ffn), vocabulary
    unit(x)  x / ||x|| along the last axis: Norm in the papers

Sources: 2410.01131 (nGPT), 2605.06067 appendix A (nGPT with normalized GEMM inputs: what makes it natively
4-bit).

    python model.py configs/ngpt_1b.py --n_layer=10    describe a model: parameters, FLOPs, memory, layers
    python model.py out/ngpt_tiny "The state of"       sample from a run
"""
import math
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from configs.config import (Count, NotNegative, Positive, Size, UserError, help_fields, read_settings,
                            unflatten)
from data.files import command
from data.tokens import data_folder, load_tokenizer

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
    vocab_size: Annotated[int, 1, 2**32] | None = None  # None: that of the dataset
    rope_base: NotNegative = 10000.0                # base of the rotary positions; 0: no positions
    init_std: Positive | None = None                # of weights; None: 0.02 (gpt) or 1/sqrt(n_embd) (ngpt)
    normalize_inputs: bool = True                   # ngpt: unit-norm inputs for output projections as well
    s_z_init: Positive = 1.0                        # ngpt: what multiplies the cosines, at the start
    alpha_init: Positive = 0.05                     # ngpt: size of a step on the sphere, at the start

    def resolve(self):
        """The config with every None that depends on other fields filled in; checks that the sizes fit."""
        if not self.vocab_size:
            raise UserError("vocab_size=None must be a number to build a model; set it")
        for name in ("n_layer", "n_embd", "n_head", "block_size", "n_kv_head", "head_dim", "n_ffn"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}; or set "
                             "head_dim")
        c = replace(self,
                    pattern=self.pattern or "*-" * self.n_layer,
                    n_kv_head=self.n_kv_head or self.n_head,
                    head_dim=self.head_dim or self.n_embd // self.n_head,
                    n_ffn=self.n_ffn or 4 * self.n_embd,
                    init_std=self.init_std or (0.02 if self.arch == "gpt" else self.n_embd**-0.5))
        if c.init_std <= 0 or c.rope_base < 0:
            raise UserError(f"init_std={c.init_std} must be > 0 and rope_base={c.rope_base} >= 0")
        if not 0 < c.s_z_init < math.inf or not 0 < c.alpha_init < math.inf:
            raise UserError(f"s_z_init={c.s_z_init} and alpha_init={c.alpha_init} must be positive numbers")
        if c.n_head % c.n_kv_head:
            raise UserError(f"n_head={c.n_head} must be a multiple of n_kv_head={c.n_kv_head}")
        if c.head_dim % 2 and c.rope_base:
            raise UserError(f"head_dim={c.head_dim} must be even for rotary positions; or set rope_base=0")
        return c


# ---------------------------------------------------------------- small pieces

def unit(x):
    """x / ||x|| along the last axis, computed in fp32; a zero vector stays zero."""
    return F.normalize(x.float(), dim=-1, eps=1e-6).to(x.dtype)


def rope_tables(T, D, base, device):
    """cos and sin of position * base^(-2i/D): each (T, D/2) fp32."""
    frequency = base ** (-torch.arange(0, D, 2, device=device).float() / D)
    angle = torch.arange(T, device=device).float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + D/2}) of x (B, H, T, D) by their position's angle; norms stay."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Scale(nn.Module):
    """A learned vector that starts at init, but is stored as stored: weight * (init / stored).

    Adam moves every parameter by about the learning rate a step, whatever its size, so a small stored value
    makes the vector learn faster, by init / stored. source: 2410.01131 section 2.5
    """

    def __init__(self, n, init, stored):
        super().__init__()
        self.weight = nn.Parameter(torch.full((n,), float(stored)))
        self.gain = init / stored

    def forward(self):
        return self.weight * self.gain


# ---------------------------------------------------------------- GPT

class Mixer(nn.Module):
    """What a mixer tells of itself. Where its weights are linear layers, reads() and writes() are enough."""

    def reads(self):
        """[(weight, its axis along the residual stream), ...] of what reads from the stream."""
        raise NotImplementedError

    def writes(self):
        """The same of what writes to it."""
        raise NotImplementedError

    def stream_weights(self):
        """(weight, axis of the stream) of all that touches the stream: what nGPT normalizes."""
        return self.reads() + self.writes()

    def matrices(self):
        """The weights of GEMMs, in order: drawn at random, under weight decay, 6 FLOPs a token for each of
        their numbers. Stacked ones are among them; kernels of convolutions, gains and biases are not."""
        linear = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        known = {id(weight) for weight in linear}
        return linear + [weight for weight, _ in self.stream_weights() if id(weight) not in known]

    def init_(self, std):
        """Called when all matrices have been drawn: what else the mixer wants, std for what writes."""
        for weight, _ in self.writes():
            nn.init.normal_(weight, std=std)

    def flops(self, T):
        """FLOPs of forward and backward for one of T tokens."""
        return 6 * sum(weight.numel() for weight in self.matrices())


class Attention(Mixer):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.H, self.G, self.D, self.rope_base = c.n_head, c.n_kv_head, c.head_dim, c.rope_base
        self.qkv = nn.Linear(c.n_embd, (self.H + 2 * self.G) * self.D, bias=False)
        self.out = nn.Linear(self.H * self.D, c.n_embd, bias=False)

    def reads(self):
        return [(self.qkv.weight, 1)]

    def writes(self):
        return [(self.out.weight, 0)]

    def flops(self, T):
        """Scores and mixing too, their masked half included, as is the custom (2204.02311 appendix B)."""
        return super().flops(T) + 12 * self.H * self.D * T

    def heads(self, x):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, G, T, D), positions in q and k."""
        B, T, _ = x.size()
        q, k, v = self.qkv(x).view(B, T, -1, self.D).transpose(1, 2).split([self.H, self.G, self.G], 1)
        if self.rope_base:
            cos, sin = rope_tables(T, self.D, self.rope_base, x.device)
            q, k = rope(q, cos, sin), rope(k, cos, sin)
        return q, k, v

    def mix(self, q, k, v):
        """softmax(q k^T / sqrt(D)) v, heads side by side: (B, T, H D)."""
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.H != self.G)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x):
        return self.out(self.mix(*self.heads(x)))


class MLP(Mixer):
    """Two linear layers around relu(x)^2, or SwiGLU's three (the first two as one) around u * silu(v).

    The silu is on v, the second half of fc1's output; in Megatron's checkpoints it is on the first.
    """

    def __init__(self, c):
        super().__init__()
        self.swiglu = c.activation == "swiglu"
        self.fc1 = nn.Linear(c.n_embd, c.n_ffn * (2 if self.swiglu else 1), bias=False)
        self.fc2 = nn.Linear(c.n_ffn, c.n_embd, bias=False)

    def reads(self):
        return [(self.fc1.weight, 1)]

    def writes(self):
        return [(self.fc2.weight, 0)]

    def activate(self, hidden):
        """(B, T, F or 2F) -> (B, T, F)."""
        if self.swiglu:
            u, v = hidden.chunk(2, -1)
            return u * F.silu(v)
        return F.relu(hidden).square()

    def forward(self, x):
        return self.fc2(self.activate(self.fc1(x)))


class PreNormBlock(nn.Module):
    """h <- h + f(rmsnorm(h))"""

    def __init__(self, c, mixer):
        super().__init__()
        self.norm = nn.RMSNorm(c.n_embd, eps=1e-5)
        self.mixer = mixer

    def forward(self, h):
        return h + self.mixer(self.norm(h))


class GPT(nn.Module):
    """The standard transformer: pre-norm residual blocks, RMSNorm, untied embedding and head, no biases.

    forward idx (B, T) int64 -> logits (B, T, V) or, with targets (B, T), the mean cross-entropy in nats, ()
    """
    mixers = {"*": Attention, "-": MLP}
    block = PreNormBlock

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

    def forward(self, idx, targets=None):
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens must fit block_size={self.config.block_size}; crop them")
        h = self.embed(idx)                         # (B, T, C)
        for block in self.blocks:
            h = block(h)
        return self.logits(h) if targets is None else self.loss(h, targets)

    def normalize_(self):
        """Called after every optimizer step: a standard transformer has nothing to normalize."""


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

    def forward(self, x):
        q, k, v = self.heads(x)
        s = self.s_qk().view(self.H, 1, self.D)
        y = self.mix((unit(q) * (s * s * self.D)).to(q.dtype), unit(k), v)
        return self.out(unit(y) if self.normalize_inputs else y)


class NormalizedMLP(MLP):
    """The hidden is rescaled by s_u sqrt(C), since a product of unit vectors is about 1/sqrt(C), and made a
    unit vector before fc2. In SwiGLU u gets s_u and v, inside the silu, s_v sqrt(C). source: 2605.06067
    appendix A
    """

    def __init__(self, c):
        super().__init__(c)
        self.normalize_inputs = c.normalize_inputs
        self.s_u = Scale(c.n_ffn, init=1.0, stored=1.0)
        self.s_v = Scale(c.n_ffn, init=1.0, stored=1.0) if self.swiglu else None
        self.root = math.sqrt(c.n_embd)

    def forward(self, x):
        hidden = self.fc1(x)
        if self.swiglu:
            scale = torch.cat([self.s_u(), self.s_v() * self.root])
        else:
            scale = self.s_u() * self.root
        hidden = self.activate((hidden * scale).to(hidden.dtype))
        return self.fc2(unit(hidden) if self.normalize_inputs else hidden)


def hypersphere_step(h, f, a):
    """unit(h + |a| (unit(f) - h)): a step from h towards f, back onto the sphere. h, f (..., C), a (C,).

    h is left alone, as in 2410.01131. 2605.06067's code normalizes it once more: its norm being 1, that is
    the same value and another gradient along h, seen by the embedding only, since the unit() of the step
    before lets nothing along h through. torch.compile fuses it.
    """
    return unit(h + a.abs() * (unit(f.float()) - h))


class HypersphereBlock(nn.Module):
    """h <- unit(h + |a| (unit(f(h)) - h)): a step from h towards the mixer's output, back onto the sphere.

    a is learned, one per channel, and starts at alpha_init: 2410.01131's 0.05 is meant for 20 layers and
    more, and "about 1 / layers" in general. The stream h has norm 1 before and after. Because f's output is
    normalized, scaling its last GEMM's input changes nothing: normalize_inputs changes the range, not the
    model. source: 2605.06067 appendix A
    """

    def __init__(self, c, mixer):
        super().__init__()
        self.mixer = mixer
        self.alpha = Scale(c.n_embd, init=c.alpha_init, stored=c.init_std)

    def forward(self, h):
        return hypersphere_step(h, self.mixer(h), self.alpha())


class NGPT(GPT):
    """The normalized transformer: every vector that enters a linear layer, and every weight row or column
    along the residual stream, has norm 1. There is no RMSNorm; normalize_() follows every optimizer step.
    """
    mixers = {"*": NormalizedAttention, "-": NormalizedMLP}
    block = HypersphereBlock

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.Identity()                   # the stream is normalized already
        c = self.config                             # s_z learns at one speed, wherever it starts
        self.s_z = Scale(c.vocab_size, init=c.s_z_init, stored=c.s_z_init * c.init_std)
        self.normalize_()

    def logits(self, h):
        return self.head(h) * self.s_z()        # (B, T, V): cosines, and a learned temperature for each token

    @torch.no_grad()
    def normalize_(self):
        """Divide every GEMM weight by its L2 norm along the residual stream (C), in fp32, in place.

        Rows of what reads from the stream (and of embedding and head), columns of what writes to it.
        source: 2605.06067 appendix A
        """
        weights = [(self.embed.weight, 1), (self.head.weight, 1)]
        for block in self.blocks:
            weights += block.mixer.stream_weights()
        for weight, axis in weights:
            weight.div_(weight.norm(dim=axis, keepdim=True) + 1e-6)


def build(config):
    """A model from its ModelConfig, with the weights of torch's current seed."""
    return {"gpt": GPT, "ngpt": NGPT}[config.arch](config)


def outline(config):
    """The model on the meta device: all shapes, no memory."""
    with torch.device("meta"):
        return build(config)


# ---------------------------------------------------------------- counting

def count_parameters(model):
    """(all, all but the embedding): the second takes part in a GEMM for every token."""
    total = sum(p.numel() for p in model.parameters())
    return total, total - model.embed.weight.numel()


def flops_per_token(model):
    """FLOPs of forward and backward for one token: those of the mixers, and 6 per weight of the head."""
    mixers = sum(block.mixer.flops(model.config.block_size) for block in model.blocks)
    return mixers + 6 * model.head.weight.numel()


def describe(config):
    """The model in text, from the meta device: nothing is allocated, so any size will do."""
    model = outline(config)
    c, (total, active) = model.config, count_parameters(model)
    pattern = c.pattern if len(c.pattern) <= 60 else c.pattern[:57] + "..."
    lines = [f"{c.arch}  {pattern}  C={c.n_embd} H={c.n_head} G={c.n_kv_head} D={c.head_dim} F={c.n_ffn} "
             f"V={c.vocab_size} T={c.block_size}",
             f"parameters     {total:,} ({active:,} without the embedding)",
             f"FLOPs/token    {flops_per_token(model):.3g} (forward + backward)",
             f"training state {16 * total / 2**30:.2f} GiB (fp32 weights, gradients, two Adam moments)", "",
             f"{'linear layer':28s} {'out':>8s} {'in':>8s} {'weights':>14s}"]
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
    n_vocab; temperature 0 takes the likeliest. Context beyond block_size is dropped from the left."""
    for _ in range(n_tokens):
        logits = model(idx[:, -model.config.block_size:])[:, -1, :n_vocab].float()  # (B, V)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            if top_k:
                smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            token = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
        idx = torch.cat([idx, token], 1)
    return idx


def sample_text(model, tokenizer, prompt="", n_tokens=200, seed=0, **kw):
    """Text continued from a prompt (an empty one starts a document)."""
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.n_vocab - 1]          # the last: <|endoftext|>
    idx = torch.tensor([ids], device=model.embed.weight.device)
    generator = torch.Generator(idx.device).manual_seed(seed)
    n_vocab = tokenizer.n_vocab                     # the model's may be larger, rounded up for speed
    out = generate(model, idx, n_tokens, n_vocab=n_vocab, generator=generator, **kw)[0].tolist()
    return tokenizer.decode(out if prompt else out[1:])


# ---------------------------------------------------------------- checkpoints and the command line

OWNERS = (("", ModelConfig),)


PARTS = {"model": dict, "optimizer": dict, "step": int, "config": dict, "origin": str,      # of a checkpoint
         "rows": int | None}                        # None: earlier versions had none


def load_checkpoint(path, device="cpu"):
    """What train.py saved: a dict of PARTS, without a flipped bit. Whether its tensors are those of a model
    is for misfit() to say. raises UserError"""
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint there; train a run first, or give another folder")
    try:
        with zipfile.ZipFile(path) as archive:      # torch.load does not look at the checksums
            flipped = archive.testzip()
        saved = None if flipped else torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                      # of readers, of whatever the file holds: no code of ours
        raise UserError(f"{path}: not a checkpoint of this code ({error or type(error).__name__})") from None
    if flipped:
        raise UserError(f"{path}: damaged on disk, in {flipped}; copy it anew, or start another run")
    for name, kind in PARTS.items():
        if not isinstance(saved, dict) or not isinstance(saved.get(name), kind):
            raise UserError(f"{path}: not a checkpoint of this code (its {name} is missing)")
    if isinstance(saved["step"], bool) or saved["step"] < 0 or set(map(type, saved["config"])) - {str}:
        raise UserError(f"{path}: not a checkpoint of this code (step {saved['step']}, or its config)")
    return saved


def misfit(found, like, name, free=()):
    """Where a tree of dicts, lists and leaves first differs from another, in words, or None: tensors must be
    finite and agree in shape and dtype, other leaves be equal, but for keys of dicts that are free."""
    if torch.is_tensor(like):
        if not torch.is_tensor(found) or (found.shape, found.dtype) != (like.shape, like.dtype):
            return f"{name} must be {tuple(like.shape)} of {like.dtype}"
        finite = math.isfinite(found.sum()) or found.isfinite().all()           # the sum needs no memory
        return None if finite else f"{name} is not finite"
    if isinstance(like, dict) and isinstance(found, dict):
        if found.keys() != like.keys():
            return f"{name}.{min(found.keys() ^ like.keys(), key=str)} is missing, or should not be there"
        parts = [(found[key], like[key], key) for key in like if key not in free]
    elif isinstance(like, (list, tuple)) and type(found) is type(like) and len(found) == len(like):
        parts = zip(found, like, range(len(like)), strict=True)
    else:
        same = type(found) is type(like) and found == like
        return None if same else f"{name} must be {like}"
    return next(filter(None, (misfit(a, b, f"{name}.{key}", free) for a, b, key in parts)), None)


def load_model(folder, device="cpu"):
    """The trained model of a run in high precision, its tokenizer, and the run's config: (model, tokenizer,
    {field: value}). raises UserError"""
    path = Path(folder) / "ckpt.pt"
    saved = load_checkpoint(path, device)
    try:
        c = ModelConfig(**unflatten(saved["config"], OWNERS))
        wrong = misfit(saved["model"], dict(outline(c).state_dict()), "model")
        tokenizer = load_tokenizer(data_folder(str(saved["config"].get("dataset"))), saved["origin"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if wrong:
        raise UserError(f"{path}: {wrong}")
    model = build(c).to(device)
    model.load_state_dict(saved["model"])
    return model.eval(), tokenizer, saved["config"]


@command("model.py")
def main(argv):
    if not argv or "-h" in argv or "--help" in argv:
        print(f"{__doc__.strip()}\n{help_fields(OWNERS)}")
    elif argv[0].endswith(".py") or argv[0].startswith("-"):
        settings, _ = read_settings(argv, OWNERS, partial=True)
        print(describe(ModelConfig(**settings)))
    else:
        model, tokenizer, _ = load_model(argv[0])
        print(sample_text(model, tokenizer, " ".join(argv[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
