# python train.py configs/ngpt_tiny.py
# The default job: a normalized transformer learns English in NVFP4, in minutes on two CPU cores.
# 16 * 128 = 2,048 tokens a step.
arch = "ngpt"
recipe = "ngpt"
n_layer = 3
n_embd = 192
n_head = 3
n_ffn = 576
block_size = 128
vocab_size = 4096
# A run of minutes starts nearer to where a long one ends than the paper does (s_z 1, alpha 0.05): cosines are
# small, about 1 / sqrt(n_embd), so logits begin flat and their temperature s_z, 61 in trained models, has
# little time to grow; and 0.05 is a step for 20 layers and more (LOG.md).
s_z_init = 16.0
alpha_init = 0.4

batch_size = 16
max_steps = 400
learning_rate = 4e-3
eval_interval = 100
eval_iters = 8
