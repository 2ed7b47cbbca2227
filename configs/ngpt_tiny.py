# python train.py configs/ngpt_tiny.py
# The default job: a normalized transformer learns English in NVFP4, in minutes on two CPU cores.
# 16 * 256 = 4,096 tokens a step.
arch = "ngpt"
recipe = "ngpt"
n_layer = 4
n_embd = 256
n_head = 4
n_ffn = 768
block_size = 256
vocab_size = 4096

batch_size = 16
max_steps = 400
learning_rate = 8e-3
eval_interval = 100
eval_iters = 8
