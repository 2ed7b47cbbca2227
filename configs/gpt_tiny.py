# python train.py configs/gpt_tiny.py
# The standard transformer beside configs/ngpt_tiny.py: same size, data and length, NVIDIA's NVFP4 recipe.
arch = "gpt"
recipe = "nvfp4"
n_layer = 3
n_embd = 192
n_head = 3
n_ffn = 576
block_size = 128
vocab_size = 4096

batch_size = 16
max_steps = 400
learning_rate = 2e-3
warmup_steps = 40
weight_decay = 0.1
eval_interval = 100
eval_iters = 8
