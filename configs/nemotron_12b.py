# python model.py configs/nemotron_12b.py --ranks=64    (what each GPU would keep; --parallel=fsdp trains it)
# The 12B Mamba-2 hybrid of 2509.25149, trained on 10T tokens in NVFP4: 28 Mamba-2, 28 MLP and 6 attention
# mixers, no positions; the first 2 and the last 8 mixers in high precision. Heads of Mamba have 80 channels
# in the model that was released; the paper says 64. It names no warm-up and no initial std: none, and 0.02.
# 736 sequences * 8192 tokens = 6.03e6 tokens a step; 1,658,564 steps = 1e13 tokens.
arch = "gpt"
recipe = "nvfp4"
fp4_head_blocks = 2
fp4_tail = 0.13  # 8 of 62
dataset = "fineweb_edu"
pattern = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
n_embd = 5120
n_head = 40
n_kv_head = 8
head_dim = 128
n_ffn = 20480
block_size = 8192
vocab_size = 131072
rope_base = 0
mamba_n_head = 128
mamba_head_dim = 80

batch_size = 1
gradient_accumulation_steps = 736
max_steps = 1658564
learning_rate = 4.5e-4
min_lr = 4.5e-6
decay_fraction = 0.2
weight_decay = 0.1
eval_interval = 500
eval_iters = 64
checkpoint_interval = 500
