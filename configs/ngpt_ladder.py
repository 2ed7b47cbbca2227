# python assets/experiments.py recipes
# The ladder's nGPT, beside configs/gpt_ladder.py.
arch = "ngpt"
recipe = "ngpt"
n_layer = 4
n_embd = 128
n_head = 4
n_ffn = 384
block_size = 256
vocab_size = 4096
# Both starting points as in configs/ngpt_tiny.py: s_z at sqrt(n_embd).
s_z_init = 11.3
alpha_init = 0.4

batch_size = 8
max_steps = 600
learning_rate = 8e-3
eval_interval = 600
eval_iters = 64
