# torchrun --nproc_per_node=8 train.py configs/gpt_124m.py
# The standard transformer beside configs/ngpt_124m.py, in NVIDIA's NVFP4 recipe.
# 480 sequences * 1024 tokens = 491,520 tokens a step; 20,000 steps = 9.8e9 tokens.
arch = "gpt"
recipe = "nvfp4"
dataset = "fineweb_edu"
n_layer = 12
n_embd = 768
n_head = 12
block_size = 1024
vocab_size = 50304  # GPT-2's 50257, rounded up to a multiple of 128; the data's tokenizer has as many

batch_size = 12
gradient_accumulation_steps = 40
max_steps = 20000
learning_rate = 6e-4
warmup_steps = 700
weight_decay = 0.1
eval_interval = 250
eval_iters = 40
checkpoint_interval = 1000
