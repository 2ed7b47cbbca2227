# torchrun --nproc_per_node=8 train.py configs/gpt_1b.py
# The 1.2B dense GPT of 2605.06067 beside configs/ngpt_1b.py: twice the learning rate, warm-up over a million
# samples, weight decay 0.1, NVIDIA's NVFP4 recipe with all layers in FP4, as in the paper.
# 768 sequences * 8192 tokens = 6.29e6 tokens a step; 158,946 steps = 1e12 tokens.
arch = "gpt"
recipe = "nvfp4"
fp4_tail = 0.0
dataset = "fineweb_edu"
n_layer = 20
n_embd = 2048
n_head = 16
n_kv_head = 4
head_dim = 128
n_ffn = 6144
block_size = 8192
vocab_size = 131072
rope_base = 1e6
init_std = 0.0198

batch_size = 1
gradient_accumulation_steps = 768
max_steps = 158946
learning_rate = 1.2e-3
warmup_steps = 1302
decay_fraction = 0.15
weight_decay = 0.1
eval_interval = 500
eval_iters = 64
checkpoint_interval = 500
