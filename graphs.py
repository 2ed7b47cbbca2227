"""A training step's micro-batch as a CUDA graph: one launch in place of thousands, with no Python in between.

What a GPU does in a micro-batch is the same each time, but for the tokens and the random keys. So its kernels
are recorded once and replayed. In 4 bits the layer's Python takes longer than its kernels: on an H200 a
micro-batch of ngpt_124m took 127 ms, and 47.7 as a graph (LOG.md). To capture is to record: nothing runs
meanwhile, and nothing may compile. So a step runs as it stands first, and is captured when it comes again.
"""
import torch

import nvfp4


class Graph:
    """work(run, idx, targets), forward and backward of a micro-batch of a train.Run, which returns its loss,
    captured.

    A replay uses the same memory each time: we copy tokens and random keys there, and gradients add up there.
    Weights are quantized once a step, by a graph of their own.
    """

    def __init__(self, run, shape, work):
        self.layers = [m for m in nvfp4.fp4_layers(run.model) if m.cfg.active]
        pool = torch.cuda.graph_pool_handle()
        self.idx, self.targets = torch.zeros(2, *shape, dtype=torch.int64, device=run.device)
        self.keys = [m.keys.clone() for m in self.layers]
        self.drawn = None                           # seed and step in which the weights were quantized
        for m, keys in zip(self.layers, self.keys, strict=True):
            m.keys = keys                           # kernels will read here; set_step() makes others
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)
        nvfp4.forget_weights(run.model)
        torch.cuda.empty_cache()                    # a graph has memory of its own
        if self.layers:                             # what it returns is kept: the second graph reads it
            self.weights = capture(lambda: [m.current_weight() for m in self.layers], pool)
        self.micro_batch, self.loss = capture(lambda: work(run, self.idx, self.targets), pool)
        nvfp4.forget_weights(run.model)

    def replay(self, idx, targets):
        self.idx.copy_(idx)
        self.targets.copy_(targets)
        if self.layers:
            torch._foreach_copy_(self.keys, [m.keys for m in self.layers])
            if self.drawn != self.layers[0].drawn:
                self.drawn = self.layers[0].drawn
                self.weights[0].replay()
        self.micro_batch.replay()
        return self.loss


def capture(work, pool):
    """(CUDA graph of work(), what work() returned: each replay writes it anew, to the same place)."""
    graph = torch.cuda.CUDAGraph()
    # errors of this thread alone: NCCL asks for events from another, which would end the capture
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        return graph, work()


def why_no_graph(run):
    """Why a run's micro-batches are no CUDA graph, in words; None: they are."""
    if run.device.type != "cuda" or not run.c.compile or not run.c.cuda_graph:
        return "it takes a GPU, --compile and --cuda_graph"
    if run.ranks.sharded:
        return "ranks exchange weights and gradients meanwhile"
    if run.c.model.document_start is not None:
        return "documents are kept apart"
    if any(block.mixer.waits for block in run.model.blocks):
        return "experts wait to know how many tokens each has"
    formats = {m.cfg.format_of(name) for m in nvfp4.fp4_layers(run.model) for name in nvfp4.OPERANDS}
    if not all(nvfp4.FORMATS[name].kernels for name in formats):
        return f"no kernels for {', '.join(sorted(formats))}"
    return None


def graph_of(run, shape, work):
    """The Graph of this step's micro-batches. None: they run as they stand, also in the first step of a kind;
    another recipe or length is another kind."""
    if why_no_graph(run):
        return None
    kind = shape, [m.cfg for m in nvfp4.fp4_layers(run.model)]
    if run.kind != kind:
        run.kind, run.graph = kind, None
        run.optimizer.zero_grad(set_to_none=True)
    elif run.graph is None:
        run.graph = Graph(run, shape, work)
    return run.graph
