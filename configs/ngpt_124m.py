# torchrun --nproc_per_node=8 train.py configs/ngpt_124m.py
# The shape of GPT-2 small (124M with a tied head; 163M here, where embedding and head are separate).
# 480 sequences * 1024 tokens = 491,520 tokens a step; 20,000 steps = 9.8e9 tokens, as many as this makes:
# python data/fineweb_edu/prepare.py    (train.py runs it by itself; --tokens=1e9 makes fewer)
arch = "ngpt"
recipe = "ngpt"
dataset = "fineweb_edu"
n_layer = 12
n_embd = 768
n_head = 12
block_size = 1024
vocab_size = 50304  # GPT-2's 50257, rounded up to a multiple of 128; the data's tokenizer has as many

batch_size = 12
gradient_accumulation_steps = 40
max_steps = 20000
learning_rate = 1.5e-3  # 2410.01131 tunes it for each run, between 1e-3 and 5e-3
eval_interval = 250
eval_iters = 40
checkpoint_interval = 1000
