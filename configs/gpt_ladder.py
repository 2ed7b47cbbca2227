# python assets/experiments.py recipes
# The ladder's GPT: many short runs, of minutes on one core. 8 * 256 = 2,048 tokens a step, 1.2M in all.
arch = "gpt"
recipe = "nvfp4"
n_layer = 4
n_embd = 128
n_head = 4
n_ffn = 384
block_size = 256
vocab_size = 4096

batch_size = 8
max_steps = 600
learning_rate = 2e-3
warmup_steps = 60
weight_decay = 0.1
eval_interval = 600
eval_iters = 64
