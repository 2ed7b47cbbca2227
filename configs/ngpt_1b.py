# torchrun --nproc_per_node=8 train.py configs/ngpt_1b.py
# The 1.2B dense nGPT of 2605.06067: 20 layers, GQA 16/4, squared ReLU, RoPE base 1e6, all layers in FP4.
# 768 sequences * 8192 tokens = 6.29e6 tokens a step; 158,946 steps = 1e12 tokens.
# The paper's vocabulary of 131,072 is kept, and takes any tokenizer of at most that many tokens. For one of
# as many: python data/fineweb_edu/prepare.py --sample=350BT --vocab_size=131072
arch = "ngpt"
recipe = "ngpt"
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
init_std = 0.0221

batch_size = 1
gradient_accumulation_steps = 768
max_steps = 158946
learning_rate = 0.6e-3  # half of GPT's; the paper's released script says 0.3e-3
decay_fraction = 0.15
eval_interval = 500
eval_iters = 64
checkpoint_interval = 500
