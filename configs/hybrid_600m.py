# torchrun --nproc_per_node=8 train.py configs/hybrid_600m.py
# The small Mamba-2 + MoE hybrid of 2605.06067, standard: 6 Mamba-2, 5 MoE and an attention mixer, no
# positions, about 590M parameters, of which 400M, the embedding included, are active, NVIDIA's NVFP4 recipe
# with all layers in FP4. The shared expert's width, 3072, is what makes those sums.
# 64 sequences * 8192 tokens = 524,288 tokens a step; 68,665 steps = 36e9 tokens.
arch = "gpt"
recipe = "nvfp4"
fp4_tail = 0.0
dataset = "fineweb_edu"
pattern = "MEMEM*EMEMEM"
n_embd = 1024
n_head = 8
n_kv_head = 4
head_dim = 128
n_ffn = 1536
block_size = 8192
vocab_size = 131072
rope_base = 0
init_std = 0.0198
mamba_n_head = 16
moe_n_expert = 16
moe_n_active = 4

batch_size = 1
gradient_accumulation_steps = 64
max_steps = 68665
learning_rate = 1.2e-3
warmup_steps = 10000
decay_fraction = 0.15
weight_decay = 0.1
eval_interval = 500
eval_iters = 64
checkpoint_interval = 500
