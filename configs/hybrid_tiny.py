# python train.py configs/hybrid_tiny.py
# The standard hybrid beside configs/ngpt_hybrid_tiny.py: same size, data and length, NVIDIA's NVFP4 recipe.
arch = "gpt"
recipe = "nvfp4"
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

batch_size = 16
max_steps = 400
learning_rate = 2e-3
warmup_steps = 40
weight_decay = 0.1
eval_interval = 100
eval_iters = 8
