# python train.py configs/ngpt_hybrid_tiny.py
# The normalized Mamba-2 + MoE hybrid in NVFP4 on the text of configs/ngpt_tiny.py, and longer than that one:
# 400 steps of 16 * 256 tokens. 2 of 8 experts and a shared one meet a token: 7.2M parameters, 3.8M active.
arch = "ngpt"
recipe = "ngpt"
pattern = "MEM*EMEM"
n_embd = 256
n_head = 4
n_ffn = 256
block_size = 256
vocab_size = 4096
rope_base = 0
mamba_n_head = 16
mamba_head_dim = 16
mamba_n_group = 2
mamba_n_state = 32
mamba_chunk = 32
s_z_init = 16.0  # where a run of minutes starts, as in configs/ngpt_tiny.py
alpha_init = 0.4

batch_size = 16
max_steps = 400
learning_rate = 4e-3
eval_interval = 100
eval_iters = 8
