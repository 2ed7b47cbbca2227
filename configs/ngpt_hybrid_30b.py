# python model.py configs/ngpt_hybrid_30b.py --ranks=64   (what a GPU would keep; --parallel=fsdp trains it)
# The 3B/30B Mamba-2 + MoE hybrid of 2605.06067, normalized: the pattern of Nemotron 3 Nano (2512.20848),
# 31.6B parameters of which 3.2B are active, nGPT's recipe, the last 15 % of the mixers in high precision.
# 3072 sequences * 8192 tokens = 25.2e6 tokens a step; 39,736 steps = 1e12 tokens; the paper stopped at half.
# Later production runs also keep attention and Mamba's out_proj in high precision:
# --fp4_skip=*qkv,*mixer.out,*out_proj (heads and routers always are)
arch = "ngpt"
recipe = "ngpt"
fp4_tail = 0.15
dataset = "fineweb_edu"
pattern = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
n_embd = 2688
n_head = 32
n_kv_head = 2
head_dim = 128
n_ffn = 1856
block_size = 8192
vocab_size = 131072
rope_base = 0
init_std = 0.0192
mamba_n_head = 64
moe_n_expert = 128
moe_n_active = 6

batch_size = 1
gradient_accumulation_steps = 3072
max_steps = 39736
learning_rate = 0.5e-3  # half of the standard model's
decay_fraction = 0.15
eval_interval = 500
eval_iters = 64
checkpoint_interval = 500
